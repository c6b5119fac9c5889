"""What is logged in a worker reaches the server as it was."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
from collections.abc import Iterator

import pytest

from asyncguard.offloading._control import WorkerSettings
from tests.offloading import chores
from tests.offloading.nursery import Nursery, Worker


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture
def worker(nursery: Nursery) -> Iterator[Worker]:
    worker = nursery.fork(WorkerSettings(log_level=logging.INFO))
    yield worker
    worker.close()


def test_a_record(worker: Worker) -> None:
    worker.call(chores.log, level=logging.INFO, extra={"colour": "red"})
    worker.call(chores.log, level=logging.DEBUG)
    (record,) = worker.records()
    assert (record.name, record.levelname, record.getMessage()) == ("tests.chores", "INFO", "3 of many")
    assert (record.process, record.funcName) == (worker.pid, "log")
    assert vars(record)["colour"] == "red"


def test_a_record_with_a_traceback(worker: Worker) -> None:
    worker.call(chores.log_failure)
    (record,) = worker.records()
    assert record.exc_info is None
    text = logging.Formatter().format(record)
    assert text.startswith("it failed\nTraceback")
    assert text.endswith("ValueError: failure")


def test_what_cannot_be_sent_is_left_out(worker: Worker) -> None:
    worker.call(chores.log_with_extras)
    (record,) = worker.records()
    assert vars(record)["colour"] == "red"
    assert "held" not in vars(record)


def test_warnings(worker: Worker) -> None:
    worker.call(chores.warn)
    (record,) = worker.records()
    assert record.name == "py.warnings"
    assert "UserWarning: take care" in record.getMessage()


def test_a_record_that_cannot_be_formatted_is_reported_here() -> None:
    with Nursery(stderr=subprocess.PIPE) as nursery:
        worker = nursery.fork()
        worker.call(chores.log_bad_arguments)
        worker.close()
        assert nursery.process.stderr is not None
        assert b"--- Logging error ---" in os.read(nursery.process.stderr.fileno(), 1 << 16)
        assert worker.logs == []


def test_a_module_that_configures_logging_does_not_stop_it(worker: Worker) -> None:
    worker.call(chores.configure_logging)
    worker.call(chores.request_name)
    worker.call(chores.log, level=logging.INFO)
    worker.call(chores.log, level=logging.DEBUG)
    assert [record.levelname for record in worker.records()] == ["INFO"]


def test_the_server_is_gone(nursery: Nursery) -> None:
    worker = nursery.fork()
    worker.send(chores.log_for_ever)
    worker.progress()
    worker.wire.close()
    worker.aim(worker.calls)
    worker.signal()
    assert nursery.exit_of(worker) == 0


def test_its_threads_are_named(worker: Worker) -> None:
    worker.call(chores.log_from_threads, 1, 1)
    assert worker.logs[0]["threadName"] != threading.main_thread().name
