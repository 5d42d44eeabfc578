"""The values of each flag stand in one place, which the flag and whoever implements it share."""

import ast
import dataclasses
import pathlib

import pytest

from accounting import mechanism
from accounting.errors import InputError
from accounting.mechanism import clip
from dpgemma import choices
from dpgemma.training.settings import Settings

ROOT = pathlib.Path(choices.__file__).parents[1]
HOME = {ROOT / "dpgemma/choices.py", ROOT / "accounting/mechanism/clip.py", ROOT / "accounting/mechanism/sampling.py"}


def all_choices():
    found = [value for value in vars(choices).values() if isinstance(value, tuple)]
    return [*found, clip.SCALINGS, mechanism.RELATIONS, mechanism.SAMPLERS]


def test_every_flag_takes_its_choices_from_there():
    fields = [field for field in dataclasses.fields(Settings) if field.metadata["choices"]]
    assert len(fields) >= 11
    for field in fields:
        assert any(field.metadata["choices"] is known for known in all_choices()), field.name


def test_no_other_module_spells_them_out():
    spelt = {tuple(sorted(known)) for known in all_choices() if len(known) > 1}
    for folder in ("accounting", "dpgemma", "experiments"):
        for path in (ROOT / folder).rglob("*.py"):
            if path in HOME:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
                    values = [item.value for item in node.elts if isinstance(item, ast.Constant)]
                    if len(values) == len(node.elts) and all(isinstance(value, str) for value in values):
                        assert tuple(sorted(values)) not in spelt, (path, values)


@pytest.mark.parametrize(
    "name, value",
    [("learning_rate", 1e300), ("weight_decay", float("inf")), ("weight_decay", 1e300), ("clip_norm", 1e39)],
)
def test_numbers_that_float32_does_not_hold_are_refused(name, value):
    with pytest.raises(InputError, match=f"`{name}` must be at most 1e\\+30"):
        Settings(**{name: value})
    assert Settings(clip_norm=float("inf"), epsilon=float("inf")).clip_norm == float("inf")
