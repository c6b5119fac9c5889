"""Clients that all requests share: `shared`, opened and closed with the application's lifespan."""

from asyncguard.clients._checks import check_shared
from asyncguard.clients._lifespans import checked_resources, combine_lifespans, open_shared, with_shared
from asyncguard.clients._middleware import WatchClients
from asyncguard.clients._shared import Shared, shared

__all__ = [
    "Shared",
    "WatchClients",
    "check_shared",
    "checked_resources",
    "combine_lifespans",
    "open_shared",
    "shared",
    "with_shared",
]
