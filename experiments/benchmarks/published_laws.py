"""What can be recomputed of the published scaling laws, without any training.

    python -m experiments.benchmarks.published_laws

For every row of table 2 of arXiv 2501.18914: the noise multiplier that its budget needs (the lower of Poisson sampling
and batches laid out beforehand, as in its appendix B.1), the noise-batch ratio, and its compute column from its other
columns. Then the parametric form L2 with its published exponents, whose constants are fitted to the table's losses,
with the error of each row left out, together with the rows that are equal to it. Its examples are those of the runs
that the paper's law is made of, which all had one batch (section 3), so they are the steps but for a constant. Then
VaultGemma's figures.
"""

import json
import math

import numpy as np

from accounting import calibration
from accounting.loss_distribution import saddlepoint
from accounting.mechanism import dp_sgd
from experiments.laws import forms
from experiments.planning.published import DELTA, SEQUENCE_LENGTH, TABLE_2, VAULTGEMMA, Row, compute


def noise_of(row: Row) -> dict:
    """Noise multipliers of one row, both by certified bounds."""
    mechanism = dp_sgd(int(row.num_units), row.batch_size, None, 1.0, 1.0, int(row.steps))
    sampled = calibration.noise_multiplier(mechanism, row.epsilon, DELTA).noise_multiplier
    releases = math.ceil(row.steps * row.batch_size / row.num_units)
    laid_out = float(saddlepoint.gaussian_noise_multiplier(row.epsilon, DELTA, releases))
    sigma = min(sampled, laid_out)
    return {
        "noise_multiplier": sigma,
        "sampling": "poisson" if sampled <= laid_out else "fixed",
        "noise_batch_ratio": sigma / row.batch_size,
        "log2_noise_batch_ratio": math.log2(sigma / row.batch_size),
    }


def l2_of_table(rows: list[dict]) -> dict:
    """E, A, B, C of L2 and the relative error of each row when the other rows alone are fitted."""
    parameters, steps, ratio, loss = (
        np.array([row[name] for row in rows]) for name in ("parameters", "steps", "noise_batch_ratio", "loss")
    )
    constants = forms.fit_l2_constants(parameters, steps, ratio, loss)
    design = forms.l2_design(parameters, steps, ratio)
    fitted = np.abs(design @ constants / loss - 1)
    left_out = []
    for i in range(len(rows)):
        equal = (parameters == parameters[i]) & (steps == steps[i]) & (loss == loss[i])
        without = forms.fit_l2_constants(parameters[~equal], steps[~equal], ratio[~equal], loss[~equal])
        left_out.append(abs(float(design[i] @ without / loss[i] - 1)))
    return {
        "exponents": forms.PUBLISHED_L2,
        "constants": dict(zip("EABC", constants.tolist(), strict=True)),
        "fit_error_median": float(np.median(fitted)),
        "fit_error_largest": float(fitted.max()),
        "leave_one_out_error_median": float(np.median(left_out)),
        "leave_one_out_error_largest": float(max(left_out)),
    }


def main() -> None:
    rows = []
    for row in TABLE_2:
        product = compute(row.parameters, row.batch_size, SEQUENCE_LENGTH, row.steps)
        rows.append(
            {
                "num_units": row.num_units,
                "epsilon": row.epsilon,
                "loss": row.loss,
                "parameters": row.parameters,
                "steps": row.steps,
                **noise_of(row),
                "compute_printed": row.compute,
                "compute_6MBST": product,
                "relative_difference": product / row.compute - 1,
            }
        )
    v = VAULTGEMMA
    vaultgemma = {
        "compute": compute(v["parameters"], v["batch_size"], v["sequence_length"], v["steps"]),
        "log2_noise_batch_ratio": math.log2(v["noise_multiplier"] / v["batch_size"]),
    }
    print(json.dumps({"delta": DELTA, "table_2": rows, "L2": l2_of_table(rows), "vaultgemma": vaultgemma}, indent=1))


if __name__ == "__main__":
    main()
