"""dpgemma plan, as people ask: by chips and hours, with a model, a batch or steps that are fixed, without a delta."""

import json
import shlex

import pytest
from absl import flags

from dpgemma.commands import command_flags
from dpgemma.training.settings import Settings
from tests.training.runs import call

USUAL = dict(compute=4e12, num_units=1e5, epsilon=8)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def planned(*switches, **given):
    done = call("plan", *switches, *(f"--{name}={value}" for name, value in given.items()), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_delta_follows_from_the_units_and_the_command_trains_the_plan():
    said = planned(**USUAL)
    assert said["delta"] == pytest.approx(1e5**-1.1) and "to the power of -1.1 (--delta)" in said["notes"][0]
    assert said["epochs"] == pytest.approx(said["steps"] * said["expected_batch_size"] / 1e5)
    program, command, *arguments = shlex.split(said["command"])
    values = flags.FlagValues()
    command_flags.define_from_dataclass(Settings, values)
    values(["train", *arguments])
    settings = Settings(**{name: values[name].value for name in Settings.__dataclass_fields__})
    assert (program, command) == ("dpgemma", "train") and settings.schedule == "constant"
    for name, value in {
        "model": said["model"], "batch_size": said["expected_batch_size"], "steps": said["steps"], "epsilon": 8.0,
        "sequence_length": 64, "learning_rate": pytest.approx(said["learning_rate"], rel=0.01),
        "delta": pytest.approx(said["delta"], rel=1e-5),
    }.items():  # fmt: skip
        assert getattr(settings, name) == value, name


def test_chips_and_hours_are_compute():
    said = planned(chips="a100:2", hours=0.0005, mfu=0.5, num_units=1e5, epsilon=8, delta=1e-6)
    assert said["compute"] == pytest.approx(2 * 312e12 * 0.5 * 1.8)
    assert "2 chips of 3.12e+14 operations a second at peak, of which 50% are assumed (--mfu)" in said["notes"][0]


def test_users_with_several_rows_cost_the_compute_of_all_of_them():
    said = planned(**USUAL, delta=1e-6, rows_per_unit=4)
    arguments = dict(part.split("=") for part in shlex.split(said["command"])[2:])
    assert arguments["--sequence_length"] == "64" and arguments["--rows_per_unit"] == "4"
    operations = 6 * said["parameters"] * said["expected_batch_size"] * said["steps"] * 64 * 4
    assert operations == pytest.approx(USUAL["compute"], rel=0.02)


def test_a_model_that_does_not_fit_the_memory_is_not_planned():
    budget = dict(compute=1e14, num_units=1e6, epsilon=64, delta=1e-7)
    free = planned(**budget, memory=1)
    assert free["parameters"] > 20_184
    assert planned(**budget, memory=0.0005)["model"] == "ladder_20k"  # 26,800 parameters at 20 bytes each
    refused = call("plan", *(f"--{name}={value}" for name, value in budget.items()), "--memory=0.0001")
    assert refused.returncode == 2 and "--memory holds a model of 5.37e+03 parameters at most" in refused.stderr
    large = dict(compute=1e21, num_units=1e8, epsilon=8, delta=1e-9, law="published")
    assert planned(**large, memory=0.5)["parameters"] <= 0.5 * 2**30 / 20 < planned(**large)["parameters"]


def test_compute_that_is_no_number_is_told_how_machines_are_said():
    done = call("plan", "--compute=8xH100x3d", "--num_units=1e6", "--epsilon=8")
    assert done.returncode == 2 and "is not a number: give operations such as 1e20, or --chips=h100:8" in done.stderr


def test_fine_tuning_has_no_law_and_what_helps_is_said():
    done = call("plan", "--compute=1e13", "--num_units=1e6", "--epsilon=8", "--init_from=gemma3_1b")
    assert done.returncode == 2 and "there is no law of fine-tuning" in done.stderr and "account" in done.stderr


@pytest.mark.slow
def test_the_least_epsilon_for_a_loss_reaches_it():
    said = planned(compute=4e12, num_units=1e5, delta=1e-6, loss=2.05)
    assert said["predicted_loss"] <= 2.05 * 1.015 and "is about the least epsilon" in said["notes"][0]
    assert planned(compute=4e12, num_units=1e5, delta=1e-6, epsilon=said["epsilon"] / 1.3)["predicted_loss"] > 2.05


@pytest.mark.slow
def test_what_is_fixed_stays():
    best = planned(**USUAL, delta=1e-6)
    fixed = planned(**USUAL, delta=1e-6, model="ladder_45k", batch_size=512)
    assert fixed["model"] == "ladder_45k" and fixed["expected_batch_size"] == 512
    assert fixed["steps"] == round(4e12 / (6 * 64 * fixed["parameters"] * 512))
    steps = planned(**USUAL, delta=1e-6, steps=300)
    assert steps["steps"] == 300 and {each["steps"] for each in steps["near_optimal"]} == {300}
    assert min(fixed["predicted_loss"], steps["predicted_loss"]) >= best["predicted_loss"] * 0.99


def test_without_privacy_the_answer_is_chinchillas():
    said = planned(compute=1e13, num_units=1e5, epsilon="inf")
    clean = said["non_private"]
    assert said["epsilon"] == "inf" and 6 * clean["parameters"] * clean["tokens"] == pytest.approx(1e13)


def test_a_delta_at_which_units_may_be_shown_whole_is_said():
    assert any("delta is above 1 / num_units" in note for note in planned(**USUAL, delta=1e-3)["notes"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(num_units=1e5, epsilon=8), "--compute, or --chips and --hours"),
        (dict(USUAL, chips="h100:8"), "--compute, or --chips and --hours"),
        (dict(USUAL, hours=3), "--hours and --mfu belong to --chips"),
        (dict(chips="h100:8", num_units=1e5, epsilon=8), "--chips needs --hours"),
        (dict(chips="h100:8", hours=1, mfu=1.5, num_units=1e5, epsilon=8), "--mfu must lie between 0 and 1"),
        (dict(chips="cpu:2", hours=1, num_units=1e5, epsilon=8), "--chips names accelerators"),
        (dict(chips="abacus:2", hours=1, num_units=1e5, epsilon=8), "--chips=abacus:2 names an unknown chip"),
        (dict(USUAL, num_units=0), "--num_units must be at least 1, got 0"),
        (dict(USUAL, num_units=-1), "--num_units must be at least 1, got -1"),
        (dict(USUAL, num_units=1), "and 1 units give 1: give another"),
        (dict(USUAL, batch_size=0), "--batch_size must lie between 1 and the number of units"),
        (dict(USUAL, batch_size=1e6), "--batch_size must lie between 1 and the number of units"),
        (dict(USUAL, steps=0), "--steps must be at least 1"),
        (dict(USUAL, epsilon="inf", model="ladder_45k"), "--model has no meaning with --epsilon=inf"),
        (dict(USUAL, batch_size=10, steps=10), "drop --steps or --batch_size"),
        (dict(USUAL, model="gemma9"), "--model=gemma9 is none that the law knows: choose one of ladder_20k"),
        (dict(USUAL, model="ladder_45k", batch_size=16), "compute must lie between"),
        (dict(USUAL, epsilon=0), "--epsilon must be positive"),
        (dict(USUAL, rows_per_unit=0), "--rows_per_unit must be at least 1"),
        (dict(USUAL, loss=2), "leave out one of --epsilon, --num_units and --compute"),
        (dict(compute=4e12, epsilon=8, loss=2), "--delta is missing: without --num_units no rule gives it"),
        (dict(compute=4e12, num_units=1e5, loss=-1), "--loss must be positive and finite"),
        (dict(USUAL, law="published", figures="x"), "--figures is not for --law=published"),
        (dict(USUAL, law="published", epsilon="inf"), "the published table has no run without noise"),
        (dict(USUAL, law="published"), "compute must lie between"),
        (dict(USUAL, compute=1e19), "there is a law of published runs: --law=published"),
        (dict(USUAL, delta=2), "--delta must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(given, message):
    done = call("plan", *(f"--{name}={value}" for name, value in given.items()))
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
