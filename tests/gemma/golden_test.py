"""The numerics of every family against stored results of transformers: needs neither torch nor transformers."""

import functools
import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpgemma.gemma import decoder
from dpgemma.gemma.files import config_json as hf_config
from dpgemma.gemma.files import tensor_files, weights
from tests.gemma import families
from tests.gemma.families import FAMILIES, our_logits

FILE = pathlib.Path(__file__).parent / "golden" / "logits.npz"


@functools.lru_cache
def stored():
    with np.load(FILE) as file:
        return dict(file)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_the_stored_ones(name, tmp_path):
    content = json.loads(str(stored()["configs"]))[name]
    config = hf_config.from_hf_config(content)
    shapes, tensors = weights.leaves(decoder.parameter_shapes(config)), {}
    for weight in weights.table(config):
        layers = weights.layers_of(config, weight)
        shape = shapes[weight.path].shape[1:] if layers else shapes[weight.path].shape
        there = weights.file_shape(shape, weight, weights.fan_in(weight, shape))
        for tensor in [weight.name.format(i) for i in layers] or [weight.name]:
            tensors[tensor] = families.tensor(tensor, there)
    save_file(tensors, tmp_path / tensor_files.SINGLE_FILE)
    got = our_logits(config, weights.load(config, tmp_path))[:, -3:]
    np.testing.assert_allclose(got, stored()[name], atol=2e-5, rtol=0)


def test_the_fixture_is_small():
    assert FILE.stat().st_size < 32_000
