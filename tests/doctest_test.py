"""The examples in docstrings run, and every public name has one."""

import doctest
import importlib
import pathlib

import pytest

import dpgemma

ROOT = pathlib.Path(dpgemma.__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("accounting", "dpgemma", "experiments")
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text()
)


# Examples that train.
SLOW = ("dpgemma.training.trainer",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODULES]
)
def test_examples_of_a_module(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize("name", dpgemma.__all__)
def test_a_public_name_has_a_docstring_with_an_example(name):
    value = getattr(dpgemma, name)
    found = doctest.DocTestFinder().find(value, name, module=importlib.import_module(value.__module__))
    assert value.__doc__ and any(test.examples for test in found)
