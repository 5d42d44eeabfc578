import json
import random

import pytest

from accounting.errors import InputError
from accounting.ledger import chain as ledger_lib
from accounting.ledger.chain import Ledger
from accounting.ledger.seals import Hmac

GROUP = {"sampling_probability": 0.1, "noise_multiplier": 1.0, "max_batch_size": 60}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path)
    ledger.append("start", num_units=500)
    for step in range(4):
        ledger.append_step(step, GROUP)
    ledger.append("checkpoint", step=4)
    ledger.close()
    return path


def test_records_are_read_back(path):
    records = ledger_lib.read(path)
    assert [r["kind"] for r in records] == ["start", "step", "step", "step", "step", "checkpoint"]
    assert Ledger.open(path).history.updates == 4
    assert Ledger.open(path).head == json.loads(path.read_text().splitlines()[-1])["hash"]


def test_reopening_continues_the_chain(path):
    ledger = Ledger.open(path)
    ledger.append("resume", step=4)
    ledger.append_step(4, GROUP)
    ledger.close()
    assert len(ledger_lib.read(path)) == 8


def test_a_step_is_recorded_once_however_often_it_is_executed(path):
    ledger = Ledger.open(path)
    before = path.read_text()
    ledger.append_step(2, GROUP)
    assert path.read_text() == before


@pytest.mark.parametrize("step, group", [(2, {**GROUP, "noise_multiplier": 0.9}), (7, GROUP)])
def test_another_runs_step_is_refused(path, step, group):
    with pytest.raises(InputError, match="another run's ledger"):
        Ledger.open(path).append_step(step, group)


def test_a_line_cut_off_by_a_crash_is_dropped(path):
    whole = path.read_text()
    path.write_text(whole + '{"n":6,"kind":"st')
    Ledger.open(path).close()
    assert path.read_text() == whole


def test_every_random_edit_breaks_the_chain(path):
    original = path.read_bytes()
    rng = random.Random(1)
    for _ in range(200):
        position, replacement = rng.randrange(len(original)), rng.randrange(256)
        edited = original[:position] + bytes([replacement]) + original[position + 1 :]
        if edited == original:
            continue
        path.write_bytes(edited)
        with pytest.raises(InputError):
            ledger_lib.read(path)


EDITS = {
    "removed": (lambda x: x[:2] + x[3:], "ledger_line_removed", 3),
    "repeated": (lambda x: x[:3] + x[2:], "ledger_line_repeated", 4),
    "reordered": (lambda x: [x[0], x[2], x[1], *x[3:]], "ledger_lines_reordered", 2),
    "edited": (lambda x: [*x[:2], x[2].replace("1.0", "1.5"), *x[3:]], "ledger_edited", 3),
    "whitespace": (lambda x: [*x[:2], x[2].replace(":", ": ", 1), *x[3:]], "ledger_edited", 3),
    "no record": (lambda x: [*x[:2], "{}\n", *x[3:]], "unparsable", 3),
    "cut off": (lambda x: [*x[:-1], x[-1][:-5]], "truncated", 6),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_named_by_kind_and_line(name, path):
    edit, kind, line = EDITS[name]
    lines = path.read_text().splitlines(keepends=True)
    text = "".join(edit(lines))
    _, problems = ledger_lib.inspect(text)
    assert (problems[0].kind, problems[0].line) == (kind, line)
    path.write_text(text)
    with pytest.raises(InputError, match="line"):
        ledger_lib.read(path)


def test_an_untouched_ledger_has_no_problem(path):
    lines, problems = ledger_lib.inspect(path.read_text())
    assert problems == [] and len(lines) == 6


def test_a_rewritten_chain_lacks_the_macs_of_the_key(tmp_path):
    key, path = bytes(range(32)), tmp_path / "keyed.jsonl"
    ledger = Ledger.open(path, Hmac(key))
    ledger.append("start", noise_multiplier=1.0)
    ledger.append_step(0, GROUP)
    ledger.close()
    lines, problems = ledger_lib.inspect(path.read_text())
    assert problems == [] and ledger_lib.unsealed(lines, Hmac(key)) == []
    assert ledger_lib.unsealed(lines, Hmac(bytes(32))) == [1, 2]
    forged = Ledger.open(tmp_path / "forged.jsonl", Hmac(bytes(32)))
    forged.append("start", noise_multiplier=9.0)
    forged.close()
    assert ledger_lib.unsealed(ledger_lib.inspect((tmp_path / "forged.jsonl").read_text())[0], Hmac(key)) == [1]


def test_a_ledger_knows_its_earlier_heads(path):
    ledger = Ledger.open(path)
    length, head = ledger.length, ledger.head
    ledger.append("resume", step=4)
    assert (
        ledger.begins_with(length, head)
        and not ledger.begins_with(length + 1, head)
        and not ledger.begins_with(0, head)
    )
