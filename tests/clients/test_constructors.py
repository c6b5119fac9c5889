"""Constructors are watched while somebody holds on to that, and as they were before and afterwards."""

from __future__ import annotations

import functools
import importlib
import inspect
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

from asyncguard._request import Build, RequestRecord, current_request
from asyncguard.clients import _constructors
from asyncguard.clients._constructors import Hold, look
from asyncguard.clients._kinds import KINDS, Kind
from tests.clients.unwatched import unwatch

LIBRARY = "library_of_clients"


class Client:
    """A client.

    Args:
        pool: What it is built upon.
    """

    def __init__(self, pool: object = None, *, fails: bool = False, inner: bool = False) -> None:
        if fails:
            raise LookupError("no such host")
        self.pool = pool
        self.inner = Client() if inner else None


Client.__module__ = LIBRARY


class Told(Build):
    """Is told of builds."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, object, object, FrameType]] = []
        self.ended: list[float] = []
        self.failed = 0
        self.error: Exception | None = None
        self.uninterested = False

    def begin(
        self, record: RequestRecord, kind: Any, thing: object, part: object, frame: FrameType
    ) -> Build | None:
        if self.error is not None:
            raise self.error
        self.begun.append((str(kind), thing, part, frame))
        return None if self.uninterested else self

    def end(self, seconds: float) -> None:
        self.ended.append(seconds)

    def fail(self) -> None:
        self.failed += 1


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A library that is known to build clients, and nothing of it is watched before or afterwards."""
    unwatch()
    module: Any = ModuleType(LIBRARY)
    module.Client = Client
    original = vars(Client)["__init__"]
    monkeypatch.setitem(sys.modules, LIBRARY, module)
    monkeypatch.setattr(_constructors, "KINDS", (Kind(LIBRARY, "Client", KINDS[0].advice, "pool"),))
    yield module
    assert not _constructors._holds
    Client.__init__ = original  # type: ignore[method-assign]
    _constructors._wrappers.clear()


@pytest.fixture
def told() -> Iterator[Told]:
    """What is told of builds in the request that the test stands for."""
    record = RequestRecord({"type": "http"}, 0.0)
    record.builds = told = Told()
    token = current_request.set(record)
    yield told
    current_request.reset(token)


@pytest.fixture
def hold() -> Iterator[Hold]:
    hold = Hold()
    yield hold
    hold.release()


def init() -> Callable[..., None]:
    function: Callable[..., None] = vars(Client)["__init__"]
    return function


# -- while it is watched -------------------------------------------------------------------------------


def test_a_request_that_builds_is_told_of(told: Told, hold: Hold) -> None:
    client = Client()
    ((kind, thing, part, frame),) = told.begun
    assert (kind, part) == (f"{LIBRARY}.Client", None)
    assert thing is client
    assert frame is sys._getframe()
    assert len(told.ended) == 1
    assert told.ended[0] >= 0


def test_outside_requests_nothing_is_told(hold: Hold) -> None:
    assert Client(inner=True).inner is not None


def test_in_a_request_that_nobody_watches_nothing_is_told(told: Told, hold: Hold) -> None:
    record = current_request.get()
    assert record is not None
    record.builds = None
    Client()
    assert told.begun == []


def test_what_a_constructor_builds_is_part_of_it(told: Told, hold: Hold) -> None:
    client = Client(inner=True)
    assert [thing for _, thing, *_ in told.begun] == [client]


def test_the_constructor_of_a_subclass_tells_once(told: Told, hold: Hold) -> None:
    class Own(Client):
        def __init__(self) -> None:
            super().__init__()

    Own()
    assert len(told.begun) == 1


@pytest.mark.parametrize(
    "build", [lambda: Client("pool"), lambda: Client(pool="pool")], ids=["by position", "by name"]
)
def test_the_part_that_it_is_built_upon(told: Told, hold: Hold, build: Callable[[], Client]) -> None:
    assert build().pool == "pool"
    assert [part for _, _, part, _ in told.begun] == ["pool"]


def test_what_cannot_be_built(told: Told, hold: Hold) -> None:
    with pytest.raises(LookupError, match="no such host"):
        Client(fails=True)
    assert (told.failed, told.ended) == (1, [])
    Client()
    assert len(told.ended) == 1


def test_a_mistake_of_ours_is_nobodys_business(told: Told, hold: Hold) -> None:
    told.error = LookupError("ours")
    assert Client("pool").pool == "pool"


def test_who_wants_to_know_no_more_is_told_no_more(told: Told, hold: Hold) -> None:
    told.uninterested = True
    assert Client("pool").pool == "pool"
    assert told.ended == []


def test_in_threads_of_a_request_each_tells_of_its_own(told: Told, hold: Hold) -> None:
    threads = [threading.Thread(target=copy_context().run, args=(Client,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told.begun) == len(told.ended) == 8


# -- what is seen of the classes -----------------------------------------------------------------------


def test_a_watched_class_looks_as_ever() -> None:
    signature, name, doc = inspect.signature(Client), Client.__init__.__qualname__, Client.__init__.__doc__
    annotations = inspect.get_annotations(Client.__init__)
    hold = Hold()
    assert inspect.signature(Client) == signature
    assert (Client.__init__.__qualname__, Client.__init__.__doc__) == (name, doc)
    assert inspect.get_annotations(Client.__init__) == annotations
    assert inspect.unwrap(Client.__init__) is not Client.__init__
    hold.release()


def test_instances_are_of_the_class_and_travel(library: Any) -> None:
    before = Client("before")
    hold = Hold()
    client = Client("pool")
    assert type(client) is type(before) is Client
    assert isinstance(before, library.Client)
    assert pickle.loads(pickle.dumps(client)).pool == "pool"
    hold.release()
    assert pickle.loads(pickle.dumps(client)).pool == "pool"


# -- from when to when ---------------------------------------------------------------------------------


def test_it_is_as_it_was_once_the_last_hold_is_gone() -> None:
    original = init()
    first, second = Hold(), Hold()
    assert init() is not original
    first.release()
    first.release()
    assert init() is not original
    second.release()
    assert init() is original


def test_a_hold_that_is_forgotten_is_released() -> None:
    original = init()
    hold = Hold()
    del hold
    assert init() is original


def test_looking_without_a_hold_changes_nothing() -> None:
    original = init()
    look()
    assert init() is original


def test_holds_of_many_threads() -> None:
    original = init()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                hold = Hold()
                assert init() is not original
                Client()
                hold.release()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert init() is original


def test_a_library_that_is_imported_later(library: Any, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, LIBRARY)
    hold = Hold()
    assert _constructors.modules_seen == len(sys.modules)
    monkeypatch.setitem(sys.modules, LIBRARY, library)
    assert _constructors.modules_seen != len(sys.modules)
    Client()
    assert told.begun == []
    look()
    assert _constructors.modules_seen == len(sys.modules)
    Client()
    assert len(told.begun) == 1
    hold.release()


def test_a_library_that_is_being_imported_is_looked_at_again(library: Any, told: Told) -> None:
    del library.Client
    library.__spec__ = ModuleSpec(LIBRARY, None)
    library.__spec__._initializing = True  # as CPython's import notes it
    hold = Hold()
    assert _constructors.modules_seen != len(sys.modules)
    library.Client = Client
    library.__spec__._initializing = False
    look()
    assert _constructors.modules_seen == len(sys.modules)
    Client()
    assert len(told.begun) == 1
    hold.release()


def test_it_is_noted_of_a_module_that_it_is_being_imported(tmp_path: Path) -> None:
    """How CPython notes it is private: this fails if it does so in another way."""
    module = tmp_path / "looks_at_itself.py"
    module.write_text("initializing = __spec__._initializing")
    sys.path.insert(0, str(tmp_path))
    try:
        imported: Any = importlib.import_module(module.stem)
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop(module.stem, None)
    assert imported.initializing is True
    assert imported.__spec__._initializing is False


class Unusual:
    """Stands in the place of a module, and has no contents."""

    __slots__ = ()


class Lazy(ModuleType):
    """Imports what it is asked for."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"asked for {name}")


@pytest.mark.parametrize(
    "make", [lambda name: None, lambda name: Unusual(), Lazy], ids=["none", "odd", "lazy"]
)
def test_what_is_no_module_or_no_loaded_one_is_left_alone(
    make: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, LIBRARY, make(LIBRARY))
    hold = Hold()
    assert _constructors.modules_seen == len(sys.modules)
    hold.release()


@pytest.mark.parametrize(
    "other", [None, "a name", len, int, type("Other", (), {"__init__": lambda self: None})], ids=repr
)
def test_what_is_not_the_librarys_own_class_is_left_alone(library: Any, other: object) -> None:
    before = getattr(other, "__init__", None)
    library.Client = other
    hold = Hold()
    assert getattr(other, "__init__", None) == before
    hold.release()


class Sealed(type):
    def __setattr__(cls, name: str, value: object) -> None:
        raise TypeError(f"cannot set {name!r} of an immutable type")


def test_a_class_that_cannot_be_changed_is_left_alone(library: Any, told: Told) -> None:
    """Such as one that is written in C."""
    library.Client = Sealed("Client", (), {"__init__": lambda self: None, "__module__": LIBRARY})
    hold = Hold()
    library.Client()
    assert told.begun == []
    hold.release()


# -- others who change the same classes ----------------------------------------------------------------


def wrapped_by_another(log: list[str]) -> Callable[..., None]:
    """As instrumentations do it."""
    original = init()

    @functools.wraps(original)
    def theirs(self: Client, *args: Any, **kwargs: Any) -> None:
        log.append("theirs")
        original(self, *args, **kwargs)

    Client.__init__ = theirs  # type: ignore[method-assign]
    return original


def test_another_that_wraps_it_later_stays_in_place(told: Told) -> None:
    log: list[str] = []
    hold = Hold()
    ours = wrapped_by_another(log)
    Client()
    assert (log, len(told.begun)) == (["theirs"], 1)
    hold.release()
    assert init() is not ours
    Client()
    assert log == ["theirs", "theirs"]
    again = Hold()  # finds its own below the other's
    Client()
    assert (len(log), len(told.begun)) == (3, 3)
    Client.__init__ = ours  # type: ignore[method-assign]
    Client()
    assert (len(log), len(told.begun)) == (3, 4)
    again.release()
    assert not hasattr(init(), "__wrapped__")


def test_another_that_wrapped_it_before_stays_below(told: Told) -> None:
    log: list[str] = []
    original = wrapped_by_another(log)
    theirs = init()
    hold = Hold()
    Client()
    assert (log, len(told.begun)) == (["theirs"], 1)
    # It takes its own away, and ours with it.
    Client.__init__ = original  # type: ignore[method-assign]
    look()
    Client()
    assert (log, len(told.begun)) == (["theirs"], 2)
    hold.release()
    assert init() is original
    assert init() is not theirs


def test_a_class_that_another_has_put_a_subclass_in_the_place_of(library: Any, told: Told) -> None:
    class Instrumented(Client): ...

    Instrumented.__module__ = "instrumentation"
    library.Client = Instrumented
    hold = Hold()
    Instrumented()
    library.Client = Client
    Client()
    assert len(told.begun) == 2
    hold.release()


# -- the libraries that are known ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_known_class_is_found_and_given_back(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    found = getattr(importlib.import_module(kind.module), kind.name)
    monkeypatch.setattr(_constructors, "KINDS", (kind,))
    signature, originals = inspect.signature(found), {c: vars(c).get("__init__") for c in found.__mro__}
    hold = Hold()
    (owner,) = (c for c in found.__mro__ if vars(c).get("__init__") is not originals[c])
    assert owner.__module__.partition(".")[0] == kind.module.partition(".")[0]
    assert _constructors.modules_seen == len(sys.modules)
    assert inspect.signature(found) == signature
    if kind.part:
        assert kind.part in signature.parameters
    hold.release()
    assert {c: vars(c).get("__init__") for c in found.__mro__} == originals
