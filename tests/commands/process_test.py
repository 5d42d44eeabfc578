"""What the command line changes in its process is what it found again when it is done, whatever happened."""

import logging
import os
import signal
import sys

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
        with process.quiet(), process.deterministic_sums(), process.stop_on_signal(), process.interrupt_on_sigterm():
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


def test_a_bug_is_still_printed_after_a_failed_checkpoint():
    """The hook drops what passed through the storage layers, and nothing else."""
    printed = []
    before, sys.excepthook = sys.excepthook, lambda *error: printed.append(error[1])
    try:
        with process.quiet():
            for filename in ("orbax/checkpoint/handler.py", "dpgemma/training/step.py"):
                try:
                    exec(compile("raise ValueError(__file__)", filename, "exec"), {"__file__": filename})
                except ValueError as error:
                    sys.excepthook(type(error), error, error.__traceback__)
    finally:
        sys.excepthook = before
    assert [str(error) for error in printed] == ["dpgemma/training/step.py"]
