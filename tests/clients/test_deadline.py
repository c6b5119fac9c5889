"""What a request has left, as the limit of a call and as a header."""

from __future__ import annotations

import math

import anyio
import pytest

from asyncguard._request import RequestRecord, current_request
from asyncguard.clients._deadline import limited, onward
from tests.clients.requests_in_flight import request_with
from tests.conftest import TurnedClock


@pytest.mark.anyio
async def test_a_block_ends_at_its_limit() -> None:
    with request_with(60), limited(0.01) as scope:
        await anyio.sleep(60)
    assert scope.cancelled_caught


@pytest.mark.anyio
async def test_a_block_outside_a_request() -> None:
    with limited(0.01) as scope:
        await anyio.sleep(60)
    assert scope.cancelled_caught


@pytest.mark.anyio
async def test_the_end_of_the_request_lifts_the_limits_of_what_runs_on() -> None:
    with request_with(60) as record:
        with limited(30), limited(60) as inner:
            assert record.at_end is not None
            assert len(record.at_end) == 2
            record.finish()
            assert math.isinf(inner.deadline)
        with limited(30):
            pass
        assert not record.at_end


@pytest.mark.anyio
async def test_an_error_passes() -> None:
    with request_with(60) as record, pytest.raises(StopAsyncIteration), limited(1):
        raise StopAsyncIteration
    assert not record.at_end


@pytest.mark.parametrize(
    ("seconds", "value"),
    [(0.4, "0.400"), (12.3456789, "12.345"), (0.0009, "0.000"), (0, "0.000"), (1e12, "999999999.000")],
)
def test_what_is_left_is_rounded_down(seconds: float, value: str, clock: TurnedClock) -> None:
    clock.now = 0.0
    with request_with(seconds, "X-Wait"):
        assert onward() == ("X-Wait", value)


def test_nothing_is_sent_onward() -> None:
    assert onward() is None
    with request_with(math.inf, "X-Wait"):
        assert onward() is None
    with request_with(1):
        assert onward() is None
    token = current_request.set(RequestRecord({"type": "http"}, 0.0))
    assert onward() is None
    current_request.reset(token)
