"""What can be refused before a sweep starts anything, and what a run costs by its settings alone."""

import functools

from accounting.errors import InputError
from dpgemma.sharding.rules import wanted
from experiments.sweep.grid import Grid, Run


def check(grid: Grid, *, data: bool = True) -> None:
    """Refuses models, tokenizers, devices and data that do not exist, and rows that a model cannot take.

    Args:
      data: whether there must be tokenizers and data already.

    Raises:
      InputError: the first such setting.
    """
    from dpgemma.data import readers
    from dpgemma.data.formats import LeftOut, refuse
    from dpgemma.data.random_rows import RandomRows
    from dpgemma.data.text import cache
    from dpgemma.data.text import tokenizer as tokenizer_lib
    from dpgemma.training import data as data_lib
    from dpgemma.training import prepare

    for run in grid.runs:
        parameters(run.config.model)
        devices(run)
        prepare.start_of(run.config)
    if not data:
        return
    for spec in dict.fromkeys(data_lib.tokenizer_of(run.config) for run in grid.runs):
        tokenizer_lib.load(spec)
    asked = ((run.config.data, run.config.text_field, run.config.skip_bad_records) for run in grid.runs)
    for source, field, skip in dict.fromkeys(asked):
        # The synthetic corpus is made when it is needed, and what holds no records is checked when it is opened.
        if source == readers.SYNTHETIC or source.startswith(RandomRows.PREFIX) or cache.is_cache(source):
            continue
        if next(iter(readers.records(source, field, LeftOut() if skip else refuse)), None) is None:
            raise InputError(f"`data`={source} is empty: there is nothing to train on")


def check_sum(grid: Grid) -> None:
    """Refuses runs on private data that no guarantee could be stated for together.

    Args:
      grid: all runs of a sweep's folder.

    Raises:
      InputError: names the setting in which they differ.
    """
    from dpgemma.training import data

    if grid.public_data:
        return
    for what in ("data", "text_field", "privacy_unit", "sequence_length", "neighbouring_relation", "tokenizer"):
        found = {
            data.tokenizer_of(run.config) if what == "tokenizer" else getattr(run.config, what) for run in grid.runs
        }
        if len(found) > 1:
            raise InputError(
                f"the runs differ in {what} ({', '.join(sorted(map(str, found)))}), so their privacy does not add up to"
                " one guarantee: with public_data = false use one sweep, in a `workdir` of its own, for each"
            )


def operations(run: Run) -> float:
    """6 M B S T: floating-point operations of a run by the rule that scaling laws are written in."""
    c = run.config
    return 6.0 * parameters(c.model) * c.batch_size * c.sequence_length * c.steps


@functools.lru_cache
def parameters(model: str) -> int:
    """Parameters of a model, by its name.

    Raises:
      InputError: there is none of this name.
    """
    from dpgemma.gemma import decoder, presets

    return decoder.num_parameters(presets.named(model))


def devices(run: Run) -> int:
    """Devices of a run, and on a CPU cores.

    Raises:
      InputError: its mesh does not say how many. What mesh = "auto" stands for would depend on where a run is executed.
    """
    try:
        shape = wanted(run.config.mesh)
    except InputError:
        shape = None
    if shape is None:
        raise InputError(
            'mesh must be "data:N", "data:A,model:B" or "slice:S,data:A,model:B" for each run of a sweep, got'
            f" {run.config.mesh!r}"
        )
    return shape.devices
