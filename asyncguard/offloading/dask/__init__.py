"""Calls on a Dask cluster, instead of worker processes of this machine.

`_backend` is the server's side, `_serve` that of a worker, `_once` that of the scheduler. All three have to
have asyncguard installed.
"""

try:
    from asyncguard.offloading.dask._backend import DaskBackend
except ModuleNotFoundError as _missing:
    raise ImportError("DaskBackend needs distributed: pip install 'asyncguard[dask]'") from _missing

__all__ = ["DaskBackend"]
