import dataclasses
import inspect
import json

import jax
import numpy as np
import pytest

from accounting.errors import InputError
from dpgemma.gemma.presets import PRESETS
from dpgemma.privacy.clipping import Strategy
from dpgemma.training import checkpoint, clipping_choice
from dpgemma.training.clipping_choice import Trial
from dpgemma.training.settings import Settings
from tests.objectives import causal
from tests.training import runs

MODEL = dataclasses.replace(
    PRESETS["tiny"], d_model=16, d_ff=24, num_heads=2, num_kv_heads=1, head_dim=8, vocab_size=300
)
LONG = Settings(mesh="data:1", steps=10**9, sequence_length=16)
OBJECTIVE = causal(MODEL, length=16)


@pytest.fixture(autouse=True)
def choices(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dpgemma" / "clipping.json"


def resolve(settings, objective=OBJECTIVE, measure=clipping_choice.measure):
    return clipping_choice.resolve(settings, settings.mesh, objective, measure=measure)


def trials(*seconds):
    return [
        Trial(*way, second, 2**20) if second else Trial(*way, temporary_bytes=2**40, refused="needs 1024.0 GiB of 1.0")
        for way, second in zip(clipping_choice.CANDIDATES, seconds, strict=False)
    ]


def test_the_fastest_that_fits_is_taken_and_remembered(choices):
    calls = []

    def measure(*_):
        calls.append(1)
        return trials(0.3, 0.2, None, 0.1, 0.4)

    chosen, log = resolve(LONG, measure=measure)
    assert (chosen.name, chosen.microbatch_size) == clipping_choice.CANDIDATES[3]
    assert "ghost by 1: 100 ms a unit, 1 MiB" in log and "needs 1024.0 GiB of 1.0" in log
    again, log = resolve(LONG, measure=measure)
    assert again == chosen and calls == [1] and "as in an earlier trial" in log
    # Another shape is another question; a damaged cache is none.
    resolve(LONG, causal(MODEL, length=32), measure)
    assert len(json.loads(choices.read_text())) == 2 and calls == [1, 1]
    choices.write_text("{")
    assert resolve(LONG, measure=measure)[0] == chosen and len(calls) == 3


def test_what_is_given_is_kept():
    given = dataclasses.replace(LONG, clipping="ghost")
    assert resolve(given) == (Strategy("ghost", 1), None)
    only, _ = resolve(dataclasses.replace(LONG, microbatch_size=3))
    assert (only.name, only.microbatch_size) == ("example_scan", 3)


def test_where_nothing_fits_the_leanest_is_tried_all_the_same():
    chosen, _ = resolve(LONG, measure=lambda *_: trials(None, None, None, None, None))
    assert (chosen.name, chosen.microbatch_size) == ("example_scan", 1)


def test_a_short_run_needs_no_trial():
    assert resolve(Settings(mesh="data:1"), measure=lambda *_: pytest.fail("measured"))[0].name == "example_scan"


@pytest.mark.slow
def test_real_trials_are_timed_and_held_against_the_memory(quick_compiles):
    ways = (("example_scan", 1), ("ghost", 2))
    measured = clipping_choice.measure(OBJECTIVE, LONG.mesh, ways)
    assert [(t.strategy, t.microbatch_size) for t in measured] == list(ways)
    assert all(t.refused is None and 0 < t.seconds < 10 and t.temporary_bytes > 0 for t in measured)
    assert all("needs" in t.refused for t in clipping_choice.measure(OBJECTIVE, LONG.mesh, ways[:1], limit=1000.0))


class Observed:
    """An objective that notes which rows of noise it gave, and whose loss may fail."""

    def __init__(self, fails=False):
        self.given, self._fails = [], fails

    def __getattr__(self, name):
        return getattr(OBJECTIVE, name)

    def noise_rows(self, count):
        self.given.append(OBJECTIVE.noise_rows(count))
        return self.given[-1]

    def loss(self, *arguments):
        if self._fails:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 40G of 16G")
        return OBJECTIVE.loss(*arguments)


def test_a_device_that_runs_out_of_memory_refuses_a_way_and_not_the_run():
    trial, *_ = clipping_choice.measure(Observed(fails=True), LONG.mesh, (("ghost", 2),))
    assert trial.refused.startswith("RESOURCE_EXHAUSTED")


def test_a_trial_looks_at_no_data(quick_compiles):
    """It gets an objective, which holds no data, and takes that objective's rows of noise, once."""
    observed = Observed()
    clipping_choice.measure(observed, LONG.mesh, (("ghost", 2),))
    (rows,) = observed.given
    assert {name: (column.shape[1:], column.dtype.name) for name, column in rows.items()} == {
        name: (column.shape, column.dtype) for name, column in OBJECTIVE.spec.items()
    }
    assert set(inspect.signature(clipping_choice.measure).parameters) == {"objective", "mesh", "ways", "limit"}


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(clip_thresholds="dimension"), "`clipping`=per_layer"),
        (dict(clip_scaling="automatic", clip_norm=2.0), "no clip norm"),
        (dict(clip_scaling="automatic", clip_quantile=0.5), "no clip norm"),
        (dict(clip_scaling="normalise", clip_norm=np.inf, epsilon=np.inf), "finite `clip_norm`"),
        (dict(clip_quantile=1.5), "between 0 and 1"),
        (dict(clip_quantile=0.5, clipping="per_layer"), "`clip_quantile`"),
        (dict(microbatch_size=0), "at least 1"),
    ],
)
def test_impossible_settings_are_refused(flags, message):
    with pytest.raises(InputError, match=message):
        Settings(**flags)


def test_a_fully_sharded_mesh_takes_ways_that_hold_no_gradients(text, tmp_path):
    asked = []

    def measure(objective, mesh, ways):
        asked.extend(ways)
        return [Trial(*way, seconds=1.0) for way in ways]

    settings = dataclasses.replace(LONG, mesh="fsdp:2", remat="block")
    assert resolve(settings, measure=measure)[0].name == "ghost" and {name for name, _ in asked} == {"ghost"}
    only = dataclasses.replace(settings, microbatch_size=3)
    assert resolve(only, measure=measure)[0] == Strategy("ghost", 3)
    for changes, message in (
        (dict(), "--remat=none keeps every gathered layer"),
        (dict(remat="block", clipping="example_scan"), "--clipping=example_scan holds whole gradients"),
    ):
        done = runs.call(*runs.flags(text, tmp_path / "run", mesh="fsdp:2", **changes))
        assert done.returncode == 2 and message in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_may_go_on_fully_sharded_where_its_clipping_can(text, tmp_path):
    scanned = runs.flags(text, tmp_path / "scanned", steps=2, remat="block", clipping="example_scan")
    assert runs.call(*scanned).returncode == 0
    done = runs.call(*runs.flags(text, tmp_path / "scanned", steps=2, remat="block", mesh="fsdp:2"))
    assert done.returncode == 2 and "--clipping=example_scan holds whole gradients" in done.stderr
    ghost = dict(steps=2, remat="block", clipping="ghost")
    for mesh in ("data:2", "fsdp:2"):
        assert runs.call(*runs.flags(text, tmp_path / "ghost", mesh=mesh, **ghost)).returncode == 0
    assert runs.call(*runs.flags(text, tmp_path / "new", mesh="fsdp:2", **ghost)).returncode == 0
    for name in ("ghost", "new"):
        assert runs.call("audit", tmp_path / name).returncode == 0


def test_noise_that_hides_the_quantile_is_refused(text, tmp_path):
    done = runs.call(*runs.flags(text, tmp_path / "run", noise_multiplier=8.0, clip_quantile=0.5))
    assert (
        done.returncode == 2 and "--clip_quantile cannot be followed" in done.stderr and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(clipping="ghost", microbatch_size=2), marks=pytest.mark.slow),
        pytest.param(
            dict(clipping="per_layer", clip_thresholds="dimension", clip_scaling="automatic"), marks=pytest.mark.slow
        ),
        pytest.param(dict(clip_quantile=0.5, clip_norm=0.01, batch_size=24), marks=pytest.mark.slow),
    ],
    ids=["ghost", "per_layer_automatic", "adaptive"],
)
def test_runs_of_other_kinds_resume_bit_for_bit(options, text, tmp_path):
    workdir = tmp_path / "run"
    arguments = runs.flags(text, workdir, steps=4, learning_rate=1e-3, **{"noise_multiplier": 0.6} | options)
    assert runs.call(*arguments).returncode == 0
    report, config = (json.loads((workdir / f"{name}.json").read_text()) for name in ("report", "config"))
    assert report["deviations"] == [] and config["clipping"] == options.get("clipping", "example_scan")
    assert ("followed the 0.5 quantile" in report["statement"]) == ("clip_quantile" in options)
    assert ("divided by their norm" in report["statement"]) == ("clip_scaling" in options)
    assert runs.call("audit", workdir).returncode == 0
    before = checkpoint.latest_parameters(workdir / "checkpoints")[1]
    for path in (workdir / "checkpoints/4").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    again = runs.call(*arguments)
    assert again.returncode == 0 and "resuming at step 2" in again.stderr
    after = checkpoint.latest_parameters(workdir / "checkpoints")[1]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def test_scalars_of_numpy_are_numbers():
    settings = Settings(steps=np.int64(5), learning_rate=np.float32(0.5), seed=np.uint8(3))
    assert settings == Settings(steps=5, learning_rate=0.5, seed=3) and type(settings.steps) is int
    assert json.loads(json.dumps(settings.as_dict()))["steps"] == 5
    with pytest.raises(InputError, match="`steps` must be of type int"):
        Settings(steps=np.float64(5))


@pytest.mark.parametrize(
    "recorded",
    [
        {},
        {"clipping": "ghostly", "microbatch_size": 1},
        {"clipping": "ghost", "microbatch_size": 0},
        {"clipping": "ghost", "microbatch_size": None},
        {"clipping": ["ghost"], "microbatch_size": "1"},
    ],
)
def test_a_damaged_record_of_the_choice_is_refused(recorded):
    with pytest.raises(InputError, match="is damaged"):
        clipping_choice.as_before(Settings(), recorded)
