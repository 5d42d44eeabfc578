"""The values that settings may take, one line each. This module imports nothing, so that --help answers at once.

What belongs to the guarantee itself (neighbouring relations, samplers) stands in accounting.mechanism instead.
"""

AUTO = "auto"

# What one privacy unit is.
SEQUENCE = "sequence"  # one row of packed text
EXAMPLE = "example"  # one record in a row of its own
DOCUMENT = "document"  # one record, in as many rows as are kept of it
USER = "user"  # all records that belong to one user
PRIVACY_UNITS = (AUTO, SEQUENCE, EXAMPLE, DOCUMENT, USER)
OF_SEVERAL_ROWS = (DOCUMENT, USER)

# Which rows of a unit are kept where it has too many.
UNIFORM_ROWS, FIRST_ROWS = "uniform", "first"
ROWS_KEPT = (UNIFORM_ROWS, FIRST_ROWS)

# What is drawn where units are users: all rows of a user together, or each row by itself (which costs more noise).
BY_EXAMPLE = "example"
USER_SAMPLING = (USER, BY_EXAMPLE)

# Whose a record is: one user's; or several users', where it is public whose.
ONE_OWNER, PUBLIC_OWNERS = "one", "public"
OWNERSHIP = (ONE_OWNER, PUBLIC_OWNERS)

# What becomes of a record that names no user.
REFUSE, OWN = "refuse", "own"
WITHOUT_USER = (REFUSE, OWN)

# How the sum of clipped gradients is computed. All but per_layer give the same sum, up to rounding.
EXAMPLE_SCAN = "example_scan"  # forms the gradients of few units at a time, and measures each while it is formed
GHOST = "ghost"  # forms none: norms and sum come from the operands that one backward pass keeps
PER_LAYER = "per_layer"  # as ghost, with a bound of its own for every operation of every layer
VMAP = "vmap"  # forms all gradients at once, as the definition says; for tests
STRATEGIES = (EXAMPLE_SCAN, GHOST, PER_LAYER, VMAP)
CLIPPING = (AUTO, *STRATEGIES)

# How per_layer divides one norm C among its G groups.
UNIFORM = "uniform"  # C / sqrt(G) each
BY_DIMENSION = "dimension"  # in proportion to the square root of a group's size
THRESHOLDS = (UNIFORM, BY_DIMENSION)

# How a sum becomes a release.
EXACT = "exact"  # whole numbers of steps of a grid, and noise of whole numbers: no rounding to account for
FLOAT32 = "float32"  # sums and noise of floats, whose rounding no proof covers; for comparison
RELEASES = (EXACT, FLOAT32)

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("float32", "bfloat16")

# What the backward pass computes again instead of keeping it: nothing, every block, or all but products with weights.
REMAT_POLICIES = ("none", "block", "dots")

# How attention is computed: all scores at once, a tile of them at a time, or by JAX's own kernel (no soft-caps).
DENSE, BLOCKWISE, FUSED = "dense", "blockwise", "fused"
ATTENTION = (AUTO, DENSE, BLOCKWISE, FUSED)

# How the lines of a ledger are bound.
CHAIN = "chain"  # by a hash chain without a key
HMAC = "hmac"  # with an HMAC of every line too, which the holders of the secret key can check
SIGNATURE = "signature"  # with an Ed25519 signature of every line too, which anyone with the public key can check
ED25519 = "ed25519"  # another name for signature
SEALS = (CHAIN, HMAC, SIGNATURE, ED25519)

# What canaries are.
RANDOM_TOKENS = "random_tokens"  # rows of what comes by chance
NEW_TOKEN = "new_token"  # so too, and behind it something that no text has
SYNTHETIC = "synthetic"  # texts sampled from a reference model, which look like any other
GRADIENT = "gradient"  # no text, but a gradient of one number
CANARY_KINDS = (RANDOM_TOKENS, NEW_TOKEN, SYNTHETIC, GRADIENT)

# The type of exported weights; as_stored keeps that of the model.
AS_STORED = "as_stored"
EXPORT_DTYPES = (AS_STORED, *DTYPES)

# From which distribution the number of trials of a random search is drawn.
TRIALS = ("geometric", "logarithmic", "poisson")

# Where the processes of a sweep run: on this machine, as Slurm jobs, or on a Ray cluster.
LAUNCHERS = ("local", "slurm", "ray")
