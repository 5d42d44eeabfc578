"""The readers that are fuzzed: for each a valid input, and what reads it."""

import functools
import io
import json
import pathlib
from collections.abc import Callable
from typing import Any

Reader = Callable[[pathlib.Path, bytes], Any]

_NOTES = [{"prompt": f"Ada came {i} times. ", "response": "Rest."} for i in range(4)]
_TEXTS = [{"text": f"seen today {i}"} for i in range(4)]


def _jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(_TEXTS), out)
    return out.getvalue()


def _arrow() -> bytes:
    import pyarrow

    out, table = io.BytesIO(), pyarrow.Table.from_pylist(_TEXTS)
    with pyarrow.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def _units(ending: str) -> Reader:
    def read(folder: pathlib.Path, content: bytes) -> None:
        from dpgemma.data.text import units
        from dpgemma.data.text.pieces import Reading
        from dpgemma.data.text.tokenizer import ByteTokenizer

        path = folder / f"data{ending}"
        path.write_bytes(content)
        units.read(str(path), ByteTokenizer(), Reading("auto", 16, "text"), 260)

    return read


def _safetensors() -> bytes:
    import numpy as np
    from safetensors.numpy import save

    return save(
        {"model.norm.weight": np.zeros(8, np.float32), "model.embed_tokens.weight": np.zeros((4, 8), np.float32)}
    )


def _tensors(folder: pathlib.Path, content: bytes) -> None:
    from dpgemma.gemma.files.tensor_files import SINGLE_FILE, TensorFiles

    (folder / SINGLE_FILE).write_bytes(content)
    with TensorFiles(folder) as found:
        for name in found.names:
            found.shape(name), found.dtype(name), found.read(name)


def _index(folder: pathlib.Path, content: bytes) -> None:
    from dpgemma.gemma.files.tensor_files import INDEX_FILE, weight_files

    (folder / INDEX_FILE).write_bytes(content)
    (folder / "a.safetensors").write_bytes(b"")
    for path in weight_files(folder):
        assert path.resolve().parent == folder.resolve(), f"{path} lies elsewhere"


@functools.cache
def _tokenizer_json() -> bytes:
    from dpgemma.data.text.tokenizer import ByteTokenizer

    made, _ = ByteTokenizer().as_fast()
    return made.to_str().encode()


def _tokenizer(folder: pathlib.Path, content: bytes) -> None:
    from dpgemma.data.text import tokenizer

    (folder / tokenizer.JSON_FILE).write_bytes(content)
    found = tokenizer.load(str(folder))
    found.decode(found.encode(b"seen today")[:100])


def _tokenizer_config(folder: pathlib.Path, content: bytes) -> None:
    from dpgemma.data.text import tokenizer

    (folder / tokenizer.JSON_FILE).write_bytes(_tokenizer_json())
    (folder / tokenizer.CONFIG_FILE).write_bytes(content)
    tokenizer.load(str(folder))


@functools.cache
def _sentencepiece() -> bytes:
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["seen today with a cough", "fever and rest"] * 20), model_writer=out, vocab_size=40,
        model_type="bpe", pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=9,
    )  # fmt: skip
    return out.getvalue()


def _tokenizer_model(folder: pathlib.Path, content: bytes) -> None:
    from dpgemma.data.text import tokenizer

    (folder / tokenizer.MODEL_FILE).write_bytes(content)
    tokenizer.load(str(folder / tokenizer.MODEL_FILE))


def _config() -> bytes:
    from dpgemma.gemma.files import config_json
    from dpgemma.gemma.presets import PRESETS

    return json.dumps(config_json.to_hf_config(PRESETS["ladder_20k"], {})).encode()


def _hf_config(folder: pathlib.Path, content: bytes) -> None:
    from dpgemma.gemma.files import config_json

    (folder / config_json.FILE).write_bytes(content)
    config_json.read(folder)
    config_json.special_ids(folder)


@functools.cache
def _ledger() -> bytes:
    """Of a run that took two steps, written by the ledger itself."""
    import tempfile

    from accounting.ledger import chain, events
    from accounting.mechanism import dp_sgd, grid

    m = dp_sgd(
        1000, 100, 200, noise_multiplier=1.0, clip_norm=1.0, steps=2, neighbouring_relation="zero_out",
        grid_bits=grid.LAW_BITS - 4,
    )  # fmt: skip
    facts = {
        "format": events.FORMAT, **m.facts(), "secret_keys": True, "epsilon": 8.0, "delta": 1e-5, "run_id": "0" * 32,
        "privacy_unit": "sequence", "model": "tiny", "architecture": {}, "init_sha256": None, "sequence_length": 16,
        "parameters": 10, "trained_parameters": 10, "seal": "sha256 chain without a key", "seal_key": None,
        "held_out_units": 5, "config_sha256": "0" * 64, "environment": "jax 0; mesh data:1; code 0", "program": "x",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "ledger.jsonl"
        ledger = chain.Ledger.open(path, None)
        ledger.append(events.START, **facts)
        for step in range(2):
            ledger.append_step(step, m.group)
        ledger.append(events.FINISH, step=2)
        ledger.close()
        return path.read_bytes()


def _audited(name: str) -> Reader:
    def read(folder: pathlib.Path, content: bytes) -> None:
        from accounting.audit import audit

        (folder / "ledger.jsonl").write_bytes(_ledger())
        (folder / name).write_bytes(content)
        audit.audit(folder, [])

    return read


def _canaries() -> bytes:
    from dpgemma.data import canaries
    from dpgemma.data.text import canaries as texts
    from dpgemma.data.text.tokenizer import ByteTokenizer

    rows = texts.random_tokens(4, 8, ByteTokenizer(), bytes(32))
    return canaries.of_columns(rows, [1, 2], bytes(32)).as_bytes()


def _kept_canaries(folder: pathlib.Path, content: bytes) -> None:
    from accounting.errors import InputError
    from dpgemma.data.canaries import Canaries

    try:
        Canaries.of_bytes(content, bytes(32)).digest()
    except ValueError as error:
        raise InputError(str(error)) from None


def _prompts(folder: pathlib.Path, content: bytes) -> None:
    from dpgemma.data.text import prompts

    path = folder / "prompts.jsonl"
    path.write_bytes(content)
    prompts.read(path, "prompts")


def _sweep(folder: pathlib.Path, content: bytes) -> None:
    from experiments.sweep import grid

    path = folder / "sweep.toml"
    path.write_bytes(content)
    grid.read(path)


def _flags(folder: pathlib.Path, content: bytes) -> None:
    """One argument a line, of commands that compute little: they end with exit code 0, 1 or 2 and no traceback."""
    from dpgemma import cli

    words = content.decode("utf-8", errors="replace").split("\n")
    code = cli.main(["account", "--steps=3", "--num_units=1000", "--noise_multiplier=1", *words[:5]])
    assert code in (0, 1, 2)


_SWEEP = b'[sweep]\nmodels = ["ladder_20k"]\nnoise_batch_ratios = [1e-3, 1e-2]\nsteps = 10\nbatch_size = 16\n'

TARGETS: dict[str, tuple[Callable[[], bytes], Reader]] = {
    "JSON lines": (lambda: _jsonl(_NOTES), _units(".jsonl")),
    "text": (lambda: "seen today, Zoë — rest.\r\n".encode() * 8, _units(".txt")),
    "CSV": (lambda: b"text,ward\n" + b'"seen, ""today""",3\n' * 4, _units(".csv")),
    "Parquet": (_parquet, _units(".parquet")),
    "Arrow": (_arrow, _units(".arrow")),
    "safetensors": (_safetensors, _tensors),
    "safetensors index": (lambda: b'{"weight_map": {"model.norm.weight": "a.safetensors"}}', _index),
    "tokenizer.json": (_tokenizer_json, _tokenizer),
    "tokenizer_config.json": (lambda: b'{"bos_token": "<bos>", "eos_token": "<eos>"}', _tokenizer_config),
    "tokenizer.model": (_sentencepiece, _tokenizer_model),
    "Hugging Face config.json": (_config, _hf_config),
    "ledger": (_ledger, _audited("ledger.jsonl")),
    "config.json": (lambda: b'{"num_units": 1000, "epsilon": 8.0, "canaries": 0}', _audited("config.json")),
    "report.json": (lambda: b'{"ledger_head": "0", "run_id": "0", "epsilon": 8.0}', _audited("report.json")),
    "metrics.jsonl": (lambda: b'{"step": 0, "epsilon": 1.0, "learning_rate": 0.1}\n', _audited("metrics.jsonl")),
    "canaries": (_canaries, _kept_canaries),
    "prompts": (lambda: _jsonl([{"prompt": "heart:", "weight": 2}, {"prompt": "skin:", "weight": 1}]), _prompts),
    "sweep file": (lambda: _SWEEP, _sweep),
    "flags": (lambda: b"--batch_size=10\n--delta=1e-5\n--json", _flags),
}  # fmt: skip
