"""absl flags of a command, in a set of their own, so that no library's flags appear in its help."""

import dataclasses
import math
import typing
from typing import Any

from absl import flags

from accounting.errors import as_flags

LARGEST_COUNT = 10**18


class _CountParser(flags.ArgumentParser):
    """Whole numbers, 1e7 included."""

    syntactic_help = "a whole number"

    def parse(self, argument: Any) -> Any:
        try:
            value = float(argument)
        except (ValueError, OverflowError):
            value = math.nan
        if not value.is_integer():
            raise ValueError(f"{argument!r} is not a whole number")
        if abs(value) > LARGEST_COUNT:
            raise ValueError(f"it must be at most {LARGEST_COUNT:.0e}")
        try:
            return int(argument)
        except ValueError:
            return int(value)

    def flag_type(self) -> str:
        return "int"


class _NumberParser(flags.ArgumentParser):
    """Floating-point numbers, inf included, NaN not.

    Args:
      hint: what to give in place of what is no number.
    """

    syntactic_help = "a number"

    def __init__(self, hint: str = "") -> None:
        self._hint = f": {hint}" if hint else ""

    def parse(self, argument: Any) -> Any:
        try:
            value = float(argument)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise ValueError(f"{argument!r} is not a number{self._hint}")
        return value

    def flag_type(self) -> str:
        return "float"


def count(name: str, default: int | None, text: str, fv: flags.FlagValues) -> None:
    flags.DEFINE(_CountParser(), name, default, text, fv, flags.ArgumentSerializer())


def number(name: str, default: float | None, text: str, fv: flags.FlagValues, hint: str = "") -> None:
    flags.DEFINE(_NumberParser(hint), name, default, text, fv, flags.ArgumentSerializer())


def string(name: str, default: str | None, text: str, fv: flags.FlagValues) -> None:
    flags.DEFINE_string(name, default, text, fv)


def strings(name: str, text: str, fv: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(name, None, text, fv)


def choice(name: str, default: str, choices: tuple[str, ...], text: str, fv: flags.FlagValues) -> None:
    flags.DEFINE_enum(name, default, choices, text, fv)


def switch(name: str, text: str, fv: flags.FlagValues, default: bool = False) -> None:
    flags.DEFINE_boolean(name, default, text, fv)


def define_from_dataclass(settings: type, fv: flags.FlagValues) -> None:
    """One flag per field: its default, its help and its choices come from the field."""
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        text, choices = field.metadata["help"], field.metadata["choices"]
        kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
        default: typing.Any = field.default
        if bool in kinds:
            switch(field.name, text, fv, default)
        elif choices:
            choice(field.name, default, choices, text, fv)
        else:
            define = count if int in kinds else number if float in kinds else string
            define(field.name, default, text, fv)


def help_text(command: str, description: str, fv: flags.FlagValues) -> str:
    """What `dpgemma COMMAND --help` prints."""
    lines = [f"dpgemma {command}: {description}", "", "Flags:"]
    for name in fv:
        flag = fv[name]
        value = "" if flag.default is None else f" (default {str(flag.default_as_str).strip(chr(39))})"
        choices = f" One of {', '.join(flag.parser.enum_values)}." if isinstance(flag.parser, flags.EnumParser) else ""
        lines += [f"  --{name}{value}", f"      {as_flags(str(flag.help))}{choices}"]
    return "\n".join(lines)
