"""Writes the reference of the commands, docs/reference/*.md, from what --help prints.

python docs/generate.py
"""

import importlib
import pathlib

from absl import flags

from dpgemma import cli
from dpgemma.commands import command_flags

FOLDER = pathlib.Path(__file__).parent / "reference"


def page(name: str) -> str:
    """The reference of one command."""
    module, text = cli.COMMANDS[name]
    command = importlib.import_module(module)
    fv = flags.FlagValues()
    command.define_flags(fv)
    help_text = command_flags.help_text(name, command.DESCRIPTION, fv)
    return f"# dpgemma {name}\n\n{text[0].upper()}{text[1:]}.\n\n```\n{help_text}\n```\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in cli.COMMANDS:
        (FOLDER / f"{name}.md").write_text(page(name))


if __name__ == "__main__":
    main()
