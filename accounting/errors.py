"""The one exception that means: the input is wrong, and this sentence says what to do.

Settings stand in backquotes in the text. A library user reads `batch_size`; the command line, whose settings are flags,
writes --batch_size instead.
"""

import re

_SETTING = re.compile(r"`([a-z][a-z0-9_]*)`")


def as_flags(text: str) -> str:
    """A text with every setting spelt as a flag.

    >>> as_flags("`batch_size`=5 exceeds the 3 units: lower `batch_size`")
    '--batch_size=5 exceeds the 3 units: lower --batch_size'
    """
    return _SETTING.sub(r"--\1", text)


class InputError(ValueError):
    """Shown to the user as one sentence, without a traceback; the program exits with code 2.

    >>> InputError("`steps` must be at least 1, got 0").settings
    ('steps',)
    """

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that the sentence names, in order."""
        return tuple(dict.fromkeys(_SETTING.findall(str(self))))
