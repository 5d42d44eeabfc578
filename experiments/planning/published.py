"""Published figures to compare with: table 2 of arXiv 2501.18914 and VaultGemma's configuration (arXiv 2510.15001)."""

import dataclasses

SEQUENCE_LENGTH = 512
DELTA = 1e-8


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of table 2: the least compute within 1 % of the best loss over all compute. `tokens_per_parameter` is its
    last column.
    """

    num_units: float
    epsilon: float
    compute: float
    loss: float
    parameters: float
    steps: float
    batch_size: float
    tokens_per_parameter: float


TABLE_2 = tuple(
    Row(*values)
    for values in (
        (1e5, 1, 1.3e16, 7.28, 4.6e6, 1.8e3, 5.1e2, 1.0e2),
        (1e5, 4, 1.1e17, 6.65, 4.6e6, 1.8e3, 4.1e3, 8.5e2),
        (1e5, 16, 2.0e18, 5.60, 1.7e7, 2.7e3, 1.4e4, 1.1e3),
        (1e5, 64, 7.5e18, 4.63, 2.0e7, 6.3e3, 1.9e4, 3.2e3),
        (1e6, 1, 2.8e17, 5.89, 4.6e6, 2.5e3, 8.2e3, 2.3e3),
        (1e6, 4, 8.8e18, 4.62, 1.9e7, 6.5e3, 2.3e4, 4.1e3),
        (1e6, 16, 3.3e19, 3.61, 1.7e7, 1.4e4, 4.6e4, 1.9e4),
        (1e6, 64, 3.2e20, 2.82, 4.9e7, 1.2e4, 1.9e5, 2.2e4),
        (1e7, 1, 3.8e19, 3.73, 1.7e7, 9.6e3, 7.8e4, 2.3e4),
        (1e7, 4, 3.8e20, 2.81, 4.9e7, 1.1e4, 2.2e5, 2.6e4),
        (1e7, 16, 2.0e21, 2.15, 7.0e7, 1.2e4, 7.4e5, 6.7e4),
        (1e7, 64, 4.4e22, 1.66, 3.3e8, 4.9e4, 8.8e5, 6.7e4),
        (1e8, 1, 5.2e21, 2.26, 1.3e8, 5.8e4, 2.2e5, 4.9e4),
        (1e8, 4, 4.4e22, 1.66, 3.3e8, 4.9e4, 8.8e5, 6.7e4),
        (1e8, 16, 1.0e23, 1.32, 3.3e8, 9.3e4, 1.0e6, 1.5e5),
        (1e8, 64, 1.0e23, 1.23, 3.3e8, 1.1e5, 8.8e5, 1.5e5),
        (1e9, 1, 8.5e22, 1.36, 3.3e8, 9.4e4, 8.8e5, 1.3e5),
        (1e9, 4, 1.0e23, 1.23, 3.3e8, 1.1e5, 8.8e5, 1.5e5),
        (1e9, 16, 1.0e23, 1.22, 3.3e8, 1.1e5, 8.8e5, 1.5e5),
        (1e9, 64, 1.2e23, 1.20, 3.3e8, 1.1e5, 1.1e6, 1.8e5),
    )
)

# VaultGemma 1B: parameters, steps, expected batch in sequences, tokens of one, noise multiplier.
VAULTGEMMA = {
    "parameters": 1_038_741_120,
    "steps": 100_000,
    "batch_size": 517_989,
    "sequence_length": 1024,
    "noise_multiplier": 0.614,
}


def compute(parameters: float, batch_size: float, sequence_length: int, steps: float) -> float:
    """C = 6 M B S T floating-point operations."""
    return 6.0 * parameters * batch_size * sequence_length * steps
