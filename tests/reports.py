"""A report made by hand, for the tests of what is made of reports."""

from __future__ import annotations

from asyncguard.events import BlockReport, SourceLine, StackSample

__all__ = ["LINE", "REPORT"]

LINE = SourceLine("app/routes.py", 42, "report", "requests.get(url)")
REPORT = BlockReport(
    id=1,
    started=0.0,
    duration=0.6124,
    cause="waiting",
    line=LINE,
    exact=True,
    call="requests.get",
    innermost="recv_into",
    request="GET /report/{user}",
    task="Task-7",
    left_behind=False,
    starting=False,
    pieces=1,
    stack=(LINE,),
    samples=(StackSample((LINE,), 0.6124),),
    victims=(),
    advice=None,
    held_by=None,
    loop="uvloop.Loop",
    thread="MainThread",
)
