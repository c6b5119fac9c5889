"""The documentation's recipes against real servers, which are taken away and brought back in mid-run.

Requests fail clearly meanwhile, and succeed afterwards, with no restart of the application.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import pytest

from tests.http_server import run_http_server
from tests.outages import Service
from tests.postgres import run_postgres
from tests.raw_client import Connection, get
from tests.redis_server import run_redis
from tests.servers import COMMANDS, HOST, ROOT, Server, eventually, free_port, start

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # what it is about is no matter of the Python version

CLIENTS = 20
PATIENCE = 30.0
LIMIT = 15.0
"""Seconds in which even a request that fails is answered, on the busiest machine; 5 is what recipes allow."""
PATH = f"{ROOT}:{ROOT}/examples"


class Recipe(NamedTuple):
    """An application that is served.

    Attributes:
        name: The name of its module.
        path: What it is asked for.
        server: What serves it.
    """

    name: str
    path: str
    server: Server

    def ask(self, clients: int = CLIENTS) -> list[int]:
        """The statuses of so many requests at a time, each of which is answered."""

        def one(_: int) -> int:
            began = time.monotonic()
            answer = get(self.server.port, self.path)
            assert time.monotonic() - began < LIMIT, self.name
            if answer.status == 503:
                assert answer.json()["detail"].endswith(" is not available."), self.name
            return answer.status

        with ThreadPoolExecutor(clients) as pool:
            return list(pool.map(one, range(clients)))

    def state(self) -> Any:
        return get(self.server.port, "/state").json()


def each(recipes: Sequence[Recipe], check: Callable[[Recipe], None]) -> None:
    """Check all recipes at a time, since what they have in common takes its time."""
    with ThreadPoolExecutor(len(recipes)) as pool:
        list(pool.map(check, recipes))


def assert_well(recipe: Recipe) -> None:
    assert recipe.ask() == [200] * CLIENTS, f"{recipe.name}:\n{recipe.server.stderr}"


def assert_answers_again(recipe: Recipe) -> None:
    eventually(lambda: recipe.ask(1) == [200], f"{recipe.name} answers again", PATIENCE)


def assert_well_again(recipe: Recipe) -> None:
    assert_well(recipe)
    eventually(lambda: recipe.state()["ok"], f"{recipe.name} is well again", PATIENCE)

    def pool_is_whole() -> bool:
        state = recipe.state()
        return (state["in use"], state["waiting"]) == (0, 0)

    eventually(pool_is_whole, f"no connection of {recipe.name} is in use", PATIENCE)


def assert_fails_clearly(recipe: Recipe) -> None:
    assert recipe.ask(5) == [503] * 5, recipe.name
    state = recipe.state()
    assert state["ok"] is not state["checked"], (recipe.name, state)
    assert " is not available: " in recipe.server.stderr
    assert "Exception in ASGI application" not in recipe.server.stderr


def assert_fails_in_time(recipe: Recipe) -> None:
    assert set(recipe.ask(5)) <= {503, 504}, recipe.name


@contextmanager
def asked_all_the_time(recipes: Sequence[Recipe]) -> Iterator[None]:
    """Have requests under way whenever something happens; each gets its result or a clear answer."""
    over = threading.Event()

    def ask(recipe: Recipe) -> None:
        while not over.is_set():
            statuses = recipe.ask(1)
            assert statuses in ([200], [503], [504]), f"{recipe.name}: {statuses}\n{recipe.server.stderr}"

    with ThreadPoolExecutor(3 * len(recipes)) as pool:
        asking = [pool.submit(ask, recipe) for recipe in [*recipes] * 3]
        try:
            yield
        finally:
            over.set()
    for one in asking:
        one.result()


@contextmanager
def served(
    names: Sequence[str], path: str, env: Callable[[str], Mapping[str, str]], kind: str
) -> Iterator[list[Recipe]]:
    """Serve recipes, which takes as long as the slowest of them."""
    recipes: list[Recipe] = []
    with ExitStack() as stack:
        for name in names:
            port = free_port()
            command = COMMANDS[kind].format(host=HOST, port=port, app="tests.e2e.recipes:app").split()
            variables = {"ASYNCGUARD_TEST_RECIPE": name, "PYTHONPATH": PATH, **env(name)}
            server = stack.enter_context(start([*command, "--log-level", "warning"], port, env=variables))
            recipes.append(Recipe(name, path, server))
        for recipe in recipes:
            recipe.server.await_port()
        yield recipes


def survive(service: Service, recipes: Sequence[Recipe]) -> None:
    """All that may happen to a server."""
    each(recipes, assert_well)
    pids = [recipe.state()["pid"] for recipe in recipes]

    with asked_all_the_time(recipes):
        service.stop()
        each(recipes, assert_fails_clearly)
        service.start()
        each(recipes, assert_answers_again)
    each(recipes, assert_well_again)

    service.stop()
    service.start()  # while nobody asked: connections that are kept are all dead
    each(recipes, assert_well)

    service.freeze()
    each(recipes, assert_fails_in_time)
    service.thaw()
    each(recipes, assert_answers_again)
    each(recipes, assert_well_again)

    assert [recipe.state()["pid"] for recipe in recipes] == pids
    for recipe in recipes:
        recipe.server.terminate()
        assert "was destroyed" not in recipe.server.stderr
        assert "Unclosed" not in recipe.server.stderr


def test_http() -> None:
    names = ["httpx_client", "httpx2_client", "aiohttp_session"]
    with run_http_server("tests.e2e.articles:app") as server:
        with served(names, "/prices/1", lambda _: {"API_URL": server.url}, "uvicorn-uvloop") as recipes:
            for recipe in recipes:
                assert get(recipe.server.port, recipe.path).json() == {"number": 1, "price": 10}
                assert get(recipe.server.port, "/prices/0").status == 404
            survive(server, recipes)


def test_postgres() -> None:
    names = ["asyncpg_pool", "psycopg_connections", "sqlalchemy_engine"]
    with run_postgres() as server:
        server.query("create table orders (number serial primary key, total integer not null)")

        def env(name: str) -> dict[str, str]:
            driver = "+asyncpg" if name == "sqlalchemy_engine" else ""
            return {"DATABASE_URL": server.url.replace("://", f"{driver}://")}

        with served(names, "/orders/1", env, "uvicorn-uvloop") as recipes:
            for number, recipe in enumerate(recipes, 1):
                with Connection(recipe.server.port) as connection:
                    connection.send(f"/orders?total={number * 10}", method="POST")
                    assert connection.receive().json() == number
                assert get(recipe.server.port, f"/orders/{number}").json() == {
                    "number": number,
                    "total": number * 10,
                }
                assert get(recipe.server.port, "/orders/99").status == 404
            survive(server, recipes)
        others = "backend_type = 'client backend' and pid <> pg_backend_pid()"
        connected = f"select state, query from pg_stat_activity where {others}"
        eventually(lambda: server.query(connected) == [], "no connection is left", PATIENCE)
        assert server.query("select count(*) from orders") == ["3"]


def test_redis() -> None:
    with run_redis() as server:
        env = {"REDIS_URL": server.url}
        with served(["redis_client"], "/visits/home", lambda _: env, "uvicorn-uvloop") as recipes:
            assert [get(recipes[0].server.port, "/visits/shop").json() for _ in range(3)] == [1, 2, 3]
            survive(server, recipes)
