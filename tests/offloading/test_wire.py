"""Frames come out of the stream as they went in, however it is split, and no descriptor is lost."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncguard.offloading import _nameless
from asyncguard.offloading._payload import MOST_BUFFERS, Packed, pack
from asyncguard.offloading._wire import INLINE, Decoder, Frame, Kind, WireError, encode

HEADER = struct.Struct("<BBHIQQ")
KIBI = 1 << 10


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_descriptor_is_lost() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def packed(*values: object) -> Packed:
    return pack([(f"value {number}", value) for number, value in enumerate(values)])


def encoded(kind: Kind, call: int, *values: object) -> tuple[bytes, list[int]]:
    pieces, fds = encode(kind, call, packed(*values))
    return b"".join(pieces), fds


def values_of(frame: Frame, count: int = 1) -> list[Any]:
    return frame.body.unpack([str(number) for number in range(count)])


def buffer(size: int) -> np.ndarray[Any, Any]:
    return np.arange(size, dtype=np.uint8)


# -- one frame ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", Kind)
def test_a_frame_comes_out_as_it_went_in(kind: Kind) -> None:
    data, fds = encoded(kind, 2**64 - 1, "a", [1, 2.5, None])
    assert fds == []
    (frame,) = Decoder().feed(data, fds)
    assert frame[:2] == (kind, 2**64 - 1)
    assert type(frame.kind) is Kind
    assert values_of(frame, 2) == ["a", [1, 2.5, None]]


def test_a_small_frame_is_one_piece() -> None:
    pieces, _ = encode(Kind.CALL, 1, packed(1, "two", buffer(40 * KIBI)))
    assert len(pieces) == 1


def test_a_frame_needs_no_values() -> None:
    data, fds = encoded(Kind.READY, 0)
    (frame,) = Decoder().feed(data, fds)
    assert (frame.body.size, values_of(frame, 0)) == (0, [])


def test_a_body_is_inline_up_to_the_limit() -> None:
    """All but the pickle's own bytes are those of the value."""
    small = packed(b"")
    for extra, in_file in [(0, 0), (1, 1)]:
        value = bytes(INLINE - packed(bytes(INLINE - 1 * KIBI)).size + INLINE - 1 * KIBI + extra)
        made = packed(value)
        assert made.size == INLINE + extra
        pieces, fds = encode(Kind.RESULT, 3, made)
        assert len(fds) == in_file
        (frame,) = Decoder().feed(b"".join(pieces), fds)
        assert frame.body.size == INLINE + extra
        assert values_of(frame) == [value]
    assert small.size < 40


@pytest.mark.parametrize("size", [40 * KIBI, 100 * KIBI, 1000 * KIBI])
def test_buffers_come_along_and_can_be_written_to(size: int) -> None:
    one, other = buffer(size), buffer(size // 8 + 7)
    data, fds = encoded(Kind.RESULT, 3, [one, other, one])
    (frame,) = Decoder().feed(data, fds)
    ((got_one, got_other, again),) = values_of(frame)
    assert (got_one == one).all()
    assert (got_other == other).all()
    assert got_one is again
    got_one[0] = got_other[-1] = 9
    assert (one[0], got_one[0]) == (0, 9)


def test_a_descriptor_goes_with_a_large_body_only() -> None:
    pieces, fds = encode(Kind.RESULT, 1, packed(bytes(INLINE)))
    (fd,) = fds
    assert sum(map(len, pieces)) == HEADER.size
    assert os.get_inheritable(fd) is False
    os.close(fd)


def test_a_file_that_cannot_be_written_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, pieces: Sequence[object]) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(OSError, match="No space"):
        encode(Kind.RESULT, 1, packed(bytes(INLINE)))


# -- the stream --------------------------------------------------------------------------------------

VALUES: list[object] = [
    None,
    ("a", 1),
    bytes(3 * KIBI),
    bytes(INLINE + 1),
    bytearray(40 * KIBI),
    buffer(50 * KIBI),
    [buffer(70 * KIBI), buffer(70 * KIBI), 5],
]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else one == other


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.lists(st.sampled_from(range(len(VALUES))), max_size=6),
    cuts=st.lists(st.integers(min_value=0, max_value=200 * KIBI), max_size=12),
    near=st.lists(st.tuples(st.integers(0, 5), st.integers(-2, 40)), max_size=12),
)
def test_any_split_will_do(chosen: list[int], cuts: list[int], near: list[tuple[int, int]]) -> None:
    before = open_descriptors()
    stream = b""
    begins: dict[int, int] = {}
    starts = []
    for call, number in enumerate(chosen):
        data, fds = encoded(Kind.RESULT, call, VALUES[number])
        starts.append(len(stream))
        begins |= dict.fromkeys([len(stream)] if fds else [], fds[0] if fds else -1)
        stream += data
    cuts += [starts[frame] + by for frame, by in near if frame < len(starts)]
    edges = sorted({0, len(stream), *(cut for cut in cuts if 0 < cut < len(stream))})
    decoder = Decoder()
    frames: list[Frame] = []
    for begin, end in pairwise(edges):
        frames += decoder.feed(stream[begin:end], [fd for at, fd in begins.items() if begin <= at < end])
    assert [frame.call for frame in frames] == list(range(len(chosen)))
    for frame, number in zip(frames, chosen, strict=True):
        assert same(values_of(frame)[0], VALUES[number])
    decoder.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("value", [("small", 1), bytes(INLINE + 1), [buffer(70 * KIBI), buffer(70 * KIBI)]])
def test_the_decoder_is_closed_at_every_split(value: object) -> None:
    header = encoded(Kind.RESULT, 5, value)
    for fd in header[1]:
        os.close(fd)
    for split in range(1, len(header[0])):
        data, fds = encoded(Kind.RESULT, 5, value)
        decoder = Decoder()
        assert decoder.feed(data[:split], fds) == []
        decoder.close()
        with pytest.raises(WireError, match="closed"):
            decoder.feed(data[split:])


def test_byte_by_byte() -> None:
    data, fds = encoded(Kind.LOG, 5, "record")
    more, more_fds = encoded(Kind.RESULT, 5, bytes(INLINE + 1))
    decoder = Decoder()
    frames = []
    for at, byte in enumerate(data + more):
        frames += decoder.feed(bytes([byte]), more_fds if at == len(data) else fds)
    assert [frame.kind for frame in frames] == [Kind.LOG, Kind.RESULT]


def test_a_frame_that_nobody_unpacks_lets_its_file_go() -> None:
    before = open_descriptors()
    data, fds = encoded(Kind.RESULT, 5, bytes(INLINE + 1))
    (frame,) = Decoder().feed(data, fds)
    assert open_descriptors() == before + 1
    frame.body.close()
    frame.body.close()
    assert open_descriptors() == before
    data, fds = encoded(Kind.RESULT, 5, bytes(INLINE + 1))
    Decoder().feed(data, fds)
    assert open_descriptors() == before


def test_descriptors_go_through_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(30)
        theirs.settimeout(30)
        decoder = Decoder()
        frames: list[Frame] = []
        for call in range(20):
            pieces, fds = encode(Kind.CALL, call, packed(call, bytes(INLINE * (call % 2)), "tail"))
            socket.send_fds(ours, pieces, fds)
            for fd in fds:
                os.close(fd)
        while len(frames) < 20:
            data, received, flags, _ = socket.recv_fds(theirs, 1000, 8)
            assert not flags & socket.MSG_CTRUNC
            frames += decoder.feed(data, received)
        for call, frame in enumerate(frames):
            assert values_of(frame, 3) == [call, bytes(INLINE * (call % 2)), "tail"]


# -- what makes no sense -----------------------------------------------------------------------------


def header(
    magic: int = 0xA6, kind: int = 2, place: int = 0, count: int = 0, call: int = 7, pickled: int = 10
) -> bytes:
    return HEADER.pack(magic, kind, place, count, call, pickled)


CORRUPT = {
    "magic": header(magic=0x41),
    "no kind": header(kind=0),
    "another kind": header(kind=8),
    "another flag": header(place=4),
    "too many buffers": header(count=MOST_BUFFERS + 1),
    "too large": header(pickled=INLINE + 1),
    "far too large": header(pickled=2**64 - 1),
    "buffers too large": header(count=2) + struct.pack("<2Q", 2**64 - 1, 2**64 - 1),
    "no descriptor": header(place=1, pickled=INLINE + 1),
    "printed": b"print() of a child that found the descriptor\n",
}


@pytest.mark.parametrize("data", CORRUPT.values(), ids=CORRUPT.keys())
def test_what_is_corrupt_is_refused_for_good(data: bytes) -> None:
    before = open_descriptors()
    good, fds = encoded(Kind.RESULT, 1, bytes(INLINE + 1))
    decoder = Decoder()
    with pytest.raises(WireError):
        decoder.feed(good + data, fds)
    assert open_descriptors() == before
    good, fds = encoded(Kind.RESULT, 1, bytes(INLINE + 1))
    with pytest.raises(WireError):
        decoder.feed(good, fds)
    assert open_descriptors() == before


@pytest.mark.parametrize("size", [0, INLINE, INLINE + 2, 10 * INLINE])
def test_a_file_of_another_size_is_not_the_one(size: int) -> None:
    fd = _nameless.create()
    os.ftruncate(fd, size)
    with pytest.raises(WireError, match=f"a body of {INLINE + 1} bytes came in a file of {size}"):
        Decoder().feed(header(place=1, pickled=INLINE + 1), [fd])


def test_a_descriptor_that_belongs_to_no_frame_is_refused() -> None:
    data, _ = encoded(Kind.RESULT, 1, "small")
    with pytest.raises(WireError, match="belongs to no frame"):
        Decoder().feed(data, [os.open(os.devnull, os.O_RDONLY)])


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=100),
    with_fd=st.booleans(),
    at=st.integers(0, 24),
    by=st.binary(min_size=1, max_size=4),
)
def test_noise_does_no_harm(data: bytes, with_fd: bool, at: int, by: bytes) -> None:
    before = open_descriptors()
    good, fds = encoded(Kind.RESULT, 1, bytes(INLINE + 1) if with_fd else "small")
    spoilt = good[:at] + by + good[at + len(by) :] + data
    decoder = Decoder()
    try:
        frames = decoder.feed(spoilt, fds)
    except WireError:
        frames = []
    decoder.close()
    for frame in frames:
        frame.body.close()
    assert open_descriptors() == before


def test_arrays_of_the_standard_library() -> None:
    value = array.array("d", range(20_000))
    data, fds = encoded(Kind.RESULT, 1, value)
    (frame,) = Decoder().feed(data, fds)
    assert values_of(frame) == [value]
