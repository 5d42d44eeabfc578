import json
import random

import pytest

from accounting import ledger as ledger_lib
from accounting.errors import InputError
from accounting.ledger import Ledger

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
    assert Ledger.open(path).steps == 4
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


@pytest.mark.parametrize("edit", [lambda x: x[:2] + x[3:], lambda x: x[:3] + x[2:], lambda x: [x[1], x[0], *x[2:]]])
def test_removed_repeated_and_reordered_lines_are_named(path, edit):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(edit(lines)))
    with pytest.raises(InputError, match=r"line \d"):
        ledger_lib.read(path)
