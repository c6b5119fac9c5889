"""What the lifespan has put on `app.state`, typed, for the routes to ask for.

All of them are `async def`: FastAPI sends a plain `def` dependency through its thread pool.
"""

from pathlib import Path
from typing import Annotated, cast

import httpx
from fastapi import Depends, Request

from shop.work import PriceHistory


async def _client(request: Request) -> httpx.AsyncClient:
    return cast(httpx.AsyncClient, request.app.state.client)


async def _upstream(request: Request) -> str:
    return cast(str, request.app.state.upstream)


async def _catalogue(request: Request) -> Path:
    return cast(Path, request.app.state.catalogue)


async def _price_history(request: Request) -> PriceHistory:
    return cast(PriceHistory, request.app.state.price_history)


SharedClient = Annotated[httpx.AsyncClient, Depends(_client)]
UpstreamURL = Annotated[str, Depends(_upstream)]
Catalogue = Annotated[Path, Depends(_catalogue)]
History = Annotated[PriceHistory, Depends(_price_history)]
