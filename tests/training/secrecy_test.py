"""Where a run's keys come from, and what of keys and private values it says or writes where others can see it."""

import base64
import dataclasses
import json
import random
import re
import stat
import subprocess
import sys

import numpy as np
import pytest

from dpgemma.privacy.keys import Keys
from dpgemma.training.prepare import prepare, prepare_with_public_keys
from dpgemma.training.settings import Settings
from tests.training.runs import (
    ENVIRONMENT,
    SETTINGS,
    call,
    flags,
)


def test_pitfall_15_keys_are_private_and_appear_nowhere_else(finished):
    workdir, done = finished
    private = workdir / "private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert stat.S_IMODE((private / "keys.json").stat().st_mode) == 0o600
    secrets = json.loads((private / "keys.json").read_text())
    assert set(secrets) == {field.name for field in dataclasses.fields(Keys)} | {"check"}
    assert all(len(bytes.fromhex(value)) == 32 for value in secrets.values()) and len(set(secrets.values())) == 6
    needles = [
        form for value in secrets.values() for form in (value.encode(), value.upper().encode(), bytes.fromhex(value))
    ]
    for path in workdir.rglob("*"):
        if path.is_file() and private not in path.parents:
            content = path.read_bytes()
            assert not any(needle in content for needle in needles), path
    assert not any(value in done.stdout + done.stderr for value in secrets.values())


def written_forms(key):
    """Ways in which pieces of a key could be written: any 8 of its bytes are enough to be found."""
    text = key.hex()
    yield from (text[i : i + 16].encode() for i in range(0, len(text) - 15, 2))
    yield from (text[i : i + 16].upper().encode() for i in range(0, len(text) - 15, 2))
    yield from (key[i : i + 8] for i in range(len(key) - 7))
    for encode in (base64.b64encode, base64.urlsafe_b64encode, base64.b32encode):
        for skip in range(5):
            whole = encode(key[skip:]).rstrip(b"=")
            yield from (whole[i : i + 12] for i in range(0, len(whole) - 12, 4))
    for order in ("big", "little"):
        yield str(int.from_bytes(key, order))[:20].encode()
        yield from (str(int.from_bytes(key[i : i + 8], order)).encode() for i in range(0, len(key), 8))
    yield from (sep.join(map(str, key[:6])).encode() for sep in (",", ", ", " "))
    yield key[::-1].hex()[:16].encode()


def test_pitfall_15_no_piece_of_a_key_stands_in_any_public_file_in_any_form(finished):
    workdir, done = finished
    secrets = [bytes.fromhex(value) for value in json.loads((workdir / "private/keys.json").read_text()).values()]
    forms = {form for key in secrets for form in written_forms(key) if len(form) >= 8}
    for path in workdir.rglob("*"):
        if path.is_file() and workdir / "private" not in path.parents:
            content = path.read_bytes()
            assert not [form for form in forms if form in content], path
    assert not [form for form in forms if form in (done.stdout + done.stderr).encode()]


# Everything that a run says where standard error is no terminal.
SAID = re.compile(
    r"tiny in \S+: \d+ units, batch 12 \(at most 48\), 6 steps, epsilon [\d.]+ at delta 0\.0001, noise multiplier 1,"
    r" clip norm 1"
    r"|246,624 of 246,624 parameters are trained, in rows of 32, with learning rate 0\.008 after 10 steps of warm-up,"
    r" in float32 \(by the model's size: --learning_rate, --warmup_steps, --dtype, --remat\)"
    r"|a unit is one row of 32 consecutive tokens of the packed training text"
    r"|expected, data not counted: [\d.]+ GiB of memory of [\d.]+; roughly \d+ (seconds|minutes) for [1-6] steps;"
    r" 3 checkpoints of 3 MiB are kept"
    r"|--clipping=example_scan --microbatch_size=1 \(the run is too short for a trial to pay\)"
    r"|(\r? *\d+%\|.{10}\| step \d/6 \[[\d:]+<[\d:?]+\](, epsilon [\d.]+/[\d.]+, \d+ units/s, \d+ tokens/s)?)+"
    r"|ledger head [0-9a-f]{64}: deposit it elsewhere, and nobody can rewrite this run's ledger unnoticed"
)


def test_all_that_is_said_is_known_and_public(finished):
    _, done = finished
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert lines and not [line for line in lines if not SAID.fullmatch(line)]


def test_pitfall_24_no_raw_value_outside_private(finished):
    workdir, done = finished
    public = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [set(m) for m in public] == [{"step", "epsilon", "learning_rate"}] * 6
    private = [json.loads(line) for line in (workdir / "private/metrics.jsonl").read_text().splitlines()]
    assert all(m["loss"] > 0 and m["units"] >= 0 for m in private)
    assert "loss" not in done.stderr  # standard error is no terminal here


def test_pitfall_15_keys_come_from_the_operating_system(text, tmp_path):
    """Two runs of the same settings in the same process share no key, whatever the seeds of Python, NumPy and jax."""
    found = []
    for name in "ab":
        random.seed(0)
        np.random.seed(0)
        trainer = prepare(Settings(data=str(text), **SETTINGS, steps=1), str(tmp_path / name))
        trainer.run.unlock()
        found.append(json.loads((tmp_path / name / "private/keys.json").read_text()))
        ledger = json.loads((tmp_path / name / "ledger.jsonl").read_text().splitlines()[0])
        assert ledger["secret_keys"] is True and ledger["format"] == 6
    assert len({*found[0].values(), *found[1].values()}) == 12


def test_pitfall_15_keys_are_the_operating_systems_randomness_and_nothing_else():
    """Where the operating system gives only zeros, so are all keys: no clock and no other number has a part in them."""
    code = (
        "import os; os.urandom = lambda n: bytes(n)\n"
        "from dpgemma.privacy.keys import Keys; k = Keys.generate()\n"
        "assert {k.sampling, k.noise, k.holdout, k.fingerprint, k.ledger} == {bytes(32)}"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_pitfall_15_a_run_with_public_keys_claims_nothing_anywhere(text, tmp_path):
    workdir = tmp_path / "run"
    keys = Keys(*(bytes([i]) * 32 for i in range(5)))
    settings = dict(data=str(text), steps=6, epsilon=float("inf"), **SETTINGS)
    with pytest.raises(ValueError, match="needs secret keys"):
        prepare_with_public_keys(Settings(**settings | {"epsilon": 8.0}), keys, str(workdir))
    assert not workdir.exists()
    trainer = prepare_with_public_keys(Settings(**settings), keys, str(workdir))
    trainer.train()
    trainer.run.unlock()
    report = json.loads((workdir / "report.json").read_text())
    assert (
        report["epsilon"] == "inf"
        and "public seed" in report["statement"]
        and any("public seed" in d for d in report["deviations"])
    )
    assert call("audit", workdir).returncode == 0
    # Its noise can be computed by anyone, so it must not count as noise where runs are added up, nor after it went on.
    for again in range(2):
        composed = call("account", f"--compose={workdir}")
        assert composed.returncode == 2 and "public seed" in composed.stderr and not composed.stdout
        if not again:
            assert call(*flags(text, workdir, epsilon="inf", checkpoint_every=40)).returncode == 0
