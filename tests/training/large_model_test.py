"""A model of VaultGemma's size on a laptop: loading it, and one private step of adapters."""

import json
import subprocess
import sys

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from dpgemma.gemma import decoder
from dpgemma.gemma.files import config_json as hf_config
from dpgemma.gemma.files import tensor_files, weights
from dpgemma.gemma.presets import PRESETS
from tests.training.runs import ENVIRONMENT

MODEL = PRESETS["vaultgemma_1b"]
SHARD = 500_000_000

# Anonymous memory (the pages of mapped files are not counted), sampled while the weights load.
LOAD = """
import json, pathlib, sys, threading, time
import jax
from dpgemma.gemma.files import config_json as hf_config
from dpgemma.gemma.files import weights
jax.block_until_ready(jax.numpy.ones(8) + 1)

def anonymous():
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))

before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
directory = pathlib.Path(sys.argv[1])
parameters = weights.load(hf_config.read(directory), directory)
done.set()
thread.join()
size = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters))
print(json.dumps({"size": size, "peak": peak[0] - before, "ratio": (peak[0] - before) / size}))
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """1.04 billion random bfloat16 parameters in shards, written tensor by tensor."""
    path = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    shapes = weights.leaves(decoder.parameter_shapes(MODEL))
    shard, places, number = {}, {}, 0

    def flush():
        nonlocal number
        number += 1
        save_file(shard, path / f"model-{number}.safetensors", metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, f"model-{number}.safetensors"))
        shard.clear()

    for weight in weights.table(MODEL):
        layers = weights.layers_of(MODEL, weight)
        shape = shapes[weight.path].shape[1:] if layers else shapes[weight.path].shape
        there = weights.file_shape(shape, weight, weights.fan_in(weight, shape))
        # A long period of random numbers, repeated: drawing a billion would take a minute.
        numbers = np.resize((0.02 * rng.standard_normal(100_003)).astype(bfloat16), there)
        for name in [weight.name.format(i) for i in layers] or [weight.name]:
            shard[name] = numbers
            if sum(a.nbytes for a in shard.values()) > SHARD:
                flush()
    flush()
    (path / tensor_files.INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    content = hf_config.to_hf_config(MODEL, {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}, "bfloat16")
    (path / "config.json").write_text(json.dumps(content))
    return path


@pytest.mark.slow
def test_loading_takes_less_than_one_and_a_half_times_the_models_size(directory):
    assert len(list(directory.glob("*.safetensors"))) > 3
    done = subprocess.run(
        [sys.executable, "-c", LOAD, directory], capture_output=True, text=True, timeout=300, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["size"] == 2 * decoder.num_parameters(MODEL)
    assert measured["ratio"] < 1.5, measured


@pytest.mark.slow
def test_one_private_step_of_adapters_on_a_laptop(directory, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the patient came back with a cough and was seen by the ward " * 40)
    settings = dict(
        init_from=directory, tokenizer="byte", data=text, lora_rank=4, sequence_length=128, batch_size=2, steps=1,
        noise_multiplier=1,
        workdir=tmp_path / "run", mesh="data:1", holdout_fraction=0, remat="block", max_batch_size=6,
    )  # fmt: skip
    command = [sys.executable, "-m", "dpgemma", "train", *(f"--{name}={value}" for name, value in settings.items())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (
        report["steps"] == 1
        and report["finished"]
        and report["trained_parameters"] < 0.01 * decoder.num_parameters(MODEL)
    )
