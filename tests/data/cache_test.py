"""The token cache: its rows are those that are made in memory, and it goes on where it was killed."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting.errors import InputError
from dpgemma.data.limits import ONE_ROW, Limits
from dpgemma.data.text import cache, caching, layout, units
from dpgemma.data.text.pieces import InMemoryPieces, Reading, of_records
from dpgemma.data.text.tokenizer import ByteTokenizer
from tests.training import runs

LENGTH, TOKENIZER = 8, ByteTokenizer()


class Silent:
    def __init__(self):
        self.phases = []

    def phase(self, name, total, unit):
        self.phases.append([name, total, 0])

    def advance(self, count):
        self.phases[-1][2] += count


def readings():
    return [Reading(unit, LENGTH, "text", "who" if unit == "user" else None, "own" if unit == "user" else None)
            for unit in ("sequence", "example", "document", "user")]  # fmt: skip


OF_USERS = readings()[-1]
SMALL = caching.Sizes(part_records=3, rows_per_shard=5, rows_at_once=2)


def make(folder, data, reading=OF_USERS, processes=1, progress=None, **options):
    return caching.make(
        folder, str(data), "byte", reading, processes, progress or Silent(), **{"sizes": SMALL, **options}
    )


TEXT = st.text("ab é\n", max_size=40)
RECORD = st.one_of(
    st.fixed_dictionaries({"text": TEXT}, optional={"who": st.sampled_from(["a", "b", 7, ""])}),
    st.fixed_dictionaries(
        {"prompt": TEXT, "response": TEXT, "text": TEXT}, optional={"who": st.sampled_from(["a", 7])}
    ),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(RECORD, min_size=1, max_size=14), st.sampled_from(readings()), st.integers(1, 3))
def test_it_holds_the_rows_that_are_made_in_memory(tmp_path_factory, records, reading, k):
    folder = tmp_path_factory.mktemp("cache")
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    limits = Limits(k, "uniform", bytes(32)) if reading.privacy_unit in ("document", "user") else ONE_ROW
    try:
        expected = units.read(str(data), TOKENIZER, reading, 260, limits)
    except InputError:
        with pytest.raises(InputError):
            make(folder / "out", data, reading)
        return
    made = make(folder / "out", data, reading)
    found = units.read(str(folder / "out"), TOKENIZER, reading, 260, limits)
    assert made.records == len(records)
    for name in ("privacy_unit", "rows", "rows_to_learn", "all_rows", "units_cut", "bad"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.units.num_units == expected.units.num_units
    order = np.random.default_rng(0).permutation(found.units.num_units)
    for one, other in zip(found.units.read(order), expected.units.read(order), strict=True):
        if isinstance(one, dict):
            assert one["tokens"].dtype == np.int32 and one["scored"].dtype == bool
        np.testing.assert_equal(one, other)


def write_records(path, count):
    rng = np.random.default_rng(1)
    with open(path, "w") as file:
        for number in range(count):
            text = f"note {number} " + "word " * int(rng.integers(1, 60))
            file.write(json.dumps({"who": int(rng.integers(count // 5)), "text": text}) + "\n")


def test_several_processes_make_what_one_does(tmp_path):
    write_records(tmp_path / "data.jsonl", 1000)
    for processes in (1, 2):
        progress, sizes = Silent(), caching.Sizes(part_records=100)
        make(tmp_path / str(processes), tmp_path / "data.jsonl", processes=processes, progress=progress, sizes=sizes)
        assert [name for name, _, _ in progress.phases] == ["reading", "tokenising", "writing rows"]
        assert progress.phases[0][1] == progress.phases[0][2] and progress.phases[2][1] == progress.phases[2][2]
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("1", "2"))
    assert one.keys() == other.keys() and not any("part" in name for name in one)
    assert all(one[name] == other[name] for name in one if name.endswith((".npy", cache.FACTS)))
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "1", tmp_path / "2"))


KILLED = """
import pathlib, sys
from dpgemma.data.text import caching
from dpgemma.data.text.pieces import Reading
from tests.data.cache_test import Silent, LENGTH
if __name__ == "__main__":
    reading, sizes = Reading("user", LENGTH, "text", "who"), caching.Sizes(part_records=50, rows_per_shard=512)
    caching.make(pathlib.Path(sys.argv[2]), sys.argv[1], "byte", reading, 2, Silent(), sizes=sizes)
"""


@pytest.mark.parametrize("phase", ["part-*.npz", "rows-*.array_record"])
def test_a_killed_process_is_gone_on_from_where_it_was(phase, tmp_path):
    """SIGKILL when some files of a phase are there: the next one writes none of these again."""
    write_records(tmp_path / "data.jsonl", 4000)
    script = tmp_path / "make.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(tmp_path / "data.jsonl"), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    begun = subprocess.Popen(command, env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").rglob(phase))) < 3:
        assert begun.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    if (tmp_path / "out" / cache.FACTS).exists():
        pytest.skip("it was done before it could be killed")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob(phase)}
    assert len(before) >= 3
    written = subprocess.Popen(command, env=environment)
    after = {}
    while written.poll() is None:
        for path in before:
            with contextlib.suppress(FileNotFoundError):  # parts are removed at the end
                after.setdefault(path, path.stat().st_mtime_ns)
        time.sleep(0.005)
    assert written.returncode == 0
    assert before == {**after, **{path: path.stat().st_mtime_ns for path in before if path.exists()}}
    reading = Reading("user", LENGTH, "text", "who")
    found = units.read(str(tmp_path / "out"), TOKENIZER, reading, 260, Limits(3, "first", b""))
    expected = units.read(str(tmp_path / "data.jsonl"), TOKENIZER, reading, 260, Limits(3, "first", b""))
    everyone = np.arange(expected.units.num_units)
    np.testing.assert_equal(found.units.read(everyone), expected.units.read(everyone))


@pytest.fixture
def made(tmp_path):
    write_records(tmp_path / "data.jsonl", 60)
    make(tmp_path / "out", tmp_path / "data.jsonl")
    return tmp_path, readings()[-1]


def test_rows_of_other_units_are_never_read(made):
    """Whoever mends a file by hand, moves a shard or its index, is told; no row counts for another unit."""
    folder, reading = made[0] / "out", made[1]

    def read():
        found = units.read(str(folder), TOKENIZER, reading, 260, Limits(100, "first", b""))
        return found.units.read(np.arange(found.units.num_units))

    read()
    shards = sorted(folder.glob("rows-*"))
    contents = {path: path.read_bytes() for path in [*shards, folder / cache.FIRST]}
    last = sorted(shards[:-1], key=lambda path: len(contents[path]))[-1]

    def restore():
        for path, content in contents.items():
            path.write_bytes(content)

    facts = (folder / cache.FACTS).read_text()
    shards[0].write_bytes(contents[last])  # with other rows, and its size corrected
    changed = json.loads(facts)
    changed["files"][shards[0].name]["bytes"] = len(contents[last])
    (folder / cache.FACTS).write_text(json.dumps(changed))
    with pytest.raises(InputError, match="damaged"):
        read()
    restore()
    (folder / cache.FACTS).write_text(facts)
    shards[0].write_bytes(contents[shards[0]][:-100])
    with pytest.raises(InputError, match="damaged"):
        read()
    restore()
    shards[0].write_bytes(bytes(len(contents[shards[0]])))
    with pytest.raises(InputError, match="damaged"):
        read()
    restore()
    first = np.load(folder / cache.FIRST)
    moved = first.copy()
    moved[3] -= 1  # the last row of unit 2 would be unit 3's
    np.save(folder / cache.FIRST, moved)
    with pytest.raises(InputError, match="damaged"):
        read()
    restore()
    shards[-1].unlink()
    with pytest.raises(InputError, match="damaged"):
        read()


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(length=16), "`sequence_length`=8, not 16"),
        (
            dict(privacy_unit="document", user_field=None, records_without_user=None),
            "`privacy_unit`=user, not document",
        ),
        (dict(privacy_unit="auto", user_field=None, records_without_user=None), "`privacy_unit`=user, not auto"),
        (dict(user_field="author"), "`user_field`=who, not author"),
        (dict(text_field="body"), "`text_field`=text, not body"),
        (dict(records_without_user="refuse"), "`records_without_user`=own, not refuse"),
    ],
)
def test_what_was_made_otherwise_is_not_trained_on(made, changes, said):
    with pytest.raises(InputError, match=said):
        units.read(str(made[0] / "out"), TOKENIZER, dataclasses.replace(made[1], **changes), 260)


def test_another_tokenizer_other_data_and_other_folders_are_refused(made):
    tmp_path, reading = made
    other = ByteTokenizer()
    other.eos = 3
    with pytest.raises(InputError, match="another `tokenizer`"):
        units.read(str(tmp_path / "out"), other, reading, 260)

    def again(folder, records=60):
        write_records(tmp_path / "data.jsonl", records)
        return make(folder, tmp_path / "data.jsonl")

    assert again(tmp_path / "out").records == 60  # whole already
    with pytest.raises(InputError, match="other data or settings"):
        again(tmp_path / "out", 61)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "full").chmod(0o755)
    with pytest.raises(InputError, match=r"holds thesis\.txt"):
        again(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "full").stat().st_mode & 0o777 == 0o755
    with pytest.raises(InputError, match="would become a part"):
        make(tmp_path / "full" / "in it", tmp_path / "full")
    with pytest.raises(InputError, match="is a token cache already"):
        make(tmp_path / "again", tmp_path / "out")

    class Stopped(Silent):
        def phase(self, name, total, unit):
            if name == "writing rows":
                raise KeyboardInterrupt
            super().phase(name, total, unit)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "half", tmp_path / "data.jsonl", progress=Stopped())
    with pytest.raises(InputError, match="unfinished token cache of other data"):
        again(tmp_path / "half", 62)


def test_bad_records_are_named_or_left_out_and_counted(tmp_path):
    lines = [json.dumps({"text": f"note {i}"}) for i in range(40)]
    lines[6], lines[21] = '{"text": "half', json.dumps({"other": "x"})
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    reading = Reading("sequence", LENGTH, "text")
    with pytest.raises(InputError, match=r"data\.jsonl, line 7: no JSON object"):
        make(tmp_path / "skipped", data, reading, processes=2)
    made = make(tmp_path / "skipped", data, reading, skip_bad_records=True)  # goes on behind it
    assert (made.records, made.bad.count) == (40, 2)
    assert [what.rpartition("/")[2][:40] for what in made.bad.named] == [
        "data.jsonl, line 7: no JSON object", "record 21 of the data has no text in fie"
    ]  # fmt: skip
    expected = units.read(str(data), TOKENIZER, reading, 260, skip_bad_records=True)
    found = units.read(str(tmp_path / "skipped"), TOKENIZER, reading, 260, skip_bad_records=True)
    with pytest.raises(InputError, match="without 2 records that cannot be read"):
        units.read(str(tmp_path / "skipped"), TOKENIZER, reading, 260)
    with pytest.raises(InputError, match="without 2 records that cannot be read"):
        make(tmp_path / "skipped", data, reading)
    assert found.bad == expected.bad and "2 records cannot be read" in found.remarks[0]
    assert found.remarks[1].endswith("data.jsonl, line 7: no JSON object")
    everyone = np.arange(expected.units.num_units)
    np.testing.assert_equal(found.units.read(everyone), expected.units.read(everyone))


def test_a_user_of_nearly_all_text_is_laid_out_piece_by_piece(tmp_path):
    """No block of rows asks for more than it holds, whatever one user owns."""
    record = {"who": 1, "text": "x" * 1000}
    held = InMemoryPieces(list(of_records([record] * 20, TOKENIZER, readings()[-1])))
    asked = []

    class Watched:
        def __getattr__(self, name):
            return getattr(held, name)

        def tokens(self, numbers, begin=0, end=None):
            found = held.tokens(numbers, begin, end)
            asked.append((len(numbers), len(found)))
            return found

    made = layout.Layout(Watched(), "user", LENGTH, 0)
    blocks = [made.rows(i, min(i + 2, int(made.first[-1]))) for i in range(0, int(made.first[-1]), 2)]
    assert sum(map(len, blocks)) == -(-20 * 1001 // LENGTH)
    assert max(asked) <= (2, 2 * LENGTH) and max(found for _, found in asked) <= 2 * LENGTH


@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_command_makes_what_train_takes(trains, tmp_path):
    write_records(tmp_path / "data.jsonl", 300)
    made = runs.run(
        "data", "tokenize", tmp_path / "data.jsonl", f"--out={tmp_path / 'out'}", "--sequence_length=32",
        "--privacy_unit=user", "--user_field=who", "--processes=2",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "300 records, " in made.stdout and "--user_field=who --privacy_unit=user" in made.stdout
    unit = dict(privacy_unit="user", user_field="who", rows_per_unit=2, model="ladder_20k")
    if trains:
        done = runs.call(*runs.flags(tmp_path / "out", tmp_path / "run", steps=1, **unit))
        assert done.returncode == 0, done.stderr
        assert "rows are left out" in (tmp_path / "run" / "private" / "remarks.txt").read_text()
    other = runs.call(*runs.flags(tmp_path / "out", tmp_path / "other", steps=1, **unit | {"sequence_length": 16}))
    assert other.returncode == 2 and "--sequence_length=32, not 16" in other.stderr
    for arguments, said in (
        ((), "say what to do with the data"),
        (("tokenize", str(tmp_path / "data.jsonl")), "give --out=FOLDER"),
        (("tokenize", str(tmp_path / "data.jsonl"), "--out=s3://b/x"), "a token cache lies on a disk"),
        (("tokenize", str(tmp_path / "data.jsonl"), "--out=x", "--processes=0"), "--processes must be at least 1"),
        (("stats", "--data="), "--data is empty"),
        (("stats", str(tmp_path)), "holds a token cache"),
        (("tokenize", "/nowhere", "--out=x"), "no file matches"),
        (("look", "x"), "say what to do with the data"),
        (("tokenize", "a", "b"), "unexpected argument 'b'"),
    ):
        refused = runs.call("data", *arguments)
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr


def test_users_are_told_apart_by_all_bits_of_their_digests(tmp_path):
    """Users whose digests agree in one half or the other are several, and are numbered as their records come."""
    halves = np.array([[1, 2], [1, 3], [4, 2], [1, 2], [4, 2], [1, 3], [0, 9], [1, 2]], np.uint64)
    for number, users in enumerate(np.split(halves, [3, 5])):
        kinds = dict(lengths=np.int64, is_text=bool, rows=np.int64)
        numbers = {name: np.ones(len(users), kind) for name, kind in kinds.items()}
        np.savez(tmp_path / f"part-{number:06d}.npz", **numbers, users=users, width=2, largest=1, without_user=0)
    found = caching.FilePieces(tmp_path)
    assert found.owners().tolist() == [0, 1, 2, 0, 2, 1, 3, 0]


@pytest.mark.slow
def test_a_changed_row_changes_the_fingerprint(made):
    """Whatever is changed in the rows or in the index, and nothing else."""
    folder, reading = made[0] / "out", made[1]

    def fingerprint(place=folder, key=bytes(32)):
        return units.read(str(place), TOKENIZER, reading, 260).units.fingerprint(key)

    before = fingerprint()
    assert before == fingerprint(shutil.copytree(folder, made[0] / "copy")) != fingerprint(key=b"k" * 32)
    for path in [*folder.glob("rows-*"), folder / cache.FIRST]:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert cache.opened(folder, TOKENIZER, reading).fingerprint(bytes(32)) != before
        path.write_bytes(content)
    assert fingerprint() == before


@pytest.mark.parametrize(
    "change", [dict(units=40), dict(rows=7), dict(skipped=None), dict(units="many"), dict(files=3), dict(lengths=1)]
)
def test_facts_that_are_wrong_or_missing_are_one_sentence(made, change):
    folder = made[0] / "out"
    facts = json.loads((folder / cache.FACTS).read_text()) | change
    (folder / cache.FACTS).write_text(json.dumps({name: fact for name, fact in facts.items() if fact is not None}))
    with pytest.raises(InputError, match="damaged"):
        units.read(str(folder), TOKENIZER, made[1], 260)


@pytest.mark.parametrize("content", [b"", b"NUMPY", None])
def test_an_index_that_is_damaged_or_missing_is_one_sentence(made, content):
    path = made[0] / "out" / cache.FIRST
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        units.read(str(made[0] / "out"), TOKENIZER, made[1], 260)
