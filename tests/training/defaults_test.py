"""What is taken where settings are left out."""

import pytest

from accounting.errors import InputError
from dpgemma.gemma import decoder
from dpgemma.gemma.presets import PRESETS
from dpgemma.training import defaults
from dpgemma.training.prepare import prepare
from dpgemma.training.settings import Settings


def of(name, **changes):
    model = PRESETS[name]
    given = dict(from_checkpoint=True, adapters=False) | changes
    return defaults.of(decoder.num_parameters(model), model.max_length, 160, **given)


def test_rates_fall_with_size_and_rise_with_how_little_is_trained():
    sizes = ["tiny", "gemma3_270m", "gemma3_1b", "gemma3_4b", "gemma3_12b", "gemma3_27b"]
    for ways in (dict(), dict(adapters=True), dict(from_checkpoint=False)):
        rates = [of(name, **ways).learning_rate for name in sizes]
        assert rates == sorted(rates, reverse=True) and len(set(rates[1:])) == 5
    for name in sizes[1:]:
        scratch, adapters, full = (
            of(name, **w).learning_rate for w in (dict(from_checkpoint=False), dict(adapters=True), {})
        )
        assert scratch > full and adapters == pytest.approx(10 * full, rel=0.1)
    # Where others have looked (Brown et al. 2020, table 2.1, without privacy): no more than a factor of 4 away.
    assert 2e-4 / 4 < of("gemma3_1b").learning_rate < 2e-4 * 4


def test_rows_fill_the_context_up_to_1024_where_a_checkpoint_is_tuned():
    assert of("gemma3_270m").sequence_length == of("vaultgemma_1b").sequence_length == 1024
    assert of("tiny").sequence_length == 256 and of("tiny", from_checkpoint=False).sequence_length == 128
    assert of("vaultgemma_1b", from_checkpoint=False).sequence_length == 1024


def test_what_is_given_stays_and_what_is_omitted_is_known():
    settings = Settings(model="vaultgemma_1b", learning_rate=1.0)
    assert (settings.learning_rate, settings.dtype, settings.remat, settings.batch_size) == (
        1.0,
        "bfloat16",
        "block",
        1024,
    )
    assert settings.omitted == ("sequence_length", "batch_size", "warmup_steps", "dtype", "remat")
    assert (
        settings.with_fitting_batch(100).batch_size == 25
        and settings.with_fitting_batch(100).omitted == settings.omitted
    )
    assert settings.with_fitting_batch(4096) is settings
    assert settings.replaced(mesh="data:2").omitted == settings.omitted
    assert Settings(batch_size=90).with_fitting_batch(100).batch_size == 90
    with pytest.raises(InputError, match="no Hugging Face directory"):
        Settings(init_from="/nowhere")


def test_a_batch_that_is_left_out_does_not_tell_how_many_units_there_are(tmp_path):
    """Under add_or_remove their number is private: the default follows the declared one."""
    batches = []
    for count in (90, 150):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(f'{{"prompt": "{i}", "response": "a"}}\n' for i in range(count)))
        settings = Settings(
            model="ladder_20k", data=str(path), sequence_length=16, steps=1, num_units=200, mesh="data:1",
            neighbouring_relation="add_or_remove", holdout_fraction=0.0,
        )  # fmt: skip
        with prepare(settings, str(tmp_path / f"run_{count}")) as trainer:
            batches.append(trainer.plan.mechanism.expected_batch_size)
    assert batches == [50, 50]
