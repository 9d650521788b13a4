"""Streams through the proxy: each piece at once, every break seen by both sides, and true records of all of it."""

import base64
import contextlib
import functools
import gzip
import http.client
import json
import os
import random
import re
import socket
import struct
import zlib

import pytest

import rock_ms
from support import TIMEOUT, Later, Proxy, chat, raw_request, running, wait_until
from upstream import answer, chunk, chunked, delta, sse, words

CLOSE, RESET, STALL = {"close": True}, {"reset": True}, {"stall": True}
SSE_TYPE = "text/event-stream"
CHAT = "/v1/chat/completions"


@pytest.fixture
def connect():
    """Starts raw clients, and closes them."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(contextlib.closing(Client(*args, **options)))


class Client:
    """A client on a socket of its own, which has what has come so far."""

    def __init__(self, port, value=None, path=CHAT, head=b"", version=b"HTTP/1.1"):
        data = raw_request(json.dumps(chat(stream=True) if value is None else value).encode(), head, path.encode())
        self._sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self._sock.sendall(data.replace(b"HTTP/1.1", version, 1))
        self.received = b""
        self.is_closed = self.is_reset = False  # by the other side

    def receive(self):
        try:
            data = self._sock.recv(65536)
        except ConnectionResetError:
            data, self.is_reset = b"", True
        self.received += data
        self.is_closed = not data

    def until(self, condition):
        """Receive until `condition()` is true."""
        while not condition():
            assert not self.is_closed, "the connection ended too early, after %r" % self.received
            self.receive()
        return self

    def head(self):
        """Wait for status and header fields: (status, fields by lower-case name)."""
        self.until(lambda: b"\r\n\r\n" in self.received)
        first, *lines = self.received.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
        return int(first.split(" ")[1]), {line.split(": ", 1)[0].lower(): line.split(": ", 1)[1] for line in lines}

    def _body(self):
        """The body's bytes so far, and whether they are all; None for a body that the connection's end ends."""
        if b"\r\n\r\n" not in self.received:
            return b"", False
        _, fields = self.head()
        rest = self.received.partition(b"\r\n\r\n")[2]
        if "content-length" in fields:
            return rest, len(rest) == int(fields["content-length"])
        return unchunked(rest) if "transfer-encoding" in fields else (rest, None)

    @property
    def body(self):
        return self._body()[0]

    def see(self, expected):
        """Wait until the body so far is this."""
        self.until(lambda: len(self.body) >= len(expected))
        assert self.body == expected

    def is_whole(self):
        """Receive until the answer is whole, or the connection ends; whether it was whole."""
        while not self.is_closed and not self._body()[1]:
            self.receive()
        return self._body()[1]

    def stop_sending(self):
        self._sock.shutdown(socket.SHUT_WR)

    def reset(self):
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def close(self):
        self._sock.close()


def unchunked(data):
    """What a chunked body's bytes hold so far, and whether its last chunk has come."""
    pieces = []
    while True:
        line, end, data = data.partition(b"\r\n")
        if not end or not int(line, 16):
            return b"".join(pieces), bool(end) and data == b"\r\n"
        size = int(line, 16)
        pieces.append(data[:size])
        if len(data) < size + 2:
            return b"".join(pieces), False
        data = data[size + 2 :]


# What the upstream sends --------------------------------------------------------------------------------------------


def latin(data):
    return data.decode("latin-1")


def response(pieces, framing="chunked", kind=SSE_TYPE, status=200, gates=True, **fields):
    """The steps of a response, of bytes; a gate of the piece's number stands before each of them, and before its end.

    framing: chunked, one chunk, length, close.
    """
    length = sum(map(len, pieces))
    framed = {
        "chunked": {"Transfer-Encoding": "chunked"},
        "one chunk": {"Transfer-Encoding": "chunked"},
        "length": {"Content-Length": length},
        "close": {},
    }[framing]
    fields = {name.replace("_", "-"): value for name, value in fields.items()}
    steps = [answer("", status, {"Content-Type": kind, "Content-Length": None, **framed, **fields})]
    steps += [{"send": "%x\r\n" % length}] if framing == "one chunk" else []
    for number, piece in enumerate(pieces):
        steps += [{"gate": str(number)}] if gates else []
        steps += [{"send": chunk(latin(piece)) if framing == "chunked" else latin(piece)}]
    steps += [{"gate": "end"}] if gates else []
    ends = {"chunked": {"send": "0\r\n\r\n"}, "one chunk": {"send": "\r\n0\r\n\r\n"}, "close": CLOSE}
    return steps + ([ends[framing]] if framing in ends else [])


def event(value, end="\n\n", name=None):
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    first = "event: %s%s" % (name, end[: len(end) // 2]) if name else ""
    return ("%sdata: %s%s" % (first, text, end)).encode("utf-8")


def events(*values, end="\n\n", done=True):
    """Each event as bytes."""
    return [event(value, end) for value in values] + ([event("[DONE]", end)] if done else [])


def cut(data, size):
    return [data[start : start + size] for start in range(0, len(data), size)]


def cut_in(character, pieces):
    """The bytes, cut before the last byte of a character and once more in its middle."""
    data = b"".join(pieces)
    at = data.index(character)
    return [data[: at + 1], data[at + 1 : at + 2], data[at + 2 :]]


def last_call(proxy):
    """The one record there is, once it is there."""
    (call,) = wait_until(proxy.trajectory)
    return call


def content(call):
    """The text that a record has of a completion; "" where it has none."""
    response = call["response"]
    return response["choices"][0]["message"].get("content", "") if response and "choices" in response else ""


def outcome(call):
    return call["status"], call.get("partial", False)


# Pieces -------------------------------------------------------------------------------------------------------------


TEXT = ("Grö", "ße 漢", "字 \U0001f680\u2028", "\r\nend")
BINARY = bytes(range(255, -1, -1)) + b"\r\n\r\n0\r\n\r\ndata: [DONE]\n\n"
KINDS = {  # content type, pieces, what the record holds
    "events": (SSE_TYPE, events(*words(*TEXT)), "".join(TEXT)),
    "events with CRLF": (SSE_TYPE + "; charset=utf-8", events(*words(*TEXT), end="\r\n\r\n"), "".join(TEXT)),
    "events with CR": (SSE_TYPE, events(*words(*TEXT), end="\r\r"), "".join(TEXT)),
    "comments": (SSE_TYPE, [b": hello\n\n", b":\n", *events(*words("a"))], "a"),
    "several events a piece": (SSE_TYPE, cut(b"".join(events(*words(*TEXT))), 400), "".join(TEXT)),
    "cut events": (SSE_TYPE, cut(b"".join(events(*words(*TEXT))), 37), "".join(TEXT)),
    "cut events with CRLF": (SSE_TYPE, cut(b"".join(events(*words(*TEXT), end="\r\n\r\n")), 41), "".join(TEXT)),
    "cut characters": (SSE_TYPE, cut_in("漢".encode("utf-8"), events(*words("é漢"))), "é漢"),
    "JSON": ("application/json", [b'{"a": "\xc3', b"\xa9", b'"', b"}"], {"a": "é"}),
    "lines": ("application/x-ndjson", [b'{"a": 1}\n', b'{"a": 2}\n'], '{"a": 1}\n{"a": 2}\n'),
    "binary": ("audio/mpeg", cut(BINARY, 100), BINARY),
}


def recorded(call):
    """What a record holds of an answer, of any kind."""
    if call.get("response_format") == "base64":
        assert call["content_type"] == "audio/mpeg"
        return base64.b64decode(call["response"])
    if isinstance(call["response"], dict) and "choices" in call["response"]:
        assert call["response"]["object"] == "chat.completion"
        assert call["response"]["choices"][0]["finish_reason"] == "stop"
        return content(call)
    return call["response"]


@pytest.mark.parametrize("framing", ["chunked", "one chunk", "length", "close"])
def test_each_piece_is_on_its_way_as_it_arrives(proxy, upstream, connect, framing):
    for number, (name, (kind, pieces, record)) in enumerate(KINDS.items()):
        gates = ["%s %s" % (name, gate) for gate in [*range(len(pieces)), "end"]]
        steps = response(pieces, framing, kind, X_Kind=name)
        upstream.script([{"gate": "%s %s" % (name, step["gate"])} if "gate" in step else step for step in steps])
        client = connect(proxy.port)
        for position, gate in enumerate(gates[:-1]):
            upstream.open(gate)
            client.see(b"".join(pieces[: position + 1]))  # while the next gate is closed
        upstream.open(gates[-1])
        assert client.is_whole(), name
        status, fields = client.head()
        assert (status, fields["content-type"], fields["x-kind"]) == (200, kind, name)
        assert client.body == b"".join(pieces)
        assert ("content-length" in fields) == (framing == "length")
        call = proxy.trajectory()[number]
        assert (outcome(call), recorded(call), call["error"]) == ((200, False), record, None), name


@pytest.mark.parametrize("value", [chat(), chat(stream=True)], ids=["unasked", "asked"])
@pytest.mark.parametrize("name", ["events", "binary", "JSON"])
def test_header_arrives_at_heartbeat_seconds_where_the_upstream_is_silent(start, upstream, connect, name, value):
    kind, pieces, record = KINDS[name]
    proxy = start(heartbeat_seconds=0.05)
    upstream.script(response(pieces, kind=kind, status=201))
    client = connect(proxy.port, value)
    assert client.head()[0] == 201
    assert (client.body, proxy.trajectory()) == (b"", [])
    for number in range(len(pieces)):
        upstream.open(str(number))
        client.see(b"".join(pieces[: number + 1]))
    upstream.open("end")
    assert client.is_whole()
    assert (last_call(proxy)["status"], recorded(last_call(proxy))) == (201, record)


def test_first_piece_comes_with_the_header_and_not_after_the_heartbeat(start, upstream, connect):
    proxy = start(heartbeat_seconds=600)
    upstream.script(response([b": one\n\n", b": two\n\n"]))
    client = connect(proxy.port)
    upstream.open("0")
    client.see(b": one\n\n")
    upstream.open("1")
    upstream.open("end")
    assert client.is_whole()


def test_answer_that_is_not_asked_for_as_a_stream_comes_whole(proxy, upstream, connect):
    upstream.script(response(cut(json.dumps({"text": TEXT}).encode(), 7), kind="application/json", gates=False))
    client = connect(proxy.port, chat())
    assert client.is_whole()
    assert (json.loads(client.body.decode()), client.head()[1]["content-length"]) == (
        {"text": list(TEXT)},
        str(len(client.body)),
    )


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_bytes_are_those_of_the_upstream_however_they_come(proxy, upstream, size):
    data = b"".join(events(*words(*TEXT * 3), end="\r\n\r\n"))
    steps = response([data], gates=False)
    upstream.script([steps[0], {"drip": steps[1]["send"] + steps[2]["send"], "size": size}])
    assert proxy.ask(chat(stream=True)).body == data
    assert content(last_call(proxy)) == "".join(TEXT * 3)


def test_long_stream_passes_whole(proxy, upstream):
    texts = ["word %d " % number for number in range(3000)]
    upstream.script(sse(*words(*texts)))
    got = proxy.ask(chat(stream=True))
    assert got.events()[1:-2] == [delta(text) for text in texts]
    assert content(last_call(proxy)) == "".join(texts)


TRUE_STATUSES = [
    ([answer({"error": {"message": "no"}}, 400)], 400, b'{"error": {"message": "no"}}'),
    ([answer({"error": {"message": "no"}}, 404)], 404, b'{"error": {"message": "no"}}'),
    ([answer({"error": {"message": "no"}}, 503)], 503, b'{"error": {"message": "no"}}'),
    (chunked('{"a": ', "1}", status=422), 422, b'{"a": 1}'),
    (sse(*words("a"), status=201), 201, b"".join(events(*words("a")))),
    (sse({"error": {"message": "no"}}, status=400), 400, b"".join(events({"error": {"message": "no"}}))),
    ([answer({"id": 1}, 202)], 202, b'{"id": 1}'),
    ([answer("", 302, {"Location": "/x"})], 302, b""),
    ([answer("", 204, {"Content-Length": None})], 204, b""),
]


def test_status_and_body_of_an_answer_to_a_stream_request_are_the_true_ones(proxy, upstream):
    for number, (steps, status, body) in enumerate(TRUE_STATUSES):
        upstream.script(steps)
        got = proxy.ask(chat(stream=True))
        assert (got.status, got.body) == (status, body)
        call = proxy.trajectory()[number]
        assert (call["status"], call["stream"], call["attempts"]) == (status, True, 1)
        assert (call["error"] is None) == (status < 400)


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_client_of_http_1_0_gets_the_stream_until_close(proxy, upstream, connect, framing):
    pieces = events(*words("Hel", "lo"))
    upstream.script(response(pieces, framing))
    client = connect(proxy.port, version=b"HTTP/1.0")
    for number in range(len(pieces)):
        upstream.open(str(number))
        client.see(b"".join(pieces[: number + 1]))
    upstream.open("end")
    client.until(lambda: client.is_closed)
    status, fields = client.head()
    assert (status, fields["connection"], "transfer-encoding" in fields, client.is_reset) == (
        200,
        "close",
        False,
        False,
    )
    assert client.body == b"".join(pieces)
    assert content(last_call(proxy)) == "Hello"


@pytest.mark.parametrize("is_stream", [True, False])
def test_connection_is_kept_after_a_stream(proxy, upstream, is_stream):
    upstream.script(sse(*words("one")), sse(*words("two")))
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=TIMEOUT)
    bodies, sockets = [], set()
    with contextlib.closing(connection):
        for _ in range(2):
            connection.request("POST", CHAT, json.dumps(chat(stream=is_stream)))
            sockets.add(connection.sock)
            bodies.append(connection.getresponse().read())
    assert (len(sockets), bodies) == (1, [b"".join(events(*words(text))) for text in ("one", "two")])
    assert {request["connection"] for request in upstream.seen()} == {1}


# What breaks --------------------------------------------------------------------------------------------------------


FIRST = b"".join(events(delta(role="assistant"), delta("a"), done=False))
HALF_EVENT = b'data: {"choices'
OVER = events(delta(finish="stop"), done=False)[0]
CLOSED, UNREADABLE = "broke off in the middle of its answer", "cannot be read: .*chunk"
BREAKS = {  # framing, what comes behind the gate, status of the record, its error
    "reset": ("chunked", [RESET], 502, "broke the connection|" + CLOSED),
    "close between chunks": ("chunked", [CLOSE], 502, CLOSED),
    "close in a chunk": ("chunked", [{"send": "ff\r\ndata"}, CLOSE], 502, CLOSED),
    "close before the last line": ("chunked", [{"send": "0\r\n"}, CLOSE], 502, CLOSED),
    "close after finish_reason": ("chunked", [{"send": chunk(latin(OVER))}, CLOSE], 502, CLOSED),
    "no chunk": ("chunked", [{"send": "zz\r\n"}], 502, UNREADABLE),
    "close in a length": ("length", [CLOSE], 502, CLOSED),
    "reset in a length": ("length", [RESET], 502, "broke the connection|" + CLOSED),
    "close without an end": ("close", [CLOSE], 502, "before its answer was over"),
    "close in an event": ("close", [{"send": latin(HALF_EVENT)}, CLOSE], 502, "before its answer was over"),
    "reset without an end": ("close", [RESET], 502, "broke the connection|before its answer was over"),
    "silence": ("chunked", [STALL], 504, "silent for too long"),
    "silence in a length": ("length", [STALL], 504, "silent for too long"),
    "silence until close": ("close", [STALL], 504, "silent for too long"),
}


@pytest.mark.parametrize("framing, end, status, error", BREAKS.values(), ids=list(BREAKS))
@pytest.mark.usefixtures("only_stalls_take_time")
def test_break_of_the_upstream_is_one_for_the_client(start, upstream, framing, end, status, error):
    proxy = start(request_timeout=0.3)
    steps = response([FIRST, b"x" * 500], framing)
    upstream.script(steps[:3] + [{"gate": "break"}] + end)
    upstream.open("0")
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=TIMEOUT)
    with contextlib.closing(connection):
        connection.request("POST", CHAT, json.dumps(chat(stream=True)))
        got = connection.getresponse()
        assert (got.status, got.read(len(FIRST))) == (200, FIRST)
        upstream.open("break")
        with pytest.raises(http.client.IncompleteRead):
            got.read()
    call = last_call(proxy)
    assert (outcome(call), content(call), call["attempts"]) == ((status, True), "a", 1)
    assert re.search(error, call["error"]), call["error"]
    wait_until(lambda: upstream.connections() == 0)
    wait_until(lambda: any(re.search(" 50[24] ", line) for line in proxy.logged))


CUT_BINARY = base64.b64encode(KINDS["binary"][1][0]).decode()
CUT_JSON = base64.b64encode(KINDS["JSON"][1][0]).decode()  # in the middle of a character


@pytest.mark.parametrize(
    "name, kept, kind", [("binary", CUT_BINARY, "base64"), ("JSON", CUT_JSON, "base64"), ("lines", {"a": 1}, None)]
)
def test_what_arrived_of_another_answer_is_recorded(proxy, upstream, connect, name, kept, kind):
    pieces = KINDS[name][1][:1]
    upstream.script(response(pieces, "chunked", KINDS[name][0])[:-1] + [CLOSE])
    upstream.open("0")
    client = connect(proxy.port)
    client.see(pieces[0])
    upstream.open("end")
    assert not client.is_whole()
    call = last_call(proxy)
    assert (outcome(call), call["response"], call.get("response_format")) == ((502, True), kept, kind)


def test_client_of_http_1_0_sees_a_break_as_a_reset(proxy, upstream, connect):
    upstream.script(response([FIRST, b""])[:3] + [{"gate": "break"}, CLOSE])
    upstream.open("0")
    client = connect(proxy.port, version=b"HTTP/1.0")
    client.see(FIRST)
    upstream.open("break")
    client.until(lambda: client.is_closed)
    assert outcome(last_call(proxy)) == (502, True)
    assert client.is_reset


ENDS = {
    "[DONE]": events(*words("a")),
    "[DONE] without its empty line": events(*words("a"))[:-1] + [b"data: [DONE]"],
    "[DONE] and no finish_reason": events(delta("a")),
    "finish_reason": events(*words("a"), done=False),
    "all finish_reasons": events(delta("a"), delta("b", 1), delta(finish="stop", index=1), delta(finish="stop")),
}


@pytest.mark.parametrize("pieces", ENDS.values(), ids=list(ENDS))
def test_stream_until_close_is_whole_where_it_says_so(proxy, upstream, connect, pieces):
    upstream.script(response(pieces, "close", gates=False))
    client = connect(proxy.port)
    assert client.is_whole()
    assert client.body == b"".join(pieces)
    call = last_call(proxy)
    assert (outcome(call), content(call), call["error"]) == ((200, False), "a", None)


def test_stream_until_close_is_broken_where_one_choice_has_not_finished(proxy, upstream, connect):
    upstream.script(response(events(delta("a"), delta("b", 1), delta(finish="stop"), done=False), "close", gates=False))
    assert not connect(proxy.port).is_whole()
    assert outcome(last_call(proxy)) == (502, True)


def test_last_event_of_other_apis_until_close(proxy, upstream, connect):
    cases = [
        ("/v1/responses", "response.output_text.delta", False),
        ("/v1/responses", "response.completed", True),
        ("/v1/responses", "response.failed", True),
        ("/v1/responses", "response.incomplete", True),
        ("/v1/messages", "message_delta", False),
        ("/v1/messages", "message_stop", True),
    ]
    for number, (path, name, is_whole) in enumerate(cases):
        pieces = [event({"type": "first"}), event({"type": name}, name=name)]
        upstream.script(response(pieces, "close", gates=False))
        assert bool(connect(proxy.port, path=path).is_whole()) == is_whole, name
        call = proxy.trajectory()[number]
        assert outcome(call) == ((200, False) if is_whole else (502, True)), name
        assert call["response"] == [{"data": {"type": "first"}}, {"event": name, "data": {"type": name}}]


# Clients that hang up -----------------------------------------------------------------------------------------------


def hung_up(proxy, upstream, number):
    """The record of the call whose client hung up, when the upstream has been told.  number: of such calls so far."""
    wait_until(lambda: upstream.connections() == 0, "the end of the upstream's connection")
    call = wait_until(lambda: proxy.trajectory()[number:])[0]
    assert (call["status"], call["error"], call["attempts"]) == (499, "the client hung up", 1)
    wait_until(lambda: sum(" 499 " in line for line in proxy.logged) == number + 1)
    return call


@pytest.mark.parametrize("how", ["close", "reset", "stop_sending"])
@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
def test_hangup_before_the_first_byte_reaches_the_upstream(proxy, upstream, connect, how, is_stream):
    header = answer("", headers={"Content-Length": 100, "Content-Type": SSE_TYPE if is_stream else "application/json"})
    begun = [[], [{"send": header["send"][:50]}], [header], [header, {"send": "" if is_stream else "{"}]]
    for number, steps in enumerate(begun):
        upstream.script(steps + [STALL])
        client = connect(proxy.port, chat(stream=is_stream))
        upstream.seen(number + 1)
        getattr(client, how)()
        call = hung_up(proxy, upstream, number)
        assert call["request"] == chat(stream=is_stream)
        assert call["response"] in ([None, "{"] if steps[1:] and not is_stream else [None])
    assert proxy.pauses == []


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_hangup_in_mid_stream_reaches_the_upstream(proxy, upstream, connect, framing):
    for number, how in enumerate(["close", "reset", "stop_sending"]):
        upstream.script(response([FIRST, b"x" * 500], framing, gates=False)[:2] + [STALL])
        client = connect(proxy.port)
        client.see(FIRST)
        getattr(client, how)()
        call = hung_up(proxy, upstream, number)
        assert (outcome(call), content(call)) == ((499, True), "a"), how
    assert upstream.wait_closed(3)


def test_hangup_of_a_client_that_does_not_read(proxy, upstream, connect):
    upstream.script(response([FIRST] + [b": %s\n\n" % (b"x" * 1000000)] * 30, gates=False))
    client = connect(proxy.port)
    client.until(lambda: FIRST in client.body)
    client.close()
    call = last_call(proxy)
    assert (outcome(call), content(call)) == ((499, True), "a")
    wait_until(lambda: upstream.connections() == 0)


def test_hangup_after_the_end_was_seen_is_none(proxy, upstream, connect):
    upstream.script(response(events(*words("a")))[:-2] + [STALL])
    for gate in range(5):
        upstream.open(str(gate))
    client = connect(proxy.port)
    client.until(lambda: b"[DONE]\n\n" in client.body)
    client.close()
    assert upstream.wait_closed(1)
    wait_until(lambda: any(" 499 " in line for line in proxy.logged))
    assert (outcome(last_call(proxy)), content(last_call(proxy))) == ((200, False), "a")


def test_break_after_the_end_was_seen_leaves_the_record(proxy, upstream, connect):
    upstream.script(response(events(*words("a")))[:-1] + [CLOSE])
    for gate in range(4):
        upstream.open(str(gate))
    client = connect(proxy.port)
    client.until(lambda: b"[DONE]\n\n" in client.body)
    upstream.open("end")
    assert not client.is_whole()
    assert outcome(last_call(proxy)) == (200, False)


# The record before the end ------------------------------------------------------------------------------------------


COMPLETED = event({"type": "response.completed", "response": {"id": "r1"}}, name="response.completed")
CREATED = event({"type": "response.created"}, name="response.created")
LAST_EVENTS = {
    "[DONE]": (CHAT, events(*words("a"))),
    "[DONE] with CRLF": (CHAT, events(*words("a"), end="\r\n\r\n")),
    "[DONE] in one piece with all": (CHAT, [b"".join(events(*words("a")))]),
    "[DONE] of legacy completions": ("/v1/completions", events({"choices": [{"index": 0, "text": "a"}]})),
    "[DONE] and more": (CHAT, events(*words("a")) + [b": bye\n\n"]),
    "response.completed": ("/v1/responses", [CREATED, COMPLETED]),
    "response.completed without a name": ("/v1/responses", [event({"type": "response.completed"})]),
    "message_stop": ("/v1/messages", [event({"type": "ping"}, name="ping"), event({}, name="message_stop")]),
}


@pytest.mark.parametrize("path, pieces", LAST_EVENTS.values(), ids=list(LAST_EVENTS))
@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_record_is_on_disk_before_the_client_can_see_the_last_event(proxy, upstream, connect, framing, path, pieces):
    upstream.script(response(pieces, framing))
    for gate in range(len(pieces)):
        upstream.open(str(gate))
    client = connect(proxy.port, path=path)
    client.until(lambda: client.body == b"".join(pieces))
    (call,) = proxy.trajectory()  # at once
    assert (outcome(call), call["path"], call["error"]) == ((200, False), path, None)
    if path in ("/v1/responses", "/v1/messages"):
        assert call["response_format"] == "events"
        assert event(**recorded_event(call["response"][-1])) == pieces[-1]
        assert len(call["response"]) == len(pieces)
    else:
        choice = call["response"]["choices"][0]
        assert (choice["text"] if "text" in choice else choice["message"]["content"]) == "a"
        assert "response_format" not in call
    upstream.open("end")
    assert client.is_whole()
    assert proxy.trajectory() == [call], "it is written once"


def recorded_event(entry):
    return {"value": entry["data"], "name": entry.get("event")}


def test_record_is_on_disk_before_the_line_with_the_last_event(proxy, upstream, connect):
    upstream.script(response(events(*words("a"), done=False) + [b"data: [DONE]\n", b"\n"]))
    for gate in range(4):
        upstream.open(str(gate))
    client = connect(proxy.port)
    try:
        client.until(lambda: b"data: [DONE]\n" in client.body)
        assert len(proxy.trajectory()) == 1
    finally:
        upstream.open("4")
        upstream.open("end")
        assert client.is_whole()


def test_record_is_on_disk_before_the_last_byte_of_a_whole_answer(proxy, upstream, connect):
    for number in range(1, 30):
        upstream.script([answer({"number": number})] if number % 2 else chunked('{"number": ', "%d}" % number))
        client = connect(proxy.port, chat())
        assert client.is_whole()
        assert [call["response"]["number"] for call in proxy.trajectory()] == list(range(1, number + 1))


@pytest.mark.parametrize("framing, value", [("length", chat()), ("length", chat(stream=True)), ("chunked", chat())])
def test_record_is_on_disk_before_the_last_byte_of_a_slow_answer(start, upstream, connect, framing, value):
    proxy = start(heartbeat_seconds=0.05)
    upstream.script(response([b'{"a":', b" 1", b"}"], framing, "application/json"))
    client = connect(proxy.port, value)
    for gate in range(2):
        upstream.open(str(gate))
    client.see(b'{"a": 1')
    assert proxy.trajectory() == []
    upstream.open("2")
    upstream.open("end")
    assert client.is_whole()
    assert [(outcome(call), call["response"]) for call in proxy.trajectory()] == [((200, False), {"a": 1})]


# What cannot be recorded --------------------------------------------------------------------------------------------


def test_whole_answer_that_cannot_be_recorded_is_not_given(proxy, upstream):
    os.mkdir(proxy.paths.traj_file)
    got = proxy.ask(chat())
    assert (got.status, got.json()["error"]["code"]) == (500, "storage_error")
    assert b"LLMTraj" not in got.body, "no path of ours reaches a client"
    assert any("LLMTraj.jsonl: Is a directory" in line for line in proxy.logged)
    os.rmdir(proxy.paths.traj_file)
    assert proxy.ask(chat()).status == 200
    assert (last_call(proxy)["status"], len(upstream.seen())) == (200, 2)


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_end_of_a_stream_that_cannot_be_recorded_is_not_given(proxy, upstream, connect, framing):
    os.mkdir(proxy.paths.traj_file)
    pieces = events(*words("a"))
    upstream.script(response(pieces, framing), sse(*words("b")))
    client = connect(proxy.port)
    for gate in range(3):
        upstream.open(str(gate))
    client.see(b"".join(pieces[:3]))
    upstream.open("3")
    assert not client.is_whole()
    assert client.body == b"".join(pieces[:3]), "nothing of [DONE] comes"
    assert any("LLMTraj.jsonl: Is a directory" in line for line in proxy.logged)
    upstream.open("end")
    os.rmdir(proxy.paths.traj_file)
    assert proxy.ask(chat(stream=True)).status == 200
    assert content(last_call(proxy)) == "b"


def test_error_that_cannot_be_recorded_is_given(tmp_path, upstream):
    with running(tmp_path, Proxy, upstream=upstream) as proxy:
        os.mkdir(proxy.paths.traj_file)
        upstream.script(*[[CLOSE]] * 6)
        assert proxy.ask(chat()).status == 502
        assert any("a call that failed is not in the trajectory" in line for line in proxy.logged)


def test_stream_broken_off_by_the_service_is_not_recorded_as_hung_up(proxy, upstream, connect, monkeypatch):
    append, failures = proxy.server.service.trajectory.append, [rock_ms.StorageError("full for a moment")]

    def fail_once(line):
        if failures:
            raise failures.pop()
        return append(line)

    monkeypatch.setattr(proxy.server.service.trajectory, "append", fail_once)
    pieces = events(*words("a"))
    upstream.script(response(pieces, gates=False)[:-2] + [{"gate": "last"}, *response(pieces)[-3:]])
    client = connect(proxy.port)
    client.see(b"".join(pieces[:3]))
    for gate in ("last", "3", "end"):
        upstream.open(gate)
    assert not client.is_whole()
    wait_until(lambda: any("the reply to POST" in line for line in proxy.logged))
    wait_until(lambda: any(re.search(r"completions \d+ ", line) for line in proxy.logged))
    assert [call["status"] for call in proxy.trajectory() if call["status"] == 499] == []


# What a stream adds up to -------------------------------------------------------------------------------------------


def call_delta(position, **function):
    more = {"id": function.pop("id"), "type": "function"} if "id" in function else {}
    return delta(tool_calls=[{"index": position, "function": function, **more}])


def choice(index=0, finish="stop", message=None, **more):
    whole = {"role": "assistant", **(message or {})}
    return {"index": index, "message": whole, "finish_reason": finish, **more}


def with_choice(value, **more):
    return {**value, "choices": [{**value["choices"][0], **more}]}


def tool_call(id, name, arguments):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


LOGPROB = [{"token": token, "logprob": -0.5, "top_logprobs": []} for token in "ab"]
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "details": {"cached": 0}}
SUMS = {  # chunks, the record's choices, its other fields
    "parallel tool calls": (
        [
            call_delta(0, id="c0", name="f", arguments=""),
            call_delta(1, id="c1", name="g", arguments='{"y"'),
            call_delta(0, arguments='{"x":'),
            call_delta(1, arguments=": 2}"),
            call_delta(0, arguments=" 1}"),
            delta(finish="tool_calls"),
        ],
        [choice(0, "tool_calls", {"tool_calls": [tool_call("c0", "f", '{"x": 1}'), tool_call("c1", "g", '{"y": 2}')]})],
        {},
    ),
    "tool calls in one piece": (
        [
            delta(tool_calls=[{"index": at, **tool_call("c%d" % at, "f", "{")} for at in range(2)]),
            delta(tool_calls=[{"index": at, "function": {"arguments": "%d}" % at}} for at in range(2)]),
        ],
        [choice(0, None, {"tool_calls": [tool_call("c0", "f", "{0}"), tool_call("c1", "f", "{1}")]})],
        {},
    ),
    "several choices": (
        [delta("b", 1), delta("a"), delta("B", 1), delta("A"), delta(finish="length", index=1), delta(finish="stop")],
        [choice(0, "stop", {"content": "aA"}), choice(1, "length", {"content": "bB"})],
        {},
    ),
    "logprobs": (
        [
            with_choice(delta("a"), logprobs={"content": LOGPROB[:1], "refusal": None}),
            with_choice(delta("b"), logprobs={"content": LOGPROB[1:], "refusal": None}),
            with_choice(delta(finish="stop"), logprobs=None),
        ],
        [choice(message={"content": "ab"}, logprobs={"content": LOGPROB, "refusal": None})],
        {},
    ),
    "usage": (
        [*words("a"), {**delta(), "choices": [], "usage": USAGE}],
        [choice(message={"content": "a"})],
        {"usage": USAGE},
    ),
    "usage in each chunk": (
        [{**delta("a"), "usage": {"completion_tokens": 1}}, {**delta(finish="stop"), "usage": USAGE}],
        [choice(message={"content": "a"})],
        {"usage": USAGE},
    ),
    "function_call": (
        [
            delta(function_call={"name": "f", "arguments": ""}),
            delta(function_call={"arguments": '{"x":'}),
            delta(function_call={"arguments": "1}"}),
            delta(finish="function_call"),
        ],
        [choice(0, "function_call", {"function_call": {"name": "f", "arguments": '{"x":1}'}})],
        {},
    ),
    "reasoning": (
        [delta(reasoning_content="hm"), delta(reasoning_content=", so"), delta("yes"), delta(finish="stop")],
        [choice(message={"reasoning_content": "hm, so", "content": "yes"})],
        {},
    ),
    "vendor fields": (
        [
            {**with_choice(delta("a", mood={"a": "x"}), token_ids=[1]), "system_fingerprint": "fp", "vendor": [1]},
            with_choice(delta("b", mood={"b": 1}), token_ids=[2, 3]),
            with_choice(delta(finish="stop"), stop_reason=7),
        ],
        [choice(message={"content": "ab", "mood": {"a": "x", "b": 1}}, token_ids=[1, 2, 3], stop_reason=7)],
        {"system_fingerprint": "fp", "vendor": [1]},
    ),
    "nothing said": (
        [delta(role="assistant", refusal=None), delta(finish="stop")],
        [choice(message={"refusal": None})],
        {},
    ),
}


@pytest.mark.parametrize("chunks, choices, more", SUMS.values(), ids=list(SUMS))
def test_record_is_the_completion_that_the_stream_adds_up_to(proxy, upstream, chunks, choices, more):
    upstream.script(sse(*chunks))
    got = proxy.ask(chat(stream=True))
    assert got.events() == [*chunks, "[DONE]"]
    call = last_call(proxy)
    common = {"id": "c1", "object": "chat.completion", "created": 1, "model": "m"}
    assert call["response"] == {**common, "choices": choices, **more}
    assert (outcome(call), call["error"], call["stream"]) == ((200, False), None, True)


def test_error_event_in_mid_stream_is_the_error_of_the_record(proxy, upstream):
    failure = {"error": {"message": "the engine died", "code": 500}}
    upstream.script(sse(delta("a"), failure))
    assert proxy.ask(chat(stream=True)).events() == [delta("a"), failure, "[DONE]"]
    call = last_call(proxy)
    assert (outcome(call), content(call), call["error"]) == ((200, False), "a", "the engine died")
    assert call["response"]["error"] == failure["error"]


def test_error_event_of_another_api_is_the_error_of_the_record(proxy, upstream):
    failure = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    upstream.script(response([event({"type": "ping"}), event(failure, name="error")], gates=False))
    proxy.ask(chat(stream=True), path="/v1/messages")
    call = last_call(proxy)
    assert (call["error"], call["response"][1]) == ("Overloaded", {"event": "error", "data": failure})


def zipped(pieces):
    """Each piece in a form that can be read at once."""
    packer = zlib.compressobj(wbits=31)
    return [packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) for piece in pieces] + [packer.flush()]


GZIPPED = {
    "flushed": zipped(events(*words(*TEXT))),
    "cut": cut(b"".join(zipped(events(*words(*TEXT)))), 5),
    "a member each": [gzip.compress(piece) for piece in events(*words(*TEXT))],
}


@pytest.mark.parametrize("pieces", GZIPPED.values(), ids=list(GZIPPED))
def test_gzip_passes_as_it_is_and_is_recorded_readable(proxy, upstream, connect, pieces):
    plain = b"".join(events(*words(*TEXT)))
    upstream.script(response(pieces, Content_Encoding="gzip"))
    client = connect(proxy.port, head=b"Accept-Encoding: br, gzip\r\n")
    for number in range(len(pieces)):
        upstream.open(str(number))
        client.see(b"".join(pieces[: number + 1]))
    assert len(proxy.trajectory()) == 1, "the last event could be read, if not the coding's last bytes"
    upstream.open("end")
    assert client.is_whole()
    assert client.head()[1]["content-encoding"] == "gzip"
    assert gzip.decompress(client.body) == plain
    call = last_call(proxy)
    assert (outcome(call), content(call), call["error"]) == ((200, False), "".join(TEXT), None)
    assert dict(upstream.seen()[0]["headers"])["accept-encoding"] == "gzip"


def test_what_arrived_of_a_gzip_stream_is_recorded(proxy, upstream, connect):
    pieces = zipped([FIRST, OVER])
    upstream.script(response(pieces, Content_Encoding="gzip")[:3] + [{"gate": "break"}, CLOSE])
    upstream.open("0")
    client = connect(proxy.port)
    client.see(pieces[0])
    upstream.open("break")
    assert not client.is_whole()
    assert (outcome(last_call(proxy)), content(last_call(proxy))) == ((502, True), "a")


# Files --------------------------------------------------------------------------------------------------------------


def stream_once(tmp_path, upstream, text, **settings):
    upstream.script(sse(*words(text)))
    with running(tmp_path, Proxy, upstream=upstream, **settings) as proxy:
        assert proxy.ask(chat(stream=True)).status == 200
        return [content(call) for call in proxy.trajectory()]


def test_earlier_trajectory_is_set_aside_unless_it_is_to_be_gone_on_with(tmp_path, upstream):
    assert stream_once(tmp_path, upstream, "one") == ["one"]
    assert stream_once(tmp_path, upstream, "two", traj_append_mode=True) == ["one", "two"]
    assert stream_once(tmp_path, upstream, "three") == ["three"]
    (aside,) = tmp_path.glob("LLMTraj.*.jsonl")
    calls = [json.loads(line) for line in aside.read_text(encoding="utf-8").splitlines()]
    assert [content(call) for call in calls] == ["one", "two"]


@pytest.mark.parametrize(
    "torn, stays",
    [(b"{", False), (b'{"request": {"torn', False), (b'{"request":{},"response":null}', True), (b"a remark", True)],
)
def test_line_that_a_killed_proxy_left_torn_is_cut_off_and_any_other_is_closed_off(tmp_path, upstream, torn, stays):
    stream_once(tmp_path, upstream, "one")
    with open(str(tmp_path / "LLMTraj.jsonl"), "ab") as file:
        file.write(torn)
    upstream.script(sse(*words("two")))
    with running(tmp_path, Proxy, upstream=upstream, traj_append_mode=True) as proxy:
        proxy.ask(chat(stream=True))
    first, *between, last = (tmp_path / "LLMTraj.jsonl").read_bytes().splitlines()
    assert between == ([torn] if stays else [])
    assert [content(json.loads(line.decode())) for line in (first, last)] == ["one", "two"]


def test_recording_file_takes_the_place_of_the_trajectory(tmp_path, upstream):
    file = tmp_path / "own.jsonl"
    assert stream_once(tmp_path, upstream, "one", recording_file=str(file)) == ["one"]
    assert stream_once(tmp_path, upstream, "two", recording_file=str(file)) == ["two"]
    assert len(list(tmp_path.glob("own.*.jsonl"))) == 1
    assert not (tmp_path / "LLMTraj.jsonl").exists()
    assert content(json.loads(file.read_text(encoding="utf-8"))) == "two"


# Many at once, and the end ------------------------------------------------------------------------------------------


def texts_of(number):
    return ["call %d" % number] + [" word %d" % word for word in range(20)]


def crowd_script(number, chance):
    """What the upstream does for one of many calls, and after how many events its client hangs up.

    Every other client does.  For most of those the upstream keeps back the rest of the stream until all have.
    """
    steps = list(sse(*words(*texts_of(number))))
    at = chance.randrange(len(steps) - 1)  # before [DONE], or earlier
    steps.insert(chance.randrange(len(steps)), {"wait": chance.random() * 0.02})
    if number % 2 and number % 8 != 1:
        steps.insert(at, {"gate": "all have hung up"})
    sent = [step["send"] for step in steps[:at] if "send" in step][1:]
    return steps, chance.randint(0, len(sent))


def crowd_client(port, number, steps, stays_for):
    """One of many clients: (the body's bytes that it saw, whether they are all)."""
    with contextlib.closing(Client(port, chat(str(number), stream=True, script=steps))) as client:
        if number % 2 == 0:
            is_whole = client.is_whole()
            return client.body, is_whole
        client.until(lambda: client.body.count(b"\n\n") >= stays_for)
        return client.body, False


def check_crowd_record(call, number, seen, is_whole):
    text, got = "".join(texts_of(number)), content(call)
    assert is_whole == (number % 2 == 0), number
    if is_whole:
        assert seen == b"".join(events(*words(*texts_of(number))))
    if is_whole or (number % 8 == 1 and call["status"] == 200):
        assert (outcome(call), got, call["error"]) == ((200, False), text, None)
        return
    whole = re.findall(rb"data: (.*)\n\n", seen)
    told = "".join(json.loads(data.decode())["choices"][0]["delta"].get("content", "") for data in whole)
    assert (call["status"], call["error"]) == (499, "the client hung up")
    assert text.startswith(got)
    assert got.startswith(told), "what the client saw had arrived"
    assert call.get("partial") or not got


def test_crowd_of_streams_half_of_which_hang_up(tmp_path, upstream):
    chance, count = random.Random(7), 200
    plans = [crowd_script(number, chance) for number in range(count)]
    with running(tmp_path, Proxy, upstream=upstream) as proxy:
        clients = [
            Later(functools.partial(crowd_client, proxy.port, number, *plan)) for number, plan in enumerate(plans)
        ]
        seen = [client.result() for client in clients]
        wait_until(lambda: lines_of(proxy) == count, "a record of every call")
        upstream.open("all have hung up")
        service = proxy.server.service
        wait_until(lambda: upstream.connections() == service.gauges()["rock_proxy_idle_upstream_connections"])
    calls = {int(call["request"]["messages"][0]["content"]): call for call in proxy.trajectory()}
    assert sorted(calls) == list(range(count))
    for number, (body, is_whole) in enumerate(seen):
        check_crowd_record(calls[number], number, body, is_whole)
    assert sum(call["status"] == 499 for call in calls.values()) >= 75, "those whose end was kept back until then"
    wait_until(lambda: upstream.connections() == 0)


def lines_of(proxy):
    """How many records there are, of a file that is being written."""
    with contextlib.suppress(FileNotFoundError), open(proxy.paths.traj_file, "rb") as file:
        return file.read().count(b"\n")
    return 0


def held_streams(proxy, connect, count):
    """Streams that have begun and wait at the gate `on`."""
    steps = list(sse(*words("a", "b")))
    steps.insert(3, {"gate": "on"})
    clients = [connect(proxy.port, chat(str(number), stream=True, script=steps)) for number in range(count)]
    for client in clients:
        client.see(b"".join(events(*words("a", "b"))[:2]))
    return clients


def test_stop_breaks_off_what_does_not_end(tmp_path, upstream, connect):
    with running(tmp_path, Proxy, upstream=upstream) as proxy:
        clients = held_streams(proxy, connect, 50)
        proxy.server.http.stop = functools.partial(proxy.server.http.stop, 0.3)  # in place of STOP_SECONDS
        proxy.server.stop()
        assert lines_of(proxy) == 50, "all is written down when it has stopped"
        assert not any(client.is_whole() for client in clients)
        for client in clients:
            client.close()
    calls = proxy.trajectory()
    assert sorted(int(call["request"]["messages"][0]["content"]) for call in calls) == list(range(50))
    assert {(outcome(call), content(call), call["error"]) for call in calls} == {
        ((499, True), "a", "the service stopped")
    }
    upstream.open("on")
    wait_until(lambda: upstream.connections() == 0)


def test_stop_lets_streams_end_that_can(tmp_path, upstream, connect):
    with running(tmp_path, Proxy, upstream=upstream) as proxy:
        clients = held_streams(proxy, connect, 50)
        stopping = Later(proxy.server.stop)
        assert proxy.server.http.stopping.wait(TIMEOUT)
        upstream.open("on")
        assert all(client.is_whole() for client in clients)
        assert {client.body for client in clients} == {b"".join(events(*words("a", "b")))}
        stopping.result()
        for client in clients:
            client.close()
    assert [(outcome(call), content(call)) for call in proxy.trajectory()] == [((200, False), "ab")] * 50
    wait_until(lambda: upstream.connections() == 0)
