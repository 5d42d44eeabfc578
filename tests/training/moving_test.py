"""Runs that move: what belongs to an environment and to a run, and what it costs to repeat steps elsewhere."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from accounting import rounding
from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.ledger import chain as ledger_lib
from accounting.mechanism import dp_sgd
from dpgemma.commands import process
from dpgemma.sharding.rules import MeshShape
from dpgemma.training import environment
from dpgemma.training import plan as plan_lib
from dpgemma.training.run import RunDirectory, changeable
from dpgemma.training.settings import Settings
from tests.training.runs import (
    COMMAND,
    ENVIRONMENT,
    OPERATIONAL,
    assert_same_bits,
    call,
    copy_of,
    final_parameters,
    flags,
    run,
    step_records,
)

ROOT = pathlib.Path(__file__).parents[2]


def test_every_setting_but_the_operational_ones_makes_another_run(finished):
    """A run that goes on computes as it began; the mesh may change where sums are whole numbers."""
    directory = RunDirectory(finished[0])
    config, start = directory.config(), ledger_lib.read(finished[0] / "ledger.jsonl")[0]
    facts = {name: start[name] for name in ("num_units", "model", "seal", "tokenizer_sha256")}
    fingerprint = json.loads(directory.data_file.read_text())["fingerprint"]
    directory.check_resumable(config, fingerprint, facts)
    free = {*OPERATIONAL, "data", "init_from", "tokenizer", "prompt_histogram", "canary_model", "mesh"}
    assert {field.name for field in dataclasses.fields(Settings)} <= set(config)
    for name in config:
        changed = {**config, name: "another value"}
        if name in free:
            directory.check_resumable(changed, fingerprint, facts)
        else:
            with pytest.raises(InputError, match=name):
                directory.check_resumable(changed, fingerprint, facts)
    with pytest.raises(InputError, match="to train further, export it, start another run from the export"):
        directory.check_resumable({**config, "steps": 12}, fingerprint, facts)
    with pytest.raises(InputError, match="data differ"):
        directory.check_resumable(config, "00" * 32, facts)
    for name in facts:
        with pytest.raises(InputError, match=name):
            directory.check_resumable(config, fingerprint, {**facts, name: "another"})
    named = ("data", "init_from", "tokenizer", "prompt_histogram", "canary_model")
    assert changeable({**config, "release": "float32"}) == (*OPERATIONAL, *named)


def test_what_a_run_began_with_stays_where_another_machine_finds_it_but_for_its_last_bits():
    """Solved noise depends in its last bit on the processor's way of multiplying; a setting that was changed shows."""
    begun = {"noise_multiplier": 0.5226877415236247, "epsilon": 8.0}
    assert plan_lib._as_begun(0.5226877415236246, begun, "noise_multiplier") == begun["noise_multiplier"]
    assert plan_lib._as_begun(0.52268775, begun, "noise_multiplier") == 0.52268775
    assert plan_lib._as_begun(4.0, begun, "epsilon") == 4.0 and plan_lib._as_begun(4.0, None, "epsilon") == 4.0


def test_a_run_follows_its_data_to_another_place(finished, text, tmp_path):
    """Data are known by their fingerprint, so batches and noise stay; other data in the old place are refused."""
    workdir = copy_of(finished, tmp_path)
    before = final_parameters(workdir)[1]
    shutil.rmtree(workdir / "checkpoints/6")
    moved = shutil.copy(text, tmp_path / "moved.txt")
    done = call(*flags(moved, workdir))
    assert done.returncode == 0 and "resuming at step 4 of 6" in done.stderr, done.stderr
    assert "another environment" not in done.stderr
    assert_same_bits(before, final_parameters(workdir)[1])
    assert len(step_records(workdir)) == 6 and call("audit", workdir).returncode == 0
    pathlib.Path(moved).write_text(text.read_text().replace("fever", "fewer", 1))
    done = call(*flags(moved, workdir))
    assert done.returncode == 2 and "the data differ" in done.stderr


def run_elsewhere(arguments, **variables):
    """In another environment, but the same kind of processor."""
    variables = {"XLA_FLAGS": "--xla_cpu_max_isa=AVX", **variables}
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], env=ENVIRONMENT | variables, capture_output=True, text=True, timeout=240
    )


@pytest.mark.slow
def test_lost_steps_are_not_repeated_elsewhere_beyond_the_target(finished, text, tmp_path):
    """Noise of the same key on sums that are rounded differently could be subtracted; other noise costs."""
    workdir = copy_of(finished, tmp_path)
    before = final_parameters(workdir)[1]
    shutil.rmtree(workdir / "checkpoints")
    ledger = (workdir / "ledger.jsonl").read_bytes()
    refused = run_elsewhere(flags(text, workdir))
    assert refused.returncode == 2 and "costs epsilon" in refused.stderr and "Traceback" not in refused.stderr
    assert (workdir / "ledger.jsonl").read_bytes() == ledger and not (workdir / "checkpoints" / "6").exists()
    assert run(*flags(text, workdir)).returncode == 0
    assert_same_bits(before, final_parameters(workdir)[1])


def test_steps_that_are_repeated_elsewhere_are_charged_again(text, tmp_path):
    """Within a target that has room for them; their number and their cost are in ledger, report, audit and sum."""
    workdir, settings = tmp_path / "run", dict(epsilon=3, steps=5)
    assert call(*flags(text, workdir, **settings)).returncode == 0
    first = json.loads((workdir / "report.json").read_text())
    shutil.rmtree(workdir / "checkpoints/5")
    assert first["steps"] == 5 and first["repeated_steps"] == 0
    moved = run_elsewhere(flags(text, workdir, **settings))
    assert moved.returncode == 0, moved.stderr
    assert "1 steps that were executed in another environment and lost are executed once more" in moved.stderr
    report = json.loads((workdir / "report.json").read_text())
    assert (report["steps"], report["repeated_steps"]) == (6, 1)
    assert [record["step"] for record in step_records(workdir)] == [0, 1, 2, 3, 4, 4]
    six = dp_sgd(
        report["num_units"], 12, 48, 1.0, 1.0, 6, report["neighbouring_relation"], grid_bits=grid_bits_of(workdir)
    )
    assert report["epsilon"] == rounding.round_up(Accountant(six).epsilon(1e-4).upper) > first["epsilon"]
    metrics = [json.loads(line)["epsilon"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 5 and metrics[-1] == report["epsilon"]
    audited = call("audit", workdir, "--json")
    result = json.loads(audited.stdout)
    assert audited.returncode == 0 and result["epsilon_rederived"] == report["epsilon"], result["findings"]
    assert any("charged again" in notice for notice in result["notices"])
    composed = json.loads(call("account", f"--compose={workdir}", "--json").stdout)
    assert composed["steps"] == 6 and rounding.round_up(composed["epsilon"]) == report["epsilon"]


def grid_bits_of(workdir):
    return ledger_lib.read(workdir / "ledger.jsonl")[0]["grid_bits"]


def test_keys_follow_the_whole_way_of_a_run(finished):
    """Wherever a copy goes on, even if it comes back, its keys are no other copy's; without moving they are equal."""
    directory = RunDirectory(finished[0])
    start = ledger_lib.read(finished[0] / "ledger.jsonl")[0]
    ways = (
        [(0, "a")], [(0, "b")], [(0, "a"), (4, "b")], [(0, "a"), (5, "b")], [(0, "a"), (4, "b"), (5, "a")],
        [(0, "a"), (4, "a; continuation 1")], [(0, "a"), (4, "a; continuation 2")],
    )  # fmt: skip
    found = [directory.step_keys(start, tuple(way)) for way in ways]
    assert len({keys.noise for keys in found}) == len({keys.sampling for keys in found}) == len(ways)
    assert directory.step_keys(start, ((0, "a"),)) == found[0]


def test_where_sums_have_no_fixed_order_every_continuation_has_its_own_noise():
    here = "jax 1; NVIDIA H100; matmul precision default"
    fixed = f"{here}, {environment.DETERMINISTIC_SUMS}"
    assert not environment.is_deterministic(here, "gpu")
    assert environment.is_deterministic(fixed, "gpu") and environment.is_deterministic(here, "cpu")


def test_flags_of_the_compiler_are_part_of_the_environment(monkeypatch):
    def described(flags):
        monkeypatch.setenv("XLA_FLAGS", flags)
        return environment.description(MeshShape(2))

    plain, _, code = described("").rpartition("; code ")
    assert described("--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=4") == f"{plain}; code {code}"
    assert described("--xla_cpu_enable_fast_math=true") == f"{plain}, --xla_cpu_enable_fast_math=true; code {code}"
    # The last of two equal flags holds.
    on, off = f"{environment.DETERMINISTIC_SUMS}", environment.DETERMINISTIC_SUMS.replace("true", "false")
    assert described(f"{on} {off}") != described(f"{off} {on}")
    assert environment.is_deterministic(described(f"{off} {on}"), "gpu")
    assert not environment.is_deterministic(described(f"{on} {off}"), "gpu")


def test_a_file_of_flags_is_known_by_what_it_holds(monkeypatch, tmp_path):
    file = tmp_path / "flags.txt"
    monkeypatch.setenv("XLA_FLAGS", str(file))
    found = []
    for content in ("--xla_cpu_max_isa=AVX", "--xla_cpu_max_isa=SSE4_2", "--xla_cpu_max_isa=AVX\n"):
        file.write_text(content)
        found.append(environment.description(MeshShape(1)))
    assert found[0] == found[2] != found[1] and "--xla_cpu_max_isa=SSE4_2" in found[1]
    with pytest.raises(InputError, match="XLA_FLAGS names a file"):
        process.set_deterministic_sums()


def test_meshes_variables_and_settings_that_change_roundings_are_part_of_the_environment(monkeypatch):
    """Each was seen to change the bits of a step, but the last, of which none may."""
    plain = environment.description(MeshShape(2))
    threads = max(2, len(os.sched_getaffinity(0)))
    assert f"{threads} threads" in plain
    assert len({environment.description(MeshShape(*n)) for n in [(1,), (2,), (1, 2)]}) == 3
    names = "NPROC", "PJRT_NPROC", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "JAX_REMAT3", "LIBTPU_INIT_ARGS"
    for name in names:
        monkeypatch.setenv(name, "1")
        assert environment.description(MeshShape(2)) != plain and name in environment.description(MeshShape(2))
        monkeypatch.delenv(name)
    settings = {"jax_softmax_custom_jvp": True, "jax_default_matmul_precision": "highest", "jax_remat3": True}
    for name, value in settings.items():
        before = jax.config.values[name]
        jax.config.update(name, value)
        assert environment.description(MeshShape(2)) != plain
        jax.config.update(name, before)
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_LOG_COMPILES", "TF_CPP_MIN_LOG_LEVEL", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")
    assert environment.description(MeshShape(2)) == plain


def test_the_number_of_processes_is_part_of_the_environment_where_floats_are_added_over_them():
    cases = [(MeshShape(2), True), (MeshShape(1, 2), True), (MeshShape(2), False)]
    alone, together = ([environment.description(*case, count) for case in cases] for count in (1, 2))
    assert [a == b for a, b in zip(alone, together, strict=True)] == [True, False, False]
    assert "2 processes" in together[1] and "2 processes" in together[2]


def test_code_and_versions_are_part_of_the_environment(tmp_path):
    """An edited module, or compilation switched off, is another environment; it is asked in processes of their own."""

    def described(place, **variables):
        code = "from dpgemma.sharding.rules import MeshShape; from dpgemma.training import environment"
        code += "; print(environment.description(MeshShape(1)))"
        variables = {**ENVIRONMENT, "PYTHONPATH": str(place), "JAX_PLATFORMS": "cpu", **variables}
        done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, cwd=place)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for package in ("dpgemma", "accounting"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    original = described(tmp_path)
    for version in ("jax", "jaxlib", "numpy", "optax", "flax", "ml_dtypes"):
        assert f"{version} {importlib.metadata.version(version)}" in original
    assert described(ROOT) == original and described(ROOT, JAX_DISABLE_JIT="1") != original
    for edited in ("dpgemma/gemma/blocks/layers.py", "accounting/mechanism/grid.py"):
        content = (tmp_path / edited).read_bytes()
        (tmp_path / edited).write_bytes(content + b"\n")
        assert described(tmp_path) != original
        (tmp_path / edited).write_bytes(content)
    assert described(tmp_path) == original
