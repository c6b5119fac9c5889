"""The service that the recipes for HTTP clients ask."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


async def article(request: Request) -> Response:
    number = request.path_params["number"]
    return JSONResponse({"number": number, "price": 10 * number}, 200 if number else 404)


app = Starlette(routes=[Route("/articles/{number:int}", article)])
