"""Exported models: does the ledger know them, and does their card say what the ledger says?"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence

from accounting import run_files
from accounting.accountant import Accountant
from accounting.audit import own_figures
from accounting.audit.document_checks import Derive
from accounting.audit.findings import Finding
from accounting.audit.tolerance import same_rounded
from accounting.ledger import events
from accounting.ledger import executed as executed_lib
from accounting.ledger.chain import Line
from accounting.report import card
from accounting.report.content import build, exported_weights


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that make a folder an export: weights of a model or of adapters."""
    return sorted(folder.glob(f"*{run_files.WEIGHTS_SUFFIX}"))


def export(
    folder: pathlib.Path,
    name: str,
    lines: Sequence[Line],
    derive: Derive,
    accountant: Callable[..., Accountant],
) -> Iterator[Finding]:
    """One exported folder.

    Args:
      name: how findings call it.
    """
    weights = {path.name: run_files.file_digest(path) for path in weight_files(folder)}
    places = [
        i
        for i, line in enumerate(lines)
        if line.record["kind"] == events.EXPORT and exported_weights(line.record) == weights
    ]
    if not places:
        for file, digest in weights.items():
            yield Finding("export_unknown", f"{name}/{file}", f"no export event of the ledger has its SHA-256 {digest}")
        for path in sorted(folder.iterdir()):
            if path.name not in weights:
                yield Finding("file_unknown", f"{name}/{path.name}", "it belongs to no export that the ledger knows")
        return
    # The same checkpoint may have been exported more than once, at different heads of the ledger.
    fitting = [i for i in places if _digest(folder / run_files.CARD) == lines[i].record["files"].get(run_files.CARD)]
    place = (fitting or places)[-1]
    files = lines[place].record["files"]
    for file, digest in files.items():
        if not (folder / file).is_file():
            yield Finding("missing_file", f"{name}/{file}", "the ledger recorded it with the export")
        elif file == run_files.CARD:
            found = list(_card(folder / file, name, lines, place, derive, recorded=bool(fitting)))
            yield from found or _figures(folder / file, name, lines[:place], accountant)
        elif _digest(folder / file) != digest:
            yield Finding("export_edited", f"{name}/{file}", "its SHA-256 is not the one that the ledger recorded")
    for path in sorted(folder.iterdir()):
        if path.name not in files or path.is_symlink():
            yield Finding("file_unknown", f"{name}/{path.name}", "it is no file that was written with the export")


def _figures(
    path: pathlib.Path, name: str, lines: Sequence[Line], accountant: Callable[..., Accountant]
) -> Iterator[Finding]:
    """The rows of the card's table against the audit's own figures."""
    rows = [row.split(" | ") for row in path.read_text(errors="replace").splitlines() if row.startswith("| ")]
    stated = {cells[0].removeprefix("| "): cells[1].removesuffix(" |") for cells in rows if len(cells) == 2}
    own = own_figures.figures(lines, executed_lib.of([line.record for line in lines]), accountant)

    def value(figure: str) -> object:
        wanted, text = own[figure], stated.get(figure, "nothing")
        try:
            return float(text) if isinstance(wanted, float) else int(text) if isinstance(wanted, int) else text
        except ValueError:
            return text

    texts = {figure: "None" if wanted is None else wanted for figure, wanted in own.items()}
    yield from own_figures.disagreements(f"{name}/{run_files.CARD}", "model_card_disagrees", value, texts)


def _digest(path: pathlib.Path) -> str | None:
    return run_files.file_digest(path) if path.is_file() else None


def _card(
    path: pathlib.Path, name: str, lines: Sequence[Line], place: int, derive: Derive, *, recorded: bool
) -> Iterator[Finding]:
    """The model card against the one that the ledger gives just before the export."""
    executed = executed_lib.of([line.record for line in lines[:place]])
    spent = derive(executed)
    text = path.read_text(errors="replace")
    stated = next((row for row in text.splitlines() if row.startswith("| epsilon |")), "")
    try:
        epsilon = float(stated.split("|")[2])
    except (ValueError, IndexError):
        epsilon = None
    if epsilon is not None and same_rounded(epsilon, spent.bracket.upper):
        spent = dataclasses.replace(spent, bracket=dataclasses.replace(spent.bracket, upper=epsilon))
    head = lines[place - 1].hash
    expected = card.model_card(run_files.encode(build(executed, spent, head)), lines[place].record["step"])
    differing = [row for row in expected.splitlines() if row not in text.splitlines()]
    # If the ledger recorded this card's hash, other rows than epsilon differ only by rounding on another machine.
    if (differing and not recorded) or any(row.startswith("| epsilon |") for row in differing):
        for row in differing:
            yield Finding(
                "model_card_disagrees",
                f"{name}/{run_files.CARD}",
                f"the ledger gives {row[:120]!r}, the card does not have it",
            )
    elif not recorded:
        yield Finding(
            "export_edited", f"{name}/{run_files.CARD}", "its SHA-256 is not the one that the ledger recorded"
        )
