"""Two runs on data that differ in one unit, where the second one is given the releases of the first.

Formal guarantee: all that leaves a run is a function of public settings, of chance, and of its releases. So where keys
and releases are equal, everything outside private/ is equal bit for bit: names, sizes and contents of files,
checkpoints and ledger included, and the text of every compiled program with its constants. After Re:cord-play
(arXiv 2602.17454, section 4).
"""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.training.runs import ENVIRONMENT

ORDINARY = dict(
    model="ladder_20k", sequence_length=32, batch_size=24, max_batch_size=48, steps=3, checkpoint_every=1,
    noise_multiplier=1.0, epsilon="inf", mesh="data:1", holdout_fraction=0,
)  # fmt: skip
RECORDS = [{"prompt": f"case {i}: ", "response": "rest and tea", "who": f"p{i // 3}"} for i in range(60)]
LONG = {**RECORDS[7], "prompt": "a prompt that fills the row " * 3}
ODD = {**RECORDS[7], "response": "\x00\N{SNOWMAN} fever"}
CASES = {
    "a record": ({}, ODD),
    "a record in which nothing is learned": ({}, LONG),
    "one record fewer": (dict(neighbouring_relation="add_or_remove", num_units=70), None),
    "a user's record": (dict(privacy_unit="user", user_field="who", rows_per_unit=4, batch_size=16), ODD),
    "a clip norm that adapts": (dict(clip_quantile=0.5), ODD),
    "norms of each layer": (dict(clipping="per_layer"), ODD),
}


# What follows from names that Orbax makes at random: hashes of its files, and hashes of what names these.
_CHANCE = ("hash", "files_sha256", "files")


def replayed(folder, name, records, changes):
    """Trains in a folder that both runs have, one after the other, and moves it to one of its own."""
    here = folder / "here"
    here.mkdir()
    (here / "notes.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = [f"--{setting}={value}" for setting, value in {**ORDINARY, **changes}.items()]
    command = [sys.executable, "-m", "tests.training.replayed", folder / "releases.npz", "run", "programs"]
    done = subprocess.run(
        [*map(str, command), "--data=notes.jsonl", *flags], cwd=here, capture_output=True, text=True, timeout=240,
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return here.rename(folder / name)


def shown(place):
    """Sizes of public files, what stands in them, and the programs: each by name.

    How the arrays of a checkpoint are laid out in Orbax's files follows from the order in which threads write them, so
    these files have no name and no size here: the ledger has a hash of the arrays.
    """
    sizes, contents = {}, {}
    for path in (place / "run").rglob("*"):
        name = str(path.relative_to(place / "run"))
        if path.is_file() and "private" not in path.parts and path.suffix != ".ocdbt" and path.parent.name != "d":
            sizes[name] = path.stat().st_size
            contents[name] = re.sub(rb"[0-9a-f]{64}", b"*", path.read_bytes())
    lines = [json.loads(line) for line in (place / "run" / "ledger.jsonl").read_text().splitlines()]
    contents["ledger.jsonl"] = [{k: v for k, v in line.items() if k not in _CHANCE} for line in lines]
    programs = {path.name: path.read_text() for path in (place / "programs").iterdir()}
    return sizes, contents, programs


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if number == 0 else pytest.mark.slow) for number, name in enumerate(CASES)]
)
def test_what_a_run_shows_follows_from_its_releases(case, tmp_path):
    changes, record = CASES[case]
    first = replayed(tmp_path, "first", RECORDS, changes)
    other = [*RECORDS[:7], *([] if record is None else [record]), *RECORDS[8:]]
    second = replayed(tmp_path, "second", other, changes)
    with np.load(tmp_path / "releases.npz") as a, np.load(second / "run.npz") as b:
        assert set(a) == set(b) and len(a) >= 3
        assert any((a[name] != b[name]).any() for name in a)  # the unit was drawn, and told of itself there alone
    for ours, theirs in zip(shown(first), shown(second), strict=True):
        assert ours.keys() == theirs.keys() and len(ours) > 5
        assert [name for name in ours if ours[name] != theirs[name]] == []
    states = [line["state_sha256"] for line in shown(first)[1]["ledger.jsonl"] if line["kind"] == "checkpoint"]
    assert len(set(states)) == 3  # which are compared above, as parts of the ledgers
