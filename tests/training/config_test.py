"""The settings repeat choices of modules that --help must not import: they are the same."""

import dataclasses

from dpgemma.data.text import units
from dpgemma.gemma import decoder
from dpgemma.gemma.blocks import attention
from dpgemma.privacy import book_keeping as ghost
from dpgemma.privacy import clipping
from dpgemma.training import settings as config


def test_choices_are_those_of_the_modules():
    assert config.REMAT_POLICIES == decoder.REMAT_POLICIES
    assert config.ATTENTION == attention.ATTENTION
    assert (units.AUTO, units.SEQUENCE, units.EXAMPLE) == config.PRIVACY_UNITS
    choices = {field.name: field.metadata["choices"] for field in dataclasses.fields(config.Settings)}
    assert choices["clipping"] == (config.AUTO, *clipping.STRATEGIES)
    assert choices["clip_scaling"] == clipping.SCALINGS
    assert choices["clip_thresholds"] == (ghost.UNIFORM, ghost.BY_DIMENSION)
