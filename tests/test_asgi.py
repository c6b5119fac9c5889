"""What counts as an ASGI application, and one that answers with a problem."""

from __future__ import annotations

import functools
import json
from typing import Any, NoReturn

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.types import Message

from asyncguard._asgi import ProblemAnswer, checked_app, is_asgi_app, is_factory


async def application(scope: Any, receive: Any, send: Any) -> None: ...


class Application:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

    async def method(self, scope: Any, receive: Any, send: Any) -> None: ...


class Wsgi:
    def __call__(self, environ: Any, start_response: Any) -> None: ...


def factory() -> Application:
    return Application()


def needy_factory(settings: object) -> None: ...


APPS = [
    application,
    Application(),
    Application().method,
    functools.partial(application),
    functools.partial(functools.partial(Application()), 1),
    FastAPI(),
    Starlette(),
]
OTHERS = [None, 1, "main:app", Application, Wsgi(), Wsgi, factory, functools.partial(factory), FastAPI]


@pytest.mark.parametrize("app", APPS, ids=repr)
def test_applications(app: object) -> None:
    assert is_asgi_app(app)
    checked_app(app, called_by="guard()")


@pytest.mark.parametrize("app", OTHERS, ids=repr)
def test_what_is_no_application(app: object) -> None:
    assert not is_asgi_app(app)
    with pytest.raises(TypeError) as caught:
        checked_app(app, called_by="guard()")
    assert str(caught.value).startswith(f"guard() takes an ASGI application, not {app!r}")


def test_a_proxy_is_not_asked() -> None:
    """An unbound proxy would fail, a bound one would answer for another object."""

    def unbound(*arguments: object) -> NoReturn:
        raise RuntimeError("working outside of context")

    proxy = type("Proxy", (), {"__class__": property(unbound), "__getattr__": unbound})
    assert not is_asgi_app(proxy())


def test_a_factory_is_told_apart() -> None:
    with pytest.raises(TypeError, match=r"call the factory and pass what it returns$"):
        checked_app(factory, called_by="guard()")
    with pytest.raises(TypeError) as caught:
        checked_app(needy_factory, called_by="guard()")
    assert "factory" not in str(caught.value).replace(repr(needy_factory), "")


@pytest.mark.parametrize(
    ("candidate", "verdict"),
    [
        (factory, True),
        (lambda: None, True),
        (lambda number=1: number, True),
        (needy_factory, False),
        (application, False),
        (Application, False),
        (Application(), False),
        (None, False),
        (dict.fromkeys, False),
    ],
    ids=repr,
)
def test_factories(candidate: object, verdict: bool) -> None:
    assert is_factory(candidate) is verdict


# -- a problem ---------------------------------------------------------------------------------------


async def receive() -> Message:
    raise AssertionError("the answer does not depend on the request")


async def messages_of(answer: ProblemAnswer) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await answer({"type": "http"}, receive, send)
    return sent


@pytest.mark.anyio
async def test_a_problem_has_the_members_of_rfc_9457() -> None:
    start, body = await messages_of(ProblemAnswer(504, "The service did not answer in time."))
    assert json.loads(body["body"]) == {
        "type": "about:blank",
        "title": "Gateway Timeout",
        "status": 504,
        "detail": "The service did not answer in time.",
    }
    assert (start["type"], start["status"]) == ("http.response.start", 504)
    assert start["headers"] == [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body["body"])).encode()),
    ]
    assert body["type"] == "http.response.body"
    assert not body.get("more_body", False)


@pytest.mark.anyio
async def test_the_length_of_a_problem_is_in_bytes() -> None:
    start, body = await messages_of(ProblemAnswer(503, "zu groß: 日本"))
    assert dict(start["headers"])[b"content-length"] == b"%d" % len(body["body"])
    assert json.loads(body["body"])["detail"] == "zu groß: 日本"


@pytest.mark.anyio
async def test_a_problem_may_have_more_headers() -> None:
    more = [(b"connection", b"close"), (b"retry-after", b"5")]
    start, _ = await messages_of(ProblemAnswer(408, "Too slow.", headers=iter(more)))
    assert start["headers"][2:] == more


@pytest.mark.anyio
@pytest.mark.parametrize("status", [499, 599])
async def test_a_status_that_has_no_name(status: int) -> None:
    start, body = await messages_of(ProblemAnswer(status, "Gone."))
    assert start["status"] == status
    assert json.loads(body["body"])["title"] == f"HTTP {status}"


@pytest.mark.anyio
async def test_what_a_middleware_does_to_a_problem_stays_with_its_request() -> None:
    answer = ProblemAnswer(504, "Late.")
    first = await messages_of(answer)
    expected = [dict(message) for message in await messages_of(answer)]
    first[0]["headers"].append((b"x-request-id", b"1"))
    first[0]["status"] = 200
    first[1]["body"] = b""
    assert await messages_of(answer) == expected


def test_a_problem_is_an_application() -> None:
    assert is_asgi_app(ProblemAnswer(504, "Late."))
