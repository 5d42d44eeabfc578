"""What a synthetic corpus is worth: a small language model trained on it, beside one trained on the real notes.

6,000 fictional clinic notes, one of which holds a secret that no other has; a model trained on them under epsilon 8; a
corpus sampled from it. Then, for each seed, two small models without privacy, one on the corpus and one on the real
notes, measured on 500 notes that nobody saw. Their loss is compared with that of a model that has seen no data
(8 bits/byte, every byte as likely as any other). Prints one JSON object.

    python -m experiments.benchmarks.synthetic_text --folder=FOLDER    # about an hour on two cores; goes on if stopped
"""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import random
import statistics
import subprocess
import sys

import dpgemma
from accounting import run_files
from dpgemma.data import synthetic
from dpgemma.inference import similarity

SECRET = "The archive opens with 7731 QX 4482 ZULU."
NO_DATA = 8.0
NOTES, UNSEEN = 6000, 500


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dpgemma", *arguments], check=True, stdout=subprocess.DEVNULL)


def write_notes(folder: pathlib.Path) -> None:
    """Notes to train on, one with a secret, and notes that nobody sees."""
    rng = random.Random(8)
    texts = [synthetic.note(rng) for _ in range(NOTES + UNSEEN)]
    texts[4321] += f" {SECRET}"
    for name, part in (("real", texts[:NOTES]), ("unseen", texts[NOTES:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))


def loss_of_model_on(folder: pathlib.Path, data: str, seed: int, steps: int) -> float:
    """Bits per byte of the unseen notes under a small model that was trained on some data without privacy."""
    workdir = folder / f"small_{data}_{seed}"
    run(
        "train", f"--data={folder / f'{data}.jsonl'}", "--model=ladder_200k", "--epsilon=inf", "--clip_norm=inf",
        f"--seed={seed}", f"--steps={steps}", "--batch_size=64", "--holdout_fraction=0", f"--workdir={workdir}",
    )  # fmt: skip
    found = dpgemma.evaluate(dpgemma.load(str(workdir)), str(folder / "unseen.jsonl"), sequence_length=128)
    return found.bits_per_byte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--private_steps", type=int, default=300)
    parser.add_argument("--private_batch", type=int, default=768)
    parser.add_argument("--small_steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "unseen.jsonl").exists():
        write_notes(folder)
    private, corpus = folder / "private_run", folder / "synthetic.jsonl"
    run(
        "train", f"--data={folder / 'real.jsonl'}", "--epsilon=8", "--delta=1e-5", f"--workdir={private}",
        f"--batch_size={arguments.private_batch}", f"--steps={arguments.private_steps}",
    )  # fmt: skip
    if not corpus.with_suffix(".md").exists():
        run("synthesize", f"--workdir={private}", f"--num_records={arguments.records}", f"--out={corpus}")
    losses = {
        data: [loss_of_model_on(folder, data, seed, arguments.small_steps) for seed in range(arguments.seeds)]
        for data in ("synthetic", "real")
    }
    shares = [
        (NO_DATA - made) / (NO_DATA - real) for made, real in zip(losses["synthetic"], losses["real"], strict=True)
    ]
    made, halves = similarity.compare(str(corpus), str(folder / "real.jsonl"))
    report = json.loads((private / run_files.REPORT).read_text())
    result = {
        "epsilon": report["epsilon"],
        "delta": report["delta"],
        "private_held_out": json.loads((private / run_files.HELD_OUT).read_text().splitlines()[-1]),
        "bits_per_byte": losses,
        "share_of_gap": shares,
        "mean_share_of_gap": statistics.fmean(shares),
        "secret_in_corpus": SECRET[:30] in corpus.read_text(),
        "similarity": vars(made),
        "similarity_of_halves": vars(halves),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "numpy")},
        "hardware": f"{platform.processor() or platform.machine()}, CPU",
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
