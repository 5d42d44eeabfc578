"""The canaries of a run: what its settings plant, and what its ledger registers of them before the first step."""

import math
import pathlib
from typing import Any

import jax
import numpy as np

from accounting import run_files
from accounting.empirical import protocol as protocol_lib
from accounting.errors import InputError
from dpgemma.choices import GRADIENT, NEW_TOKEN, SYNTHETIC
from dpgemma.data import canaries as canaries_lib
from dpgemma.data.canaries import LEAF, OFFSET, Canaries
from dpgemma.data.text import canaries as texts
from dpgemma.gemma import reference_texts
from dpgemma.objectives.causal import CausalLM
from dpgemma.objectives.probes import Coordinates
from dpgemma.privacy import keystream
from dpgemma.storage import hub
from dpgemma.training.settings import Settings


def made(settings: Settings, objective: CausalLM, secret: bytes) -> Canaries:
    """New canaries of a run.

    Args:
      objective: the run's; it knows tokenizer, length and parameters.
      secret: of the run's hold-out.

    Raises:
      InputError: canaries of this kind cannot be made for this model.
    """
    count, seed, kind = settings.canaries, canaries_lib.seed_of(secret), settings.kind_of_canary
    length, tokenizer, vocab_size = objective.length, objective.tokenizer, objective.model.vocab_size
    if kind == GRADIENT:
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(objective.shapes()[0])]
        try:
            leaves, offsets = canaries_lib.coordinates(sizes, count, seed)
        except ValueError as error:
            raise InputError(f"`canaries`={count} are too many: {error}") from None
        columns = {**texts.without_text(count, length), LEAF: leaves, OFFSET: offsets}
    elif kind == NEW_TOKEN:
        columns = texts.new_tokens(count, length, tokenizer, vocab_size, seed)
    elif kind == SYNTHETIC:
        named = settings.canary_model or settings.init_from
        assert named is not None, "settings refuse this kind without a model"
        sampled = reference_texts.sampled(
            hub.located(named),
            objective.model,
            count,
            length,
            temperature=settings.canary_temperature or 1.0,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            seeds=keystream.uniform_uint64(keystream.derive(seed, "texts"), 0, count) >> np.uint64(32),
        )
        columns = texts.of_texts(sampled, length, tokenizer)
    else:
        columns = texts.random_tokens(count, length, tokenizer, seed)
    return canaries_lib.of_columns(columns, settings.planted_repeats, seed)


def kept(folder: pathlib.Path, secret: bytes) -> Canaries:
    """The canaries of a run that goes on, or is audited.

    Args:
      folder: of the run.
      secret: of its hold-out.

    Raises:
      InputError: they are not there, or damaged.
    """
    path = folder / run_files.CANARIES
    try:
        return Canaries.of_bytes(path.read_bytes(), canaries_lib.seed_of(secret))
    except (OSError, ValueError):
        raise InputError(
            f"{path} is missing or damaged: restore it; without its canaries the run can neither go on nor be measured"
        ) from None


def registered(settings: Settings, canaries: Canaries | None, sampling_probability: float) -> dict[str, Any]:
    """What a start event says of canaries: that there are some and how they are measured, never which; nothing where
    there are none."""
    kind = settings.kind_of_canary
    if canaries is None or kind is None:
        return {}
    return {
        "canaries": canaries.count,
        "canary_kind": kind,
        "canary_repeats": list(settings.planted_repeats),
        "canary_sha256": canaries.digest(),
        "audit_protocol": protocol_lib.of_kind(kind, sampling_probability).facts(),
    }


def coordinates_of(canaries: Canaries | None) -> Coordinates | None:
    """Where gradient canaries move parameters; None for others."""
    if canaries is None or LEAF not in canaries.columns:
        return None
    return Coordinates(canaries.columns[LEAF], canaries.columns[OFFSET])
