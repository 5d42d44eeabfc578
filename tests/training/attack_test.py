"""Runs with canaries: what is planted, registered, observed, attacked, reported and audited."""

import dataclasses
import json
import math
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.ledger import chain
from accounting.mechanism import ZERO_OUT, dp_sgd, grid
from dpgemma import Settings, cli
from dpgemma.data import canaries as canaries_lib
from dpgemma.data import holdout
from dpgemma.data.batch import Unit
from dpgemma.data.source import InMemory
from dpgemma.data.text import tokenizer_files, units
from dpgemma.data.text.pieces import Reading
from dpgemma.data.text.rows import SCORED, TOKENS
from dpgemma.data.text.tokenizer import ByteTokenizer
from dpgemma.gemma.files import config_json, weights
from dpgemma.inference import attacking
from dpgemma.privacy import keystream
from dpgemma.privacy.keys import Keys
from dpgemma.privacy.samplers import PoissonSampler
from dpgemma.training import attack, auditing, canaries, observed, prepare
from dpgemma.training import run as run_lib
from dpgemma.training.trainer import Trainer
from tests.training import runs
from tests.training.forgery import audited, edit, rewrite_chain
from tests.training.recomputed_test import noise_of

LENGTH = 16
COMMON = dict(model="ladder_20k", sequence_length=LENGTH, delta=1e-5, mesh="data:2", checkpoint_every=4)
WHITE_BOX = dict(
    canaries=1000, canary_kind="gradient", epsilon=8, batch_size=400, max_batch_size=560, steps=8, clipping="auto"
)
TEXTS = dict(canaries=60, canary_kind="random_tokens", epsilon=8, batch_size=60, max_batch_size=120, steps=8)


def train(text, workdir, **settings):
    flags = [f"--{name}={value}" for name, value in {**COMMON, **settings}.items()]
    return runs.call("train", f"--data={text}", f"--workdir={workdir}", *flags)


@pytest.fixture(scope="module")
def white_box(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("white_box") / "run"
    done = train(text, workdir, **WHITE_BOX)
    assert done.returncode == 0, done.stderr
    # What gradient canaries show is for the terminal of an operator, which this is not, and for private/.
    assert "shows epsilon" not in done.stderr + done.stdout and "shows epsilon" in (workdir / "private/log").read_text()
    for name in ("canaries.npz", "canaries_observed.npy"):
        assert (workdir / "private" / name).stat().st_mode & 0o077 == 0, name
    return workdir


@pytest.fixture(scope="module")
def black_box(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("black_box") / "run"
    done = train(text, workdir, **TEXTS, canary_repeats="1,4")
    assert done.returncode == 0, done.stderr
    return workdir


def records_of(workdir):
    return chain.read(workdir / "ledger.jsonl")


def planted_of(workdir):
    return canaries.kept(workdir, Keys.load(workdir / "private" / "keys.json").holdout)


def test_a_white_box_attack_on_a_real_run_finds_much_and_no_more_than_was_proved(white_box, capsys):
    code, result = audited(capsys, white_box, "--empirical")
    assert code == 0 and result["findings"] == []
    assert 2 <= result["empirical"]["lower_bound"] <= 8 and not result["empirical"]["contradicts"]
    kept = json.loads((white_box / "private" / "attack.json").read_text())
    assert kept["lower_bound"] == result["empirical"]["lower_bound"]
    page = (white_box / "private" / "attack.html").read_text()
    assert f"ε is at least {kept['lower_bound']:g}" in page and "<svg" in page


def test_nothing_that_was_observed_leaves_private(white_box):
    """Scores of gradient canaries follow from the noise: beside released sums they would tell of other units."""
    record = next(record for record in records_of(white_box) if record["kind"] == "attack")
    assert set(record) == {"n", "kind", "step", "kept_sha256"}
    kept = json.loads((white_box / "private" / "attack.json").read_text())
    report = json.loads((white_box / "report.json").read_text())
    assert report["attack"] is None and report["canaries"] == 1000
    page = (white_box / "report.html").read_text()
    assert "Attack on canaries" in page and "audit WORKDIR --empirical" in page
    rates = str(kept["roc"]["log_likelihood_ratio"]["true_positive_rate"][30])
    public = [path.read_text() for path in white_box.iterdir() if path.is_file()]
    assert len(public) >= 5
    for number in (rates, str(kept["lower_bound"])):
        assert len(number) < 4 or not any(f">{number}<" in text or f":{number}," in text for text in public)


def test_the_report_of_text_canaries_shows_what_the_attack_showed(black_box):
    recorded = next(record["assessment"] for record in records_of(black_box) if record["kind"] == "attack")
    report = json.loads((black_box / "report.json").read_text())
    assert report["attack"]["lower_bound"] == recorded["lower_bound"] and "roc" not in report["attack"]
    page = (black_box / "report.html").read_text()
    assert f"ε is at least {recorded['lower_bound']:g}" in page and page.count("<svg") == 3


def test_what_is_observed_is_the_canaries_draws_and_the_noise(white_box):
    """Recomputed from keys by other code: which canaries a step drew, and the noise at their places."""
    start = records_of(white_box)[0]
    planted, secrets = planted_of(white_box), runs.step_secrets(white_box)
    seen = observed.read(white_box / "private" / "canaries_observed.npy", 8, 1000)
    own = start["num_units"] - 1000
    sigma, bits = start["noise_multiplier"], start["grid_bits"]
    objective = prepare.objective_of(Settings(**COMMON, data="synthetic"))
    shapes = [leaf.shape for leaf in jax.tree.leaves(objective.shapes()[0])]
    sampler = PoissonSampler(start["num_units"], 400 / start["num_units"], start["max_batch_size"])
    leaves, offsets = planted.columns[canaries_lib.LEAF], planted.columns[canaries_lib.OFFSET]
    for step in (0, 3):
        drawn = np.isin(np.arange(own, start["num_units"]), sampler.draw(secrets["sampling"], step))
        noise = np.zeros(1000)
        for number, shape in enumerate(shapes):
            here = leaves == number
            noise[here] = noise_of(secrets["noise"], step, number, shape, bits).ravel()[offsets[here]]
        # In units of the clip norm; a canary's gradient is cut off to whole steps of the grid.
        expected = (drawn & planted.included) + noise / grid.sensitivity_steps(bits, sigma)
        np.testing.assert_allclose(seen[step], expected, atol=3e-5)


def test_scores_do_not_know_the_coins(black_box):
    """They are computed from contents alone: with other coins they are the same. Those of gradient canaries are
    computed from what was observed, without the canaries."""
    planted = planted_of(black_box)
    other = dataclasses.replace(planted, included=~planted.included)
    objective = prepare.objective_of(Settings(**COMMON, data="synthetic"))
    start, trained = objective.init(0), objective.init(1)
    mine, theirs = (attack.text_scores(objective, trained, start, x) for x in (planted, other))
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name])


def test_the_score_of_texts_is_their_likelihood(black_box):
    planted, objective = planted_of(black_box), prepare.objective_of(Settings(**COMMON, data="synthetic"))
    (trained, frozen), start = objective.init(3), objective.init(0)
    found = attack.text_scores(objective, (trained, frozen), start, planted)
    for i in (0, 7):
        unit = Unit({name: jnp.array(planted.columns[name][i : i + 1]) for name in (TOKENS, SCORED)}, jnp.ones(1, bool))
        after = LENGTH * float(objective.loss(trained, frozen, unit))
        before = LENGTH * float(objective.loss(*start, unit))
        assert found["loss"][i] == pytest.approx(-after, rel=1e-4)
        assert found["loss_against_start"][i] == pytest.approx(before - after, abs=1e-3 * before)


@pytest.mark.slow
def test_a_reference_model_gives_a_score_and_bounds_of_their_own(black_box, white_box, tmp_path, capsys):
    """Against the model that the run started from, written as a directory, the ROC is that of the registered score."""
    objective, directory = prepare.objective_of(Settings(**COMMON, data="synthetic")), tmp_path / "start"
    directory.mkdir()
    weights.save(objective.model, objective.init(0)[0], directory)
    content = config_json.to_hf_config(objective.model, {"bos_token_id": objective.tokenizer.bos})
    (directory / "config.json").write_text(json.dumps(content))
    tokenizer_files.write(objective.tokenizer, directory, objective.model.max_length)
    against = attacking.attacked_against(black_box, str(directory))
    known = attacking.attacked(black_box)
    assert against.roc["loss_against_reference"] == known.roc["loss_against_start"]
    assert "which no protocol named before the run" in auditing.audit(black_box, attack=known, against=against).text()
    assert len(against.bounds) == 2 and not against.contradicts
    code, result = audited(capsys, black_box, "--empirical", f"--against={directory}")
    assert code == 0 and len(result["empirical"]["bounds"]) == 4
    assert result["empirical"]["against"]["bounds"][0]["score"] == "loss_against_reference"
    copy, exported = shutil.copytree(black_box, tmp_path / "copy"), tmp_path / "exported"
    assert runs.call("export", f"--workdir={copy}", f"--out={exported}").returncode == 0
    for workdir, flags, message in (
        (black_box, ["--empirical", f"--against={black_box}"], "was trained with canaries"),
        (black_box, ["--empirical", f"--against={exported}"], "was trained with canaries"),
        (white_box, ["--empirical", f"--against={directory}"], "no text that a model could be asked for"),
        (black_box, ["--empirical", "--against=/nowhere"], "neither a run's folder nor"),
        (black_box, [f"--against={directory}"], "give --empirical or --memorisation"),
    ):
        assert cli.main(["audit", str(workdir), *flags]) == 2
        assert message in capsys.readouterr().err


def test_a_reference_that_learned_canaries_anywhere_is_refused(black_box, tmp_path):
    """By its own settings, by its model card, and by those of whatever it started from."""

    def run_from(start, name, canaries=0):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "ledger.jsonl").write_text("")
        (folder / "config.json").write_text(json.dumps({"canaries": canaries, "init_from": start}))
        return str(folder)

    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "README.md").write_text("deviations: 60 canaries were planted")
    planted = run_from(None, "planted", canaries=9)
    for start in (str(exported), planted):
        for depth in range(3):
            with pytest.raises(InputError, match="was trained with canaries"):
                attacking.attacked_against(black_box, start)
            start = run_from(start, f"{depth} from {pathlib.Path(start).name}"[:60])


def test_a_reference_that_shows_too_much_is_as_loud_as_the_registered_attack(black_box):
    known = attacking.attacked(black_box)
    loud = dataclasses.replace(known, bounds=tuple(dataclasses.replace(b, contradicts=True) for b in known.bounds))
    found = auditing.audit(black_box, attack=known, against=loud).findings
    assert [finding.kind for finding in found] == ["guarantee_contradicted"]


def test_planting_changes_nothing_but_the_rows_added(text, tmp_path):
    """Neither epsilon nor a bit: a run whose data hold the same rows, planted by hand, ends with equal parameters."""
    keys = Keys.generate()
    settings = Settings(
        data=str(text), canaries=60, canary_repeats="1,2", batch_size=60, steps=4, noise_multiplier=1.0,
        epsilon=math.inf, max_batch_size=120, **COMMON,
    )  # fmt: skip
    with prepare.prepare_with_public_keys(settings, keys, str(tmp_path / "planted")) as trainer:
        trainer.train()
    planted = planted_of(tmp_path / "planted")
    everything = units.read(str(text), ByteTokenizer(), Reading("sequence", LENGTH, "text"), 260).units
    kept = np.flatnonzero(~holdout.held_out(keys.holdout, everything.num_units, 0.1))
    rows, _ = everything.read(kept)
    copies = np.repeat(np.arange(60), planted.repeats)
    there = planted.included[copies]
    by_hand = InMemory({
        TOKENS: np.concatenate([rows[TOKENS], planted.columns[TOKENS][copies]]),
        SCORED: np.concatenate([rows[SCORED], planted.columns[SCORED][copies] & there[:, None]]),
    })  # fmt: skip
    plan, objective = trainer.plan, prepare.objective_of(settings)
    facts = prepare.start_event(
        plan, {**settings.as_dict(), "privacy_unit": "sequence"}, objective, 0, secret_keys=False
    )
    config = json.loads((tmp_path / "planted" / "config.json").read_text())
    facts |= {"environment": records_of(tmp_path / "planted")[0]["environment"], "program": "by hand"}
    other = run_lib.create(tmp_path / "by_hand", config, keys, "none", facts)
    with Trainer(plan, objective, by_hand, other) as by_hand_trainer:
        by_hand_trainer.train()
    assert plan.mechanism.num_units == by_hand.num_units
    runs.assert_same_bits(*(runs.final_parameters(tmp_path / name)[1] for name in ("planted", "by_hand")))


def test_epsilon_is_that_of_as_many_units(black_box):
    report = json.loads((black_box / "report.json").read_text())
    start = records_of(black_box)[0]
    m = dp_sgd(
        start["num_units"], 60, 120, noise_multiplier=start["noise_multiplier"], clip_norm=1.0, steps=8,
        neighbouring_relation=ZERO_OUT, grid_bits=start["grid_bits"],
    )  # fmt: skip
    assert report["epsilon"] == pytest.approx(Accountant(m).upper(1e-5), abs=1e-3)
    assert planted_of(black_box).units == 30 * 1 + 30 * 4


def test_the_ledger_registers_everything_before_the_first_step_and_no_coin(black_box):
    first = records_of(black_box)[0]
    planted = planted_of(black_box)
    assert first["canary_sha256"] == planted.digest()
    assert (first["canaries"], first["canary_kind"], first["canary_repeats"]) == (60, "random_tokens", [1, 4])
    assert first["audit_protocol"]["bounds"] == ["one_run", "one_run_curve"]
    public = (black_box / "ledger.jsonl").read_text() + (black_box / "config.json").read_text()
    assert "included" not in json.dumps(first) and planted.columns[TOKENS][0].tobytes().hex() not in public
    report = json.loads((black_box / "report.json").read_text())
    assert report["attack"]["canaries"] == 30 and any("model for audits" in line for line in report["deviations"])
    assert report["divisor"] == 60 and report["program"].startswith("dpgemma ") and "jax " in report["libraries"]
    assert first["environment"].endswith(report["program_sha256"])


def registered_elsewhere(workdir):
    shutil.rmtree(workdir / "private")


def drop(*names):
    def change(records):
        for name in names:
            del records[0][name]
        return [record for record in records if record["kind"] != "attack"]

    return change


FACTS = ("canaries", "canary_kind", "canary_repeats", "canary_sha256", "audit_protocol")


def without_a_trace(workdir):
    """Ledger and config.json as of a run without canaries, under a whole chain."""
    rewrite_chain(workdir, drop(*FACTS))
    edit(workdir / "config.json", '"canaries": 60', '"canaries": 0')


def raised(records):
    for record in records:
        if record["kind"] == "attack":
            record["assessment"]["lower_bound"] = record["assessment"]["bounds"][0]["epsilon"] = 3.25
    return records


def raised_alone(records):
    for record in records:
        if record["kind"] == "attack":
            record["assessment"]["lower_bound"] = 9.0
    return records


def with_protocol(**changes):
    def change(records):
        records[0]["audit_protocol"] |= changes
        return records

    return change


def with_other_coins(workdir):
    """Chosen by an operator who has the keys: bound in ledger and private/ as the program would."""
    planted = planted_of(workdir)
    chosen = dataclasses.replace(planted, included=np.arange(planted.count) % 2 == 0)
    (workdir / "private" / "canaries.npz").write_bytes(chosen.as_bytes())
    edit(workdir / "private" / "data.json", planted.digest(), chosen.digest())

    def change(records):
        records[0]["canary_sha256"] = chosen.digest()
        return records

    rewrite_chain(workdir, change)


def with_another_text(workdir):
    """One token of one canary; coins and keys are those of the run."""
    planted = planted_of(workdir)
    columns = {name: column.copy() for name, column in planted.columns.items()}
    columns["tokens"][3].reshape(-1)[2] ^= 1
    (workdir / "private" / "canaries.npz").write_bytes(dataclasses.replace(planted, columns=columns).as_bytes())


TAMPERED = {
    "the text of a canary": (with_another_text, {"canaries_disagree"}),
    "the facts of the canaries": (lambda w: rewrite_chain(w, drop(*FACTS)), {"config_disagrees", "canaries_disagree"}),
    "one of the facts": (lambda w: rewrite_chain(w, drop("canary_sha256")), {"ledger_edited"}),
    "all that is public": (without_a_trace, {"canaries_disagree"}),
    "the line of the attack": (
        lambda w: rewrite_chain(w, lambda records: [r for r in records if r["kind"] != "attack"]),
        {"ledger_line_removed"},
    ),
    "a second attack": (
        lambda w: rewrite_chain(w, lambda rs: [x for r in rs for x in ([r, r] if r["kind"] == "attack" else [r])]),
        {"ledger_line_repeated"},
    ),
    "the lower bound": (lambda w: rewrite_chain(w, raised), {"report_disagrees"}),
    "the lower bound alone": (lambda w: rewrite_chain(w, raised_alone), {"ledger_edited"}),
    "another protocol": (lambda w: rewrite_chain(w, with_protocol(significance=1e-300)), {"ledger_edited"}),
    "bounds that do not hold for texts": (
        lambda w: rewrite_chain(w, with_protocol(bounds=["thresholds"])), {"ledger_edited"},
    ),
    "no bounds at all": (lambda w: rewrite_chain(w, with_protocol(bounds=[])), {"ledger_edited"}),
    "coins that are not those of the keys": (with_other_coins, {"canaries_disagree"}),
    "the file of the canaries": (lambda w: (w / "private" / "canaries.npz").unlink(), {"missing_file"}),
    "its content": (lambda w: (w / "private" / "canaries.npz").write_bytes(b"PK"), {"canaries_disagree"}),
    "other canaries": (
        lambda w: (w / "private" / "canaries.npz").write_bytes(
            canaries_lib.of_columns(planted_of(w).columns, [1], bytes(32)).as_bytes()
        ),
        {"canaries_disagree"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TAMPERED)
def test_an_audit_notices_canaries_that_were_tampered_with(what, black_box, tmp_path, capsys):
    workdir = shutil.copytree(black_box, tmp_path / "run")
    change, kinds = TAMPERED[what]
    change(workdir)
    code, result = audited(capsys, workdir)
    assert code == 1 and kinds <= {finding["kind"] for finding in result["findings"]}, result["findings"]


@pytest.mark.slow
def test_an_attack_that_shows_other_figures_than_were_kept_is_a_finding(white_box, tmp_path, capsys):
    workdir = shutil.copytree(white_box, tmp_path / "run")
    path = workdir / "private" / "attack.json"
    kept = json.loads(path.read_text())
    for bound in kept["bounds"]:
        bound["epsilon"] = 0.0
    kept["lower_bound"] = 0.0
    path.write_text(json.dumps(kept))
    code, result = audited(capsys, workdir)
    assert code == 1 and {finding["kind"] for finding in result["findings"]} == {"attack_disagrees"}
    code, result = audited(capsys, workdir, "--empirical")
    assert code == 1 and sum(finding["kind"] == "attack_disagrees" for finding in result["findings"]) >= 2
    for content in ("[]", '{"bounds": 3, "contradicts": true}', '{"bounds": [], "roc": {}}'):
        path.write_text(content)
        code, result = audited(capsys, workdir)
        assert code == 1 and {finding["kind"] for finding in result["findings"]} == {"attack_disagrees"}
    path.unlink()
    code, result = audited(capsys, workdir)
    assert code == 1 and result["findings"][0]["kind"] == "missing_file"


@pytest.mark.slow
def test_observations_that_are_lost_are_told_and_found(white_box, text, tmp_path, capsys):
    """Whoever drops them, to have no result, has a finding instead."""
    workdir = tmp_path / "run"
    few = {**WHITE_BOX, "canaries": 20, "steps": 4, "checkpoint_every": 2}
    settings = Settings(data=str(text), **{**COMMON, **few})
    with prepare.prepare(settings, str(workdir), epsilon_given=True) as trainer:
        asked = iter([False, False, True])
        assert trainer.train(lambda: next(asked)) is None
    (workdir / "private" / "canaries_observed.npy").unlink()
    done = train(text, workdir, **few)
    assert done.returncode == 0 and "nothing can be said of the canaries" in done.stderr
    code, result = audited(capsys, workdir)
    assert code == 1 and {finding["kind"] for finding in result["findings"]} == {"attack_disagrees"}
    assert cli.main(["audit", str(workdir), "--empirical"]) == 2
    assert "nothing can be said of the canaries" in capsys.readouterr().err


def test_a_lower_bound_above_the_upper_one_is_loud(white_box, tmp_path, capsys):
    """As if the program's noise had been too small: the observations of canaries that were drawn are scaled up."""
    workdir = shutil.copytree(white_box, tmp_path / "run")
    planted = planted_of(workdir)
    path = workdir / "private" / "canaries_observed.npy"
    np.save(path, np.load(path) / 4 + planted.included.astype(np.float32) * 0.5)
    code = cli.main(["audit", str(workdir), "--empirical"])
    text = capsys.readouterr().out
    assert code == 1 and "guarantee_contradicted" in text and "AN ATTACK ON THE CANARIES SHOWS EPSILON" in text
    assert "release nothing" in text


@pytest.mark.slow
def test_an_interrupted_run_has_the_same_canaries_and_the_same_result(text, tmp_path):
    """Stopped and gone on with: canaries, observations and lower bounds come from what is kept."""
    workdir = tmp_path / "run"
    settings = Settings(data=str(text), **COMMON, **WHITE_BOX)
    trainer = prepare.prepare(settings, str(workdir), epsilon_given=True)
    asked = iter([False] * 3 + [True])
    with trainer:
        assert trainer.train(lambda: next(asked)) is None
    before = planted_of(workdir).digest()
    first = np.load(workdir / "private" / "canaries_observed.npy")
    assert np.isnan(first[3:]).all() and not np.isnan(first[:3]).any()
    done = train(text, workdir, **WHITE_BOX)
    assert done.returncode == 0, done.stderr
    after = np.load(workdir / "private" / "canaries_observed.npy")
    assert planted_of(workdir).digest() == before and not np.isnan(after).any()
    np.testing.assert_array_equal(after[:3], first[:3])
    assert attacking.attacked(workdir).epsilon >= 1


def test_a_run_without_its_canaries_does_not_go_on(text, tmp_path):
    workdir = tmp_path / "run"
    with prepare.prepare(Settings(data=str(text), **COMMON, **TEXTS), str(workdir), epsilon_given=True) as trainer:
        assert trainer.train(lambda: True) is None
    (workdir / "private" / "canaries.npz").unlink()
    done = train(text, workdir, **TEXTS)
    assert done.returncode == 2 and "canaries.npz is missing or damaged" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_likelihood_ratio_is_that_of_the_subsampled_gaussian():
    """Against the densities written out."""
    y = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    q, sigma = 0.3, 0.7
    density = lambda x, mean: np.exp(-((x - mean) ** 2) / (2 * sigma**2))  # noqa: E731
    wanted = np.log(((1 - q) * density(y, 0) + q * density(y, 1)) / density(y, 0)).sum(axis=0)
    np.testing.assert_allclose(attack.likelihood_ratio(y, q, sigma), wanted, rtol=1e-5)


def test_the_key_of_the_canaries_is_no_other_key(white_box):
    keys = Keys.load(white_box / "private" / "keys.json")
    seed = canaries_lib.seed_of(keys.holdout)
    others = [bytes.fromhex(key) for key in keys.as_hex().values()]
    others += [keystream.derive(keys.holdout, "hold-out")]
    assert seed not in others and seed.hex() not in (white_box / "ledger.jsonl").read_text()
