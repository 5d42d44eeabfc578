"""Noise, steps and batches for a chosen risk: against riskcal, against closed forms, and never beyond the risk."""

import json
import warnings

import numpy as np
import pytest
from scipy import special, stats

from accounting import risk
from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.mechanism import dp_sgd
from accounting.report import tables
from accounting.risk import Risk
from dpgemma import cli

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from riskcal.calibration import dpsgd as riskcal

DELTA = 1e-5


def mechanism(sigma=1.0, q=0.02, steps=500):
    return dp_sgd(10_000, 10_000 * q, None, noise_multiplier=sigma, clip_norm=1.0, steps=steps)


CASES = [
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            ("advantage:0.3", 0.1, 50),
            ("advantage:0.2", 0.02, 500),
            ("advantage:0.05", 0.002, 10_000),
            ("advantage:0.5", 0.1, 1000),
            ("detection:0.1@0.01", 0.02, 500),
            ("detection:0.5@0.1", 0.002, 10_000),
            ("detection:0.9@0.05", 0.2, 200),
            ("inference:0.6@0.5", 0.02, 500),
            ("inference:0.1@0.02", 0.005, 4000),
        ]
    ),
]


@pytest.mark.parametrize(("text", "q", "steps"), CASES)
def test_noise_agrees_with_riskcal(text, q, steps):
    wanted = Risk.of_text(text)
    found = risk.solved(mechanism(q=q, steps=steps), "noise_multiplier", wanted, DELTA).noise_multiplier
    # Where it looks: its loss distributions of far less noise take minutes.
    between = {"noise_min": 0.6 * found, "noise_max": 3 * found}
    if wanted.at is None:
        theirs = riskcal.find_noise_multiplier_for_advantage(wanted.most, q, steps, **between)
    else:
        theirs = riskcal.find_noise_multiplier_for_err_rates(wanted.at, 1 - wanted.most, q, steps, **between)
    assert found == pytest.approx(theirs, rel=0.01)


def test_a_gaussian_mechanism_has_the_risk_of_its_closed_form():
    """One step without sampling: advantage 2 Phi(mu/2) - 1, detection Phi(Phi^-1(alpha) + mu), with mu = 1 / sigma."""
    accountant = Accountant(mechanism(sigma=0.8, q=1.0, steps=1))
    assert risk.reached(Risk("advantage", 0.9), accountant, DELTA) == pytest.approx(
        2 * special.ndtr(1 / 1.6) - 1, rel=1e-3
    )
    for alpha in (0.01, 0.3):
        wanted = special.ndtr(special.ndtri(alpha) + 1 / 0.8)
        assert risk.reached(Risk("detection", 0.9, alpha), accountant, DELTA) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("quantity", ["steps", "batch_size", "num_units"])
def test_a_solved_mechanism_has_no_more_than_the_risk(quantity):
    wanted = Risk.of_text("advantage:0.15")
    found = risk.solved(mechanism(), quantity, wanted, DELTA)
    assert risk.reached(wanted, Accountant(found), DELTA) <= 0.15
    worse = {
        "steps": {"steps": found.steps + 1},
        "batch_size": {"expected_batch_size": found.expected_batch_size + 1},
        "num_units": {"num_units": round(found.num_units * 0.998)},
    }[quantity]
    assert risk.reached(wanted, Accountant(found.replace(**worse)), DELTA) > 0.15


def test_no_guess_of_an_attribute_is_right_more_often_than_is_said():
    """A Gaussian mechanism on an attribute of four values, attacked by the best guess: simulated, at 1e-7."""
    sigma, prior, runs = 0.9, 0.4, 200_000
    rng = np.random.default_rng(0)
    shares = [prior, 0.3, 0.2, 0.1]
    values = rng.choice(4, runs, p=shares)
    places = np.array([-1.0, 1.0, 0.3, -0.3])  # of norm 1 at most; without the unit the mean is 0
    seen = places[values] + sigma * rng.normal(size=runs)
    scores = np.log(shares) - (seen[:, None] - places) ** 2 / (2 * sigma**2)
    right = int((scores.argmax(axis=1) == values).sum())
    bound = risk.reached(Risk("inference", 0.9, prior), Accountant(mechanism(sigma, q=1.0, steps=1)), DELTA)
    assert stats.binomtest(right, runs, bound, alternative="greater").pvalue > 1e-7
    assert right / runs > prior * 1.05  # so that the attack is one


def test_tables_state_the_bounds():
    accountant = Accountant(mechanism())
    meaning = tables.meaning(accountant, DELTA)
    for prior, rate in meaning.inferences:
        assert rate == pytest.approx(risk.reached(Risk("inference", 0.99, prior), accountant, DELTA)) and rate > prior
    assert "right guesses of what one unit holds" in tables.text(meaning)


def test_the_command_solves_for_a_risk(capsys):
    flags = ["account", "--solve_for_risk=detection:0.2@0.05", "--batch_size=100", "--num_units=10000", "--json"]
    assert cli.main([*flags, "--steps=100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reached"] <= 0.2 < found["reached"] * 1.01 and found["epsilon"] > 0
    assert cli.main([*flags, f"--noise_multiplier={found['noise_multiplier']}"]) == 0
    assert 100 <= json.loads(capsys.readouterr().out)["steps"] <= 101


@pytest.mark.parametrize(("flags", "message"), [
    (["--solve_for_risk=0.1"], "is no risk: give advantage:A"),
    (["--solve_for_risk=advantage:x"], "is no risk"),
    (["--solve_for_risk=advantage:1.5"], "rates between 0 and 1"),
    (["--solve_for_risk=detection:0.01@0.1"], "a larger one than is reached"),
    (["--solve_for_risk=detection:nan@0.1"], "rates between 0 and 1"),
    (["--solve_for_risk=advantage:0.1", "--epsilon=3"], "in the place of --epsilon"),
    (["--solve_for_risk=advantage:0.1", "--noise_multiplier=1"], "in the place of --epsilon"),
    (["--solve_for_risk=advantage:0.000001"], "no noise brings the risk so low"),
])  # fmt: skip
def test_risks_that_cannot_be_met_are_refused(flags, message, capsys):
    code = cli.main(["account", "--steps=100", "--batch_size=100", "--num_units=10000", *flags])
    error = capsys.readouterr().err
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1


def test_a_risk_that_asks_for_no_noise_is_refused():
    with pytest.raises(InputError, match="almost no noise"):
        risk.solved(mechanism(q=0.001, steps=1), "noise_multiplier", Risk("advantage", 0.99), DELTA)
