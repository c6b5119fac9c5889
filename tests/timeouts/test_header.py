"""For how long the caller says that it will wait."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncguard.timeouts._header import caller_seconds, checked_header

NAME = b"request-timeout"


def said(*values: bytes) -> float | None:
    headers = [(b"host", b"example.org"), *((NAME, value) for value in values)]
    return caller_seconds({"type": "http", "headers": headers}, NAME)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"5", 5.0),
        (b"0", 0.0),
        (b"0.25", 0.25),
        (b"007", 7.0),
        (b"999999999.999999999", 999999999.999999999),
        (b" 1.5\t", 1.5),
    ],
)
def test_seconds_with_a_fraction_or_without(
    value: bytes, seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert said(value) == seconds
    assert not caplog.records


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"-1",
        b"+1",
        b"1e3",
        b"inf",
        b"nan",
        b".5",
        b"5.",
        b"1,5",
        b"1_000",
        b"5s",
        b"1 2",
        b"1234567890",
        b"0.1234567890",
        b"\xd9\xa3",
        b"5\x00",
    ],
)
def test_what_is_not_understood_is_ignored_with_one_line(
    value: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        assert said(value) is None
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("asyncguard.timeouts", logging.DEBUG)
    assert record.getMessage() == f"ignored request-timeout: {value!r}: it is no number of seconds"


def test_what_a_client_sends_is_logged_in_part_only(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert said(b"x" * 5000) is None
    (record,) = caplog.records
    assert len(record.getMessage()) < 200


def test_the_first_of_several_counts(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert said(b"3", b"9") == 3.0
        assert said(b"soon", b"9") is None
    assert len(caplog.records) == 1


def test_most_callers_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert said() is None
        assert caller_seconds({"type": "http", "headers": []}, NAME) is None
    assert not caplog.records


@given(st.one_of(st.binary(max_size=30), st.floats().map(lambda number: repr(number).encode())))
def test_whatever_is_sent_is_seconds_or_nothing(value: bytes) -> None:
    seconds = said(value)
    assert seconds is None or 0 <= seconds < 1e9


# -- the option --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "checked"),
    [("Request-Timeout", b"request-timeout"), ("x_deadline", b"x_deadline"), ("X.1!#$", b"x.1!#$")],
)
def test_a_name_is_as_a_scope_has_it(name: str, checked: bytes) -> None:
    assert checked_header("deadline_header", name) == checked


def test_no_name_no_header() -> None:
    assert checked_header("deadline_header", None) is None


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a:b", "a\n", "\r", "zeit-größe", "x\0", "(a)", "\u017f", "\u212a"]
)
def test_names_that_no_header_can_have(name: str) -> None:
    with pytest.raises(ValueError, match=r"^deadline_header must be the name of a header, not ") as caught:
        checked_header("deadline_header", name)
    assert str(caught.value).endswith(repr(name))


@pytest.mark.parametrize("name", [b"request-timeout", 1, True, ["x"]])
def test_a_name_is_a_string(name: Any) -> None:
    with pytest.raises(TypeError) as caught:
        checked_header("deadline_header", name)
    assert str(caught.value) == f"deadline_header must be the name of a header, or None, not {name!r}"
