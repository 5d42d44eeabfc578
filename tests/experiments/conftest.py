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
