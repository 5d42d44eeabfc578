"""Breaches of what accounts for privacy: accountant, ledger, reports, audit, sums over runs."""

from tests.breaches.mutation import SLOW_TOO, Mutation

AUDITED = ("tests/training/audit_test.py", "-k", "untouched_run_is_clean")
SECRECY, MOVING = "tests/training/secrecy_test.py", "tests/training/moving_test.py"
COUNTED = "tests/training/histogram_test.py"
TRAINER, RECORD, STEP, PREPARE = (f"dpgemma/training/{name}.py" for name in ("trainer", "record", "step", "prepare"))
PROCESSES, STORAGE = "tests/training/processes_test.py", "tests/training/storage_test.py"
ACCOUNTANT, TRUNCATION = "accounting/accountant.py", "accounting/loss_distribution/truncation.py"

MUTATIONS = (
    Mutation(
        "repeated steps", "a step may be repeated elsewhere once without a charge", "accounting/ledger/history.py",
        "return len(self.executions) - self.updates", "return max(0, len(self.executions) - self.updates - 1)",
        (MOVING, "-k", "charged_again"),
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
        "executed_lib.of(ledger.read(place / run_files.LEDGER)).has_spent]",
        "executed_lib.of(ledger.read(place / run_files.LEDGER)).finished]",
        ("tests/experiments/spending_test.py",),
    ),
    Mutation(
        "sweeps", "a run on private data is stopped where its losses say so", "experiments/sweep/worker.py",
        "*([divergence] if folder.public_data else [])", "divergence",
        ("tests/experiments/divergence_test.py", "-k", "private", *SLOW_TOO),
    ),
    Mutation(
        "sweeps", "a storage states an earlier sum while steps are taken", "experiments/sweep/sweep.py",
        "folder.publish()  # before a step is taken, so that no report in a storage says too little", "pass",
        ("tests/experiments/stored_sweep_test.py",),
    ),
    Mutation(
        "sweeps", "a machine replaces what another has kept in a storage", "experiments/sweep/stored_folder.py",
        "        self._merge_spent()\n        shown", "        shown",
        ("tests/experiments/stored_sweep_test.py",),
    ),
    Mutation(
        "sweeps", "the second result of a run replaces the first", "experiments/sweep/stored_folder.py",
        "self.objects.create(name, run_files.dumps(result).encode())",
        "self.objects.write(name, run_files.dumps(result).encode())",
        ("tests/experiments/stored_sweep_test.py",),
    ),
    Mutation(
        "sweeps", "a sum is stated while other machines are at work", "experiments/sweep/sweep.py",
        "if folder.is_shared and any(", "if False and any(",
        ("tests/experiments/stored_sweep_test.py",),
    ),
    Mutation(
        "sweeps", "a run whose folder was deleted has cost nothing", "experiments/sweep/privacy.py",
        "return sorted(path.parent for path in folder.spent.glob(f\"*/{run_files.LEDGER}\"))", "return folder.begun()",
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
        "epsilon if k == 1 else Accountant(mechanisms, also=also, group_size=k).quick_upper(delta)", "k * epsilon",
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
        "object storage", "steps are computed before their lines are stored", "accounting/ledger/chain.py",
        "            self._copy(self.length, text)\n", "            pass\n",
        (STORAGE, "-k", "before_its_step_is_computed"),
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
        "replaced contents", "a content is charged like a presence", ACCOUNTANT,
        "m.noise_multiplier, above, below, rest, rest)", "m.noise_multiplier, above, (), rest)",
        ("tests/accounting/replaced_test.py",),
    ),
    Mutation(
        "synthetic text", "a card without the run's deviations", "accounting/report/card.py",
        "Deviations of the run:\n\n{deviations}", "", ("tests/inference/synthesis_test.py", "-k", "card"),
    ),
    Mutation(
        "beside the steps", "solvers leave no room for a histogram", "accounting/calibration.py",
        "return Accountant(mechanism, also=also).upper(delta, interval=interval) <= epsilon",
        "return Accountant(mechanism).upper(delta, interval=interval) <= epsilon",
        ("tests/accounting/accountant_test.py", "-k", "every_solver"),
    ),
    Mutation(
        "beside the steps", "a histogram costs nothing until the last step", ACCOUNTANT,
        "parts = [(m, m.steps) for m in self.also]",
        "parts = [(m, m.steps) for m in self.also if steps in (None, self.steps)]",
        ("tests/accounting/accountant_test.py", "-k", "released_besides"),
    ),
    Mutation(
        "beside the steps", "a ledger's histogram is not charged", "accounting/ledger/executed.py",
        'if record["kind"] == events.HISTOGRAM', 'if record["kind"] == "other"', (COUNTED, "-k", "part_of_the_budget"),
    ),
    Mutation(
        "beside the steps", "owners of several units pay for a histogram as owners of one do",
        "accounting/report/tables.py", "Accountant(mechanisms, also=also, group_size=k)",
        "Accountant(mechanisms, group_size=k)",
        ("tests/accounting/accountant_test.py", "-k", "released_besides"),
    ),
    Mutation(
        "beside the steps", "another content costs no histogram", "accounting/report/spending.py",
        "also=accountant.also, replaced=True", "replaced=True", (COUNTED, "-k", "part_of_the_budget"),
    ),
    Mutation(
        "beside the steps", "copies may release other counts under one noise", "accounting/tuning.py",
        "if None not in counts and counts[0] != counts[1]:", "if False:",
        ("tests/accounting/tuning_test.py", "-k", "histograms"),
    ),
    Mutation(
        "beside the steps", "a histogram that was declared may be taken out of the ledger",
        "accounting/audit/ledger_checks.py", "if wanted != (None, None) and steps and not found:", "if False:",
        (COUNTED, "-k", "audit_finds"),
    ),
)  # fmt: skip
