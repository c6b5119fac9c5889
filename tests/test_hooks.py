"""A user's hook cannot break anything."""

from __future__ import annotations

import logging

import pytest

from asyncguard._hooks import Hook

logger = logging.getLogger("asyncguard.blocking")


def test_each_event_reaches_the_hook() -> None:
    events: list[int] = []
    hook = Hook("on_block", events.append, logger)
    hook(1)
    hook(2)
    assert events == [1, 2]


def test_a_broken_hook_is_logged_once_and_called_again(caplog: pytest.LogCaptureFixture) -> None:
    events: list[int] = []

    def broken(event: int) -> None:
        events.append(event)
        raise LookupError("no disk")

    hook = Hook("on_block", broken, logger)
    for event in range(3):
        hook(event)

    assert events == [0, 1, 2]
    (record,) = caplog.records
    assert record.name == "asyncguard.blocking"
    assert record.levelno == logging.ERROR
    assert "on_block" in record.getMessage()
    assert "broken" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], LookupError)


def test_hooks_fail_each_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: int) -> None:
        raise LookupError

    for hook in (Hook("on_block", broken, logger), Hook("on_block", broken, logger)):
        hook(1)
    assert len(caplog.records) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, pytest.fail.Exception])
def test_a_hook_cannot_end_the_thread_either(
    caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    def leave(event: int) -> None:
        raise error("gone")

    hook = Hook("on_block", leave, logger)
    hook(1)
    hook(2)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is error
