"""What to do about a call, by the names that the real functions have."""

from __future__ import annotations

import concurrent.futures
import csv
import dis
import hashlib
import http.client
import importlib
import io
import json
import linecache
import multiprocessing
import os
import pathlib
import queue
import shutil
import socket
import sqlite3
import ssl
import subprocess
import tempfile
import threading
import time
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
import requests
import urllib3

from asyncguard._frames import RawFrame
from asyncguard._source import call_text, function_name, resolved_name
from asyncguard.blocking import _advice
from asyncguard.blocking._advice import advice_for

MODULES: dict[str, Any] = {
    module.__name__.partition(".")[0]: __import__(module.__name__.partition(".")[0])
    for module in (
        concurrent.futures, csv, hashlib, http.client, httpx, httpx2, importlib, io, json, multiprocessing,
        os, pathlib, queue, requests, shutil, socket, sqlite3, ssl, subprocess, tempfile, threading, time,
        urllib.request, urllib3, zipfile,
    )
}  # fmt: skip

WRITTEN = [
    ("time.sleep(1)", "sleep"),
    ("httpx.AsyncClient()", "client-per-request"),
    ("httpx.Client()", "client-per-request"),
    ("httpx2.AsyncClient()", "client-per-request"),
    ("httpx2.Client()", "client-per-request"),
    ("ssl.create_default_context()", "client-per-request"),
    ("ssl.SSLContext()", "client-per-request"),
    ("requests.get(url)", "synchronous-http"),
    ("requests.request('GET', url)", "synchronous-http"),
    ("urllib.request.urlopen(url)", "synchronous-http"),
    ("urllib3.request('GET', url)", "synchronous-http"),
    ("subprocess.run(command)", "subprocesses"),
    ("subprocess.check_output(command)", "subprocesses"),
    ("subprocess.Popen(command)", "subprocesses"),
    ("os.system(command)", "subprocesses"),
    ("os.popen(command)", "subprocesses"),
    ("sqlite3.connect(path)", "databases"),
    ("hashlib.scrypt(password)", "passwords"),
    ("hashlib.pbkdf2_hmac('sha256', password)", "passwords"),
    ("multiprocessing.Process(target=f)", "locks"),
    ("concurrent.futures.wait(futures)", "locks"),
    ("socket.getaddrinfo(host, 80)", "name-look-ups"),
    ("socket.gethostbyname(host)", "name-look-ups"),
    ("open(path)", "files"),
    ("io.open(path)", "files"),
    ("csv.reader(file)", "files"),
    ("os.fsync(file)", "files"),
    ("os.walk(path)", "files"),
    ("os.read(file, 1)", "files"),
    ("os.write(file, data)", "files"),
    ("pathlib.Path(path)", "files"),
    ("shutil.copytree(a, b)", "files"),
    ("tempfile.mkdtemp()", "files"),
    ("zipfile.ZipFile(path)", "files"),
    ("importlib.import_module(name)", "imports"),
    ("json.dumps(document)", "big-json"),
    ("json.loads(text)", "big-json"),
    ("sorted(numbers)", None),
    ("sum(numbers)", None),
    ("mine(1)", None),
]  # fmt: skip

FUNCTIONS: list[tuple[Any, str | None]] = [
    (httpx.AsyncClient.__init__, "client-per-request"),
    (httpx.Client.__init__, "client-per-request"),
    (httpx2.AsyncClient.__init__, "client-per-request"),
    (httpx2.Client.__init__, "client-per-request"),
    (requests.Session.__init__, "client-per-request"),
    (ssl.create_default_context, "client-per-request"),
    (httpx.get, "synchronous-http"),
    (httpx2.get, "synchronous-http"),
    (httpx.Client.get, "synchronous-http"),
    (httpx2.Client.send, "synchronous-http"),
    (requests.Session.get, "synchronous-http"),
    (urllib3.PoolManager.urlopen, "synchronous-http"),
    (http.client.HTTPConnection.getresponse, "synchronous-http"),
    (urllib.request.OpenerDirector.open, "synchronous-http"),
    (subprocess.Popen.wait, "subprocesses"),
    (threading.Event.wait, "locks"),
    (threading.Thread.join, "locks"),
    (queue.Queue.get, "locks"),
    (concurrent.futures.Future.result, "locks"),
    (multiprocessing.Process.join, "locks"),
    (Path.read_text, "files"),
    (csv.DictReader.__next__, "files"),
    (zipfile.ZipFile.extractall, "files"),
    (shutil.rmtree, "files"),
    (json.JSONEncoder.encode, "big-json"),
    (importlib._bootstrap._find_and_load, "imports"),  # type: ignore[attr-defined]
    (ssl.SSLContext.wrap_socket, None),
]

# Libraries that are not installed for the tests; the names are those of November 2026.
NAMES = [
    ("aiohttp.client.ClientSession", "client-per-request"),
    ("psycopg.connection.Connection.connect", "databases"),
    ("psycopg.cursor.Cursor.execute", "databases"),
    ("psycopg2.connect", "databases"),
    ("pymysql.cursors.Cursor.execute", "databases"),
    ("pymongo.synchronous.mongo_client.MongoClient", "databases"),
    ("redis.client.Redis.execute_command", "databases"),
    ("sqlalchemy.engine.base.Connection.execute", "databases"),
    ("sqlalchemy.orm.session.Session.execute", "databases"),
    ("MySQLdb.connect", "databases"),
    ("bcrypt._bcrypt.hashpw", "passwords"),
    ("argon2._password_hasher.PasswordHasher.hash", "passwords"),
    ("timeit.timeit", None),
    ("requests_cache_of_mine.get", None),
    ("opener", None),
]


def anchor_of(name: str) -> str:
    return advice_for([name], "cpu", fan_out=False).docs.removeprefix("cures/#")


@pytest.mark.parametrize(("call", "anchor"), WRITTEN, ids=[call for call, _ in WRITTEN])
def test_calls_as_they_are_written(tmp_path: Path, call: str, anchor: str | None) -> None:
    """From the source, through the names that the module has, to the advice."""
    file = tmp_path / "app.py"
    file.write_text(f"def f():\n    return {call}\n")
    namespace: dict[str, Any] = dict(MODULES)
    exec(compile(file.read_text(), str(file), "exec"), namespace)
    code = namespace["f"].__code__
    names = {
        resolved_name(frame, text)
        for instruction in dis.get_instructions(code)
        if (text := call_text(frame := RawFrame(code, instruction.offset, namespace)))
    }
    linecache.clearcache()
    (name,) = names
    assert anchor_of(name) == (anchor or "computing")


@pytest.mark.parametrize(
    ("function", "anchor"),
    FUNCTIONS,
    ids=[f"{f.__globals__['__name__']}.{f.__qualname__}" for f, _ in FUNCTIONS],
)
def test_functions_below_the_users_line(function: Any, anchor: str | None) -> None:
    name = function_name(RawFrame(function.__code__, 0, function.__globals__))
    assert anchor_of(name) == (anchor or "computing")


@pytest.mark.parametrize(("name", "anchor"), NAMES)
def test_names(name: str, anchor: str | None) -> None:
    assert anchor_of(name) == (anchor or "computing")


def test_every_row_has_a_case() -> None:
    cases = {anchor for _, anchor in (*WRITTEN, *FUNCTIONS, *NAMES)}
    assert cases == {cure.anchor for cure in _advice._CURES} | {None}


def test_the_outermost_known_name_decides() -> None:
    names = ["mine.helper", "requests.api.get", "socket.socket.recv_into", "time.sleep"]
    assert advice_for(names, "waiting", fan_out=False).docs == "cures/#synchronous-http"


@pytest.mark.parametrize(
    ("cause", "anchor"), [("cpu", "computing"), ("waiting", "waiting"), ("unknown", "waiting")]
)
def test_without_a_known_name_the_cause_decides(cause: Any, anchor: str) -> None:
    for names in ([], ["mine.helper"]):
        assert advice_for(names, cause, fan_out=False).docs == f"cures/#{anchor}"


def test_a_fan_out_comes_first() -> None:
    assert advice_for(["time.sleep"], "waiting", fan_out=True).docs == "cures/#unbounded-fan-out"


@pytest.mark.parametrize(("cause", "anchor"), [("gc", "garbage-collection"), ("gil", "threads-that-compute")])
def test_what_no_line_of_the_loop_did_has_an_advice_of_its_own(cause: Any, anchor: str) -> None:
    for fan_out in (False, True):
        assert advice_for(["time.sleep"], cause, fan_out=fan_out).docs == f"cures/#{anchor}"


OTHERS = (
    _advice._COLLECTING,
    _advice._GIL,
    _advice._FAN_OUT,
    _advice._COMPUTING,
    _advice._WAITING,
)


def test_advice_can_be_acted_on() -> None:
    texts = [cure.text for cure in (*_advice._CURES, *OTHERS)] + [_advice.BUSY_ADVICE.text]
    for text in texts:
        assert text[0].isupper()
        assert not text.endswith(".")
