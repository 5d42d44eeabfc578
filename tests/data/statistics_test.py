"""What `dpgemma data stats` says of data, recomputed by hand."""

import json

import numpy as np
import pytest

from accounting.accountant import Accountant
from accounting.mechanism import dp_sgd
from dpgemma.training import statistics
from dpgemma.training.settings import Settings
from tests.training import runs


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """Of 60 patients: patient i has 1 + i // 10 notes, each of one row with its end."""
    path = tmp_path_factory.mktemp("data") / "notes.jsonl"
    lines = [json.dumps({"who": i, "text": f"{i:03d} {n}"}) for i in range(60) for n in range(1 + i // 10)]
    path.write_text("\n".join(lines))
    return path


def test_a_run_of_users_is_described_before_it_begins(notes):
    done = runs.call(
        "data", "stats", notes, "--json", "--privacy_unit=user", "--user_field=who", "--rows_per_unit=3",
        "--sequence_length=6", "--batch_size=10", "--epsilon=6", "--holdout_fraction=0", "--steps=50",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "facts about private data" in done.stderr
    found = json.loads(done.stdout)
    counts = np.repeat(np.arange(1, 7), 10)  # six bytes and an eos for each note: a row and a bit of the next
    rows = -(-(6 * counts) // 6)
    assert found["units"] == 60 and found["rows"] == rows.sum() and found["rows_kept"] == np.minimum(rows, 3).sum()
    assert sum(part["units"] for part in found["rows_per_unit"]) == 60
    assert found["lengths"]["percentiles"] == [6] * 6 and found["lengths"]["longer"] == 0
    mechanism = dp_sgd(60, 10, found["max_batch_size"], found["noise_multiplier"], 1.0, 50, "zero_out")
    assert Accountant(mechanism).upper(1e-5) == pytest.approx(6, rel=1e-3)
    in_step = 10 * np.minimum(rows, 3).sum() / 60
    assert [c["rows_per_unit"] for c in found["choices"]] == [1, 2, 4, 8]
    for c in found["choices"]:
        kept = np.minimum(rows, c["rows_per_unit"]).sum()
        assert c["rows_kept"] == kept and c["rows_in_step"] == pytest.approx(in_step)
        assert c["users_in_step"] == pytest.approx(in_step * 60 / kept)
        k, items = c["rows_per_unit"], 60 * c["rows_per_unit"]
        of_users = dp_sgd(60, c["users_in_step"], None, c["noise_of_users"], 1.0, 50, "zero_out")
        of_rows = dp_sgd(60, in_step / kept * items, None, c["noise_of_rows"], 1.0, 50, "zero_out", items_per_unit=k)
        assert Accountant(of_users).upper(1e-5) == pytest.approx(6, rel=5e-3)
        assert Accountant(of_rows).upper(1e-5) == pytest.approx(6, rel=5e-3)
    one = found["choices"][0]
    assert one["largest_ratio"] == pytest.approx(1, rel=1e-3) and one["preferred"] == "user"


@pytest.mark.parametrize("ratio, preferred", [(1.2, "user"), (0.3, "example"), (0.8, "user, if mean gradients")])
def test_what_is_preferred_follows_from_noise_per_gradient(ratio, preferred):
    choice = statistics.Choice(4, 100, 10.0, 1.0, 40.0, 4 * ratio, 9.0)
    assert choice.largest_ratio == pytest.approx(ratio) and choice.preferred.startswith(preferred)


def test_text_says_what_is_cut_and_left_out(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "a" * 4, "response": "b" * n}) for n in range(1, 21)))
    flags = ("--privacy_unit=example", "--sequence_length=12", "--batch_size=4", "--steps=3", "--holdout_fraction=0")
    done = runs.call("data", "stats", path, *flags)
    assert done.returncode == 0, done.stderr
    assert "20 units (example)" in done.stdout and "13 are longer than a row" in done.stdout
    assert "--sequence_length=24 would keep 95 % of the records whole" in done.stdout
    bad = runs.call("data", "stats", tmp_path / "none.jsonl", *flags)
    assert bad.returncode == 2 and "no file matches" in bad.stderr


def test_counts_of_declared_units_are_taken_as_they_are(notes):
    settings = Settings(
        data=str(notes), privacy_unit="document", sequence_length=6, batch_size=5, steps=2, num_units=500,
        neighbouring_relation="add_or_remove",
    )  # fmt: skip
    found = statistics.of(settings, epsilon_given=False)
    assert found.training_units == 500 and found.plan.mechanism.num_units == 500 and found.choices == ()
