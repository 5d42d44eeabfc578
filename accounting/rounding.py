"""Decimals that never lie below the number that they stand for."""

import decimal
import math

# Enough digits for any float64 written out in full.
_EXACT = decimal.Context(prec=400)


def round_up(value: float, digits: int = 4) -> float:
    """The smallest decimal of `digits` places that is not below `value`: an upper bound must not be rounded down.

    A number that is such a decimal already stays as it is, so an auditor who rounds a reported number again gets the
    same.

    >>> round_up(1.70991)
    1.71
    """
    if not math.isfinite(value):
        return value
    # In decimals: 0.1569 * 10**4 is 1569.0000000000002 in binary, and would go up to 0.157.
    place = decimal.Decimal(1).scaleb(-digits)
    return float(decimal.Decimal(repr(float(value))).quantize(place, decimal.ROUND_CEILING, _EXACT))


def upper(value: float, digits: int = 6) -> str:
    """An upper bound with so many significant digits, rounded up.

    >>> upper(0.5224001, 4)
    '0.5225'
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exact = decimal.Decimal(repr(float(value)))
    last = decimal.Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return f"{float(exact.quantize(last, decimal.ROUND_CEILING, _EXACT)):.{digits}g}"
