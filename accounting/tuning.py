"""What it costs to choose: several runs on the same data, or the best of a random number of trials."""

import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from accounting import rounding, run_files, support
from accounting.accountant import Accountant, smallest_epsilon
from accounting.errors import InputError
from accounting.ledger import chain as ledger
from accounting.ledger import events, histogram
from accounting.ledger import executed as executed_lib
from accounting.ledger.executed import Executed, mechanisms_of
from accounting.ledger.history import Lineage
from accounting.loss_distribution.truncation import additive_delta, displacement_delta
from accounting.mechanism import Mechanism
from accounting.mechanism import bounds as proofs
from accounting.report import words

# Shape eta of the truncated negative binomial distribution of the number of trials; infinity is the Poisson
# distribution.
DISTRIBUTIONS = {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}


def runs(folders: Sequence[pathlib.Path]) -> dict[pathlib.Path, Executed]:
    """What the ledgers of several runs prove; finished or not, every executed step counts.

    Raises:
      InputError: a folder without a sound ledger, a folder given twice, a run whose noise was no secret, or runs whose
        guarantees speak of different things.
    """
    found: dict[pathlib.Path, Executed] = {}
    for folder in folders:
        if folder.resolve() in {other.resolve() for other in found}:
            raise InputError(f"{folder} is given twice: give every folder once")
        path = folder / run_files.LEDGER
        if not path.is_file():
            raise InputError(f"{folder} is no run directory: it has no {run_files.LEDGER}")
        found[folder] = executed_lib.of(ledger.read(path))
        if len(found[folder].also) > 1:
            raise InputError(
                f"the ledger of {folder} holds several histograms, and a run releases one: run dpgemma audit"
            )
        if not found[folder].has_secret_keys:
            raise InputError(
                f"the noise of {folder} was made from a public seed: it hides nothing, so no epsilon holds for that run"
            )
    if not any(run.has_spent for run in found.values()):
        raise InputError("none of the runs has executed a step")
    for what in (
        "privacy_unit",
        "user_field",
        "ownership",
        "sequence_length",
        "neighbouring_relation",
        "vocab_size",
        "number of units, held-out ones included",
    ):
        values = {str(_compared(run, what)) for run in found.values()}
        if len(values) > 1:
            raise InputError(f"the runs differ in {what} ({', '.join(sorted(values))}): their guarantees do not add up")
    _check_copies(found)
    return found


def _check_copies(found: dict[pathlib.Path, Executed]) -> None:
    """Copies of one run add up only if what they share and what they do not can be told apart.

    Raises:
      InputError: ledgers of one name that cannot be copies of one run, copies whose noise was not bound to places, or
        copies that released different counts under one noise.
    """
    for (a, one), (b, other) in itertools.combinations(found.items(), 2):
        if one.declared["run_id"] != other.declared["run_id"]:
            continue
        if one.declared != other.declared:
            raise InputError(f"{a} and {b} claim to be one run and begin differently: one of their ledgers is forged")
        counts = [histogram.of(run.events, run.planned.num_units) for run in (one, other)]
        if None not in counts and counts[0] != counts[1]:
            raise InputError(
                f"{a} and {b} are copies of one run and released different counts under the same noise: no epsilon"
                " holds for them together"
            )
        shorter, longer = sorted((one, other), key=lambda run: run.steps)
        if one.version < events.PLACES and shorter.events != longer.events[: len(shorter.events)]:
            raise InputError(
                f"{a} and {b} are copies of one run that went on separately, by a version whose copies had equal noise:"
                " no epsilon holds for them together"
            )


def released(found: dict[pathlib.Path, Executed]) -> dict[pathlib.Path, tuple[Mechanism, ...]]:
    """What each run adds to those before it: all of its steps, but for those that are the same releases.

    Formal guarantee: the composition of all entries covers everything that the runs released together. Copies of a run
    share the steps that were executed in the same places after the same steps, because these have equal bits; every
    other step has noise of its own and counts. Tested by
    tests/accounting/tuning_test.py::test_a_fork_costs_what_it_adds.
    """
    seen: set[tuple[str, int, Lineage]] = set()
    parts = {}
    for folder, run in found.items():
        own = {(run.declared["run_id"], *execution): record for execution, record in run.history.executions.items()}
        parts[folder] = mechanisms_of(run.planned, [record for key, record in own.items() if key not in seen])
        seen |= own.keys()
    return parts


def histograms(found: dict[pathlib.Path, Executed]) -> tuple[Mechanism, ...]:
    """What the runs released beside their steps.

    Formal guarantee: every histogram counts, but for those that copies of one run share, which are equal: `runs` has
    refused others. Tested by tests/accounting/tuning_test.py::test_histograms_of_runs_add_up.
    """
    of_runs = {run.declared["run_id"]: run.also for run in found.values() if run.also}
    return tuple(mechanism for also in of_runs.values() for mechanism in also)


def accountant(found: dict[pathlib.Path, Executed]) -> Accountant:
    """Of all that the runs released together."""
    steps = [mechanism for mechanisms in released(found).values() for mechanism in mechanisms]
    no_step = next(iter(found.values())).planned.replace(steps=0)
    return Accountant(steps or no_step, also=histograms(found))


def _compared(run: Executed, what: str) -> Any:
    """A fact in which runs must agree: otherwise their privacy units differ, and their guarantees do not add up."""
    facts = run.declared
    if what == "vocab_size":
        # Rows of packed text are cut by tokens.
        return facts["architecture"].get(what) if facts["privacy_unit"] == "sequence" else None
    if what == "ownership":  # records had one user each before ledgers said so
        return facts.get(what) == "public"
    if what in facts or what == "user_field":
        return facts.get(what)
    held_out = facts.get("held_out_units")
    return None if held_out is None else run.planned.num_units + held_out


def statement(found: dict[pathlib.Path, Executed], epsilon: float, delta: float) -> str:
    """What holds for several runs together, whoever sees all of their results."""
    first = next(iter(found.values()))
    if not math.isfinite(epsilon):
        return "NO PRIVACY: at least one of the runs is a non-private baseline, and together they have no guarantee."
    who = "This run is" if len(found) == 1 else f"All {len(found)} runs together are"
    copies = len(found) - len({run.declared["run_id"] for run in found.values()})
    shared = (
        f" {copies} of them {'is a copy' if copies == 1 else 'are copies'} of another: steps that both executed in the"
        " same environments count once, all others for themselves."
        if copies
        else ""
    )
    return (
        f"{who} ({rounding.round_up(epsilon)}, {float(delta)!r})-differentially private with respect to one unit, which"
        f" is {words.unit_text(first.declared)}. Neighbouring data sets: {words.relation_text(first.planned)}. This"
        f" covers {'every histogram and ' if any(run.also for run in found.values()) else ''}every checkpoint of every"
        " run, and every choice between them that looks at nothing else of the data."
        + shared
        + words.origin_text([run.declared for run in found.values()])
        + "".join(f" In {folder}, {line}." for folder, run in found.items() for line in run.deviations)
    )


def random_search_epsilon(mechanism: Mechanism, trials: float, distribution: str, delta: float) -> float:
    """Epsilon of running the mechanism K times, each with settings drawn at random, and releasing the best result only.

    Formal guarantee: where K is drawn from `distribution` with mean `trials`, independently of the data, nothing but
    the best trial's parameters is released, and trials are compared by their parameters alone (and data that the
    guarantee does not speak of, such as a public validation set), the selection is (epsilon, delta)-differentially
    private (Papernot and Steinke 2021, arXiv 2110.03620, theorems 2 and 6, as dp-accounting computes them). A choice by
    a loss on the units themselves is not covered: that loss would have to be part of what each trial releases
    privately. Nor is a fixed number of trials: that is the composition of all of them. Tested by
    tests/accounting/tuning_test.py::test_pitfall_25_random_search_costs_what_papernot_and_steinke_prove.

    Args:
      trials: expected number of trials; at least 1.

    Raises:
      InputError: an unknown distribution, fewer than one expected trial, or a mechanism without noise.
    """
    from dp_accounting import dp_event
    from dp_accounting.rdp import rdp_privacy_accountant

    if distribution not in DISTRIBUTIONS:
        raise InputError(f"trials must be distributed as one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    if not 1 <= trials < math.inf:
        raise InputError(f"the expected number of trials must be at least 1 and finite, got {trials:g}")
    if not mechanism.is_private:
        return math.inf
    support.check(mechanism.sampling, mechanism.neighbouring_relation, (proofs.RENYI,))
    releases = mechanism.sampling.releases(mechanism.steps)
    event = dp_event.RepeatAndSelectDpEvent(mechanism.event(releases), trials, DISTRIBUTIONS[distribution])
    accountant = rdp_privacy_accountant.RdpAccountant()
    accountant.compose(event)
    # What truncation costs in all trials together. The displacement bound holds because its rare steps do not depend on
    # the data, and because leaving out the trials that have one keeps each of these distributions in its family, with a
    # smaller mean.
    displaces = proofs.DISPLACEMENT in support.allowed(mechanism.sampling, mechanism.neighbouring_relation)

    def extra(epsilon: float) -> float:
        additive = additive_delta(mechanism, epsilon, releases)
        return trials * (min(additive, displacement_delta(mechanism, releases)) if displaces else additive)

    return smallest_epsilon(lambda d: float(accountant.get_epsilon(d)), delta, extra)
