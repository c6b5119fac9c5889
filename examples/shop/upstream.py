"""Everybody the shop asks over HTTP (price service, bank, suppliers, carrier), in one fake."""

import anyio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


async def prices(request: Request) -> Response:
    """Answer with a price, after 5 to 12 ms."""
    sku: int = request.path_params["sku"]
    await anyio.sleep(0.005 + sku % 8 / 1000)
    return JSONResponse({"price": 20 + sku * 37 % 997 / 100})


async def rates(_: Request) -> Response:
    """Answer with the exchange rates, after a quarter of a second."""
    await anyio.sleep(0.25)
    return JSONResponse({"USD": 1.09, "GBP": 0.86, "CHF": 0.95})


async def suppliers(request: Request) -> Response:
    """Answer with a supplier's offer, after 10 ms."""
    await anyio.sleep(0.01)
    return JSONResponse({"offer": f"supplier {request.path_params['number']}: 3 for 2"})


async def slow(request: Request) -> Response:
    """Answer after a minute, or not at all once the caller has left."""
    await request.body()
    with anyio.move_on_after(60):
        await request.receive()  # after the body, nothing comes but the caller's leaving
    return JSONResponse({"date": "one of these days"})


app = Starlette(
    routes=[
        Route("/prices/{sku:int}", prices),
        Route("/rates", rates),
        Route("/suppliers/{number:int}", suppliers),
        Route("/slow", slow),
    ]
)
