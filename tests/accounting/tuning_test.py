import json
import math

import dp_accounting
import pytest
from dp_accounting import dp_event

from accounting import tuning
from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.ledger.chain import Ledger
from accounting.mechanism import ZERO_OUT, dp_sgd
from accounting.mechanism.histogram import unit_steps

PLAN = dp_sgd(10_000, 200, None, 1.0, 1.0, 100)


@pytest.mark.parametrize("distribution, shape", [("geometric", 1.0), ("logarithmic", 0.0), ("poisson", math.inf)])
def test_pitfall_25_random_search_costs_what_papernot_and_steinke_prove(distribution, shape):
    event = dp_event.RepeatAndSelectDpEvent(PLAN.event(100), 10, shape)
    theirs = dp_accounting.rdp.RdpAccountant().compose(event).get_epsilon(1e-6)
    ours = tuning.random_search_epsilon(PLAN, 10, distribution, 1e-6)
    assert ours == pytest.approx(theirs, rel=1e-9)
    once = Accountant(PLAN).epsilon(1e-6)
    assert once.cross_check < ours < Accountant([PLAN] * 10).epsilon(1e-6).upper
    assert tuning.random_search_epsilon(PLAN, 100, distribution, 1e-6) > ours


def test_random_search_with_a_cap_pays_for_truncation_in_every_trial():
    capped = dp_sgd(10_000, 200, 300, 1.0, 1.0, 100, ZERO_OUT)
    free = tuning.random_search_epsilon(PLAN, 10, "geometric", 1e-6)
    assert free <= tuning.random_search_epsilon(capped, 10, "geometric", 1e-6) <= free * 1.01
    tight = dp_sgd(10_000, 200, 230, 1.0, 1.0, 100, ZERO_OUT)
    assert tuning.random_search_epsilon(tight, 10, "geometric", 1e-6) == math.inf


@pytest.mark.parametrize(
    "trials, distribution, message", [(0.5, "geometric", "at least 1"), (5, "fixed", "distributed as")]
)
def test_impossible_searches_are_refused(trials, distribution, message):
    with pytest.raises(InputError, match=message):
        tuning.random_search_epsilon(PLAN, trials, distribution, 1e-6)


START = dict(
    num_units=10_000, expected_batch_size=200, max_batch_size=None, noise_multiplier=1.0, clip_norm=1.0, steps=100,
    neighbouring_relation=ZERO_OUT, sampler="poisson", epsilon=3.0, delta=1e-6, privacy_unit="sequence",
    sequence_length=32,
    config_sha256="", seal="", model="tiny", parameters=1, held_out_units=0, trained_parameters=1, architecture={},
    init_sha256=None, secret_keys=True,
)  # fmt: skip
# What ledgers say since they may hold histograms.
NEW = dict(format=5, environment="here", seal_key=None, grid_bits=None)


def write_run(folder, steps, run_id, histogram=None, **changes):
    folder.mkdir()
    ledger = Ledger.open(folder / "ledger.jsonl")
    facts = START | changes
    ledger.append("start", run_id=run_id, **facts)
    if histogram is not None:
        ledger.append(**histogram)
    for step in range(steps):
        ledger.append_step(
            step, {"sampling_probability": 0.02, "noise_multiplier": facts["noise_multiplier"], "max_batch_size": None}
        )
    ledger.close()
    return folder


def test_histograms_of_runs_add_up(tmp_path, capsys):
    """Each counts, but for one that copies of a run share; a run may have released nothing else."""
    from dpgemma import cli

    counts = [round(x * unit_steps(4.0)) / unit_steps(4.0) for x in (1.5, 2.5, 2.25)]
    line = {"kind": "histogram", "labels": ["a", "b"], "counts": counts[:2], "noise": 4.0}
    for name, run_id, steps, changes in (
        ("a", "a", 100, {}), ("copy", "a", 100, {}), ("forged", "a", 100, {"counts": counts[1:]}),
        ("b", "b", 0, {}), ("plain", "c", 100, None),
    ):  # fmt: skip
        write_run(tmp_path / name, steps, run_id, histogram=None if changes is None else line | changes, **NEW)

    def epsilon(*names):
        assert cli.main(["account", f"--compose={','.join(str(tmp_path / name) for name in names)}", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["epsilon"]

    released = dp_sgd(10_000, 10_000, None, 4.0, 1.0, 1, ZERO_OUT, grid_bits=26)
    steps = dp_sgd(10_000, 200, None, 1.0, 1.0, 100, ZERO_OUT)

    def together(runs, histograms):
        return Accountant([*[steps] * runs, *[released] * histograms]).epsilon(1e-6).upper

    assert epsilon("a") == pytest.approx(together(1, 1), rel=1e-3)
    assert epsilon("a", "copy") == epsilon("a")
    with pytest.raises(InputError, match="different counts under the same noise"):
        tuning.runs([tmp_path / "a", tmp_path / "forged"])
    twice = write_run(tmp_path / "twice", 100, "d", histogram=line, **NEW)
    lines = (twice / "ledger.jsonl").read_text().splitlines(keepends=True)
    ledger = Ledger.open(twice / "ledger.jsonl")
    ledger.append(**line)
    ledger.close()
    assert len(lines) == 102
    with pytest.raises(InputError, match="holds several histograms"):
        tuning.runs([twice])
    assert epsilon("a", "b") == pytest.approx(together(1, 2), rel=1e-3)
    assert epsilon("b") == pytest.approx(together(0, 1), rel=1e-3)
    assert epsilon("b", "plain") == pytest.approx(together(1, 1), rel=1e-3)
    assert epsilon("plain") < epsilon("a") - 0.01


def test_pitfall_25_runs_on_the_same_data_add_up(tmp_path, capsys):
    from dpgemma import cli

    folders = [write_run(tmp_path / "a", 100, "a"), write_run(tmp_path / "b", 40, "b", noise_multiplier=0.8)]
    assert cli.main(["account", f"--compose={folders[0]},{folders[1]}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    other = dp_sgd(10_000, 200, None, 0.8, 1.0, 40, ZERO_OUT)
    expected = Accountant([dp_sgd(10_000, 200, None, 1.0, 1.0, 100, ZERO_OUT), other]).epsilon(1e-6)
    assert result["epsilon"] == expected.upper and result["delta"] == 1e-6 and result["steps"] == 140
    assert [(run["run_id"], run["steps"]) for run in result["runs"]] == [("a", 100), ("b", 40)]
    assert (
        max(run["epsilon"] for run in result["runs"])
        < result["epsilon"]
        < sum(run["epsilon"] for run in result["runs"])
    )
    assert "All 2 runs together" in result["statement"]

    assert cli.main(["account", f"--compose={folders[0]},{folders[1]}", "--tables"]) == 0
    out = capsys.readouterr().out
    assert "run_id a" in out and "run_id b" in out and "units of one owner" in out


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(run_id="a", expected_batch_size=100), "begin differently"),
        (dict(sequence_length=64), "differ in sequence_length"), (dict(delta=1e-5), "different deltas"),
        (dict(neighbouring_relation="add_or_remove"), "differ in neighbouring_relation"),
        # Rows of tokens of another tokenizer, or of other text, are other units.
        (dict(architecture={"vocab_size": 256_000}), "differ in"
                                                     " vocab_size"), (dict(num_units=9_990), "differ in number of"
                                                                                             " units"),
        (dict(secret_keys=False), "public seed"),
    ],
)  # fmt: skip
def test_runs_that_do_not_add_up_are_refused(changes, message, tmp_path, capsys):
    from dpgemma import cli

    folders = [write_run(tmp_path / "a", 10, "a"), write_run(tmp_path / "b", 10, changes.pop("run_id", "b"), **changes)]
    assert cli.main(["account", f"--compose={folders[0]},{folders[1]}"]) == 2
    assert message in capsys.readouterr().err


# Two laptops and a server: (steps, place) in turn, from the first step.
WAYS = {
    "whole": [("laptop", 0, 100)],
    "beginning": [("laptop", 0, 60)],
    "moved": [("laptop", 0, 60), ("server", 60, 100)],
    "moved, with a loss": [("laptop", 0, 60), ("server", 50, 90)],
    "moved and back": [("laptop", 0, 60), ("server", 60, 80), ("laptop", 80, 100)],
    "begun elsewhere, then moved": [("laptop", 0, 0), ("desktop", 0, 60), ("server", 60, 100)],
    "resumed": [("laptop", 0, 60), ("laptop", 40, 100)],
}


@pytest.mark.parametrize(
    "ways, steps",
    [
        (["whole", "beginning"], 100), (["beginning", "whole"], 100), (["whole", "resumed"], 100),
        (["whole", "moved"], 140), (["moved", "whole"], 140), (["moved, with a loss"], 100),
        (["whole", "moved, with a loss"], 140), (["moved", "moved, with a loss"], 140),
        (["moved", "moved and back"], 120), (["whole", "moved and back"], 140),
        (["whole", "moved", "moved and back"], 160), (["moved", "begun elsewhere, then moved"], 200),
    ],
)  # fmt: skip
def test_a_fork_costs_what_it_adds(ways, steps, tmp_path, capsys):
    """Shared steps once; a step that returns to an earlier place after others elsewhere has noise of its own."""
    from dpgemma import cli

    folders = [write_way(tmp_path / str(i), WAYS[way]) for i, way in enumerate(ways)]
    assert cli.main(["account", f"--compose={','.join(map(str, folders))}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == steps
    assert result["epsilon"] == Accountant(dp_sgd(10_000, 200, None, 1.0, 1.0, steps, ZERO_OUT)).epsilon(1e-6).upper
    counted = [run["steps"] - run["steps_of_runs_before"] for run in result["runs"]]
    assert sum(counted) == steps and counted[0] == result["runs"][0]["steps"]
    assert ("of another: steps" in result["statement"]) == (len(ways) > 1)


def test_what_a_run_deviates_in_stands_beside_the_sum(tmp_path, capsys):
    """The ledger of these runs says that their sums were floats, which no guarantee covers."""
    from dpgemma import cli

    folders = [write_way(tmp_path / str(i), WAYS["whole"]) for i in range(2)]
    assert cli.main(["account", f"--compose={','.join(map(str, folders))}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [["float32" in line for line in run["deviations"]] for run in result["runs"]] == [[True], [True]]
    assert all(f"In {folder}, sums and noise are float32 numbers" in result["statement"] for folder in folders)
    assert cli.main(["account", f"--compose={','.join(map(str, folders))}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("deviations sums and noise are float32 numbers") == 2 and "(solved)" not in shown


def write_way(folder, way):
    folder.mkdir()
    (first, _, _), *_ = way
    ledger = Ledger.open(folder / "ledger.jsonl")
    ledger.append("start", run_id="a", format=4, environment=first, grid_bits=None, seal_key=None, **START)
    group = {"sampling_probability": 0.02, "noise_multiplier": 1.0, "max_batch_size": None}
    for number, (place, begin, end) in enumerate(way):
        if number:
            ledger.append("resume", step=begin, environment=place)
        for step in range(begin, end):
            ledger.append_step(step, group)
    ledger.close()
    return folder


def test_a_folder_given_twice_and_forks_of_an_older_format_are_refused(tmp_path, capsys):
    from dpgemma import cli

    a = write_run(tmp_path / "a", 10, "a")
    b = write_run(tmp_path / "b", 10, "a")
    assert cli.main(["account", f"--compose={a},{a}/."]) == 2 and "given twice" in capsys.readouterr().err
    assert cli.main(["account", f"--compose={a},{b}", "--json"]) == 0  # the same run, moved
    assert json.loads(capsys.readouterr().out)["steps"] == 10
    ledger = Ledger.open(b / "ledger.jsonl")
    ledger.append("resume", step=10, environment="server")
    ledger.append_step(10, {"sampling_probability": 0.02, "noise_multiplier": 1.0, "max_batch_size": None})
    ledger.close()
    assert cli.main(["account", f"--compose={a},{b}", "--json"]) == 0  # one begins as the other
    assert json.loads(capsys.readouterr().out)["steps"] == 11
    ledger = Ledger.open(a / "ledger.jsonl")
    ledger.append("resume", step=10, environment="laptop")
    ledger.close()
    assert cli.main(["account", f"--compose={a},{b}"]) == 2 and "equal noise" in capsys.readouterr().err


def test_what_is_composed_says_where_it_started_and_counts_what_has_only_begun(tmp_path, capsys):
    from dpgemma import cli

    folders = [
        write_run(tmp_path / "a", 10, "a", init_sha256="5a" * 32),
        write_run(tmp_path / "b", 0, "b", num_units=9_000, held_out_units=1_000),
    ]
    assert cli.main(["account", f"--compose={folders[0]},{folders[1]}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (
        result["runs"][1]["steps"]
        == result["runs"][1]["epsilon"]
        == 0
        < result["runs"][0]["epsilon"]
        == result["epsilon"]
    )
    assert "5a5a" in result["statement"] and "NOT covered" in result["statement"]
    for flag in ("--neighbouring_relation=add_or_remove", "--sampler=fixed", "--trials_distribution=poisson"):
        assert cli.main(["account", f"--compose={folders[0]}", flag]) == 2
        assert f"drop {flag.partition('=')[0]}" in capsys.readouterr().err
