"""Exceptions arrive as what they were, and those that cannot travel are told of."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from asyncguard.errors import OffloadQueueFull, OffloadTimeout, PayloadError, WorkerCrashed
from asyncguard.offloading import _failure
from asyncguard.offloading._failure import RemoteTraceback, seal, unseal
from asyncguard.offloading._payload import Body, Packed, pack

HERE = __name__


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The exception, as one has it that caught it."""
    try:
        if cause is not None:
            raise error from cause
        raise error
    except BaseException as caught:
        return caught


def carried(packed: Packed) -> Body:
    data = b"".join(packed.pieces())
    return Body(data, packed.pickled, tuple(buffer.nbytes for buffer in packed.buffers))


def sent(error: BaseException) -> BaseException:
    found = unseal(carried(seal(error)))
    assert isinstance(found.__cause__, RemoteTraceback)
    assert found.__suppress_context__
    assert found.__traceback__ is None
    return found


class Plain(Exception):
    pass


class Composed(Exception):
    """Hands another argument on than it takes: pickle alone makes something else of it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"failed with {code}")
        self.code = code


class Refused(Exception):
    """Pickle alone cannot rebuild it."""

    def __init__(self, method: str, *, status: int) -> None:
        super().__init__(f"{method} was refused")
        self.status = status


class Slotted(Exception):
    __slots__ = ("code", "unset")

    def __init__(self, code: int) -> None:
        super().__init__("slotted")
        self.code = code


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int
    text: str = "frozen"


class System(OSError):
    def __init__(self, path: str) -> None:
        super().__init__(2, "no such thing", path)
        self.extra = path


class Holding(Exception):
    """Has something with it that cannot be pickled."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class Reducing(Exception):
    """Says itself how it is pickled."""

    reduced: Any = None

    def __reduce__(self) -> Any:
        if isinstance(self.reduced, BaseException):
            raise self.reduced
        return self.reduced


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


class Setting(Exception):
    def __setstate__(self, state: Any) -> None:
        self.__dict__ |= {"came": sorted(state)}


class Bad(Exception):
    @property
    def __notes__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no notes")


class Group(ExceptionGroup[Exception]):
    def derive(self, members: Any) -> Group:  # type: ignore[override]
        return Group(self.message, members)


class NeedsMore(ExceptionGroup[Exception]):
    def __new__(cls, members: Any) -> NeedsMore:
        return super().__new__(cls, "made", members)

    def __init__(self, members: Any) -> None:
        self.number = len(members)


def make_reducing(reduced: Any, *args: object) -> Reducing:
    error = Reducing(*args)
    error.reduced = reduced
    return error


# -- as they were ------------------------------------------------------------------------------------

FAITHFUL: list[Callable[[], BaseException]] = [
    lambda: ValueError("no", 5),
    lambda: KeyError("missing"),
    lambda: KeyboardInterrupt(),
    lambda: StopIteration(3),
    lambda: Plain(),
    lambda: Plain("one", [2], {"three": 3}),
    lambda: Composed(3),
    lambda: Refused("PUT", status=403),
    lambda: Frozen(3),
    lambda: System("/nowhere"),
    lambda: FileNotFoundError(2, "gone", "/nowhere"),
    lambda: ImportError("no", name="module", path="/nowhere"),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    lambda: SyntaxError("bad", ("file", 1, 2, "text")),
    lambda: subprocess.CalledProcessError(3, ["true"], "out", "err"),
    lambda: json.JSONDecodeError("bad", "{", 1),
    lambda: OffloadTimeout("late", "stack"),
    lambda: OffloadQueueFull("full", 3.0),
    lambda: WorkerCrashed("dead", -9, "stack"),
    lambda: Plain("x" * 300_000),
    lambda: Plain("\ud800"),
]


@pytest.mark.parametrize("make", FAITHFUL, ids=range(len(FAITHFUL)))
def test_they_arrive_as_they_were(make: Callable[[], BaseException]) -> None:
    error = raised(make())
    found = sent(error)
    assert type(found) is type(error)
    assert (found.args, found.__dict__, str(found)) == (error.args, error.__dict__, str(error))


def test_what_is_not_in_the_arguments_arrives_too() -> None:
    found = sent(System("/nowhere"))
    assert isinstance(found, System)
    assert (found.errno, found.filename, found.extra) == (2, "/nowhere", "/nowhere")
    imported = sent(ImportError("no", name="module"))
    assert isinstance(imported, ImportError)
    assert imported.name == "module"
    slotted = sent(Slotted(7))
    assert isinstance(slotted, Slotted)
    assert (slotted.code, str(slotted), hasattr(slotted, "unset")) == (7, "slotted", False)
    assert sent(Setting("x")).__dict__ == {}
    setting = Setting("x")
    setting.mark = 1  # type: ignore[attr-defined]
    assert sent(setting).came == ["mark"]  # type: ignore[attr-defined]


def test_notes_arrive() -> None:
    error = Composed(3)
    error.add_note("first")
    error.add_note("second")
    assert sent(error).__notes__ == ["first", "second"]


def test_an_exception_that_holds_itself_and_another() -> None:
    error = Plain("outer")
    error.itself = error  # type: ignore[attr-defined]
    error.other = Composed(4)  # type: ignore[attr-defined]
    found: Any = sent(error)
    assert found.itself is found
    assert (type(found.other), str(found.other)) == (Composed, "failed with 4")


def test_sealing_leaves_it_as_it_was() -> None:
    error = raised(Plain("x"), ValueError("why"))
    before = (error.__traceback__, error.__cause__, error.args, dict(error.__dict__))
    seal(error)
    assert (error.__traceback__, error.__cause__, error.args, dict(error.__dict__)) == before


def test_sealing_keeps_nothing() -> None:
    class Kept:
        pass

    def work() -> None:
        kept = Kept()
        raise Plain(id(kept))

    try:
        work()
    except Plain as caught:
        error = caught
    before = sys.getrefcount(error)
    seal(error)
    assert sys.getrefcount(error) == before


# -- groups ------------------------------------------------------------------------------------------


def test_a_group_arrives_with_its_members() -> None:
    error = ExceptionGroup(
        "some", [ValueError(1), ExceptionGroup("inner", [Composed(2), Refused("GET", status=1)])]
    )
    error.add_note("noted")
    found = sent(raised(error))
    assert isinstance(found, ExceptionGroup)
    assert (found.message, found.__notes__) == ("some", ["noted"])
    first, inner = found.exceptions
    assert first.args == (1,)
    assert isinstance(inner, ExceptionGroup)
    assert [str(member) for member in inner.exceptions] == ["failed with 2", "GET was refused"]


def test_a_group_of_ones_own_arrives() -> None:
    own = sent(Group("own", [KeyError("x")]))
    assert isinstance(own, Group)
    found = sent(NeedsMore([KeyError("x"), KeyError("y")]))
    assert isinstance(found, NeedsMore)
    assert (found.number, found.message, len(found.exceptions)) == (2, "made", 2)
    assert isinstance(sent(BaseExceptionGroup("b", [KeyboardInterrupt()])), BaseExceptionGroup)


def test_only_the_members_that_cannot_travel_are_replaced() -> None:
    error = Group(
        "some", [ValueError(1), Holding("held"), ExceptionGroup("inner", [Holding("deep"), KeyError(2)])]
    )
    error.add_note("noted")
    found = sent(error)
    assert type(found) is Group
    assert found.__notes__ == ["noted"]
    first, second, inner = found.exceptions
    assert first.args == (1,)
    assert isinstance(second, PayloadError)
    assert f"the function raised {HERE}.Holding: held" in str(second)
    assert isinstance(inner, ExceptionGroup)
    assert [type(member) for member in inner.exceptions] == [PayloadError, KeyError]


def test_a_group_that_cannot_be_mended() -> None:
    class Local(Group):
        def derive(self, members: Any) -> Any:
            raise RuntimeError("no")

    found = sent(Local("some", [ValueError(1)]))
    assert type(found) is PayloadError
    assert "Local: some (1 sub-exception)" in str(found)
    assert isinstance(sent(ExceptionGroup("outer", [Local("some", [ValueError(1)])])), ExceptionGroup)


def test_groups_within_groups_without_end() -> None:
    error: Exception = ValueError("innermost")
    for _ in range(2000):
        error = ExceptionGroup("layer", [error])
    assert isinstance(sent(error), PayloadError | ExceptionGroup)  # how deep is too deep differs


# -- those that cannot travel ------------------------------------------------------------------------


def local_class() -> BaseException:
    class Local(Exception):
        pass

    return Local("here")


HOPELESS: list[tuple[Callable[[], BaseException], str, str]] = [
    (lambda: Holding("held"), "Holding: held", "TypeError: cannot pickle '_thread.lock' object"),
    (lambda: Plain(threading.Lock()), "Plain: <unlocked _thread.lock", "cannot pickle '_thread.lock' object"),
    (local_class, "local_class.<locals>.Local: here", "Local"),
    (lambda: make_reducing(ValueError("no")), "Reducing", "ValueError: no"),
    (lambda: make_reducing(Mute()), "Reducing", "Mute: <its message cannot be had>"),
    (lambda: make_reducing(RecursionError("deep"), "x"), "Reducing: x", "RecursionError: deep"),
    (lambda: make_reducing(BaseException("panic")), "Reducing", "BaseException: panic"),
    (lambda: make_reducing((int, ("x",))), "Reducing", "ValueError: invalid literal"),
    (lambda: make_reducing((int, ("5",))), "Reducing", "its pickle makes a int of it"),
    (lambda: make_reducing("nonsense"), "Reducing", "nonsense"),
]


@pytest.mark.parametrize(("make", "says", "because"), HOPELESS, ids=range(len(HOPELESS)))
def test_something_stands_for_those_that_cannot_travel(
    make: Callable[[], BaseException], says: str, because: str
) -> None:
    found = sent(raised(make()))
    assert type(found) is PayloadError
    first, second = str(found).split("\n")
    assert first.startswith("the function raised ")
    assert says in first
    assert second.startswith("It cannot be sent from one process to another: ")
    assert because in second
    assert "in raised" in str(found.__cause__)


def test_one_without_words_arrives_all_the_same() -> None:
    found = sent(raised(Mute("said")))
    assert (type(found), found.args) == (Mute, ("said",))
    assert "Mute: <exception str() failed>" in str(found.__cause__)


def test_one_without_words_that_cannot_travel() -> None:
    error = Mute(threading.Lock())
    assert "Mute: <its message cannot be had>" in str(sent(error))


def test_one_whose_traceback_cannot_be_had() -> None:
    found = sent(raised(Bad("bad")))
    assert "Bad: bad" in str(found.__cause__)
    assert type(found) is Bad


def test_one_that_cannot_be_rebuilt_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """It could be in the worker."""
    body = carried(seal(raised(Plain("x"))))
    monkeypatch.delattr(sys.modules[HERE], "Plain")
    found = unseal(body)
    assert type(found) is PayloadError
    assert f"the function raised {HERE}.Plain: x" in str(found)
    assert "AttributeError" in str(found)
    assert "in raised" in str(found.__cause__)


def test_a_body_that_is_none() -> None:
    found = unseal(carried(pack([("only", 1)])))
    assert type(found) is PayloadError
    assert "its name cannot be rebuilt: EOFError" in str(found)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_what_ends_a_process_is_let_through(error: BaseException) -> None:
    with pytest.raises(type(error)):
        seal(make_reducing(error))


# -- the text ----------------------------------------------------------------------------------------


def test_the_traceback_and_its_causes_are_told() -> None:
    error = raised(Plain("effect"), raised(ValueError("the cause")))
    error.add_note("a note")
    text = str(sent(error).__cause__)
    assert text.index("ValueError: the cause") < text.index("direct cause") < text.index("Plain: effect")
    assert text.index("Plain: effect") < text.index("a note")
    assert text.count("in raised") == 2


def test_it_stands_between_two_rules() -> None:
    lines = str(RemoteTraceback("one\ntwo\n")).split("\n")
    assert lines[2:4] == ["one", "two"]
    assert "in the worker process" in lines[1]
    assert (len(lines[1]), lines[-1]) == (80, "-" * 80)


def test_it_is_printed_before_what_arrived() -> None:
    found = sent(raised(Plain("x")))
    text = "".join(traceback.format_exception(found))
    assert text.index("in the worker process") < text.index("in raised") < text.rindex("Plain: x")
    assert "The above exception was the direct cause of the following exception" in text


def test_the_lines_of_the_worker_are_left_out() -> None:
    """And those of the import that it asked for."""
    spaces: list[dict[str, Any]] = [
        {"__name__": name} for name in ("asyncguard.offloading._worker", "importlib._bootstrap", "shop")
    ]
    exec(compile("def call(f): f()", "worker.py", "exec"), spaces[0])
    exec(compile("def call(f): f()", "bootstrap.py", "exec"), spaces[1])
    exec(compile("def call(f): f()", "shop.py", "exec"), spaces[2])
    worker, bootstrap, shop = (space["call"] for space in spaces)

    def fail() -> None:
        raise Plain("x")

    with pytest.raises(Plain) as caught:
        worker(lambda: bootstrap(lambda: shop(lambda: worker(fail))))
    begin = caught.value.__traceback__
    assert begin is not None
    text = _failure._formatted(caught.value.with_traceback(begin.tb_next))
    assert text.count("worker.py") == 1  # which the function itself called
    assert "shop.py" in text
    with pytest.raises(TypeError) as refused:
        worker(5)
    begin = refused.value.__traceback__
    assert begin is not None
    assert _failure._formatted(refused.value.with_traceback(begin.tb_next)).startswith("TypeError: ")


def test_a_traceback_without_end_is_told_in_short() -> None:
    def deeper(depth: int) -> None:
        deeper(depth + 1)

    try:
        deeper(0)
    except RecursionError as error:
        found = sent(error)
    assert type(found) is RecursionError
    assert "more times" in str(found.__cause__)
    assert len(str(found.__cause__)) < 10_000


def test_what_came_from_another_worker_goes_on() -> None:
    found = sent(raised(sent(raised(Plain("x")))))
    assert str(found.__cause__).count("in the worker process") == 2
