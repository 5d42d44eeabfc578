"""Writes dp_accounting.json: epsilons by dp-accounting's privacy loss distributions, at grids of 1e-4 and 1e-5.

Run as `python tests/accounting/golden/make_dp_accounting.py` after a new release of dp-accounting; it takes some
minutes. Kept are the settings with epsilon between 0.1 and 20 at which the two grids agree to 0.02 %.
"""

import itertools
import json
import pathlib

import dp_accounting
from dp_accounting.pld import privacy_loss_distribution

DELTAS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
SETTINGS = itertools.product(
    (0.0005, 0.002, 0.01, 0.05, 0.2, 1.0), (0.6, 0.8, 1.0, 1.5, 3.0, 8.0), (1, 20, 200, 1000, 5000)
)
LARGEST_RENYI_EPSILON = 30.0


def renyi(q: float, sigma: float, steps: int) -> float:
    """A cheap upper bound, to leave out what would take long and lie beyond the range."""
    step = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma))
    accountant = dp_accounting.rdp.RdpAccountant(list(range(2, 128)))
    return accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps)).get_epsilon(DELTAS[-1])


def epsilons(q: float, sigma: float, steps: int, interval: float) -> list[float]:
    step = privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=interval
    )
    composed = step.self_compose(steps)
    return [float(composed.get_epsilon_for_delta(delta)) for delta in DELTAS]


def main():
    kept = []
    for q, sigma, steps in SETTINGS:
        if not 0.1 <= renyi(q, sigma, steps) <= LARGEST_RENYI_EPSILON:
            continue
        coarse, fine = (epsilons(q, sigma, steps, interval) for interval in (1e-4, 1e-5))
        for delta, a, b in zip(DELTAS, coarse, fine, strict=True):
            if 0.1 <= b <= 20 and abs(a - b) <= 2e-4 * b:
                kept.append([q, sigma, steps, delta, a, b])
        print(q, sigma, steps, len(kept), flush=True)
    lines = ",\n".join(json.dumps(row) for row in kept)
    pathlib.Path(__file__).with_name("dp_accounting.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
