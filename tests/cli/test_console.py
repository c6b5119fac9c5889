"""What a person at a terminal reads, to the letter."""

from __future__ import annotations

from dataclasses import replace

from asyncguard import Advice, BlockedLine, BusyReport, HangReport, InFlight, SourceLine, ThreadStack, Victim
from asyncguard._console import busy, closing, hang, stall
from tests.reports import LINE
from tests.reports import REPORT as PLAIN

ADVICE = Advice(
    "Await a shared asynchronous client instead, such as `httpx.AsyncClient`", "cures/#synchronous-http"
)
REPORT = replace(PLAIN, advice=ADVICE)


def victims(*labels: str) -> tuple[Victim, ...]:
    return tuple(Victim(label, 0.5981 - 0.01 * n) for n, label in enumerate(labels))


def test_stall() -> None:
    suffered = victims("GET /ping", "GET /items/{id}", "GET /ping")
    assert stall(replace(REPORT, victims=suffered)) == (
        """\
BLOCKED  GET /report/{user} blocked the loop for 612 ms (waiting in recv_into)
    line  app/routes.py:42 in report
          requests.get(url)
    call  requests.get
  waited  3 requests waited, the longest up to 598 ms: GET /ping x2, GET /items/{id}
    cure  Await a shared asynchronous client instead, such as `httpx.AsyncClient`
          (cures/#synchronous-http)
"""
    )


def test_stall_that_nobody_waited_for() -> None:
    assert "\n  waited  nobody\n" in stall(REPORT)


def test_stall_with_one_victim() -> None:
    text = stall(replace(REPORT, victims=victims("GET /ping")))
    assert "\n  waited  1 request waited up to 598 ms: GET /ping\n" in text


def test_stall_with_many_victims_names_the_five_commonest() -> None:
    crowd = [f"GET /{n}" for n in range(9) for _ in range(n + 1)]
    assert (
        "\n  waited  45 requests waited, the longest up to 598 ms: "
        "GET /8 x9, GET /7 x8, GET /6 x7, GET /5 x6,\n          GET /4 x5\n"
    ) in stall(replace(REPORT, victims=victims(*crowd)))


def test_stall_of_library_code_for_an_endpoint() -> None:
    line = SourceLine("app/routes.py", 40, "report", "async def report(user: str) -> list[Row]:")
    report = replace(REPORT, cause="cpu", line=line, exact=False, call="", innermost="encode", advice=None)
    assert stall(report) == (
        """\
BLOCKED  GET /report/{user} blocked the loop for 612 ms (computing in encode)
endpoint  app/routes.py:40 in report
          async def report(user: str) -> list[Row]:
  waited  nobody
"""
    )


def test_stall_without_a_line() -> None:
    report = replace(REPORT, line=None, call="", innermost="", request=None, pieces=3, advice=None)
    assert stall(report) == (
        """\
BLOCKED  3 or more callbacks in a row blocked the loop for 612 ms (waiting)
  waited  nobody
"""
    )


def test_stall_at_a_line_whose_file_is_gone() -> None:
    text = stall(replace(REPORT, line=replace(LINE, source="")))
    assert "\n    line  app/routes.py:42 in report\n    call  requests.get\n" in text


def test_stall_of_the_start_up_is_a_line() -> None:
    report = replace(REPORT, starting=True, request=None, advice=None)
    assert stall(report) == (
        "start-up 612 ms in one piece, which blocked nobody: app/routes.py:42 in report: requests.get(url)\n"
    )
    assert stall(replace(report, line=None)) == (
        "start-up 612 ms in one piece, which blocked nobody: no line of yours\n"
    )


def test_long_words_are_not_broken() -> None:
    file = "/srv/" + "a-very-long-name/" * 8 + "routes.py"
    text = stall(replace(REPORT, line=replace(LINE, file=file)))
    assert f"{file}:42" in text


ENTRY = BlockedLine(
    line=LINE,
    call="requests.get",
    requests=("GET /report/{user}", "GET /reports"),
    count=3,
    total=1.2346,
    worst=0.6124,
    victims=17,
    advice=ADVICE,
)


def test_closing() -> None:
    other = replace(
        ENTRY, line=None, call="", requests=(), count=12, total=0.9, worst=0.09, victims=0, advice=None
    )
    waiting = [
        InFlight("GET /slow", 12.34, SourceLine("app/routes.py", 50, "slow", "await client.get(url)")),
        InFlight("WS /chat", 1234.5, None),
    ]
    assert closing([ENTRY, other], waiting) == (
        """\
asyncguard: 2 lines blocked the event loop, in 15 stalls

total ms  worst ms  stalls  waited  call          request                           line
--------  --------  ------  ------  ------------  --------------------------------  --------------------------
    1235       612       3      17  requests.get  GET /report/{user}, GET /reports  app/routes.py:42 in report
     900        90      12       0  -             -                                 no single line

Still waiting when the service was stopped:
    12.3 s  GET /slow
            app/routes.py:50 in slow: await client.get(url)
  1234.5 s  WS /chat
            not in your code
"""
    )


def test_closing_without_anything() -> None:
    assert closing([], []) == "asyncguard: nothing blocked the event loop.\n"


def test_closing_with_requests_in_flight_alone() -> None:
    assert closing([], [InFlight("GET /slow", 2.0, None)]) == (
        """\
asyncguard: nothing blocked the event loop.
Still waiting when the service was stopped:
     2.0 s  GET /slow
            not in your code
"""
    )


def test_table_ends_with_an_empty_line() -> None:
    assert closing([ENTRY], []).endswith("app/routes.py:42 in report\n\n")


def test_busy() -> None:
    report = BusyReport(1, 0.0, "GET /feed", 1.256, 4.5, 30, 0.0496, LINE, ADVICE)
    heading = "BUSY     GET /feed held the loop for 1.26 s of 4.50 s, in pieces of up to 50 ms\n"
    text = busy(report)
    assert text.startswith(
        heading
        + "  awaits  app/routes.py:42 in report\n          requests.get(url)\n    cure  Await a shared"
    )
    assert text.endswith("\n")
    assert "awaits" not in busy(replace(report, line=None))


def test_hang() -> None:
    report = HangReport(10.04, None, (ThreadStack("MainThread", (LINE,)),))
    assert hang(report) == (
        """\
HANGING  the loop has been blocked for 10.0 s by code outside any request, and still is
  thread MainThread, innermost call last:
    app/routes.py:42 in report: requests.get(url)
"""
    )
