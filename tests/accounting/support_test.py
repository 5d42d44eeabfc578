import itertools

import pytest

from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.mechanism import ADD_OR_REMOVE, RELATIONS, ZERO_OUT, bounds, dp_sgd

SCHEMES = {
    "poisson": dict(expected_batch_size=10, max_batch_size=None),
    "truncated_poisson": dict(expected_batch_size=10, max_batch_size=40),
    "full_batch": dict(expected_batch_size=100, max_batch_size=None),
    "fixed": dict(expected_batch_size=10, max_batch_size=None, sampler="fixed"),
}
# (sampling, relation, bound) that have a proof; written out again, so that a change of the table has to be meant.
PROVEN = {
    *itertools.product(("poisson", "full_batch"), RELATIONS, ("loss_distribution", "renyi")),
    ("fixed", ZERO_OUT, "loss_distribution"),
    ("fixed", ZERO_OUT, "renyi"),
    *(
        (("truncated_poisson", relation, bound))
        for relation in RELATIONS
        for bound in ("loss_distribution", "additive", "renyi")
    ),
    ("truncated_poisson", ZERO_OUT, "displacement"),
    ("truncated_poisson", ZERO_OUT, "truncated_loss"),
}


@pytest.mark.parametrize("scheme, relation, bound", list(itertools.product(SCHEMES, RELATIONS, bounds.BOUNDS)))
def test_pitfall_28_only_proven_combinations_are_accounted(scheme, relation, bound):
    m = dp_sgd(100, noise_multiplier=2.0, clip_norm=1.0, steps=3, neighbouring_relation=relation, **SCHEMES[scheme])
    assert m.scheme == scheme
    if (scheme, relation, bound) in PROVEN:
        Accountant(m, bounds=(bound,))
    else:
        with pytest.raises(InputError, match=f"{bound} does not hold for {scheme} sampling under {relation}: "):
            Accountant(m, bounds=(bound,))


@pytest.mark.parametrize("bound", ["renyi", "truncated_loss"])
def test_bounds_for_one_unit_are_refused_for_groups(bound):
    m = dp_sgd(100, 10, 40, 2.0, 1.0, 3, ZERO_OUT)
    with pytest.raises(InputError, match="derived for a unit of one item"):
        Accountant(m, bounds=(bound,), group_size=2)


def test_other_relations_samplers_and_bounds_do_not_exist():
    with pytest.raises(InputError, match="neighbouring relation must be one of"):
        dp_sgd(100, 10, None, 1.0, 1.0, 1, "replace_one")
    with pytest.raises(InputError, match="sampler must be one of"):
        dp_sgd(100, 10, None, 1.0, 1.0, 1, sampler="shuffled")
    with pytest.raises(InputError, match="unknown bound"):
        Accountant(dp_sgd(100, 10, None, 1.0, 1.0, 1), bounds=("gdp_clt",))


def test_runs_under_different_relations_do_not_compose():
    runs = [dp_sgd(100, 10, None, 1.0, 1.0, 1, relation) for relation in (ZERO_OUT, ADD_OR_REMOVE)]
    with pytest.raises(InputError, match="do not compose"):
        Accountant(runs)


def test_fixed_batches_cost_one_gaussian_for_every_epoch():
    fixed = dp_sgd(1000, 100, None, 3.0, 1.0, 25, ZERO_OUT, sampler="fixed")  # each unit in at most 3 of 25 batches
    gaussian = dp_sgd(1000, 1000, None, 3.0, 1.0, 3, ZERO_OUT)
    sampled = dp_sgd(1000, 100, None, 3.0, 1.0, 25, ZERO_OUT)
    assert Accountant(fixed).epsilon(1e-5) == Accountant(gaussian).epsilon(1e-5)
    assert Accountant(sampled).epsilon(1e-5).upper < Accountant(fixed).epsilon(1e-5).lower


def test_a_restricted_accountant_is_never_below_the_free_one():
    m = dp_sgd(10_000, 500, 580, 1.0, 1.0, 100, ZERO_OUT)
    free = Accountant(m).upper(1e-6, interval=1e-3)
    for names in (("additive", "loss_distribution"), ("displacement", "loss_distribution")):
        assert Accountant(m, bounds=names).upper(1e-6, interval=1e-3) >= free
