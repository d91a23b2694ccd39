"""The promises of ttrpc's bytes: frames however they are cut, envelopes as the published ones, nothing hostile kept."""

from __future__ import annotations

import itertools
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unisandbox.api.proto import ttrpc
from unisandbox.api.proto.google import protobuf, rpc
from unisandbox.wire.protobuf import MalformedError
from unisandbox.wire.status import Status
from unisandbox.wire.ttrpc import frames
from unisandbox.wire.ttrpc.envelope import Request, Response
from unisandbox.wire.ttrpc.frames import MAX_DATA, Frame, FrameReader

STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # also on a machine with other work
TEXT = st.text(max_size=20)
NUMBER = st.integers(0, 2**32 - 1)
FRAMES = st.lists(st.tuples(NUMBER, st.integers(0, 255), st.integers(0, 255), st.binary(max_size=300)), max_size=8)
METADATA = st.dictionaries(TEXT.map(str.lower), st.lists(TEXT, min_size=1, max_size=3).map(tuple), max_size=3)
REQUESTS = st.builds(Request, TEXT, TEXT, st.binary(max_size=50), st.integers(-(2**63), 2**63 - 1), METADATA)
RESPONSES = st.builds(
    Response,
    st.binary(max_size=50),
    st.none() | st.builds(Status, st.integers(-(2**31), 2**31 - 1).filter(bool), TEXT),
)


@STEADY
@given(FRAMES, st.lists(st.integers(0, 2000)))
def test_frames_come_out_whole_however_their_bytes_are_cut(
    sent: list[tuple[int, int, int, bytes]], cuts: list[int]
) -> None:
    data = b"".join(frames.encode(*frame) for frame in sent)
    reader = FrameReader()
    got: list[Frame] = []
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for begin, end in itertools.pairwise(places):
        got += reader.feed(data[begin:end])
    assert [(frame.stream, frame.kind, frame.flags, frame.data) for frame in got] == sent


@pytest.mark.parametrize("cut", [10, 11, 1000, MAX_DATA, MAX_DATA + 10])
def test_a_frame_that_is_too_long_is_told_at_its_header_and_thrown_away(cut: int) -> None:
    long = frames._HEADER.pack(MAX_DATA + 1, 5, frames.REQUEST, 0) + bytes(MAX_DATA + 1)
    reader = FrameReader()
    got = reader.feed(long[:cut]) + reader.feed(long[cut:] + frames.encode(7, frames.DATA, 0, b"next"))
    assert got == [Frame(5, 1, 0, None, MAX_DATA + 1), Frame(7, 3, 0, b"next", 4)]


def test_a_frame_of_the_greatest_length_is_kept() -> None:
    (frame,) = FrameReader().feed(frames.encode(1, frames.REQUEST, 0, bytes(MAX_DATA)))
    assert frame.data is not None
    assert len(frame.data) == MAX_DATA


@STEADY
@given(REQUESTS)
def test_a_request_is_that_of_the_published_message(request: Request) -> None:
    published = ttrpc.Request.parse(request.encode())
    assert published.service == request.service
    assert published.method == request.method
    assert published.payload == request.payload
    assert published.timeout_nano == request.timeout_nano
    pairs = [(key, value) for key, values in request.metadata.items() for value in values]
    assert [(pair.key, pair.value) for pair in published.metadata] == pairs
    assert Request.decode(bytes(published)) == request


@STEADY
@given(RESPONSES)
def test_a_response_is_that_of_the_published_message(response: Response) -> None:
    published = ttrpc.Response.parse(response.encode())
    assert published.payload == response.payload
    assert (published.status is None) == (response.status is None)
    if published.status is not None and response.status is not None:
        assert published.status.code == response.status.code
        assert published.status.message == response.status.message
    assert Response.decode(bytes(published)) == response


def test_a_status_of_zero_is_no_failure_and_its_details_are_passed_over() -> None:
    assert Response.decode(bytes(ttrpc.Response(status=rpc.Status(message="fine"), payload=b"x"))) == Response(b"x")
    detailed = rpc.Status(code=5, message="gone", details=[protobuf.Any(type_url="x", value=b"y")])
    assert Response.decode(bytes(ttrpc.Response(status=detailed))).status == Status(5, "gone")


def test_keys_of_metadata_are_lower_case_and_may_repeat() -> None:
    pairs = [ttrpc.KeyValue(key="A-b", value="1"), ttrpc.KeyValue(key="a-B", value="2")]
    assert Request.decode(bytes(ttrpc.Request(metadata=pairs))).metadata == {"a-b": ("1", "2")}


@STEADY
@given(REQUESTS, st.data())
def test_no_value_of_a_request_is_cut_short(request: Request, data: st.DataObject) -> None:
    whole = request.encode()
    try:
        shorter = Request.decode(whole[: data.draw(st.integers(0, len(whole)))])
    except MalformedError:
        return
    # It was cut between two fields, which nobody can tell; each that is there is whole.
    for name in ("service", "method", "payload", "timeout_nano"):
        assert getattr(shorter, name) in {getattr(request, name), getattr(Request("", ""), name)}


@STEADY
@given(st.binary(max_size=200))
def test_bytes_of_a_stranger_are_read_or_malformed(data: bytes) -> None:
    for kind in (Request, Response):
        with suppress(MalformedError):
            kind.decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x05abc",  # shorter than it says
        b"\x0a",  # no length
        b"\x80",  # a key that does not end
        b"\x08\x01",  # a number for the service
        b"\x22\x01\x00",  # bytes for the timeout
        b"\x20" + b"\xff" * 10,  # a number of 70 bits
        b"\x0a\x01\xff",  # no UTF-8
        b"\x00\x00",  # field 0
        b"\x0b",  # a group
        b"\x35\x00",  # four bytes that are one
    ],
)
def test_malformed_requests_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        Request.decode(data)
