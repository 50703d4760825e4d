"""Every command and Python program of the documentation is run by a test or listed; listed commands are valid."""

from __future__ import annotations

import pytest

from tests.end_to_end.documentation.conftest import (
    ELSEWHERE,
    FOLLOWED,
    LONG,
    PROGRAMS_ELSEWHERE,
    REFER,
    in_no_table,
    listed,
)
from tests.support.documented import PAGES, ROOT, blocks, check_command, commands, name_of

pytestmark = pytest.mark.end_to_end


def test_every_command_of_a_page_is_run_or_listed_and_no_other_is_listed() -> None:
    documented = {(name_of(page), command) for page in PAGES for command in commands(page)}
    assert [entry for entry in documented if in_no_table(*entry) and entry[0] not in FOLLOWED] == []
    for table in (REFER, LONG, ELSEWHERE):
        for entry in table:
            assert any(listed({entry: ""}, *command) for command in documented), f"{entry} is on no page"
    for (page, text), other in REFER.items():
        assert other in FOLLOWED and any(command.startswith(text) for command in commands(ROOT / other)), page


def test_every_program_of_a_page_is_run_or_listed_and_no_other_is_listed() -> None:
    with_programs = {name_of(page) for page in PAGES if blocks(page, "python")}
    assert with_programs - set(FOLLOWED) == set(PROGRAMS_ELSEWHERE)


@pytest.mark.parametrize(
    ("page", "command"),
    sorted({(name_of(page), command) for page in PAGES for command in commands(page)
            if listed(LONG | ELSEWHERE, name_of(page), command)}),
)  # fmt: skip
def test_a_command_that_is_not_run_is_valid(page: str, command: str) -> None:
    check_command(command)
    for word in command.split():  # check that its files exist
        if word.startswith(("pipeline/", "tests/", "benchmarks/", "recipes/")):
            assert (ROOT / word).is_file(), f"{page}: {word} does not exist"
