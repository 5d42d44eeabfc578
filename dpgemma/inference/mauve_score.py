"""MAUVE of two collections of texts (Pillutla et al. 2021, arXiv 2102.01454), by the package mauve-text.

Features of a text are the mean of the model's last hidden states. With another model the figures are others, so they
compare corpora that were made with one, and are not those of papers, whose features come from larger models.
"""

import importlib.util
import math
from collections.abc import Sequence

from dpgemma.gemma import features
from dpgemma.inference.models import Model

# Of each collection; more change the figure little, and clustering takes time with the square.
MOST_TEXTS = 2000
# So many for each cluster, both collections together: with fewer the clustering says that it has too few.
_TEXTS_OF_A_CLUSTER = 40


def is_installed() -> bool:
    """Whether the package is there: pip install 'dpgemma[mauve]'."""
    return importlib.util.find_spec("mauve") is not None


def score(model: Model, some: Sequence[str], others: Sequence[str], length: int) -> float | None:
    """From 0 to 1, which is alike; None for too few texts to be clustered.

    Args:
      length: of a row, as far as which a text is read.
    """
    import mauve

    some, others = some[:MOST_TEXTS], others[:MOST_TEXTS]
    clusters = (len(some) + len(others)) // _TEXTS_OF_A_CLUSTER
    if clusters < 2:
        return None
    first, second = (
        features.of_texts(model.config, model.parameters, model.require_tokenizer(), texts, length)
        for texts in (some, others)
    )
    result = mauve.compute_mauve(p_features=first, q_features=second, num_buckets=clusters, verbose=False)
    return float(result.mauve) if math.isfinite(result.mauve) else None
