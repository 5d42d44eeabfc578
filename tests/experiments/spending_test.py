"""What a sweep of private data has spent: every executed step of every run, finished, unfinished or deleted."""

import dataclasses
import json
import shutil

import pytest

from accounting.accountant import Accountant
from accounting.mechanism import dp_sgd
from experiments.sweep import privacy
from experiments.sweep.folder import SweepFolder
from tests.accounting import tuning_test


@dataclasses.dataclass(frozen=True)
class Private:
    """A grid, as far as spending looks at it."""

    public_data: bool = False


@pytest.fixture
def folder(tmp_path):
    """Two runs: one of 100 steps, and one that was interrupted after 40 and is not finished."""
    for name, steps in (("a", 100), ("b", 40)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        tuning_test.write_run(tmp_path / "runs" / name / "run", steps, name)
    return SweepFolder(tmp_path, public_data=False)


def epsilon(steps):
    plan = dp_sgd(10_000, 200, None, 1.0, 1.0, steps, "zero_out")
    return Accountant(plan).epsilon(1e-6).upper


def said(folder):
    return json.loads(folder.report_file.read_text())


def test_an_unfinished_run_counts_with_the_steps_that_it_has_executed(folder):
    privacy.write(folder, Private())
    assert epsilon(140) <= said(folder)["epsilon"] <= epsilon(140) + 1e-4 and said(folder)["runs"] == 2
    assert "finish" not in (folder.path / "runs/a/run/ledger.jsonl").read_text()


@pytest.mark.parametrize("first", [privacy.write, privacy.write_unfinished])
def test_a_deleted_run_has_been_executed_all_the_same(first, folder):
    first(folder, Private())
    shutil.rmtree(folder.path / "runs/a")
    privacy.write(folder, Private())
    assert epsilon(140) <= said(folder)["epsilon"] <= epsilon(140) + 1e-4 and said(folder)["runs"] == 2


def test_a_run_that_was_put_back_and_went_on_otherwise_counts_with_both_ends(folder):
    """100 steps, then its own beginning of 50 again and one step elsewhere: 101 releases, whatever is deleted then."""
    shutil.rmtree(folder.path / "runs/b")
    for way in ([("laptop", 0, 100)], [("laptop", 0, 50), ("server", 50, 51)]):
        shutil.rmtree(folder.path / "runs/a/run")
        tuning_test.write_way(folder.path / "runs/a/run", way)
        privacy.write(folder, Private())
    assert epsilon(101) <= said(folder)["epsilon"] <= epsilon(101) + 1e-4 and said(folder)["runs"] == 1
    shutil.rmtree(folder.path / "runs/a")
    privacy.write(folder, Private())
    assert epsilon(101) <= said(folder)["epsilon"] <= epsilon(101) + 1e-4


def test_half_a_line_of_a_killed_process_spoils_no_report(folder):
    with open(folder.path / "runs/b/run/ledger.jsonl", "a") as file:
        file.write('{"kind":"st')
    privacy.write(folder, Private())
    assert epsilon(140) <= said(folder)["epsilon"] <= epsilon(140) + 1e-4


def test_a_run_that_went_on_counts_once_and_whole(folder):
    privacy.write(folder, Private())
    shutil.rmtree(folder.path / "runs/b/run")
    tuning_test.write_run(folder.path / "runs/b/run", 60, "b")
    privacy.write(folder, Private())
    assert epsilon(160) <= said(folder)["epsilon"] <= epsilon(160) + 1e-4 and said(folder)["runs"] == 2
