"""Requests that run out of time in a real database: no connection and no transaction is left behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.database import PATIENCE, POOL
from tests.e2e.recording import marked
from tests.postgres import Postgres, run_postgres
from tests.raw_client import Connection, get
from tests.servers import Server, eventually, serve

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # what it is about is no matter of the Python version

FILE = "tests/e2e/database.py"
CLIENTS = 50
EACH = 20
OTHERS = "backend_type = 'client backend' and pid <> pg_backend_pid()"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with run_postgres() as postgres:
        yield postgres


@pytest.mark.parametrize("kind", ["uvicorn-asyncio", "uvicorn-uvloop"])
def test_a_thousand_timeouts_leave_the_pool_whole(kind: str, postgres: Postgres) -> None:
    """Five times as many clients as connections: requests time out in a query and in the queue for one."""
    postgres.query("drop table if exists orders")
    postgres.query("create table orders (id serial)")
    with serve(kind, "tests.e2e.database:app", "--log-level", "warning", env=postgres.env) as server:
        assert_pool_is_whole(server)
        with ThreadPoolExecutor(CLIENTS) as pool:
            statuses = [status for some in pool.map(order, [server.port] * CLIENTS) for status in some]
        assert statuses == [504] * CLIENTS * EACH
        assert_cleaned_up(server, postgres)
        assert_pool_is_whole(server)
        assert server.terminate() in (0, -signal.SIGTERM)
        assert_told_and_nothing_else(server.stderr)
    connected = f"select state, query from pg_stat_activity where {OTHERS}"
    eventually(lambda: postgres.query(connected) == [], "no connection is left", PATIENCE)


def order(port: int) -> list[int]:
    """Ask again and again on one connection, where anything but one answer each would be seen."""
    with Connection(port) as connection:
        statuses = [connection.get("/order").status for _ in range(EACH - 1)]
        connection.send("/order", headers={"Connection": "close"})
        statuses.append(connection.receive().status)
        assert connection.is_closed()
    return statuses


def state(server: Server) -> Any:
    return get(server.port, "/state").json()


def assert_cleaned_up(server: Server, postgres: Postgres) -> None:
    eventually(lambda: state(server)["abandoned"] == 0, "no request runs on", PATIENCE)
    found = state(server)
    counted = found["counted"]
    assert counted["waiting"] + counted["querying"] == counted["CancelledError"] == CLIENTS * EACH, counted
    assert counted["entered"] == counted["left"] == (EACH + 1) * CLIENTS, counted  # and once together
    assert min(counted["waiting"], counted["querying"]) >= POOL, counted
    assert found["checked out"] == 0
    busy = f"select state, query from pg_stat_activity where {OTHERS} and state is distinct from 'idle'"
    eventually(lambda: postgres.query(busy) == [], "no connection is in a transaction", PATIENCE)
    assert postgres.query("select count(*) from orders") == ["0"]


def assert_pool_is_whole(server: Server) -> None:
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda _: get(server.port, "/together"), range(CLIENTS)))
    assert {answer.status for answer in answers} == {200}
    assert len({answer.json() for answer in answers}) == POOL

    def connections() -> tuple[int, int]:
        found = state(server)
        return found["checked out"], found["checked in"]

    # A session is closed after the response.
    eventually(lambda: connections() == (0, POOL), "all connections are back", PATIENCE)


def assert_told_and_nothing_else(stderr: str) -> None:
    """Neither a traceback nor a connection that was found by the garbage collector."""
    lines = stderr.splitlines()
    assert [line for line in lines if not line.startswith("GET /order got no answer in ")] == []
    for marker in ("connection", "query"):
        place = f"awaiting {FILE}:{marked(FILE, marker, 'awaits')} in order: "
        assert any(place in line for line in lines), stderr[:2000]
