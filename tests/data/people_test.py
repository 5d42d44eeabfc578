"""Records of people who are not protected as people, and records that are cut, are not passed over in silence."""

import json

import pytest

from dpgemma.data.limits import Limits
from dpgemma.data.text import units
from dpgemma.data.text.people import names_a_person
from dpgemma.data.text.pieces import Reading
from dpgemma.data.text.tokenizer import ByteTokenizer
from tests.training.runs import call

PEOPLE = ["user", "user_id", "userId", "UserID", "patient_no", "authorName", "customer_uuid", "MRN", "email", "speaker"]
OTHERS = ["text", "id", "note_id", "users_online", "author_bio", "subject_line", "accountability", "patience"]


def found(tmp_path, records, unit="auto", length=64):
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return units.read(str(path), ByteTokenizer(), Reading(unit, length, "text"), 260)


def test_names_of_people_are_told_from_others():
    assert all(map(names_a_person, PEOPLE)) and not any(map(names_a_person, OTHERS))


def test_a_name_that_might_say_something_of_somebody_is_not_repeated():
    assert not any(map(names_a_person, ["patient Анна Каренина", "patient John Smith", "user" * 20, "user\n1"]))


def test_values_that_repeat_are_told_and_names_of_people_are_known(tmp_path):
    records = [{"text": f"note {i}", "user_id": f"u{i % 9}", "id": i, "case_id": i % 3} for i in range(60)]
    read = found(tmp_path, records)
    assert read.people.fields == ("user_id",) and read.people.repeated() == {"user_id": 9}
    assert any("field 'user_id' has 9 values in 60 records" in remark for remark in read.remarks)
    assert found(tmp_path, [{**r, "id": i // 2} for i, r in enumerate(records)]).people.repeated()["id"] == 30
    # One record each: nothing repeats. Where users are protected, there is nothing to tell.
    assert (
        units.read(
            str(tmp_path / "notes.jsonl"),
            ByteTokenizer(),
            Reading("user", 64, "text", "user_id"),
            260,
            Limits(4, "first", b""),
        ).people
        is None
    )
    single = found(tmp_path, [{"text": "a", "user_id": i} for i in range(20)])
    assert single.people.repeated() == {} and not any("user_id" in remark for remark in single.remarks)


def test_what_is_cut_is_counted_with_the_length_that_would_do(tmp_path):
    records = [{"prompt": "q", "response": "a" * (950 if i % 10 == 0 else 200 if i % 3 else 20)} for i in range(100)]
    remarks = found(tmp_path, records).remarks
    lengths = sorted(len(record["response"]) + 2 for record in records)
    cut = [length for length in lengths if length > 64]
    share = sum(length - 64 for length in cut) / sum(lengths)
    assert "100 records, 100 units (example), 100 rows of 64" in remarks
    (told,) = (remark for remark in remarks if "cut off" in remark)
    assert told.startswith(f"{len(cut)} records are longer") and f" {share:.1%} of all text is left out" in told
    assert f"`sequence_length`={lengths[94]} would keep 95 %" in told


@pytest.mark.slow
def test_the_first_lines_say_unit_model_and_what_is_needed(tmp_path):
    records = ({"text": f"Ada came with a cough, {i}.", "patient": i % 7} for i in range(400))
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    given = ["train", f"--data={tmp_path / 'notes.jsonl'}", "--model=ladder_20k", "--steps=2", "--mesh=data:2"]
    done = call(*given, f"--workdir={tmp_path / 'rows'}", "--sequence_length=32", "--batch_size=16")
    assert done.returncode == 0, done.stderr
    for line in (
        "a unit is one row of 32 consecutive tokens",
        "20,184 of 20,184 parameters are trained",
        "warning: records have a field 'patient', and no person is protected by it: --privacy_unit=user"
        " --user_field=patient protects all",
        "expected, data not counted: ",
    ):
        assert line in done.stderr, line
    assert "7 values" not in done.stderr and "400 records" not in done.stderr  # facts about private data
    told = (tmp_path / "rows" / "private" / "log").read_text()
    assert "field 'patient' has 7 values in 400 records" in told and "400 records, " in told
