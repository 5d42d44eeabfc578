"""Every family of models that this program reads, trains and writes, by its model_type."""

from dpgemma.gemma.config import MODEL_TYPES, GemmaConfig
from dpgemma.gemma.families.decoder import GEMMA, GEMMA2, GEMMA3, VAULTGEMMA
from dpgemma.gemma.families.recurrent import RECURRENT_GEMMA
from dpgemma.gemma.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (VAULTGEMMA, GEMMA, GEMMA2, GEMMA3, RECURRENT_GEMMA)
}
assert tuple(FAMILIES) == MODEL_TYPES


def family_of(config: GemmaConfig) -> Family:
    """The family of a model."""
    return FAMILIES[config.model_type]
