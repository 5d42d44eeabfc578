"""Writes logits.npz: what transformers computes for the tiny models of tests/gemma/families.py, at the last three
positions.

    python -m tests.gemma.golden.make_logits

The weights are a function of their names, so only the configurations and the results are stored.
"""

import json
import pathlib

import numpy as np
import transformers

from tests.gemma.families import FAMILIES
from tests.gemma.hf_models import directory, torch_logits, torch_model

FILE = pathlib.Path(__file__).with_name("logits.npz")
POSITIONS = 3


def main() -> None:
    arrays = {name: torch_logits(torch_model(name))[:, -POSITIONS:] for name in FAMILIES}
    configs = {name: json.loads((directory(name) / "config.json").read_text()) for name in FAMILIES}
    np.savez_compressed(FILE, configs=json.dumps(configs), transformers=transformers.__version__, **arrays)


if __name__ == "__main__":
    main()
