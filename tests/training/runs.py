"""Runs of the real program in processes of their own, for tests."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np

from accounting.ledger import chain as ledger_lib
from dpgemma import cli

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
COMMAND = [sys.executable, "-m", "dpgemma"]


def last_of_each(arguments):
    """The arguments with the last value of every flag: the program refuses a flag that is given twice."""
    found = {}
    for number, argument in enumerate(map(str, arguments)):
        name, has_value, _ = argument.partition("=")
        name = name if name.startswith("--") and has_value and name != "--prompt" else f"{number} {argument}"
        found.pop(name, None)
        found[name] = argument
    return list(found.values())


def run(*arguments, timeout=240, **options):
    return subprocess.run(
        [*COMMAND, *last_of_each(arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
        **options,
    )


def call(*arguments):
    """The same within this process, where what was imported and compiled before need not be again."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(last_of_each(arguments))
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


OPERATIONAL = (
    "checkpoint_every", "keep_checkpoints", "eval_data", "eval_every", "eval_limit", "public_eval_data",
)  # fmt: skip

# The cap is given because a planned one follows the number of units, which is random: every run would compile a program
# of its own. Two devices, so that this process and others can go on with each other's runs.
SETTINGS = dict(sequence_length=32, batch_size=12, max_batch_size=48, noise_multiplier=1.0, delta=1e-4, mesh="data:2")


def flags(text, workdir, steps=6, **changes):
    settings = dict(data=text, workdir=workdir, steps=steps, checkpoint_every=2, **SETTINGS)
    return ["train", *(f"--{name}={value}" for name, value in {**settings, **changes}.items())]


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start_together(count, *arguments, command=(*COMMAND,), changes=None, variables=None, **options):
    """As many processes of one run, of the program or of another command, started and not waited for.

    Args:
      changes: by the number of a process, arguments that it alone has behind the others.
      variables: by the number of a process, variables of the environment that it alone has.
    """
    address = f"localhost:{free_port()}"
    several = [f"--coordinator={address}", f"--num_processes={count}"]
    return [
        subprocess.Popen(
            [*command, *last_of_each([*arguments, *several, f"--process_id={i}", *(changes or {}).get(i, [])])],
            env=ENVIRONMENT | (variables or {}).get(i, {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            **options,
        )
        for i in range(count)
    ]  # fmt: skip


def ended(processes, seconds=240):
    """(exit code, output, errors) of each of the processes; those that have not ended by then are killed."""
    deadline = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=max(1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (process.returncode, re.sub(r"\[Gloo\].*\n", "", output), errors)  # what XLA's library of sums prints there
        for process, (output, errors) in zip(processes, outputs, strict=True)
    ]


def copy_of(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished[0], tmp_path / "run"))


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


def step_secrets(workdir, places=None):
    """What batches and noise of a run are made from, by name: its secret keys under its circumstances, written out.

    Args:
      places: of the step; by default of a run that never left its first one.
    """
    records = [json.loads(line) for line in (workdir / "ledger.jsonl").read_text().splitlines()]
    config, keys, data = (
        json.loads((workdir / name).read_text()) for name in ("config.json", "private/keys.json", "private/data.json")
    )
    free = (*OPERATIONAL, "data", "init_from", "tokenizer", "prompt_histogram", "canary_model", "mesh")
    circumstances = {
        "data": data["fingerprint"],
        "places": [[0, records[0]["environment"]]] if places is None else places,
        "settings": {k: v for k, v in config.items() if k not in free},
        "start": {k: v for k, v in records[0].items() if k not in ("n", "hash", "environment")},
    }
    text = json.dumps(circumstances, sort_keys=True, separators=(",", ":")).encode()
    return {
        name: hashlib.blake2b(text, key=bytes.fromhex(keys[name]), digest_size=32, person=b"dpgemma bound").digest()
        for name in ("sampling", "noise")
    }


def final_parameters(workdir):
    from dpgemma.training import checkpoint

    step, parameters, meta = checkpoint.latest_parameters(workdir / "checkpoints")
    return step, parameters, meta


def step_records(workdir):
    return [
        {k: v for k, v in r.items() if k != "n"}
        for r in ledger_lib.read(workdir / "ledger.jsonl")
        if r["kind"] == "step"
    ]


def assert_same_bits(a, b):
    import jax

    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint32), np.asarray(y).view(np.uint32))
