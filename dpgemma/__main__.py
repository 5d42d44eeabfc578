"""python -m dpgemma COMMAND is the same as dpgemma COMMAND."""

from dpgemma.cli import entry_point

if __name__ == "__main__":
    entry_point()
