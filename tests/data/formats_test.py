"""Every kind of file gives the records that it was written from, and what is none is refused by name and line."""

import csv
import gzip
import json
import tracemalloc

import datasets
import pyarrow
import pytest
from array_record.python import array_record_module
from pyarrow import ipc, parquet
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from accounting.errors import InputError
from dpgemma.data import readers
from dpgemma.data.formats import LeftOut

RECORDS = [{"id": "007", "text": "première ligne\nzweite"}, {"id": "1e3", "text": 'with "quotes", and commas'}]


def json_lines(path):
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")


def json_list(path):
    path.write_text(json.dumps(RECORDS, indent=2))


def table(delimiter):
    def write(path):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(RECORDS)

    return write


def arrow_stream(path):
    whole = pyarrow.Table.from_pylist(RECORDS)
    with ipc.new_stream(str(path), whole.schema) as writer:
        writer.write_table(whole)


def arrow_file(path):
    whole = pyarrow.Table.from_pylist(RECORDS)
    with ipc.new_file(str(path), whole.schema) as writer:
        writer.write_table(whole)


def array_record(*contents):
    def write(path):
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for content in contents:
            writer.write(content)
        writer.close()

    return write


def example(record):
    features = {
        name: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value.encode()]))
        for name, value in record.items()
    }
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features)).SerializeToString()


WRITERS = {
    "a.array_record": array_record(*(json.dumps(record).encode() for record in RECORDS)),
    "notes.array_record-00000-of-00001": array_record(*map(example, RECORDS)),
    "a.jsonl": json_lines,
    "a.ndjson": json_lines,
    "a.json": json_list,
    "lines.json": json_lines,
    "a.csv": table(","),
    "a.tsv": table("\t"),
    "a.parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path),
    "a.arrow": arrow_stream,
    "b.arrow": arrow_file,
    "A.JSONL": json_lines,
    "list.jsonl": json_list,
    "named_wrongly.txt": lambda path: parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_its_records(name, tmp_path):
    WRITERS[name](tmp_path / name)
    found = list(readers.records(str(tmp_path / name)))
    if name.startswith("notes"):  # TensorFlow's examples know bytes only
        found = [{field: value.decode() for field, value in record.items()} for record in found]
    assert found == RECORDS


@pytest.mark.parametrize("compression", ["gz", "zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.arrow"])
def test_compressed_files_are_read_as_what_they_hold(name, compression, tmp_path):
    WRITERS[name](tmp_path / name)
    content, path = (tmp_path / name).read_bytes(), tmp_path / f"{name}.{compression}"
    if compression == "gz":
        path.write_bytes(gzip.compress(content))
    else:
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    assert list(readers.records(str(path))) == RECORDS
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InputError, match=path.name):
        list(readers.records(str(path)))


def test_text_is_one_record_without_the_marks_of_other_systems(tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n")
    assert list(readers.records(str(tmp_path / "notes.txt"), "note")) == [{"note": b"one\ntwo\n"}]
    (tmp_path / "old.txt").write_bytes(b"one\rtwo")
    assert list(readers.records(str(tmp_path / "old.txt"))) == [{"text": b"one\ntwo"}]
    (tmp_path / "page.txt").write_bytes(b"{ not JSON }\n[1] neither\n")
    assert len(list(readers.records(str(tmp_path / "page.txt")))) == 1
    (tmp_path / "marked.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert list(readers.records(str(tmp_path / "marked.jsonl"))) == [{"text": "a"}, {"text": "b"}]
    (tmp_path / "marked.csv").write_bytes(b"\xef\xbb\xbftext,id\r\na,1\r\n\r\nb,2\r\n")
    found = list(readers.records(str(tmp_path / "marked.csv")))
    assert found == [{"text": "a", "id": "1"}, {"text": "b", "id": "2"}]


BROKEN = {
    "no object.jsonl": (b'{"text": "a"}\n[1]\n', "line 2: no JSON object"),
    "no json.jsonl": (b'{"text": "a"}\n\n{"text": \n', "line 3: no JSON object"),
    "deep.jsonl": (b'{"a":' * 100_000 + b"\n", "line 1: no JSON object"),
    "no utf8.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: no UTF-8"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}\n', "line 1: a JSON object with one field twice"),
    "list.json": (b'[{"text": "a"}, 5]', "record 2: no JSON object"),
    "twice in a list.json": (b'[{"text": "a", "text": "b"}]', "has a JSON object with one field twice"),
    "cut.json": (b'[{"text": "a"}, ', "is no JSON"),
    "short.csv": (b"a,b\n1,2\n3\n", "line 3: 1 fields under a header of 2"),
    "header.csv": (b"a,a\n1,2\n", "line 1: a header in which a name is missing or occurs twice"),
    "utf8.csv": (b"a,b\n1,\xff\n", "no UTF-8"),
    "quote.csv": (b'a,b\n"1,2\n', "no row of a table"),
    "binary.txt": (b"one\0two", "is no text"),
    "wide.txt": ("text".encode("utf-16"), "is UTF-16"),
    "archive.jsonl": (b"PK\x03\x04....", "is a zip archive"),
    "paper.txt": (b"%PDF-1.7", "is a PDF document"),
    "latin.txt": ("caf\u00e9\n".encode("latin-1"), "is no UTF-8 (Latin-1, perhaps): save it as UTF-8"),
    "cut.txt": ("caf\u00e9".encode()[:-1], "is no UTF-8"),
    "rich.txt": (b"{\\rtf1 text}", "is a document in rich text"),
    "lines.txt": (b'{"text": "a"}\n{"text": "b"}\n', "give it the ending .jsonl"),
    "list.txt": (b'[\n {"text": "a"}]', "give it the ending .json"),
    "mac.jsonl": (b'{"text": "a"}\r{"text": "b"}\r', "end in a carriage return alone"),
    "pretty.jsonl": (b'{\n "text": "a"\n}\n', "is one JSON document over several lines"),
    "pretty.json": (b'{"data": [\n {"text": "a"}\n]}\n', "is one JSON document over several lines"),
    "CAPITALS.CSV": (b"a,b\n1\n", "line 2: 1 fields under a header of 2"),
    "damaged.parquet": (b"PAR1" + b"x" * 100 + b"PAR1", "is damaged"),
    "damaged.arrow": (b"\xff\xff\xff\xff" + b"x" * 100, "is damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_named_by_file_and_line(name, tmp_path):
    content, said = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refused:
        list(readers.records(str(tmp_path / name)))
    assert name in str(refused.value) and said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_line_of_many_megabytes_is_read_and_only_one_at_a_time(tmp_path):
    path, size, lines = tmp_path / "long.jsonl", 2**23, 12
    with open(path, "w") as file:
        for _ in range(lines):
            file.write(json.dumps({"text": "a" * size}) + "\n")
    tracemalloc.start()
    assert [len(record["text"]) for record in readers.records(str(path))] == [size] * lines
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < lines / 2 * size


def test_folders_and_globs_are_read_in_order_and_to_any_depth(tmp_path):
    for name in ("b/c/3.jsonl", "a/1.jsonl", "a/2.jsonl", ".hidden/0.jsonl", "a/.part.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    expected = ["a/1.jsonl", "a/2.jsonl", "b/c/3.jsonl"]
    assert [record["text"] for record in readers.records(str(tmp_path))] == expected
    assert [record["text"] for record in readers.records(f"{tmp_path}/**/*.jsonl")] == expected
    with pytest.raises(InputError, match="no file matches"):
        list(readers.records(str(tmp_path / ".hidden" / "none")))


def test_a_name_with_brackets_is_a_name_and_a_file_is_read_once(tmp_path):
    folder = tmp_path / "my notes [2024]"
    folder.mkdir()
    for name in ("a [1].txt", "b.txt"):
        (folder / name).write_text(name)
    (folder / "c.txt").symlink_to(folder / "b.txt")
    (tmp_path / "d.txt").symlink_to(folder / "b.txt")
    assert [record["text"] for record in readers.records(str(folder))] == [b"a [1].txt", b"b.txt"]
    assert [record["text"] for record in readers.records(str(folder / "a [1].txt"))] == [b"a [1].txt"]
    assert [record["text"] for record in readers.records(f"{tmp_path}/**/*.txt")] == [b"b.txt", b"a [1].txt"]


def test_a_pattern_that_passes_over_folders_is_refused(tmp_path):
    for name in ("tree/1.txt", "tree/deep/2.txt", "tree/empty/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    with pytest.raises(
        InputError, match=r"matches the folder .*deep, whose files it does not match: give a pattern with"
    ):
        list(readers.records(str(tmp_path / "tree/*")))
    for pattern in ("tree/**", "tree/**/*.txt"):
        assert len(list(readers.records(str(tmp_path / pattern)))) == 2
    assert len(list(readers.records(str(tmp_path / "tree/*.txt")))) == 1


def test_what_hugging_faces_datasets_save_is_read_in_its_order(tmp_path):
    whole = datasets.Dataset.from_list([{"text": str(i)} for i in range(10)])
    whole.save_to_disk(str(tmp_path / "one"), num_shards=3)
    datasets.DatasetDict({"train": whole, "test": whole.select([0])}).save_to_disk(str(tmp_path / "parts"))
    datasets.DatasetDict({"first": whole}).save_to_disk(str(tmp_path / "others"))
    for name in ("one", "parts"):
        assert [record["text"] for record in readers.records(str(tmp_path / name))] == [str(i) for i in range(10)]
    with pytest.raises(InputError, match="has the splits first: give the folder of one of them"):
        list(readers.records(str(tmp_path / "others")))


def test_array_records_of_text_are_records_and_what_is_damaged_is_named(tmp_path):
    array_record(b"one", "zw\u00f6lf".encode())(tmp_path / "a.array_record")
    assert [record["text"] for record in readers.records(str(tmp_path))] == [b"one", "zw\u00f6lf".encode()]
    array_record(b"{}", b"none")(tmp_path / "b.array_record")
    with pytest.raises(InputError, match=r"b\.array_record, record 2: no JSON object"):
        list(readers.records(str(tmp_path / "b.array_record")))
    array_record(b"one", b"\xff")(tmp_path / "c.array_record")
    with pytest.raises(InputError, match=r"c\.array_record, record 2: no UTF-8"):
        list(readers.records(str(tmp_path / "c.array_record")))
    whole = (tmp_path / "a.array_record").read_bytes()
    for damaged in (b"", b"text", whole[:-50], whole[: len(whole) // 2], whole[:80] + bytes(30) + whole[110:]):
        (tmp_path / "d.array_record").write_bytes(damaged)
        with pytest.raises(InputError, match=r"d\.array_record (is damaged|is no ArrayRecord|holds no record)"):
            list(readers.records(str(tmp_path / "d.array_record")))


def test_a_folder_that_tfds_prepared_is_read_as_such(tmp_path, monkeypatch):
    from dpgemma.data import synthetic

    folder = str(synthetic.prepared().data_path)
    assert next(iter(readers.records(folder))) == next(iter(readers.records(f"tfds:{folder}")))


def test_a_bad_first_line_is_a_bad_record_where_such_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a",\n{"text": "b"}\n{"te\rxt\n')
    bad = LeftOut()
    assert [record["text"] for record in readers.records(str(tmp_path), on_bad=bad)] == ["b"] and bad.count == 2


def test_bad_records_are_left_out_named_and_counted(tmp_path):
    """In files of every kind that has records of its own, the others are read on."""
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n[]\n{"text": "2", "text": "3"}\n{"text": "4"}\n')
    (tmp_path / "b.json").write_text('[{"text": "5"}, 6]')
    (tmp_path / "c.csv").write_text("text,id\n7,a\n8\n9,b\n")
    bad = LeftOut()
    assert [record["text"] for record in readers.records(str(tmp_path), on_bad=bad)] == ["1", "4", "5", "7", "9"]
    assert bad.count == 4 and [what.rpartition("/")[2].partition(":")[0] for what in bad.named] == [
        "a.jsonl, line 2", "a.jsonl, line 3", "b.json, record 2", "c.csv, line 3"
    ]  # fmt: skip
