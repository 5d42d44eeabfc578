"""Secret orders of very many numbers, and data sets of as many units, none of which are listed anywhere."""

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from accounting.errors import InputError
from dpgemma.data import holdout
from dpgemma.data.permutation import Permutation
from dpgemma.data.random_rows import RandomRows
from dpgemma.data.spec import Column
from dpgemma.training.prepare import prepare
from dpgemma.training.settings import Settings

SPEC = {"x": Column((3,), "int32"), "seen": Column((3,), "bool")}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_every_number_occurs_once(size):
    for key in (bytes(32), b"k" * 32):
        order = Permutation(key, size)(np.arange(size))
        assert sorted(order) == list(range(size))


def test_orders_look_random_and_depend_on_the_key():
    """Of 100,000 neighbours among 12.7e9, places, distances and another key's order: chi-square tests at 1e-7 each."""
    size, count = 12_700_000_000, 100_000
    one, other = (Permutation(key * 32, size)(np.arange(count)) for key in (b"a", b"b"))
    for numbers in (one, other, (one - np.roll(one, 1)) % size, (one - other) % size):
        found = np.bincount((numbers * 100 // size).astype(int), minlength=100)
        assert stats.chisquare(found).pvalue > 1e-7
    assert len(set(one.tolist())) == count
    np.testing.assert_array_equal(Permutation(b"a" * 32, size)(np.array([70_000, 3])), one[[70_000, 3]])


def test_very_many_units_are_divided_without_a_list():
    source = RandomRows(SPEC, 1000, 50)
    training, held = holdout.split(source, b"k" * 32, 0.25, most_listed=999)
    assert (training.num_units, held.num_units) == (750, 250)
    parts = [part.read(np.arange(part.num_units))[0]["x"] for part in (training, held)]
    everything = source.read(np.arange(1000))[0]["x"]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts), axis=0), np.sort(everything, axis=0))
    again, _ = holdout.split(source, b"k" * 32, 0.25, most_listed=999)
    assert again.fingerprint(bytes(32)) == training.fingerprint(bytes(32)) != held.fingerprint(bytes(32))
    np.testing.assert_array_equal(again.read(np.array([7]))[0]["x"], parts[0][[7]])


def test_where_the_number_of_units_is_private_nobody_is_held_out_of_so_many(tmp_path):
    source = RandomRows(SPEC, 1000, 50)
    everyone, nobody = holdout.split(source, b"k" * 32, 0.0, most_listed=999)
    assert everyone is source and nobody.num_units == 0
    settings = Settings(data="random:1e8", num_units=10**9, neighbouring_relation="add_or_remove", epsilon=float("inf"))
    with pytest.raises(InputError, match="give `holdout_fraction`=0"):
        prepare(settings, str(tmp_path / "run"))
    with pytest.raises(InputError, match="has units of one row"):
        prepare(Settings(data="random:1e8", privacy_unit="document"), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_rows_are_computed_from_their_numbers():
    source = RandomRows(SPEC, 10**12, 260)
    rows, owner = source.read(np.array([5, 10**12 - 1, 5]))
    assert rows["x"].dtype == np.int32 and rows["seen"].all() and list(owner) == [0, 1, 2]
    np.testing.assert_array_equal(rows["x"][0], rows["x"][2])
    found = np.bincount(source.read(np.arange(20_000))[0]["x"].ravel(), minlength=260)
    assert found.size == 260 and stats.chisquare(found).pvalue > 1e-7
    assert RandomRows.named("random:12.7e9", SPEC, 5).num_units == 12_700_000_000
    for name in ("random:", "random:0", "random:1.5", "random:many", "random:1e99"):
        with pytest.raises(InputError, match="needs a number of units"):
            RandomRows.named(name, SPEC, 5)


TRAINED = """
import resource, sys
from dpgemma import cli
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_on_more_units_than_any_memory_holds(tmp_path):
    """VaultGemma's number of units, a thousandth of a millionth of them held out, within 8 GiB of addresses."""
    command = [
        "train", "--data=random:12.7e9", "--model=ladder_20k", "--sequence_length=16", "--batch_size=16", "--steps=2",
        "--holdout_fraction=1e-9", "--mesh=data:1", f"--workdir={tmp_path / 'run'}", "--epsilon=inf",
        "--noise_multiplier=1", "--clipping=example_scan", "--microbatch_size=4",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", TRAINED, *command], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["num_units"] == 12_699_999_987 and report["held_out_units"] == 13 and report["steps"] == 2
