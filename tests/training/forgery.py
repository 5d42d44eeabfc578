"""What somebody who knows the format of a run's files can do to them, and what the audit says of it."""

import functools
import hashlib
import json

from accounting import run_files
from accounting.ledger import chain as ledger_lib
from dpgemma import cli


def audited(capsys, *arguments):
    """(exit code, JSON result)"""
    capsys.readouterr()
    code = cli.main(["audit", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def rewrite_chain(workdir, change):
    """What somebody who knows the format can do: change the records and seal the whole ledger anew."""
    path = workdir / "ledger.jsonl"
    records = [{k: v for k, v in record.items() if k != "n"} for record in ledger_lib.read(path)]
    write_chain(path, change(records))


def write_chain(path, records, seal=None):
    """A ledger file with these records, whatever they hold, under a chain: the format, written out.

    Args:
      seal: function of a line's hash that gives its seal by its field; None for a chain without a key.
    """
    previous, rows = "0" * 64, []
    for number, record in enumerate(records):
        spelt = functools.partial(json.dumps, sort_keys=True, separators=(",", ":"))
        line = {"n": number, **record}
        previous = hashlib.sha256((previous + spelt(line)).encode()).hexdigest()
        rows.append(spelt({**line, "hash": previous, **(seal(previous) if seal else {})}) + "\n")
    path.write_text("".join(rows))


def rewrite_report(workdir, change):
    """Changes report.json, and makes the ledger's record of it and its ledger_head fit."""
    path = workdir / "report.json"
    content = json.loads(path.read_text())
    change(content)
    old = run_files.digest(path.read_bytes())
    text = json.dumps(content, indent=1) + "\n"
    path.write_text(text)
    edit(workdir / "ledger.jsonl", old, run_files.digest(text.encode()))
    lines = [json.loads(line) for line in (workdir / "ledger.jsonl").read_text().splitlines()]
    records = [{k: v for k, v in line.items() if k not in ("n", "hash", "mac", "signature")} for line in lines]
    write_chain(workdir / "ledger.jsonl", records)


def step_lines(records):
    return [record for record in records if record["kind"] == "step"]


def change_later_steps(**values):
    def change(records):
        for record in step_lines(records)[3:]:
            record.update(values)
        return records

    return lambda w: rewrite_chain(w, change)
