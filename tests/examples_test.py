"""The examples run, and do what they say."""

import importlib.util
import pathlib

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tried_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"own_loss", "train_and_sample"}


@pytest.mark.slow
def test_a_loss_of_ones_own_is_learned_under_a_budget():
    distance, epsilon = load("own_loss").main()
    assert distance < 0.1 and 1 < epsilon < 5


@pytest.mark.slow
def test_a_run_from_python(tmp_path, capsys):
    text = tmp_path / "notes.txt"
    text.write_text("".join(f"The patient {i} came on day {i * 7}. " for i in range(400)))
    written = load("train_and_sample").main(str(text), str(tmp_path / "run"), steps=3)
    out = capsys.readouterr().out
    assert written.startswith("The ") and "epsilon" in out and "bits_per_byte" in out
