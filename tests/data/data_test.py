import json
import random
import threading
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from accounting.errors import InputError
from dpgemma.data import holdout, pipeline, readers
from dpgemma.data.batch import collate
from dpgemma.data.text import units
from dpgemma.data.text.pieces import InMemoryPieces, Piece, Reading
from dpgemma.data.text.rows import units_of_one_row
from dpgemma.data.text.tokenizer import ByteTokenizer
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding import place
from tests.data.in_memory import rows_in_memory

TOKENIZER = ByteTokenizer()


def rows_of(tokens):
    return units_of_one_row(tokens, np.ones(tokens.shape, bool))


def packed(documents):
    return rows_in_memory([{"text": text} for text in documents], TOKENIZER, Reading("sequence", 8, "text"))


def documents_of(data, field="text"):
    return [record[field] for record in readers.records(data, field)]


def test_pitfall_19_every_token_lies_in_exactly_one_row():
    # pitfall 19: no overlap between units, nothing lost.
    documents = [b"alpha", b"", b"a much longer document than one row", b"z"]
    rows = packed(documents).columns
    stream = [t for d in documents if d for t in [*TOKENIZER.encode(d), TOKENIZER.eos]]
    assert rows["tokens"].shape[1] == 8 and rows["tokens"].dtype == np.int32
    flat = rows["tokens"].ravel()
    np.testing.assert_array_equal(rows["scored"].ravel(), np.arange(len(flat)) < len(stream))
    assert flat[: len(stream)].tolist() == stream
    assert (flat[len(stream) :] == TOKENIZER.pad).all() and len(flat) - len(stream) < 8


@pytest.mark.parametrize("documents", [[], [b""], [b"", b""]])
def test_empty_data_are_refused(documents):
    with pytest.raises(InputError, match="empty"):
        packed(documents)


def test_pitfall_3_assignment_ignores_content():
    # pitfall 3: number and identity of training units do not depend on what the units contain.
    key = b"k" * 32
    rows = np.arange(4000, dtype=np.int32).reshape(-1, 4)
    other = np.random.default_rng(0).integers(0, 4000, rows.shape).astype(np.int32)  # of every unit, not of one
    a, b = holdout.split(rows_of(rows), key, 0.1), holdout.split(rows_of(other), key, 0.1)
    (a_training, a_held_out), (b_training, _) = a, b
    np.testing.assert_array_equal(a_training.numbers, b_training.numbers)
    assert sorted([*a_training.numbers, *a_held_out.numbers]) == list(range(1000))


def test_holdout_is_random_at_its_fraction_and_keyed():
    a, b = (holdout.held_out(key * 32, 200_000, 0.1) for key in (b"a", b"b"))
    for chosen in (a, b):
        assert stats.binomtest(int(chosen.sum()), 200_000, 0.1).pvalue > 1e-7
    assert abs((a & b).sum() - 2000) < 6 * np.sqrt(2000)
    np.testing.assert_array_equal(a[:1000], holdout.held_out(b"a" * 32, 1000, 0.1))
    assert not holdout.held_out(b"a" * 32, 1000, 0.0).any()


def test_batches_have_constant_shapes_and_are_dealt_evenly():
    data, _ = holdout.split(rows_of(np.arange(400, dtype=np.int32).reshape(-1, 4)), b"k" * 32, 0.0)
    for drawn in (0, 1, 5, 8):
        units = np.arange(drawn) * 3
        batch = collate(data, units, 8)
        assert batch.rows["tokens"].shape == batch.rows["scored"].shape == (8, 1, 4) and batch.mask.sum() == drawn
        np.testing.assert_array_equal(batch.rows["tokens"][:drawn, 0], data.source.columns["tokens"][units])
        np.testing.assert_array_equal(batch.rows["scored"].all(axis=(1, 2)), batch.mask)
        dealt = batch.dealt(2)
        halves = dealt.mask.reshape(2, 4)
        assert abs(int(halves[0].sum()) - int(halves[1].sum())) <= 1
        assert all((np.diff(half.astype(int)) <= 0).all() for half in halves)  # units in front on every device
        rows = [{tuple(row[0]) for row in b.rows["tokens"][b.mask]} for b in (batch, dealt)]
        assert rows[0] == rows[1] and len(rows[0]) == drawn


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_hold_every_drawn_unit_once(parts):
    """And are what dealing out the whole batch gives, units without content left out."""
    data, _ = holdout.split(rows_of(np.arange(400, dtype=np.int32).reshape(-1, 4)), b"k" * 32, 0.0)
    units = np.array([0, 3, 4, 17, 58, 99, 100, 140])  # of 100 that there are
    found = [collate(data, units, 8 // parts, (number, parts)) for number in range(parts)]
    rows = np.concatenate([part.rows["tokens"][part.mask] for part in found])
    np.testing.assert_array_equal(np.sort(rows[:, 0, 0]), 4 * units[:6])
    dealt = collate(data, units, 8).dealt(parts)
    np.testing.assert_array_equal(np.concatenate([part.rows["tokens"] for part in found]), dealt.rows["tokens"])
    np.testing.assert_array_equal(np.concatenate([part.real for part in found]), dealt.real)


def test_the_rows_of_devices_hold_their_own_parts():
    mesh = mesh_lib.make("data:2")
    data, _ = holdout.split(rows_of(np.arange(400, dtype=np.int32).reshape(-1, 4)), b"k" * 32, 0.0)
    units = np.array([1, 5, 6, 7, 30])
    assert place.rows_here(mesh) == [0, 1]
    batch = place.from_rows(mesh, {number: collate(data, units, 4, (number, 2)) for number in (0, 1)})
    for shard, held in zip(batch.rows["tokens"].addressable_shards, (units[::2], units[1::2]), strict=True):
        assert shard.device == mesh.devices[shard.index[0].start // 4]
        np.testing.assert_array_equal(np.asarray(shard.data)[: len(held), 0, 0], 4 * held)


def test_meshes_are_found_and_slices_are_told():
    assert mesh_lib.resolve("auto") == "data:2" and mesh_lib.resolve("auto", 2) == "slice:2,data:1"
    for mesh, slices, said in [("auto", 3, "must divide the 2"), ("auto", 0, "got 0"), ("data:2", 2, "goes with")]:
        with pytest.raises(InputError, match=said):
            mesh_lib.resolve(mesh, slices)


def test_declared_units_beyond_the_data_are_empty():
    data, _ = holdout.split(rows_of(np.ones((10, 4), np.int32)), b"k" * 32, 0.0)
    assert collate(data, np.array([2, 9, 10, 57]), 6).mask.sum() == 2


def test_sources_read_text_globs_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n")
    (tmp_path / "b.txt").write_bytes("two \u00e9".encode())
    assert documents_of(str(tmp_path / "*.txt")) == [b"one\n", "two \u00e9".encode()]
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"note": "é"}) + "\n\n" + json.dumps({"note": "x"}) + "\n")
    assert documents_of(str(path), "note") == ["é", "x"]
    with pytest.raises(InputError, match=r"record 1 .*'text'"):
        rows_in_memory(readers.records(str(path)), TOKENIZER, Reading("sequence", 8, "text"))


@pytest.mark.parametrize("spec", ["/nowhere/x.txt", "tfds:no_such_data_set"])
def test_missing_data_are_one_sentence(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError):
        documents_of(spec)


def test_synthetic_corpus_is_built_once_without_download(tmp_path, monkeypatch, capsys):
    import tensorflow_datasets as tfds

    monkeypatch.setenv("DPGEMMA_CACHE", str(tmp_path))
    first = documents_of("synthetic")
    monkeypatch.setattr(
        tfds.core.GeneratorBasedBuilder, "_download_and_prepare", lambda *a, **k: pytest.fail("built again")
    )
    assert documents_of("synthetic") == first
    assert capsys.readouterr().out == ""
    assert list(tmp_path.rglob("*.array_record*"))
    assert len(first) == len(set(first)) == 6000
    assert all(80 < len(note) < 900 for note in first)
    by_directory = documents_of(f"tfds:{next(tmp_path.glob('clinic_notes/*'))}")
    assert by_directory == first


@pytest.mark.parametrize("first", [0, 3, 9])
def test_batches_are_prepared_in_order(first):
    """Whatever thread makes them, wherever a run goes on; few are made ahead, and what fails is raised in its turn."""
    made = []

    def make(t):
        made.append(t)
        if t == 12:
            raise InputError("unit 5 cannot be read")
        return t, threading.get_ident()

    batches = pipeline.prepared(make, first, 20)
    for t in range(first, 12):
        number, thread = next(batches)
        assert number == t and thread != threading.get_ident()
        assert made == list(range(first, len(made) + first)) and len(made) <= t - first + 4
    with pytest.raises(InputError, match="unit 5 cannot be read"):
        next(batches)


def test_reading_text_takes_at_most_nine_bytes_for_each_of_its_own(tmp_path):
    """Five are kept: four for a token, and one for whether it is learned."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdef ", k=1000)) for _ in range(3000)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    reading = Reading("sequence", 128, "text")
    tracemalloc.start()
    units.read(str(tmp_path / "text.jsonl"), ByteTokenizer(), reading, 260)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9 * sum(map(len, texts)) + 2**23  # and a buffer of rows


def test_tokens_of_pieces_joined_are_cut_anywhere():
    rng = np.random.default_rng(0)
    held = [Piece(rng.integers(0, 100, n).astype(np.int32), True, 0) for n in (3, 0, 5, 1)]
    pieces = InMemoryPieces([piece.narrowed() for piece in held])
    numbers = np.array([2, 1, 3, 0])
    joined = np.concatenate([held[i].tokens for i in numbers])
    assert all(piece.tokens.dtype == np.int16 for piece in pieces.held)
    for begin in range(10):
        for end in [None, *range(begin, 12)]:
            cut = pieces.tokens(numbers, begin, end)
            assert cut.dtype == np.int32 and cut.tolist() == joined[begin:end].tolist()
    wide = Piece(np.array([-(2**15) - 1, 5], np.int32), True, 0).narrowed()
    assert wide.tokens.dtype == np.int32 and wide.tokens.tolist() == [-(2**15) - 1, 5]
