"""Runs that have begun and taken no step, so that several of them take the same steps under the same keys."""

import pathlib
import shutil

from tests.faults.program import KILL, Fault, Program

SMALL = dict(model="ladder_20k", sequence_length=16, batch_size=8, max_batch_size=32, mesh="data:1", eval_limit=32)


def begin(program: Program, arguments: list[str], workdir: pathlib.Path) -> None:
    """Makes the folder of a run: its keys and its ledger's first line."""
    at = 0
    while not (workdir / "ledger.jsonl").exists():
        at += 3
        done = program.run(*arguments, fault=Fault(workdir.parent, KILL, at))
        assert done.returncode == -9, done.err
    lines = (workdir / "ledger.jsonl").read_text().splitlines(keepends=True)
    (workdir / "ledger.jsonl").write_text(lines[0])
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
