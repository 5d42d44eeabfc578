"""Runs whose privacy unit is a document or a user, from the records to the report."""

import json

import jax
import numpy as np
import pytest

from accounting.errors import InputError
from accounting.mechanism import Clip
from accounting.report import words
from dpgemma.data.batch import collate
from dpgemma.data.text import grouped
from dpgemma.data.text.grouped import Limits
from dpgemma.data.text.tokenizer import ByteTokenizer
from dpgemma.gemma import decoder
from dpgemma.privacy import clipping
from dpgemma.privacy.clipping import Strategy
from tests.objectives import causal
from tests.training import runs
from tests.training.step_test import MODEL, flat


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """Of 80 patients, the first of whom owns most of the text."""
    path, rng = tmp_path_factory.mktemp("notes") / "notes.jsonl", np.random.default_rng(0)
    with open(path, "w") as file:
        for number in range(300):
            patient = 0 if number % 2 else int(rng.integers(80))
            text = f"Patient {patient} came with a {rng.choice(['cough', 'burn', 'cold'])} on day {number}. "
            file.write(json.dumps({"seen": {"patient": patient}, "text": text}) + "\n")
    return path


def trained(notes, workdir, **changes):
    units = dict(privacy_unit="user", user_field="seen.patient", rows_per_unit=3)
    return runs.call(*runs.flags(notes, workdir, steps=2, **units | changes))


def test_a_report_says_what_holds_for_a_patient(notes, tmp_path):
    patients = {json.loads(line)["seen"]["patient"] for line in notes.read_text().splitlines()}
    done = trained(notes, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    start = json.loads((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()[0])
    assert start["num_units"] + start["held_out_units"] == len(patients)
    facts = dict(rows_per_unit=3, rows_kept="uniform", user_field="seen.patient", records_without_user="refuse")
    assert facts == {name: start[name] for name in facts} and start["privacy_unit"] == "user"
    said = (tmp_path / "run" / "report.json").read_text()
    assert "all records of the training data whose field 'seen.patient' has one value" in said
    assert "at most 3 rows of 32 tokens are used (where there are more, rows chosen at random)" in said
    assert "Somebody whose records carry several values is several units" in said
    # How much was left out is a fact about the data: it goes to private/, and to terminals alone.
    remarks = (tmp_path / "run" / "private" / "remarks.txt").read_text()
    assert "units have more than 3 rows" in remarks and "rows are left out, by --rows_kept=uniform" in remarks.replace(
        "`rows_kept`", "--rows_kept"
    )
    public = [path for path in (tmp_path / "run").iterdir() if path.is_file()]
    assert not any("left out, by" in path.read_text() for path in public) and "left out, by" not in done.stderr
    assert runs.call("audit", tmp_path / "run").returncode == 0
    again = trained(notes, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    other = trained(notes, tmp_path / "run", rows_per_unit=4)
    assert other.returncode == 2 and "rows_per_unit (3 there, 4 here)" in other.stderr
    edited = json.loads((tmp_path / "run" / "config.json").read_text()) | {"rows_per_unit": 2}
    (tmp_path / "run" / "config.json").write_text(json.dumps(edited))
    found = runs.call("audit", tmp_path / "run")
    assert found.returncode == 1 and "config.json rows_per_unit" in found.stdout


def test_a_report_names_no_unit_that_its_ledger_does_not_describe():
    declared = dict(
        privacy_unit="user", sequence_length=32, rows_per_unit=3, rows_kept="first", user_field="who",
    )  # fmt: skip
    assert "(where there are more, the first ones)" in words.unit_text(declared)
    for wrong in ({"rows_kept": "some"}, {"privacy_unit": "household"}):
        with pytest.raises(InputError):
            words.unit_text(declared | wrong)
    for missing in ("rows_kept", "rows_per_unit", "user_field"):
        with pytest.raises(InputError, match=missing):
            words.unit_text({name: value for name, value in declared.items() if name != missing})


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(user_field="nobody"), "record 1 of the data has no user in the field 'nobody'"),
        (dict(privacy_unit="document"), "--user_field has no meaning with this --privacy_unit"),
        (dict(privacy_unit="example"), "--rows_per_unit has no meaning with this --privacy_unit"),
        (dict(rows_per_unit=0), "--rows_per_unit must be at least 1"),
        (dict(rows_kept="last"), "--rows_kept"),
    ],
)
def test_units_that_do_not_exist_are_refused(notes, tmp_path, changes, said):
    done = trained(notes, tmp_path / "run", **changes)
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / "run").exists()
    without = runs.call(*runs.flags(notes, tmp_path / "run", privacy_unit="user"))
    assert without.returncode == 2 and "give --user_field" in without.stderr


WAYS = [Strategy("example_scan"), Strategy("ghost", 2), Strategy("per_layer", 2), Strategy("vmap", 4)]
OBJECTIVE = causal(MODEL, length=10)


@pytest.mark.parametrize("how", WAYS, ids=lambda how: how.name)
@pytest.mark.parametrize("trials", [12, pytest.param(250, marks=pytest.mark.slow)])
def test_without_a_user_the_sum_differs_by_the_clip_norm_at_most(how, trials, quick_compiles):
    """All records of one user become an empty unit, or are none any more: data sets at random, among them users that
    own nearly everything, texts that are empty, of one token, longer than what is kept, or no UTF-8.
    """
    rng, params, clip = np.random.default_rng(7), decoder.init_parameters(MODEL, jax.random.key(0)), Clip(0.05)

    @jax.jit
    def total(params, batch):
        return clipping.clipped_sum(lambda p, unit: OBJECTIVE.loss(p, {}, unit), params, batch, clip, how).total

    largest = 0.0
    for trial in range(trials):
        texts = [b"", b"x", b"\xff\xfe", b"some words", b"a text of several rows, beyond those that are kept of it"]
        owner = rng.choice(4, 10, p=[0.7, 0.1, 0.1, 0.1])
        records = [{"who": int(user), "text": texts[rng.integers(len(texts))]} for user in owner]
        limits = Limits(int(rng.integers(1, 4)), str(rng.choice(["uniform", "first"])), bytes([trial % 256] * 32))

        def units_of(records, limits=limits):
            return grouped.by_user(records, ByteTokenizer(), 10, "text", "who", "refuse", limits).units

        units = units_of(records)
        whose = int(rng.integers(units.num_units))
        users = list(dict.fromkeys(int(user) for user in owner))
        emptied = [r | {"text": b""} if r["who"] == users[whose] else r for r in records]
        numbers = np.arange(units.num_units)
        whole = flat(total(params, collate(wide(units), numbers, 8)))
        empty = flat(total(params, collate(wide(units_of(emptied)), numbers, 8)))
        absent = flat(total(params, collate(wide(units), np.delete(numbers, whose), 8)))
        for other in (empty, absent):
            difference = np.linalg.norm(whole.astype(np.float64) - other)
            largest = max(largest, difference)
            assert difference <= 0.05 * (1 + 1e-6)
    assert largest > (0.9 if how.name != "per_layer" else 0.01) * 0.05


def wide(units):
    """Units with places for three rows, so that one program serves all."""
    return type(units)(units.columns, units.first, max_rows=3)
