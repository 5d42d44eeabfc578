"""Breaches of what trains and samples: data, batches, clipping, noise, keys, what is shown."""

from tests.breaches.mutation import SLOW_TOO, Mutation

RECOMPUTED = ("tests/training/recomputed_test.py",)
AUDITED = ("tests/training/audit_test.py", "-k", "untouched_run_is_clean")
SECRECY, MOVING = "tests/training/secrecy_test.py", "tests/training/moving_test.py"
COUNTED = "tests/training/histogram_test.py"
REPLAY, UNFIT = ("tests/training/replay_test.py",), ("tests/training/run_test.py", "-k", "does_not_fit")
TRAINER, RECORD, STEP, PREPARE = (f"dpgemma/training/{name}.py" for name in ("trainer", "record", "step", "prepare"))
PROCESSES, STORAGE = "tests/training/processes_test.py", "tests/training/storage_test.py"
CLIPPING, NOISE = "dpgemma/privacy/clipping.py", "dpgemma/privacy/noise.py"
INTEGER_NOISE, KEYS = "dpgemma/privacy/integer_noise.py", "dpgemma/privacy/keys.py"

MUTATIONS = (
    Mutation(
        "noise of the real loop", "every step has the keys of step 0", TRAINER,
        "noise_keys(keys.noise, t)", "noise_keys(keys.noise, 0)", RECOMPUTED,
    ),
    Mutation(
        "noise of the real loop", "every other step has no noise of its own", TRAINER,
        "noise_keys(keys.noise, t)", "noise_keys(keys.noise, t - t % 2)", RECOMPUTED,
    ),
    Mutation(
        "independence of noise", "arrays of equal shape share noise", NOISE,
        "integer_noise.add(leaf, key_data, i, bits, in_shards)",
        "integer_noise.add(leaf, key_data, leaf.size, bits, in_shards)",
        ("tests/privacy/exact_release_test.py", "-k", "share_their_noise"),
    ),
    Mutation(
        "independence of noise", "the layers of a stacked array share noise", INTEGER_NOISE,
        "* jnp.uint32(stride)", "* jnp.uint32(stride == 1)",
        ("tests/privacy/exact_release_test.py", "-k", "share_their_noise"),
    ),
    Mutation(
        "independence of noise", "chunks of a large array share noise", INTEGER_NOISE,
        "noise(jnp.asarray(first_row, jnp.uint32), at_once)", "noise(jnp.uint32(0), at_once)",
        ("tests/privacy/integer_noise_test.py",),
    ),
    Mutation(
        "independence of noise", "every device makes the noise of the first shard", "dpgemma/sharding/place.py",
        "first[axis] = jax.lax.axis_index(names) * shard.shape[axis]", "first[axis] = 0",
        ("tests/privacy/integer_noise_test.py", "-k", "which_device"),
    ),
    Mutation(
        "which rows are trained on", "rows are taken by their numbers in all data", "dpgemma/data/source.py",
        "self.source.read(self.numbers[units])", "self.source.read(units)", RECOMPUTED,
    ),
    Mutation(
        "hold-out by content", "the assignment follows the rows' bytes", "dpgemma/data/holdout.py",
        "is_held_out = held_out(secret, count, fraction)",
        "rows = [next(iter(source.read(np.array([i]))[0].values())).tobytes() for i in range(source.num_units)]\n"
        "    hashes = [keystream.hashlib.blake2b(row, key=secret[:32], digest_size=8) for row in rows]\n"
        "    words = [int.from_bytes(found.digest()) for found in hashes]\n"
        "    is_held_out = np.array(words, np.uint64) < np.uint64(int(fraction * 2**64))",
        ("tests/data/data_test.py", "-k", "pitfall_3"),
    ),
    Mutation(
        "which rows are evaluated", "the printed loss is that of training rows", PREPARE,
        "        held_out=held_out,\n", "        held_out=training,\n", RECOMPUTED,
    ),
    Mutation(
        "coupling between units", "the loss is weighted by the scored tokens of its device", STEP,
        "return loss(trainable, frozen, unit)",
        "return loss(trainable, frozen, unit) * batch.rows['scored'].sum() / (batch.rows['scored'].sum() + 100.0)",
        RECOMPUTED,
    ),
    Mutation(
        "coupling between units", "a unit's factor follows the microbatch's largest norm", CLIPPING,
        "factors, keep = factor(lengths, norms.margin(params)),",
        "factors, keep = factor(jnp.full_like(lengths, lengths.min()), norms.margin(params)),",
        ("tests/privacy/clipping_test.py",),
    ),
    Mutation(
        "optimizer sees what was not noised", "Adam's second moment from the clipped sum", STEP,
        "return state.apply(optimizer, mean), stats",
        "after = state.apply(optimizer, mean)\n"
        "        raw = jax.tree.map(lambda x: (x / (1.0 * clipped.steps)) ** 2 * 0.05, clipped.total)\n"
        "        adam = after.optimizer_state\n"
        "        if isinstance(adam, tuple) and hasattr(adam[0], 'nu'):\n"
        "            adam = (adam[0]._replace(nu=raw), *adam[1:])\n"
        "        return dataclasses.replace(after, optimizer_state=adam), stats",
        RECOMPUTED,
    ),
    Mutation(
        "optimizer sees what was not noised", "the update takes the clipped mean", STEP,
        "mean = divide(noised, mechanism.expected_batch_size)",
        "mean = divide(noised, mechanism.expected_batch_size)\n"
        "        if clipped.steps is not None:\n"
        "            raw = jax.tree.map(lambda x: x * (clipped.sensitivity / clipped.steps), clipped.total)\n"
        "            mean = divide(dataclasses.replace(noised, total=raw), mechanism.expected_batch_size)",
        RECOMPUTED,
    ),
    Mutation(
        "optimizer sees what was not noised", "the mean loss of a batch scales its update", STEP,
        "mean = divide(noised, mechanism.expected_batch_size)",
        "mean = divide(noised, mechanism.expected_batch_size)\n"
        "        by = 1 + 1e-3 * stats.losses.mean()\n"
        "        mean = dataclasses.replace(mean, mean=jax.tree.map(lambda x: x * by, mean.mean))",
        REPLAY,
    ),
    Mutation(
        "scaling by strategy", "normalise does not divide by C", CLIPPING,
        "return factor if self.clip.kind == CLIP else factor / self.norm * (1 - 4 * norms.UNIT_ROUNDOFF)",
        "return factor",
        ("tests/privacy/released_norm_test.py", "-k", "every_scaling"),
    ),
    Mutation(
        "scaling by strategy", "AUTO-S gives every layer the whole norm", CLIPPING,
        "return share * (1 - margin) / (norm + STABILISER)", "return (1 - margin) / (norm + STABILISER)",
        ("tests/privacy/released_norm_test.py", "-k", "every_scaling"),
    ),
    Mutation(
        "scaling by strategy", "AUTO-S with a stabiliser of the other sign", CLIPPING,
        "return share * (1 - margin) / (norm + STABILISER)", "return share * (1 - margin) / (norm - 0.01 * norm)",
        ("tests/privacy/released_norm_test.py", "-k", "every_scaling"),
    ),
    Mutation(
        "origin of keys", "keys from the clock and the process number", KEYS,
        "return cls(*(secrets.token_bytes(_BYTES) for _ in dataclasses.fields(cls)))",
        "import random, time\n"
        "        rng = random.Random(time.time_ns() * os.getpid())\n"
        "        return cls(*(rng.randbytes(_BYTES) for _ in dataclasses.fields(cls)))",
        (SECRECY, "-k", "pitfall_15_keys"),
    ),
    Mutation(
        "origin of keys", "all keys are equal", KEYS,
        "return cls(*(secrets.token_bytes(_BYTES) for _ in dataclasses.fields(cls)))",
        "return cls(*[secrets.token_bytes(_BYTES)] * len(dataclasses.fields(cls)))",
        (SECRECY, "-k", "pitfall_15_keys"),
    ),
    Mutation(
        "keys in public files", "base64 in config.json", "dpgemma/training/run.py",
        "text = run_files.dumps(config)",
        "import base64\n        text = run_files.dumps(config | {'build': base64.b64encode(keys.noise).decode()})",
        (SECRECY, "-k", "piece_of_a_key"),
    ),
    Mutation(
        "keys in public files", "the run's name is half of a key", "dpgemma/training/run.py",
        "run_id=secrets.token_hex(16)", "run_id=keys.noise[:16].hex()", (SECRECY, "-k", "piece_of_a_key"),
    ),
    Mutation(
        "order of ledger and step", "a step is in the ledger once its result is there", TRAINER,
        "                record.before(t)\n"
        "                result = dp_step(state, frozen, batch, noise_keys(keys.noise, t))\n",
        "                result = dp_step(state, frozen, batch, noise_keys(keys.noise, t))\n"
        "                jax.block_until_ready(result)\n"
        "                record.before(t)\n",
        ("tests/training/run_test.py", "-k", "before_it_is_computed"),
    ),
    Mutation(
        "public numbers that carry private ones", "the last digits of the learning rate carry the loss", RECORD,
        "learning_rate=released.learning_rate)", "learning_rate=released.learning_rate * (1 + raw.loss * 1e-6))",
        AUDITED,
    ),
    Mutation(
        "public numbers that carry private ones", "the last digits of epsilon carry the batch", RECORD,
        "epsilon = run_files.encode(rounding.round_up(released.epsilon))",
        "epsilon = run_files.encode(rounding.round_up(released.epsilon) + raw.units * 1e-9)", AUDITED,
    ),
    Mutation(
        "standard error", "the size of every batch is printed", RECORD,
        "raw = Private(**metrics.private_summary(stats, drawn))",
        "raw = Private(**metrics.private_summary(stats, drawn))\n"
        "        self.observers[0].inform(f'{drawn} units')",
        (SECRECY, "-k", "known_and_public"),
    ),
    Mutation(
        "state that holds private values", "the mean loss is a leaf of the checkpoint", STEP,
        'optional = {"clip_norm": self.clip_norm,',
        'optional = {"average": jax.numpy.float32(3.2), "clip_norm": self.clip_norm,',
        RECOMPUTED,
    ),
    Mutation(
        "repeated steps", "noise of a repeated step is that of the first place", "dpgemma/training/run.py",
        '"places": [list(entry) for entry in lineage],', '"places": [list(entry) for entry in lineage[:1]],',
        (MOVING, "-k", "keys_follow"),
    ),
    Mutation(
        "repeated steps", "keys follow the last place alone", "dpgemma/training/run.py",
        '"places": [list(entry) for entry in lineage],', '"places": [list(entry) for entry in lineage[-1:]][0][1:],',
        (MOVING, "-k", "keys_follow"),
    ),
    Mutation(
        "repeated steps", "a run goes on from a state that another way led to", "dpgemma/training/checkpoint.py",
        "if then.way_to(step) != ledger.history.way_to(step):", "if False:", ("tests/training/checkpoint_test.py",),
    ),
    Mutation(
        "public numbers that carry private ones", "what the audit recomputes may be spelt in any way",
        "accounting/audit/metrics_checks.py", "if row != json.dumps(stored).encode():", "if False:",
        ("tests/training/metrics_test.py",),
    ),
    Mutation(
        "repeated steps", "repeated steps may pass the target", RECORD,
        "if spent > self.plan.epsilon * (1 + _LAST_BITS):", "if False:", (MOVING, "-k", "beyond_the_target", *SLOW_TOO),
    ),
    Mutation(
        "repeated steps", "two states of a step are saved", "dpgemma/training/checkpoint.py",
        'if ledger.history.state_at(step) not in (None, sha256["state_sha256"]):', "if False:",
        ("tests/training/checkpoint_test.py",),
    ),
    Mutation(
        "noise of the real loop", "the check value of the keys leaves one key out", KEYS,
        "        text = json.dumps(self.as_hex(), sort_keys=True).encode()\n",
        "        text = json.dumps(self.as_hex() | {'noise': ''}, sort_keys=True).encode()\n",
        ("tests/privacy/keys_test.py",),
    ),
    Mutation(
        "identity of a run", "a config.json that was changed goes on", "dpgemma/training/run.py",
        'if run_files.file_digest(self.config_file) != declared:', "if False:", UNFIT,
    ),
    Mutation(
        "noise of the real loop", "a wrong bit in the file of the keys is not noticed", KEYS,
        "if stored.get(_CHECK, keys._check()) != keys._check():", "if False:", UNFIT,
    ),
    Mutation(
        "identity of a run", "number formats and attention may change on resume", "dpgemma/training/settings.py",
        'OPERATIONAL = ("checkpoint_every", "keep_checkpoints", "eval_data",',
        'OPERATIONAL = ("dtype", "attention", "remat", "checkpoint_every", "keep_checkpoints", "eval_data",',
        (MOVING, "-k", "every_setting"),
    ),
    Mutation(
        "fingerprint of data", "which tokens are scored is left out", "dpgemma/data/source.py",
        "for column in [*self.columns.values(), *([] if self.first is None else [self.first])]:",
        "for column in [*list(self.columns.values())[:1], *([] if self.first is None else [self.first])]:",
        ("tests/training/units_test.py", "-k", "fingerprint"),
    ),
    Mutation(
        "release", "gradients are rounded to the nearest grid point, which lengthens some", CLIPPING,
        "return scaled if self.steps is None else scaled.astype(jnp.int32)",
        "return scaled if self.steps is None else jnp.round(scaled).astype(jnp.int32)",
        ("tests/privacy/exact_sum_test.py", "-k", "coarse_grid"),
    ),
    Mutation(
        "release", "sums on a grid are added as floats", CLIPPING,
        "kind = jnp.float32 if steps is None else jnp.int32",
        "kind = jnp.float32", ("tests/privacy/exact_sum_test.py", "-k", "adversarial_batch_moves"),
    ),
    Mutation(
        "release", "noise is half of what is charged", INTEGER_NOISE,
        "return total - DRAWS * (2**FILLING_BITS - 1) // 2",
        "return (total - DRAWS * (2**FILLING_BITS - 1) // 2) // 2",
        ("tests/privacy/exact_release_test.py", "-k", "not_below"),
    ),
    Mutation(
        "keys bound to places", "code has no part in the environment", "dpgemma/training/environment.py",
        "; code {source_digest()[:16]}", "", (MOVING, "-k", "code_and_versions"),
    ),
    Mutation(
        "keys bound to places", "the mesh has no part in the environment", "dpgemma/training/environment.py",
        "; mesh {mesh}", "", (MOVING, "-k", "meshes_variables"),
    ),
    Mutation(
        "keys bound to places", "threads have no part in the environment", "dpgemma/training/environment.py",
        ", {threads} threads", "", (MOVING, "-k", "meshes_variables"),
    ),
    Mutation(
        "keys bound to places", "processes along a model axis have no part in the environment",
        "dpgemma/training/environment.py", "if (mesh.model > 1 or not sums_are_exact) and", "if not sums_are_exact and",
        (MOVING, "-k", "number_of_processes"),
    ),
    Mutation(
        "units over devices", "every row of devices has the units of the first", TRAINER,
        "collate(self.source, units, slots, (number, rows))", "collate(self.source, units, slots, (0, rows))",
        RECOMPUTED,
    ),
    Mutation(
        "several processes", "each process draws batches of its own", RECORD,
        "        return Keys.of_hex(processes.from_first(bound))\n",
        "        keys = Keys.of_hex(processes.from_first(bound))\n"
        "        mine = bytes([77]) * 32 if processes.number() else keys.sampling\n"
        "        return dataclasses.replace(keys, sampling=mine)\n",
        (PROCESSES, "-k", "states"),
    ),
    Mutation(
        "several processes", "each process makes noise of its own", RECORD,
        "        return Keys.of_hex(processes.from_first(bound))\n",
        "        keys = Keys.of_hex(processes.from_first(bound))\n"
        "        mine = bytes([77]) * 32 if processes.number() else keys.noise\n"
        "        return dataclasses.replace(keys, noise=mine)\n",
        (PROCESSES, "-k", "states"),
    ),
    Mutation(
        "several processes", "an error shows the keys", "dpgemma/sharding/processes.py",
        "    return cast(T, told)\n", "    print(told)\n    return cast(T, told)\n",
        (PROCESSES, "-k", "none_outlives", *SLOW_TOO),
    ),
    Mutation(
        "keys bound to places", "variables of compilers have no part in the environment",
        "dpgemma/training/environment.py", "return name.startswith(_VARIABLES) and _matters(name)", "return False",
        (MOVING, "-k", "meshes_variables"),
    ),
    Mutation(
        "sums over devices", "what is held whole at rest is not added up", "dpgemma/sharding/place.py",
        "return jax.lax.psum(part, over) if over else part", "return part",
        ("tests/privacy/exact_sum_test.py", "-k", "depend_on_devices"),
    ),
    Mutation(
        "sums over devices", "sums of slices are not added up", "dpgemma/sharding/place.py",
        "over = tuple(axis for axis in over if axis != DATA_AXIS)", "over = ()",
        ("tests/sharding/tensor_test.py", "-k", "depend_on_the_mesh and vaultgemma"),
    ),
    Mutation(
        "sums over devices", "a fully sharded sum holds units twice", "dpgemma/sharding/place.py",
        "return jax.lax.psum_scatter(whole,", "return 2 * jax.lax.psum_scatter(whole,",
        ("tests/sharding/tensor_test.py", "-k", "fully_sharded", *SLOW_TOO),
    ),
    Mutation(
        "users", "every record is a unit of its own", "dpgemma/data/text/pieces.py",
        "(i if piece.user is None else piece.user for", "(i for",
        ("tests/data/grouped_test.py", "-k", "touch_no_other"),
    ),
    Mutation(
        "users", "texts of two users share a row", "dpgemma/data/text/layout.py",
        "own = self._order[self._begin[unit] : self._begin[unit + 1]]",
        "own = self._order[max(self._begin[unit] - 1, 0) : self._begin[unit + 1]]",
        ("tests/data/grouped_test.py", "-k", "touch_no_other"),
    ),
    Mutation(
        "users", "of rows that are drawn one by one, only those of few users are", "dpgemma/privacy/samplers.py",
        "return PoissonSampler(sampling.num_items,", "return PoissonSampler(sampling.num_units,",
        ("tests/training/users_test.py", "-k", "one_by_one", *SLOW_TOO),
    ),
    Mutation(
        "users", "a user's row that was not drawn takes part", "dpgemma/data/source.py",
        "found = np.flatnonzero(held[at] == units) if len(held)", "found = np.arange(len(units)) if len(held)",
        ("tests/data/grouped_test.py", "-k", "items"),
    ),
    Mutation(
        "users", "every row of a user is clipped by itself", "dpgemma/privacy/row_by_row.py",
        "ends = is_here & ((i + 1 >= count) | (after != slot))", "ends = is_here",
        ("tests/training/users_test.py", "-k", "without_a_user_the_sum and example_scan"),
    ),
    Mutation(
        "users", "a user's gradient goes on into the next user's", "dpgemma/privacy/row_by_row.py",
        "jnp.where(ends, jnp.zeros_like(leaf), leaf)", "leaf",
        ("tests/training/users_test.py", "-k", "without_a_user_the_sum and example_scan"),
    ),
    Mutation(
        "users", "the norm of a user's gradient is taken before its last row", "dpgemma/privacy/row_by_row.py",
        "add_unit, lambda total, _: (total, jnp.float32(0)), total, gradient)",
        "lambda total, new: (jax.tree.map(lambda s, g: s + placed(g * factor(norms.l2_norm(carry[1]) + 1e-9, margin)),"
        " total, new), norms.l2_norm(new)), lambda total, _: (total, jnp.float32(0)), total, gradient)",
        ("tests/training/users_test.py", "-k", "without_a_user_the_sum and example_scan"),
    ),
    Mutation(
        "users", "devices that wait for each other add a user at each of his rows", "dpgemma/privacy/row_by_row.py",
        "lambda new, old: jnp.where(ends, new, old)", "lambda new, old: new",
        ("tests/training/units_test.py", "-k", "together"),
    ),
    Mutation(
        "token cache", "rows of other units are read without a word", "dpgemma/data/text/cache.py",
        "if not ((own == numbers) & (first <= numbers) & (numbers < end) & (units == units % self.num_units)).all():",
        "if False:",
        ("tests/data/cache_test.py", "-k", "never_read"),
    ),
    Mutation(
        "which rows are trained on", "of very many units, those that are held out are trained on",
        "dpgemma/data/holdout.py",
        "Reordered(source, order, training, count - training)", "Reordered(source, order, 0, count - training)",
        ("tests/data/holdout_test.py", "-k", "without_a_list"),
    ),
    Mutation(
        "object storage", "two processes may write one line", "dpgemma/storage/objects.py",
        'content, mode="create")', "content)",
        (STORAGE, "-k", "same_line"),
    ),
    Mutation(
        "norms", "roundings of inner products of inputs are not paid for", "dpgemma/privacy/norm_rules.py",
        "slack = e_x * over_pairs(g_TxT, x_T) + e_g", "slack = e_g", ("tests/privacy/norms_test.py", "-k", "slack"),
    ),
    Mutation(
        "norms", "rows of a tied embedding that cancel are not paid for", "dpgemma/privacy/norm_rules.py",
        "jnp.sum(_lengths(g_TxD) * added_S)", "jnp.sum(_lengths(g_TxD) * _lengths(rows_SxD))",
        ("tests/privacy/norms_test.py", "-k", "slack"),
    ),
    Mutation(
        "norms", "compilers may join sums of sums", "dpgemma/privacy/norms.py",
        "return jax.lax.optimization_barrier(summed)", "return summed",
        ("tests/privacy/norms_test.py", "-k", "join_no_sums"),
    ),
    Mutation(
        "sampler", "a probability is resolved to 2^-53 only", "dpgemma/privacy/samplers.py",
        "logarithm = np.where(words < np.uint64(2**63), near_zero, near_one)",
        "logarithm = np.log((words.astype(np.float64) + 0.5) * 2.0**-64)",
        ("tests/privacy/poisson_test.py", "-k", "small_probabilities"),
    ),
    Mutation(
        "a model of one's own", "every step has the noise of the first", "dpgemma/training/fit.py",
        "noise_keys(keys.noise, t)", "noise_keys(keys.noise, 0)", ("tests/training/fit_test.py", "-k", "steps_are"),
    ),
    Mutation(
        "a model of one's own", "keys are the same for every run", "dpgemma/training/fit.py",
        "keys = keys or Keys.new()", "keys = keys or Keys(bytes(32), bytes(32))",
        ("tests/training/fit_test.py", "-k", "keys_are_new"),
    ),
    Mutation(
        "public figures", "TensorBoard's public folder gets the loss", "dpgemma/commands/tensorboard.py",
        'self._private.add_scalar("loss",', 'self._public.add_scalar("loss",',
        ("tests/training/evaluation_test.py", "-k", "losses_go"),
    ),
    Mutation(
        "public figures", "the loss is shown where standard error is no terminal", "dpgemma/commands/terminal.py",
        "[loss] if self._shows_private else []", "[loss]", ("tests/training/secrecy_test.py", "-k", "all_that_is_said"),
    ),
    Mutation(
        "public numbers that carry private ones", "a default batch follows the number of units, where that is private",
        PREPARE, "(settings.num_units or num_units) * settings", "num_units * settings",
        ("tests/training/defaults_test.py", "-k", "how_many_units"),
    ),
    Mutation(
        "beside the steps", "the live epsilon leaves a histogram out", RECORD,
        "Accountant(releases, also=self.plan.also, claimed", "Accountant(releases, claimed",
        (COUNTED, "-k", "part_of_the_budget"),
    ),
    Mutation(
        "histogram", "a unit of several rows is counted for each", "dpgemma/data/text/prompts.py",
        "unit // np.maximum(np.bincount(owner[answers], minlength=len(units)), 1)", "np.full(len(units), unit)",
        (COUNTED, "-k", "at_most_one"),
    ),
    Mutation(
        "histogram", "counts are released as they are", "dpgemma/training/histogram.py",
        "noised = counts + np.asarray(", "noised = counts + 0 * np.asarray(", (COUNTED, "-k", "stated_deviation"),
    ),
    Mutation(
        "histogram", "a unit is more than its noise is made for", "accounting/mechanism/histogram.py",
        "return int(grid.sensitivity_steps(grid.LAW_BITS, noise))", "return round(2**grid.LAW_BITS / noise)",
        (COUNTED, "-k", "at_most_one"),
    ),
    Mutation(
        "histogram", "its noise is that of a step", "dpgemma/training/run.py",
        'return self.step_keys(start, ()).bound({"purpose": "histogram", "counting": COUNTING}).noise',
        'return self.step_keys(start, ((0, start["environment"]),)).noise', (COUNTED, "-k", "runs_key"),
    ),
    Mutation(
        "histogram", "it is released again whenever the run goes on", RECORD,
        "if self.ledger is None or histogram.is_in(self.ledger.records):", "if self.ledger is None:",
        (COUNTED, *SLOW_TOO, "-k", "whatever_happens"),
    ),
)  # fmt: skip
