"""What a run does, as public facts: Mechanism = Sampling x Noise x Clip."""

from accounting.mechanism.clip import Clip
from accounting.mechanism.histogram import histogram
from accounting.mechanism.mechanism import Mechanism, dp_sgd
from accounting.mechanism.noise import Gaussian
from accounting.mechanism.sampling import (
    ADD_OR_REMOVE,
    FIXED,
    POISSON,
    RELATIONS,
    SAMPLERS,
    ZERO_OUT,
    Fixed,
    Poisson,
    Sampling,
    TruncatedPoisson,
)

__all__ = [
    "ADD_OR_REMOVE", "FIXED", "POISSON", "RELATIONS", "SAMPLERS", "ZERO_OUT", "Clip", "Fixed", "Gaussian", "Mechanism",
    "Poisson", "Sampling", "TruncatedPoisson", "dp_sgd", "histogram",
]  # fmt: skip
