"""Plants breaches of privacy in a copy of the source, one at a time, and says which test notices each.

    python -m tests.mutations               all of them, in about three quarters of an hour on two cores
    python -m tests.mutations --only=noise  those whose kind or description holds a word
    python -m tests.mutations --page=FILE   writes the page docs/breaches.md too

They stand in tests.breaches. A mutation names the tests that are expected to notice it, so that a run takes minutes
and not hours; the fast suite holds nearly all of these. Prints one line for each, and ends with exit code 1 if one
survives or does not apply any more.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from tests.breaches import MUTATIONS
from tests.breaches.mutation import Mutation

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ("dpgemma", "accounting", "experiments", "tests", "pyproject.toml", "README.md", "docs", "examples")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a word of the kind or the description")
    parser.add_argument("--page", type=pathlib.Path, help="file for a page that lists all of them, in Markdown")
    given = parser.parse_args()
    chosen, survived, results = given.only, 0, []
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, place / name)
        for mutation in MUTATIONS:
            if chosen in f"{mutation.kind} {mutation.what}":
                result = tried(mutation, place)
                survived += not result["noticed_by"]
                print(json.dumps(result), flush=True)
                results.append(result)
    if given.page:
        given.page.write_text(page(results))
    return 1 if survived else 0


def page(results: list[dict[str, object]]) -> str:
    """All results as a page of the documentation."""
    noticed = sum(bool(result["noticed_by"]) for result in results)
    tests = [str(r["noticed_by"] or "NOTHING").partition("[")[0] for r in results]
    rows = [f"| {r['kind']} | {r['what']} | {test} |" for r, test in zip(results, tests, strict=True)]
    return "\n".join(
        [
            "# Breaches that the tests notice",
            "",
            f"`python -m tests.mutations --page=docs/breaches.md` planted {len(results)} breaches of privacy in a copy"
            f" of the source, one at a time; {noticed} of them were noticed. For each: its kind, what was changed, and"
            " the first test that failed. A breach stands for others of its kind, which the same tests are meant to"
            " notice.",
            "",
            "| kind | breach | noticed by |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def tried(mutation: Mutation, place: pathlib.Path) -> dict[str, object]:
    """The mutation, planted in a copy, and the first test that fails."""
    path = place / mutation.file
    source = path.read_text()
    result: dict[str, object] = {"kind": mutation.kind, "what": mutation.what, "noticed_by": None}
    if source.count(mutation.old) != 1:
        return result | {"error": f"the text to replace occurs {source.count(mutation.old)} times"}
    start = time.monotonic()
    path.write_text(source.replace(mutation.old, mutation.new))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests],
            cwd=place, env=os.environ | {"PYTHONPATH": str(place)}, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
    finally:
        path.write_text(source)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    failed = [line.partition(" ")[2].partition(" - ")[0] for line in lines]
    if done.returncode == 1 and failed:
        result["noticed_by"] = failed[0]
    elif done.returncode:
        result["error"] = done.stdout.strip().splitlines()[-1:]
    return result | {"seconds": round(time.monotonic() - start)}


if __name__ == "__main__":
    sys.exit(main())
