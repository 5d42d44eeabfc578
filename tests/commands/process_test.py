"""What the command line changes in its process is what it found again when it is done, whatever happened."""

import logging
import os
import signal
import sys
import threading

import matplotlib
import pytest

from dpgemma import cli
from dpgemma.commands import process


def state():
    return {
        "hooks": (sys.excepthook, sys.unraisablehook),
        "levels": [logging.getLogger(name).level for name in ("absl", "asyncio")],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "flags": os.environ.get("XLA_FLAGS"),
        "rcParams": dict(matplotlib.rcParams),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_every_change_is_undone(fails):
    before = state()
    try:
        with (
            process.temporarily(process.install_quiet_hooks),
            process.temporarily(process.set_deterministic_sums),
            process.stop_on_signal(),
            process.interrupt_on_sigterm(),
        ):
            assert state()["hooks"] != before["hooks"] and state()["signals"] != before["signals"]
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert state() == before


PLAN = ["account", "--num_units=1000", "--batch_size=10", "--steps=5", "--noise_multiplier=1"]


@pytest.mark.parametrize(
    "arguments, code",
    [
        ([*PLAN, "--plot={tmp}/a.svg"], 0),
        ([*PLAN, "--epsilon=3"], 2),
        (["train", "--data=/nowhere/x.txt", "--mesh=data:2"], 2),
        (["audit", "/nowhere"], 2),
        (["sweep", "/nowhere.toml"], 2),
    ],
)
def test_commands_leave_the_process_as_it_was(arguments, code, tmp_path, capsys):
    before = state()
    assert cli.main([argument.format(tmp=tmp_path) for argument in arguments]) == code
    assert state() == before


def test_bugs_are_printed_while_the_hooks_are_set():
    """The hook drops what passed through the storage layers in their own threads, and nothing else."""
    printed = []
    before, sys.excepthook = sys.excepthook, lambda *error: printed.append(str(error[1]))

    def report(*modules):
        for module in modules:
            try:
                exec("raise ValueError(__name__)", {"__name__": module})
            except ValueError as error:
                sys.excepthook(type(error), error, error.__traceback__)

    modules = ("orbax.checkpoint.handler", "tensorstore", "dpgemma.training.step", "study_of_orbax.step")
    try:
        with process.temporarily(process.install_quiet_hooks):
            report(*modules)
            thread = threading.Thread(target=report, args=modules)
            thread.start()
            thread.join()
    finally:
        sys.excepthook = before
    assert printed == [*modules, *modules[2:]]
