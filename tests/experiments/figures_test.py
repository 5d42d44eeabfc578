import csv
import dataclasses
import functools
import math
import re

import numpy as np
import pytest

from accounting import calibration
from accounting.errors import InputError
from accounting.mechanism import dp_sgd
from experiments.figures import ablations, drawing, fixed, loss_curves, noise_fields, optima, page, saturation, scales
from experiments.figures.study import Study
from experiments.laws import fitting
from experiments.planning.noise import NoiseSurface
from experiments.planning.optimum import Budget
from tests.experiments.planted import LENGTH, PlantedLaw

UNITS, DELTA = 1e5, 1e-5


def cheap(epsilon):
    """Noise of a sensible shape, at no cost: without sampling's help, plus a floor."""
    return lambda steps, q: 0.4 + 5 * np.asarray(q) * np.sqrt(steps) / epsilon


@pytest.fixture(scope="module")
def fitted():
    return fitting.fit(PlantedLaw.draw(0).table(0))


@pytest.fixture(scope="module")
def asked(fitted):
    return Study(fitted.law, LENGTH, DELTA, sizes=24, points=30, noise=cheap)


@pytest.fixture
def out_of_reach(fitted):
    """A study of a law whose noise is nowhere enough."""
    return Study(
        fitted.law,
        LENGTH,
        DELTA,
        sizes=5,
        points=6,
        noise=lambda epsilon: lambda steps, q: np.full(np.shape(q), np.nan),
    )


def test_the_optimum_is_that_of_every_configuration_tried_by_itself(fitted, asked):
    curve = optima.curves(asked, UNITS, [4.0])[0]
    i = len(curve.compute) // 2
    domain, tried = fitted.law.domain, []
    for size in asked.sizes:
        for batch in 2.0 ** np.arange(0, math.log2(UNITS), 0.25):
            steps = curve.compute[i] / (6 * LENGTH * size * batch)
            ratio = float(cheap(4.0)(steps, batch / UNITS)) / batch
            if domain.steps[0] <= steps <= domain.steps[1] and ratio <= domain.ratio[1]:
                tried.append((float(fitted.law.loss(size, steps, ratio)), size, batch, steps))
    assert len(tried) > 50
    best = min(tried)
    assert (curve.loss[i], curve.parameters[i], curve.batch_size[i], curve.steps[i]) == pytest.approx(best, rel=1e-9)
    close = np.array([(size, batch, steps) for loss, size, batch, steps in tried if loss <= 1.01 * best[0]])
    for column, name in enumerate(("parameters", "batch_size", "steps")):
        assert curve.near[name][i] == pytest.approx([close[:, column].min(), close[:, column].max()])


def test_nothing_lies_outside_of_the_data_and_every_point_spends_its_compute(fitted, asked):
    curve = asked.frontier(UNITS, 1.0)
    there = np.isfinite(curve.loss)
    ratio = cheap(1.0)(curve.steps, curve.batch_size / UNITS) / curve.batch_size
    assert (
        0 < there.sum() < len(there)
    )  # the lowest compute has batches so small that none was measured with their noise
    assert fitted.law.domain.contains(curve.parameters, curve.steps, ratio)[there].all()
    assert 6 * LENGTH * (curve.parameters * curve.batch_size * curve.steps)[there] == pytest.approx(
        curve.compute[there]
    )
    assert curve.tokens_per_parameter[there] == pytest.approx(curve.compute[there] / 6 / curve.parameters[there] ** 2)


def test_the_curves_start_with_one_unit_in_a_batch_and_end_with_all(fitted, asked):
    low, high = asked.compute_range(UNITS)
    domain = fitted.law.domain
    assert low == 6 * LENGTH * domain.parameters[0] * domain.steps[0]
    assert high / low == pytest.approx(
        UNITS * domain.parameters[1] / domain.parameters[0] * domain.steps[1] / domain.steps[0]
    )


def test_loss_falls_with_compute_units_and_epsilon(asked):
    few, many = loss_curves.losses(asked, [1e4, 1e5], 4.0)
    for curve in (few, many):
        running = curve.running[np.isfinite(curve.running)]
        assert (np.diff(running) <= 0).all() and running[-1] == np.nanmin(curve.loss)
    assert np.nanmin(many.loss) < np.nanmin(few.loss)
    assert np.nanmin(asked.frontier(1e4, 64.0).loss) < np.nanmin(few.loss)


def test_tokens_per_parameter_say_which_points_are_bounds(fitted, asked):
    (curve,) = loss_curves.tokens_per_parameter(asked, UNITS, [4.0], every=1)
    frontier = asked.frontier(UNITS, 4.0)
    known = np.isfinite(frontier.parameters)
    (smallest, largest), (shortest, longest) = fitted.law.domain.parameters, fitted.law.domain.steps
    m, t = frontier.parameters, frontier.steps
    at_size = (np.abs(m / smallest - 1) < 0.01) | (np.abs(m / largest - 1) < 0.01)
    at_length = (t < 1.1 * shortest) | (t > longest / 1.1)
    assert at_size[known].any() and at_length[known].any()
    np.testing.assert_array_equal(curve.at_end, known & (at_size | at_length))


def test_the_reference_without_privacy_is_the_closed_form_within_the_data(fitted, asked):
    compute, ratio = loss_curves.without_privacy(asked, fitted.non_private, fitted.physical_batch)
    for operations, value in zip(compute, ratio, strict=True):
        parameters, tokens = fitted.non_private.optimum(operations)
        steps = tokens / LENGTH / fitted.physical_batch
        if fitted.law.domain.contains(parameters, steps, fitted.law.domain.ratio[0]):
            assert value == pytest.approx(tokens / parameters)
        else:
            assert math.isnan(value)


def test_saturating_compute_is_the_least_within_a_hundredth(asked, tmp_path):
    rows = saturation.table(asked, (1e4, 1e5), (1.0, 16.0))
    assert [(row.num_units, row.epsilon) for row in rows] == [(1e4, 1), (1e4, 16), (1e5, 1), (1e5, 16)]
    for row in rows:
        curve = asked.frontier(row.num_units, row.epsilon)
        best = np.nanmin(curve.loss)
        assert row.loss <= 1.01 * best
        assert not (curve.loss[curve.compute < row.compute * (1 - 1e-9)] <= 1.01 * best).any()
        assert 6 * row.parameters * row.batch_size * LENGTH * row.steps == pytest.approx(row.compute)
        assert row.tokens_per_parameter == pytest.approx(row.steps * row.batch_size * LENGTH / row.parameters)
        assert ("largest model" in row.at_end) == (row.parameters > asked.sizes[-2] * 1.001)
    saturation.write(tmp_path / "table2.csv", rows)
    stored = list(csv.DictReader(open(tmp_path / "table2.csv")))
    assert [float(line["compute"]) for line in stored] == pytest.approx([row.compute for row in rows], rel=1e-5)


def test_fixed_configurations_spend_the_compute_and_are_never_better_than_the_best(fitted, asked):
    compute = 3e13
    found = fixed.compare(asked, fitted.sizes, compute, UNITS, [1.0, 4.0, 16.0, 64.0])
    assert [c.name for c in found.configurations] == ["model_0", "model_2", "model_4"]
    for configuration, losses in zip(found.configurations, found.losses, strict=True):
        spent = 6 * LENGTH * configuration.parameters * configuration.steps * configuration.batch_size
        assert spent == pytest.approx(compute)
        assert np.isfinite(losses).any() and not (losses < found.best * 0.998).any()
        assert (np.diff(losses[np.isfinite(losses)]) <= 1e-9).all()
    assert (found.best_of_less >= found.best * 0.998).all()


def test_a_configuration_outside_of_the_data_has_no_loss(asked):
    assert math.isfinite(asked.loss(1e5, 500, 4096, UNITS, 4.0))
    assert math.isnan(asked.loss(1e5, 500, 2, UNITS, 4.0))  # noise
    assert math.isnan(asked.loss(1e6, 500, 4096, UNITS, 4.0))  # size
    assert math.isnan(asked.loss(1e5, 5000, 4096, UNITS, 4.0))  # steps
    assert math.isnan(asked.loss(1e5, 500, 2 * UNITS, UNITS, 4.0))


def test_ablations_reach_the_best_loss_in_every_column_and_do_not_beat_it(asked):
    centre = (4.0, UNITS, 1e13)
    computes = ablations.computes(asked, 1e13, UNITS)
    assert 1e13 in computes and len(computes) == 4
    assert np.diff(np.log10(computes)) == pytest.approx(np.log10(computes[1] / computes[0]))
    rows = ablations.ablations(asked, centre, (1.0, 4.0), (1e4, UNITS), computes)
    assert [row.varied for row in rows] == ["epsilon", "units", "compute"]
    budgets = [
        [(1e13, UNITS, e) for e in (1.0, 4.0)],
        [(1e13, n, 4.0) for n in (1e4, UNITS)],
        [(c, UNITS, 4.0) for c in computes],
    ]
    for row, asked_for in zip(rows, budgets, strict=True):
        for curve, budget in zip(row.curves, asked_for, strict=True):
            best = asked.best_loss(*budget)
            for values, losses in curve.panels.values():
                assert (np.diff(values) > 0).all()
                # Steps and sizes have a grid of their own, on which batches lie between those of the search.
                assert (losses.min() if len(losses) else math.nan) == pytest.approx(best, rel=3e-3, nan_ok=True)


def test_a_law_that_knows_nothing_of_a_budget_leaves_everything_empty(out_of_reach):
    assert out_of_reach.candidates(1e13, UNITS, 4.0) is None and out_of_reach.frontier(UNITS, 4.0).knee is None
    (row,) = saturation.table(out_of_reach, [UNITS], [4.0])
    assert math.isnan(row.compute) and row.at_end == ()
    assert all(
        len(values) == len(losses) == 0 for values, losses in ablations.panels(out_of_reach, 1e13, UNITS, 4.0).values()
    )


@functools.cache
def exact_noise(epsilon, probability):
    """By the accountant, proven."""
    mechanism = dp_sgd(2**40, probability * 2**40, None, 1.0, 1.0, noise_fields.STEPS)
    return calibration.noise_multiplier(mechanism, epsilon, noise_fields.DELTA, tolerance=1e-3).noise_multiplier


@pytest.fixture(scope="module")
def surfaces():
    kept = {}
    return lambda epsilon: kept.setdefault(epsilon, NoiseSurface(epsilon, noise_fields.DELTA))


@pytest.mark.slow
def test_fields_are_the_change_of_the_noise_batch_ratio(surfaces):
    powers = {"epsilon": (2,), "batch": (14, 18, 20), "units": (20, 24)}
    found = noise_fields.field("units", "batch", powers, surfaces)
    assert found.ratio.shape == (2, 3)
    now, half, twice = (exact_noise(4.0, 2.0**k) for k in (-6, -7, -5))
    for i, j in ((1, 1), (0, 0)):  # a batch of a 64th of all units
        assert found.ratio[i, j] == pytest.approx(now / found.ys[j], rel=0.01)
        assert found.along_x[i, j] == pytest.approx(half / now - 1, abs=0.02)
        assert found.along_y[i, j] == pytest.approx(twice / 2 / now - 1, abs=0.02)
    # Half of so few units in each batch: their noise grows as fast as the batch. With many units and small batches it
    # does not grow at all.
    assert found.along_y[0, 1] == pytest.approx(0, abs=0.03)
    assert found.along_y[1, 0] < -0.3
    # A batch of all units cannot be doubled; of one that is, nothing is known.
    assert math.isnan(found.along_y[0, 2]) and math.isfinite(found.along_x[0, 2])
    assert np.nanmax(np.stack([found.along_x, found.along_y])) <= 0.01
    assert np.nanmin(np.stack([found.along_x, found.along_y])) >= -0.51


def test_the_field_of_epsilon_is_the_change_on_doubling_it(surfaces):
    found = noise_fields.field("epsilon", "batch", {"epsilon": (2,), "batch": (18,)}, surfaces)
    assert found.along_x[0, 0] == pytest.approx(exact_noise(8.0, 2.0**-6) / exact_noise(4.0, 2.0**-6) - 1, abs=0.02)


@pytest.mark.slow
def test_no_budget_raises_the_noise_when_it_is_doubled(surfaces):
    powers = {"epsilon": (2, 3), "batch": (16, 20), "units": (22, 26)}
    for x, y in noise_fields.PAIRS:
        found = noise_fields.field(x, y, powers, surfaces)
        assert (found.along_x <= 0.01).all() and (found.along_y <= 0.01).all()


# A page of few points, with noise that costs nothing.
QUICK = page.Detail(
    study=lambda law, length, delta, cache: Study(law, length, delta, sizes=6, points=8, noise=cheap),
    surface=lambda epsilon, delta, cache: cheap(epsilon),
    powers={"epsilon": (0, 2), "batch": (16, 18), "units": (22, 24)},
)


@pytest.mark.slow
def test_the_page_holds_every_figure_and_needs_nothing_else(fitted, tmp_path):
    budget = Budget(1e13, UNITS, 4.0, DELTA, LENGTH)
    path = page.write(fitted, budget, tmp_path / "figures", detail=QUICK)
    text = path.read_text()
    names = ("fig1", "fig3ab", "fig3c", "fig4", "fig5", "fig6")
    assert path == tmp_path / "figures" / "index.html"
    assert {file.name for file in path.parent.iterdir()} == {
        "index.html",
        "table2.csv",
        *(f"{n}.{end}" for n in names for end in ("svg", "png")),
    }
    for name, panels in zip(names, (3, 2, 1, 3, 1, 9), strict=True):
        figure = re.search(rf'<figure id="{name}">(.*?)</figure>', text, re.S)[1]
        assert figure.count("<svg") == panels and figure.count("<figcaption>") == 1
    assert "sizes 20,000 to 480,000, 215 to 1,600 steps, noise-batch ratio up to 2<sup>−3.5</sup>" in text
    for kind in fitted.errors:
        assert f">{kind}<" in text
    outside_of_svg = re.sub(r"<svg.*?</svg>", "", text, flags=re.S)
    assert "$" not in outside_of_svg and ">nan" not in outside_of_svg
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert addresses <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }  # names of XML languages, which nobody fetches
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", text)
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    references = re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text)
    assert {a or b for a, b in references} <= set(identifiers)
    with pytest.raises(InputError, match="not empty"):
        page.write(fitted, budget, path.parent)


def test_figures_are_the_same_every_time(fitted, asked, tmp_path):
    plot = fixed.plot(fixed.compare(asked, fitted.sizes, 3e13, UNITS, [1.0, 4.0]))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        drawing.save(plot, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert drawing.panel_svgs(plot) == drawing.panel_svgs(plot)


def test_a_panel_without_anything_within_the_data_says_so(fitted, asked):
    found = fixed.compare(asked, fitted.sizes, 1e30, UNITS, [1.0, 4.0])
    assert found.configurations == [] and np.isnan(found.best).all()
    assert "no configuration lies" in drawing.panel_svgs(fixed.plot(found))[0][0]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        page.claim(tmp_path / "file")


def test_what_is_shown_suits_the_law(fitted):
    assert scales.of_law(fitted.law) is scales.SMALL
    large = dataclasses.replace(fitted.law, domain=dataclasses.replace(fitted.law.domain, parameters=(4.5e6, 335e6)))
    assert scales.of_law(large) is scales.PAPER
