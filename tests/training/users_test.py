"""Runs whose privacy unit is a document or a user, from the records to the report."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy import stats

from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.mechanism import Clip, dp_sgd
from accounting.report import words
from dpgemma.data.batch import collate
from dpgemma.data.limits import Kept, Limits
from dpgemma.data.source import Items
from dpgemma.data.text.pieces import Reading
from dpgemma.data.text.tokenizer import ByteTokenizer
from dpgemma.data.text.users import within_limit
from dpgemma.gemma import decoder
from dpgemma.privacy import clipping
from dpgemma.privacy.clipping import Strategy
from dpgemma.privacy.samplers import PoissonSampler
from tests.data.in_memory import rows_in_memory
from tests.objectives import causal
from tests.training import forgery, runs
from tests.training.step_test import MODEL, flat


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """Of 80 patients, the first of whom owns most of the text."""
    path, rng = tmp_path_factory.mktemp("notes") / "notes.jsonl", np.random.default_rng(0)
    with open(path, "w") as file:
        for number in range(300):
            patient = 0 if number % 2 else int(rng.integers(80))
            text = f"Patient {patient} came with a {rng.choice(['cough', 'burn', 'cold'])} on day {number}. "
            file.write(json.dumps({"seen": {"patient": patient}, "text": text}) + "\n")
    return path


def trained(notes, workdir, **changes):
    units = dict(privacy_unit="user", user_field="seen.patient", rows_per_unit=3)
    return runs.call(*runs.flags(notes, workdir, steps=2, **units | changes))


@pytest.mark.slow
def test_a_report_says_what_holds_for_a_patient(notes, tmp_path):
    patients = {json.loads(line)["seen"]["patient"] for line in notes.read_text().splitlines()}
    done = trained(notes, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    start = json.loads((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()[0])
    assert start["num_units"] + start["held_out_units"] == len(patients)
    facts = dict(rows_per_unit=3, rows_kept="uniform", user_field="seen.patient", records_without_user="refuse")
    assert facts == {name: start[name] for name in facts} and start["privacy_unit"] == "user"
    said = (tmp_path / "run" / "report.json").read_text()
    assert "all records of the training data whose field 'seen.patient' has one value" in said
    assert "at most 3 rows of 32 tokens are used (where there are more, rows chosen at random)" in said
    assert "Somebody whose records carry several values is several units" in said
    # How much was left out is a fact about the data: it goes to private/, and to terminals alone.
    remarks = (tmp_path / "run" / "private" / "remarks.txt").read_text()
    assert "units have more than 3 rows" in remarks and "rows are left out, by `rows_kept`" in remarks
    public = [path for path in (tmp_path / "run").iterdir() if path.is_file()]
    assert not any("left out, by" in path.read_text() for path in public) and "left out, by" not in done.stderr
    assert runs.call("audit", tmp_path / "run").returncode == 0
    again = trained(notes, tmp_path / "run")
    assert again.returncode == 0, again.stderr
    other = trained(notes, tmp_path / "run", rows_per_unit=4)
    assert other.returncode == 2 and "rows_per_unit (3 there, 4 here)" in other.stderr
    edited = json.loads((tmp_path / "run" / "config.json").read_text()) | {"rows_per_unit": 2}
    (tmp_path / "run" / "config.json").write_text(json.dumps(edited))
    found = runs.call("audit", tmp_path / "run")
    assert found.returncode == 1 and "config.json rows_per_unit" in found.stdout


@pytest.mark.slow
def test_rows_that_are_drawn_one_by_one_are_charged_as_a_group(notes, tmp_path, capsys):
    """Epsilon by dp-accounting's mixture of Gaussians, batches by the sampler alone, and ledgers that say otherwise."""
    work = tmp_path / "run"
    done = trained(notes, work, user_sampling="example", noise_multiplier=1.5)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (work / "ledger.jsonl").read_text().splitlines()]
    start, steps = lines[0], [line for line in lines if line["kind"] == "step"]
    units, q, noise = start["num_units"], steps[0]["sampling_probability"], steps[0]["noise_multiplier"]
    assert start["items_per_unit"] == 3 and start["user_sampling"] == "example" and q == 12 / (3 * units)
    step = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        noise, list(range(4)), stats.binom.pmf(range(4), 3, q), value_discretization_interval=1e-4
    )
    report = json.loads((work / "report.json").read_text())
    spent = step.self_compose(len(steps)).get_epsilon_for_delta(start["delta"])
    assert report["epsilon"] == pytest.approx(spent, rel=1e-3) and len(steps) == 2
    assert report["items_per_unit"] == 3 and report["epsilon_replace_one"] > report["epsilon"]
    assert f"from {3 * units} places for rows, 3 for each of {units} units" in report["statement"]
    drawn = [json.loads(line)["units"] for line in (work / "private" / "metrics.jsonl").read_text().splitlines()]
    sampler, key = PoissonSampler(3 * units, q, start["max_batch_size"]), runs.step_secrets(work)["sampling"]
    assert drawn == [len(sampler.draw(key, t)) for t in range(2)]
    assert "of the rows that are drawn hold text" in (work / "private" / "remarks.txt").read_text()
    assert forgery.audited(capsys, work)[0] == 0

    def silent(records):
        start = {name: fact for name, fact in records[0].items() if name not in ("user_sampling", "items_per_unit")}
        return [start, *records[1:]]

    def says(**changes):
        def change(records):
            return [records[0] | changes, *records[1:]]

        return change

    original = (work / "ledger.jsonl").read_text()
    for changes in (
        dict(items_per_unit=1),
        dict(items_per_unit=1, user_sampling="user"),
        dict(items_per_unit=2, rows_per_unit=2),
        dict(user_sampling="user"),
    ):
        forgery.rewrite_chain(work, says(**changes))
        code, found = forgery.audited(capsys, work)
        assert code == 1, (changes, found)
        (work / "ledger.jsonl").write_text(original)
    # A ledger that is silent about how rows were drawn is contradicted by config.json.
    forgery.rewrite_chain(work, silent)
    code, found = forgery.audited(capsys, work)
    assert code == 1 and "config.json user_sampling" in [finding["where"] for finding in found["findings"]], found


def test_records_of_several_users_are_charged_for_each_of_them(tmp_path, capsys):
    """Mail between few people: whom it names is public, and each has at most two letters in all batches."""
    rng, work = np.random.default_rng(5), tmp_path / "run"
    mail = [{"to": [int(i) for i in rng.choice(40, 2, replace=False)], "text": f"letter {n}"} for n in range(90)]
    (tmp_path / "mail.jsonl").write_text("\n".join([*map(json.dumps, mail), "no record"]))
    flags = dict(privacy_unit="user", user_field="to", user_sampling="example", rows_per_unit=2, noise_multiplier=1.5)
    flags |= dict(ownership="public", holdout_fraction=0, model="ladder_20k", skip_bad_records=True)
    done = runs.call(*runs.flags(tmp_path / "mail.jsonl", work, steps=2, **flags))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (work / "ledger.jsonl").read_text().splitlines()]
    start, (first, *_) = lines[0], [line for line in lines if line["kind"] == "step"]
    kept = within_limit([tuple(map(str, letter["to"])) for letter in mail], 2)
    people = len({name for letter in mail for name in letter["to"]})
    assert (start["num_units"], start["shared_items"], start["items_per_unit"]) == (people, len(kept), 2)
    assert first["sampling_probability"] == 12 / len(kept) and len(kept) < 45
    report = json.loads((work / "report.json").read_text())
    alike = dp_sgd(len(kept), 12, start["max_batch_size"], 1.5, 1.0, 2, "zero_out")
    assert report["epsilon"] == pytest.approx(Accountant(alike, group_size=2).upper(1e-4), rel=1e-3)
    assert "whom a record names is public, and not protected" in report["statement"]
    assert f"from {len(kept)} records of {people} units" in report["statement"]
    # What was left out is told in private/ alone; that something may have been, is public.
    assert "1 records cannot be read" in (work / "private" / "remarks.txt").read_text()
    public = "".join(path.read_text() for path in work.iterdir() if path.is_file()) + done.stdout + done.stderr
    assert "cannot be read and" not in public and "records are left out" not in public
    assert start["skip_bad_records"] is True and any("Records left out:" in line for line in report["assumptions"])
    assert forgery.audited(capsys, work)[0] == 0
    for wrong, said in (
        (dict(user_sampling="user"), "--user_sampling=example"),
        (dict(holdout_fraction=0.1), "--holdout_fraction=0"),
        (dict(rows_kept="first"), "drop --rows_kept"),
        (dict(neighbouring_relation="add_or_remove", num_units=50), "--neighbouring_relation=zero_out"),
        (dict(ownership="one"), "give one with a text or a number, or --ownership=public"),
    ):
        refused = runs.call(*runs.flags(tmp_path / "mail.jsonl", tmp_path / "no", steps=2, **flags | wrong))
        assert refused.returncode == 2 and said in refused.stderr, refused.stderr


def test_a_report_names_no_unit_that_its_ledger_does_not_describe():
    declared = dict(
        privacy_unit="user", sequence_length=32, rows_per_unit=3, rows_kept="first", user_field="who",
    )  # fmt: skip
    assert "(where there are more, the first ones)" in words.unit_text(declared)
    for wrong in ({"rows_kept": "some"}, {"privacy_unit": "household"}):
        with pytest.raises(InputError):
            words.unit_text(declared | wrong)
    for missing in ("rows_kept", "rows_per_unit", "user_field"):
        with pytest.raises(InputError, match=missing):
            words.unit_text({name: value for name, value in declared.items() if name != missing})


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(user_field="nobody"), "record 1 of the data has no user in the field 'nobody'"),
        (dict(privacy_unit="document"), "--user_field has no meaning with this --privacy_unit"),
        (dict(privacy_unit="example"), "--rows_per_unit has no meaning with this --privacy_unit"),
        (dict(rows_per_unit=0), "--rows_per_unit must be at least 1"),
        (dict(rows_kept="last"), "--rows_kept"),
        (dict(user_sampling="example", rows_per_unit=300), "--rows_per_unit=300 is more than the 256 rows"),
    ],
)
def test_units_that_do_not_exist_are_refused(notes, tmp_path, changes, said):
    done = trained(notes, tmp_path / "run", **changes)
    assert done.returncode == 2 and said in done.stderr and not (tmp_path / "run").exists()
    without = runs.call(*runs.flags(notes, tmp_path / "run", privacy_unit="user"))
    assert without.returncode == 2 and "give --user_field" in without.stderr


WAYS = [Strategy("example_scan"), Strategy("ghost", 2), Strategy("per_layer", 2), Strategy("vmap", 4)]
OBJECTIVE = causal(MODEL, length=10)


@pytest.mark.parametrize("how", WAYS, ids=lambda how: how.name)
@pytest.mark.parametrize("trials", [12, pytest.param(250, marks=pytest.mark.slow)])
def test_without_a_user_the_sum_differs_by_the_clip_norm_at_most(how, trials, quick_compiles):
    """All records of one user become an empty unit, or are none any more: data sets at random, among them users that
    own nearly everything, texts that are empty, of one token, longer than what is kept, or no UTF-8.
    """
    rng, params, clip = np.random.default_rng(7), decoder.init_parameters(MODEL, jax.random.key(0)), Clip(0.05)

    @jax.jit
    def total(params, batch):
        return clipping.clipped_sum(lambda p, unit: OBJECTIVE.loss(p, {}, unit), params, batch, clip, how).total

    largest = 0.0
    for trial in range(trials):
        texts = [b"", b"x", b"\xff\xfe", b"some words", b"a text of several rows, beyond those that are kept of it"]
        owner = rng.choice(4, 10, p=[0.7, 0.1, 0.1, 0.1])
        records = [{"who": int(user), "text": texts[rng.integers(len(texts))]} for user in owner]
        limits = Limits(int(rng.integers(1, 4)), str(rng.choice(["uniform", "first"])), bytes([trial % 256] * 32))

        def units_of(records, limits=limits):
            return kept(records, limits)

        units = units_of(records)
        whose = int(rng.integers(units.num_units))
        users = list(dict.fromkeys(int(user) for user in owner))
        emptied = [r | {"text": b""} if r["who"] == users[whose] else r for r in records]
        numbers = np.arange(units.num_units)
        whole = flat(total(params, collate(Wide(units), numbers, 8)))
        empty = flat(total(params, collate(Wide(units_of(emptied)), numbers, 8)))
        absent = flat(total(params, collate(Wide(units), np.delete(numbers, whose), 8)))
        for other in (empty, absent):
            difference = np.linalg.norm(whole.astype(np.float64) - other)
            largest = max(largest, difference)
            assert difference <= 0.05 * (1 + 1e-6)
    assert largest > (0.9 if how.name != "per_layer" else 0.01) * 0.05


def kept(records, limits):
    return Kept(rows_in_memory(records, ByteTokenizer(), Reading("user", 10, "text", "who")), limits)


@dataclasses.dataclass
class Wide:
    """Units with places for three rows, so that one program serves all."""

    units: Kept
    max_rows: int = 3

    def __getattr__(self, name):
        return getattr(self.units, name)


@pytest.mark.parametrize("trials", [8, pytest.param(120, marks=pytest.mark.slow)])
def test_without_a_user_each_of_his_drawn_rows_differs_by_the_clip_norm_at_most(trials, quick_compiles):
    """Rows that are drawn one by one: the sum differs by C for each drawn row of the user, and by nothing else."""
    rng, params, clip = np.random.default_rng(8), decoder.init_parameters(MODEL, jax.random.key(0)), Clip(0.05)

    @jax.jit
    def total(params, batch):
        return clipping.clipped_sum(lambda p, unit: OBJECTIVE.loss(p, {}, unit), params, batch, clip).total

    most = 0.0
    for trial in range(trials):
        texts = [b"", b"\xff", b"some words", b"a text of several rows, beyond those that are kept of it"]
        owner = rng.choice(4, 10, p=[0.7, 0.1, 0.1, 0.1])
        records = [{"who": int(user), "text": texts[rng.integers(len(texts))]} for user in owner]
        users = list(dict.fromkeys(int(user) for user in owner))
        whose = int(rng.integers(len(users)))
        emptied = [r | {"text": b""} if r["who"] == users[whose] else r for r in records]
        limits = Limits(3, "uniform", bytes([trial] * 32))
        one, other = (Items(kept(each, limits)) for each in (records, emptied))
        drawn = np.flatnonzero(rng.random(one.num_units) < 0.6)
        difference = np.linalg.norm(
            flat(total(params, collate(one, drawn, 12))).astype(np.float64)
            - flat(total(params, collate(other, drawn, 12)))
        )
        own = int((drawn // 3 == whose).sum())
        assert difference <= 0.05 * own * (1 + 1e-6)
        most = max(most, difference / 0.05)
    assert most > 1.2  # more than one row of a user was there
