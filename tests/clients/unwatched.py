"""Constructors that nobody watches, whatever other tests have left behind."""

from __future__ import annotations

import gc

from asyncguard.clients import _constructors

__all__ = ["unwatch"]


def unwatch() -> None:
    """Let go of all constructors: applications of other tests live on, or wait for the collector."""
    if _constructors._holds:
        gc.collect()
    for hold in [*_constructors._holds]:
        _constructors._let_go(hold)
