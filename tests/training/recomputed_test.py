"""A whole run computed again from its keys, its data and its ledger, in NumPy: batches, sums, noise, AdamW.

Of the program this uses readers, tokenizer, the model's loss and the sampler, each of which is tested against something
else; hold-out, keys, clipping, grid, noise, divisor and optimizer are written out here.
"""

import ast
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dpgemma.data.text import tokenizer, units
from dpgemma.data.text.pieces import Reading
from dpgemma.gemma.presets import PRESETS
from dpgemma.privacy import integer_noise, keystream
from dpgemma.privacy.samplers import PoissonSampler
from dpgemma.training import checkpoint
from tests import objectives
from tests.training import runs

MODEL, LENGTH, STEPS = "ladder_20k", 16, 3
PEAK, WARM_UP = 8e-3, 10


def threefry(key, counter):
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011), on arrays of uint32."""
    k0, k1 = (np.uint32(int(k)) for k in key)
    schedule = [k0, k1, k0 ^ k1 ^ np.uint32(0x1BD11BDA)]
    x0, x1 = counter[0] + schedule[0], counter[1] + schedule[1]
    for four in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[four % 2]:
            x0 = x0 + x1
            x1 = (x1 << np.uint32(turn) | x1 >> np.uint32(32 - turn)) ^ x0
        x0, x1 = x0 + schedule[(four + 1) % 3], x1 + schedule[(four + 2) % 3] + np.uint32(four + 1)
    return x0, x1


def noise_of(secret, step, index, shape, bits):
    """The whole numbers that are added to array `index` of one step, by row (all axes but the last) and column."""
    keys = b"".join(
        hashlib.blake2b(step.to_bytes(8, "little"), key=secret, digest_size=n, person=person).digest()
        for n, person in ((32, b"dpgemma noise"), (8, b"dpgemma fill"))
    )
    size = math.prod(shape)
    rows, columns = (x.astype(np.uint32) for x in np.divmod(np.arange(size), shape[-1]))
    words = []
    for key in np.frombuffer(keys, "<u4").reshape(5, 2):
        zero = np.zeros(1, np.uint32)
        of_array = [int(x[0]) for x in threefry(key, (zero, zero + np.uint32(index)))]
        words.append(threefry(of_array, (rows, columns)))
    entries, low = (part.astype(np.int64) for part in integer_noise.table())
    a, b = (w.astype(np.int64) for w in words[4])
    fillings = (a % 2**16, a // 2**16, b % 2**16, b // 2**16)
    total = np.full(size, -2 * (2**20 - 1))
    for filling, (first, second) in zip(fillings, words[:4], strict=True):
        first, second = first.astype(np.int64), second.astype(np.int64)
        column, random = first // 2**22, first % 2**22 * 2**27 + second // 2**5
        threshold = entries[column] // 2**10 * 2**27 + low[column]
        j = np.where(random < threshold, column, entries[column] % 2**10) - 512
        total += j * 2**20 + second % 2**4 * 2**16 + filling
    return np.floor(total / 2.0 ** (26 - bits) + 0.5).astype(np.int64).reshape(shape)


def unevenly_scored(tmp_path):
    """Records of which only some bytes are learned: many of one, few of the next."""
    path = tmp_path / "records.jsonl"
    records = [{"prompt": "seen " * (i % 3), "response": "fever"[: 1 + i % 5]} for i in range(150)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def state_after(workdir, step):
    """Parameters and Adam's two moments, as lists of arrays, of the checkpoint after so many steps."""
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.CheckpointManager(workdir / "checkpoints", item_handlers=handlers, options=options) as manager:
        shapes = manager.item_metadata(step)["state"].tree
        template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
        state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template))).state
    adam = state["optimizer_state"][0]
    return tuple(
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
        for tree in (state["parameters"], adam["mu"], adam["nu"])
    )


@pytest.mark.parametrize(
    "mesh, clip_norm, unit",
    [
        pytest.param("data:1", 0.5, "sequence", marks=pytest.mark.slow), ("data:2", 3.0, "example"),
        pytest.param("data:2", 3.0, "sequence", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_run_is_what_its_keys_and_data_say(mesh, clip_norm, unit, text, tmp_path):
    assert len(jax.devices()) == 2  # asked before the run does, which would take as many as it needs
    workdir, data = tmp_path / "run", unevenly_scored(tmp_path) if unit == "example" else text
    settings = dict(model=MODEL, sequence_length=LENGTH, mesh=mesh, clip_norm=clip_norm, noise_multiplier=0.7)
    done = runs.call(*runs.flags(data, workdir, steps=STEPS, **settings | {"checkpoint_every": 1}))
    assert done.returncode == 0, done.stderr
    ledger = [json.loads(line) for line in (workdir / "ledger.jsonl").read_text().splitlines()]
    start, keys = ledger[0], json.loads((workdir / "private/keys.json").read_text())
    assert start["clip_norm"] == clip_norm and start["expected_batch_size"] == 12

    asked = Reading(unit, LENGTH, "text")
    rows = units.read(str(data), tokenizer.ByteTokenizer(), asked, PRESETS[MODEL].vocab_size).units.store
    # A unit is held out where the 64-bit hash of its number lies below a tenth of the range.
    hashes = keystream.uniform_uint64(keystream.derive(bytes.fromhex(keys["holdout"]), "hold-out"), 0, rows.num_units)
    training = [i for i, h in enumerate(hashes.tolist()) if h >= int(0.1 * 2**64)]
    assert len(training) == start["num_units"]

    loss = objectives.row_loss(PRESETS[MODEL], length=LENGTH)
    gradient = jax.jit(jax.grad(lambda p, row: loss(p, {}, row)))
    trainable, _ = objectives.causal(PRESETS[MODEL], length=LENGTH).init(0)
    leaves, structure = jax.tree.flatten(trainable)
    states = [tuple([np.asarray(leaf, np.float64) * share for leaf in leaves] for share in (1, 0, 0))]
    states += [state_after(workdir, step) for step in range(1, STEPS + 1)]

    secrets, bits = runs.step_secrets(workdir), start["grid_bits"]
    grid_steps = 2.0**bits * (1 - 2.0**-11) / 0.7
    sampler = PoissonSampler(len(training), 12 / len(training), 48)
    for t in range(STEPS):
        (values, first, second), after = states[t], states[t + 1]
        params = jax.tree.unflatten(structure, [jnp.asarray(v, jnp.float32) for v in values])
        sums = [np.zeros(v.shape, np.int64) for v in values]
        for unit in sampler.draw(secrets["sampling"], t):
            row = {name: column[training[unit]] for name, column in rows.columns.items()}
            whole = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradient(params, row))]
            norm = np.sqrt(sum((g**2).sum() for g in whole))
            factor = min(1, clip_norm / norm) * grid_steps / clip_norm
            sums = [s + np.trunc(g * factor).astype(np.int64) for s, g in zip(sums, whole, strict=True)]
        rate = PEAK / (WARM_UP + 1) * (1 + t)
        for i, total in enumerate(sums):
            noised = total + noise_of(secrets["noise"], t, i, total.shape, bits)
            mean = noised * clip_norm / grid_steps / 12
            # Moments are compared first, and the update with those that were kept: Adam divides by the second one, and
            # where that is nearly zero a rounding of the gradient would show enlarged.
            # Rounding of float32 gradients is seen up to 1.2e-6; a unit moves the moment by 1e-2, and so does noise.
            np.testing.assert_allclose(after[1][i], 0.9 * first[i] + 0.1 * mean, rtol=1e-6, atol=5e-6)
            np.testing.assert_allclose(after[2][i], 0.95 * second[i] + 0.05 * mean**2, rtol=1e-5, atol=1e-6)
            deviation = np.sqrt(after[2][i] / (1 - 0.95 ** (t + 1))) + 1e-8
            moved = values[i] - rate * after[1][i] / (1 - 0.9 ** (t + 1)) / deviation
            np.testing.assert_allclose(after[0][i], moved, atol=3e-7)
    step, stored, _ = checkpoint.latest_parameters(workdir / "checkpoints")
    assert step == STEPS
    for before, kept, leaf in zip(leaves, states[-1][0], jax.tree.leaves(stored), strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), kept)
        assert np.abs(kept - np.asarray(before)).max() > 1e-3, "the tolerance is small beside what three steps move"
    assert abs(np.concatenate([m.ravel() for m in states[-1][1]])).max() > 1e-2

    # What is printed is the loss of the units that were held out, and nothing else was measured.
    held_out = sorted(set(range(rows.num_units)) - set(training))
    bits, size = 0.0, 0
    for number in held_out:
        row = {name: column[number] for name, column in rows.columns.items()}
        bits += float(loss(stored, {}, row)) * row["scored"].sum() / np.log(2)
        size += len(tokenizer.ByteTokenizer().decode(row["tokens"][row["scored"]]))
    assert held_out and float(done.stdout.split()[1]) == pytest.approx(bits / size, abs=2e-4)

    # A checkpoint holds the parameters, Adam's two moments of each, and one counter: nothing of a batch.
    (state,) = (path for path in (workdir / "checkpoints").iterdir() if path.name == str(STEPS))
    leaves = json.loads((state / "state/_METADATA").read_text())["tree_metadata"].items()
    paths = {ast.literal_eval(name) for name, leaf in leaves if leaf["value_metadata"]["value_type"] == "jax.Array"}
    ours = {tuple(key.key for key in path) for path, _ in jax.tree.flatten_with_path(stored)[0]}
    moments = {("optimizer_state", "0", moment, *path) for moment in ("mu", "nu") for path in ours}
    counters = {path for path in paths if path[0] == "optimizer_state" and path[-1] == "count"}
    assert paths == {("parameters", *path) for path in ours} | moments | counters and len(counters) <= 2
