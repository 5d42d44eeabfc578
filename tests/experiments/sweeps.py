"""Files and folders of small sweeps, for tests."""

import json
import pathlib

from experiments.sweep import folder as folder_lib
from experiments.sweep import grid as grid_lib
from experiments.sweep import sweep

TRAIN = dict(
    sequence_length=16, batch_size=4, max_batch_size=16, checkpoint_every=2, warmup_steps=1, schedule="constant"
)
GRID = dict(model="ladder_20k", noise_batch_ratio=[0, "2^-7", "2^-5"], learning_rate="2^-7", steps=8)


def toml(path: pathlib.Path, data, *tables, public_data=True) -> pathlib.Path:
    """A sweep's file with these [[grid]] tables."""

    def lines(settings):
        return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())

    shared = lines(TRAIN | {"data": str(data)})
    grids = "".join(f"[[grid]]\n{lines(table)}" for table in tables)
    path.write_text(f"[sweep]\npublic_data = {str(public_data).lower()}\n[train]\n{shared}{grids}")
    return path


def state(folder: pathlib.Path) -> dict:
    """Content and time of every file."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def run_sweep(config, path, launcher, **options) -> sweep.Outcome:
    grid = grid_lib.read(config)
    folder, everything = folder_lib.create(path, grid)
    with folder.locked():
        return sweep.run(folder, grid, everything, launcher, **options)
