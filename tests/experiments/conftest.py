import random

import pytest

from experiments.laws import fitting
from tests.experiments import planted


@pytest.fixture(scope="session")
def truth():
    return planted.PlantedLaw.draw(0)


@pytest.fixture(scope="session")
def fitted(truth):
    """The law fitted to a table of `truth`; shared, because a fit takes seconds."""
    return fitting.fit(truth.table(0))


@pytest.fixture(scope="session")
def notes(tmp_path_factory):
    """A text of a few words."""
    rng = random.Random(0)
    words = [rng.choice(["fever", "cough", "rest", "Ada", "B12", "ward", "seen", "today"]) for _ in range(2000)]
    path = tmp_path_factory.mktemp("notes") / "text.txt"
    path.write_text(" ".join(words))
    return path
