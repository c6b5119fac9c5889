"""Applications besides those of `timeouts`: with what FastAPI does by itself around a handler."""

from __future__ import annotations

import time
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, FastAPI, Form, HTTPException, Request, UploadFile
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from tests.e2e.timeouts import APPLICATIONS, BASE, CORS, LONG, Hangs, app, make, notes

__all__ = ["app"]

BURNT = 0.1
"""Seconds of CPU that a handler takes."""

router = APIRouter()


# -- what FastAPI reads before it calls an endpoint ------------------------------------------------


class Order(BaseModel):
    article: str


@router.post("/model/{token}")
async def takes_model(token: str, order: Order) -> str:
    notes[token].append("called")
    return order.article


@router.post("/form/{token}")
async def takes_form(token: str, article: Annotated[str, Form()]) -> str:
    notes[token].append("called")
    return article


@router.post("/file/{token}")
async def takes_file(token: str, file: UploadFile) -> str:
    notes[token].append("called")
    return (await file.read()).decode()


@router.post("/file-in-thread/{token}")
def takes_file_in_thread(token: str, file: UploadFile) -> str:
    notes[token].append("called")
    return file.file.read().decode()


@router.post("/pieces/{token}")
async def reads_pieces(token: str, request: Request) -> None:
    notes[token].append("called")
    try:
        async for _ in request.stream():
            pass
    except anyio.get_cancelled_exc_class():
        notes[token].append("cancelled")
        raise


# -- what becomes of exceptions --------------------------------------------------------------------


@router.get("/fails-after/{token}")
async def fails_after(token: str) -> None:
    with anyio.fail_after(0.05):
        await anyio.sleep(LONG)


@router.get("/raises-when-cancelled/{token}")
async def raises_when_cancelled(token: str, what: str) -> None:
    try:
        await anyio.sleep(LONG)
    except anyio.get_cancelled_exc_class():
        notes[token].append("cancelled")
        raise HTTPException(409) if what == "conflict" else TimeoutError("not another") from None


async def own_answer(request: Request, error: Exception) -> JSONResponse:
    notes[request.url.path.rpartition("/")[2]].append("handled")
    return JSONResponse({"own": str(error)}, 503)


# -- what holds the loop ---------------------------------------------------------------------------


@router.get("/burns/{token}")
async def burns(token: str) -> None:
    until = time.thread_time() + BURNT
    while time.thread_time() < until:
        pass
    await anyio.sleep(LONG)


# -- the applications ------------------------------------------------------------------------------


def made(*middlewares: Any, **options: Any) -> FastAPI:
    app = make(*middlewares, **options)
    app.include_router(router)
    app.add_exception_handler(TimeoutError, own_answer)
    return app


APPLICATIONS |= {
    "fastapi": made(),
    "fastapi-base": made(BASE),
    "fastapi-single": made(install=False),
    "fastapi-single-base": made(BASE, install=False, before=1),
    "fastapi-watched": made(block_threshold=5.0),
    "hangs-in-cors": made((Hangs, {}), CORS),
}
