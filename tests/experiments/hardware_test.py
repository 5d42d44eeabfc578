"""Plans for machines: operations against a count by hand, transfers against programs that are known, refusals."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys

import jax
import pytest

from accounting.errors import InputError
from dpgemma import cli
from dpgemma.gemma.presets import PRESETS
from dpgemma.privacy.clipping import Strategy
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.training.memory import bytes_on_one_device
from experiments.hardware import collectives, hlo, machines, operations
from experiments.hardware.collectives import Collective
from experiments.hardware.step_program import StepProgram
from tests.sharding import eight

RUN = ["--batch_size=64", "--steps=100"]


def by_hand(config, tokens, *, recomputed):
    """Operations of the matrix products of one row's gradient: three times the forward pass, as each product has two
    derivatives; logits of a large vocabulary are computed once more, and so are blocks but for their last product.
    """
    width, wide = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    last = 2 * tokens * config.d_ff * config.d_model
    projections = 2 * tokens * config.d_model * (2 * width + 2 * wide) + 3 * last
    block = projections + 2 * 2 * tokens**2 * width
    logits = 2 * tokens * config.d_model * config.vocab_size
    again = config.num_layers * (block - last) if recomputed else 0
    return config.num_layers * 3 * block + again + 4 * logits


@pytest.mark.parametrize("remat", ["none", "block"])
def test_operations_are_those_of_a_count_by_hand(remat):
    config, rows = PRESETS["vaultgemma_1b"], 6
    program = StepProgram(config, mesh_lib.make("data:1"), 1024, rows, Strategy("example_scan", 2), remat=remat)
    assert program.rounds == 3
    found = operations.of_products(program.trace().jaxpr.jaxpr, program.rounds)
    assert found == pytest.approx(rows * by_hand(config, 1024, recomputed=remat == "block"), rel=0.01)
    held = [bytes_on_one_device(part) for part in (program.arrays.trainable, program.arrays.moments)]
    assert held[1] >= 2 * held[0] == 8 * 1_038_741_120


def test_operations_of_loops_and_branches():
    def program(x, count):
        x = jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]
        x = jax.lax.cond(count > 2, lambda x: x @ x @ x, lambda x: x @ x, x)
        return jax.lax.fori_loop(0, count, lambda _, x: x @ x, x)

    jaxpr = jax.make_jaxpr(program)(jax.numpy.ones((3, 3)), 4).jaxpr
    assert operations.of_products(jaxpr, trips=7) == 54 * (5 + 2 + 7)
    convolution = jax.make_jaxpr(lambda x: jax.lax.conv(x, x, (1, 1), "SAME"))(jax.numpy.ones((1, 1, 4, 4))).jaxpr
    with pytest.raises(InputError, match="convolutions"):
        operations.of_products(convolution)


def test_transfers_are_those_of_a_program_that_is_known():
    text = eight.result_of("program_with_transfers()")
    found = {each.kind: each for each in collectives.of(text, chips_of_slice=4)}
    assert found["all-reduce"] == Collective("all-reduce", 8 * 16 * 4, 3, 2, crosses_slices=True)
    assert found["all-gather"] == Collective("all-gather", 32 * 16 * 4, 1, 4)
    assert found["reduce-scatter"] == Collective("reduce-scatter", 32 * 16 * 4, 1, 4)
    assert found["all-reduce"].sent == 3 * 2 * 1 / 2 * 512 and found["all-gather"].sent == 3 / 4 * 2048
    assert len([1 for times, _, _ in hlo.instructions(text) if times == 3]) > 2


LINES = """HloModule planned, replica_count=1, num_partitions=8
ENTRY %main (x: f32[8]) -> f32[8] {
  %a = f32[2,8]{1,0:T(8,128)} all-gather(%x), replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}
  %b = s32[4,8]{1,0:T(8,128)} all-reduce(%y), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %c = (bf16[8]{0}, bf16[16]{0:T(8,128)}) all-gather-start(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %d = s32[3]{0} collective-permute(%z), source_target_pairs={{0,1},{5,0}}
  %g = (s32[5]{0}, s32[5]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%z), source_target_pairs={{0,1}}
  %h = f32[7]{0} all-reduce(%z), replica_groups={}, to_apply=%add
  %e = (s32[6,8]{1,0}, u32[], token[]) send(%t, %after), is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2,3}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %f = (s32[6,8]{1,0}, u32[], token[]) send(%t, %after), is_host_transfer=true
}
"""


def test_groups_are_read_in_every_form():
    found = sorted(collectives.of(LINES, chips_of_slice=4), key=lambda each: (each.kind, each.chips, each.bytes))
    assert found == [
        Collective("all-gather", 32, 1, 2),
        Collective("all-gather", 64, 1, 2),
        Collective("all-reduce", 192, 1, 3, crosses_slices=True),
        Collective("all-reduce", 128, 1, 4, crosses_slices=True),  # chips 0, 2, 4 and 6
        Collective("all-reduce", 28, 1, 8, crosses_slices=True),
        Collective("collective-permute", 12, 1, 2, crosses_slices=True),
        Collective("collective-permute", 20, 1, 2),
    ]
    with pytest.raises(InputError, match="in a form that is not known"):
        collectives.of(LINES.replace("replica_groups={}", "replica_groups=all"))


LOOPS = """%cond (p: (u32[], f32[8])) -> pred[] {
  %bound = u32[]{:T(128)} constant(8)
}
%body (p: (u32[], f32[8])) -> (u32[], f32[8]) {
  %inner = f32[8]{0} while(%t), condition=%unknown, body=%innermost
}
%unknown (p: f32[8]) -> pred[] {
  %less = pred[] compare(%i, %n), direction=LT
}
%innermost (p: f32[8]) -> f32[8] {
  %s = f32[8]{0} add(%x, %y)
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %loop = (u32[], f32[8]{0}) while(%t), condition=%cond, body=%body
}
"""


def test_loops_are_repeated_as_their_conditions_say():
    # The bound of the inner one is no constant.
    assert [(times, opcode) for times, opcode, _ in hlo.instructions(LOOPS, 5)] == [(40, "add")]


def test_machines_have_one_form():
    pod = machines.parse("v6e:16x16", 8)
    assert (pod.chips, pod.is_compiled_for, str(pod)) == (2048, True, "v6e:16x16")
    assert machines.parse("h100:8").chips == 8 and not machines.parse("h100:8").is_compiled_for
    wrong = ["v6e", "v6e:", "v6e:0x4", "v6e:16", "v6e:2x2x2", "v5p:4x4", "h100:2x4", "v9:2x2", "v6e:2x2 ", ""]
    for text in wrong:
        with pytest.raises(InputError, match="`topology`"):
            machines.parse(text)
    for text, slices in [("v6e:2x2", 0), ("h100:8", 2)]:
        with pytest.raises(InputError, match="`num_slices`"):
            machines.parse(text, slices)
    for text, slices in [("h100:9999", 1), ("v6e:16x16", 10**6)]:
        with pytest.raises(InputError, match="are the most to plan for"):
            machines.parse(text, slices)


def planned(*arguments):
    """What a process of its own prints, because the number of devices is fixed once in a process."""
    command = [sys.executable, "-m", "dpgemma", "plan", *RUN, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ)


def test_a_plan_for_gpus_follows_from_shapes():
    privacy = ["--num_units=1e6", "--delta=1e-7", "--epsilon=4"]
    done = planned("--model=gemma3_270m", "--topology=h100:8", "--lora_rank=8", "--json", *privacy)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["chips"] == 8 and found["mesh"] == "data:8" and found["fits"] is None and found["epsilon"] <= 4
    memory, trained, all_ = found["memory"], found["trained_parameters"], found["parameters"]
    assert memory["frozen parameters"] == 2 * (all_ - trained) and memory["sum of gradients"] == 4 * trained
    assert memory["trained parameters at rest"] < 4 * trained / 7 and trained < all_ / 20
    assert found["days"] == pytest.approx(100 * found["seconds_per_step"] / 86400)
    assert found["seconds_per_step"] == pytest.approx(found["flops_per_step"] / 8 / 989e12 / 0.4)
    assert any("nothing was compiled" in each for each in found["assumptions"])


@pytest.mark.slow
def test_on_this_computer_a_step_is_compiled_and_timed():
    found = json.loads(
        planned(
            "--model=ladder_20k", "--topology=cpu:2", "--sequence_length=32", "--batch_size=20", "--dtype=float32",
            "--remat=none", "--json",
        ).stdout
    )  # fmt: skip
    assert found["mesh"] == "data:2" and found["seconds_at_peak"] is None and found["fits"] is True
    assert found["process_bytes"] == 850 * 2**20 + 2 * found["hbm_bytes_per_chip"]
    assert sum(found["memory"].values()) == found["hbm_bytes_per_chip"]
    low, high = found["seconds_per_step_range"]
    assert 0 < low < found["seconds_per_step"] < high
    assert any("for each of the 10 rounds of its loop" in sentence for sentence in found["assumptions"])


@pytest.mark.slow
def test_a_search_ranks_the_ways_that_fit():
    given = ["--model=ladder_20k", "--topology=cpu:2", "--sequence_length=32", "--batch_size=20", "--dtype=float32"]
    done = planned(*given, "--microbatch_size=2", "--search", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ways = [(way["mesh"], way["microbatch_size"], way["clipping"], way["remat"]) for way in found["ways"]]
    meshes, clipping, remat = ("data:2", "data:1,model:2", "fsdp:2"), ("example_scan", "ghost"), ("block", "none")
    assert sorted(ways) == sorted(itertools.product(meshes, [2], clipping, remat))
    fitting = [way for way in found["ways"] if way.get("fits")]
    seconds = [way["seconds_per_step"] for way in fitting]
    assert seconds == sorted(seconds) and found["ways"][: len(fitting)] == fitting
    assert found["seconds_per_step"] == seconds[0] and found["mesh"] == fitting[0]["mesh"]
    assert all("refused" in way for way in found["ways"][len(fitting) :]) and "12 of 12: mesh" in done.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--topology=v9:2x2", "--model=tiny"], "unknown chip: use one of v5e"),
        (["--topology=h100:8"], "--model is missing"),
        (["--topology=h100:8", "--model=tiny", "--search"], "no compiler for h100 without one: drop --search"),
        (["--model=tiny", "--search"], "belongs to a plan for a machine"),
        (["--topology=h100:8", "--model=tiny", "--steps=0"], "--steps must be at least 1"),
        (["--topology=h100:8", "--model=tiny", "--num_units=0"], "--num_units must be at least 1"),
        (["--topology=h100:8", "--model=tiny", "--delta=1e-7"], "give all of them, or none"),
        (["--topology=h100:8", "--model=tiny", "--compute=1e15"], "--compute belongs to a plan by a scaling law"),
        (["--clipping=ghost"], "--clipping belongs to a plan for a machine: give --topology too"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, said, capsys):
    given = [each for each in RUN if each.split("=")[0] not in {a.split("=")[0] for a in arguments}]
    assert cli.main(["plan", *given, *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model=tiny", "--topology=h100:8", "--mesh=data:4"], "does not name all 8 chips of 1 slice:"),
        (["--model=tiny", "--topology=h100:8", "--sequence_length=300"], "exceeds the 256 tokens of tiny"),
        (["--model=gemma3_27b", "--topology=a100:2"], "does not fit on a100:2 with a model axis"),
        (["--model=gemma3_12b", "--topology=a100:8", "--mesh=data:8"], "--mesh=data:2,model:4 would leave room"),
    ],
)
def test_a_machine_that_is_too_small_is_refused_before_anything_is_compiled(arguments, said):
    done = planned(*arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@needs_compiler
@pytest.mark.slow
def test_a_plan_for_tpus_is_that_of_the_compiled_step():
    done = planned("--model=tiny", "--topology=v6e:2x2", "--num_slices=2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["chips"] == 8 and found["mesh"] == "slice:2,data:4" and found["fits"]
    within = [each for each in found["collectives"] if not each["crosses_slices"]]
    weights = [each for each in within if each["kind"] == "all-gather"]
    assert all(each["times"] < 10 for each in found["collectives"]), "no transfer in the loop over microbatches"
    assert sum(each["times"] * each["bytes"] for each in weights) < 2.2 * found["parameters"], "gathered once, bfloat16"
    assert {each["kind"] for each in found["collectives"] if each["crosses_slices"]} == {"all-reduce"}
    assert found["hbm_bytes_per_chip"] > sum(found["memory"].values()) * 0.99 and found["cycles_per_step"] > 1e5
    done = planned("--model=tiny", "--topology=v6e:3x5")
    assert done.returncode == 2 and "is none that the TPU compiler knows" in done.stderr
