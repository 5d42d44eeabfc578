"""A corpus sampled from a run: what it follows from, how it goes on after a kill, and what its card says."""

import collections
import dataclasses
import hashlib
import json
import random
import shutil
import signal
import subprocess

import numpy as np
import pytest

from accounting.errors import InputError
from dpgemma.gemma import decoder, features
from dpgemma.gemma.synthesis import Candidate, Filter, Sampler, records
from dpgemma.gemma.synthesis_settings import Prompts, SynthesisSettings
from dpgemma.inference import mauve_score, models, similarity
from dpgemma.inference.corpus import Corpus
from tests.training.runs import COMMAND, ENVIRONMENT, call, wait_for

TEXTS = ["rest.", "tea and rest.", "come back on day 7.", "no fever."]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that has learned where its texts end."""
    folder = tmp_path_factory.mktemp("synthesis")
    lines = (json.dumps({"text": TEXTS[i % 4]}) + "\n" for i in range(1200))
    (folder / "notes.jsonl").write_text("".join(lines))
    done = call(
        "train", f"--data={folder / 'notes.jsonl'}", f"--workdir={folder / 'run'}", "--model=ladder_20k", "--steps=40",
        "--sequence_length=32", "--batch_size=64", "--max_batch_size=160", "--noise_multiplier=0.8", "--mesh=data:2",
        "--learning_rate=0.02", "--delta=1e-4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


def synthesize(trained, out, *more):
    return call("synthesize", f"--workdir={trained}", f"--out={out}", "--batch_size=32", "--max_new_tokens=60", *more)


def test_records_follow_from_the_model_and_public_settings_alone(trained, tmp_path):
    """The data are gone, private/ is gone, and batches have another size: the records are the same."""
    done = synthesize(trained, tmp_path / "a.jsonl", "--num_records=40", "--keep_duplicates")
    assert done.returncode == 0, done.stderr
    written = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(written) == 40 and all(set(record) == {"text"} and record["text"] for record in written)
    copied = shutil.copytree(trained, tmp_path / "copy")
    shutil.rmtree(copied / "private")
    done = synthesize(copied, tmp_path / "b.jsonl", "--num_records=40", "--keep_duplicates", "--batch_size=16")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b.jsonl").read_text() == (tmp_path / "a.jsonl").read_text()
    done = synthesize(trained, tmp_path / "c.jsonl", "--num_records=40", "--keep_duplicates", "--seed=1")
    assert (tmp_path / "c.jsonl").read_text() != (tmp_path / "a.jsonl").read_text()
    done = synthesize(trained, tmp_path / "d.jsonl", "--num_records=10")
    distinct = [json.loads(line)["text"] for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    assert len(set(distinct)) == 10


def test_the_card_states_the_runs_guarantee(trained, tmp_path):
    done = synthesize(trained, tmp_path / "a.jsonl", "--num_records=10")
    assert done.returncode == 0 and f"wrote {tmp_path / 'a.md'}" in done.stdout, done.stderr
    card, report = (tmp_path / "a.md").read_text(), json.loads((trained / "report.json").read_text())
    assert f"This corpus is ({report['epsilon']}, 0.0001)-differentially private" in card
    assert report["statement"] in card and report["run_id"] in card
    told = card.partition("Deviations of the run:\n\n")[2]
    assert told.startswith("".join(f"- {line}\n" for line in report["deviations"] or ["none"]))
    assert hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest() in card
    # The ledger, or the checkpoint's place in it, is another.
    copied = shutil.copytree(trained, tmp_path / "copy")
    lines = (copied / "ledger.jsonl").read_text().splitlines(keepends=True)
    (copied / "ledger.jsonl").write_text("".join(lines[:1] + lines[2:]))
    done = synthesize(copied, tmp_path / "b.jsonl", "--num_records=10")
    assert done.returncode == 2 and "run dpgemma audit" in done.stderr and not (tmp_path / "b.md").exists()
    done = call("audit", trained)
    assert done.returncode == 0, done.stdout  # nothing of it lies in the run's folder


@pytest.mark.slow
def test_a_killed_synthesis_goes_on_to_the_same_corpus(trained, tmp_path):
    given = ["synthesize", f"--workdir={trained}", "--batch_size=8", "--max_new_tokens=60", "--num_records=60"]
    given.append("--keep_duplicates")
    done = call(*given, f"--out={tmp_path / 'whole.jsonl'}")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "killed.jsonl"
    process = subprocess.Popen([*COMMAND, *given, f"--out={out}"], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    wait_for(lambda: out.exists() and out.read_bytes().count(b"\n") >= 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(out, "a") as file:
        file.write('{"text": "half a li')  # as a kill within a write leaves it
    done = call(*given, f"--out={out}", "--temperature=0.5")
    assert done.returncode == 2 and "begun with another temperature" in done.stderr
    done = call(*given, f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert not list(tmp_path.glob(".killed*"))
    done = call(*given, f"--out={out}")
    assert done.returncode == 2 and "is there already" in done.stderr
    card = (tmp_path / "killed.md").read_text()
    assert card.replace("killed", "whole") == (tmp_path / "whole.md").read_text()


def test_a_corpus_can_be_made_longer_until_it_is_complete(trained, tmp_path):
    """Whatever number was asked for first; and a file that lost records is not gone on with."""
    model, kept = models.load(str(trained)), Filter(SynthesisSettings(keep_duplicates=True))
    settings = SynthesisSettings(num_records=7, batch_size=8, max_new_tokens=60, keep_duplicates=True)
    sampler = Sampler(model.config, model.parameters, model.tokenizer, settings, Prompts(), packed=True, context=32)
    corpus = Corpus.opened(tmp_path / "a.jsonl", {"seed": 0}, kept)
    for number in (7, 15):
        wanted = dataclasses.replace(settings, num_records=number)
        for sampled, found in records(sampler, wanted, kept, corpus.candidates, corpus.records):
            corpus.add(sampled, found, kept)
        kept = Filter(settings)
        corpus = Corpus.opened(tmp_path / "a.jsonl", {"seed": 0}, kept)
    at_once = [one for _, found in records(sampler, wanted, Filter(settings), 0, 0) for one in found]
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines == [one.record() for one in at_once] and len(lines) == 15
    assert sum(corpus.left_out.values()) == corpus.candidates - 15 and corpus.left_out == kept.left_out
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(InputError, match="is not as long as it was"):
        Corpus.opened(tmp_path / "a.jsonl", {"seed": 0}, kept)


@pytest.mark.slow
def test_a_text_that_is_cut_has_not_ended(trained):
    """Where prompts leave unequal room, and where packed rows are longer than what is asked for."""
    model = models.load(str(trained))
    for prompts, packed, context in ((Prompts(("a", "abcdef" * 3)), False, 200), (Prompts(), True, 200)):
        settings = SynthesisSettings(max_new_tokens=5, batch_size=16, temperature=2.0)
        sampler = Sampler(
            model.config, model.parameters, model.tokenizer, settings, prompts, packed=packed, context=context
        )
        for candidate in sampler.sample(range(16)):
            length = len(model.tokenizer.encode(candidate.text.encode()))
            assert candidate.ended == (length < 5) or not candidate.text.isascii()


def test_prompts_are_drawn_by_their_weights_and_answered(trained, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "tea", "weight": 3}\n{"prompt": "rest", "weight": 1}\n')
    done = synthesize(
        trained,
        tmp_path / "a.jsonl",
        "--num_records=30",
        f"--prompts={tmp_path / 'prompts.jsonl'}",
    )
    assert done.returncode == 0, done.stderr
    assert "there before" not in done.stdout  # a duplicate that is left out would make its prompt rarer
    written = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert {record["prompt"] for record in written} == {"tea", "rest"} and all(
        "response" in record for record in written
    )
    model = models.load(str(trained))
    prompts = Prompts(("tea", "rest"), (3.0, 1.0))
    sampler = Sampler(model.config, model.parameters, model.tokenizer, SynthesisSettings(), prompts, packed=True)
    drawn = collections.Counter(sampler.prompt_of(number) for number in range(4000))
    # 4000 fair draws: a share beyond five standard deviations of 0.75 has a chance below 1e-6.
    assert abs(drawn[0] / 4000 - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 4000)


def test_the_filter_keeps_what_it_says():
    kept = Filter(SynthesisSettings(min_characters=3))
    texts = [("abc", True), ("abc", True), ("ab", True), ("abcd", False), ("  ", True), ("abcd", True)]
    taken = [kept.keeps(Candidate(i, None, text, ended)) for i, (text, ended) in enumerate(texts)]
    assert taken == [True, False, False, False, False, True]
    assert kept.left_out == {"without an end": 1, "too short": 2, "there before": 1}

    class Endless:
        def sample(self, numbers):
            return [Candidate(number, None, "x", False) for number in numbers]

    with pytest.raises(InputError, match="of 512 sampled texts only 0 are kept"):
        settings = SynthesisSettings(num_records=3)
        list(records(Endless(), settings, Filter(settings), 0, 0))


REFUSED = {
    "no run": (["--out=a.jsonl"], "say which run"),
    "no place": (["--workdir={run}"], "say where to write"),
    "another kind of file": (["--workdir={run}", "--out={tmp}/a.txt"], "must end in .jsonl"),
    "in the run": (["--workdir={run}", "--out={run}/a.jsonl"], "lies in the run's folder"),
    "chat without prompts": (["--workdir={run}", "--out={tmp}/a.jsonl", "--chat"], "needs --prompts"),
    "chat without turns": (
        ["--workdir={run}", "--out={tmp}/a.jsonl", "--chat", "--prompts={tmp}/p.txt"], "conversations need the",
    ),
    "no prompts": (["--workdir={run}", "--out={tmp}/a.jsonl", "--prompts={tmp}/none"], "is no file: give"),
    "empty prompts": (["--workdir={run}", "--out={tmp}/a.jsonl", "--prompts={tmp}/empty.txt"], "is empty"),
    "bad prompts": (["--workdir={run}", "--out={tmp}/a.jsonl", "--prompts={tmp}/bad.jsonl"], "line 1: give a"),
    "a long prompt": (["--workdir={run}", "--out={tmp}/a.jsonl", "--prompts={tmp}/long.txt"], "fills the model's"),
    "no records": (["--workdir={run}", "--out={tmp}/a.jsonl", "--num_records=0"], "at least 1"),
    "temperature": (["--workdir={run}", "--out={tmp}/a.jsonl", "--temperature=-1"], "temperature"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(case, trained, tmp_path):
    (tmp_path / "p.txt").write_text("hello\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "long.txt").write_text("x" * 300 + "\n")
    arguments, sentence = REFUSED[case]
    done = call("synthesize", *(argument.format(run=trained, tmp=tmp_path) for argument in arguments))
    assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.slow
def test_mauve_is_high_for_texts_of_one_source_and_low_for_others(trained):
    """Its features are those of single texts, whatever stands in the batch beside them."""
    model, rng = models.load(str(trained)), random.Random(0)
    same = [[rng.choice(TEXTS) + f" day {rng.randrange(30)}" for _ in range(120)] for _ in range(2)]
    others = ["".join(rng.choices("xyzqjk", k=12)) for _ in range(120)]
    found = features.of_texts(model.config, model.parameters, model.tokenizer, [*same[0][:70], "x" * 50], 32)
    assert found.shape[0] == 71
    for number in (0, 69, 70):
        text = [*same[0][:70], "x" * 50][number]
        ids = np.concatenate([[model.tokenizer.bos], model.tokenizer.encode(text.encode())])[:32]
        states = decoder.hidden_states(model.config, model.parameters, ids[None])
        np.testing.assert_allclose(found[number], np.asarray(states[0]).mean(0), rtol=1e-4, atol=1e-5)
    alike, unlike = mauve_score.score(model, *same, 32), mauve_score.score(model, same[0], others, 32)
    assert 0.8 < alike <= 1 and 0 <= unlike < 0.2
    assert mauve_score.score(model, same[0][:20], others[:20], 32) is None


def test_distances_and_near_copies_are_what_they_are_said_to_be(trained, tmp_path):
    from scipy.spatial.distance import jensenshannon

    some, others = ["seen today, no fever", "a rash and a cough"], ["seen again, a fever", "a cough"]
    found = similarity.Similarity.of(some, others)
    for figure, grams in (
        ("words", similarity.words),
        ("pairs", similarity.pairs),
        ("characters", similarity.characters),
    ):
        counts = [collections.Counter(gram for text in texts for gram in grams(text)) for texts in (some, others)]
        known = sorted(counts[0].keys() | counts[1].keys(), key=str)
        p, q = ([count[gram] for gram in known] for count in counts)
        assert getattr(found, figure) == pytest.approx(jensenshannon(p, q, base=2) ** 2)
    long = "the patient was seen today and will come back in a week for another look"
    assert similarity.near_copies([long[:55], long[:49], "x" + long], [long]) == 2
    lines = (json.dumps({"note": f"{text} {long}"}) + "\n" for text in TEXTS * 5)
    (tmp_path / "real.jsonl").write_text("".join(lines))
    done = synthesize(
        trained, tmp_path / "a.jsonl", "--num_records=10", f"--compare={tmp_path / 'real.jsonl'}", "--text_field=note"
    )
    assert done.returncode == 0 and "near-copies" not in done.stdout + done.stderr  # there is no terminal
    # The same command once more compares, and samples nothing.
    before = (tmp_path / "a.jsonl").read_bytes()
    done = synthesize(
        trained, tmp_path / "a.jsonl", "--num_records=10", f"--compare={tmp_path / 'real.jsonl'}", "--text_field=note"
    )
    assert done.returncode == 0 and (tmp_path / "a.jsonl").read_bytes() == before, done.stderr
    kept, again = map(json.loads, (trained / "private" / "synthesis.jsonl").read_text().splitlines())
    assert kept == again
    assert kept["records"] == 10 and kept["near_copies"] == 0 and kept["halves"]["near_copies"] == 10
    assert 0 < kept["characters"] <= 1
    # A copy is found whatever the fields of the real records are called.
    (tmp_path / "copied.jsonl").write_text(json.dumps({"text": f"seen: {long}"}) + "\n")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": long}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))
    for real in ("real", "chats"):
        found, _ = similarity.compare(str(tmp_path / "copied.jsonl"), str(tmp_path / f"{real}.jsonl"), "note")
        assert found.near_copies == 1 and found.words < 1
    with pytest.raises(InputError, match=r"record 1 of .* has no text in field 'other'"):
        similarity.compare(str(tmp_path / "copied.jsonl"), str(tmp_path / "real.jsonl"), "other")
    assert kept["words"] > kept["halves"]["words"]
    (trained / "private" / "synthesis.jsonl").unlink()
