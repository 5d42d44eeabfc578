"""Six small runs of a source tree, as digests: proof that a change of the code's form changes no bit of what is
computed.

    python -m tests.frozen_runs [--tree=FOLDER] --out=FILE      runs the six and writes their digests
    python -m tests.frozen_runs --compare FILE FILE             exit code 1, and the names, where they differ

Each run is the program itself in a process of its own, with keys that are a function of a counter, and with a constant
in place of the environment's description, which names the source code and would give every tree other noise. A digest
covers the parameters of the last checkpoint and the facts of all step lines of the ledger. Digests of different
processors, or of different versions of jax, may differ; so do those of a tree with another setting or fact, to which
noise is bound as well.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

# Keys that a program of any age draws through `secrets` are these; of the rest only the environment's name is changed.
_PROGRAM = """
import hashlib, itertools, secrets, sys
counter = itertools.count()
secrets.token_bytes = lambda size=32: hashlib.sha256(b"%d" % next(counter)).digest()[:size]
secrets.token_hex = lambda size=32: secrets.token_bytes(size).hex()
from dpgemma.cli import main
from dpgemma.training import environment
environment.description = lambda *_: "frozen"
sys.exit(main(sys.argv[1:]))
"""
_COMMON = dict(
    sequence_length=32, batch_size=12, steps=6, noise_multiplier=1.0, delta=1e-4, checkpoint_every=3, microbatch_size=2
)
RUNS = {
    "tiny": dict(clipping="example_scan", mesh="data:1"),
    "lora": dict(
        clipping="example_scan", mesh="data:1", init_from="base", tokenizer="byte", lora_rank=4, data="records"
    ),
    "ghost": dict(clipping="ghost", mesh="data:1", dtype="bfloat16"),
    "adaptive": dict(clipping="example_scan", mesh="data:1", clip_quantile=0.5, steps=8),
    "recurrent": dict(clipping="ghost", mesh="data:1", init_from="recurrent", tokenizer="byte"),
    "two_devices": dict(clipping="example_scan", mesh="data:2"),
}


def _inputs(folder: pathlib.Path) -> None:
    """Text, records and two Hugging Face directories, all functions of constants."""
    import torch
    import transformers

    from tests.gemma import families

    rng = random.Random(0)
    words = ["fever", "cough", "rest", "Ada", "B12", "ward", "seen", "today"]
    (folder / "text.txt").write_text(" ".join(rng.choice(words) for _ in range(2000)))
    pairs = [
        {"prompt": f"{rng.choice(words)} {i}: ", "response": " ".join(rng.choices(words, k=i % 4 + 1))}
        for i in range(300)
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for name, model_type in (("base", "gemma3"), ("recurrent", "recurrent_gemma")):
        kind, settings = families.FAMILIES[model_type]
        config = transformers.AutoConfig.for_model(kind, **settings | {"vocab_size": 260})
        model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32)
        for key, parameter in model.named_parameters():
            parameter.data = torch.tensor(families.tensor(key, tuple(parameter.shape)))
        model.save_pretrained(folder / name)


def _digest(workdir: pathlib.Path) -> dict:
    records = [json.loads(line) for line in (workdir / "ledger.jsonl").read_text().splitlines()]
    facts = ("step", "sampling_probability", "noise_multiplier", "max_batch_size")
    steps = [[record[name] for name in facts] for record in records if record["kind"] == "step"]
    parameters = [record["parameters_sha256"] for record in records if record["kind"] == "checkpoint"]
    return {"parameters": parameters[-1], "steps": hashlib.sha256(json.dumps(steps).encode()).hexdigest()}


def run(tree: pathlib.Path, names: list[str]) -> dict:
    """Digests of the named runs of a source tree."""
    found = {}
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "PYTHONPATH": str(tree),
        "JAX_PLATFORMS": "cpu",
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        _inputs(folder)
        for name, changes in ((name, RUNS[name]) for name in names):
            data = "records.jsonl" if changes.get("data") == "records" else "text.txt"
            settings = _COMMON | changes | {"data": data, "workdir": f"runs/{name}"}
            flags = [f"--{key}={value}" for key, value in settings.items()]
            subprocess.run([sys.executable, "-c", _PROGRAM, "train", *flags], cwd=folder, env=environment, check=True)
            found[name] = _digest(folder / "runs" / name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS), help="some of the six")
    parser.add_argument("--compare", type=pathlib.Path, nargs=2)
    arguments = parser.parse_args()
    if arguments.compare:
        before, after = (json.loads(path.read_text()) for path in arguments.compare)
        differing = [name for name in RUNS if before.get(name) != after.get(name)]
        print(
            f"{len(RUNS) - len(differing)} of {len(RUNS)} runs are"
            f" equal{': differing ' + ', '.join(differing) if differing else ''}"
        )
        return 1 if differing else 0
    text = json.dumps(run(arguments.tree.resolve(), arguments.runs), indent=1) + "\n"
    arguments.out.write_text(text) if arguments.out else print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
