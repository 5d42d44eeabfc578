"""The one exception that means: the input is wrong, and this sentence says what to do. And what libraries raise where a
disk refuses, made into the one that Python has for that.

Settings stand in backquotes in the text. A library user reads `batch_size`; the command line, whose settings are flags,
writes --batch_size instead.
"""

import contextlib
import errno
import os
import pathlib
import re
from collections.abc import Iterator

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


@contextlib.contextmanager
def as_os_errors(path: pathlib.Path, *kinds: type[Exception]) -> Iterator[None]:
    """Raises what a library says of a disk that refuses as Python does.

    Args:
      path: that the library writes.
      kinds: of exceptions that it raises where it cannot.

    Raises:
      OSError: with the reason that stands in the library's message. What names no reason of the operating system is
        raised as it is.
    """
    try:
        yield
    except kinds as error:
        said = str(error)
        known = (code for code in errno.errorcode if os.strerror(code) in said)
        reason = next(known, None)
        if reason is None:
            raise
        raise OSError(reason, os.strerror(reason), str(path)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what Python, numpy or XLA raise where there is no memory left.

    >>> is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes."))
    True
    >>> is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: Error writing: No space left on device"))
    False
    """
    said = str(error)
    of_a_disk = any(os.strerror(code) in said for code in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE))
    return isinstance(error, MemoryError) or ("RESOURCE_EXHAUSTED" in said and not of_a_disk)
