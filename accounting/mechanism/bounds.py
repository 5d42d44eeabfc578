"""The bounds of epsilon, by what they rest on. Each way of sampling says which of them hold for it."""

LOSS = "loss_distribution"  # the composed privacy loss; with a cap, what truncation costs is added to delta
ADDITIVE = "additive"  # (1 + e^epsilon) T Psi for a cap, arXiv 2411.04205
DISPLACEMENT = "displacement"  # T P[the others nearly fill the batch] for a cap
TRUNCATED_LOSS = "truncated_loss"  # the truncated sampler's own loss distribution, arXiv 2508.15089
RENYI = "renyi"  # Renyi differential privacy by dp-accounting, as the cross-check
BOUNDS = (LOSS, ADDITIVE, DISPLACEMENT, TRUNCATED_LOSS, RENYI)

# The bounds that also hold for a group of several units.
FOR_GROUPS = (LOSS, ADDITIVE, DISPLACEMENT)
