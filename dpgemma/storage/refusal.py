"""Libraries that write files in their own way, and what they raise where the disk refuses."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def as_os_errors(path: pathlib.Path, *kinds: type[Exception]) -> Iterator[None]:
    """Raises what a library says of a disk that refuses as Python does.

    Args:
      path: that the library writes.
      kinds: of exceptions that it raises where it cannot.

    Raises:
      OSError: with the reason that stands in the library's message, or as a failure of input and output.
    """
    try:
        yield
    except kinds as error:
        said = str(error)
        known = (code for code in errno.errorcode if os.strerror(code) in said)
        reason = next(known, errno.EIO)
        raise OSError(reason, os.strerror(reason), str(path)) from error
