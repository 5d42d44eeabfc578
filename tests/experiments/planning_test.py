import dataclasses
import json
import math

import numpy as np
import pytest
from dp_accounting import dp_event, pld

from accounting import calibration
from accounting.errors import InputError
from accounting.loss_distribution import saddlepoint
from accounting.mechanism import dp_sgd
from experiments.laws import fitting
from experiments.planning import noise, optimum, plan
from experiments.planning.optimum import Budget
from tests.experiments import planted

BUDGET = Budget(3e13, 1e5, 8, 1e-5, planted.LENGTH)


@pytest.fixture(scope="module")
def surface():
    return noise.NoiseSurface(BUDGET.epsilon, BUDGET.delta)


@pytest.mark.slow
def test_surface_agrees_with_the_certified_calibration(surface):
    rng = np.random.default_rng(0)
    steps, q = np.exp(rng.uniform(np.log(60), np.log(5000), 8)).round(), np.exp(rng.uniform(np.log(1e-3), 0, 8))
    for t, probability, sigma in zip(steps, q, surface(steps, q), strict=True):
        mechanism = dp_sgd(10**6, probability * 10**6, None, 1.0, 1.0, int(t))
        assert sigma == pytest.approx(calibration.noise_multiplier(mechanism, 8, 1e-5).noise_multiplier, rel=0.01)


@pytest.mark.slow
def test_surface_of_a_tiny_delta_uses_the_accountant_where_the_estimate_fails():
    sigma = noise.NoiseSurface(2.0, 1.1e-10)(100_000, 4.0802e-5)
    assert float(sigma) == pytest.approx(0.59843, rel=0.01)  # an independent tilted accountant's figure


@pytest.mark.slow
@pytest.mark.parametrize("steps, q", [(9537, 1.6e-3), (3815, 6.6e-4)])
def test_surface_is_right_where_units_take_part_often_under_little_noise(steps, q):
    # Where neither the saddle point converges nor a coarse grid is fine enough.
    exact = calibration.noise_multiplier(dp_sgd(10**6, q * 10**6, None, 1.0, 1.0, steps), 1.0, 1e-8).noise_multiplier
    assert float(noise.NoiseSurface(1.0, 1e-8)(steps, q)) == pytest.approx(exact, rel=0.01)


def test_configurations_without_any_sensible_noise_are_left_out(fitted):
    def hopeless(steps, q):
        return np.where(np.asarray(q) > 0.01, np.nan, 1.0)

    found = optimum.search(fitted.law, hopeless, BUDGET, optimum.sizes_within(fitted.law, 8))
    assert len(found) and (found.batch_size / BUDGET.num_units <= 0.01).all()


def test_surface_has_no_value_for_more_than_all_units(surface):
    assert np.isnan(surface(100.0, 1.5)) and np.isfinite(surface(100.0, 1.0))


def test_nodes_are_kept_and_damaged_files_ignored(tmp_path):
    def noise_multiplier(*_):  # nodes are kept by the name of what computed them
        pytest.fail("computed again")

    first = noise.NoiseSurface(4.0, 1e-6, tmp_path)(500.0, 0.05)
    again = noise.NoiseSurface(4.0, 1e-6, tmp_path, estimate=noise_multiplier)
    assert again(500.0, 0.05) == first
    (path,) = tmp_path.iterdir()
    path.write_text("{")
    assert noise.NoiseSurface(4.0, 1e-6, tmp_path)(500.0, 0.05) == first


def test_search_finds_the_minimum_that_brute_force_finds(fitted, surface):
    sizes = optimum.sizes_within(fitted.law, 12)
    found = optimum.search(fitted.law, surface, BUDGET, sizes)
    best = math.inf
    for m in sizes:
        for k in range(4 * 17):
            b = 2.0 ** (k / 4)
            t = BUDGET.compute / (6 * planted.LENGTH * m * b)
            if b <= 1e5 and 50 <= t <= 1600:
                best = min(best, float(fitted.law.loss(m, t, float(surface(t, b / 1e5)) / b)))
    assert found.loss[0] == pytest.approx(best, rel=1e-9)
    spent = 6 * found.parameters * found.batch_size * found.steps * planted.LENGTH
    np.testing.assert_allclose(spent, BUDGET.compute)
    assert (np.diff(found.loss) >= 0).all()


def test_the_preferred_model_is_the_smallest_that_is_nearly_as_good(fitted, surface):
    found = optimum.search(fitted.law, surface, BUDGET, optimum.sizes_within(fitted.law))
    i = optimum.preferred(found)
    near = found.loss <= 1.01 * found.loss[0]
    assert found.loss[i] <= 1.01 * found.loss[0]
    assert found.parameters[i] == found.parameters[near].min()
    assert found.loss[i] == found.loss[near & (found.parameters == found.parameters[i])].min()


def test_more_of_any_budget_is_never_worse(fitted):
    def solve(b):
        return float(
            optimum.search(
                fitted.law, noise.NoiseSurface(b.epsilon, b.delta), b, optimum.sizes_within(fitted.law, 20)
            ).loss[0]
        )

    values = optimum.marginal_values(solve, BUDGET)
    assert set(values) == {"compute", "epsilon", "num_units"}
    assert all(value > -0.003 for value in values.values()) and max(values.values()) > 0


def test_extrapolation_is_refused_unless_asked_for(fitted, surface):
    large = Budget(8e16, 1e5, 8, 1e-5, planted.LENGTH)
    with pytest.raises(InputError, match="allow extrapolation"):
        optimum.search(fitted.law, surface, large, optimum.sizes_within(fitted.law))
    found = optimum.search(fitted.law, surface, large, optimum.sizes_within(fitted.law), extrapolate=True)
    assert not found.inside.any()
    noisy = Budget(1e12, 2e3, 0.02, 1e-6, planted.LENGTH)
    with pytest.raises(InputError, match="noise-batch ratio above"):
        optimum.search(fitted.law, noise.NoiseSurface(0.02, 1e-6), noisy, optimum.sizes_within(fitted.law))


def test_non_private_optimum_is_chinchillas():
    # Constants and exponents of arXiv 2203.15556, equation 10: the best size grows with the 0.46th power of compute
    # (table 2).
    form = optimum.NonPrivate(1.69, 406.4, 0.34, 410.7, 0.28)
    parameters, tokens = form.optimum(5.76e23)
    assert 6 * parameters * tokens == pytest.approx(5.76e23)
    assert math.log(form.optimum(5.76e24)[0] / parameters, 10) == pytest.approx(0.46, abs=0.01)
    around = np.geomspace(parameters / 4, parameters * 4, 401)
    assert around[form.loss(around, 5.76e23 / 6 / around).argmin()] == pytest.approx(parameters, rel=0.02)


def test_saturating_compute_is_the_first_that_is_nearly_best():
    assert optimum.saturating_compute(np.arange(4), np.array([3.0, 2.015, 2.005, 2.0])) == 1


def test_plan_answers_with_a_certified_noise(fitted, tmp_path):
    request = plan.Request(BUDGET)
    result = plan.answer(fitted, request, tmp_path)
    keys = {"model", "parameters", "expected_batch_size", "steps", "noise_multiplier", "noise_batch_ratio",
    "learning_rate",
            "predicted_loss", "near_optimal", "extrapolated", "prediction_error", "marginal_values",
            "non_private"}  # fmt: skip
    assert keys <= set(result)
    assert result["epsilon"] <= 8 and not result["extrapolated"] and result["model"].startswith("model_")
    proof = noise.certified(100_000, result["expected_batch_size"], result["steps"], 8, 1e-5, "add_or_remove")
    assert result["noise_multiplier"] == proof.noise_multiplier
    spent = 6 * result["parameters"] * result["expected_batch_size"] * result["steps"] * planted.LENGTH
    assert spent == pytest.approx(BUDGET.compute, rel=0.01)
    again = plan.answer(fitted, request, tmp_path)
    assert {**again, "search_seconds": 0} == {**result, "search_seconds": 0}
    json.dumps(result)
    assert "certified" in plan.text(result)


@pytest.mark.parametrize("epsilon, batch, steps", [(8.0, 400, 500), (0.5, 1000, 200), (2.0, 50, 1500)])
def test_a_certified_noise_meets_its_budget_by_other_code(epsilon, batch, steps):
    """Google's accountant, with a grid of its own, finds the budget kept, and not by much more noise than needed."""
    proof = noise.certified(100_000, batch, steps, epsilon, 1e-6, "add_or_remove")

    def spent(sigma):
        accountant = pld.PLDAccountant(value_discretization_interval=1e-4)
        event = dp_event.PoissonSampledDpEvent(batch / 100_000, dp_event.GaussianDpEvent(sigma))
        return accountant.compose(event, steps).get_epsilon(1e-6)

    assert spent(proof.noise_multiplier) <= proof.epsilon * (1 + 1e-4) and proof.epsilon <= epsilon
    assert spent(proof.noise_multiplier / 1.005) > epsilon


@pytest.mark.slow
def test_a_plan_beyond_the_data_knows_the_larger_presets(fitted, tmp_path):
    request = plan.Request(Budget(1e16, 1e6, 8, 1e-6, planted.LENGTH), extrapolate=True)
    names = plan._names(fitted, request)
    assert {"ladder_400k", "vaultgemma_1b", *fitted.sizes} <= set(names.values())
    assert set(plan.sizes_to_search(fitted, request)) == set(names)
    # The certificate takes half a minute, and is tested elsewhere.
    result = plan.answer(fitted, request, tmp_path, certify=lambda *_: noise.Certified(0.7, 8.0))
    assert (
        result["extrapolated"] and result["notes"][0].startswith("extrapolated: ") and result["model"] in names.values()
    )


def test_a_law_survives_its_file(fitted, tmp_path):
    fitted.save(tmp_path / "law.json")
    loaded = fitting.load(tmp_path / "law.json")
    m, t, r = np.array([3e4, 1e6]), np.array([100.0, 5000.0]), np.array([0.0, 0.01])
    np.testing.assert_array_equal(loaded.law.loss(m, t, r), fitted.law.loss(m, t, r))
    np.testing.assert_array_equal(loaded.law.learning_rate(m, t, r), fitted.law.learning_rate(m, t, r))
    assert loaded.errors == fitted.errors and loaded.non_private == fitted.non_private


@pytest.mark.parametrize("content", ["", "[]", '{"law": 1}'])
def test_a_file_that_is_no_law_is_refused(tmp_path, content):
    (tmp_path / "law.json").write_text(content)
    with pytest.raises(InputError, match="holds no law"):
        fitting.of_file(tmp_path / "law.json")
    with pytest.raises(InputError, match="does not exist"):
        fitting.of_file(tmp_path / "none.json")


def test_where_less_noise_would_do_there_is_the_least_and_no_hole():
    """A large epsilon: every place of the lattice has a number, and twice the units never cost anything."""
    surface = noise.NoiseSurface(1000.0, 1e-6)
    steps, q = np.meshgrid(np.geomspace(50, 640, 6), np.geomspace(1e-5, 0.5, 8))
    found = surface(steps, q)
    assert np.isfinite(found).all() and found.min() == pytest.approx(saddlepoint.SMALLEST_NOISE, rel=1e-3)
    exact = calibration.noise_multiplier(dp_sgd(10**5, 3e4, None, 1.0, 1.0, 600), 1000.0, 1e-6).noise_multiplier
    assert float(surface(600, 0.3)) == pytest.approx(exact, rel=0.02)
    proof = noise.certified(10**5, 1, 50, 1000.0, 1e-6, "zero_out")
    assert proof.noise_multiplier == calibration.SMALLEST_NOISE and proof.epsilon < 1000


def test_limits_are_told_before_anything_is_searched():
    with pytest.raises(InputError, match=r"at most 1e\+16 units"):
        Budget(1e13, 1e18, 8, 1e-6, 64)


def test_a_law_is_not_asked_for_more_steps_than_it_can_be(fitted, surface):
    """Much more compute than the sizes can spend: the answer is no run of 1e13 steps, but a sentence."""
    vast = Budget(3e23, 1e5, 8, 1e-5, planted.LENGTH)
    with pytest.raises(InputError, match="4 times what the law was fitted to: compute must lie between"):
        optimum.search(fitted.law, surface, vast, optimum.sizes_within(fitted.law), extrapolate=True)


def test_tokens_beyond_the_longest_run_are_marked_without_privacy_too(fitted):
    longest = planted.STEPS[-1] * planted.BATCH * planted.LENGTH
    for compute in (1e11, 1e12, 1e13, 1e14):
        said = plan.non_private(fitted, Budget(compute, 1e5, 8, 1e-5, planted.LENGTH))
        low, high = fitted.law.domain.parameters
        assert said["extrapolated"] == (not low <= said["parameters"] <= high or said["tokens"] > longest)
    assert said["extrapolated"]


@pytest.mark.slow
def test_beyond_the_data_every_form_is_shown_and_far_beyond_nothing(fitted, tmp_path):
    longer = Budget(8e16, 1e5, 8, 1e-5, planted.LENGTH)
    said = plan.answer(fitted, plan.Request(longer, any_size=True, extrapolate=True), tmp_path)
    assert said["extrapolated"]
    losses = {form: float(alone.loss(1.9e6, 800, 2.0**-6)) for form, alone in fitted.forms.items()}
    assert set(losses) == {"L1", "L2", "coupled"} and len(set(losses.values())) == 3
    larger = dataclasses.replace(fitted, sizes={"large": 1.5e6})
    request = plan.Request(dataclasses.replace(BUDGET, compute=1e15), extrapolate=True, model="large")
    of_forms = plan.answer(larger, request, tmp_path)
    assert {each["form"] for each in of_forms["forms"]} == set(losses)
    assert "a law is a form: what each would choose by itself" in plan.text(of_forms)
    assert f"within {100 * said['prediction_error']:.1f} % nine times out of ten" in plan.text(said)
    with pytest.raises(InputError, match="4 times what the law was fitted to"):
        optimum.search(
            fitted.law, lambda t, q: 0 * t + 1, dataclasses.replace(longer, compute=1e19), [1e5], extrapolate=True
        )
    inside = plan.answer(fitted, plan.Request(BUDGET), tmp_path)
    assert inside["forms"] == [] and "a law is a form" not in plan.text(inside)


@pytest.mark.parametrize(("root", "start"), [(0.06, 0.07), (0.09, 0.2), (0.2, 1.0), (3.0, 0.2), (0.03, 0.5)])
def test_the_noise_of_a_node_is_where_the_budget_is_met(root, start):
    found = math.exp(noise._root(lambda x: math.log(root) - x, math.log(start)))
    assert found == pytest.approx(max(root, saddlepoint.SMALLEST_NOISE), rel=5e-3)
