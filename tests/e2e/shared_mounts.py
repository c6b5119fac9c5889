"""An application of several: mounted ones, one below a mounted one, included routers, and plain ASGI."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, WebSocket
from starlette.applications import Starlette
from starlette.requests import Request as PlainRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

import asyncguard
from asyncguard import SharedNotOpen, combine_lifespans, open_shared, shared
from tests.e2e.shared_app import Thing, live, note

common = shared(live, "common")
inner = shared(live, "inner", common)
routed = shared(live, "routed")
forgotten = shared(live, "forgotten")
third = shared(live, "third")  # what the tests wait for

Common = Annotated[Thing, Depends(common)]


# -- mounted, and uses what the outer one has opened -------------------------------------------------


async def ask(request: PlainRequest) -> Response:
    return JSONResponse(common.get().ask())


async def ask_as_asgi(scope: Scope, receive: Receive, send: Send) -> None:
    await JSONResponse(common.get().ask())(scope, receive, send)


nested = Starlette(routes=[Route("/ask", ask)])
plain = Starlette(routes=[Route("/ask", ask), Mount("/nested", nested), Mount("/asgi", ask_as_asgi)])


# -- mounted, with a lifespan and resources of its own ------------------------------------------------


@asynccontextmanager
async def own_lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    note(f"+own with {inner.get().name}")
    yield {"own": "kept"}
    note(f"-own with {inner.get().name}")


combined = FastAPI(lifespan=own_lifespan)
asyncguard.install(combined, shared=[inner])


@combined.get("/ask")
async def ask_inner(
    request: Request, thing: Annotated[Thing, Depends(inner)], outer: Common
) -> dict[str, str]:
    return {"inner": thing.ask(), "common": outer.ask(), "own": request.state.own}


@combined.get("/in-thread")
def ask_inner_in_thread(thing: Annotated[Thing, Depends(inner)]) -> list[str]:
    return [thing.ask(), inner.get().ask(), common.get().ask()]


@combined.websocket("/socket")
async def socket(websocket: WebSocket, thing: Annotated[Thing, Depends(inner)]) -> None:
    await websocket.accept()
    async for _ in websocket.iter_text():
        await websocket.send_text(thing.ask())


# -- mounted, while its lifespan is run by nobody -----------------------------------------------------

left_out = FastAPI()
asyncguard.install(left_out, shared=[forgotten])


@left_out.get("/ask")
async def ask_forgotten() -> str:
    try:
        return forgotten.get().ask()
    except SharedNotOpen as error:
        return str(error)


# -- included -----------------------------------------------------------------------------------------

router = APIRouter(prefix="/router", lifespan=open_shared(routed))


@router.get("/ask")
async def ask_routed(thing: Annotated[Thing, Depends(routed)], outer: Common) -> list[str]:
    return [thing.ask(), outer.ask()]


app = FastAPI(lifespan=combine_lifespans(combined, open_shared(third)))
app.include_router(router)
app.mount("/plain", plain)
app.mount("/combined", combined)
app.mount("/left-out", left_out)
asyncguard.install(app, shared=[common])


@app.get("/ask")
async def ask_outer(thing: Common) -> str:
    return thing.ask()
