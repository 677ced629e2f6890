"""Who reads the log decides its form."""

import logging
from collections.abc import Iterator

import pytest

from pretrain_api import names
from pretrain_trainer.logs import LOGGER, HumanLines, JsonLines, set_up_logs


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The package's logger, afterwards as it was before."""
    found = logging.getLogger(LOGGER)
    before = found.handlers, found.propagate, found.level
    yield found
    found.handlers, found.propagate = before[:2]
    found.setLevel(before[2])


@pytest.mark.parametrize(("told", "form"), [("1", HumanLines), ("", JsonLines), (None, JsonLines)])
def test_a_person_at_the_end_of_the_pipe_gets_lines_for_people(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, told: str | None, form: type
) -> None:
    monkeypatch.delenv(names.ENV_TERMINAL, raising=False)
    if told is not None:
        monkeypatch.setenv(names.ENV_TERMINAL, told)
    set_up_logs(0)
    assert type(logger.handlers[0].formatter) is form
