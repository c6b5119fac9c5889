"""The same eight routes as in `unhealthy.py`, cured, and the price page that customers look at."""

import asyncio

import anyio
import httpx
from anyio import to_process, to_thread
from fastapi import APIRouter, HTTPException

from shop import work
from shop.dependencies import Catalogue, SharedClient

router = APIRouter()


@router.get("/checkout")
async def checkout() -> dict[str, str]:
    """Pay; the payment provider is busy at first, so wait and try again."""
    await anyio.sleep(0.2)
    return {"payment": "accepted at the second attempt"}


@router.get("/exchange-rates")
async def exchange_rates(client: SharedClient) -> dict[str, float]:
    """Fetch today's exchange rates."""
    response = await client.get("/rates")
    rates: dict[str, float] = response.json()
    return rates


@router.get("/catalogue")
async def catalogue(path: Catalogue) -> dict[str, str]:
    """Tell the checksum of the catalogue, for those who downloaded it."""
    return {"sha3_512": await to_thread.run_sync(work.checksum, path)}


@router.get("/recommendations/{customer}")
async def recommendations(customer: int) -> dict[str, int]:
    """Recommend the one article that suits a customer best."""
    return {"article": await to_process.run_sync(work.best_article, customer)}


@router.get("/price-history")
async def price_history() -> dict[str, int]:
    """Tell how large the download of the price history will be."""
    # A thread would not do: json.dumps holds the GIL from its first byte to its last.
    return {"bytes": await to_process.run_sync(work.price_history_size)}


@router.get("/offers")
async def offers(client: SharedClient) -> list[str]:
    """Ask every supplier for an offer."""
    responses = await asyncio.gather(*(client.get(f"/suppliers/{number}") for number in range(8)))
    return [response.json()["offer"] for response in responses]


@router.get("/price-list")
async def price_list(client: SharedClient) -> dict[int, float]:
    """Collect the prices of all articles, eight at a time."""
    prices: dict[int, float] = {}
    skus = iter(range(1000))

    async def collect() -> None:
        for sku in skus:  # the collectors share the iterator: each takes the next one
            response = await client.get(f"/prices/{sku}")
            prices[sku] = float(response.json()["price"])

    async with anyio.create_task_group() as collectors:
        for _ in range(8):
            collectors.start_soon(collect)
    return prices


@router.get("/delivery-date")
async def delivery_date(client: SharedClient) -> dict[str, str]:
    """Ask the carrier for a date, but not for long."""
    try:
        response = await client.get("/slow", timeout=0.3)
    except httpx.TimeoutException:
        raise HTTPException(504, "The delivery date is not available.") from None
    return {"date": response.json()["date"]}


@router.get("/prices/{sku}")
async def price_page(sku: int, client: SharedClient) -> dict[str, float]:
    """Show one price."""
    response = await client.get(f"/prices/{sku}")
    return {"price": float(response.json()["price"])}
