"""What a whole sweep costs in privacy: every run counts, chosen or not.

Formal guarantee: for private data, the reported epsilon is that of all executed steps of all runs together, finished or not; so it holds
for whoever sees every checkpoint of every run, and for every choice made by looking at nothing else of the data. The losses that a
law is fitted to are raw: they lie in private/, and a choice made by them is not covered. Tested by
tests/experiments/sweep_test.py::test_pitfall_25_a_sweep_of_private_data_adds_up_all_its_runs.
"""

import math

from accounting import report, tuning
from accounting.accountant import Accountant
from experiments.sweep.folder import SweepFolder
from experiments.sweep.grid import Grid

PUBLIC = (
    "This sweep ran on data that its grid declares to be public. Its runs claim no privacy, its table shows raw training losses, and"
    " nothing in it costs the privacy of other data to which its law is applied."
)
_RAW = (
    " The training losses in private/results.csv are raw and NOT covered: settings chosen by them may reveal something about single units;"
    " choose by models and public data alone, or run the sweep on public data."
)


def summary(folder: SweepFolder, grid: Grid) -> dict:
    """The content of report.json."""
    executed = [run for run in grid.runs if (folder.run_folder(run) / "ledger.jsonl").is_file()]
    common = {"public_data": grid.public_data, "runs": len(executed)}
    if grid.public_data:
        return common | {"epsilon": None, "delta": None, "statement": PUBLIC}
    found = tuning.runs([folder.run_folder(run) for run in executed])
    delta = max(run.delta for run in found.values())
    accountant = Accountant([mechanism for run in found.values() for mechanism in run.mechanisms])
    epsilon = accountant.upper(delta)
    statement = tuning.statement(found, epsilon, delta) + (_RAW if math.isfinite(epsilon) else "")
    return common | {"epsilon": report.round_up(epsilon), "delta": delta, "statement": statement}


def write(folder: SweepFolder, grid: Grid) -> None:
    report.write(folder.report_file, report.dumps(summary(folder, grid)))
