"""Ranks the ways in which a training run fits on a machine: meshes, rows at once, clipping, and what is recomputed."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any

from accounting.errors import InputError
from dpgemma.choices import EXAMPLE_SCAN, GHOST
from dpgemma.sharding.rules import MeshShape
from dpgemma.training import memory
from experiments.hardware import estimate
from experiments.hardware.estimate import Request

MESH, ROWS, CLIPPING, REMAT = "mesh", "microbatch_size", "clipping", "remat"
OPEN = (MESH, ROWS, CLIPPING, REMAT)
_ROWS, _CLIPPING, _REMAT = (1, 2, 4), (EXAMPLE_SCAN, GHOST), ("block", "none")


def ranked(request: Request, free: Collection[str], tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Plans of all ways, the fastest first; behind them the ways that do not fit: each has `refused`, a sentence, or
    `fits` false.

    Args:
      request: what is not free in it stays as it is.
      free: names out of OPEN.
      tell: is told what is tried next: each way is compiled, which takes from seconds to minutes.

    Raises:
      InputError: a machine for which nothing can be compiled here.
    """
    topology = request.topology
    if not (topology.is_compiled_for or topology.is_at_hand):
        raise InputError(
            f"a search compiles every way, and there is no compiler for {topology.kind} without one: drop --search"
        )
    ways = list(_ways(request, free))
    found: list[dict[str, Any]] = []
    refused: dict[tuple[str, str, str], str] = {}  # why, with fewer rows at once
    for number, way in enumerate(ways, 1):
        how = way.how
        facts = {MESH: way.mesh, ROWS: how.microbatch_size, CLIPPING: how.name, REMAT: way.remat}
        without_rows = (way.mesh, how.name, way.remat)
        tell(f"{number} of {len(ways)}: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
        if without_rows not in refused:
            try:
                found.append(facts | estimate.answer(way))
                continue
            except InputError as error:
                refused[without_rows] = str(error)
        found.append(facts | {"refused": refused[without_rows]})
    return sorted(found, key=lambda each: (not each.get("fits"), each.get("seconds_per_step", 0.0)))


def _ways(request: Request, free: Collection[str]) -> Iterator[Request]:
    """Requests with nothing left open, those with fewer rows at once first."""
    topology = request.topology
    meshes = [str(shape) for shape in memory.meshes(topology.chips, topology.slices)]
    if topology.chips > topology.slices:
        meshes.append(str(MeshShape(topology.chips // topology.slices, 1, topology.slices, fully_sharded=True)))
    choices = itertools.product(
        _ROWS if ROWS in free else (request.how.microbatch_size,),
        meshes if MESH in free else (request.mesh,),
        _CLIPPING if CLIPPING in free else (request.how.name,),
        _REMAT if REMAT in free else (request.remat,),
    )
    for rows, mesh, clipping, remat in choices:
        how = dataclasses.replace(request.how, name=clipping, microbatch_size=rows)
        yield dataclasses.replace(request, mesh=mesh, how=how, remat=remat)
