"""A plain torch module of VaultGemma's shape that Opacus accepts, and its steps without and with per-example clipping.

Opacus refuses transformers' VaultGemma (an embedding with a buffer for its scale, a tied head). This module has the
same blocks (norm, rotary attention, GeGLU) out of torch.nn's own layers, an unscaled embedding and a head of its own:
it has one matrix of vocabulary by width more, whose gradient a tied one would share.
"""

import contextlib
import ctypes
import gc
import pathlib

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import nn

from dpgemma.gemma.config import GemmaConfig

STATUS = pathlib.Path("/proc/self/status")
CLEAR = pathlib.Path("/proc/self/clear_refs")


class Block(nn.Module):
    def __init__(self, config: GemmaConfig):
        super().__init__()
        width, heads, self.head = config.d_model, config.num_heads, config.head_dim

        def norm():
            return nn.RMSNorm(width, eps=config.norm_eps)

        def linear(inputs, outputs):
            return nn.Linear(inputs, outputs, bias=False)

        self.mixer_norm, self.ffw_norm = norm(), norm()
        self.q, self.k, self.v = (
            linear(width, n * self.head) for n in (heads, config.num_kv_heads, config.num_kv_heads)
        )
        self.out = linear(heads * self.head, width)
        self.gate, self.up, self.down = (
            linear(width, config.d_ff),
            linear(width, config.d_ff),
            linear(config.d_ff, width),
        )

    def forward(self, x, cos, sin):
        y = self.mixer_norm(x)

        def split(z):
            return z.unflatten(-1, (-1, self.head)).transpose(1, 2)

        q, k, v = split(self.q(y)), split(self.k(y)), split(self.v(y))
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.ffw_norm(x)
        return x + self.down(nn.functional.gelu(self.gate(y), approximate="tanh") * self.up(y))


def rotated(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Model(nn.Module):
    def __init__(self, config: GemmaConfig, length: int):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in config.layer_types)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        frequency = 10_000.0 ** -(torch.arange(config.head_dim // 2) * 2 / config.head_dim)
        angles = torch.arange(length)[:, None] * frequency
        # Plain attributes: Opacus refuses modules with buffers.
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.lm_head(self.norm(x))


def steps(config: GemmaConfig, length: int, batch: int) -> dict:
    """Returns, for each way, a function that makes step(tokens [B, S + 1]). A step leaves the gradient in the
    parameters; the two ways of Opacus clip each row to norm 1.
    """

    def plain():
        model = Model(config, length)

        def step(tokens):
            model.zero_grad()
            logits = model(tokens[:, :-1].contiguous())
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()

        return step

    def hooks():
        model = GradSampleModule(Model(config, length))
        options = dict(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=batch)
        optimizer = DPOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), **options)

        def step(tokens):
            optimizer.zero_grad()
            logits = model(tokens[:, :-1].contiguous())
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
            losses.view(len(tokens), -1).mean(dim=1).mean().backward()
            optimizer.step()

        return step

    def ghost():
        model = GradSampleModuleFastGradientClipping(Model(config, length), max_grad_norm=1.0, use_ghost_clipping=True)
        options = dict(noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=batch)
        optimizer = DPOptimizerFastGradientClipping(torch.optim.SGD(model.parameters(), lr=0.0), **options)
        criterion = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss())

        def step(tokens):
            optimizer.zero_grad()
            logits = model(tokens[:, :-1].contiguous())
            criterion(logits.flatten(0, 1), tokens[:, 1:].flatten(), shape=logits.shape).backward()
            optimizer.step()

        return step

    return {"torch_non_private": plain, "opacus_hooks": hooks, "opacus_ghost": ghost}


def peak_bytes(step, tokens) -> int | None:
    """How far one step, after a first, raises this process's resident memory; None where the system does not say. Give
    it a process of its own: what other code left behind would be reused."""
    step(tokens)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the allocator keeps for later would hide what the step needs
    try:
        CLEAR.write_text("5")  # resets the peak to what is resident now
        before = _resident("VmRSS")
        step(tokens)
        return _resident("VmHWM") - before
    except OSError:
        return None


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def tokens_of(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.long)
