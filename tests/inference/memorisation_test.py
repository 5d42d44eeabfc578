"""The test of memorisation: on a model that has learned passages by heart, and on one that has not."""

import json
import random

import numpy as np
import pytest

from accounting.errors import InputError
from dpgemma import cli
from dpgemma.data.text import passages as passages_lib
from dpgemma.data.text.rows import SCORED, TOKENS
from dpgemma.data.text.tokenizer import ByteTokenizer
from dpgemma.gemma import memorisation
from dpgemma.inference import memorisation as lib
from tests.training import runs

ASK = ("--prefix=16", "--suffix=16")


def distance(a, b):
    """The edit distance by its recursive definition, with a table of what is known."""
    known = {}

    def of(i, j):
        if (i, j) not in known:
            known[i, j] = (
                i + j if min(i, j) == 0
                else min(of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (a[i - 1] != b[j - 1]))
            )  # fmt: skip
        return known[i, j]

    return of(len(a), len(b))


def test_edit_distances_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, (40, 9)), rng.integers(0, 3, (40, 7))
    assert memorisation.edit_distances(a, b).tolist() == [distance(x, y) for x, y in zip(a, b, strict=True)]


def note(rng):
    return " ".join(rng.choice(["fever", "cough", "rest", "Ada", "B12", "ward", "seen", "today"]) for _ in range(12))


def command(folder, name, **settings):
    common = dict(
        model="ladder_20k", data=folder / "notes.jsonl", sequence_length=40, batch_size=16, max_batch_size=60,
        mesh="data:1", checkpoint_every=300, learning_rate=0.02, canaries=12, canary_repeats="1,4",
        privacy_unit="example", holdout_fraction=0.2, workdir=folder / name,
    )  # fmt: skip
    return ["train", *(f"--{name}={value}" for name, value in {**common, **settings}.items())]


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run without privacy that has seen few notes very often, one of them in several copies, and canaries."""
    folder = tmp_path_factory.mktemp("learned")
    rng = random.Random(1)
    notes = [note(rng) for _ in range(12)] + [note(rng)] * 4
    (folder / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in notes))
    done = runs.call(*command(folder, "run", epsilon="inf", clip_norm="inf", noise_multiplier=0, steps=300))
    assert done.returncode == 0, done.stderr
    return folder


def asked(capsys, *arguments):
    capsys.readouterr()
    code = cli.main(["audit", *map(str, arguments), "--memorisation", "--json", *ASK])
    captured = capsys.readouterr()
    return code, json.loads(captured.out)["shares"] if code == 0 else captured.err


def test_what_was_seen_often_is_continued_word_for_word_and_what_was_held_out_is_not(learned, capsys):
    code, shares = asked(capsys, learned / "run")
    assert code == 0
    by_group = {(share["group"], share["repeats"]): share for share in shares}
    trained = [share for share in shares if share["group"] == lib.TRAINING]
    assert sum(share["exact"] for share in trained) >= 0.7 * sum(share["passages"] for share in trained)
    assert max(share["repeats"] for share in trained) >= 2  # the note of several copies
    often = by_group[lib.PLANTED, 4]
    assert often["exact"] >= 0.5 * often["passages"] and often["approximate"] >= often["exact"]
    for share in shares:
        if share["group"] == lib.NOT_PLANTED:
            assert share["exact"] == share["approximate"] == 0
        low, high = share["exact_interval_95"]
        assert low <= share["exact"] / share["passages"] <= high


@pytest.mark.slow
def test_a_model_that_has_learned_nothing_continues_nothing_and_is_asked_for_the_same(learned, capsys):
    """The second model is a Hugging Face directory: it is asked for the first one's passages."""
    done = runs.call(*command(learned, "private", steps=1, delta=1e-3))
    assert done.returncode == 0, done.stderr
    exported = learned / "exported"
    assert cli.main(["export", f"--workdir={learned / 'private'}", f"--out={exported}"]) == 0
    code, shares = asked(capsys, learned / "run", f"--against={exported}")
    assert code == 0
    mine, other = ([s for s in shares if s["model"] == str(m)] for m in (learned / "run", exported))
    assert [s["group"] for s in mine] == [s["group"] for s in other] and sum(s["exact"] for s in other) == 0


@pytest.fixture(scope="module")
def own_export(learned):
    folder = learned / "own export"
    assert cli.main(["export", f"--workdir={learned / 'run'}", f"--out={folder}"]) == 0
    return folder


@pytest.mark.slow
def test_canaries_of_a_reference_model_are_its_texts_and_differ(learned, own_export):
    synthetic = dict(canary_kind="synthetic", canary_model=own_export, canary_repeats="1", canaries=40)
    done = runs.call(*command(learned, "synthetic", steps=1, delta=1e-3, **synthetic))
    assert done.returncode == 0, done.stderr
    stored = np.load(learned / "synthetic" / "private" / "canaries.npz")
    tokens, scored = stored[f"row {TOKENS}"], stored[f"row {SCORED}"]
    texts = [
        ByteTokenizer().decode(row[mask]).decode(errors="replace") for row, mask in zip(tokens, scored, strict=True)
    ]
    words = " ".join(texts).split()
    known = {"fever", "cough", "rest", "Ada", "B12", "ward", "seen", "today"}
    # The model knows sixteen notes by heart, so texts of it repeat; random ones would hold none of these words.
    assert sum(word in known for word in words) >= 0.3 * len(words) and len(set(texts)) >= 8
    cold = runs.call(*command(learned, "cold", steps=1, delta=1e-3, **synthetic, canary_temperature=0.1))
    assert cold.returncode == 2 and "between 0.8 and 10" in cold.stderr


def test_any_model_can_be_asked_for_any_records(learned, own_export, capsys):
    exported = own_export
    code, shares = asked(capsys, exported, f"--data={learned / 'notes.jsonl'}")
    assert code == 0 and shares[0]["group"] == lib.DATA and shares[0]["exact"] >= 0.5 * shares[0]["passages"]
    code, error = asked(capsys, exported)
    assert code == 2 and "give --data" in error


def test_other_data_than_the_run_s_are_refused(learned, capsys, tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps({"text": "something else entirely, of some length"}) + "\n")
    code, error = asked(capsys, learned / "run", f"--data={tmp_path / 'other.jsonl'}")
    assert code == 2 and "does not hold the data" in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(("flags", "message"), [
    (["--against=x"], "give --empirical or --memorisation"),
    (["--memorisation", "--empirical"], "--empirical have no meaning with --memorisation"),
    (["--memorisation", "--head=zz"], "--head have no meaning with --memorisation"),
    (["--prefix=3"], "--prefix belong to --memorisation"),
    (["--memorisation", "--passages=0"], "--passages must be at least 1"),
    (["--memorisation", "--prefix=500"], "do not fit into the model's context"),
    (["--memorisation", "--prefix=30", "--suffix=30"], "lower --prefix"),
])  # fmt: skip
def test_questions_without_a_meaning_are_refused(learned, flags, message, capsys):
    assert cli.main(["audit", str(learned / "run"), *flags]) == 2
    assert message in capsys.readouterr().err


def rows_of(*texts):
    length = max(map(len, texts))
    tokens = np.zeros((len(texts), length), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = ByteTokenizer().encode(text)
    return {TOKENS: tokens, SCORED: tokens > 0}


def test_what_is_shaped_like_a_secret_is_found_where_it_stands():
    text = b"Seen by Dr. Ada, write to ada.l@ward.example or call 0151 2345678. Record 654321, 120/80.\n"
    text += b"Portal password on file: k3jm9qrtxz. Weight 72 kg on 01.02.2024."
    found = list(passages_lib.shaped_passages(rows_of(text), 50, ByteTokenizer()))
    shown = [(shape, ByteTokenizer().decode(passage.suffix)) for shape, passage in found]
    assert shown == [
        ("e-mail", b"ada.l@ward.example"), ("telephone", b"0151 2345678"), ("number", b"2345678"),
        ("number", b"654321"),
        ("password", b"k3jm9qrtxz"),
    ]  # fmt: skip
    _, first = found[0]
    assert ByteTokenizer().decode(first.prefix) == text[: text.index(b"ada.l")]


def test_passages_begin_where_something_is_learned():
    rows = {TOKENS: np.arange(20).reshape(2, 10), SCORED: np.zeros((2, 10), bool)}
    rows[SCORED][0, 6:] = True
    first, none = passages_lib.first_passages(rows, 3, 4)
    assert first.prefix.tolist() == [3, 4, 5] and first.suffix.tolist() == [6, 7, 8, 9] and none is None


def test_a_question_without_an_answer_is_refused():
    with pytest.raises(InputError, match="suffix"):
        lib.Question(suffix=0)
