"""Are the public metrics functions of public facts? Both of their numbers are computed again here, from the ledger and
config.json alone, so that no private number can hide in their digits.
"""

import bisect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accounting import run_files
from accounting.accountant import Accountant
from accounting.audit.findings import Finding
from accounting.audit.tolerance import same_rounded
from accounting.ledger import events
from accounting.ledger.chain import Line
from accounting.ledger.executed import Executed
from accounting.ledger.history import History

_POINTS = 16  # of the staircase that epsilon climbs
_DIGITS = 9  # of the learning rate
_LAST_BITS = (1 - 1e-12, 1 + 1e-12)  # another machine may round a number halfway between two others otherwise
_FINAL_SHARE = 0.1  # of the peak learning rate, at the end of its decay


def recomputed(
    content: bytes,
    settings: dict[str, Any],
    lines: Sequence[Line],
    executed: Executed,
    accountant: Callable[..., Accountant],
) -> Iterator[Finding]:
    """Yields the first line whose epsilon or learning rate is not what the public facts give.

    Args:
      content: of metrics.jsonl, whose lines are known to be JSON objects with the right keys.
      settings: of config.json.
    """
    stairs: dict[int, Callable[[int], float]] = {}
    repeats = _repeats(lines)
    for number, row in enumerate(content.split(b"\n")[:-1]):  # what a crash left of a last line is written again
        stored = json.loads(row)
        if row != json.dumps(stored).encode():
            message = "it is not spelt as the program writes it"
            yield Finding("metrics_edited", f"{run_files.METRICS} line {number + 1}", message)
            return
        rate = learning_rate(settings, number)
        if stored["step"] != number or stored["learning_rate"] not in (_rounded(rate * f) for f in _LAST_BITS):
            message = f"step {stored['step']} with learning rate {stored['learning_rate']}; the settings give {rate}"
            yield Finding("metrics_edited", f"{run_files.METRICS} line {number + 1}", message)
            return
        known = repeats(number)
        for repeated in known:
            if repeated not in stairs:
                stairs[repeated] = _stairs(executed, repeated, accountant)
        epsilons = [stairs[repeated](number + 1 + repeated) for repeated in known]
        reported = run_files.decode(stored)["epsilon"]
        if not (isinstance(reported, float) and any(same_rounded(reported, value) for value in epsilons)):
            message = f"epsilon {stored['epsilon']}; the ledger gives {epsilons[-1]:.4f}"
            yield Finding("metrics_edited", f"{run_files.METRICS} line {number + 1}", message)
            return


def learning_rate(settings: dict[str, Any], step: int) -> float:
    """The learning rate of a step, from 0: linear warm-up, then decay to a tenth of the peak."""
    peak, warm_up, last = settings["learning_rate"], settings["warmup_steps"], settings["steps"]
    if step < warm_up:
        first = peak / (warm_up + 1)
        return float(first + (peak - first) * step / warm_up)
    progress = min(1.0, (step - warm_up) / max(1, last - warm_up))
    share = {
        "cosine": _FINAL_SHARE + (1 - _FINAL_SHARE) * (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - (1 - _FINAL_SHARE) * progress,
        "constant": 1.0,
    }[settings["schedule"]]
    return float(peak * share)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _stairs(executed: Executed, repeated: int, accountant: Callable[..., Accountant]) -> Callable[[int], float]:
    """Epsilon after so many releases, as a run shows it that has repeated so many steps: that of the next of 16 points,
    and never more than that of the whole run.
    """
    total = executed.planned.steps + repeated
    planned = executed.planned.replace(steps=total)
    whole = accountant(planned, also=executed.also, claimed=executed.claims_privacy)
    points = sorted({math.ceil(total * i / _POINTS) for i in range(1, _POINTS + 1)})
    known = {total: whole.epsilon(executed.delta).upper}

    def at(releases: int) -> float:
        point = points[min(bisect.bisect_left(points, releases), len(points) - 1)]
        if point not in known:
            coarse = whole.upper(executed.delta, point, whole.interval_for(executed.delta))
            known[point] = min(known[total], coarse)
        return known[point]

    return at


def _repeats(lines: Sequence[Line]) -> Callable[[int], list[int]]:
    """How many executions had been lost when the line of a step was written last; several numbers are possible where
    processes may have ended before they wrote any.
    """
    history = History()
    starts: list[tuple[int, int]] = [(0, 0)]
    settled = 1  # starts whose process is known to have come to its first step
    for line in lines:
        history.add(line.record)
        if line.record["kind"] == events.RESUME:
            starts.append((line.record["step"], history.repeated))
        elif line.record["kind"] == events.STEP:
            settled = len(starts)
    possible = [starts[:count] for count in range(settled, len(starts) + 1)]
    return lambda step: [[repeated for first, repeated in known if first <= step][-1] for known in possible]
