"""Which settings of canaries go together, with each other and with the rest of a run."""

import math
from typing import TYPE_CHECKING

from accounting.errors import InputError
from dpgemma import choices

if TYPE_CHECKING:
    from dpgemma.training.settings import Settings

# Units that one canary may take.
_MOST_REPEATS = 10_000


def repeats(text: str | None) -> tuple[int, ...]:
    """As how many units canaries are planted, in turn.

    >>> repeats("1,4"), repeats(None)
    ((1, 4), (1,))

    Raises:
      InputError: something else than numbers.
    """
    parts = ("1" if text is None else text).split(",")
    if not all(part.strip().isdecimal() and 1 <= int(part) <= _MOST_REPEATS for part in parts):
        raise InputError(
            f"`canary_repeats` must be numbers from 1 to {_MOST_REPEATS}, separated by commas, got {text!r}"
        )
    return tuple(map(int, parts))


def check(settings: "Settings") -> None:
    """Refuses canaries that cannot be planted with the other settings.

    Raises:
      InputError: one sentence says why.
    """
    if settings.canaries < 0:
        raise InputError(f"`canaries` must not be negative, got {settings.canaries}")
    others = ("canary_kind", "canary_repeats", "canary_model", "canary_temperature")
    given = [name for name in others if getattr(settings, name) is not None]
    if given and not settings.canaries:
        raise InputError(f"`{given[0]}` says what canaries are, and there are none: give `canaries` too")
    if not settings.canaries:
        return
    if settings.user_sampling == choices.BY_EXAMPLE:
        raise InputError("a canary is drawn as a whole unit: drop `canaries`, or `user_sampling`=example")
    times = settings.planted_repeats
    if settings.kind_of_canary == choices.GRADIENT:
        if settings.clipping not in (choices.AUTO, choices.EXAMPLE_SCAN, choices.VMAP):
            raise InputError(
                f"`canary_kind`=gradient needs gradients that are formed, which `clipping`={settings.clipping} does not"
                f" do: give {choices.EXAMPLE_SCAN}, or another kind"
            )
        if settings.clip_quantile is not None:
            raise InputError(
                "`canary_kind`=gradient has gradients that are always clipped, which a clip norm would follow: drop"
                " `clip_quantile`"
            )
        if times != (1,):
            raise InputError("`canary_kind`=gradient has nothing to memorise: drop `canary_repeats`")
        if math.isinf(settings.clip_norm):
            raise InputError("`canary_kind`=gradient needs a finite `clip_norm`, to which its gradients are clipped")
    if settings.kind_of_canary == choices.NEW_TOKEN and times != (1,):
        raise InputError(
            "`canary_kind`=new_token has one token to learn, which is no passage to memorise: drop `canary_repeats`"
        )
    if settings.kind_of_canary != choices.SYNTHETIC:
        if settings.canary_model is not None or settings.canary_temperature is not None:
            raise InputError(
                "`canary_model` and `canary_temperature` sample canaries of the kind synthetic: give"
                " `canary_kind`=synthetic, or neither of them"
            )
        return
    if settings.canary_model is None and settings.init_from is None:
        raise InputError("`canary_kind`=synthetic is sampled from a model: give `canary_model`=FOLDER")
    if settings.canary_temperature is not None and not 0.8 <= settings.canary_temperature <= 10:
        raise InputError(
            f"`canary_temperature` must lie between 0.8 and 10, got {settings.canary_temperature:g}: colder texts"
            " resemble each other, and whether one was learned shows less"
        )
