"""Running an application in a test as a server runs it: with its lifespan, and without its port.

    async with testing.running(app) as served:      in async tests
    with testing.running(app) as served:            in all others, and for more tests than one

What requests do to it is the clients' business: httpx and httpx2 by their `ASGITransport`, and Starlette's
TestClient.
"""

from asyncguard.testing._running import running
from asyncguard.testing._served import ServedApp

__all__ = ["ServedApp", "running"]
