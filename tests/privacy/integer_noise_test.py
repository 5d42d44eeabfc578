"""The law of the noise of whole numbers, from its exact probabilities, and the sampler that draws it."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jax.extend.random import threefry_2x32
from jax.sharding import PartitionSpec
from scipy import special, stats

from accounting.mechanism import grid
from dpgemma.privacy import integer_noise
from dpgemma.privacy.noise import noise_keys
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding.place import in_shards

CELL = 2**integer_noise.FILLING_BITS
CELLS = integer_noise.DRAWS**0.5 * integer_noise.TABLE_DEVIATION  # standard deviation, but for that of the fillings
KEYS = noise_keys(bytes(range(32)), step=3)


def convolved(a, b):
    """Of lists of whole numbers, exactly, as products of two large ones."""
    width = 512

    def packed(values):
        return int.from_bytes(b"".join(x.to_bytes(width // 8, "little") for x in values), "little")

    product = (packed(a) * packed(b)).to_bytes(width // 8 * (len(a) + len(b)), "little")
    return [
        int.from_bytes(product[i * width // 8 : (i + 1) * width // 8], "little") for i in range(len(a) + len(b) - 1)
    ]


@functools.cache
def cells():
    """Exact weights of the sum of the four J, from its centre upwards, and the sum of all weights."""
    one = list(integer_noise.weights())[1:]  # -511 ... 511
    two = convolved(one, one)
    four = convolved(two, two)
    assert four == four[::-1]
    return four[len(four) // 2 - 3 :], sum(four)


def filling_points(s, width=CELL):
    """How many of the width^4 fillings have the sum s."""
    ways = [(-1) ** i * math.comb(4, i) * math.comb(s - i * width + 3, 3) for i in range(4) if s >= i * width]
    return sum(ways) if 0 <= s <= 4 * (width - 1) else 0


def filling_tail(s, width=CELL):
    """How many of the width^4 fillings have a sum of at least s."""
    below = s - 1
    ways = [(-1) ** i * math.comb(4, i) * math.comb(below - i * width + 4, 4) for i in range(4) if below >= i * width]
    return width**4 - sum(ways) if s <= 4 * (width - 1) else 0


def law_at(cell, place):
    """Exact (P(N = t), P(N >= t)) times a common denominator, at t = cell * CELL + place - 2 (CELL - 1)."""
    if not 0 <= place < CELL:
        return law_at(cell + place // CELL, place % CELL)
    weights, _ = cells()
    # Cells below by i, with the fillings that reach the point from there.
    probability = sum(weights[cell - i + 3] * filling_points(place + i * CELL) for i in range(4))
    tail = sum(weights[cell - i + 3] * filling_tail(place + i * CELL) for i in range(4))
    return probability, tail + above()[cell + 1 + 3] * CELL**4


@functools.cache
def above():
    """Sums of the weights from each cell upwards."""
    total, sums = 0, []
    for weight in reversed(cells()[0]):
        total += weight
        sums.append(total)
    return [*sums[::-1], 0]


def test_the_weights_are_a_discrete_gaussian():
    weights = integer_noise.weights()
    assert sum(weights) == 2**integer_noise.TABLE_BITS and weights[1:] == weights[:0:-1]
    with mpmath.workdps(40):
        powers = [mpmath.exp(-mpmath.mpf(j * j) / (2 * 32**2)) for j in range(-511, 512)]
        for weight, power in zip(weights[1:], powers, strict=True):
            exact = power / sum(powers) * 2**integer_noise.TABLE_BITS
            assert abs(weight - exact) < (1 if weight != max(weights) else 600)


def test_the_table_has_exactly_the_weights():
    high_and_other, low = (part.astype(object) for part in integer_noise.table())
    column, found = 2**integer_noise.TABLE_BITS // integer_noise.COLUMNS, [0] * integer_noise.COLUMNS
    for c, (entry, low_bits) in enumerate(zip(high_and_other, low, strict=True)):
        threshold = int(entry >> 10) << 27 | int(low_bits)
        found[c] += threshold
        found[int(entry & 1023)] += column - threshold
    assert tuple(found) == integer_noise.weights()


def test_the_law_hides_every_shift_as_a_gaussian_does():
    """At 16 points of every cell up to 11.5 standard deviations; between them the law is a polynomial of degree 3.

    Log-concavity is decided in whole numbers. Phi^-1 of the law may grow by at most 1/s from a point to the next.
    """
    s = 2.0**grid.LAW_BITS * (1 - grid.SHORTFALL)
    denominator = cells()[1] * CELL**4
    probabilities, tails = [], []
    for cell in range(2, math.ceil(11.5 * CELLS) + 3):
        for place in [0, CELL - 1, *range(1, CELL, CELL // 14)]:
            here, tail = law_at(cell, place)
            assert here**2 >= law_at(cell, place - 1)[0] * law_at(cell, place + 1)[0], (cell, place)
            probabilities.append(here / denominator)
            tails.append((tail - here) / denominator)  # at the far end of the step, where the density is smaller
    with np.errstate(divide="ignore"):
        z = -special.ndtri_exp(np.log(tails))
    growth = np.array(probabilities) / stats.norm.pdf(z)
    assert z.max() > 11.5 and (growth <= 1 / s).all()
    # Beyond 11.5 there is a point where the growth rises: a law that goes on from there with the growth that it has is
    # log-concave as well.
    order = np.argsort(z)
    assert (np.diff(growth[order]) > 0)[z[order][1:] > 11.5].any()
    # Nor is the noise needlessly large: to 10 standard deviations the Gaussian of 2^26 is hardly exceeded.
    assert growth[z < 10].min() * 2.0**grid.LAW_BITS > 1 - 1e-4
    assert 2 * stats.norm.sf(11.5) < grid.TAIL


def test_the_formulas_of_the_law_count_every_filling():
    """On cells of three points, by enumeration."""
    sums = [sum(filling) for filling in itertools.product(range(3), repeat=4)]
    for s in range(11):
        assert filling_points(s, 3) == sums.count(s) and filling_tail(s, 3) == sum(x >= s for x in sums)


def by_hand(index, count, row=0):
    """The noise of the first coordinates of one row of an array, with whole numbers of Python."""
    table_words, low = (part.tolist() for part in integer_noise.table())
    words = []
    for data in KEYS:
        key = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), index))
        counter = jnp.concatenate([jnp.full(count, row, jnp.uint32), jnp.arange(count, dtype=jnp.uint32)])
        both = np.asarray(threefry_2x32((key[0], key[1]), counter)).tolist()
        words.append((both[:count], both[count:]))
    found = []
    for i in range(count):
        a, b = words[4][0][i], words[4][1][i]
        fillings, total = (a % 2**16, a // 2**16, b % 2**16, b // 2**16), -2 * (2**20 - 1)
        for draw in range(4):
            first, second = words[draw][0][i], words[draw][1][i]
            column, bits = first // 2**22, (first % 2**22) * 2**27 + second // 2**5
            threshold = (table_words[column] // 2**10) * 2**27 + low[column]
            j = (column if bits < threshold else table_words[column] % 2**10) - 512
            total += j * 2**20 + second % 2**4 * 2**16 + fillings[draw]
        found.append(total)
    return found


def test_the_sampler_follows_the_law():
    """Word by word, and in distribution: moments, and the mass of 64 equally likely intervals (false alarms < 1e-6)."""
    count = 2**20
    noise = np.asarray(integer_noise.add(jnp.zeros(count, jnp.int32), KEYS, 2, grid.LAW_BITS), np.int64)
    assert noise[:3000].tolist() == by_hand(2, 3000)
    edges = stats.norm.ppf(np.arange(1, 64) / 64) * 2.0**grid.LAW_BITS
    counts = np.histogram(noise, [-np.inf, *edges, np.inf])[0]
    assert stats.chisquare(counts).pvalue > 1e-6
    assert abs(noise.mean() / 2**26) < 5 / 1024 and abs(noise.std() / 2**26 - 1) < 5 / 1024 / math.sqrt(2)
    # The lowest bits are uniform, so a shift by one step shows nowhere.
    assert stats.chisquare(np.bincount(noise % 256, minlength=256)).pvalue > 1e-6


def test_arrays_chunks_and_coordinates_are_independent():
    shape = (3, 2**16)
    first, second = (np.asarray(integer_noise.add(jnp.zeros(shape, jnp.int32), KEYS, i, 26), float) for i in (0, 1))
    rows = [*first, *second]
    for i, a in enumerate(rows):
        for b in rows[:i]:
            assert abs(np.corrcoef(a, b)[0, 1]) < 5.5 / 2**8
        assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 5.5 / 2**8


@pytest.mark.parametrize("bits", [25, 20, 1])
def test_coarser_noise_is_the_finest_rounded(bits):
    total = jnp.arange(1000, dtype=jnp.int32)
    fine = np.asarray(integer_noise.add(jnp.zeros(1000, jnp.int32), KEYS, 0, 26), np.int64)
    got = np.asarray(integer_noise.add(total, KEYS, 0, bits), np.int64) - np.arange(1000)
    assert (got == np.floor(fine / 2.0 ** (26 - bits) + 0.5)).all()


def test_a_sum_wraps_around_as_whole_numbers_do():
    far = jnp.full(10, 2**31 - 1, jnp.int32)
    fine = np.asarray(integer_noise.add(jnp.zeros(10, jnp.int32), KEYS, 0, 26), np.int64)
    got = np.asarray(integer_noise.add(far, KEYS, 0, 26), np.int64)
    assert ((got - (fine + 2**31 - 1)) % 2**32 == 0).all()


def test_the_fitting_grid():
    # 700 units and noise of 1: (700 + 16) * 2^21 < 2^31 and no finer.
    assert grid.fitting_bits(1.0, 700, 250_000) == 21 and grid.largest_mean(21, 1.0, 700) > 1
    for noise, cap, parameters in [
        (0.3, 50, 10**4),
        (1.0, 10**4, 10**6),
        (50.0, 10**5, 10**8),
        (0.6, 5 * 10**5, 10**9),
    ]:
        bits = grid.fitting_bits(noise, cap, parameters)
        steps = grid.sensitivity_steps(bits, noise)
        assert steps <= 2**24 and 16 * 2**bits <= 2**30
        rounding = math.sqrt(parameters) / 2 / steps
        assert grid.largest_mean(bits, noise, cap) >= 1 or rounding > 0.0025, "coarser would still be fine enough"
        assert rounding < 0.0051 or bits == grid.LAW_BITS


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (4, 6, 5), (2, 3, 4, 8), (3, 70_000)])
def test_the_noise_of_a_coordinate_is_that_of_its_row_and_column(shape):
    noise = np.asarray(integer_noise.add(jnp.zeros(shape, jnp.int32), KEYS, 3, 26))
    table = noise.reshape(-1, shape[-1] if shape else 1)
    for row in range(len(table)):
        assert table[row, :40].tolist() == by_hand(3, min(40, table.shape[1]), row)


@pytest.mark.parametrize("shape, axis", [((64,), 0), ((6, 2**17), 1), ((2**14 + 2, 9), 0), ((3, 8, 5, 6), 1)])
def test_the_bits_do_not_depend_on_which_device_makes_them(shape, axis):
    total = jnp.asarray(np.random.default_rng(0).integers(-(2**20), 2**20, shape), jnp.int32)
    alone = jax.jit(lambda x: integer_noise.add(x, KEYS, 2, 20))(total)
    spec = PartitionSpec(*["data" if i == axis else None for i in range(len(shape))])
    shards = functools.partial(in_shards, mesh_lib.make("data:2"), [PartitionSpec(), PartitionSpec(), spec])
    together = jax.jit(lambda x: integer_noise.add(x, KEYS, 2, 20, shards))(total)
    np.testing.assert_array_equal(alone, together)


def test_an_array_with_more_coordinates_than_counters_is_refused():
    with pytest.raises(ValueError, match="2\\^32"):
        jax.eval_shape(lambda: integer_noise.add(jnp.zeros((2**17, 2**16, 1), jnp.int32), KEYS, 0, 20))
