"""Hostile input: some seconds of fuzzing, and the inputs that once did harm."""

import json
import subprocess
import sys

import pyarrow
import pytest

from accounting.errors import InputError
from dpgemma import cli
from dpgemma.data.text import tokenizer, units
from dpgemma.data.text.pieces import Reading
from dpgemma.data.text.tokenizer import ByteTokenizer
from dpgemma.gemma.files import tensor_files
from experiments.sweep import grid


def read(path):
    return units.read(str(path), ByteTokenizer(), Reading("auto", 16, "text"), 260)


def test_some_seconds_of_fuzzing_find_nothing(tmp_path):
    command = [sys.executable, "-m", "tests.fuzzing", "--seconds=12", f"--kept={tmp_path / 'kept'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.strip().splitlines()
    assert len(lines) >= 19 and all(int(line.split()[-2]) >= 5 for line in lines), done.stdout


def test_offsets_that_lead_out_of_an_arrow_file_are_not_followed(tmp_path):
    path = tmp_path / "data.arrow"
    table = pyarrow.table({"text": ["seen today"] * 4})
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    content = path.read_bytes()
    offsets = b"".join((10 * i).to_bytes(4, "little") for i in range(5))
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:4] + (1 << 29).to_bytes(4, "little") + offsets[8:]))
    with pytest.raises(InputError, match="is damaged"):
        read(path)


def test_a_length_in_an_arrow_stream_is_not_believed(tmp_path):
    """A file of some bytes that announces two gibibytes of metadata."""
    path = tmp_path / "data.csv"
    path.write_bytes(b"\xff" * 4 + (2**31 - 1).to_bytes(4, "little") + b"text\n" * 10)
    code = f"import resource, sys; sys.path.insert(0, '.'); from tests import fuzzing_test as t\n\
import pyarrow.ipc, pyarrow.parquet\n\
here = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n\
resource.setrlimit(resource.RLIMIT_AS, (here + 2**29, here + 2**29))\n\
try:\n    t.read({str(path)!r})\nexcept t.InputError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert "is damaged" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/hostname", "folder/a.safetensors"])
def test_an_index_of_weights_leads_out_of_no_folder(name, tmp_path):
    (tmp_path / "elsewhere.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    (folder / "folder").mkdir(parents=True)
    (folder / "folder" / "a.safetensors").write_bytes(b"")
    (folder / tensor_files.INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(InputError, match="no file of its folder"):
        tensor_files.weight_files(folder)


def test_deeply_nested_files_are_refused(tmp_path):
    deep = "[" * 100_000
    (tmp_path / tensor_files.INDEX_FILE).write_text(deep)
    (tmp_path / "sweep.toml").write_text(f"[sweep]\nx = {deep[:3000]}")
    (tmp_path / tokenizer.JSON_FILE).write_text(deep)
    for attempt in (
        lambda: tensor_files.weight_files(tmp_path),
        lambda: grid.read(tmp_path / "sweep.toml"),
        lambda: tokenizer.load(str(tmp_path)),
    ):
        with pytest.raises(InputError):
            attempt()


def test_a_flag_of_any_length_is_refused_at_once(capsys):
    assert cli.main(["account", "--" + "[" * 5000, "--steps=1"]) == 2
    assert "there is no flag" in capsys.readouterr().err
