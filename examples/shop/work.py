"""The shop's heavy work as plain functions, for threads and worker processes.

A worker process imports this module before its first call, so it imports little itself.
"""

import hashlib
import json
from functools import cache
from pathlib import Path

ARTICLES = 3_000_000
"""How many articles a recommendation chooses from."""

PriceHistory = dict[str, list[float]]


def best_article(customer: int) -> int:
    """Return the article with the highest affinity to a customer (a hash plays the model)."""
    return max(range(ARTICLES), key=lambda article: (article + 1) * (customer + 1) % 1009)


@cache
def price_history(skus: int = 4_000, days: int = 365) -> PriceHistory:
    """Return each article's price on each day of a year; built once per process."""
    return {
        f"SKU-{sku:05}": [20 + (sku * 37 + day * 11) % 997 / 100 for day in range(days)]
        for sku in range(skus)
    }


def price_history_size() -> int:
    """Return the length of the price history as JSON, from this process's own copy."""
    return len(json.dumps(price_history()))


def write_catalogue(path: Path, megabytes: int = 48) -> None:
    """Write the catalogue: a line `sku,name` for each article."""
    page = b"".join(b"SKU-%06d,Article no. %06d\n" % (sku, sku) for sku in range(32_000))[:1_000_000]
    with path.open("wb") as catalogue:
        for _ in range(megabytes):
            catalogue.write(page)


def checksum(path: Path) -> str:
    """Return the checksum of a file. It lets go of the GIL to read and to compute: a thread will do."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha3_512").hexdigest()


def warm_up() -> None:
    """Build what later calls in this worker process need."""
    price_history()
