import dataclasses
import math

import pytest
from absl import flags

from accounting.errors import InputError
from dpgemma.commands import train
from dpgemma.gemma import presets
from dpgemma.training.settings import Settings
from experiments.sweep import checks, grid

PUBLIC = {"public_data": True}
ONE = {"model": "ladder_20k", "noise_batch_ratio": 0, "learning_rate": 0.01, "steps": 8}


def parsed(*tables, shared=None, public_data=True):
    return grid.parse(
        {"sweep": {"public_data": public_data}, "train": shared or {}, "grid": list(tables)}, "sweep.toml"
    )


def test_every_combination_of_the_lists_is_a_run():
    made = parsed(
        {**ONE, "noise_batch_ratio": [0, "2^-7", 0.25], "learning_rate": ["2^-7", "2^-7.5"]}, shared={"batch_size": 32}
    )
    assert [(run.noise_batch_ratio, run.config.learning_rate) for run in made.runs] == [
        (ratio, rate) for ratio in (0, 2**-7, 0.25) for rate in (2**-7, 2**-7.5)
    ]
    assert [run.config.noise_multiplier for run in made.runs[::2]] == [0, 0.25, 8]
    assert all(
        run.config.epsilon == math.inf and run.config.mesh == "data:1" and run.config.batch_size == 32
        for run in made.runs
    )


def test_a_table_overrides_what_is_shared_and_adds_to_the_tables_before():
    made = parsed(ONE, {**ONE, "steps": 9, "held_out": True}, shared={"steps": 3, "seed": 5})
    assert [(run.config.steps, run.config.seed, run.held_out) for run in made.runs] == [(8, 5, False), (9, 5, True)]


def test_a_run_named_twice_is_one_and_is_held_out_only_if_no_table_wants_it_fitted():
    twice = parsed({**ONE, "held_out": True}, ONE)
    assert len(twice.runs) == 1 and not twice.runs[0].held_out
    assert parsed({**ONE, "held_out": True}, {**ONE, "held_out": True}).runs[0].held_out


def test_ids_are_unique_and_stable():
    made = parsed({**ONE, "seed": [0, 1], "noise_batch_ratio": [0, "2^-9"]})
    assert len({run.id for run in made.runs}) == 4
    assert parsed(dict(reversed(ONE.items()))).runs[0].id == parsed(ONE).runs[0].id == parsed({}, shared=ONE).runs[0].id
    # The same number is the same setting, however the file writes it.
    assert (
        parsed({**ONE, "learning_rate": 1, "steps": 8.0}).runs
        == parsed({**ONE, "learning_rate": "1^5", "steps": 8}).runs
    )
    assert parsed({**ONE, "checkpoint_every": 7}).runs[0].id == parsed(ONE).runs[0].id


def test_the_file_of_the_documentation_is_read(tmp_path):
    path = tmp_path / "sweep.toml"
    example = grid.__doc__[grid.__doc__.index("    [sweep]") : grid.__doc__.index("Noise is injected")]
    path.write_text(example)
    made = grid.read(path)
    assert made.public_data and len(made.runs) == 3 * 3 * 2 and {run.config.steps for run in made.runs} == {640}


@pytest.mark.parametrize(
    "table",
    [ONE, {**ONE, "noise_batch_ratio": 0.3, "learning_rate": 1 / 3, "data": "a b'.txt", "max_batch_size": 1024}],
)
def test_the_commands_flags_give_the_same_configuration(table):
    run = parsed(table).runs[0]
    name, *arguments = run.arguments("some where/run")
    fv = flags.FlagValues()
    train.define_flags(fv)
    fv([name, *arguments])
    assert Settings(**{field.name: fv[field.name].value for field in dataclasses.fields(Settings)}) == run.config
    assert name == "train" and fv.workdir == "some where/run" and fv["epsilon"].present


BAD = {
    "unknown table": ({"sweep": PUBLIC, "grids": []}, "unknown table [grids]"),
    "unknown sweep setting": ({"sweep": {"public": True}, "grid": [ONE]}, "[sweep] has no setting 'public'"),
    "undeclared data": ({"grid": [ONE]}, "must say public_data"),
    "no boolean": ({"sweep": {"public_data": "yes"}, "grid": [ONE]}, "must say public_data"),
    "sweep is no table": ({"sweep": 3, "grid": [ONE]}, "must be tables"),
    "train is no table": ({"sweep": PUBLIC, "train": [1], "grid": [ONE]}, "must be tables"),
    "grid is one table": ({"sweep": PUBLIC, "grid": ONE}, "write [[grid]]"),
    "grid of numbers": ({"sweep": PUBLIC, "grid": [1]}, "write [[grid]]"),
    "no run": ({"sweep": PUBLIC}, "declares no run"),
    "empty axis": ({"sweep": PUBLIC, "grid": [{**ONE, "model": []}]}, "model is an empty list"),
    "no ratio": ({"sweep": PUBLIC, "grid": [{"model": "tiny"}]}, "needs noise_batch_ratio"),
    "epsilon": ({"sweep": PUBLIC, "grid": [{**ONE, "epsilon": 3}]}, "epsilon is not a grid's to set"),
    "noise multiplier": (
        {"sweep": PUBLIC, "train": {"noise_multiplier": 1}, "grid": [ONE]},
        "noise_multiplier is not a grid's to set",
    ),
    "weights": ({"sweep": PUBLIC, "grid": [{**ONE, "init_from": "x"}]}, "random weights; to compare settings"),
    "no setting": ({"sweep": PUBLIC, "grid": [{**ONE, "learningrate": 1}]}, "'learningrate' is no setting"),
    "negative ratio": ({"sweep": PUBLIC, "grid": [{**ONE, "noise_batch_ratio": -1}]}, "not negative"),
    "infinite ratio": ({"sweep": PUBLIC, "grid": [{**ONE, "noise_batch_ratio": math.inf}]}, "must be finite"),
    "no number": ({"sweep": PUBLIC, "grid": [{**ONE, "noise_batch_ratio": math.nan}]}, "must be a number or a power"),
    "no power": ({"sweep": PUBLIC, "grid": [{**ONE, "learning_rate": "2**-7"}]}, "must be a number or a power"),
    "power of nothing": ({"sweep": PUBLIC, "grid": [{**ONE, "learning_rate": "0^-7"}]}, "must be a number or a power"),
    "power beyond numbers": (
        {"sweep": PUBLIC, "grid": [{**ONE, "learning_rate": "2^99999"}]},
        "must be a number or a power",
    ),
    "list of lists": ({"sweep": PUBLIC, "grid": [{**ONE, "steps": [[1]]}]}, "steps must be a whole number"),
    "half a step": ({"sweep": PUBLIC, "grid": [{**ONE, "steps": 1.5}]}, "steps must be a whole number"),
    "true steps": ({"sweep": PUBLIC, "grid": [{**ONE, "steps": True}]}, "steps must be a whole number"),
    "model is a number": ({"sweep": PUBLIC, "grid": [{**ONE, "model": 1}]}, "model must be text"),
    "no steps": ({"sweep": PUBLIC, "grid": [{**ONE, "steps": 0}]}, "`steps` must be at least 1"),
    "no choice": ({"sweep": PUBLIC, "grid": [{**ONE, "optimizer": "adam"}]}, "`optimizer` must be one of"),
    "held out": ({"sweep": PUBLIC, "grid": [{**ONE, "held_out": [True]}]}, "held_out must be true or false"),
    "infinite clip norm": ({"sweep": PUBLIC, "grid": [{**ONE, "clip_norm": math.inf}]}, "clip_norm must be finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_grids_are_refused_with_a_sentence(case):
    content, message = BAD[case]
    with pytest.raises(InputError) as error:
        grid.parse(content, "sweep.toml")
    assert message in str(error.value) and "sweep.toml" in str(error.value)


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        grid.read(tmp_path / "none.toml")
    for content in (b"[sweep", b"\xff\xfe"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(InputError, match="is no TOML"):
            grid.read(tmp_path / "bad.toml")


MODEL = {"layers": 2, "d_model": 24, "heads": 2, "d_ff": 64}


def with_models(**tables):
    table = {"model": ["ladder_20k", "mine"], "noise_batch_ratio": 0, "learning_rate": 0.01, "steps": 4}
    return {"sweep": {"public_data": True}, "train": {"sequence_length": 16}, "grid": [table], "model": tables}


def test_a_grid_may_have_models_of_its_own():
    own, again = (grid.parse(with_models(mine=sizes), "f") for sizes in (MODEL, dict(reversed(MODEL.items()))))
    assert [run.config.model for run in own.runs] == ["ladder_20k", "block:layers=2,d_model=24,heads=2,d_ff=64"]
    assert own == again, "the order in the file is no part of a run's name"
    small, mine = (run.config.model for run in own.runs)
    assert checks.parameters(small) == checks.parameters(mine) == 20_184
    wide = grid.parse(with_models(mine=MODEL | {"vocab_size": 1000, "max_length": 32}), "f").runs[1].config.model
    assert checks.parameters(wide) == 20_184 + 24 * 740 and presets.named(wide).max_length == 32


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"mine": {"layers": 2}}, "lacks d_model, heads, d_ff"),
        ({"mine": MODEL | {"width": 3}}, "'width=3' is not one of layers"),
        ({"mine": MODEL | {"layers": 0}}, "sizes lie between 1"),
        ({"mine": MODEL | {"layers": True}}, "'layers=True' is not one of"),
        ({"mine": MODEL | {"d_model": 26}}, "multiple of twice the heads"),
        ({"mine": 3}, "model must hold tables"),
        ({"tiny": MODEL}, "has the name of a preset"),
        ({"other": MODEL}, "mine is no preset"),
    ],
)
def test_models_that_are_none_are_refused(tables, said):
    with pytest.raises(InputError, match=said):
        checks.check(grid.parse(with_models(**tables), "f"), data=False)
