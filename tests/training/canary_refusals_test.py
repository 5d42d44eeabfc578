"""Canaries that cannot be: refused in one sentence, before there is a run."""

import pytest

from dpgemma import cli
from tests.training.attack_test import train

REFUSED = {
    "a kind without canaries": (dict(canary_kind="gradient"), "there are none: give --canaries"),
    "a negative number": (dict(canaries=-1), "must not be negative"),
    "repeats of nothing": (dict(canaries=5, canary_repeats="1,x"), "must be numbers from 1"),
    "gradients that a clip norm follows": (
        dict(canaries=5, canary_kind="gradient", clip_quantile=0.5), "drop --clip_quantile",
    ),
    "repeated gradients": (dict(canaries=5, canary_kind="gradient", canary_repeats="4"), "drop --canary_repeats"),
    "gradients that are not formed": (dict(canaries=5, canary_kind="gradient", clipping="ghost"), "example_scan"),
    "no bound to clip to": (
        dict(canaries=5, canary_kind="gradient", clip_norm="inf", epsilon="inf"), "finite --clip_norm",
    ),
    "texts without a model": (dict(canaries=5, canary_kind="synthetic"), "give --canary_model"),
    "cold texts": (
        dict(canaries=5, canary_kind="synthetic", canary_model="x", canary_temperature=0.5), "between 0.8 and 10",
    ),
    "a model for random ones": (dict(canaries=5, canary_model="x"), "canary_kind=synthetic"),
    "more than there are parameters": (dict(canaries=1_000_000, canary_kind="gradient"), "are too many"),
    "layers in parts": (dict(canaries=5, canary_kind="gradient", mesh="data:1,model:2"), "--mesh=data:N"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_canaries_that_cannot_be_are_refused_in_one_sentence(what, text, tmp_path):
    settings, message = REFUSED[what]
    done = train(text, tmp_path / "run", **{"steps": 2, **settings})
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "run").exists(), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_run_without_canaries_is_no_audit_model(finished, capsys):
    code = cli.main(["audit", str(finished[0]), "--empirical"])
    assert code == 2 and "planted no canaries" in capsys.readouterr().err
