"""Forward and backward pass of a 30M-parameter VaultGemma: dpgemma against transformers with torch in eager mode, on
the same weights.

Both sides compute the mean next-token loss of a batch and its gradient in float32. They run in turn within one process;
medians are reported, at the full batch and at each side's best microbatch (gradients of microbatches added up). Prints
one JSON object.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.gemma import decoder
from dpgemma.gemma.config import FULL, GemmaConfig
from dpgemma.gemma.files import config_json as hf_config
from dpgemma.gemma.files import weights
from dpgemma.objectives import cross_entropy as loss
from experiments.benchmarks import peers

torch, transformers = peers.imported("torch"), peers.imported("transformers")

MODEL = GemmaConfig(
    vocab_size=16_384, d_model=448, num_heads=4, num_kv_heads=4, head_dim=112, d_ff=1792, max_length=1024,
    layer_types=(FULL,) * 7,
    window=128, query_scalar=112,
)  # fmt: skip


def dpgemma_step(parameters):
    """step(tokens [B, S + 1], microbatch) -> loss, with the gradient computed."""

    def mean_loss(p, tokens):
        return loss.cross_entropy(
            decoder.hidden_states(MODEL, p, tokens[:, :-1]), p["embedder"]["embedding"], tokens[:, 1:]
        ).mean()

    gradient = jax.jit(jax.value_and_grad(mean_loss))
    add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)

    def step(tokens, microbatch):
        total = None
        for first in range(0, len(tokens), microbatch):
            one = gradient(parameters, tokens[first : first + microbatch])
            total = one if total is None else add(total, one)
        return float(jax.block_until_ready(total)[0]) / (len(tokens) // microbatch)

    return step


def torch_step(model):
    """Forward and backward pass of the model with torch."""

    def step(tokens, microbatch):
        model.zero_grad()
        total = 0.0
        for first in range(0, len(tokens), microbatch):
            part = torch.tensor(tokens[first : first + microbatch], dtype=torch.long)
            logits = model(part[:, :-1], use_cache=False).logits
            mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
            mean.backward()
            total += mean.item()
        return total / (len(tokens) // microbatch)

    return step


def torch_model():
    content = hf_config.to_hf_config(MODEL, {})
    config = transformers.VaultGemmaConfig(**{k: v for k, v in content.items() if k not in ("torch_dtype", "dtype")})
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(torch.float32)


def measure(batch: int, length: int, repetitions: int) -> dict:
    parameters = decoder.init_parameters(MODEL, jax.random.key(0))
    model = torch_model()
    model.load_state_dict(
        {n: torch.tensor(np.array(t)) for n, t in weights.tensors(MODEL, parameters)} | tied(model), strict=True
    )
    steps = {"dpgemma": dpgemma_step(parameters), "transformers_torch": torch_step(model)}
    tokens = np.random.default_rng(0).integers(4, MODEL.vocab_size, (batch, length + 1)).astype(np.int32)
    sizes = [2**i for i in range(batch.bit_length()) if batch % 2**i == 0]
    losses = {name: step(tokens, batch) for name, step in steps.items()}
    assert abs(losses["dpgemma"] - losses["transformers_torch"]) < 1e-4, losses
    seconds = {(name, size): [] for name in steps for size in sizes}
    for repetition in range(repetitions + 1):
        for name, size in seconds:
            start = time.perf_counter()
            steps[name](tokens, size)
            if repetition:  # the first compiles and warms up
                seconds[name, size].append(time.perf_counter() - start)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    full = medians["transformers_torch", batch]
    best = {name: min(sizes, key=lambda size, name=name: medians[name, size]) for name in steps}
    return {
        "parameters": decoder.num_parameters(MODEL),
        "batch": batch,
        "sequence_length": length,
        "time_ratio_full_batch": medians["dpgemma", batch] / full,
        "time_ratio_best_microbatches": medians["dpgemma", best["dpgemma"]]
        / medians["transformers_torch", best["transformers_torch"]],
        "best_microbatch": best,
        "rows": [
            {"name": name, "microbatch": size, "time_ratio": value / full} for (name, size), value in medians.items()
        ],
        "repetitions": repetitions,
    }


def tied(model) -> dict:
    """The head that torch's state holds beside the embedding it is tied to."""
    return {name: value for name, value in model.state_dict().items() if name == "lm_head.weight"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence_length", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="no other output exists; accepted for uniformity")
    arguments = parser.parse_args()
    result = measure(arguments.batch, arguments.sequence_length, arguments.repetitions)
    result["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "flax", "torch", "transformers")}
    result["hardware"] = {
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "torch_threads": torch.get_num_threads(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
