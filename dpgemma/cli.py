"""The program `dpgemma COMMAND --flags`.

Exit codes: 0 done, 1 the check found something or a run of a sweep failed, 2 bad input, 3 another process of the run
died or failed. Nothing heavy is imported before a command runs, so that --help answers at once.
"""

import importlib
import os
import sys

from absl import flags

import dpgemma
from accounting.errors import InputError, as_flags, is_out_of_memory
from dpgemma.commands import process

# Name, module, description.
COMMANDS = {
    "train": ("dpgemma.commands.train", "train or fine-tune under a privacy budget; the same command resumes"),
    "data": ("dpgemma.commands.data", "look at data before they are trained on, or tokenise them once"),
    "account": ("dpgemma.commands.account", "solve a privacy budget for the one omitted quantity"),
    "plan": (
        "experiments.commands.plan",
        "find the best model, batch and steps for a budget, or what a run needs on a machine",
    ),
    "audit": ("dpgemma.commands.audit", "check a run's epsilon report from its ledger"),
    "evaluate": ("dpgemma.commands.evaluate", "measure a model on records of your own"),
    "sample": ("dpgemma.commands.sample", "generate text from a checkpoint"),
    "synthesize": ("dpgemma.commands.synthesize", "sample a corpus of text that may be shared as far as the model may"),
    "export": ("dpgemma.commands.export", "write a Hugging Face directory"),
    "sweep": ("experiments.commands.sweep", "run a grid of trainings; the same command goes on"),
}
# So long is no flag's name; absl's search for a similar one would take hours.
_LONGEST_NAME = 100
_HELP = ("--help", "-h", "-help", "help")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dpgemma COMMAND [--flags]",
            "",
            *lines,
            "",
            "dpgemma COMMAND --help lists the flags of one command; dpgemma --version says which version this is.",
        ]
    )


def _fail(message: object) -> int:
    print(f"dpgemma: {as_flags(' '.join(str(message).split()))}", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print(_usage(), file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in _HELP:
        print(_usage())
        return 0
    if name == "--version":
        print(f"dpgemma {dpgemma.__version__}")
        return 0
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}: use one of {', '.join(COMMANDS)}")
    with process.temporarily(process.install_quiet_hooks):
        return _run(name, rest)


def _run(name: str, rest: list[str]) -> int:
    command = importlib.import_module(COMMANDS[name][0])
    fv = flags.FlagValues()
    command.define_flags(fv)
    try:
        if any(argument in _HELP[:3] for argument in rest):
            from dpgemma.commands import command_flags

            print(command_flags.help_text(name, command.DESCRIPTION, fv), flush=True)
            return 0
        _refuse_repeated(fv, rest)
        positional = fv([name, *rest])[1:]
        for flag in getattr(command, "POSITIONAL", ()):
            if positional and not fv[flag].present:
                fv[flag].value = positional.pop(0)
        if positional:
            raise InputError(f"unexpected argument {positional[0]!r}: settings are given as --name=value")
        return command.run(fv)
    except (InputError, flags.Error) as error:
        return _fail(error)
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stdout = open(os.devnull, "w")
        return 141  # as shells say of a closed pipe
    except OSError as error:
        place = f" at {error.filename}" if error.filename else ""
        return _fail(f"the disk refused{place}: {error.strerror or error}; nothing that was saved before is lost")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail(
            "the memory is used up; nothing that was saved before is lost: close other programs, or take a smaller"
            " model or fewer records; train needs less with --microbatch_size=1, --remat=block or more devices"
        )
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "interrupted; nothing that was saved before is lost")


def _refuse_repeated(fv: flags.FlagValues, arguments: list[str]) -> None:
    """Refuses a flag that is given twice, because only its last value would count.

    What a flag file says may be overruled by a flag beside it.

    Raises:
      InputError: names the flag.
    """
    seen: set[str] = set()
    words = iter(arguments)
    for word in words:
        if word == "--":
            return
        if not word.startswith("-"):
            continue
        name, has_value, _ = word.lstrip("-").partition("=")
        name = name if name in fv else name.removeprefix("no")
        if len(name) > _LONGEST_NAME:
            raise InputError(f"there is no flag {name[:_LONGEST_NAME]!r}...: see `dpgemma COMMAND --help`")
        if name not in fv or isinstance(fv[name], flags.MultiFlag):
            continue
        if name in seen:
            raise InputError(f"--{name} is given twice, and only one value can hold: give it once")
        seen.add(name)
        if not has_value and not fv[name].boolean:
            next(words, None)


def entry_point() -> None:
    """The program itself: hooks stay until the process ends, because threads of libraries report until then."""
    process.install_quiet_hooks()
    code = main()
    if "jax" in sys.modules:
        from dpgemma.commands import peers

        peers.leave(code)
    sys.exit(code)
