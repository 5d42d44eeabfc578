import subprocess
import sys

import mpmath
import numpy as np
import pytest
from scipy import stats

from accounting.errors import InputError
from dpgemma.privacy import keystream
from dpgemma.privacy.samplers import PoissonSampler, geometric_gaps

SECRET = bytes(range(32))
# Fixed keys: a correct sampler passes each statistical check below with probability above 1 - 1e-6.
ALPHA = 1e-7


def draws(sampler, steps, secret=SECRET):
    return [sampler.draw(secret, t) for t in range(steps)]


def test_inclusion_is_uniform():
    n, q, steps = 400, 0.07, 20_000
    counts = np.bincount(np.concatenate(draws(PoissonSampler(n, q), steps)), minlength=n)
    z2 = ((counts - steps * q) ** 2 / (steps * q * (1 - q))).sum()
    assert ALPHA < stats.chi2.sf(z2, n) < 1 - ALPHA


def test_pairs_are_independent():
    n, q, steps = 40, 0.3, 20_000
    included = np.zeros((steps, n))
    for t, units in enumerate(draws(PoissonSampler(n, q), steps)):
        included[t, units] = 1
    pairs = (included.T @ included)[np.triu_indices(n, 1)]
    expected, variance = steps * q**2, steps * q**2 * (1 - q**2)
    # Pair counts share units, so their chi-square is not exact; centred products are uncorrelated.
    centred = (included - q) / np.sqrt(q * (1 - q))
    z = (centred.T @ centred)[np.triu_indices(n, 1)] / np.sqrt(steps)
    assert ALPHA < stats.chi2.sf((z**2).sum(), z.size) < 1 - ALPHA
    assert np.abs(pairs - expected).max() < 6.5 * np.sqrt(variance)


def test_batch_size_is_binomial():
    n, q, steps = 1000, 0.1, 20_000
    sizes = np.array([len(d) for d in draws(PoissonSampler(n, q), steps)])
    edges = stats.binom.ppf(np.linspace(0.02, 0.98, 25), n, q)
    bins = np.unique(edges)
    observed = np.bincount(np.searchsorted(bins, sizes), minlength=len(bins) + 1)
    probabilities = np.diff(np.concatenate([[0], stats.binom.cdf(bins, n, q), [1]]))
    assert stats.chisquare(observed, probabilities * steps).pvalue > ALPHA
    assert stats.chi2.sf(((sizes - n * q) ** 2).sum() / (n * q * (1 - q)), steps) > ALPHA


def test_steps_and_keys_are_independent():
    sampler = PoissonSampler(2000, 0.5)
    vectors = np.zeros((6, 2000))
    for row, (secret, step) in enumerate(
        [(SECRET, 0), (SECRET, 1), (SECRET, 2), (SECRET[::-1], 0), (SECRET[::-1], 1), (b"x" * 32, 0)]
    ):
        vectors[row, sampler.draw(secret, step)] = 1
    assert np.abs(np.corrcoef(vectors) - np.eye(6)).max() < 6 / np.sqrt(2000)


def test_pitfall_10_a_draw_is_a_function_of_key_and_step():
    sampler = PoissonSampler(10_000, 0.05, 520)
    again = PoissonSampler(10_000, 0.05, 520)
    for step in (0, 7, 100_000, 2**40):
        np.testing.assert_array_equal(sampler.draw(SECRET, step), again.draw(SECRET, step))


def test_indices_are_sorted_distinct_and_in_range():
    for n, q in [(1, 0.5), (1, 1.0), (5, 0.9), (1000, 1.0), (1000, 1e-9), (10**12, 1e-9)]:
        for d in draws(PoissonSampler(n, q), 20):
            assert d.dtype == np.int64 and (np.diff(d) > 0).all() and (d.size == 0 or (d[0] >= 0 and d[-1] < n))
            assert q < 1 or d.size == n


@pytest.mark.parametrize("q", [1e-7, 4.08e-5])
def test_pitfall_14_the_realised_rate_is_q_however_small(q):
    # float32 coins would be off by 0.25 % at 4e-5 and by more at 1e-7.
    n, steps = int(2000 / q), 400
    total = sum(len(d) for d in draws(PoissonSampler(n, q), steps))
    expected = n * q * steps
    assert abs(total - expected) < 5.3 * np.sqrt(expected)


def test_large_indices_are_uniform():
    n = 12_695_312_500
    d = np.concatenate(draws(PoissonSampler(n, 100_000 / n), 10))
    assert stats.chisquare(np.bincount(d * 256 // n, minlength=256)).pvalue > ALPHA


def test_pitfall_6_truncation_keeps_a_uniform_subset():
    # pitfall 6: dropping the tail of the sorted indices would starve the last units.
    n, q, cap, steps = 60, 0.5, 25, 20_000
    sampler = PoissonSampler(n, q, cap)
    batches = draws(sampler, steps)
    assert max(map(len, batches)) == cap
    counts = np.bincount(np.concatenate(batches), minlength=n)
    assert stats.chisquare(counts).pvalue > ALPHA
    plain = draws(PoissonSampler(n, q), 200)
    for kept, drawn in zip(batches, plain, strict=False):
        assert set(kept) <= set(drawn) and len(kept) == min(len(drawn), cap)


@pytest.mark.parametrize("q, tolerance", [(0.3, 1e-15), (4e-5, 1e-14), (1e-6, 1e-13), (1e-12, 1e-7), (1e-14, 1e-5)])
@pytest.mark.parametrize("gap", [0, 3])
def test_small_probabilities_are_resolved(q, tolerance, gap):
    """Exactly: the smallest word whose gap is at most `gap` gives that event's probability, 1 - (1 - q)^(gap + 1)."""
    low, high = -1, 2**64 - 1
    while high - low > 1:
        middle = (low + high) // 2
        (found,) = geometric_gaps(np.array([middle], np.uint64), q)
        low, high = (low, middle) if found <= gap else (middle, high)
    exact = -mpmath.expm1((gap + 1) * mpmath.log1p(-mpmath.mpf(q)))
    assert abs(mpmath.mpf(2**64 - high) / 2**64 / exact - 1) < tolerance + 2.0**-64 / q


def test_batch_of_518_thousand_among_12_billion():
    # In a process of its own, so that its peak memory is the sampler's.
    code = """
import resource, time
from dpgemma.privacy.samplers import PoissonSampler, geometric_gaps
sampler = PoissonSampler(12_695_312_500, 517_989 / 12_695_312_500, 524_810)
PoissonSampler(100, 0.5, 10).draw(b'k' * 32, 0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
best = 1e9
for step in range(5):
    start = time.perf_counter()
    batch = sampler.draw(b'k' * 32, step)
    best = min(best, time.perf_counter() - start)
    assert 512_000 < len(batch) < 524_811
print(best, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    seconds, megabytes = map(float, out.split())
    assert seconds < 0.1 and megabytes < 100


def test_keystream_is_chacha20():
    # RFC 8439, appendix A.1, test vector 1: zero key, zero counter and nonce.
    expected = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert keystream.uniform_uint64(bytes(32), 0, 4).tobytes() == expected
    assert keystream.derive(SECRET, "a") != keystream.derive(SECRET, "b")


@pytest.mark.parametrize("n, q", [(0, 0.5), (10, 0.0), (10, 1.5)])
def test_impossible_samplers_are_refused(n, q):
    with pytest.raises(ValueError):
        PoissonSampler(n, q)


def test_what_64_bits_cannot_number_is_refused():
    """At the bound draws are still sorted, distinct and of the right size; beyond it there are none."""
    drawn = PoissonSampler(10**15, 100 / 10**15).draw(bytes(32), 0)
    assert 40 < len(drawn) < 170 and (np.diff(drawn) > 0).all() and drawn[0] >= 0 and drawn[-1] < 10**15
    for items, batch in ((3 * 10**17, 1), (2 * 10**18, 8), (10**15, 10**5)):
        with pytest.raises(InputError, match="more than 64 bits can number"):
            PoissonSampler(items, batch / items)
