"""Shared things in mounted applications and included routers, under real servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.shared_servers import WELL_ENDED, sharing
from tests.raw_client import WebSocket, get

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("kind", ["uvicorn-asyncio", "hypercorn-trio"])
def test_each_part_gets_what_is_open(kind: str, tmp_path: Path) -> None:
    with sharing(kind, tmp_path, app="tests.e2e.shared_mounts:app") as found:

        def ask(path: str) -> object:
            answer = get(found.port, path)
            assert answer.status == 200, f"{path}: {answer.body!r}\n{found.written}"
            return answer.json()

        common = ask("/ask")
        assert ask("/plain/ask") == ask("/plain/nested/ask") == ask("/plain/asgi/") == common
        answer = ask("/combined/ask")
        assert isinstance(answer, dict)
        inner = answer["inner"]
        assert answer == {"inner": inner, "common": common, "own": "kept"}
        assert ask("/combined/in-thread") == [inner, inner, common]
        with WebSocket(found.port, "/combined/socket") as socket:
            socket.send("?")
            assert socket.receive() == inner
        routed = ask("/router/ask")
        assert isinstance(routed, list)
        assert routed[1] == common
        said = ask("/left-out/ask")
        assert isinstance(said, str)
        assert said.startswith("the shared resource 'forgotten' (declared at tests/e2e/shared_mounts.py:")
        assert " is not open: pass shared=[forgotten] to asyncguard.install(app)" in said
        assert "mounted application is run by nobody: see asyncguard.combine_lifespans" in said

        assert found.server.terminate() in WELL_ENDED
        life = found.life()
        # Two applications need `common`: it is opened once. When the router's is, is FastAPI's business.
        assert (life.count("+routed"), life.count("-routed")) == (1, 1)
        order = [event for event in life if "routed" not in event]
        assert order == [
            *("+common", "+inner", "+own with inner", "+third"),
            *("-third", "-own with inner", "-inner", "-common"),
        ]
        found.assert_quiet()
