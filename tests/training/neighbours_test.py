"""Two runs on neighbouring data, under the same keys: what anyone but the operator sees of them has the same form."""

import json
import re
import secrets

from dpgemma.commands.terminal import Terminal
from dpgemma.privacy.keys import Keys
from dpgemma.training.prepare import prepare_with_public_keys
from dpgemma.training.settings import Settings

KEYS = Keys(*(secrets.token_bytes(32) for _ in range(5)))
# Hashes, names at random and the progress bar, which follows the clock, differ between any two runs.
_CHANCE = re.compile(r"[0-9a-f]{32,}|(?:\r[^\r\n]*)+|run_[abc]|roughly \d+ \w+")


def trained(folder, name, records):
    """Names of the files outside private/, and those that are text without what chance decides."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = data.rename(folder / "notes.jsonl")
    settings = Settings(
        model="ladder_20k", data=str(data), sequence_length=32, batch_size=8, max_batch_size=32, steps=3,
        noise_multiplier=1.0, epsilon=float("inf"), mesh="data:1", checkpoint_every=1,
    )  # fmt: skip
    place = folder / f"run_{name}"
    trainer = prepare_with_public_keys(settings, KEYS, str(place), observers=[Terminal()])
    trainer.train()
    trainer.run.unlock()
    names = (str(path.relative_to(place)) for path in place.rglob("*") if "private" not in path.parts)
    # Names that Orbax makes at random count as one another.
    files = {re.sub(r"(ocdbt\.process_\d+/d/|/d/)[0-9a-f]+", r"\1*", name) for name in names}
    texts = {n: (place / n).read_text() for n in ("config.json", "ledger.jsonl", "report.json", "metrics.jsonl")}
    return files, {n: _CHANCE.sub("*", text) for n, text in texts.items()}, place


def test_nothing_but_chance_and_noise_differs_outside_private(tmp_path, capsys):
    records = [{"prompt": f"case {i}: ", "response": "rest and tea"} for i in range(60)]
    seen = []
    for name, prompt in (
        ("a", records[7]["prompt"]),
        ("b", "a prompt that fills the row " * 3),
        ("c", "\x00\N{SNOWMAN}"),
    ):
        records[7] = {**records[7], "prompt": prompt}
        capsys.readouterr()
        files, texts, place = trained(tmp_path, name, records)
        printed = capsys.readouterr()
        seen.append((files, texts, _CHANCE.sub("*", printed.err), printed.out))
        assert ("nothing to learn" in (place / "private/remarks.txt").read_text()) == (name == "b")
    assert seen[0] == seen[1] == seen[2] and "nothing to learn" not in seen[0][2]


def test_the_last_record_with_something_to_learn_does_not_decide_whether_training_begins(tmp_path, capsys):
    """And where nothing that was held out can be measured, its file says null, which is JSON."""
    records = [{"prompt": f"a prompt that fills the row, {i} " * 2, "response": "rest"} for i in range(60)]
    seen = []
    for name, prompt in (("a", "x"), ("b", records[7]["prompt"])):
        records[7] = {**records[7], "prompt": prompt}
        capsys.readouterr()
        files, texts, place = trained(tmp_path, name, records)
        seen.append((files, texts, _CHANCE.sub("*", capsys.readouterr().err)))
        remark = (place / "private/remarks.txt").read_text()
        assert remark.startswith({"a": "some rows", "b": "all rows"}[name])
    assert seen[0] == seen[1] and "records" not in seen[0][2]
    assert "NaN" not in (place / "private/held_out.jsonl").read_text()
    assert json.loads((place / "private/held_out.jsonl").read_text()) == {
        "step": 3, "bits_per_byte": None, "nats_per_token": None, "token_accuracy": None
    }  # fmt: skip
