"""Histograms of prompts: what a unit can change, what is released, what it is charged, and what an audit says."""

import collections
import hashlib
import json
import math
import random
import shutil
import typing

import numpy as np
import pytest
from scipy import optimize, stats

from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.ledger import executed
from accounting.mechanism import ZERO_OUT, dp_sgd
from accounting.mechanism.histogram import unit_steps
from accounting.report import card
from dpgemma import cli
from dpgemma.data import holdout
from dpgemma.data.source import InMemory
from dpgemma.data.text import prompts
from dpgemma.data.text.tokenizer import ByteTokenizer
from dpgemma.gemma.synthesis import Sampler
from dpgemma.gemma.synthesis_settings import SynthesisSettings
from dpgemma.inference import corpus, models
from dpgemma.privacy.keys import Keys
from dpgemma.training import histogram
from tests.training import runs
from tests.training.forgery import audited, rewrite_chain
from tests.training.recomputed_test import noise_of

PROMPTS = ("heart:", "head:", "skin:")
NOISE = 5.0
UNIT = unit_steps(NOISE)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A file of records, and the public list of prompts; one prompt of the data is not on it."""
    folder = tmp_path_factory.mktemp("histogram")
    rng = random.Random(0)
    found = [
        {"prompt": rng.choices([*PROMPTS, "none:"], [6, 3, 1, 1])[0], "response": " rest.", "patient": f"p{i // 3}"}
        for i in range(600)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return folder


def train(records, workdir, *more):
    return runs.call(
        "train", f"--data={records / 'records.jsonl'}", f"--workdir={workdir}", "--model=ladder_20k", "--steps=6",
        f"--prompt_histogram={records / 'prompts.txt'}", f"--histogram_noise={NOISE}", "--sequence_length=16",
        "--batch_size=24", "--max_batch_size=64", "--epsilon=4", "--delta=1e-4", "--mesh=data:2",
        "--checkpoint_every=2", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(records, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("counted") / "run"
    done = train(records, workdir)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def lines(workdir, kind=None):
    found = [json.loads(line) for line in (workdir / "ledger.jsonl").read_text().splitlines()]
    return [line for line in found if kind in (None, line["kind"])]


def source_of(units):
    """Units as rows of (prompt, answer)."""
    tokens, scored, first = [], [], [0]
    for rows in units:
        for prompt, answer in rows:
            row = ByteTokenizer().encode((prompt + answer).encode())
            tokens.append(np.pad(row, (0, 16 - len(row))))
            scored.append(np.arange(16) >= len(prompt) if answer else np.zeros(16, bool))
            scored[-1][len(row) :] = False
        first.append(len(tokens))
    return InMemory({"tokens": np.array(tokens), "scored": np.array(scored)}, np.array(first), 4)


def any_unit(rng):
    count = rng.integers(1, 5)
    return [(rng.choice([*PROMPTS, "none:", ""]), rng.choice(["rest.", ""])) for _ in range(count)]


def test_a_unit_moves_the_counts_by_at_most_one():
    """Whatever its rows hold; and counts are those of plain counting."""
    rng, numbers = np.random.default_rng(0), prompts.beginnings(PROMPTS, ByteTokenizer(), 16)
    for _ in range(200):
        units = [any_unit(rng) for _ in range(rng.integers(1, 6))]
        counts = prompts.counted(source_of(units), numbers, len(PROMPTS), UNIT)
        answered = [[prompt for prompt, answer in rows if answer and prompt in PROMPTS] for rows in units]
        expected = [
            sum(UNIT // len(prompts) for prompts in answered for prompt in prompts if prompt == wanted)
            for wanted in PROMPTS
        ]
        assert counts.tolist() == expected
        changed = rng.integers(len(units))
        for other in (any_unit(rng), [("", "")]):
            neighbour = [other if i == changed else rows for i, rows in enumerate(units)]
            moved = prompts.counted(source_of(neighbour), numbers, len(PROMPTS), UNIT) - counts
            # One content against another moves twice as much, which is what the accountant takes for it.
            assert abs(moved).sum() <= (UNIT if other == [("", "")] else 2 * UNIT)
    assert UNIT * NOISE <= 2**26 * (1 - 2.0**-11)


def test_more_units_than_are_read_at_once_are_all_counted():
    one, told = source_of([[("skin:", "rest")]]), []
    many = InMemory({name: np.repeat(column, 10_000, axis=0) for name, column in one.columns.items()})
    counts = prompts.counted(many, prompts.beginnings(PROMPTS, ByteTokenizer(), 16), 3, 7, told.append)
    assert counts.tolist() == [0, 0, 70_000] and sum(told) == 10_000 and len(told) > 1


def test_what_is_released_is_counts_and_noise_from_the_runs_key(records, finished):
    """Recomputed from the files: keys, records and the description of the noise."""
    start, (line,) = lines(finished)[0], lines(finished, "histogram")
    keys = Keys.load(finished / "private/keys.json")
    purpose = json.dumps({"counting": 1, "purpose": "histogram"}, separators=(",", ":")).encode()
    secret = hashlib.blake2b(
        purpose, key=runs.step_secrets(finished, places=[])["noise"], digest_size=32, person=b"dpgemma bound"
    ).digest()
    held = [json.loads(text)["prompt"] for text in (records / "records.jsonl").read_text().splitlines()]
    everyone = InMemory({"number": np.arange(len(held))})
    training = holdout.split(everyone, keys.holdout, 0.1)[0]
    numbers = training.read(np.arange(training.num_units))[0]["number"]
    assert len(numbers) == start["num_units"]
    counts = collections.Counter(held[number] for number in numbers)
    noise = noise_of(secret, 0, 0, (len(PROMPTS),), 26)
    assert line["labels"] == list(PROMPTS) and line["noise"] == NOISE
    assert line["counts"] == [
        (counts[prompt] * UNIT + int(added)) / UNIT for prompt, added in zip(PROMPTS, noise, strict=True)
    ]
    assert any(abs(count - counts[prompt]) > 0.5 for prompt, count in zip(PROMPTS, line["counts"], strict=True))
    # No step has this noise.
    of_steps = runs.step_secrets(finished)["noise"]
    assert all(not (noise_of(of_steps, t, 0, (len(PROMPTS),), 26) == noise).any() for t in range(6))


def test_the_noise_has_the_stated_deviation():
    """Of 40,000 counts under two keys; the chance of a false alarm is below 1e-9."""
    labels, counts = [str(i) for i in range(20_000)], np.zeros(20_000, np.int64)
    found = np.array([histogram.released(labels, counts, UNIT, NOISE, bytes([i]) * 32).counts for i in range(2)])
    low, high = stats.chi2.ppf([5e-10, 1 - 5e-10], found.size)
    assert low < (found**2).sum() / NOISE**2 < high * (1 + 2.0**-10)


def gaussian_epsilon(mu, delta):
    """Of the Gaussian mechanism (Balle and Wang 2018, theorem 8)."""

    def excess(epsilon):
        above, below = stats.norm.cdf(mu / 2 - epsilon / mu), stats.norm.cdf(-mu / 2 - epsilon / mu)
        return above - math.exp(epsilon) * below - delta

    return optimize.brentq(excess, 0, 50)


def test_it_is_a_part_of_the_budget(records, finished, tmp_path, capsys):
    report = json.loads((finished / "report.json").read_text())
    assert 3.9 < report["epsilon"] <= 4 and report["histogram"] == {"labels": 3, "noise": NOISE}
    (steps,), facts = executed.of(lines(finished)).mechanisms, lines(finished)[0]
    counts = dp_sgd(facts["num_units"], facts["num_units"], None, NOISE, 1.0, 1, ZERO_OUT, grid_bits=26)
    contents = Accountant([counts, steps], replaced=True).quick_upper(1e-4)
    assert report["epsilon_replace_one"] == pytest.approx(contents, rel=5e-3)
    assert report["epsilon_replace_one"] > Accountant(steps, replaced=True).quick_upper(1e-4) * 1.02
    assert "the histogram in the ledger" in report["statement"] and "noise of 5 units" in report["statement"]
    assert audited(capsys, finished)[0] == 0
    plan = [
        "account", f"--num_units={facts['num_units']}", "--batch_size=24", "--max_batch_size=64", "--steps=6",
        "--delta=1e-4", "--neighbouring_relation=zero_out", "--json",
    ]  # fmt: skip
    noise = f"--noise_multiplier={facts['noise_multiplier']!r}"
    assert cli.main([*plan, f"--histogram_noise={NOISE}", noise]) == 0
    together = json.loads(capsys.readouterr().out)["epsilon"]
    assert report["epsilon"] == math.ceil(together * 1e4) / 1e4
    assert cli.main([*plan, noise]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] < together - 0.01
    assert cli.main([*plan, f"--histogram_noise={NOISE}", "--epsilon=4"]) == 0
    solved = json.loads(capsys.readouterr().out)["noise_multiplier"]
    assert solved == pytest.approx(facts["noise_multiplier"], rel=1e-4)
    # Where steps cost next to nothing, epsilon is that of the Gaussian mechanism.
    plan = [argument for argument in plan if not argument.startswith(("--max_batch_size", "--steps"))]
    assert cli.main([*plan, "--steps=1", "--noise_multiplier=1e6", "--histogram_noise=0.5"]) == 0
    alone = json.loads(capsys.readouterr().out)["epsilon"]
    assert alone == pytest.approx(gaussian_epsilon(2.0, 1e-4), rel=2e-3) and alone >= gaussian_epsilon(2.0, 1e-4)
    done = train(records, tmp_path / "run", "--histogram_noise=0.3")
    assert done.returncode == 2 and "by itself, and the target is 4" in done.stderr, done.stderr


@pytest.mark.slow  # three trainings
def test_a_histogram_is_released_once_whatever_happens(records, finished, copied, capsys):
    """A crash before its line, one behind it, and a run that goes on: the bits are those of the first time."""
    shutil.rmtree(copied / "checkpoints")
    for name in ("report.json", "report.html", "metrics.jsonl"):
        (copied / name).unlink()
    (copied / "private/metrics.jsonl").unlink()
    whole = (copied / "ledger.jsonl").read_text().splitlines(keepends=True)
    (copied / "ledger.jsonl").write_text(whole[0])
    done = train(records, copied, "--eval_limit=10")
    assert done.returncode == 0, done.stderr
    assert (copied / "ledger.jsonl").read_text().splitlines(keepends=True)[1] == whole[1]
    digests = [[line["parameters_sha256"] for line in lines(run, "checkpoint")] for run in (copied, finished)]
    assert digests[0] == digests[1] and len(lines(copied, "histogram")) == 1
    shutil.rmtree(copied / "checkpoints/6")
    done = train(records, copied)
    assert done.returncode == 0 and "resuming at step 4" in done.stderr, done.stderr
    assert len(lines(copied, "histogram")) == 1 and audited(capsys, copied)[0] == 0


@pytest.mark.slow  # a program of its own is compiled
def test_another_list_is_another_run(records, copied, tmp_path):
    (tmp_path / "fewer.txt").write_text("heart:\nhead:\n")
    shutil.rmtree(copied / "checkpoints/6")
    done = train(records, copied, f"--prompt_histogram={tmp_path / 'fewer.txt'}")
    assert done.returncode == 2 and "the list of prompts differ from its ledger" in done.stderr
    shutil.copy(records / "prompts.txt", tmp_path / "moved.txt")
    done = train(records, copied, f"--prompt_histogram={tmp_path / 'moved.txt'}")
    assert done.returncode == 0, done.stderr


def edited(change):
    def on_chain(records):
        place = next(i for i, record in enumerate(records) if record["kind"] == "histogram")
        change(records, place)
        return records

    return lambda workdir: rewrite_chain(workdir, on_chain)


TAMPERINGS = {
    "less noise": (edited(lambda r, i: r[i].update(noise=1.0, counts=[1.0, 2.0, 3.0])), "mechanism_changed"),
    "other labels": (edited(lambda r, i: r[i].update(labels=["a", "b", "c"])), "mechanism_changed"),
    "a second one": (edited(lambda r, i: r.insert(i, dict(r[i]))), "budget_exceeded"),
    "none": (edited(lambda r, i: r.pop(i)), "ledger_line_removed"),
    "a late one": (edited(lambda r, i: r.insert(i + 3, r.pop(i))), "mechanism_changed"),
    "a count too few": (edited(lambda r, i: r[i].update(counts=[1.0, 2.0])), "ledger_edited"),
    "a count that is a text": (edited(lambda r, i: r[i].update(counts=[1.0, 2.0, "x"])), "ledger_edited"),
    "a count with digits of its own": (edited(lambda r, i: r[i].update(counts=[1.0, 2.0, 0.1234567])), "ledger_edited"),
    "a count without end": (edited(lambda r, i: r[i].update(counts=[1e308, 0.0, -1e308])), "ledger_edited"),
    "a count of more units than there are": (edited(lambda r, i: r[i].update(counts=[1e6, 0.0, 7.0])), "ledger_edited"),
    "an older format": (edited(lambda r, i: r[0].update(format=4)), "ledger_edited"),
    "no noise": (edited(lambda r, i: r[i].update(noise=0.0)), "unparsable"),
    "no labels": (edited(lambda r, i: r[i].pop("labels")), "ledger_edited"),
    "no trace of it": (
        edited(lambda r, i: [r.pop(i), *(r[0].pop(name) for name in ("histogram_sha256", "histogram_noise"))]),
        "config_disagrees",
    ),
    "a raw count beside": (edited(lambda r, i: r[i].update(raw=[1, 2, 3])), "raw_values_public"),
    "one that was not declared": (
        edited(lambda r, i: [r[0].pop(name) for name in ("histogram_sha256", "histogram_noise")]),
        "mechanism_changed",
    ),
    "labels that are a number": (edited(lambda r, i: r[i].update(labels=3)), "ledger_edited"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_an_audit_finds_what_does_not_fit(name, copied, capsys):
    change, kind = TAMPERINGS[name]
    change(copied)
    code, result = audited(capsys, copied)
    assert code == 1 and kind in {finding["kind"] for finding in result["findings"]}


def test_an_edited_count_breaks_the_chain_for_the_audit_and_for_a_corpus(copied, tmp_path, capsys):
    text = (copied / "ledger.jsonl").read_text()
    (line,) = lines(copied, "histogram")
    (copied / "ledger.jsonl").write_text(text.replace(repr(line["counts"][0]), "7.5", 1))
    assert audited(capsys, copied)[0] == 1
    done = runs.call("synthesize", f"--workdir={copied}", f"--out={tmp_path / 'a.jsonl'}")
    assert done.returncode == 2 and "run dpgemma audit" in done.stderr


def test_a_corpus_is_drawn_by_the_released_counts(copied):
    """By the ledger alone: the list and private/ are gone. A count below zero is none."""
    shutil.rmtree(copied / "private")
    counts = [round(count * UNIT) / UNIT for count in (300.5, 100.25, -3.0)]
    edited(lambda records, place: records[place].update(counts=counts))(copied)
    model = models.load(str(copied))
    drawn_by = corpus.counted_prompts(model, as_chat=False)
    assert drawn_by.texts == PROMPTS and drawn_by.weights == (*counts[:2], 0.0) and drawn_by.are_counted
    sampler = Sampler(model.config, model.parameters, model.tokenizer, SynthesisSettings(), drawn_by, packed=False)
    drawn = np.bincount([sampler.prompt_of(number) for number in range(4000)], minlength=3)
    # Six deviations either way: below 1e-8.
    assert drawn[2] == 0 and abs(drawn[0] - 3000) < 6 * math.sqrt(4000 * 0.75 * 0.25)
    report = json.loads((copied / "report.json").read_text())
    told = [card.corpus_card(report, 6, {}, drawn_by_histogram=drawn) for drawn in (True, False)]
    assert ["from the histogram of prompts that the run released" in text for text in told] == [True, False]
    edited(lambda records, place: records[place].update(counts=[-1 / UNIT, -2 / UNIT, 0.0]))(copied)
    with pytest.raises(InputError, match="no noised count"):
        corpus.counted_prompts(model, as_chat=False)


@pytest.mark.slow  # a program of its own is compiled
def test_users_share_their_one_count(records, tmp_path, capsys):
    """Three records of each patient: counts are a third of what records would give."""
    done = train(records, tmp_path / "run", "--privacy_unit=user", "--user_field=patient", "--histogram_noise=3")
    assert done.returncode == 0, done.stderr
    (line,) = lines(tmp_path / "run", "histogram")
    units = lines(tmp_path / "run")[0]["num_units"]
    # A tenth of the records have another prompt, and next to no user has three of these. Six deviations either way.
    assert abs(sum(line["counts"]) - units) < 6 * 3 * 3**0.5 + 5
    assert audited(capsys, tmp_path / "run")[0] == 0


def test_conversations_are_known_by_their_first_turn():
    class Turns(ByteTokenizer):
        """Bytes, and two tokens of markup."""

        markup: typing.ClassVar = {b"<start_of_turn>": 300, b"<end_of_turn>": 301}

        def token_id(self, token):
            return self.markup.get(token.encode())

        def encode(self, text):
            ids = []
            while text:
                found = next((name for name in self.markup if text.startswith(name)), None)
                ids.append(self.markup[found] if found else text[0])
                text = text[len(found or "x") :]
            return np.array(ids, np.int32)

    from dpgemma.data.text import chat

    tokenizer = Turns()
    said = [{"role": "user", "content": "head:"}, {"role": "assistant", "content": "rest."}]
    ids, learned = chat.turns(tokenizer, said)
    source = InMemory({"tokens": ids[None], "scored": learned[None]})
    assert prompts.counted(source, prompts.beginnings(PROMPTS, tokenizer, 64), 3, 5).tolist() == [0, 5, 0]


@pytest.mark.parametrize(
    "content, more, message",
    [
        ("", (), "is empty"),
        ("heart:\nheart:\n", (), "prompt 2 stands there twice"),
        (None, (), "is no file: give a list of prompts"),
        ("\ud800x", (), "is no text in UTF-8"),
        ("heart:\n", ("--histogram_noise=0",), "must lie between 0.01 and 10000 units, got 0: see --histogram_noise"),
        ("x" * 16 + "\n", (), "prompt 1 fills the 16 tokens of a row"),
        (
            "heart:\n",
            (
                "--privacy_unit=user",
                "--user_field=patient",
                "--ownership=public",
                "--user_sampling=example",
                "--holdout_fraction=0",
            ),
            "no share of a count",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(content, more, message, records, tmp_path):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content.encode(errors="surrogatepass"))
    done = train(records, tmp_path / "run", f"--prompt_histogram={tmp_path / 'prompts.txt'}", *more)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_packed_text_and_weights_are_refused(records, text, tmp_path):
    done = train(records, tmp_path / "run", f"--data={text}")
    assert done.returncode == 2 and "packed text answer no prompts" in done.stderr
    (tmp_path / "weights.jsonl").write_text('{"prompt": "heart:", "weight": 2}\n')
    done = train(records, tmp_path / "run", f"--prompt_histogram={tmp_path / 'weights.jsonl'}")
    assert done.returncode == 2 and "has weights, which are to be counted" in done.stderr
    done = train(records, tmp_path / "run", f"--prompt_histogram={records / 'records.jsonl'}")
    assert done.returncode == 2 and "is --data itself: give a public list" in done.stderr
    done = runs.call("train", f"--data={records / 'records.jsonl'}", "--histogram_noise=3")
    assert done.returncode == 2 and "give that too, or neither" in done.stderr


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a", "weight": 1' + "0" * 400 + "}", "line 1: give a JSON object"),
        ('{"prompt": ' + "[" * 100_000, "line 1: give a JSON object"),
        ('{"prompt": "a", "weight": 1e308}\n{"prompt": "b", "weight": 1e308}', "must add up to a number"),
        ('{"prompt": "a", "weight": NaN}', "a number from 0 on"),
        ('{"prompt": "a", "response": "b", "weight": 1}', r"line 1 has other fields \(response\)"),
        ('{"prompt": "\\ud800"}', "prompt 1 has half a character"),
    ],
)
def test_weights_that_are_none_are_refused(line, message, tmp_path):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        prompts.read(tmp_path / "p.jsonl", "prompts")
    (tmp_path / "p.txt").write_bytes("\ufeffheart:\r\nhead\u2028:\n".encode())
    assert prompts.read(tmp_path / "p.txt", "prompts") == (("heart:", "head\u2028:"), None)
