import pytest

from tests.faults.program import Program, program


@pytest.fixture(scope="session")
def the_program(tmp_path_factory) -> Program:
    with program(tmp_path_factory.mktemp("program")) as found:
        yield found


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"case {number}: fever and rest, seen {number * 7 % 31} times\n" for number in range(200)))
    return path
