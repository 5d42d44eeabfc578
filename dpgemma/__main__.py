"""Lets `python -m dpgemma COMMAND` do what `dpgemma COMMAND` does."""

from dpgemma.cli import entry_point

if __name__ == "__main__":
    entry_point()
