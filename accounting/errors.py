"""The one exception that means: the input is wrong, and this sentence says what to do."""


class InputError(ValueError):
    """Shown to the user as one sentence, without a traceback; the program exits with code 2."""
