"""Writes the report of a run: a function of its ledger, known to the ledger by its hash."""

from typing import Any

from accounting import run_files
from accounting.accountant import Accountant
from accounting.ledger import events
from accounting.ledger import executed as executed_lib
from accounting.ledger.chain import Ledger
from accounting.ledger.executed import Executed
from accounting.report import figures, page, tables
from accounting.report.content import build
from accounting.report.spending import spent
from dpgemma.training.run import RunDirectory


def write(
    run: RunDirectory, ledger: Ledger, accountant: Accountant | None = None, *, with_page: bool
) -> dict[str, Any]:
    """Writes report.json, and report.html if asked, unless the files there are the ledger's latest; returns the report.

    The ledger learns the files' hashes before they are replaced: a crash in between leaves older files that it knows
    too.

    Args:
      accountant: an accountant to reuse. It is used only if its mechanisms are exactly the executed ones, number of
        steps included: an audit derives epsilon from these alone, and the last digit of epsilon depends on that
        number.
    """
    executed = executed_lib.of(ledger.records)
    mechanisms = executed.mechanisms or (executed.planned,)
    if accountant is None or (accountant.mechanisms, accountant.also) != (mechanisms, executed.also):
        accountant = executed.accountant()
    content = build(executed, spent(executed, accountant), ledger.head)
    if _is_current(run, ledger, with_page):
        run.publish()
        return content
    files = {run.report_file: run_files.dumps(content)}
    if with_page:
        files[run.page_file] = _page(executed, content)
    ledger.append(events.REPORT, files={path.name: run_files.digest(text.encode()) for path, text in files.items()})
    ledger.sync()
    for path, text in files.items():
        run_files.write(path, text)
    run.publish()
    return content


def attack_page(executed: Executed, assessment: dict[str, Any]) -> str:
    """The page of an attack that is kept in private/."""
    accountant = executed.accountant()
    epsilon = accountant.epsilon(executed.delta).upper
    return page.attack(executed, assessment, epsilon, tables.meaning(accountant, executed.delta).profile)


def _page(executed: Executed, content: dict[str, Any]) -> str:
    accountant = executed.accountant()
    meaning = tables.meaning(accountant, executed.delta)
    points = figures.epsilon_points(accountant, executed.delta) if meaning.profile is not None else []
    return page.render(executed, content, meaning, points)


def _is_current(run: RunDirectory, ledger: Ledger, with_page: bool) -> bool:
    last = ledger.records[-1]
    wanted = [run.report_file, run.page_file] if with_page else [run.report_file]
    if last["kind"] != events.REPORT or not {path.name for path in wanted} <= set(last["files"]):
        return False
    return all(path.is_file() and run_files.digest(path.read_bytes()) == last["files"][path.name] for path in wanted)
