"""Breaches of canaries, of the bounds that an attack on them gives, and of noise that a white-box attack sees."""

from tests.breaches.mutation import Mutation

ATTACK, BOUNDS = "tests/training/attack_test.py", "tests/accounting/empirical_test.py"
PLANTED = "tests/data/canaries_test.py"
CHECKS, PROTOCOL = "accounting/audit/canary_checks.py", "accounting/empirical/protocol.py"
CANARIES, RECORD = "dpgemma/data/canaries.py", "dpgemma/training/record.py"

MUTATIONS = (
    Mutation(
        "noise of the real loop", "a quarter of the noise", "dpgemma/privacy/integer_noise.py",
        "coarser = LAW_BITS - bits\n", "coarser = LAW_BITS - bits + 2\n", (ATTACK, "-k", "white_box_attack_on_a_real"),
    ),
    Mutation(
        "canaries", "coins from a public seed", CANARIES,
        'keystream.uniform_uint64(keystream.derive(seed, "coins"), 0, count)',
        'keystream.uniform_uint64(keystream.derive(bytes(32), "coins"), 0, count)', (PLANTED, "-k", "coins_are_fair"),
    ),
    Mutation(
        "canaries", "a coin follows the content", CANARIES,
        ">= np.uint64(2**63)\n",
        ">= np.uint64(2**63)\n    coins = next(iter(columns.values())).reshape(count, -1)[:, 0] % 2 == 0\n",
        (PLANTED, "-k", "coins"),
    ),
    Mutation(
        "canaries", "more are included than a fair coin would", CANARIES,
        ">= np.uint64(2**63)", ">= np.uint64(2**62)", (PLANTED, "-k", "coins_are_fair"),
    ),
    Mutation(
        "canaries", "held-out canaries are trained on too", CANARIES,
        "there = planted.included[which]", "there = np.ones(len(which), bool)", (PLANTED, "-k", "held_out_one_is_none"),
    ),
    Mutation(
        "canaries", "a repeated canary is planted once", CANARIES,
        "return int(self.repeats.sum())", "return len(self.repeats)", (PLANTED, "-k", "repeated"),
    ),
    Mutation(
        "canaries", "coins are not bound before the first step", CANARIES,
        "self.repeats.astype(np.int64).tobytes() + self.included.astype(np.uint8).tobytes()",
        "self.repeats.astype(np.int64).tobytes()", (PLANTED, "-k", "binds"),
    ),
    Mutation(
        "canaries", "what binds them can be guessed", CANARIES,
        "digest = hashlib.sha256(self.seed)", "digest = hashlib.sha256()", (PLANTED, "-k", "binds"),
    ),
    Mutation(
        "canaries", "anyone can test a guess of what an attack showed", CANARIES,
        "return hashlib.blake2b(content, key=self.seed, digest_size=32",
        "return hashlib.blake2b(content, digest_size=32",
        (PLANTED, "-k", "seed_alone"),
    ),
    Mutation(
        "canaries", "they are not counted among the units", "dpgemma/training/prepare.py",
        "num_units = planted.num_units if found.users is None else found.users",
        "num_units = training.num_units if found.users is None else found.users",
        (ATTACK, "-k", "as_many_units or rows_added"),
    ),
    Mutation(
        "canaries", "a run that goes on plants others", "dpgemma/training/prepare.py",
        "canaries = canaries_lib.made(settings, objective, secret) if folder is None else kept(folder, secret)",
        "canaries = canaries_lib.made(settings, objective, secret)", (ATTACK, "-k", "does_not_go_on"),
    ),
    Mutation(
        "canaries", "the audit takes any canaries", CHECKS,
        "elif known != measured.digest:", "elif False:", (ATTACK, "-k", "tampered"),
    ),
    Mutation(
        "canaries", "private/ forgets that some were registered", "dpgemma/training/run.py",
        'facts |= {name: start_event[name] for name in ("canary_sha256",) if name in start_event}', "facts |= {}",
        (ATTACK, "-k", "finds_much"),
    ),
    Mutation(
        "attack", "what a reference started from is not looked at", "dpgemma/inference/attacking.py",
        "        named = start\n", "        named = None\n", (ATTACK, "-k", "learned_canaries"),
    ),
    Mutation(
        "attack", "a contradiction by a reference is no finding", CHECKS,
        "for attack in (known, found, against) if", "for attack in (known, found) if", (ATTACK, "-k", "shows_too_much"),
    ),
    Mutation(
        "attack", "the score knows the coin", "dpgemma/training/attack.py",
        "protocol_lib.LOSS_AGAINST_START: before - after}",
        "protocol_lib.LOSS_AGAINST_START: before - after + 9 * canaries.included}",
        (ATTACK, "-k", "know_the_coins"),
    ),
    Mutation(
        "attack", "what is observed leaves the noise out", "dpgemma/training/step.py",
        "return (probes.of(noised.total) - probes.of(others.total) * unit) / others.sensitivity",
        "return jnp.round(probes.of(noised.total) - probes.of(others.total) * unit) / others.sensitivity",
        (ATTACK, "-k", "draws_and_the_noise"),
    ),
    Mutation(
        "attack", "a contradiction is not a finding", CHECKS,
        "if contradicting:", "if False:", (ATTACK, "-k", "loud"),
    ),
    Mutation(
        "attack", "canaries of several units are held against the epsilon of one", "dpgemma/training/attack.py",
        "single = canaries.repeats == 1", "single = canaries.repeats >= 1", (ATTACK, "-k", "registers_everything"),
    ),
    Mutation(
        "bounds", "each way to guess has the whole significance", PROTOCOL,
        "m, each = len(self.scores), significance / len(self.guessed)\n            found",
        "m, each = len(self.scores), significance\n            found", (BOUNDS, "-k", "shares"),
    ),
    Mutation(
        "bounds", "each bound has the whole significance", PROTOCOL,
        "epsilon = measure.epsilon(bound, protocol.significance / parts)",
        "epsilon = measure.epsilon(bound, protocol.significance)",
        (BOUNDS, "-k", "shares"),
    ),
    Mutation(
        "bounds", "mu without its sign", "accounting/empirical/gaussian.py",
        "statistic = float((inside.mean() - outside.mean())", "statistic = float(abs(inside.mean() - outside.mean())",
        (BOUNDS, "-k", "wrong_sign"),
    ),
    Mutation(
        "bounds", "delta costs nothing in one run", "accounting/empirical/one_run.py",
        "if delta == 0 or correct == 0:", "if True:", (BOUNDS, "-k", "jax_privacy"),
    ),
    Mutation(
        "bounds", "the recursion forgets wrong guesses", "accounting/empirical/one_run.py",
        "wrong = significance * (guesses - correct) / canaries", "wrong = significance / canaries",
        (BOUNDS, "-k", "linear_program"),
    ),
    Mutation(
        "bounds", "rates are point estimates", "accounting/empirical/thresholds.py",
        "false_positive = float(stats.beta.ppf(1 - each, k, len(outside) - k + 1))",
        "false_positive = k / len(outside)",
        (BOUNDS, "-k", "truth"),
    ),
    Mutation(
        "bounds", "what was proved is contradicted as easily as anything", PROTOCOL,
        "contradicts = measure.exceeds(bound, protocol.contradiction / parts, proven)",
        "contradicts = measure.exceeds(bound, protocol.significance / parts, proven)",
        (BOUNDS, "-k", "shares or sound"),
    ),
    Mutation(
        "attack", "what follows from the noise is published", RECORD,
        "        if is_kept:\n", "        if False:\n", (ATTACK, "-k", "leaves_private"),
    ),
    Mutation(
        "canaries", "coins are chosen by the operator", CHECKS,
        "elif not measured.coins_follow:", "elif False:", (ATTACK, "-k", "tampered"),
    ),
    Mutation(
        "canaries", "any protocol will do", CHECKS,
        'if declared["audit_protocol"] != protocol.facts():', "if False:", (ATTACK, "-k", "tampered"),
    ),
    Mutation(
        "risk", "the risk of one step", "accounting/risk.py",
        "return risk.of(conversions.profile(accountant, delta, epsilon))",
        "return risk.of(conversions.profile(Accountant(accountant.mechanisms[0].replace(steps=1)), delta, epsilon))",
        ("tests/accounting/risk_test.py", "-k", "solved"),
    ),
    Mutation(
        "memorisation", "a continuation that begins well counts as exact", "dpgemma/gemma/memorisation.py",
        "bool((text[: len(suffix)] == suffix).all())", "bool((text[:2] == suffix[:2]).all())",
        ("tests/doctest_test.py", "-k", "gemma.memorisation"),
    ),
)  # fmt: skip
