"""Keys under the circumstances of a run."""

import hashlib
import itertools
import json

import numpy as np

from accounting.errors import InputError
from dpgemma.privacy.keys import Keys
from dpgemma.privacy.noise import noise_keys
from dpgemma.privacy.samplers import PoissonSampler

KEYS = Keys(*(bytes([i]) * 32 for i in range(5)))
CIRCUMSTANCES = {"environment": "jax 1; cpu", "data": "ab", "settings": {"seed": 0, "dtype": "float32"}, "start": {}}


def test_equal_circumstances_have_equal_keys_and_the_others_stay():
    bound = KEYS.bound(CIRCUMSTANCES)
    assert bound == KEYS.bound(dict(reversed(CIRCUMSTANCES.items())))
    assert (bound.holdout, bound.fingerprint, bound.ledger) == (KEYS.holdout, KEYS.fingerprint, KEYS.ledger)
    text = json.dumps(CIRCUMSTANCES, sort_keys=True, separators=(",", ":")).encode()
    for name in ("sampling", "noise"):
        digest = hashlib.blake2b(text, key=getattr(KEYS, name), digest_size=32, person=b"dpgemma bound").digest()
        assert getattr(bound, name) == digest != getattr(KEYS, name)


def test_other_circumstances_have_independent_keys():
    """Whatever differs: no key of any step is shared, and batches overlap as those of strangers do."""
    others = [{**CIRCUMSTANCES, name: "other"} for name in CIRCUMSTANCES]
    others += [{**CIRCUMSTANCES, "settings": {"seed": 1, "dtype": "float32"}}, {**CIRCUMSTANCES, "more": None}]
    bound = [KEYS.bound(c) for c in (CIRCUMSTANCES, *others)]
    words = {tuple(row) for keys in bound for t in range(20) for row in noise_keys(keys.noise, t).tolist()}
    assert len(words) == len(bound) * 20 * 5
    sampler = PoissonSampler(10_000, 0.1, None)
    for one, two in itertools.combinations(bound, 2):
        shared = len(np.intersect1d(sampler.draw(one.sampling, 0), sampler.draw(two.sampling, 0)))
        assert abs(shared - 100) < 60  # 100 on average, with a deviation of 10


def test_no_wrong_bit_in_a_file_of_keys_gives_other_keys(tmp_path):
    """Every bit of the file is tried, and digits of two keys that change places."""
    keys, path = Keys.generate(), tmp_path / "keys.json"
    keys.save(path)
    written, refused = path.read_bytes(), 0
    stored = json.loads(written)
    swapped = json.dumps(stored | {"noise": stored["sampling"], "sampling": stored["noise"]}).encode()
    flipped = (bytes([*written[:i], written[i] ^ 1 << bit, *written[i + 1 :]]) for i, bit in _bits(written))
    for content in (swapped, *flipped):
        path.write_bytes(content)
        try:
            assert Keys.load(path) == keys, content
        except InputError:
            refused += 1
    assert refused > 4 * len(written)


def _bits(content):
    return itertools.product(range(len(content)), range(8))
