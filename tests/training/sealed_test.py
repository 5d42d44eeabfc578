"""Sealed ledgers: what somebody without the secret key can do to a run's files, and what `dpgemma audit` says of it."""

import hashlib
import hmac
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from accounting.ledger import chain, seals
from dpgemma import Settings, cli
from tests.training.forgery import audited, rewrite_chain, rewrite_report, write_chain
from tests.training.runs import call, flags


@pytest.fixture(scope="module", params=[pytest.param("hmac", marks=pytest.mark.slow), "signature"])
def sealed(request, text, tmp_path_factory):
    """A finished run with an export in its folder; never changed."""
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    done = call(*flags(text, workdir, ledger_seal=request.param, steps=4, model="ladder_20k"))
    assert done.returncode == 0, done.stderr
    assert ("public key" in done.stderr) == (request.param == "signature")
    assert call("export", f"--workdir={workdir}", f"--out={workdir / 'export'}").returncode == 0
    return workdir


@pytest.fixture
def workdir(sealed, tmp_path):
    return pathlib.Path(shutil.copytree(sealed, tmp_path / "elsewhere"))


@pytest.fixture
def key(sealed, tmp_path):
    """A key as an auditor has it from elsewhere: the public one of signatures, else a copy of the secret one."""
    public = records_of(sealed)[0]["seal_key"]
    return public or shutil.copy(sealed / "private/keys.json", tmp_path / "key.json")


def records_of(workdir):
    return chain.read(workdir / "ledger.jsonl")


def is_signed(workdir):
    return records_of(workdir)[0]["seal"] == seals.SIGNED_CHAIN


def kinds(result):
    return {finding["kind"] for finding in result["findings"]}


def test_an_untouched_run_is_clean_with_and_without_its_keys(workdir, key, capsys):
    for arguments in ([], [f"--require_seal={key}"], [f"--require_seal={workdir / 'private/keys.json'}"]):
        code, result = audited(capsys, workdir, *arguments)
        assert code == 0 and result["consistent"], result["findings"]
        assert any("comes with the folder" in notice for notice in result["notices"]) == (not arguments)
    shutil.rmtree(workdir / "private")
    assert audited(capsys, workdir, f"--require_seal={key}")[0] == 0
    code, result = audited(capsys, workdir)
    assert code == 0 and any("--require_seal" in notice for notice in result["notices"])
    page = (workdir / "report.html").read_text()
    assert records_of(workdir)[0]["seal_key"] in page if is_signed(workdir) else "HMAC under a key" in page


def test_a_rewritten_chain_lacks_its_seals(workdir, capsys):
    rewrite_chain(workdir, lambda records: records)
    code, result = audited(capsys, workdir)
    assert code == 1 and "seal_invalid" in kinds(result)


def cut(workdir):
    """Everything after the first checkpoint is taken off, every file fits, and every line is its writer's."""
    lines = (workdir / "ledger.jsonl").read_text().splitlines(keepends=True)
    (last,) = (i for i, r in enumerate(records_of(workdir)) if r["kind"] == "stored" and r["step"] == 2)
    (workdir / "ledger.jsonl").write_text("".join(lines[: last + 1]))
    shutil.rmtree(workdir / "checkpoints/4")
    shutil.rmtree(workdir / "export")
    (workdir / "report.html").unlink()
    (workdir / "private/held_out.jsonl").unlink()
    metrics = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(metrics[:2]))
    (workdir / "report.json").unlink()


def test_a_ledger_that_was_cut_is_found(workdir, key, capsys):
    cut(workdir)
    for arguments in ([], [f"--require_seal={key}"]):
        assert "ledger_cut" in kinds(audited(capsys, workdir, *arguments)[1])
    (workdir / "seal.json").unlink()
    assert any(f["where"] == "seal.json" for f in audited(capsys, workdir)[1]["findings"])


def test_a_closing_record_cannot_be_written_without_the_key(workdir, capsys):
    cut(workdir)
    path, records = workdir / "seal.json", records_of(workdir)
    head = json.loads((workdir / "ledger.jsonl").read_text().splitlines()[-1])["hash"]
    stored = json.loads(path.read_text())
    for forged in ({**stored, "lines": len(records), "head": head}, {"lines": len(records), "head": head}, [], 7):
        path.write_text(json.dumps(forged))
        assert any(
            f["kind"] == "seal_invalid" and f["where"] == "seal.json" for f in audited(capsys, workdir)[1]["findings"]
        )


def as_if_never_sealed(records):
    return [{**records[0], "seal": seals.CHAIN, "seal_key": None, "noise_multiplier": 9.0}, *records[1:]]


def test_seals_have_one_spelling(workdir, key, capsys):
    """What else a file could hold beside a seal that is good, nobody checks."""
    content = (workdir / "seal.json").read_text()
    (workdir / "seal.json").write_text('{"head": "raw loss 3.14159", ' + content[1:])
    _, result = audited(capsys, workdir, f"--require_seal={key}")
    assert [finding["kind"] for finding in result["findings"]] == ["seal_invalid"]
    (workdir / "seal.json").write_text(content)
    field = "mac" if "mac" in json.loads(content) else "signature"
    lines = [json.loads(line) for line in (workdir / "ledger.jsonl").read_text().splitlines()]
    lines[2][field] = lines[2][field][:2].upper() + " " + lines[2][field][2:]
    text = "".join(json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n" for line in lines)
    (workdir / "ledger.jsonl").write_text(text)
    _, result = audited(capsys, workdir, f"--require_seal={key}")
    assert "seal_invalid" in [finding["kind"] for finding in result["findings"]]


def test_a_downgraded_seal_is_found(workdir, key, capsys):
    rewrite_chain(workdir, as_if_never_sealed)
    (workdir / "seal.json").unlink()
    assert "seal_invalid" in kinds(audited(capsys, workdir)[1])  # private/ remembers another seal
    data = workdir / "private/data.json"
    data.write_text(json.dumps({**json.loads(data.read_text()), "seal": seals.CHAIN}))
    found = audited(capsys, workdir)[1]["findings"]  # private/ itself is authenticated
    assert any(f["kind"] == "seal_invalid" and f["where"] == "private/data.json" for f in found)
    shutil.rmtree(workdir / "private")
    assert "seal_missing" in kinds(audited(capsys, workdir, f"--require_seal={key}")[1])


def test_a_public_key_is_nobodys_hmac_key(workdir, key, capsys):
    """Whoever knows the public key could write HMACs under it, or signatures under another key."""
    if not is_signed(workdir):
        pytest.skip("an HMAC has no public key")
    records = [{k: v for k, v in record.items() if k != "n"} for record in records_of(workdir)]
    forged = [{**records[0], "seal": seals.KEYED_CHAIN}, *records[1:]]

    def mac(text):
        return {"mac": hmac.new(bytes.fromhex(key), text.encode(), hashlib.sha256).hexdigest()}

    write_chain(workdir / "ledger.jsonl", forged, mac)
    assert "seal_missing" in kinds(audited(capsys, workdir, f"--require_seal={key}")[1])

    other = Ed25519PrivateKey.generate()
    public = other.public_key().public_bytes_raw().hex()
    forged = [{**records[0], "seal_key": public}, *records[1:]]
    write_chain(workdir / "ledger.jsonl", forged, lambda text: {"signature": other.sign(text.encode()).hex()})
    assert "seal_invalid" in kinds(audited(capsys, workdir, f"--require_seal={key}")[1])
    shutil.rmtree(workdir / "private")
    assert any(public in notice for notice in audited(capsys, workdir)[1]["notices"])


def test_a_report_that_was_written_again_fits_no_sealed_line(workdir, capsys):
    rewrite_report(workdir, lambda content: content.update(num_units=10**6))
    assert "seal_invalid" in kinds(audited(capsys, workdir)[1])


NESTED = "[" * 200_000
SPOILT = {
    "data: no object": ("private/data.json", lambda text: "[[1, 2], [3, 4]]"),
    "data: nested without end": ("private/data.json", lambda text: NESTED),
    "data: a mac that is no text": ("private/data.json", lambda text: json.dumps({**json.loads(text), "mac": 7})),
    "data: a mac beyond ASCII": ("private/data.json", lambda text: json.dumps({**json.loads(text), "mac": "\ud800"})),
    "keys: nested without end": ("private/keys.json", lambda text: NESTED),
    "keys: too long": ("private/keys.json", lambda text: json.dumps({**json.loads(text), "ledger": "ab" * 90})),
    "keys: too short": ("private/keys.json", lambda text: json.dumps({**json.loads(text), "ledger": "ab"})),
    "keys: empty": ("private/keys.json", lambda text: json.dumps({**json.loads(text), "ledger": ""})),
    "keys: a number": ("private/keys.json", lambda text: json.dumps({**json.loads(text), "noise": 5})),
    "seal.json: nested without end": ("seal.json", lambda text: NESTED),
    "seal.json: a surrogate": ("seal.json", lambda text: json.dumps({**json.loads(text), "head": "\ud800"})),
    "seal.json: huge": ("seal.json", lambda text: json.dumps({**json.loads(text), "lines": 10**400})),
    "ledger: hash is a surrogate": (
        "ledger.jsonl", lambda text: re.sub('"hash":"[^"]*"', '"hash":"\\\\ud800"', text, count=1),
    ),
    "ledger: seal is a surrogate": (
        "ledger.jsonl", lambda text: re.sub('"(mac|signature)":"[^"]*"', r'"\1":"\\\\ud800"', text, count=1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_no_file_crashes_the_audit(case, workdir, key, capsys):
    name, spoil = SPOILT[case]
    path = workdir / name
    path.write_text(spoil(path.read_text()))
    for arguments in ([], [f"--require_seal={key}"]):
        code, result = audited(capsys, workdir, *arguments)
        assert code in (0, 1)
        # Keys that are no keys check nothing; everything else is noticed.
        assert code == 1 or name == "private/keys.json", result
        assert not [f for f in result["findings"] if f["kind"] == "key_readable"]


def test_what_is_no_key_is_refused_in_one_sentence(sealed, tmp_path, capsys):
    (tmp_path / "text").write_text("not a key")
    (tmp_path / "other.json").write_text('{"noise": "00"}')
    for wrong in ("zz" * 32, "ab", tmp_path / "nowhere", tmp_path / "text", tmp_path / "other.json", tmp_path):
        assert cli.main(["audit", str(sealed), f"--require_seal={wrong}"]) == 2
        out, err = capsys.readouterr()
        assert not out and len(err.splitlines()) == 1 and "key" in err


def test_a_chain_without_a_key_does_not_pass_where_a_seal_is_required(exported, capsys):
    code, result = audited(capsys, exported, f"--require_seal={'ab' * 32}")
    assert code == 1 and kinds(result) == {"seal_missing"}


def test_a_signed_run_is_checked_without_this_program(sealed, tmp_path):
    """By the script of docs/verifying.md, in a process that has nothing of ours."""
    public = records_of(sealed)[0]["seal_key"]
    if public is None:
        pytest.skip("an HMAC is no signature")
    page = (pathlib.Path(__file__).parents[2] / "docs" / "verifying.md").read_text()
    script = tmp_path / "verify.py"
    script.write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])

    def checked(folder):
        return subprocess.run(
            [sys.executable, "-I", script, folder, public], capture_output=True, text=True, timeout=60, cwd=tmp_path
        )

    done = checked(sealed)
    assert done.returncode == 0 and "the report are signed by" in done.stdout, done.stderr
    for name, old, new in (
        ("ledger.jsonl", '"steps":4', '"steps":5'), ("report.json", '"epsilon"', '"Epsilon"'),
        ("seal.json", '"lines": ', '"lines": 9'),
    ):  # fmt: skip
        edited = pathlib.Path(shutil.copytree(sealed, tmp_path / name))
        text = (edited / name).read_text()
        assert old in text
        (edited / name).write_text(text.replace(old, new, 1))
        assert checked(edited).returncode == 1, name


def test_ed25519_is_another_name_of_a_signature():
    assert Settings(ledger_seal="ed25519") == Settings(ledger_seal="signature")
