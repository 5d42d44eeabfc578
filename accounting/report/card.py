"""The model cards of exported models."""

from typing import Any

# What the Hugging Face hub reads.
_FRONT_MATTER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- differential-privacy
- gemma
- dpgemma
---
"""


def model_card(report: dict[str, Any], step: int) -> str:
    """README.md of an export: the run's privacy statement and the numbers behind it."""
    rows = [
        "epsilon", "epsilon_replace_one", "epsilon_lower_numeric", "delta", "privacy_unit", "neighbouring_relation",
        "num_units", "items_per_unit", "shared_items", "sampler",
        "expected_batch_size", "max_batch_size", "sampling_probability", "noise_multiplier",
        "noise_batch_ratio", "clip_norm", "steps", "accountant", "cross_check", "run_id", "ledger_head",
    ]  # fmt: skip
    table = "\n".join(f"| {name} | {report[name]} |" for name in rows if name in report)
    assumptions, deviations = _assumptions(report, "Assumptions"), _deviations(report)
    # Cards of earlier versions have none, and stay as they were.
    front = _FRONT_MATTER if "tokenizer_sha256" in report else ""
    unfinished = "" if report["finished"] else f"\nThis is an unfinished run, exported at step {step}.\n"
    return f"""{front}# Model trained with dpgemma
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


def _assumptions(report: dict[str, Any], heading: str) -> str:
    assumed = "".join(f"\n- {line}" for line in report.get("assumptions", ()))
    return f"\n{heading}:\n{assumed}\n" if assumed else ""


def _deviations(report: dict[str, Any]) -> str:
    return "\n".join(f"- {line}" for line in report["deviations"]) or "- none"


def corpus_card(report: dict[str, Any], step: int, facts: dict[str, Any], *, drawn_by_histogram: bool) -> str:
    """The card of a synthetic corpus: what holds for it, because it was made from a run's parameters alone.

    Args:
      report: of the run.
      step: of the checkpoint from which the corpus was sampled.
      facts: of the file and of how it was sampled, by name.
      drawn_by_histogram: whether prompts were drawn by the run's released histogram.
    """
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    assumptions, deviations = _assumptions(report, "Assumptions of the run"), _deviations(report)
    unfinished = "" if report["finished"] else f"\nThe run is unfinished; the corpus comes from step {step} of it.\n"
    if report["epsilon"] == "inf":
        holds = "No guarantee holds for this corpus, because none holds for the model that it was sampled from."
    else:
        # What the run's epsilon covers.
        counts = ", from the histogram of prompts that the run released" if drawn_by_histogram else ""
        holds = (
            f"This corpus is ({report['epsilon']}, {report['delta']!r})-differentially private with respect to one unit"
            f" of the model's training data: it is post-processing of the parameters of checkpoint {step}, made from"
            f" them, from public settings{counts} and from a public seed. Training another model on it costs no more."
            " What is read off it is not therefore true, and facts that many units share can be in it."
        )
    return f"""# Synthetic text, sampled with dpgemma

## Privacy

{holds}

Of the model:

{report["statement"]}
{unfinished}{assumptions}
Deviations of the run:

{deviations}

## How it was made

| | |
|---|---|
| run_id | {report["run_id"]} |
| ledger_head | {report["ledger_head"]} |
| step | {step} |
{table}
"""


def plain_card() -> str:
    """README.md of a model that dpgemma wrote without having trained it."""
    return """# Model converted with dpgemma

## Privacy

No differentially private training was done here: these are the weights of another directory in another layout of
files. Whatever guarantee they came with is stated there, and nothing is added to it.
"""
