"""The model cards of exported models."""

from typing import Any


def model_card(report: dict[str, Any], step: int) -> str:
    """README.md of an export: the run's privacy statement and the numbers behind it."""
    rows = [
        "epsilon", "epsilon_replace_one", "epsilon_lower_numeric", "delta", "privacy_unit", "neighbouring_relation",
        "num_units", "items_per_unit", "shared_items", "sampler",
        "expected_batch_size", "max_batch_size", "sampling_probability", "noise_multiplier",
        "noise_batch_ratio", "clip_norm", "steps", "accountant", "cross_check", "run_id", "ledger_head",
    ]  # fmt: skip
    table = "\n".join(f"| {name} | {report[name]} |" for name in rows if name in report)
    assumed = "".join(f"\n- {line}" for line in report.get("assumptions", ()))
    assumptions = f"\nAssumptions:\n{assumed}\n" if assumed else ""
    deviations = "\n".join(f"- {line}" for line in report["deviations"]) or "- none"
    unfinished = "" if report["finished"] else f"\nThis is an unfinished run, exported at step {step}.\n"
    return f"""# Model trained with dpgemma
{unfinished}
## Privacy

{report["statement"]}

| | |
|---|---|
{table}
{assumptions}
Deviations:

{deviations}
"""


def plain_card() -> str:
    """README.md of a model that dpgemma wrote without having trained it."""
    return """# Model converted with dpgemma

## Privacy

No differentially private training was done here: these are the weights of another directory in another layout of
files. Whatever guarantee they came with is stated there, and nothing is added to it.
"""
