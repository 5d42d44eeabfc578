import json
import math

import pytest

from accounting import report
from accounting.accountant import EpsilonBracket
from accounting.errors import InputError
from accounting.mechanism import DpSgdMechanism

BRACKET = EpsilonBracket(1.23451, 1.2341, 1.5)


def build(sigma=1.0, clip=1.0, bracket=BRACKET):
    mechanism = DpSgdMechanism(9000, 500, 620, sigma, clip, 100, "zero_out")
    return report.build(
        mechanism, bracket, target_epsilon=2.0, delta=1e-5, privacy_unit="sequence", sequence_length=128, held_out=1000,
        deviations=[], finished=True, ledger_head="ab",
    )  # fmt: skip


def test_epsilon_is_rounded_up_never_down():
    assert report.round_up(1.23451) == 1.2346
    for value in (0.1, 0.3, 1.7109, 2.0, 7.9999999):
        assert value <= report.round_up(value) < value + 1.01e-4
    assert build()["epsilon"] == 1.2346


def test_statement_names_unit_relation_and_what_is_not_covered():
    text = build()["statement"]
    for part in ("1.2346", "1e-05", "128 consecutive tokens", "empty unit", "NOT covered", "1000 further units", "private/", "tokenizer"):
        assert part in text


def test_baseline_is_labelled_and_infinity_is_json():
    content = build(sigma=0.0, clip=math.inf, bracket=EpsilonBracket(math.inf, math.inf, math.inf))
    assert content["statement"].startswith("NO PRIVACY")
    decoded = json.loads(report.dumps(content))
    assert decoded["epsilon"] == decoded["clip_norm"] == "inf"


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": math.inf}, {"noise_multiplier": -1.0}, {"clip_norm": 0.0}, {"clip_norm": math.inf}, {"expected_batch_size": 0},
        {"expected_batch_size": 9001}, {"num_units": 0}, {"neighbouring_relation": "replace_one"}, {"max_batch_size": 0}, {"steps": -1},
    ],
)  # fmt: skip
def test_impossible_mechanisms_are_refused(changes):
    facts = dict(num_units=9000, expected_batch_size=500, max_batch_size=620, noise_multiplier=1.0, clip_norm=1.0, steps=100)
    with pytest.raises(InputError):
        DpSgdMechanism(**{**facts, **changes})
