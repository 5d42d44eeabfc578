import html.parser
import json
import math

import pytest

from accounting import rounding, run_files
from accounting.accountant import Accountant, EpsilonBracket
from accounting.errors import InputError
from accounting.ledger import executed
from accounting.ledger.seals import CHAIN, KEYED_CHAIN
from accounting.mechanism import dp_sgd
from accounting.report import content, page, tables
from accounting.report.spending import Spent, spent

BRACKET = EpsilonBracket(1.23451, 1.2341, 1.5)
FACTS = dict(
    num_units=9000,
    expected_batch_size=500,
    max_batch_size=None,
    noise_multiplier=1.0,
    clip_norm=1.0,
    grid_bits=20,
    steps=100,
    neighbouring_relation="zero_out",
    sampler="poisson",
    epsilon=2.0,
    delta=1e-5,
    privacy_unit="sequence",
    sequence_length=128,
    model="tiny",
    parameters=246_624,
    held_out_units=1000,
    trained_parameters=246_624,
    architecture={},
    init_sha256=None,
    secret_keys=True,
    seal=CHAIN,
    run_id="0123456789abcdef",
    config_sha256="",
)


def records(steps=100, later_noise=None, **changes):
    facts = {**FACTS, **changes}
    group = {
        "sampling_probability": facts["expected_batch_size"] / facts["num_units"],
        "noise_multiplier": facts["noise_multiplier"],
        "max_batch_size": facts["max_batch_size"],
    }
    lines = [{"kind": "step", "step": t, **group} for t in range(steps)]
    for line in lines[steps // 2 :] if later_noise else ():
        line["noise_multiplier"] = later_noise
    return [{"kind": "start", **facts}, *lines, {"kind": "finish", "step": steps}]


def build(bracket=BRACKET, **changes):
    return content.build(executed.of(records(**changes)), Spent(bracket), "ab")


def test_epsilon_is_rounded_up_never_down():
    assert rounding.round_up(1.23451) == 1.2346
    for value in (0.1, 0.3, 1.7109, 2.0, 7.9999999, 0.0, 5e-324, 1e-9, math.nextafter(0.1569, 1), 1e15, 1e300):
        assert value <= rounding.round_up(value) <= value + 1.0001e-4
    assert rounding.round_up(math.nextafter(0.1569, 1)) == 0.157 and rounding.round_up(math.inf) == math.inf


def test_what_is_rounded_once_stays_as_it_is():
    # 0.1569 * 10**4 is 1569.0000000000002: of the numbers below, 1 in 16 went up once more when an auditor rounded it
    # again.
    for n in range(200_000):
        assert rounding.round_up(n / 10_000) == n / 10_000


@pytest.mark.parametrize(
    "value", [1234.5631, 123.45631, 9.9999999, 1.2345649e-5, 1 / 30000, 5e-324, 0.12965, 1e-10, 7.0]
)
def test_no_upper_bound_is_printed_lower_than_it_is(value):
    for digits in (3, 4, 6, 10):
        assert value <= float(rounding.upper(value, digits)) <= value * (1 + 10.0 ** (1 - digits)) + 5e-324
    assert rounding.upper(0.0) == "0" and rounding.upper(math.inf) == "inf"


def test_rounded_epsilon_is_the_reports():
    assert build()["epsilon"] == 1.2346


def test_statement_names_unit_relation_and_what_is_not_covered():
    text = build()["statement"]
    for part in (
        "1.2346",
        "1e-05",
        "128 consecutive tokens",
        "empty unit",
        "NOT covered",
        "1000 further units",
        "private/",
        "tokenizer",
    ):
        assert part in text


def test_baseline_is_labelled_and_infinity_is_json():
    content = build(EpsilonBracket(math.inf, math.inf, math.inf), noise_multiplier=0.0, clip_norm="inf")
    assert content["statement"].startswith("NO PRIVACY") and any("baseline" in line for line in content["deviations"])
    decoded = json.loads(run_files.dumps(content))
    assert decoded["epsilon"] == decoded["clip_norm"] == "inf"


def test_steps_that_differ_from_the_declaration_are_accounted_as_executed():
    done = executed.of(records(later_noise=0.7))
    assert [(m.steps, m.noise_multiplier) for m in done.mechanisms] == [(50, 1.0), (50, 0.7)]
    assert not done.is_as_planned and any("differ from the declared" in line for line in done.deviations)
    assert Accountant(done.mechanisms).epsilon(1e-5).lower > Accountant(done.planned).epsilon(1e-5).upper
    assert executed.of(records()).deviations == []
    (said,) = executed.of(records(grid_bits=None)).deviations
    assert said.startswith("sums and noise are float32 numbers")
    assert not executed.of(records(steps=101)).is_as_planned


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.pop(0),
        lambda r: r[0].pop("num_units"),
        lambda r: r[3].pop("noise_multiplier"),
        lambda r: r[0].update(num_units="many"),
        lambda r: r[0].update(delta=2),
    ],
)
def test_ledgers_without_sound_facts_are_refused(spoil):
    spoilt = records()
    spoil(spoilt)
    with pytest.raises(InputError):
        executed.of(spoilt)


class _Links(html.parser.HTMLParser):
    """Collects open tags and whatever would load something from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.external = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if tag in ("script", "link", "img", "iframe") or (
                name in ("src", "href", "xlink:href") and not value.startswith("#")
            ):
                self.external.append((tag, name, value))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def rendered(**changes):
    done = executed.of(records(**changes))
    accountant = Accountant(done.mechanisms)
    written = content.build(done, spent(done, accountant), "ab" * 32)
    meaning = tables.meaning(accountant, 1e-5)
    return written, page.render(done, written, meaning, [(50, 1.0), (100, 1.5)])


def test_page_is_self_contained_and_says_everything():
    content, text = rendered()
    parser = _Links()
    parser.feed(text)
    assert parser.open == [] and parser.external == [] and "url(http" not in text and "@import" not in text
    assert text.count("<svg") == 2
    for part in (
        content["statement"].split(" (")[0],
        "Statement",
        "Who may see what",
        "Parameters",
        "Epsilon over the steps",
        "What an attacker can do",
        "Owners of several units",
        "Membership attacks",
        "Noise-batch ratio",
        "Floating-point",
        "Deviations",
        "dpgemma audit",
        "ab" * 32,
        "has no key",
    ):
        assert part in text, part
    assert "HMAC under a key" in rendered(seal=KEYED_CHAIN)[1]


def test_more_numbers_than_the_noise_is_certified_for_are_a_deviation():
    assert build(trained_parameters=2**36)["deviations"] == []
    (deviation,) = build(trained_parameters=2**36 + 1)["deviations"]
    assert "certified" in deviation


def test_assumptions_follow_the_facts_of_a_run():
    def assumed(**changes):
        facts = {"format": 4, "environment": "laptop", "seal_key": None, **changes}
        found = executed.of(records(**facts))
        return content.build(found, spent(found, found.accountant()), "ab")

    report = assumed()
    assert report["epsilon"] < report["epsilon_replace_one"] and "or any other" in report["statement"]
    assert f"({report['epsilon_replace_one']}, 1e-05)" in report["statement"]
    names = [line.partition(":")[0] for line in report["assumptions"]]
    assert names == ["Randomness", "Arithmetic", "Program and machine", "Copies", "Time", "Hold-out", "Packed text"]
    assert "only whole numbers are added" in report["assumptions"][1]
    others = assumed(privacy_unit="example", held_out_units=0, grid_bits=None)["assumptions"]
    assert len(others) == 5 and "not covered" in others[1]
    hidden = assumed(neighbouring_relation="add_or_remove", held_out_units=None)["assumptions"]
    assert "how many units there are" in hidden[4] and len(hidden) == 7
    # Reports of older formats say what they said; without a guarantee nothing is assumed.
    assert "assumptions" not in build() and "with what content" in build()["statement"]
    assert assumed(epsilon="inf")["assumptions"] == [] and assumed(epsilon="inf")["epsilon_replace_one"] == math.inf


def test_page_of_a_baseline_promises_nothing():
    _, text = rendered(noise_multiplier=0.0)
    assert "NO PRIVACY" in text and "Nothing may be shown" in text and "ε = ∞" in text and "<svg" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": math.inf},
        {"noise_multiplier": -1.0},
        {"clip_norm": 0.0},
        {"clip_norm": math.inf},
        {"expected_batch_size": 0},
        {"expected_batch_size": 9001},
        {"num_units": 0},
        {"neighbouring_relation": "replace_one"},
        {"max_batch_size": 0},
        {"steps": -1},
    ],
)
def test_impossible_mechanisms_are_refused(changes):
    facts = dict(
        num_units=9000, expected_batch_size=500, max_batch_size=620, noise_multiplier=1.0, clip_norm=1.0, steps=100
    )
    with pytest.raises(InputError):
        dp_sgd(**{**facts, **changes})
