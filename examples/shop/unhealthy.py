"""Eight routes, each with one classic pitfall. The twins in `healthy.py` show the cures.

The comment `# pitfall: <name>` stands on the very line that is to blame.
"""

# Blocking calls in async functions are what this module is about.
# ruff: noqa: ASYNC210, ASYNC251

import asyncio
import hashlib
import json
import time

import httpx
import requests
from fastapi import APIRouter

from shop.dependencies import Catalogue, History, SharedClient, UpstreamURL
from shop.work import ARTICLES

router = APIRouter()


@router.get("/checkout")
async def checkout() -> dict[str, str]:
    """Pay; the payment provider is busy at first, so wait and try again."""
    time.sleep(0.2)  # pitfall: sleep
    return {"payment": "accepted at the second attempt"}


@router.get("/exchange-rates")
async def exchange_rates(upstream: UpstreamURL) -> dict[str, float]:
    """Fetch today's exchange rates."""
    response = requests.get(f"{upstream}/rates", timeout=5)  # pitfall: http
    rates: dict[str, float] = response.json()
    return rates


@router.get("/catalogue")
async def catalogue(path: Catalogue) -> dict[str, str]:
    """Tell the checksum of the catalogue, for those who downloaded it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha3_512")  # pitfall: file
    return {"sha3_512": digest.hexdigest()}


@router.get("/recommendations/{customer}")
async def recommendations(customer: int) -> dict[str, int]:
    """Recommend the one article that suits a customer best."""
    best = max(range(ARTICLES), key=lambda n: (n + 1) * (customer + 1) % 1009)  # pitfall: cpu
    return {"article": best}


@router.get("/price-history")
async def price_history(history: History) -> dict[str, int]:
    """Tell how large the download of the price history will be."""
    body = json.dumps(history)  # pitfall: json
    return {"bytes": len(body)}


@router.get("/offers")
async def offers(upstream: UpstreamURL) -> list[str]:
    """Ask every supplier for an offer."""
    clients = [httpx.AsyncClient(base_url=upstream) for _ in range(8)]  # pitfall: client
    try:
        responses = await asyncio.gather(
            *(client.get(f"/suppliers/{number}") for number, client in enumerate(clients))
        )
    finally:
        for client in clients:
            await client.aclose()
    return [response.json()["offer"] for response in responses]


@router.get("/price-list")
async def price_list(client: SharedClient) -> dict[int, float]:
    """Collect the prices of all articles at once."""

    async def price(sku: int) -> float:
        response = await client.get(f"/prices/{sku}")  # pitfall: gather
        return float(response.json()["price"])

    skus = range(1000)
    return dict(zip(skus, await asyncio.gather(*map(price, skus)), strict=True))


@router.get("/delivery-date")
async def delivery_date(client: SharedClient) -> dict[str, str]:
    """Ask the carrier for a date, however long that takes."""
    response = await client.get("/slow", timeout=None)  # pitfall: no-timeout
    return {"date": response.json()["date"]}
