"""dpgemma sweep --dry_run --chips: what a grid costs on machines that are not at hand."""

import json
import pathlib

import pytest

from dpgemma.gemma import decoder
from dpgemma.gemma.presets import PRESETS
from experiments.sweep import price
from tests.training.runs import call

PUBLISHED_GRID = pathlib.Path(price.__file__).parent.parent / "grids/published.toml"


def test_the_published_grid_is_priced_before_there_are_data(tmp_path):
    arguments = ["sweep", PUBLISHED_GRID, "--dry_run", f"--workdir={tmp_path / 'new'}", "--chips=v5p:4x4x4"]
    said = json.loads(call(*arguments, "--dollars_per_chip_hour=4.2", "--json").stdout)
    assert said["runs"] == said["pending"] == 7 * 19 * 3 and said["flops"] == pytest.approx(3.0e22, rel=0.01)
    assert said["chip_hours"] == pytest.approx(said["flops"] / (459e12 * 0.4) / 3600) and said["chips"] == 64
    assert said["hours"] == pytest.approx(said["chip_hours"] / 64)
    assert said["dollars"] == pytest.approx(4.2 * said["chip_hours"])
    sizes = {name: decoder.num_parameters(PRESETS[name]) for name in said["flops_by_model"]}
    assert said["flops_by_model"] == {name: 57 * 6.0 * m * 1024 * 512 * 128_000 for name, m in sizes.items()}
    assert not (tmp_path / "new").exists()
    text = price.Price(**said | {"mfu": 0.5, "dollars": None}).text()
    assert "reach 50% of their peak (--mfu), which nobody has measured" in text and "dollars" not in text


@pytest.mark.parametrize(
    "given, message",
    [
        (["--chips=v5p:4x4x4"], "--chips prices a sweep that is not run: give --dry_run too"),
        (["--dry_run", "--mfu=0.5"], "--mfu belongs to --chips"),
        (["--dry_run", "--chips=v5p:4x4x4", "--mfu=1.5"], "--mfu must lie between 0 and 1"),
        (["--dry_run", "--chips=cpu:2"], "--chips names accelerators"),
        (["--dry_run", "--chips=abacus:2"], "--chips=abacus:2 names an unknown chip"),
        (["--dry_run", "--chips=v5p:4x4x4", "--dollars_per_chip_hour=-1"], "must not be negative"),
    ],
)
def test_prices_that_make_no_sense_are_refused(given, message):
    done = call("sweep", PUBLISHED_GRID, *given)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
