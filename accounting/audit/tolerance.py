"""How far computed numbers may differ on another machine."""

import math
from typing import Any

from accounting import rounding

TOLERANCE = 1e-6  # relative


def same_rounded(reported: float, upper: float) -> bool:
    """Whether a reported number is the rounded form of an upper bound, up to the last bits of the bound."""
    is_rounded = rounding.round_up(reported) == reported
    return is_rounded and rounding.round_up(upper * (1 - TOLERANCE)) <= reported <= rounding.round_up(
        upper * (1 + TOLERANCE)
    )


def is_close(have: Any, want: Any) -> bool:
    """Whether two values are numbers that nearly agree."""
    try:
        return math.isclose(have, want, rel_tol=TOLERANCE)
    except (TypeError, OverflowError):  # no numbers, or one that no float holds
        return False
