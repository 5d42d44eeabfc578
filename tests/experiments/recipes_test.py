"""Every recipe is one that `train` takes, keeps within its epsilon, and compiles."""

import pathlib

import pytest
from absl import flags

import experiments
from accounting.accountant import Accountant
from accounting.mechanism import ZERO_OUT, dp_sgd
from dpgemma.commands import train
from dpgemma.gemma import decoder, lora
from dpgemma.gemma.presets import PRESETS
from dpgemma.privacy.clipping import Strategy
from dpgemma.sharding.rules import MeshShape, wanted
from dpgemma.training import plan
from dpgemma.training.settings import Settings
from tests.sharding import eight

FOLDER = pathlib.Path(experiments.__file__).parent / "recipes"
# The preset with the sizes of what a recipe trains, and units of a data set that it is for.
RECIPES = {
    "vaultgemma_1b": ("vaultgemma_1b", 12_695_312_500),  # 13T tokens in rows of 1024
    "gemma3_1b_full": ("gemma3_1b", 1_000_000),
    "gemma3_1b_lora": ("gemma3_1b", 200_000),
    "gemma3_27b_full": ("gemma3_27b", 5_000_000),
    "gemma3_27b_lora": ("gemma3_27b", 500_000),
    "laptop": ("tiny", 20_000),
}
slow = pytest.mark.slow


def settings_of(name, **others):
    """The settings that `train` makes of a recipe, as its command does."""
    fv = flags.FlagValues()
    train.define_flags(fv)
    assert fv(["train", f"--flagfile={FOLDER / name}.flags"]) == ["train"]
    given = {field: fv[field].value for field in Settings.__dataclass_fields__ if fv[field].present}
    start = {"init_from": "a folder"} if "model" not in given else {}
    return Settings(**given, **start, **others)


def test_every_recipe_is_listed():
    assert {path.stem for path in FOLDER.glob("*.flags")} == set(RECIPES)
    assert {path.suffix for path in FOLDER.iterdir() if path.is_file()} == {".flags"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=slow if n == "vaultgemma_1b" else ()) for n in RECIPES])
def test_a_recipe_keeps_within_its_epsilon(name):
    preset, units = RECIPES[name]
    settings = settings_of(name)
    assert settings.model in (None, preset)
    if settings.noise_multiplier:
        batches = (settings.batch_size, settings.max_batch_size)
        mechanism = dp_sgd(units, *batches, settings.noise_multiplier, settings.clip_norm, settings.steps, ZERO_OUT)
    else:
        mesh, strategy = str(wanted(settings.mesh) or MeshShape(1)), Strategy("example_scan", 1)
        parameters = decoder.num_parameters(PRESETS[preset])
        mechanism = plan.resolve(settings, units, parameters, mesh, strategy, epsilon_given=True).mechanism
    assert Accountant(mechanism).upper(settings.delta) <= settings.epsilon * (1 + 1e-9)
    assert mechanism.steps == settings.steps, "the target ends no recipe early"


def test_vaultgemmas_numbers_are_the_published_ones():
    settings = settings_of("vaultgemma_1b")
    published = dict(batch_size=517_989, noise_multiplier=0.614, steps=100_000, epsilon=2, delta=1.1e-10)
    assert {name: getattr(settings, name) for name in published} == published
    assert (settings.sequence_length, settings.privacy_unit, settings.model) == (1024, "sequence", "vaultgemma_1b")
    assert wanted(settings.mesh).devices == 2048 and 1 - 517_989 / settings.max_batch_size < 0.02


@pytest.mark.parametrize("name", [pytest.param(n, marks=slow) for n in RECIPES])
def test_the_step_of_a_recipe_compiles(name):
    preset, _ = RECIPES[name]
    settings = settings_of(name)
    shape = settings.as_dict() | {"clipping": "example_scan", "microbatch_size": settings.microbatch_size or 1}
    found = eight.result_of(f"compiled_bytes({preset!r}, {shape!r}, {settings.lora_rank!r})")
    config = PRESETS[preset]
    adapted = lora.adapters(config, settings.lora_rank, 1.0, "all") if settings.lora_rank else None
    assert found > (2 if adapted else 4) * config.vocab_size * config.d_model / 2, "the embedding at least is held"
