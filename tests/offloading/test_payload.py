"""What is packed is what is unpacked; what cannot be is said by its name."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import socket
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from pickle import PickleBuffer
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncguard.offloading import _nameless
from asyncguard.offloading._payload import (
    MOST_BUFFERS,
    Body,
    Packed,
    PackError,
    TooBig,
    UnpackError,
    describe,
    explain,
    pack,
)

KIBI = 1 << 10
MEBI = 1 << 20


def named(*values: object) -> list[tuple[str, object]]:
    return [(f"argument {number}", value) for number, value in enumerate(values)]


def inline(packed: Packed) -> Body:
    return Body(b"".join(packed.pieces()), packed.pickled, tuple(buffer.nbytes for buffer in packed.buffers))


def in_file(packed: Packed) -> Body:
    fd = _nameless.create()
    packed.write_to(fd)
    body = Body(b"", packed.pickled, tuple(buffer.nbytes for buffer in packed.buffers), fd)
    assert body.file_size() == body.size == packed.size
    return body


Carry = Callable[[Packed], Body]
both_ways = pytest.mark.parametrize("carry", [inline, in_file])


def brought(carry: Carry, *values: object) -> list[Any]:
    return carry(pack(named(*values))).unpack([name for name, _ in named(*values)])


@pytest.fixture(autouse=True)
def no_descriptor_is_lost() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


class Buffered:
    """Something with a buffer, as an array of some other library."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Buffered, (PickleBuffer(self.data),)


class Raising:
    """Something that cannot be pickled, or not rebuilt."""

    def __init__(self, packing: BaseException | None = None, unpacking: BaseException | None = None) -> None:
        self.packing = packing
        self.unpacking = unpacking

    def __reduce__(self) -> Any:
        if self.packing is not None:
            raise self.packing
        return fail, (type(self.unpacking), str(self.unpacking))


def fail(kind: type[BaseException], text: str) -> None:
    raise kind(text)


# -- there and back ----------------------------------------------------------------------------------

things = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(things, max_size=5))
def test_values_come_back(values: list[object]) -> None:
    for carry in (inline, in_file):
        assert brought(carry, *values) == values


@both_ways
@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 3 * MEBI + 5])
def test_large_things_come_back(carry: Carry, size: int) -> None:
    values = [bytes(size), bytearray(size), "x" * size, "\xe9\u20ac\ud800" * (size // 3), np.zeros(size)]
    got = brought(carry, *values)
    assert got[:-1] == values[:-1]
    assert [type(value) for value in got] == [type(value) for value in values]
    assert got[-1].shape == (size,)


@both_ways
def test_what_is_the_same_object_stays_so(carry: Carry) -> None:
    shared, array = ["shared"], np.zeros(50_000)
    (one, (two, three)), four, five = brought(carry, [shared, (shared, array)], {"key": array}, shared)
    assert one is two is five
    assert three is four["key"]


@both_ways
def test_a_cycle_comes_back(carry: Carry) -> None:
    ring: list[object] = []
    ring.append(ring)
    (got,) = brought(carry, ring)
    assert got[0] is got


@both_ways
@pytest.mark.parametrize("size", [100, 40 * KIBI, MEBI])
def test_buffers_keep_whether_they_can_be_written_to(carry: Carry, size: int) -> None:
    free, fixed = brought(carry, Buffered(bytearray(b"a" * size)), Buffered(b"b" * size))
    assert (bytes(free.data), bytes(fixed.data)) == (b"a" * size, b"b" * size)
    memoryview(free.data)[:3] = b"new"
    assert memoryview(fixed.data).readonly


@both_ways
def test_many_buffers_of_any_size(carry: Carry) -> None:
    arrays = [np.arange(size, dtype=np.int16) for size in range(777, 60_000, 777)]
    (got,) = brought(carry, arrays)
    assert all(np.array_equal(*pair) for pair in zip(arrays, got, strict=True))
    for array in got:
        array += 1
        assert array.ctypes.data % 2 == 0
    assert arrays[-1][0] == 0


@both_ways
def test_what_is_not_contiguous_comes_back(carry: Carry) -> None:
    grid = np.arange(90_000).reshape(300, 300)
    transposed, stepped, ordered = brought(carry, grid.T, grid[::2, ::3], np.asfortranarray(grid))
    assert np.array_equal(transposed, grid.T)
    assert np.array_equal(stepped, grid[::2, ::3])
    assert ordered.flags.f_contiguous


def test_there_are_only_so_many_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncguard.offloading._payload.MOST_BUFFERS", 3)
    packed = pack(named([np.full(40 * KIBI, number, np.uint8) for number in range(5)]))
    assert len(packed.buffers) == 3
    (got,) = in_file(packed).unpack(["argument 0"])
    assert [int(array[-1]) for array in got] == [0, 1, 2, 3, 4]  # type: ignore[attr-defined]
    assert MOST_BUFFERS == 65_536


def test_nothing_large_is_copied() -> None:
    data, array = bytes(MEBI), np.zeros(MEBI, np.uint8)
    packed = pack(named([data, array]))
    assert any(chunk is data for chunk in packed.chunks)
    assert np.shares_memory(np.asarray(packed.buffers[0]), array)
    assert packed.size == sum(map(len, packed.pieces()))


def test_what_is_packed_does_not_outlive_it() -> None:
    array = np.zeros(MEBI)
    gone = weakref.ref(array)
    packed = pack(named(array))
    del array
    assert gone() is not None
    del packed
    assert gone() is None


def test_more_pieces_than_the_system_takes_at_once() -> None:
    large = [bytes([number % 256]) * 65_536 for number in range(600)]  # a header and a body for each
    assert brought(in_file, large) == [large]


def test_a_file_is_written_in_as_many_turns_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.writev

    def write_some(fd: int, pieces: list[Any]) -> int:
        return write(fd, [memoryview(pieces[0])[:30_011]])

    monkeypatch.setattr(os, "writev", write_some)
    values: list[Any] = ["x" * 100_000, np.arange(50_000), np.arange(9_999)]
    assert [np.array_equal(*pair) for pair in zip(brought(in_file, values)[0], values, strict=True)] == [
        True
    ] * 3


def test_a_file_is_read_in_as_many_turns_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    read, read_into = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, size, at: read(fd, min(size, 30_011), at))
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: read_into(fd, [into[0][:30_011]], at))
    values = ["x" * 100_000, bytes(200_000), [str(number) for number in range(50_000)]]
    assert brought(in_file, *values) == values


def test_other_threads_run_while_a_large_graph_is_packed_and_unpacked() -> None:
    """The pickler calls Python for every frame; so does the unpickler."""
    calls = {"write": 0, "read": 0}

    def count(frame: types.FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name in calls:
            calls[frame.f_code.co_name] += 1

    def work() -> None:
        sys.setprofile(count)
        graph = [str(number) for number in range(100_000)]
        assert in_file(pack(named(graph))).unpack(["graph"]) == [graph]

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert min(calls.values()) >= 10


# -- the mapping -------------------------------------------------------------------------------------


def test_what_is_written_to_one_copy_is_in_no_other() -> None:
    packed = pack(named(np.zeros(MEBI, np.uint8)))
    fd = _nameless.create()
    packed.write_to(fd)
    sizes = (MEBI,)
    (one,) = Body(b"", packed.pickled, sizes, os.dup(fd)).unpack(["one"])
    one[:] = 1  # type: ignore[index]
    (other,) = Body(b"", packed.pickled, sizes, fd).unpack(["other"])
    assert not other.any()  # type: ignore[attr-defined]


def test_results_that_are_kept_do_not_use_up_the_descriptors() -> None:
    before = len(os.listdir("/proc/self/fd"))
    kept = [brought(in_file, np.full(40 * KIBI, number % 256, np.uint8))[0] for number in range(300)]
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    assert [int(array[0]) for array in kept] == [number % 256 for number in range(300)]
    for array in kept:
        array[:] = 0


def test_a_mapping_goes_with_the_last_array() -> None:
    packed = pack(named([np.zeros(MEBI, np.uint8), np.zeros(MEBI, np.uint8)]))
    (arrays,) = in_file(packed).unpack(["arrays"])
    last = arrays.pop()  # type: ignore[attr-defined]
    del arrays
    gc.collect()
    assert not last.any()
    last[:] = 7


def test_a_file_that_cannot_be_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(named("first", np.zeros(MEBI)))
    fd = _nameless.create()
    packed.write_to(fd)
    os.ftruncate(fd, packed.size - 1)
    body = Body(b"", packed.pickled, (packed.buffers[0].nbytes,), fd)
    with pytest.raises(UnpackError, match=r"^argument 0 cannot be rebuilt: ValueError: "):
        body.unpack(["argument 0", "argument 1"])


def test_a_file_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nameless, "_MOST_TRACKED", 0)
    if sys.version_info >= (3, 13):
        pytest.skip("it is mapped always")
    packed = pack(named(np.zeros(MEBI)))
    fd = _nameless.create()
    packed.write_to(fd)
    os.ftruncate(fd, packed.size - 1)
    with pytest.raises(UnpackError, match="the file is too short"):
        Body(b"", packed.pickled, (packed.buffers[0].nbytes,), fd).unpack(["array"])


# -- what cannot be packed ---------------------------------------------------------------------------

RAISED = [
    ValueError("no"),
    TypeError(),
    OSError(5, "no"),
    RecursionError("deep"),
    MemoryError(),
    StopIteration(1),
]


def nested(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


@pytest.mark.parametrize("error", RAISED, ids=repr)
def test_whatever_is_raised_belongs_to_a_name(error: Exception) -> None:
    values = named(1, [Raising(packing=error)], 3)
    with pytest.raises(PackError) as caught:
        pack(values)
    assert (caught.value.name, caught.value.error) == ("argument 1", error)
    assert str(caught.value).startswith(f"argument 1 (list) cannot be pickled: {type(error).__name__}")


def test_what_ends_a_process_is_let_through() -> None:
    for error in (KeyboardInterrupt(), SystemExit(3), GeneratorExit()):
        with pytest.raises(type(error)):
            pack(named(Raising(packing=error)))
        with pytest.raises(type(error)):
            inline(pack(named(Raising(unpacking=error)))).unpack(["argument"])


def test_what_is_nested_too_deeply() -> None:
    with pytest.raises(PackError, match=r"RecursionError.*; pass something less deeply nested instead"):
        pack(named(nested(100_000)))


def local() -> Callable[[], None]:
    def inner() -> None:
        return None

    return inner


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize(
    ("make", "kind", "instead"),
    [
        (lambda: (number for number in range(3)), "generator", "pass a list instead"),
        (lambda: {}.keys(), "dict_keys", "pass a list instead"),
        (lambda: types, "module", "pass its name instead, or import it in the function"),
        (lambda: types.MappingProxyType({}), "mappingproxy", "pass a dict instead"),
        (lambda: np.zeros(1, ">i4").data, "memoryview", "pass bytes instead"),
        (
            lambda: io.TextIOWrapper(io.BytesIO()),
            "_io.TextIOWrapper",
            "pass the path of the file or its contents",
        ),
        (lambda: lambda: None, "function", "pass something that is defined at the top of a module instead"),
        (local, "function", "pass something that is defined at the top of a module instead"),
        (lambda: [threading.Lock()], "list", "pass the plain data that is needed of it instead"),
        (lambda: Raising(packing=Mute()), f"{__name__}.Raising", "pass the plain data that is needed of it"),
    ],
)
def test_what_to_do_is_said(make: Callable[[], object], kind: str, instead: str) -> None:
    with pytest.raises(PackError) as caught:
        pack([("argument 'data'", make())])
    assert str(caught.value).startswith(f"argument 'data' ({kind}) cannot be pickled: ")
    assert instead in str(caught.value)


def test_a_socket_and_a_coroutine() -> None:
    with socket.socket() as made, pytest.raises(PackError, match="pass an address instead"):
        pack(named(made))
    sleeping = asyncio.sleep(0)
    with pytest.raises(PackError, match="await it, and pass its result instead"):
        pack(named(sleeping))
    sleeping.close()


def test_a_result_is_returned() -> None:
    with pytest.raises(PackError, match="; return a list instead"):
        pack([("result", iter(number for number in range(3)))])


def test_nothing_of_a_value_is_told() -> None:
    assert describe("secret") == "str"
    assert describe(Raising()) == f"{__name__}.Raising"
    assert describe(np.zeros(3)) == "numpy.ndarray"
    with pytest.raises(PackError) as caught:
        pack(named({"password": threading.Lock()}))
    assert "password" not in str(caught.value)


def test_a_long_message_is_cut() -> None:
    assert explain(ValueError("x" * 10_000)) == f"ValueError: {'x' * 500}..."
    assert explain(Mute()).endswith("Mute: <its message cannot be had>")


# -- too much ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        bytes(MEBI),
        bytearray(MEBI),
        "x" * MEBI,
        list(range(MEBI)),
        np.zeros(MEBI),
        [np.zeros(MEBI)],
        ["x" * MEBI],
    ],
    ids=["bytes", "bytearray", "str", "list", "array", "list of arrays", "list of str"],
)
def test_more_than_is_allowed_is_noticed_at_once(value: object) -> None:
    after = Raising(packing=AssertionError("it went on"))
    with pytest.raises(TooBig):
        pack(named("small", value, after), most=64 * KIBI)
    with pytest.raises(TooBig):
        pack(named([value, after]), most=64 * KIBI)
    assert pack(named(value), most=100 * MEBI).size > MEBI


def test_as_much_as_is_allowed() -> None:
    size = pack(named("a", "b")).size
    assert pack(named("a", "b"), most=size).size == size
    with pytest.raises(TooBig):
        pack(named("a", "b"), most=size - 1)


# -- what cannot be rebuilt --------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("error", [*RAISED, asyncio.CancelledError("no"), BaseException("no")], ids=repr)
def test_whatever_is_raised_in_rebuilding_belongs_to_a_name(carry: Carry, error: BaseException) -> None:
    body = carry(pack(named("fine", [Raising(unpacking=error)], "fine")))
    with pytest.raises(UnpackError) as caught:
        body.unpack(["one", "two", "three"])
    assert caught.value.name == "two"
    assert type(caught.value.error) is type(error)
    assert str(caught.value).startswith("two cannot be rebuilt: ")


@both_ways
def test_one_alone_that_cannot_be_rebuilt(carry: Carry) -> None:
    with pytest.raises(UnpackError, match="result cannot be rebuilt: ValueError: no"):
        carry(pack(named(Raising(unpacking=ValueError("no"))))).unpack(["result"])


@both_ways
def test_more_names_than_values(carry: Carry) -> None:
    with pytest.raises(UnpackError, match="two cannot be rebuilt: EOFError"):
        carry(pack(named(1))).unpack(["one", "two"])


def test_what_is_no_pickle_of_ours() -> None:
    for data in (b"I1\n.", b"\xff", b"", b"\x80\x05\x97."):
        with pytest.raises(UnpackError):
            Body(data, len(data), ()).unpack(["one", "two"])
        fd = _nameless.create()
        os.write(fd, data)
        with pytest.raises(UnpackError):
            Body(b"", len(data), (), fd).unpack(["one", "two"])


def test_a_body_that_is_given_up_closes_its_file() -> None:
    before = len(os.listdir("/proc/self/fd"))
    body = in_file(pack(named(1)))
    body.close()
    body.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert body.file_size() == 0
    in_file(pack(named(1)))
    assert len(os.listdir("/proc/self/fd")) == before
