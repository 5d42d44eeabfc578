"""Runs the fuzzers and prints a line for each reader; exit code 1 if one found something."""

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

from tests.fuzzing.targets import TARGETS

HANG_SECONDS = 10.0


def fuzzed(names: list[str], seconds: float, seed: int, kept: pathlib.Path) -> tuple[str, str] | None:
    """Fuzzes readers in one process: (reader, what went wrong), or None. The input that did it lies in `kept`."""
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        command = [sys.executable, "-m", "tests.fuzzing.worker", str(seconds), str(seed), folder, *names]
        worker = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        problem = None
        while worker.poll() is None:
            time.sleep(0.2)
            if (place / "started").exists() and time.time() - (place / "input").stat().st_mtime > HANG_SECONDS:
                problem = f"an input took more than {HANG_SECONDS:g} seconds"
                worker.kill()
        _, errors = worker.communicate()
        if problem is None and worker.returncode:
            problem = "\n".join(errors.strip().splitlines()[-12:]) or f"the process ended with {worker.returncode}"
        if problem is None:
            return None
        name = (place / "reader").read_text() if (place / "reader").exists() else names[0]
        if (place / "input").exists():
            kept.mkdir(parents=True, exist_ok=True)
            (kept / name.replace(" ", "_")).write_bytes((place / "input").read_bytes())
        return name, problem


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="in all")
    parser.add_argument("--only", default="", help="a reader's name, or a part of it")
    parser.add_argument("--seed", type=int, default=0, help="to begin with")
    parser.add_argument("--kept", type=pathlib.Path, default=pathlib.Path("fuzzing_found"), help="for what did harm")
    given = parser.parse_args()
    left = [name for name in TARGETS if given.only in name]
    each, found = given.seconds / max(1, len(left)), 0
    if not left:
        print(f"no reader is called so: there are {', '.join(TARGETS)}")
        return 2
    while left:
        harm = fuzzed(left, each, given.seed, given.kept)
        if harm is None:
            break
        found += 1
        print(f"{harm[0]}: FOUND\n{harm[1]}", flush=True)
        left = left[left.index(harm[0]) + 1 :]
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
