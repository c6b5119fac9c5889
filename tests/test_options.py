"""Options are refused early, by the name that the caller knows, with the value and what is allowed."""

from __future__ import annotations

import functools
import math
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse

from asyncguard._options import (
    checked_answer,
    checked_choice,
    checked_directory,
    checked_error_status,
    checked_flag,
    checked_hook,
    checked_seconds,
)


@pytest.mark.parametrize("value", [0.005, 1, 30.0])
def test_seconds_are_a_float(value: float) -> None:
    checked = checked_seconds("limit", value, minimum=0.005)
    assert checked == value
    assert type(checked) is float


@pytest.mark.parametrize("value", [True, False, "1", None, 1j, [1]])
def test_seconds_must_be_a_number(value: object) -> None:
    with pytest.raises(TypeError) as caught:
        checked_seconds("limit", value)
    assert str(caught.value) == f"limit must be a number of seconds, not {value!r}"


@pytest.mark.parametrize("value", [0, 0.0, -1, -0.1, math.inf, -math.inf, math.nan])
def test_seconds_must_be_positive_and_finite(value: float) -> None:
    with pytest.raises(ValueError, match=r"^limit must be .* greater than 0, not ") as caught:
        checked_seconds("limit", value)
    assert str(caught.value).endswith(repr(value))


def test_a_minimum_may_be_reached() -> None:
    assert checked_seconds("limit", 2, minimum=2) == 2
    with pytest.raises(ValueError, match=r"limit must be a finite number of seconds at least 2, not 1\.99"):
        checked_seconds("limit", 1.99, minimum=2)


@given(st.one_of(st.integers(), st.floats(), st.none(), st.text(max_size=3)))
def test_seconds_pass_or_name_the_option(value: object) -> None:
    checked, refusal = None, ""
    try:
        checked = checked_seconds("limit", value, minimum=0.005)
    except (TypeError, ValueError) as error:
        refusal = str(error)
    if checked is None:
        assert refusal.startswith("limit must be ")
        assert repr(value) in refusal
    else:
        assert 0.005 <= checked < math.inf


def test_a_number_too_large_for_a_float_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^limit must be "):
        checked_seconds("limit", 10**400)


@pytest.mark.parametrize("value", [True, False])
def test_flag(value: bool) -> None:
    assert checked_flag("log", value) is value


@pytest.mark.parametrize("value", [0, 1, None, "yes"])
def test_flag_must_be_a_bool(value: object) -> None:
    with pytest.raises(TypeError) as caught:
        checked_flag("log", value)
    assert str(caught.value) == f"log must be True or False, not {value!r}"


@pytest.mark.parametrize("value", ["log", "abort"])
def test_choice(value: str) -> None:
    assert checked_choice("on_hang", value, ("log", "abort")) == value


@pytest.mark.parametrize("value", ["LOG", "", "lo", None, 1, ["log"]])
def test_choice_must_be_one_of_the_words(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^on_hang must be 'log' or 'abort', not ") as caught:
        checked_choice("on_hang", value, ("log", "abort"))
    assert str(caught.value).endswith(repr(value))


class Callable_:  # noqa: N801
    def __call__(self, event: object) -> None: ...


class AsyncCallable:
    async def __call__(self, event: object) -> None: ...


async def coroutine_function(event: object) -> None: ...


@pytest.mark.parametrize("hook", [None, print, [].append, Callable_(), functools.partial(print, "!")])
def test_hook_may_be_anything_that_is_called(hook: Any) -> None:
    checked_hook("on_event", hook)


@pytest.mark.parametrize("hook", [1, "print", ()])
def test_hook_must_be_callable(hook: Any) -> None:
    with pytest.raises(TypeError, match=r"^on_event must be a function") as caught:
        checked_hook("on_event", hook)
    assert repr(hook) in str(caught.value)


@pytest.mark.parametrize(
    "hook", [coroutine_function, AsyncCallable(), functools.partial(coroutine_function, 1)]
)
def test_hook_must_not_be_asynchronous(hook: Any) -> None:
    with pytest.raises(TypeError, match=r"^on_event must be a plain function, not the coroutine function"):
        checked_hook("on_event", hook)


def test_directory_comes_back_absolute_and_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    real = str(tmp_path.resolve() / "real")
    assert checked_directory("root", "real") == real
    assert checked_directory("root", tmp_path / "link") == real
    assert checked_directory("root", None) is None


def test_directory_must_exist(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"^root must be an existing directory, not ") as caught:
            checked_directory("root", path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [1, b"/tmp", ["/tmp"]])
def test_directory_must_be_a_path(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^root must be the path of a directory") as caught:
        checked_directory("root", value)
    assert repr(value) in str(caught.value)


def test_a_path_that_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^root must be an existing directory"):
        checked_directory("root", "nul\0byte")


@pytest.mark.parametrize("value", [400, 408, 500, 503, 504, 511, HTTPStatus.BAD_GATEWAY])
def test_status_of_an_error(value: int) -> None:
    checked = checked_error_status("status_code", value)
    assert checked == value
    assert type(checked) is int


@pytest.mark.parametrize(
    "value", [-504, 0, 100, 200, 302, 399, HTTPStatus.CREATED, 499, 512, 599, 600, 10**400]
)
def test_status_must_be_that_of_an_error(value: int) -> None:
    with pytest.raises(ValueError, match=r"^status_code must be the HTTP status code of an error") as caught:
        checked_error_status("status_code", value)
    assert str(caught.value).endswith(f"such as 504, not {value!r}")


@pytest.mark.parametrize("value", [True, False, None, "504", 504.0, [504]])
def test_status_must_be_an_integer(value: object) -> None:
    with pytest.raises(TypeError) as caught:
        checked_error_status("status_code", value)
    assert str(caught.value) == f"status_code must be an HTTP status code, not {value!r}"


async def application(scope: Any, receive: Any, send: Any) -> None: ...


@pytest.mark.parametrize("answer", [None, application, PlainTextResponse("late", 504)], ids=repr)
def test_answer_may_be_any_application(answer: Any) -> None:
    assert checked_answer("answer", answer) is answer


@pytest.mark.parametrize(
    "answer", ["late", 504, print, PlainTextResponse, Callable_(), {"detail": "late"}], ids=repr
)
def test_answer_must_be_an_application(answer: Any) -> None:
    with pytest.raises(TypeError) as caught:
        checked_answer("answer", answer)
    assert str(caught.value) == (
        f"answer must be an ASGI application, such as a Starlette Response, or None, not {answer!r}"
    )
