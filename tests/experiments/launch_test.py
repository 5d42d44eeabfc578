"""Templates that start one run on several machines: what they start, with stand-ins for the machines."""

import os
import pathlib
import re
import subprocess

import pytest

from tests.training import processes_test, runs

FOLDER = pathlib.Path(__file__).parents[2] / "experiments/launch"

SSH = """#!/usr/bin/env bash
shift  # the machine
exec bash -c "$1"
"""


def program(name, content, folder):
    """A folder to be searched for programs first, which holds this one."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)
    return f"{path.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("name", ["ssh.sh", "tpu_vm.sh", "slurm.sbatch"])
def test_templates_are_sound_scripts(name):
    assert subprocess.run(["bash", "-n", FOLDER / name]).returncode == 0


def test_the_job_of_several_slices_starts_a_process_for_each_of_their_machines():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((FOLDER / "slices.yaml").read_text())
    (replicated,) = job["spec"]["replicatedJobs"]
    pods = replicated["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    recipe = pathlib.Path(container["args"][0].partition("=")[2])
    slices, data = re.search("--mesh=slice:(.*),data:(.*)", (FOLDER.parents[1] / recipe).read_text()).groups()
    assert replicated["replicas"] == int(slices) and pods["completions"] == pods["parallelism"]
    assert pods["completions"] * chips == int(data)
    assert container["command"] == ["dpgemma", "train"] and "--coordinator=auto" in container["args"]


@pytest.mark.slow
def test_two_machines_over_ssh(notes, tmp_path):
    given = processes_test.flags(notes, tmp_path / "run", mesh="data:2")[1:]
    command = f"{runs.COMMAND[0]} -m dpgemma"
    places = {"HOSTS": "localhost localhost", "PROGRAM": command, "PORT": str(runs.free_port())}
    environment = runs.ENVIRONMENT | places | {"PATH": program("ssh", SSH, tmp_path)}
    done = subprocess.run([FOLDER / "ssh.sh", *given], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "held-out" in done.stdout, done.stderr
    assert len(processes_test.records(tmp_path / "run", "step")) == 4
    refused = subprocess.run(
        [FOLDER / "ssh.sh", *given, "--steps=5"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert refused.returncode == 2 and "belongs to another configuration" in refused.stderr


@pytest.mark.slow
def test_a_cluster_that_jax_recognises_needs_no_addresses(notes, tmp_path):
    """The variables that Slurm sets for each process."""
    given = processes_test.flags(notes, tmp_path / "run", mesh="data:2")
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    processes = [
        subprocess.Popen(
            [*runs.COMMAND, *given, "--coordinator=auto"],
            env=runs.ENVIRONMENT | job | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    outcomes = runs.ended(processes)
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    assert len(processes_test.records(tmp_path / "run", "step")) == 4
