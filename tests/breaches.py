"""The breaches of privacy that tests.mutations plants: text of the source, what takes its place, and who notices.

Every one is a member of a kind of breach; the tests are meant to notice the kind.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One breach.

    Attributes:
      kind: of which it is a member.
      what: one line.
      file: that is changed.
      old, new: text that occurs once, and what takes its place.
      tests: arguments of pytest; at least one of these tests must fail.
    """

    kind: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


RECOMPUTED = ("tests/training/recomputed_test.py",)
AUDITED = ("tests/training/audit_test.py", "-k", "untouched_run_is_clean")
SECRECY, MOVING = "tests/training/secrecy_test.py", "tests/training/moving_test.py"
TRAINER, RECORD, STEP, PREPARE = (f"dpgemma/training/{name}.py" for name in ("trainer", "record", "step", "prepare"))
PROCESSES, STORAGE = "tests/training/processes_test.py", "tests/training/storage_test.py"
CLIPPING, NOISE = "dpgemma/privacy/clipping.py", "dpgemma/privacy/noise.py"
INTEGER_NOISE, KEYS = "dpgemma/privacy/integer_noise.py", "dpgemma/privacy/keys.py"
ACCOUNTANT, TRUNCATION = "accounting/accountant.py", "accounting/loss_distribution/truncation.py"

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
        "held_out=held_out, evaluation", "held_out=training, evaluation", RECOMPUTED,
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
        "return state.apply(optimizer, mean), clipped.stats",
        "after = state.apply(optimizer, mean)\n"
        "        raw = jax.tree.map(lambda x: (x / (1.0 * clipped.steps)) ** 2 * 0.05, clipped.total)\n"
        "        adam = after.optimizer_state\n"
        "        if isinstance(adam, tuple) and hasattr(adam[0], 'nu'):\n"
        "            adam = (adam[0]._replace(nu=raw), *adam[1:])\n"
        "        return dataclasses.replace(after, optimizer_state=adam), clipped.stats",
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
        "repeated steps", "a step may be repeated elsewhere once without a charge", "accounting/ledger/history.py",
        "return len(self.executions) - self.updates", "return max(0, len(self.executions) - self.updates - 1)",
        (MOVING, "-k", "charged_again"),
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
        "if spent > self.plan.epsilon * (1 + _LAST_BITS):", "if False:", (MOVING, "-k", "beyond_the_target"),
    ),
    Mutation(
        "repeated steps", "two states of a step are saved", "dpgemma/training/checkpoint.py",
        'if ledger.history.state_at(step) not in (None, sha256["state_sha256"]):', "if False:",
        ("tests/training/checkpoint_test.py",),
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
        "a resumed run's report", "steps before the last resume are not counted", "accounting/ledger/executed.py",
        'steps = [record for record in records if record["kind"] == events.STEP]',
        'last = max((i for i, r in enumerate(records) if r["kind"] == events.RESUME), default=0)\n'
        '        steps = [record for record in records[last:] if record["kind"] == events.STEP]',
        ("tests/training/forks_test.py", "-k", "in_its_place"),
    ),
    Mutation(
        "sweeps", "unfinished runs are left out of the sum", "experiments/sweep/privacy.py",
        "executed_lib.of(ledger.read(place / run_files.LEDGER)).steps]",
        "executed_lib.of(ledger.read(place / run_files.LEDGER)).finished]",
        ("tests/experiments/spending_test.py",),
    ),
    Mutation(
        "sweeps", "a run whose folder was deleted has cost nothing", "experiments/sweep/privacy.py",
        "return sorted(path.parent for path in folder.spent.glob(f\"*/{run_files.LEDGER}\"))", "return _begun(folder)",
        ("tests/experiments/spending_test.py",),
    ),
    Mutation(
        "composition", "runs of the same plan are counted once", ACCOUNTANT,
        "taken[alike] = taken.get(alike, 0) + m.sampling.releases(share)", "taken[alike] = m.sampling.releases(share)",
        ("tests/accounting/accountant_test.py", "-k", "capped_part or run_in_parts"),
    ),
    Mutation(
        "composition", "truncation is charged for the last part only", ACCOUNTANT,
        "        for m, count in phases:\n            costs = [",
        "        for m, count in phases[-1:]:\n            costs = [",
        ("tests/accounting/accountant_test.py", "-k", "capped_part"),
    ),
    Mutation(
        "composition", "truncation is not charged in the profile of deltas", ACCOUNTANT,
        "return np.minimum.accumulate(np.minimum(plain + extra, 1.0))",
        "return np.minimum.accumulate(np.minimum(plain, 1.0))",
        ("tests/accounting/accountant_test.py", "-k", "capped_part"),
    ),
    Mutation(
        "tables", "owners of k units have k times epsilon", "accounting/report/tables.py",
        "epsilon if k == 1 else Accountant(mechanisms, group_size=k).quick_upper(delta)", "k * epsilon",
        ("tests/accounting/conversions_test.py", "-k", "tables_of"),
    ),
    Mutation(
        "tables", "owners of k units have the epsilon of k - 1", "accounting/report/tables.py",
        "group_size=k)", "group_size=k - 1)", ("tests/accounting/conversions_test.py", "-k", "tables_of"),
    ),
    Mutation(
        "tightness of a bound that must not be lowered", "displacement is halved", TRUNCATION,
        "return min(1.0, steps * overflow_probability(others,",
        "return min(1.0, 0.5 * steps * overflow_probability(others,",
        ("tests/accounting/accountant_test.py", "-k", "displacement"),
    ),
    Mutation(
        "model card", "it shows the target epsilon", "accounting/report/card.py",
        '| {name} | {report[name]} |" for name in rows',
        """| {name} | {report['target_epsilon' if name == 'epsilon' else name]} |" for name in rows""", AUDITED,
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
        (PROCESSES, "-k", "none_outlives"),
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
        ("tests/sharding/tensor_test.py", "-k", "fully_sharded"),
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
        "users", "rows that are drawn one by one are charged as one", ACCOUNTANT,
        "q, k = m.sampling.inclusion_probability, self._group_size * m.items_per_unit",
        "q, k = m.sampling.inclusion_probability, self._group_size",
        ("tests/accounting/items_test.py", "-k", "owners_of_several or plane"),
    ),
    Mutation(
        "users", "a cap is paid for by one row of a user", TRUNCATION,
        "k = mechanism.items_per_unit if group_items is None else group_items",
        "k = 1 if group_items is None else group_items",
        ("tests/accounting/items_test.py", "-k", "cap_is_paid"),
    ),
    Mutation(
        "users", "delta pays for one displaced row of a user", ACCOUNTANT,
        "truncation.displacement_delta(m, count, self._group_size * m.items_per_unit)",
        "truncation.displacement_delta(m, count, self._group_size)",
        ("tests/accounting/items_test.py", "-k", "may_reveal"),
    ),
    Mutation(
        "users", "of rows that are drawn one by one, only those of few users are", "dpgemma/privacy/samplers.py",
        "return PoissonSampler(sampling.num_items,", "return PoissonSampler(sampling.num_units,",
        ("tests/training/users_test.py", "-k", "one_by_one"),
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
        "object storage", "steps are computed before their lines are stored", "accounting/ledger/chain.py",
        "            self._copy(self.length, text)\n", "            pass\n",
        (STORAGE, "-k", "before_its_step_is_computed"),
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
        "audit", "seals outside the chain are not looked at", "accounting/audit/seal_checks.py",
        "findings = surplus + _remembered", "findings = _remembered",
        ("tests/training/tampering_test.py", "-k", "seal"),
    ),
    Mutation(
        "audit", "a checkpoint's optimizer state is not looked at", "accounting/audit/document_checks.py",
        'elif "state_sha256" in line.record and', "elif False and",
        ("tests/training/tampering_test.py", "-k", "optimizer"),
    ),
    Mutation(
        "audit", "links count as files", "accounting/audit/folder_checks.py",
        "return path.is_file() and not path.is_symlink()", "return path.is_file()",
        ("tests/training/tampering_test.py", "-k", "link"),
    ),
    Mutation(
        "audit", "a public key passes for the key of HMACs", "accounting/ledger/seals.py",
        "return PublicKey(self.public) if self.public is not None and name == SIGNED_CHAIN else None",
        "return PublicKey(self.public) if name == SIGNED_CHAIN else with_secret(name, self.public or b'')",
        ("tests/training/sealed_test.py", "-k", "nobodys_hmac"),
    ),
    Mutation(
        "audit", "a sealed ledger may be cut", "accounting/audit/seal_checks.py",
        "if not (0 < length <= len(lines) and lines[length - 1].hash == head):",
        "if length <= len(lines) and lines[length - 1].hash != head:",
        ("tests/training/sealed_test.py", "-k", "was_cut"),
    ),
    Mutation(
        "forks", "a fork that comes back shares its noise's charge", "accounting/tuning.py",
        "own = {(run.declared[\"run_id\"], *execution): record",
        "own = {(run.declared[\"run_id\"], execution[0], execution[1][-1:]): record",
        ("tests/accounting/tuning_test.py", "-k", "fork"),
    ),
    Mutation(
        "sampler", "a probability is resolved to 2^-53 only", "dpgemma/privacy/samplers.py",
        "logarithm = np.where(words < np.uint64(2**63), near_zero, near_one)",
        "logarithm = np.log((words.astype(np.float64) + 0.5) * 2.0**-64)",
        ("tests/privacy/poisson_test.py", "-k", "small_probabilities"),
    ),
    Mutation(
        "replaced contents", "a content is charged like a presence", ACCOUNTANT,
        "m.noise_multiplier, above, below, rest, rest)", "m.noise_multiplier, above, (), rest)",
        ("tests/accounting/replaced_test.py",),
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
        "synthetic text", "a card without the run's deviations", "accounting/report/card.py",
        "Deviations of the run:\n\n{deviations}", "", ("tests/inference/synthesis_test.py", "-k", "card"),
    ),
)  # fmt: skip
