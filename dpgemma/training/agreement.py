"""What the processes of one run have to agree on before its first step: flags, environment, data, and the run's folder.

Alone, a process agrees with itself.

Formal guarantee: processes whose flags, environments or data differ take no step together, so keys that are bound to
those of the first process are bound to those of all. Tested by tests/training/processes_test.py::
test_processes_that_do_not_agree_are_named_before_the_first_step and
::test_processes_in_other_environments_are_named_before_the_first_step.

Raises, in every function: InputError names a process and what differs there.
"""

import time
from collections.abc import Mapping
from typing import Any

from accounting.errors import InputError
from dpgemma.sharding import processes
from dpgemma.training import environment
from dpgemma.training.run import RunDirectory

# After which a shared disk shows everybody what was written.
SECONDS_TO_SEE = 60


def on_settings(mine: Mapping[str, Any]) -> None:
    """By name; the place of the data may differ, their content is asked for by `on_data`."""
    of_first, *others = processes.from_all(lambda: mine)
    for number, other in enumerate(others, 1):
        names = [name for name in of_first if name != "data" and other[name] != of_first[name]]
        if names:
            found = ", ".join(f"{name} ({other[name]} instead of {of_first[name]})" for name in names)
            raise InputError(f"process {number} has other settings than process 0: {found}; give all the same flags")


def on_environment(mine: str) -> None:
    """As environment.description has it, source code included."""
    of_first, *others = processes.from_all(lambda: mine)
    for number, other in enumerate(others, 1):
        if other != of_first:
            found = environment.differing(other, of_first)
            raise InputError(f"process {number} runs in another environment than process 0 ({found}): make them equal")


def on_data(fingerprint: str) -> None:
    """By their keyed fingerprint."""
    of_first, *others = processes.from_all(lambda: fingerprint)
    for number, other in enumerate(others, 1):
        if other != of_first:
            raise InputError(f"process {number} reads other data than process 0: give all the same content")


def on_folder(run: RunDirectory) -> None:
    """Every process has to see the run's folder as the first one has written it, unless it needs none."""
    if run.address is not None:
        return
    of_first = processes.from_first(run.opening)

    def see() -> None:
        last = time.monotonic() + SECONDS_TO_SEE
        while run.opening() != of_first:
            if time.monotonic() > last:
                raise InputError(
                    f"process {processes.number()} does not see {run.path} as process 0 has written it: give a"
                    " `workdir` on a disk that all processes share"
                )
            time.sleep(0.5)

    processes.from_all(see)
