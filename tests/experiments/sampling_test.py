"""The batch in the law: kappa, runs of several batches in one law, and losses at the ends of windows."""

import dataclasses
import math

import numpy as np
import pytest

from accounting.errors import InputError
from experiments.laws import fitting, points, sampling
from experiments.laws.sampling import Sampling
from experiments.planning import noise, optimum
from experiments.planning.optimum import Budget
from experiments.sweep import results
from tests.experiments import planted

KAPPA = 1.3


def table(
    kappa: float = KAPPA, noise: float = 0.003, batches=(32, 128, 512), seed: int = 0, power: float = 2.0
) -> results.Table:
    """A sweep of the planted law, in which the noise of sampling adds to that of privacy by a power."""
    rng, truth, records = np.random.default_rng(seed), planted.PlantedLaw.draw(0), []
    for i, m in enumerate(planted.SIZES[:4]):
        for batch in batches:
            for r in planted.RATIOS if batch == 32 else (0.0, 2.0**-11, 2.0**-9):
                for x in (-6.0, -7.0, -8.0):
                    effective = (r**power + (kappa / (batch * m)) ** (power / 2)) ** (1 / power)
                    off = truth.curvature * (x - truth.best_rate(m, planted.STEPS, effective)) ** 2
                    loss = truth.loss(m, planted.STEPS, effective) * np.exp(off + rng.normal(0, noise, len(off)))
                    records += [
                        {
                            results.MODEL: f"model_{i}", results.LEARNING_RATE: 2.0**x, results.ITERATIONS: t,
                            results.RATIO: r, results.LOSS: value, results.PARAMETERS: m, results.LENGTH: 64,
                            results.BATCH: batch,
                        }
                        for t, value in zip(planted.STEPS, loss, strict=True)
                    ]  # fmt: skip
    return results.of_records(records)


@pytest.fixture(scope="module")
def fitted():
    return fitting.fit(table())


def test_kappa_is_found_and_the_runs_collapse_with_it():
    found = sampling.collapse(table())
    assert found.kappa == pytest.approx(KAPPA, rel=0.25)
    assert found.pooled < 0.006 < 2 * found.pooled < found.rms_without
    assert [size for size, _ in sorted(found.rms.items())] == list(planted.SIZES[:4])


@pytest.mark.parametrize("power", [1.25, 2.0])
def test_the_power_with_which_two_noises_add_is_found(power):
    found = sampling.collapse(table(power=power, noise=0.001))
    assert found.power == power and found.kappa == pytest.approx(KAPPA, rel=0.25)
    drawn = Sampling(found.kappa, power=power).effective(0.0, 32, 1e5)
    assert drawn == pytest.approx(math.sqrt(found.kappa / 32e5)), "without privacy's noise the power has no part"


def test_without_an_effect_of_the_batch_none_is_found():
    assert sampling.collapse(table(kappa=0.0)).kappa < 0.2


def test_the_law_of_several_batches_predicts_each_of_them(fitted):
    truth = planted.PlantedLaw.draw(0)
    assert fitted.law.sampling.kappa == pytest.approx(KAPPA, rel=0.25) and fitted.physical_batch == 32
    for m in planted.SIZES[:4]:
        for batch, r in ((32, 0.0), (128, 2.0**-11), (512, 2.0**-9.5), (32, 2.0**-6)):
            steps = np.geomspace(250, 1600, 5)
            said = fitted.law.loss(m, steps, fitted.law.effective(r, batch, m))
            assert said == pytest.approx(truth.loss(m, steps, math.sqrt(r**2 + KAPPA / (batch * m))), rel=0.015)


def test_a_search_counts_the_noise_of_sampling(fitted):
    """With hardly any noise of privacy, what small batches reach is decided by that of sampling."""
    budget, truth = Budget(3e11, 1e6, 8.0, 1e-6, 64), planted.PlantedLaw.draw(0)

    def hardly_any(steps, q):
        return np.full(np.shape(steps), 1e-6)

    def off(law):
        found = optimum.search(law, hardly_any, budget, [2.1e4])
        true = truth.loss(2.1e4, found.steps, np.sqrt(found.ratio**2 + KAPPA / (found.batch_size * 2.1e4)))
        kept = found.batch_size >= 24
        return float(np.abs(found.loss / true - 1)[kept].max())

    assert off(fitted.law) < 0.015
    assert off(dataclasses.replace(fitted.law, sampling=Sampling())) > 0.03


def test_batches_that_were_not_crossed_with_noise_are_refused():
    mixed = table()
    confounded = mixed.rows((mixed[results.BATCH] == 32) == (mixed[results.PARAMETERS] < 1e5))
    with pytest.raises(InputError, match="differ in 'Batch Size' \\(32, 128, 512\\)"):
        fitting.fit(confounded)


def test_one_batch_leaves_the_ratio_as_it_is(truth, fitted):
    one = truth.table(0)
    same, found = sampling.with_effective_ratio(one)
    assert same is one and found == Sampling() and found.effective(0.25, 7, 1e5) == 0.25


def test_a_law_of_several_batches_survives_its_file(fitted, tmp_path):
    fitted.save(tmp_path / "law.json")
    again = fitting.load(tmp_path / "law.json").law
    assert again.sampling == fitted.law.sampling
    assert again.loss(5e4, 500.0, 0.002) == fitted.law.loss(5e4, 500.0, 0.002)


def test_means_over_windows_are_moved_to_the_ends_of_the_windows():
    every, window = np.arange(1, 5121), 160
    loss = 1.5 + 4 * every**-0.4
    ends = np.arange(window, 5121, window)
    records = [
        {
            results.MODEL: "m", results.LEARNING_RATE: 0.01, results.ITERATIONS: t, results.RATIO: 0.0,
            results.LOSS: loss[t - window : t].mean(), results.PARAMETERS: 1e5, results.WINDOW: window,
        }
        for t in ends
    ]  # fmt: skip
    raw = results.of_records(records)
    found = points.settled(raw)
    assert found[results.ITERATIONS].min() == 640 and results.WINDOW not in found.columns
    true = loss[found[results.ITERATIONS].astype(int) - 1]
    assert np.abs(found[results.LOSS] / true - 1).max() < 2e-3
    assert np.abs(raw[results.LOSS][-len(true) :] / true - 1).max() > 5e-3


def test_the_runs_that_are_shipped_collapse():
    found = sampling.collapse(_shipped())
    assert 0.8 < found.kappa < 1.7 and len(found.rms) >= 3
    assert found.pooled < 0.0065 and found.pooled < found.rms_without / 3


def _shipped() -> results.Table:
    table = results.read(fitting.SHIPPED / "results.csv")
    return table.rows(~table.held_out)


@pytest.mark.slow
def test_few_budgets_whose_best_size_is_inside_end_at_an_edge_of_the_data():
    law, rng, at_edge, inside = fitting.load(fitting.SHIPPED / "law.json").law, np.random.default_rng(0), 0, 0
    (smallest, largest), (_, longest) = law.domain.parameters, law.domain.steps
    surfaces = {epsilon: noise.NoiseSurface(epsilon, 1e-8, None, noise.estimate) for epsilon in (0.5, 1, 2, 4, 8)}
    while inside < 60:
        compute, units = 10 ** rng.uniform(12.6, 14.1), 10 ** rng.uniform(4, 7)
        epsilon = rng.choice(list(surfaces))
        budget = Budget(compute, units, float(epsilon), 1e-8, 64)
        found = optimum.search(law, surfaces[epsilon], budget, np.geomspace(smallest, largest, 40))
        size, steps, batch = found.parameters[0], found.steps[0], found.batch_size[0]
        inside += 1.03 * smallest < size < 0.97 * largest
        ratio = float(law.effective(found.ratio[0], batch, size))
        low, high = law.domain.ratio
        at_edge += 1.03 * smallest < size < 0.97 * largest and (
            steps > 0.84 * longest or not 1.01 * low < ratio < 0.95 * high
        )
    assert at_edge < 12
