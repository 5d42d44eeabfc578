"""What a run would train on and with which noise, before it is trained; for users, whether to draw them or their rows.

Everything here is a fact about private data, for the operator alone.
"""

import dataclasses
import math

import numpy as np

from accounting import calibration
from accounting.accountant import Accountant
from accounting.mechanism import Mechanism
from dpgemma.choices import USER
from dpgemma.data.limits import Kept, RowStore
from dpgemma.data.text.units import Found
from dpgemma.privacy.clipping import Strategy
from dpgemma.training import data
from dpgemma.training import plan as plan_lib
from dpgemma.training.settings import Settings

_MOST_ROWS = 64  # of the table over k
_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Choice:
    """What it costs to keep at most k rows of every user, at equal epsilon and equally many rows in a step.

    Attributes:
      rows_per_unit: k.
      rows_kept: rows of all users.
      users: M, expected users of a step where users are drawn, each with the mean gradient of his rows.
      noise_of_users: noise multiplier where users are drawn.
      rows: R, expected rows of a step, equal for both kinds of drawing.
      noise_of_rows: noise multiplier where rows are drawn one by one.
      epsilon_of_rows: epsilon of drawing rows with the noise of users.
      largest_ratio: (noise_of_rows / R) / (noise_of_users / M). If users' mean gradients have this share of the norm of
        single rows' gradients, and the clip norm of users is smaller by it, both kinds of drawing have equal noise;
        below it, drawing users has less (compared as in Charles et al. 2024, arXiv 2407.07737).
    """

    rows_per_unit: int
    rows_kept: int
    users: float
    noise_of_users: float
    rows: float
    noise_of_rows: float
    epsilon_of_rows: float

    @property
    def largest_ratio(self) -> float:
        return (self.noise_of_rows / self.rows) / (self.noise_of_users / self.users)

    @property
    def preferred(self) -> str:
        """What to draw: "user" or "example", or what it depends on."""
        # Mean gradients of r independent rows have 1 / sqrt(r) of their norm, of r equal ones all of it.
        independent = 1 / math.sqrt(self.rows / self.users)
        if self.largest_ratio >= 1 - 2 * _TOLERANCE:  # as for one row each, where both ways are one
            return "user"
        if self.largest_ratio < independent:
            return "example"
        return f"user, if mean gradients are shorter than {self.largest_ratio:.2f} of single ones"


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What `dpgemma data stats` says.

    Attributes:
      found: the units.
      rows_of_units: int64 [units], rows of every unit before any are left out; None where each has one.
      training_units: expected number, without those held out.
      plan: what `train` would do, but for devices, whose number rounds the cap.
      choices: for users, by k.
    """

    found: Found
    rows_of_units: np.ndarray | None
    training_units: int
    plan: plan_lib.Plan
    choices: tuple[Choice, ...]


def of(settings: Settings, *, epsilon_given: bool) -> Statistics:
    """The statistics of the data that the settings name.

    Raises:
      InputError: data or settings that cannot be trained with.
    """
    tokenizer = data.load_tokenizer(settings)
    found = data.read(settings, tokenizer, 2**31, bytes(32))
    counts = _counts(found)
    shared = None if found.users is None else found.units.num_units
    count = found.units.num_units if found.users is None else found.users
    training = max(1, round((1 - settings.holdout_fraction) * count))
    if settings.num_units is not None:
        training = settings.num_units
    settings = settings.with_fitting_batch(training * settings.items_per_unit if shared is None else shared)
    plan = plan_lib.resolve(
        settings, training, 1, "data:1", Strategy(), epsilon_given=epsilon_given, shared_items=shared
    )
    choices: tuple[Choice, ...] = ()
    if found.privacy_unit == USER and counts is not None and plan.mechanism.is_private:
        choices = tuple(_choices(plan, counts, 1 - settings.holdout_fraction, found.units.max_rows))
    return Statistics(found, counts, training, plan, choices)


def _counts(found: Found) -> np.ndarray | None:
    if not isinstance(found.units, Kept) or (found.units.max_rows == 1 and found.units_cut == 0):
        return None
    store: RowStore = found.units.store
    return np.diff(store.first_rows(np.arange(store.num_units + 1)))


def _choices(plan: plan_lib.Plan, counts: np.ndarray, kept_share: float, own: int) -> list[Choice]:
    """One for each power of two, up to what the largest users have.

    Args:
      kept_share: share of the units that are not held out.
      own: k of the plan, from which the rows of a step are taken.
    """
    m, training = plan.mechanism, plan.mechanism.num_units
    most = min(int(counts.max()), _MOST_ROWS)
    limits = [2**i for i in range(most.bit_length() + 1) if 2**i < 2 * most]
    share = kept_share

    def kept(k: int) -> float:
        return float(np.minimum(counts, k).sum()) * share

    found, in_step = [], m.expected_batch_size * kept(own) / m.num_items
    for k in limits:
        if in_step > kept(k):
            continue  # there are not so many rows
        users = in_step / (kept(k) / training)
        alike = dict(max_batch_size=None, noise_multiplier=1.0)
        of_users = _solved(m.replace(items_per_unit=1, expected_batch_size=users, **alike), plan)
        of_rows = m.replace(items_per_unit=k, expected_batch_size=in_step / kept(k) * training * k, **alike)
        with_noise_of_users = of_rows.replace(noise_multiplier=of_users.noise_multiplier)
        found.append(
            Choice(
                k,
                round(kept(k)),
                users,
                of_users.noise_multiplier,
                in_step,
                _solved(of_rows, plan).noise_multiplier,
                Accountant(with_noise_of_users).quick_upper(plan.delta),
            )
        )
    return found


def _solved(mechanism: Mechanism, plan: plan_lib.Plan) -> Mechanism:
    return calibration.noise_multiplier(mechanism, plan.epsilon, plan.delta, tolerance=_TOLERANCE)
