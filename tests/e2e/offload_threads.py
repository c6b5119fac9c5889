"""A server on a loop whose pool was opened by a thread that has ended.

It is a program: ``python -m tests.e2e.offload_threads PORT``.
"""

from __future__ import annotations

import asyncio
import sys
import threading

import uvicorn

from asyncguard import OffloadPool
from tests.e2e import offload_app


def main(port: int) -> None:
    loop = asyncio.new_event_loop()
    pool = OffloadPool(1)

    async def begin() -> None:
        pool.open()
        await pool.run(offload_app.note, "in-thread")

    thread = threading.Thread(target=loop.run_until_complete, args=[begin()])
    thread.start()
    thread.join()
    loop.run_until_complete(uvicorn.Server(uvicorn.Config(offload_app.app, port=port)).serve())


if __name__ == "__main__":
    main(int(sys.argv[1]))
