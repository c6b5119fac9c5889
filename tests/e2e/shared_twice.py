"""Serves one application object on several event loops of one process.

    python -m tests.e2e.shared_twice together|in-turn PORT PORT PORT

The ports are those of asyncio, uvloop and trio. SIGUSR1 ends the first that runs, SIGTERM all of them.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable

import hypercorn.config
import hypercorn.trio
import trio
import uvicorn

from tests.e2e.shared_app import app

HOST = "127.0.0.1"


class OnUvicorn:
    def __init__(self, port: int, loop: str) -> None:
        self._server = uvicorn.Server(uvicorn.Config(app, host=HOST, port=port, loop=loop, http="h11"))

    def run(self) -> None:
        self._server.run()

    def stop(self) -> None:
        self._server.should_exit = True


class OnHypercorn:
    def __init__(self, port: int) -> None:
        self._config = hypercorn.config.Config()
        self._config.bind = [f"{HOST}:{port}"]
        self._stopped = False

    def run(self) -> None:
        async def wait() -> None:
            while not self._stopped:
                await trio.sleep(0.05)

        async def serve() -> None:
            await hypercorn.trio.serve(app, self._config, shutdown_trigger=wait)  # type: ignore[arg-type]

        trio.run(serve)

    def stop(self) -> None:
        self._stopped = True


def main(how: str, *ports: int) -> None:
    servers: list[OnUvicorn | OnHypercorn] = [
        OnUvicorn(ports[0], "asyncio"),
        OnUvicorn(ports[1], "uvloop"),
        OnHypercorn(ports[2]),
    ]
    waiting = [*servers]

    def stop_one() -> None:
        waiting.pop(0).stop()

    def stop_all() -> None:
        while waiting:
            stop_one()

    on(signal.SIGUSR1, stop_one)
    on(signal.SIGTERM, stop_all)
    # Not in the main thread: there the servers see to signals themselves.
    runs = [lambda: [server.run() for server in servers]] if how == "in-turn" else [s.run for s in servers]
    threads = [threading.Thread(target=run) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def on(number: signal.Signals, call: Callable[[], object]) -> None:
    signal.signal(number, lambda *_: call())


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
