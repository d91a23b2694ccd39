"""The promises of both sides of a ttrpc connection, without sockets."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unisandbox.api.errors import GrpcStatus
from unisandbox.wire.status import Status, StatusError
from unisandbox.wire.ttrpc import LIMITS, UNARY, Limits, Request, Shape, frames
from unisandbox.wire.ttrpc.client import Call, ClientProtocol
from unisandbox.wire.ttrpc.envelope import Response
from unisandbox.wire.ttrpc.frames import DATA, MAX_DATA, NO_DATA, REMOTE_CLOSED, REMOTE_OPEN, REQUEST, RESPONSE
from unisandbox.wire.ttrpc.server import Arrived, Broken, Called, Event, ServerProtocol

BOTH = Shape(client_streams=True, server_streams=True)
SHAPES = {"one": UNARY, "both": BOTH, "in": Shape(client_streams=True), "out": Shape(server_streams=True)}


def a_server(limits: Limits = LIMITS) -> ServerProtocol:
    return ServerProtocol(lambda service, method: SHAPES.get(method) if service == "s" else None, limits)


def request(stream: int, method: str, payload: bytes = b"", *, flags: int = 0) -> bytes:
    return frames.encode(stream, REQUEST, flags, Request("s", method, payload).encode())


def said(side: ServerProtocol | ClientProtocol) -> list[tuple[int, int, int, bytes]]:
    """What a side has to send: stream, kind, flags, data."""
    got = frames.FrameReader().feed(side.outgoing())
    return [(frame.stream, frame.kind, frame.flags, frame.data or b"") for frame in got]


def refusal(side: ServerProtocol) -> tuple[int, int]:
    """The stream and the code of the only thing that a server has to say, which is an error."""
    ((stream, kind, flags, data),) = said(side)
    assert (kind, flags) == (RESPONSE, 0)
    status = Response.decode(data).status
    assert status is not None
    return stream, status.code


def test_a_unary_call_is_one_request_and_one_response() -> None:
    server = a_server()
    (event,) = server.receive(request(1, "one", b"question"))
    assert isinstance(event, Called)
    assert (event.stream, event.shape, event.request.payload) == (1, UNARY, b"question")
    server.reply(1, b"answer")
    assert said(server) == [(1, RESPONSE, 0, Response(b"answer").encode())]


def test_answers_may_come_in_any_order_and_a_second_one_is_not_sent() -> None:
    server = a_server()
    server.receive(request(1, "one") + request(3, "one"))
    server.reply(3, b"3")
    server.reply(1, b"1")
    server.reply(1, b"again")
    server.fail(3, Status(5, "again"))
    assert [stream for stream, *_ in said(server)] == [3, 1]


def test_a_stream_has_messages_empty_ones_too_until_its_caller_closes_it() -> None:
    server = a_server()
    (event,) = server.receive(request(1, "both", flags=REMOTE_OPEN))
    assert isinstance(event, Called)
    assert not event.inbox
    data = frames.encode(1, DATA, 0, b"a") + frames.encode(1, DATA, 0, b"") + frames.encode(1, DATA, NO_DATA, b"")
    assert server.receive(data) == [Arrived(1)] * 3
    assert [event.inbox.take(), event.inbox.take()] == [b"a", b""]
    assert not event.inbox
    assert not event.inbox.closed
    server.receive(frames.encode(1, DATA, REMOTE_CLOSED, b"last"))
    assert event.inbox.take() == b"last"
    assert event.inbox.closed
    server.send(1, b"")
    server.send(1, b"x")
    server.finish(1)
    assert said(server) == [(1, DATA, 0, b""), (1, DATA, 0, b"x"), (1, DATA, REMOTE_CLOSED | NO_DATA, b"")]


@pytest.mark.parametrize(("payload", "method", "messages"), [(b"", "out", [b""]), (b"p", "out", [b"p"])])
def test_the_message_of_a_caller_that_does_not_stream_comes_with_its_request(
    payload: bytes, method: str, messages: list[bytes]
) -> None:
    (event,) = a_server().receive(request(1, method, payload, flags=REMOTE_CLOSED))
    assert isinstance(event, Called)
    assert [event.inbox.take() for _ in messages] == messages
    assert event.inbox.closed


def test_a_caller_that_streams_may_send_its_first_message_with_its_request() -> None:
    (event,) = a_server().receive(request(1, "in", b"first", flags=REMOTE_OPEN))
    assert isinstance(event, Called)
    assert event.inbox.take() == b"first"
    assert not event.inbox.closed


@pytest.mark.parametrize(
    ("sent", "stream", "code"),
    [
        (request(2, "one"), 2, GrpcStatus.INVALID_ARGUMENT),
        (request(0, "one"), 0, GrpcStatus.INVALID_ARGUMENT),
        (request(1, "none"), 1, GrpcStatus.UNIMPLEMENTED),
        (frames.encode(1, REQUEST, 0, Request("other", "one").encode()), 1, GrpcStatus.UNIMPLEMENTED),
        (frames.encode(1, REQUEST, 0, b"\x0a\x05abc"), 1, GrpcStatus.INVALID_ARGUMENT),
        (frames.encode(1, DATA, 0, b"x"), 1, GrpcStatus.INVALID_ARGUMENT),
        (frames._HEADER.pack(MAX_DATA + 1, 1, REQUEST, 0), 1, GrpcStatus.RESOURCE_EXHAUSTED),
        (frames._HEADER.pack(2**32 - 1, 1, REQUEST, 0), 1, GrpcStatus.RESOURCE_EXHAUSTED),
        (frames.encode(1, REQUEST, 0, Request("s" * 4_000_000, "one").encode()), 1, GrpcStatus.UNIMPLEMENTED),
    ],
)
def test_a_server_says_what_is_wrong_and_calls_nobody(sent: bytes, stream: int, code: int) -> None:
    server = a_server()
    assert server.receive(sent) == []
    assert refusal(server) == (stream, code)


def test_stream_numbers_must_rise_and_their_calls_go_on_when_they_are_used_again() -> None:
    server = a_server()
    server.receive(request(5, "one"))
    for stream in (5, 3):
        assert server.receive(request(stream, "one")) == []
        assert refusal(server) == (stream, GrpcStatus.INVALID_ARGUMENT)
    server.reply(5, b"")
    assert len(said(server)) == 1


def test_a_server_lives_on_after_a_request_that_is_too_long() -> None:
    server = a_server()
    long = frames._HEADER.pack(MAX_DATA + 5, 1, REQUEST, 0) + bytes(MAX_DATA + 5)
    (event,) = server.receive(long + request(3, "one"))
    assert isinstance(event, Called)
    assert event.stream == 3


def test_a_reply_that_is_too_long_is_an_error_and_the_connection_lives_on() -> None:
    server = a_server()
    server.receive(request(1, "one") + request(3, "out", flags=REMOTE_CLOSED))
    server.reply(1, bytes(MAX_DATA))
    assert refusal(server) == (1, GrpcStatus.RESOURCE_EXHAUSTED)
    with pytest.raises(StatusError):
        server.send(3, bytes(MAX_DATA + 1))
    server.send(3, b"short")
    assert said(server) == [(3, DATA, 0, b"short")]


@pytest.mark.parametrize(
    ("method", "sent", "code"),
    [
        ("one", frames.encode(1, DATA, 0, b"x"), GrpcStatus.INVALID_ARGUMENT),
        ("out", frames.encode(1, DATA, 0, b"x"), GrpcStatus.INVALID_ARGUMENT),
        ("both", frames.encode(1, DATA, REMOTE_CLOSED, b"") + frames.encode(1, DATA, 0, b""), 3),
        ("both", frames._HEADER.pack(MAX_DATA + 1, 1, DATA, 0), GrpcStatus.RESOURCE_EXHAUSTED),
    ],
)
def test_a_caller_that_breaks_the_protocol_loses_that_call_alone(method: str, sent: bytes, code: int) -> None:
    server = a_server()
    server.receive(request(1, method, flags=REMOTE_OPEN) + request(3, "both", flags=REMOTE_OPEN))
    assert server.receive(sent)[-1] == Broken(1)
    assert refusal(server) == (1, code)
    server.reply(1, b"late")
    server.send(1, b"late")
    server.finish(1)
    assert said(server) == []


def test_data_that_was_under_way_when_the_call_ended_is_no_fault() -> None:
    server = a_server()
    server.receive(request(1, "both", flags=REMOTE_OPEN))
    server.finish(1)
    server.outgoing()
    assert server.receive(frames.encode(1, DATA, 0, b"x")) == []
    assert said(server) == []


def test_frames_of_a_kind_that_nobody_knows_are_passed_over() -> None:
    server = a_server()
    assert server.receive(frames.encode(1, 9, 0, b"x") + frames.encode(1, RESPONSE, 0, b"x")) == []
    assert said(server) == []


def test_what_one_peer_can_make_a_server_hold_is_bounded_and_given_back() -> None:
    server = a_server(Limits(calls=3, stream=1000, connection=4000))
    events = server.receive(b"".join(request(stream, "both", flags=REMOTE_OPEN) for stream in (1, 3, 5, 7)))
    assert [event.stream for event in events if isinstance(event, Called)] == [1, 3, 5]
    assert refusal(server) == (7, GrpcStatus.RESOURCE_EXHAUSTED)
    data = frames.encode(1, DATA, 0, bytes(400))
    assert server.receive(data + data) == [Arrived(1), Broken(1)]  # that stream alone
    assert refusal(server) == (1, GrpcStatus.RESOURCE_EXHAUSTED)
    assert server.receive(request(9, "one", bytes(3800))) == []
    assert refusal(server) == (9, GrpcStatus.RESOURCE_EXHAUSTED)
    for stream in (3, 5):
        server.finish(stream)
    server.outgoing()
    assert len(server.receive(request(11, "one", bytes(3800)))) == 1


def test_a_first_message_that_cannot_be_kept_is_refused_and_never_lost() -> None:
    server = a_server(Limits(stream=1000, connection=4000))
    for stream in (1, 3, 5):
        assert server.receive(request(stream, "out", bytes(1500))) == []
        assert refusal(server) == (stream, GrpcStatus.RESOURCE_EXHAUSTED)
    assert server.receive(request(7, "one", bytes(3500))) != []  # nothing of them is held


def test_a_client_asks_and_gets_the_answer_of_its_own_call() -> None:
    client = ClientProtocol()
    first, second = (client.call(Request("s", "one", payload), UNARY) for payload in (b"1", b"2"))
    assert [(stream, kind, flags) for stream, kind, flags, _ in said(client)] == [(1, REQUEST, 0), (3, REQUEST, 0)]
    client.receive(frames.encode(3, RESPONSE, 0, Response(b"two").encode()))
    assert (first.over, second.over, second.inbox.take()) == (False, True, b"two")
    client.receive(frames.encode(1, RESPONSE, 0, Response(status=Status(5, "gone")).encode()))
    assert first.status == Status(5, "gone")
    assert not first.inbox


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (frames.encode(1, RESPONSE, 0, b"\x0a"), GrpcStatus.INTERNAL),
        (frames.encode(1, DATA, 0, b""), GrpcStatus.INTERNAL),
        (frames._HEADER.pack(MAX_DATA + 1, 1, RESPONSE, 0), GrpcStatus.RESOURCE_EXHAUSTED),
    ],
)
def test_a_server_that_breaks_the_protocol_fails_that_call_alone(answer: bytes, code: int) -> None:
    client = ClientProtocol()
    call, other = (client.call(Request("s", "one"), UNARY) for _ in range(2))
    client.receive(answer)
    assert call.status is not None
    assert call.status.code == code
    assert not other.over


def test_a_late_answer_and_one_for_nobody_are_harmless() -> None:
    client = ClientProtocol()
    call = client.call(Request("s", "one"), UNARY)
    client.forget(call)
    for stream in (1, 2, 99):
        client.receive(frames.encode(stream, RESPONSE, 0, Response(b"late").encode()))
    assert not call.inbox


@pytest.mark.parametrize(
    ("shape", "payload", "flags"),
    [
        (UNARY, b"", 0),
        (BOTH, b"", REMOTE_OPEN | NO_DATA),
        (BOTH, b"first", REMOTE_OPEN),
        (Shape(server_streams=True), b"", REMOTE_CLOSED),
    ],
)
def test_a_request_says_whether_a_message_comes_with_it(shape: Shape, payload: bytes, flags: int) -> None:
    """Go takes no bytes for no message, Rust for an empty one unless it is told."""
    client = ClientProtocol()
    client.call(Request("s", "m", payload), shape)
    ((_, kind, got, _),) = said(client)
    assert (kind, got) == (REQUEST, flags)


def test_a_request_that_says_so_brings_no_message() -> None:
    (event,) = a_server().receive(request(1, "both", b"x", flags=REMOTE_OPEN | NO_DATA))
    assert isinstance(event, Called)
    assert not event.inbox


def test_a_stream_that_is_not_waited_for_any_more_is_half_closed() -> None:
    client = ClientProtocol()
    call = client.call(Request("s", "both"), BOTH)
    client.send(call, b"x")
    client.forget(call)
    client.forget(call)
    client.send(call, b"late")
    assert [(kind, flags) for _, kind, flags, _ in said(client)] == [
        (REQUEST, REMOTE_OPEN | NO_DATA),
        (DATA, 0),
        (DATA, REMOTE_CLOSED | NO_DATA),
    ]


def test_nothing_that_is_too_long_is_sent() -> None:
    client = ClientProtocol()
    call = client.call(Request("s", "both"), BOTH)
    client.outgoing()
    with pytest.raises(StatusError):
        client.call(Request("s", "one", bytes(MAX_DATA)), UNARY)
    with pytest.raises(StatusError):
        client.send(call, bytes(MAX_DATA + 1))
    assert said(client) == []


def test_a_server_that_sends_faster_than_anybody_takes_loses_that_call() -> None:
    client = ClientProtocol(Limits(stream=1000))
    call = client.call(Request("s", "both"), BOTH)
    client.receive(frames.encode(1, DATA, 0, bytes(400)) * 5)
    assert call.status is not None
    assert call.status.code == GrpcStatus.RESOURCE_EXHAUSTED
    assert call.inbox.take() == bytes(400)


def test_a_closed_connection_ends_all_calls_and_begins_no_other() -> None:
    client = ClientProtocol()
    call = client.call(Request("s", "one"), UNARY)
    client.close(Status(14, "gone"))
    assert call.status == Status(14, "gone")
    with pytest.raises(StatusError, match="gone"):
        client.call(Request("s", "one"), UNARY)


def test_a_connection_ends_when_all_its_stream_numbers_are_used() -> None:
    client = ClientProtocol()
    client._next = 2**32 - 1
    client.call(Request("s", "one"), UNARY)
    with pytest.raises(StatusError, match="open a new one"):
        client.call(Request("s", "one"), UNARY)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.randoms(use_true_random=False), st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=6))
def test_two_sides_agree_on_every_message_whatever_the_order(rng: random.Random, methods: list[str]) -> None:
    """Random steps of both sides; what each sent is what the other one got, call by call."""
    client, server = ClientProtocol(), a_server()
    calls = {call.stream: call for call in (client.call(Request("s", name, b"q"), SHAPES[name]) for name in methods)}
    sent: dict[int, list[bytes]] = {stream: [b"q"] for stream in calls}
    answers: dict[int, list[bytes]] = {stream: [] for stream in calls}
    began: dict[int, Called] = {}
    open_there = set(calls)

    def to_server() -> None:
        for event in server.receive(client.outgoing()):
            assert not isinstance(event, Broken)
            if isinstance(event, Called):
                began[event.stream] = event

    def client_sends(stream: int) -> None:
        call = calls[stream]
        if not (call.closed or call.over):
            client.send(call, b"%d" % rng.randrange(9))
            sent[stream].append(b"")

    def server_sends(stream: int) -> None:
        if stream in began and stream in open_there and began[stream].shape.server_streams:
            server.send(stream, b"m")
            answers[stream].append(b"m")

    def server_ends(stream: int) -> None:
        if stream in began and stream in open_there:
            open_there.discard(stream)
            if began[stream].shape.server_streams:
                server.finish(stream)
            else:
                server.reply(stream, b"r")
                answers[stream].append(b"r")

    steps: list[Callable[[int], None]] = [
        client_sends,
        server_sends,
        server_ends,
        lambda s: client.half_close(calls[s]),
    ]
    for _ in range(40):
        rng.choice(steps)(rng.choice(list(calls)))
        if rng.random() < 0.5:
            to_server()
        if rng.random() < 0.5:
            client.receive(server.outgoing())
    to_server()
    for stream in calls:
        server_ends(stream)
    client.receive(server.outgoing())
    for stream, call in calls.items():
        assert call.over
        assert call.status is None
        assert _all(call) == answers[stream]


def _all(call: Call) -> list[bytes]:
    got = []
    while call.inbox:
        got.append(call.inbox.take())
    return got


def test_a_server_survives_hostile_bytes(count: Callable[[int], int]) -> None:
    """A fuzz target: valid traffic, damaged at random; it neither fails, nor says anything that is no frame."""
    rng = random.Random(8)
    words = [
        request(stream, method, b"p", flags=flags) for stream in (1, 3, 5, 8) for method in SHAPES for flags in (0, 2)
    ]
    words += [frames.encode(stream, DATA, flags, b"d") for stream in (1, 3, 5, 99) for flags in range(8)]
    words += [frames._HEADER.pack(MAX_DATA + 1, 3, 1, 0), b"\xff" * 10, b""]
    for _ in range(count(30_000)):
        server = a_server(Limits(calls=2, stream=600, connection=2000))
        stream = bytearray(b"".join(rng.choices(words, k=rng.randrange(1, 8))))
        for _ in range(rng.randrange(4)):
            if stream:
                stream[rng.randrange(len(stream))] = rng.randrange(256)
        cut = rng.randrange(len(stream) + 1)
        events: list[Event] = server.receive(bytes(stream[:cut])) + server.receive(bytes(stream[cut:]))
        for event in events:
            if isinstance(event, Called):
                server.reply(event.stream, b"") if event.shape.unary else server.finish(event.stream)
        said(server)
        assert server._budget._left == 2000  # all that was held has been given back
        assert not server._calls


def test_a_client_survives_hostile_bytes(count: Callable[[int], int]) -> None:
    """The same for the other side."""
    rng = random.Random(8)
    answers = [Response(b"x").encode(), Response(status=Status(5, "no")).encode(), b"\x0a\x09", b""]
    words = [frames.encode(stream, RESPONSE, 0, answer) for stream in (1, 3, 5, 8) for answer in answers]
    words += [frames.encode(stream, DATA, flags, b"d") for stream in (1, 3, 5, 99) for flags in range(8)]
    words += [frames._HEADER.pack(MAX_DATA + 1, 3, 2, 0), b"\xff" * 10, b""]
    for _ in range(count(30_000)):
        client = ClientProtocol(Limits(stream=600, connection=2000))
        calls = [client.call(Request("s", name), shape) for name, shape in SHAPES.items()]
        stream = bytearray(b"".join(rng.choices(words, k=rng.randrange(1, 8))))
        for _ in range(rng.randrange(4)):
            if stream:
                stream[rng.randrange(len(stream))] = rng.randrange(256)
        cut = rng.randrange(len(stream) + 1)
        client.receive(bytes(stream[:cut]))
        client.receive(bytes(stream[cut:]))
        client.close(Status(14, "gone"))
        for call in calls:
            assert call.over
            _all(call)
            client.forget(call)
        said(client)
        assert client._budget._left == 2000
