"""The README and docs/: commands that are printed there run as they are printed, pages that are generated are current,
links lead somewhere, and the site builds.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages whose commands follow on each other, in the order of a reader; one folder for all of them.
WALK = ["README.md", "docs/report.md", "docs/guide/evaluating.md", "docs/guide/synthetic_text.md"]
ALONE = [
    "docs/guide/accounting.md", "docs/guide/data_and_people.md", "docs/guide/planning.md", "docs/guide/python.md",
]  # fmt: skip
SKIPPED = "<!-- not run: "


def commands(page):
    """The commands of a page: lines that begin with $, with what continues them, but for blocks that are not run."""
    found, lines, skip, inside = [], iter(page.read_text().splitlines()), False, False
    for line in lines:
        if line.startswith(SKIPPED):
            skip = True
        elif line.startswith("```"):
            inside, skip = not inside, skip and not inside
        elif inside and not skip and line.startswith("$ "):
            command = line[2:]
            while command.endswith("\\"):
                command += "\n" + next(lines)
            if heredoc := re.search(r"<<'(\w+)'", command):
                while not command.endswith(f"\n{heredoc[1]}"):
                    command += "\n" + next(lines)
            found.append(command)
    return found


def test_pages_with_commands_are_all_run():
    with_commands = {str(page.relative_to(ROOT)) for page in PAGES if commands(page)}
    assert with_commands == {*WALK, *ALONE}
    assert sum(len(commands(ROOT / name)) for name in with_commands) >= 25


def test_the_reference_is_what_help_prints():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import generate
    finally:
        sys.path.pop(0)
    from dpgemma import cli

    assert {path.stem for path in generate.FOLDER.glob("*.md")} == set(cli.COMMANDS)
    for name in cli.COMMANDS:
        assert (generate.FOLDER / f"{name}.md").read_text() == generate.page(name), f"python docs/generate.py ({name})"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", page.read_text()):
        name = target[0] or target[1]
        assert "://" in name or (page.parent / name).exists(), name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def run(command, folder):
    binaries = pathlib.Path(sys.executable).parent
    path = os.pathsep.join([str(folder / "bin"), str(binaries), os.environ["PATH"]])
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    code = 1 if "runs/edited" in command and command.startswith("dpgemma audit") else 0
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.fixture
def folder(tmp_path):
    """Where `dpgemma` is this code, beside what the clone has."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "dpgemma"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dpgemma "$@"\n')
    program.chmod(0o755)
    for name in ("experiments", "examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.slow
def test_the_walk_runs_as_printed(folder):
    for name in WALK:
        for command in commands(ROOT / name):
            run(command, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_a_page_runs_as_printed(name, folder):
    for command in commands(ROOT / name):
        run(command, folder)


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dpgemma.training.fit" in (tmp_path / "site" / "api" / "index.html").read_text()
