"""What a proxy passes on, over real sockets: byte for byte, to where it should go, without keys, or not at all."""

import base64
import contextlib
import gzip
import json
import os
import re
import select
import shutil
import socket
import socketserver
import subprocess
from urllib.parse import quote

import pytest

from rock_ms import HOLD_BYTES, MAX_HEAD_BYTES, UsageError
from support import TIMEOUT, Proxy, Service, ask, chat, clean_environ, nothing_left, running, serving, talk, wait_until
from upstream import Upstream, answer, chunk, chunked, sse, words

CHAT = "/v1/chat/completions"
BINARY = bytes(range(256))


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    """No HTTP proxy of the surroundings takes part."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


class Answer:
    """An answer as the bytes that came."""

    def __init__(self, data):
        self.head, _, self.rest = data.partition(b"\r\n\r\n")
        first, *lines = self.head.decode("latin-1").split("\r\n")
        self.status = int(first.split(" ")[1])
        self.fields = [tuple(line.split(": ", 1)) for line in lines]

    def values(self, name):
        return [value for key, value in self.fields if key.lower() == name]

    def names(self):
        return {key.lower() for key, _ in self.fields}

    @property
    def body(self):
        """What is behind the header, as that says."""
        if self.values("transfer-encoding") == ["chunked"]:
            return unchunked(self.rest)
        assert self.values("content-length") == [str(len(self.rest))]
        return self.rest

    def error(self):
        (error,) = json.loads(self.body.decode("utf-8")).values()
        assert sorted(error) == ["code", "message", "param", "type"]
        return error


def unchunked(data):
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        assert data[length : length + 2] == b"\r\n"
        if not length:
            assert data == b"\r\n"
            return body
        body, data = body + data[:length], data[length + 2 :]


def request(method="POST", target=CHAT, *lines, body=None):
    """A request as bytes.  lines: of the header, more of them.  body: bytes, None for no Content-Length either."""
    if body is None and method in ("POST", "PUT", "PATCH"):
        body = b""
    lines = ["%s %s HTTP/1.1" % (method, target), "Host: agent", "Connection: close", *lines]
    lines += [] if body is None else ["Content-Length: %d" % len(body)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def call(proxy, *words, body=None):
    return Answer(talk(proxy.port, request(*words, body=body)))


def raw(*lines, body=""):
    """A step that sends these lines, and a body behind them.  All of it latin-1."""
    return {"send": "\r\n".join([*lines, "", body])}


def ok(*lines, body="{}"):
    """A step that sends an answer with these lines more, and a body of known length."""
    return raw("HTTP/1.1 200 OK", "Content-Length: %d" % len(body), *lines, body=body)


def values(request, name):
    return [value for key, value in request["headers"] if key == name]


class Wire:
    """A proxy and its upstream that several tests share."""

    def __init__(self, proxy, upstream):
        self.proxy, self.upstream = proxy, upstream

    def __call__(self, *words, body=None, script=None):
        """Ask; return the answer and the request that the upstream saw."""
        count = len(self.upstream.seen())
        if script is not None:
            self.upstream.script(script)
        got = call(self.proxy, *words, body=body)
        seen = self.upstream.seen()[count:]
        assert len(seen) == 1, (got.head, got.rest)
        return got, seen[0]

    def refuse(self, *words, body=None):
        """Ask for what must not reach the upstream."""
        count = len(self.upstream.seen())
        got = call(self.proxy, *words, body=body)
        assert self.upstream.seen()[count:] == []
        return got

    def record(self):
        return self.proxy.trajectory()[-1]


@pytest.fixture(scope="module")
def wire(tmp_path_factory, upstreams):  # noqa: ARG001
    """One attempt a call.  Not for tests of what outlives a call.  It ends before `upstreams` do, and begins after."""
    upstream = Upstream()
    with contextlib.closing(upstream):
        with running(tmp_path_factory.mktemp("wire"), Proxy, upstream=upstream, max_attempts=1) as proxy:
            yield Wire(proxy, upstream)


class Middleman(socketserver.ThreadingTCPServer):
    """An HTTP proxy: connects to where `CONNECT` or an absolute target says, and carries bytes both ways.

    refusal: what it answers instead.  leads_to: where all goes, whatever is asked for.  heads: what it was asked.
    """

    daemon_threads = True

    def __init__(self, refusal=None):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.refusal, self.leads_to, self.heads = refusal, None, []
        self.port = self.server_address[1]
        self.url = "http://127.0.0.1:%d" % self.port

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            head = b""
            while b"\r\n\r\n" not in head and head[:1] != b"\x16":  # which begins TLS
                head += self.request.recv(65536) or b"\r\n\r\n"
            self.server.heads.append(head.partition(b"\r\n\r\n")[0].decode("latin-1"))
            if self.server.refusal:
                self.request.sendall(self.server.refusal.encode())
                return
            method, target, _ = head.decode("latin-1").split(" ", 2)
            named = re.match(r"(?:http://)?([^:/]+):([0-9]+)", target)
            with socket.create_connection(self.server.leads_to or named.groups(), TIMEOUT) as other:
                if method == "CONNECT":
                    self.request.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
                else:
                    other.sendall(head)
                self._carry(other)

        def _carry(self, other):
            with contextlib.suppress(OSError):
                while True:
                    for sock in select.select([self.request, other], [], [])[0]:
                        data = sock.recv(65536)
                        if not data:
                            return
                        (other if sock is self.request else self.request).sendall(data)


def middleman(**options):
    return serving(Middleman(**options))


# ----------------------------------------------------------------------------------------------------------------------
# Requests.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [None, b'{"a" : 1}'], ids=["empty", "body"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PURGE", "x-odd!"])
def test_method_passes(wire, method, body):
    got, seen = wire(method, "/v1/things/7", body=body)
    assert (seen["method"], seen["target"], seen["body"]) == (method, "/v1/things/7", body or b"")
    assert (got.status, wire.record()["method"]) == (200, method)


@pytest.mark.parametrize("method, length", [("GET", []), ("DELETE", []), ("POST", ["0"]), ("PUT", ["0"])])
def test_empty_body_has_a_length_where_the_method_means_one(wire, method, length):
    assert values(wire(method)[1], "content-length") == length


def test_post_that_says_nothing_of_a_body_has_none(wire):
    got = Answer(talk(wire.proxy.port, request("POST", CHAT).replace(b"Content-Length: 0\r\n", b"")))
    seen = wire.upstream.seen()[-1]
    assert (got.status, seen["body"], values(seen, "content-length")) == (200, b"", ["0"])


TARGETS = {
    "/v1/x": "/v1/x",
    "/v1/x/": "/v1/x/",
    "/v1//x//": "/v1//x//",
    "/v1/files/a%2Fb%20%C3%a4": "/v1/files/a%2Fb%20%C3%a4",
    "/v1/x?a=1&a=%32&&b=c?d/../e": "/v1/x?a=1&a=%32&&b=c?d/../e",
    "/v1/x/?q": "/v1/x/?q",
    "/v1/~a;b=c,d:e@f!$'()*+|": "/v1/~a;b=c,d:e@f!$'()*+|",
    "/v1/..hidden/a../...": "/v1/..hidden/a../...",
    "http://elsewhere:1/v1/x?y": "/v1/x?y",
}


@pytest.mark.parametrize("target, expected", TARGETS.items())
def test_target_passes(wire, target, expected):
    got, seen = wire("GET", target)
    assert (got.status, seen["target"]) == (200, expected)


def test_empty_query_passes(wire):
    assert wire("GET", "/v1/x?")[1]["target"] == "/v1/x?"


MULTIPART = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + BINARY + b"\r\n--b--\r\n"
BODIES = {  # the body, its type, and what is recorded: the value, and what kind of
    "odd JSON": (
        b' {"model" :\t"m",\r\n "n":1.0e+2, "n":2,"s":"\\u00e9\\/\xc3\xa9 \\ud800" }\n',
        "application/json",
        {"model": "m", "n": 2, "s": "\u00e9/\u00e9 \ud800"},
        None,
    ),
    "array": (b"[1 ,2]", "application/json", [1, 2], None),
    "invalid JSON": (b'{"model": "m",}', "application/json", '{"model": "m",}', "text"),
    "NaN": (b'{"a": NaN}', "application/json", '{"a": NaN}', "text"),
    "text": (b"plain\r\n\x00text", "text/plain", "plain\r\n\x00text", "text"),
    "multipart": (MULTIPART, "multipart/form-data; boundary=b", base64.b64encode(MULTIPART).decode(), "base64"),
    "not UTF-8": (b'{"a": "\xff"}', "application/json", base64.b64encode(b'{"a": "\xff"}').decode(), "base64"),
    "empty": (b"", "application/json", None, None),
}


@pytest.mark.parametrize("body, kind, value, form", BODIES.values(), ids=BODIES)
def test_request_body_passes_and_is_recorded(wire, body, kind, value, form):
    _, seen = wire("POST", CHAT, "Content-Type: " + kind, body=body)
    assert seen["body"] == body
    assert (values(seen, "content-type"), values(seen, "content-length")) == ([kind], [str(len(body))])
    assert (wire.record()["request"], wire.record().get("request_format")) == (value, form)


def test_compressed_request_passes(wire):
    body = gzip.compress(b'{"model": "m"}')
    _, seen = wire("POST", CHAT, "Content-Encoding: gzip", body=body)
    assert (seen["body"], values(seen, "content-encoding")) == (body, ["gzip"])


def test_chunked_request_arrives_with_its_length(wire):
    data = request("PATCH", CHAT, "Transfer-Encoding: chunked", "Trailer: X-Sum", body=b"")
    data = data.replace(b"Content-Length: 0\r\n", b"") + b'3;ext="a"\r\n{"a\r\n0004\r\n":1}\r\n0\r\nX-Sum: 7\r\n\r\n'
    got = Answer(talk(wire.proxy.port, data))
    seen = wire.upstream.seen()[-1]
    assert (got.status, seen["method"], seen["body"]) == (200, "PATCH", b'{"a":1}')
    assert (values(seen, "content-length"), values(seen, "transfer-encoding")) == (["7"], [])
    assert not {"trailer", "x-sum"} & {name for name, _ in seen["headers"]}


def test_expectation_is_met_here(wire):
    """The body is sent when the interim answer has come."""
    head, _, body = request("POST", CHAT, "Expect: 100-continue", body=b"{}").partition(b"\r\n\r\n")
    with socket.create_connection(("127.0.0.1", wire.proxy.port), TIMEOUT) as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(1024) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert b"".join(iter(lambda: sock.recv(65536), b"")).startswith(b"HTTP/1.1 200 ")
    seen = wire.upstream.seen()[-1]
    assert (seen["body"], values(seen, "expect")) == (b"{}", [])


def test_pipelined_requests_are_answered_in_order(wire):
    first = request("GET", "/v1/first").replace(b"Connection: close\r\n", b"")
    got = talk(wire.proxy.port, first + request("GET", "/v1/second"))
    assert got.count(b"HTTP/1.1 200 ") == 2
    assert [seen["target"] for seen in wire.upstream.seen()[-2:]] == ["/v1/first", "/v1/second"]


# ----------------------------------------------------------------------------------------------------------------------
# Answers.
# ----------------------------------------------------------------------------------------------------------------------

LATIN = BINARY.decode("latin-1")
CHUNKED = "Transfer-Encoding: chunked"
ANSWERS = {  # script, status, body
    "length": (ok("Content-Type: application/json", body=' {"a" :\t1.0e2}\n'), 200, b' {"a" :\t1.0e2}\n'),
    "binary": (ok("Content-Type: audio/mpeg", body=LATIN), 200, BINARY),
    "empty": (ok(body=""), 200, b""),
    "same length twice": (ok("Content-Length: 2", body="{}"), 200, b"{}"),
    "chunks": (
        [raw("HTTP/1.1 200 OK", CHUNKED), {"send": chunk(LATIN) + "0003;a=b\r\nabc\r\n00\r\nX-Sum: 7\r\n\r\n"}],
        200,
        BINARY + b"abc",
    ),
    "chunks in drips": ({"drip": "HTTP/1.1 200 OK\r\n%s\r\n\r\n%s0\r\n\r\n" % (CHUNKED, chunk(LATIN))}, 200, BINARY),
    "length in drips": ({"drip": "HTTP/1.1 200 OK\r\nContent-Length: 256\r\n\r\n" + LATIN, "size": 7}, 200, BINARY),
    "until closed": ([raw("HTTP/1.1 200 OK", body=LATIN), {"close": True}], 200, BINARY),
    "HTTP/1.0": ([raw("HTTP/1.0 200 OK", body="[]"), {"close": True}], 200, b"[]"),
    "interim": ([raw("HTTP/1.1 103 Early Hints", "Link: </a>"), ok(body="{}")], 200, b"{}"),
    "no reason": (raw("HTTP/1.1 404", "Content-Length: 4", body="gone"), 404, b"gone"),
    "unknown status": (raw("HTTP/1.1 299 Odd", "Content-Length: 1", body="x"), 299, b"x"),
    "error page": (raw("HTTP/1.1 503 x", "Content-Length: 9", body="<html>\r\n\xff"), 503, b"<html>\r\n\xff"),
    "more than is held": (ok(body="x" * (HOLD_BYTES + 9)), 200, b"x" * (HOLD_BYTES + 9)),
    "more than is held, chunked": (chunked("x" * HOLD_BYTES, "yz"), 200, b"x" * HOLD_BYTES + b"yz"),
}


@pytest.mark.parametrize("script, status, body", ANSWERS.values(), ids=ANSWERS)
def test_answer_passes(wire, script, status, body):
    """Its body and its status, one way of saying how long it is, and the proxy's log says the same."""
    got, _ = wire("GET", "/v1/models/m", script=script if isinstance(script, list) else [script])
    assert (got.status, got.body) == (status, body)
    assert len(got.values("content-length") + got.values("transfer-encoding")) == 1
    assert " %d " % status in wire.proxy.logged[-1]
    assert " %dB " % len(body) in wire.proxy.logged[-1]
    assert not {"x-sum", "link"} & got.names()


BODILESS = {  # method, lines of the answer, the framing that the client gets
    "204": ("GET", ["HTTP/1.1 204 x"], []),
    "304": ("GET", ["HTTP/1.1 304 x", 'ETag: "a"'], []),
    "304 with the length of what is not sent": ("GET", ["HTTP/1.1 304 x", "Content-Length: 99"], ["99"]),
    "HEAD with a length": ("HEAD", ["HTTP/1.1 200 x", "Content-Length: 1234"], ["1234"]),
    "HEAD of chunks": ("HEAD", ["HTTP/1.1 200 x", CHUNKED], ["chunked"]),
    "HEAD of an error": ("HEAD", ["HTTP/1.1 404 x", "Content-Length: 7"], ["7"]),
}


@pytest.mark.parametrize("method, lines, framing", BODILESS.values(), ids=BODILESS)
def test_answer_without_a_body_passes(wire, method, lines, framing):
    got, seen = wire(method, "/v1/x", script=[raw(*lines)])
    assert (seen["method"], got.status, got.rest) == (method, int(lines[0].split()[1]), b"")
    assert got.values("content-length") + got.values("transfer-encoding") == framing
    assert wire("GET", "/v1/x")[1]["connection"] == seen["connection"]  # no byte was waited for


def test_head_without_a_length_stays_so(wire):
    got, _ = wire("HEAD", "/v1/x", script=[raw("HTTP/1.1 200 x", "ETag: a")])
    assert got.values("content-length") == []


def test_204_never_says_chunked(wire):
    """RFC 9112, section 6.1: a client that takes it at its word would wait for the last chunk."""
    got, _ = wire("GET", "/v1/x", script=[raw("HTTP/1.1 204 x", CHUNKED, body="0\r\n\r\n")])
    assert (got.rest, got.values("transfer-encoding")) == (b"", [])


def test_gzip_passes_as_it_is_and_is_recorded_as_what_it_holds(wire):
    body = gzip.compress(json.dumps(chat("hi")).encode())
    script = [ok("Content-Encoding: gzip", body=body.decode("latin-1"))]
    got, seen = wire("POST", CHAT, "Accept-Encoding: deflate, gzip;q=0.5, br", script=script)
    assert values(seen, "accept-encoding") == ["gzip"]
    assert (got.body, got.values("content-encoding")) == (body, ["gzip"])
    assert wire.record()["response"] == chat("hi")


ACCEPTED = {
    "gzip": "gzip",
    "GZIP": "gzip",
    "br, x-gzip": "gzip",
    "gzip;q=0.001": "gzip",
    "gzip ; q=1": "gzip",
    "br, zstd": "identity",
    "gzip;q=0": "identity",
    "gzip; q=0.000, br": "identity",
    "identity": "identity",
    "": "identity",
    None: "identity",
}


@pytest.mark.parametrize("accepted, asked", ACCEPTED.items())
def test_gzip_is_asked_for_where_the_client_takes_it(wire, accepted, asked):
    lines = [] if accepted is None else ["Accept-Encoding: " + accepted]
    assert values(wire("POST", CHAT, *lines)[1], "accept-encoding") == [asked]


def test_answer_outlives_nothing_but_itself(wire):
    """The upstream's `Connection: close` is not the client's."""
    wire.upstream.script(ok("Connection: close"), ok("Connection: close"))
    first = request("GET", "/v1/x").replace(b"Connection: close\r\n", b"")
    got = talk(wire.proxy.port, first + request("GET", "/v1/x"))
    assert got.count(b"Connection: close") == 1
    assert got.count(b"HTTP/1.1 200 ") == 2


def test_client_of_http_1_0_gets_no_chunks(wire):
    """Neither of what was held nor of what was not."""
    for count in (5, HOLD_BYTES):
        wire.upstream.script(chunked("x" * count, "yz"))
        got = Answer(talk(wire.proxy.port, b"GET /v1/x HTTP/1.0\r\n\r\n"))
        assert (got.rest, got.values("transfer-encoding")) == (b"x" * count + b"yz", [])


# ----------------------------------------------------------------------------------------------------------------------
# Header fields.
# ----------------------------------------------------------------------------------------------------------------------

HOP_BY_HOP = [
    "Connection: X-Mine , keep-alive",
    "connection: x-other,,",
    "X-Mine: 1",
    "x-OTHER: 2",
    "Keep-Alive: timeout=5",
    "TE: trailers",
    "Trailer: X-Sum",
    "Upgrade: h2c, websocket",
    "Proxy-Connection: keep-alive",
    "Proxy-Authorization: Basic eDp5",
    "Proxy-Authenticate: Basic",
]
BOUND = {line.partition(":")[0].lower() for line in HOP_BY_HOP}
END_TO_END = [
    ("X-Request-Id", "r-1"),
    ("OpenAI-Processing-Ms", "12"),
    ("Set-Cookie", "a=1; Path=/"),
    ("Set-Cookie", "b=2, c"),
    ("set-cookie", "a=1; Path=/"),
    ("X-Latin", "caf\xe9 \xa0\xff"),
    ("X-Empty", ""),
    ("X-Odd!#$%&'*+-.^_`|~", 'a\tb  c:"d"'),
    ("Upgrade-Insecure-Requests", "1"),
]


def test_request_fields_pass_but_those_of_the_connection(wire):
    lines = HOP_BY_HOP + ["%s: %s" % pair for pair in END_TO_END] + ["Accept: */*", "User-Agent:   a b \t"]
    _, seen = wire("POST", CHAT, *lines)
    passed = [tuple(pair) for pair in seen["headers"]]
    expected = [(name.lower(), value) for name, value in END_TO_END] + [("accept", "*/*"), ("user-agent", "a b")]
    assert [pair for pair in passed if pair in expected] == expected
    added = {"host", "accept-encoding", "content-length", "via"}
    assert sorted(name for name, _ in passed) == sorted([name for name, _ in expected] + list(added))


def test_answer_fields_pass_but_those_of_the_connection(wire):
    script = [ok(*HOP_BY_HOP, *["%s: %s" % pair for pair in END_TO_END], "Date: then", "Server: s")]
    got, _ = wire("POST", CHAT, script=script)
    expected = [*END_TO_END, ("Date", "then"), ("Server", "s")]
    assert [pair for pair in got.fields if pair in expected] == expected
    assert got.names() & BOUND == {"connection"}  # the proxy's own
    assert got.values("connection") == ["close"]
    assert len(got.fields) == len(expected) + 2  # Connection and Content-Length


def test_answer_without_a_date_gets_one(wire):
    assert len(wire("POST", CHAT)[0].values("date")) == 1


def test_via_is_added_behind_those_that_are_there(wire):
    _, seen = wire("POST", CHAT, "Via: 1.0 a, 1.1 b", "Via: 1.1 c")
    assert re.match(r"1\.0 a, 1\.1 b, 1\.1 c, 1\.1 rock-[0-9a-f]{8}\Z", ", ".join(values(seen, "via")))
    assert re.match(r"1\.1 rock-[0-9a-f]{8}\Z", values(wire("POST", CHAT)[1], "via")[0])


def test_host_is_the_upstreams(wire):
    _, seen = wire("POST", CHAT, "X-Forwarded-Host: kept")
    assert values(seen, "host") == ["127.0.0.1:%d" % wire.upstream.port]
    assert values(seen, "x-forwarded-host") == ["kept"]


def test_call_to_itself_is_refused(tmp_path):
    with middleman() as relay:
        with running(tmp_path, Proxy, proxy_base_url=relay.url + "/v1") as proxy:
            relay.leads_to = ("127.0.0.1", proxy.port)
            got = proxy.ask(chat())
            assert (got.status, got.json()["error"]["code"]) == (508, "loop_detected")
            assert [(record["status"], record["attempts"]) for record in proxy.trajectory()] == [(508, 0), (508, 1)]
    assert len(relay.heads) == 1


def test_two_proxies_in_a_row_are_no_loop(tmp_path, wire):
    with running(tmp_path, Proxy, proxy_base_url="http://127.0.0.1:%d/v1" % wire.proxy.port) as outer:
        assert outer.ask(chat()).status == 200
    assert values(wire.upstream.seen()[-1], "via")[0].count("1.1 rock-") == 2


# ----------------------------------------------------------------------------------------------------------------------
# Routing.
# ----------------------------------------------------------------------------------------------------------------------


def origin(upstream):
    return "http://127.0.0.1:%d" % upstream.port


@pytest.fixture
def routed(tmp_path, upstream):
    """A function: a proxy with rules whose paths under the upstream are given; see `targets`."""
    with contextlib.ExitStack() as stack:

        def routed(paths, **settings):
            rules = {model: origin(upstream) + path for model, path in paths.items()}
            return stack.enter_context(running(tmp_path, Proxy, proxy_rules=rules, **settings))

        yield routed


ROUTES = [  # method, path, body, target
    ("POST", CHAT, b'{"model": "a"}', "/of-a/v1/chat/completions"),
    ("POST", CHAT, b'{"model": "org/b.c:7"}', "/api/v3/chat/completions"),
    ("POST", CHAT, b'{"model": "\\u0061"}', "/of-a/v1/chat/completions"),
    ("POST", "/v1/embeddings?x=1", b'{"model": "bare"}', "/embeddings?x=1"),
    ("POST", CHAT, b'{"model": "other"}', "/else/chat/completions"),
    ("POST", CHAT, b'{"model": "A"}', "/else/chat/completions"),
    ("POST", CHAT, b'{"model": 7}', "/else/chat/completions"),
    ("POST", CHAT, b'{"model": ["a"]}', "/else/chat/completions"),
    ("POST", CHAT, b'{"model": null}', "/else/chat/completions"),
    ("POST", CHAT, b'{"model": ""}', "/else/chat/completions"),
    ("POST", CHAT, b'["a"]', "/else/chat/completions"),
    ("POST", CHAT, b'{"model": "a",}', "/else/chat/completions"),
    ("POST", CHAT, b"model=a", "/else/chat/completions"),
    ("GET", "/v1/files", None, "/else/files"),
    ("GET", "/v1/models", None, "/else/models"),
    ("GET", "/v1/models?after=x", None, "/else/models?after=x"),
    ("GET", "/v1/models/a", None, "/of-a/v1/models/a"),
    ("GET", "/v1/models/org%2Fb.c:7", None, "/api/v3/models/org%2Fb.c:7"),
    ("GET", "/v1/models/org/b.c:7", None, "/api/v3/models/org/b.c:7"),
    ("DELETE", "/v1/models/other", None, "/else/models/other"),
]


def test_model_says_where_a_call_goes(routed, upstream):
    proxy = routed({"a": "/of-a/v1", "org/b.c:7": "/api/v3/", "bare": "", "default": "/else"})
    for method, path, body, _ in ROUTES:
        assert call(proxy, method, path, body=body).status == 200, (method, path, body)
    assert [seen["target"] for seen in upstream.seen()] == [target for _, _, _, target in ROUTES]
    assert [seen["body"] for seen in upstream.seen()] == [body or b"" for _, _, body, _ in ROUTES]
    asked = [path for method, path, _, _ in ROUTES if method not in ("GET", "HEAD") or "/v1/models" not in path]
    recorded = [path.partition("?")[0] for path in asked]
    assert [record["path"] for record in proxy.trajectory()] == recorded


def test_base_url_wins_over_rules(routed, upstream):
    proxy = routed({"a": "/of-a", "default": "/else"}, proxy_base_url=origin(upstream) + "/api/v3")
    assert proxy.ask(chat(model="a")).status == 200
    assert upstream.seen()[0]["target"] == "/api/v3/chat/completions"


@pytest.mark.parametrize(
    "model, said",
    [
        ("other", '"other"'),
        ("b\u00e9\n", '"b\u00e9\\n"'),
    ],
)
def test_call_without_a_rule_is_refused_and_recorded(routed, upstream, model, said):
    proxy = routed({"a": "/of-a", "b": ""})
    got = proxy.ask(chat(model=model))
    error = got.json()["error"]
    assert (got.status, error["param"], error["code"]) == (400, "model", "model_not_found")
    assert "the model %s," % said in error["message"]
    assert "a, b" in error["message"]
    (record,) = proxy.trajectory()
    assert (record["status"], record["error"], record["request"]) == (400, error["message"], chat(model=model))
    assert (record["response"], record["attempts"], upstream.seen()) == (None, 0, [])


def test_models_without_a_default_are_the_rules(routed, upstream):
    proxy = routed({"a": "/of-a", "org/b": "/of-b"})
    for path in ("/v1/models", "/v1/models/", "/v1/models?x=1"):
        got = call(proxy, "GET", path)
        assert [model["id"] for model in json.loads(got.body.decode())["data"]] == ["a", "org/b"]
    assert call(proxy, "HEAD", "/v1/models").rest == b""
    assert upstream.seen() == []
    assert call(proxy, "GET", "/v1/models/org%2Fb").status == 200
    assert call(proxy, "GET", "/v1/models/c").error()["code"] == "model_not_found"
    assert [seen["target"] for seen in upstream.seen()] == ["/of-b/models/org%2Fb"]
    assert proxy.trajectory() == []


# ----------------------------------------------------------------------------------------------------------------------
# Keys.
# ----------------------------------------------------------------------------------------------------------------------


def a_key():
    return "sk-" + base64.b16encode(os.urandom(24)).decode()


KEY_HEADERS = ("authorization", "x-api-key", "api-key", "x-goog-api-key")


def keys_sent(upstream):
    """The fields with keys of the last request that the upstream saw."""
    return sorted((name, value) for name, value in upstream.seen()[-1]["headers"] if name in KEY_HEADERS)


AGENTS_KEYS = {
    "bearer": {"authorization": "Bearer agents"},
    "basic": {"authorization": "Basic YTpi"},
    "x-api-key": {"x-api-key": "agents"},
    "api-key": {"api-key": "agents"},
    "both": {"authorization": "Bearer agents", "x-api-key": "agents"},
    "none": {},
}


@pytest.mark.parametrize("headers", AGENTS_KEYS.values(), ids=AGENTS_KEYS)
def test_agents_key_passes(wire, headers):
    wire("POST", CHAT, *["%s: %s" % pair for pair in headers.items()])
    assert keys_sent(wire.upstream) == sorted(headers.items())


def test_upstreams_key_takes_the_place_of_the_agents(tmp_path, upstream):
    key = a_key()
    with running(tmp_path, Proxy, upstream=upstream, upstream_api_key=key) as proxy:
        for headers in AGENTS_KEYS.values():
            assert proxy.ask(chat(), headers=headers).status == 200
            names = sorted(headers) or ["authorization"]
            expected = [(name, "Bearer " + key if name == "authorization" else key) for name in names]
            assert keys_sent(upstream) == expected


def test_services_own_key_is_asked_for_and_stays_here(tmp_path, upstream):
    own, agents = a_key(), a_key()
    with running(tmp_path, Proxy, upstream=upstream, api_key=own) as proxy:
        for wrong in ({}, {"Authorization": "Bearer " + agents}, {"Authorization": "Basic " + own}, {"X-Api-Key": own}):
            got = proxy.ask(chat(), headers=wrong)
            assert (got.status, got.json()["error"]["code"]) == (401, "invalid_api_key")
        assert upstream.seen() == []
        headers = {"Authorization": "Bearer " + own, "X-Api-Key": agents}
        assert proxy.ask(chat(), headers=headers).status == 200
    assert keys_sent(upstream) == [("x-api-key", agents)]
    assert own not in str(upstream.seen())
    assert len(proxy.trajectory()) == 1  # what is not let in is no call


def test_upstreams_key_takes_the_place_of_the_services_own(tmp_path, upstream):
    own, key = a_key(), a_key()
    with running(tmp_path, Proxy, upstream=upstream, api_key=own, upstream_api_key=key) as proxy:
        assert proxy.ask(chat(), headers={"Authorization": "Bearer " + own}).status == 200
    assert keys_sent(upstream) == [("authorization", "Bearer " + key)]


def texts(value):
    """All texts in a JSON value."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


def assert_nowhere(directory, secrets, *logged):
    """Assert that no file and no text has any of the secrets, whichever way JSON writes it."""
    kept = list(logged)
    for folder, _, names in os.walk(str(directory)):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                kept.append(file.read().decode("latin-1"))
            if name.endswith((".json", ".jsonl")):
                kept += [text for line in kept[-1].splitlines() for text in texts(json.loads(line))]
    assert [secret for secret in secrets for text in kept if secret in text] == []


def echo(secret, size=5):
    """Ways of an upstream to send a secret back: a name, and a script."""
    error = {"error": {"message": "Incorrect API key provided: %s." % secret}}
    pieces = [secret[start : start + size] for start in range(0, len(secret), size)]
    yield "answer", [answer({"said": secret, secret: [1]})]
    yield "error", [answer(error, 401)]
    yield "error that is retried", [answer(error, 429)]
    yield "text", [answer("Bearer " + secret, 403, headers={"Content-Type": "text/plain"})]
    yield "chunks", chunked(*json.dumps(error).partition(secret)[:1], *pieces, '."}}')
    yield "deltas", sse(*words("the key is ", *pieces))
    yield "drips", [{"drip": sse(*words("it is " + secret))[0]["send"], "size": 7}, *sse(*words(secret))[1:]]
    yield "error event", sse(error, done=False)
    yield "status line", [raw("HTTP/1.1 401 " + secret, "Content-Length: 0")]
    yield "header", [ok("X-Echo: " + secret, "Content-Type: text/" + secret)]
    yield "broken", [raw("HTTP/1.1 200 OK", "Content-Length: 999", body='{"a": "%s' % secret), {"close": True}]
    yield "broken stream", [*sse(*words(secret))[:3], {"close": True}]
    yield "malformed line", [raw("HTTP/1.1 200 OK", secret)]
    yield "malformed length", [raw("HTTP/1.1 200 OK", "Content-Length: " + secret)]


WHOSE = ["agent's", "agent's x-api-key", "upstream's", "service's own"]


@pytest.mark.parametrize("whose", WHOSE)
def test_no_key_is_kept_whatever_the_upstream_sends_back(tmp_path, upstream, whose):
    """None of the keys is in a file or a log line.  The client gets them as they came."""
    agents, key, own = a_key(), a_key(), a_key()
    settings = {"upstream_api_key": key if whose == "upstream's" else None}
    headers = {"x-api-key" if whose == "agent's x-api-key" else "authorization": "Bearer " + agents}
    secret = key if whose == "upstream's" else agents
    if whose == "service's own":
        settings["api_key"] = secret = own
        headers = {"authorization": "Bearer " + own, "x-api-key": agents}
    with running(tmp_path, Proxy, upstream=upstream, max_attempts=2, **settings) as proxy:
        for name, script in echo(secret):
            body = json.dumps({"model": name, "stream": True, "script": script}).encode()
            got = talk(proxy.port, request("POST", CHAT, *["%s: %s" % pair for pair in headers.items()], body=body))
            assert re.match(rb"HTTP/1.1 [0-9]{3} ", got), name
    kept = {record["model"] for record in proxy.trajectory() if "[key]" in str([record["response"], record["error"]])}
    assert kept >= {"answer", "error", "error that is retried", "text", "chunks", "deltas", "drips", "broken stream"}
    assert_nowhere(tmp_path, (agents, key, own), *proxy.logged)


def test_key_that_json_writes_with_escapes_is_not_kept(tmp_path, upstream):
    """The same text can be written in more than one way, and servers do: as `\\/` (PHP), as `\\u002B` (.NET)."""
    key = a_key() + "/and+more"
    body = json.dumps({"said": key}).replace("/", "\\/").replace("+", "\\u002B")
    with running(tmp_path, Proxy, upstream=upstream, upstream_api_key=key) as proxy:
        upstream.script(answer(body))
        assert proxy.ask(chat()).json() == {"said": key}
    assert_nowhere(tmp_path, [key])


def test_key_with_a_quote_in_it_is_not_kept(tmp_path, upstream):
    """`upstream_api_key` may be any printable ASCII."""
    key = a_key() + '"\\'
    with running(tmp_path, Proxy, upstream=upstream, upstream_api_key=key) as proxy:
        upstream.script(answer({"error": {"message": "unknown key " + key}}, 401))
        assert proxy.ask(chat()).status == 401
    assert_nowhere(tmp_path, [key], *proxy.logged)


def test_key_that_begins_as_another_is_not_kept(tmp_path, upstream):
    key = a_key()
    longer = key + "-and-more"
    with running(tmp_path, Proxy, upstream=upstream, upstream_api_key=key) as proxy:
        upstream.script(answer({"said": longer}))
        assert proxy.ask(chat(), headers={"Authorization": "Bearer " + longer}).json() == {"said": longer}
    assert_nowhere(tmp_path, [key, "-and-more"])


def test_key_as_a_field_name_of_a_malformed_answer_is_not_logged(tmp_path, upstream):
    key = a_key()
    with running(tmp_path, Proxy, upstream=upstream, upstream_api_key=key, max_attempts=2) as proxy:
        script = [raw("HTTP/1.1 200 OK", key + ": \x01")]
        upstream.script(script, script)
        assert proxy.ask(chat()).status == 502
    assert_nowhere(tmp_path, [key], *proxy.logged)


def test_key_in_a_binary_answer_is_not_kept_in_base64(tmp_path, upstream):
    key = a_key()
    with running(tmp_path, Proxy, upstream=upstream, upstream_api_key=key) as proxy:
        upstream.script(ok("Content-Type: audio/mpeg", body="\xff" + key))
        assert proxy.ask(chat()).body == b"\xff" + key.encode()
    (record,) = proxy.trajectory()
    assert key.encode() not in base64.b64decode(record["response"])


def test_started_proxy_keeps_no_key_and_shows_none(cli, tmp_path, upstream):
    """Through the command line: its state, its log, what it prints and its command line."""
    key, own, agents = a_key(), a_key(), a_key()
    environ = clean_environ(ROCK_MODEL_SERVICE_UPSTREAM_API_KEY=key, ROCK_MODEL_SERVICE_API_KEY=own)
    options = ["--type", "proxy", "--host", "127.0.0.1", "--port", "0", "--proxy-base-url", upstream.url]
    started = cli("start", *options, env=environ, check=0)
    upstream.script(answer({"error": {"message": "%s %s %s" % (key, own, agents)}}, 401))
    state = json.loads((tmp_path / "data" / "LLMService.json").read_text())
    got = ask(state["port"], chat(), headers={"Authorization": "Bearer " + own, "x-api-key": agents})
    assert (got.status, keys_sent(upstream)) == (401, [("authorization", "Bearer " + key), ("x-api-key", key)])
    status = cli("status", env=environ)
    stopped = cli("stop", env=environ, check=0)
    printed = [done.out + done.err for done in (started, status, stopped)]
    assert_nowhere(tmp_path, (key, own, agents), *printed)
    assert "[key] [key] [key]" in (tmp_path / "data" / "LLMTraj.jsonl").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Overrides.
# ----------------------------------------------------------------------------------------------------------------------

OVERRIDES = {"temperature": 1.0, "logprobs": True, "extra": {"a": [None, "\u00e9"]}, "n": None}


@pytest.fixture
def overriding(tmp_path, upstream):
    with running(tmp_path, Proxy, upstream=upstream, request_overrides=OVERRIDES) as proxy:
        yield proxy


def test_overrides_are_set_in_objects(overriding, upstream):
    given = chat("caf\u00e9 \ud800", temperature=0.25, seed=12345678901234567890123, tiny=1.5e-300)
    body = json.dumps(given, indent=1).encode()
    assert call(overriding, "POST", CHAT, "Content-Type: application/json", body=body).status == 200
    (seen,), (record,) = upstream.seen(), overriding.trajectory()
    sent = json.loads(seen["body"].decode())
    assert sent == {**given, **OVERRIDES} == record["request"]
    assert record["overridden"] == list(OVERRIDES)
    assert values(seen, "content-length") == [str(len(seen["body"]))]
    assert list(sent)[:3] == ["model", "messages", "temperature"]  # in the agent's order


def test_overrides_leave_other_bodies_alone(overriding, upstream):
    bodies = [b"", b'[{"a" : 1}]', b'{"a": 1,}', b'"{}"', b"7", MULTIPART, b"a=1"]
    for body in bodies:
        assert call(overriding, "POST", CHAT, body=body).status == 200
    assert [seen["body"] for seen in upstream.seen()] == bodies
    assert [record for record in overriding.trajectory() if "overridden" in record] == []


def test_overrides_leave_compressed_bodies_alone(overriding, upstream):
    body = gzip.compress(b"{}")
    assert call(overriding, "POST", CHAT, "Content-Encoding: gzip", body=body).status == 200
    assert upstream.seen()[0]["body"] == body


def test_overrides_keep_a_number_that_no_float_holds(overriding, upstream):
    """1e400 is JSON; Infinity is not."""
    assert call(overriding, "POST", CHAT, body=b'{"a": 1e400}').status == 200
    assert b"Infinity" not in upstream.seen()[0]["body"]


def test_override_of_the_model_says_where_a_call_goes(routed, upstream):
    proxy = routed({"a": "/of-a", "default": "/else"}, request_overrides={"model": "a"})
    assert proxy.ask(chat(model="b")).status == 200
    assert upstream.seen()[0]["target"] == "/of-a/chat/completions"


def test_override_of_the_stream_field_is_recorded_as_sent(tmp_path, upstream):
    with running(tmp_path, Proxy, upstream=upstream, request_overrides={"stream": False, "model": "b"}) as proxy:
        assert proxy.ask(chat(stream=True)).status == 200
    (record,) = proxy.trajectory()
    assert (record["request"]["stream"], record["request"]["model"]) == (False, "b")
    assert (record["stream"], record["model"]) == (False, "b")


# ----------------------------------------------------------------------------------------------------------------------
# Refused.
# ----------------------------------------------------------------------------------------------------------------------

TRAVERSALS = [
    "/v1/..",
    "/v1/../admin",
    "/v1/x/../../admin",
    "/v1/./x",
    "/v1/%2e%2e/admin",
    "/v1/%2E./admin",
    "/v1/.%2e%2fadmin",
    "/v1/..%5Cadmin",
    "/v1/..\\admin",
    "/v1/..;x/admin",
    "/v1/models/..",
]


HIDDEN = [  # by another spelling of the slash
    "/v1/x%2f../admin",
    "/v1/x%2F%2e%2e%2Fadmin",
    "/v1/x\\..\\admin",
    "/v1/x%5c..%5cadmin",
]


@pytest.mark.parametrize("target", TRAVERSALS + HIDDEN)
def test_path_that_leads_out_is_refused(wire, target):
    got = wire.refuse("GET", target + "?q")
    assert (got.status, got.error()["type"]) == (400, "invalid_request_error")
    assert "is not passed on" in got.error()["message"]


@pytest.mark.parametrize("method", ["TRACE", "CONNECT"])
def test_method_that_is_for_the_proxy_itself_is_refused(wire, method):
    got = wire.refuse(method, "/v1/x")
    assert (got.status, got.error()["message"]) == (405, "%s is not passed on" % method)


@pytest.mark.parametrize("target", ["/v2/x", "/v1", "/v1/", "/V1/x", "/chat/completions", "//v1/x", "/v1x/y", "*"])
def test_path_outside_is_refused_by_what_there_is(wire, target):
    got = wire.refuse("POST", target, body=b"{}")
    assert got.status == 404
    assert "/v1/..." in got.error()["message"]
    assert "/health" in got.error()["message"]


REQUESTS = {  # malformed, or with two meanings
    "two lengths": (["Content-Length: 2", "Content-Length: 3"], 400),
    "length and chunks": (["Content-Length: 2", CHUNKED], 400),
    "other coding": (["Transfer-Encoding: gzip, chunked"], 501),
    "folded": (["X-A: 1", " 2"], 400),
    "control character": (["X-A: 1\x01"], 400),
    "bare line feed": (["X-A: 1\nX-B: 2"], 400),
    "two hosts": (["Host: other"], 400),
}


@pytest.mark.parametrize("lines, status", REQUESTS.values(), ids=REQUESTS)
def test_malformed_request_is_not_passed_on(wire, lines, status):
    count = len(wire.upstream.seen())
    head = "\r\n".join(["POST %s HTTP/1.1" % CHAT, "Host: agent", *lines, "", "{}"])
    assert Answer(talk(wire.proxy.port, head.encode("latin-1"))).status == status
    assert len(wire.upstream.seen()) == count


# ----------------------------------------------------------------------------------------------------------------------
# Connections to the upstream.
# ----------------------------------------------------------------------------------------------------------------------


def connections_of(upstream):
    return [seen["connection"] for seen in upstream.seen()]


def test_calls_in_a_row_share_a_connection(proxy, upstream):
    upstream.script(ok(), chunked("a", "b"), sse(*words("a")), answer("no", 404), raw("HTTP/1.1 204 x"), ok(body=""))
    for method in ("POST", "GET", "POST", "DELETE", "POST", "HEAD", "POST"):
        assert call(proxy, method, CHAT).status in (200, 204, 404)
    assert connections_of(upstream) == [1] * 7
    assert upstream.connections() == 1
    assert "rock_proxy_idle_upstream_connections 1\n" in proxy.ask(method="GET", path="/metrics").body.decode()


def test_calls_at_once_have_a_connection_each(proxy, upstream):
    upstream.script(*[[{"gate": "go"}, ok()]] * 3)
    calls = [proxy.ask_later(chat()) for _ in range(3)]
    upstream.seen(3)
    upstream.open("go")
    assert [call.result().status for call in calls] == [200] * 3
    assert sorted(connections_of(upstream)) == [1, 2, 3]
    for _ in range(3):
        assert proxy.ask(chat()).status == 200
    assert upstream.connections() == 3


LAST = {  # scripts whose connection must not be used again
    "close": ok("Connection: close"),
    "close among others": ok("Connection: keep-alive, Close"),
    "more behind": {"send": ok()["send"] + "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL"},
    "more behind chunks": [*chunked("a")[:-1], {"send": "0\r\n\r\nx"}],
    "a body behind 304": raw("HTTP/1.1 304 x", "Content-Length: 4", body="EVIL"),
    "HTTP/1.0": raw("HTTP/1.0 200 OK", "Content-Length: 2", body="{}"),
    "until closed": [raw("HTTP/1.1 200 OK", body="{}"), {"close": True}],
    "closed behind": [ok(), {"close": True}],
    "reset behind": [ok(), {"gate": "reset"}, {"reset": True}],
}


@pytest.mark.parametrize("script", LAST.values(), ids=LAST)
def test_connection_that_is_not_clean_is_not_used_again(proxy, upstream, script):
    """And no call of the agent's pays for it."""
    upstream.script(script)
    assert call(proxy, "POST", CHAT).status in (200, 304)
    upstream.open("reset")
    got = proxy.ask(chat())
    assert (got.status, got.json()["choices"][0]["message"]["content"]) == (200, "hello")
    assert connections_of(upstream) == [1, 2]
    assert ([record["attempts"] for record in proxy.trajectory()], proxy.pauses) == ([1, 1], [])
    wait_until(lambda: upstream.connections() == 1)


def test_answer_that_nobody_asked_for_is_not_that_of_the_next_call(proxy, upstream):
    """It comes on a kept connection, between two calls."""
    upstream.script([ok(), {"gate": "late"}, ok(body="EVIL"), {"close": True}])
    assert call(proxy, "POST", CHAT).body == b"{}"
    upstream.open("late")
    wait_until(lambda: upstream.connections() == 0)
    assert proxy.ask(chat()).json()["choices"][0]["message"]["content"] == "hello"
    assert ([record["attempts"] for record in proxy.trajectory()], proxy.pauses) == ([1, 1], [])


@pytest.mark.parametrize("end", [{"close": True}, {"reset": True}], ids=["closed", "reset"])
def test_kept_connection_that_ends_as_it_is_used_is_no_attempt(proxy, upstream, end):
    """The upstream's end crosses the proxy's next request on the way."""
    upstream.script(ok(), end)
    assert [proxy.ask(chat()).status for _ in range(2)] == [200, 200]
    assert connections_of(upstream) == [1, 1, 2]
    assert ([record["attempts"] for record in proxy.trajectory()], proxy.pauses) == ([1, 1], [])


def test_new_connection_that_ends_at_once_is_an_attempt(proxy, upstream):
    upstream.script({"close": True})
    assert proxy.ask(chat()).status == 200
    assert (proxy.trajectory()[0]["attempts"], proxy.pauses) == (2, [2.0])


def test_answer_that_broke_off_on_a_kept_connection_is_an_attempt(proxy, upstream):
    upstream.script(ok(), [{"send": "HTTP/1.1 2"}, {"close": True}])
    assert [proxy.ask(chat()).status for _ in range(2)] == [200, 200]
    assert [record["attempts"] for record in proxy.trajectory()] == [1, 2]


def test_upstream_of_http_1_0_is_understood(proxy, upstream):
    stream = "".join("data: %s\n\n" % json.dumps(value) for value in words("a", "b")) + "data: [DONE]\n\n"
    script = [raw("HTTP/1.0 200 OK", "Content-Type: text/event-stream", body=stream), {"close": True}]
    upstream.script(script, script)
    for _ in range(2):
        assert proxy.ask(chat(stream=True)).body.decode() == stream
    assert [record["response"]["choices"][0]["message"]["content"] for record in proxy.trajectory()] == ["ab", "ab"]
    assert connections_of(upstream) == [1, 2]


def test_stopped_proxy_leaves_no_connection(tmp_path, upstream):
    with running(tmp_path, Proxy, upstream=upstream) as proxy:
        upstream.script(*[[{"gate": "go"}, ok()]] * 2)
        calls = [proxy.ask_later(chat()) for _ in range(2)]
        upstream.seen(2)
        upstream.open("go")
        assert [call.result().status for call in calls] == [200, 200]
        assert upstream.connections() == 2
    wait_until(lambda: upstream.connections() == 0)


# ----------------------------------------------------------------------------------------------------------------------
# Malformed answers.
# ----------------------------------------------------------------------------------------------------------------------

OK = "HTTP/1.1 200 OK"
MALFORMED = {  # script, a word of what the client is told
    "no HTTP": (raw("SSH-2.0-OpenSSH_9.6", body=""), "no HTTP/1.1 response"),
    "garbage": ({"send": "\x00\xff\r\n\r\n"}, "no HTTP/1.1 response"),
    "HTTP/2": (raw("HTTP/2 200", "Content-Length: 0"), "no HTTP/1.1 response"),
    "HTTP/0.9": ([{"send": "hello"}, {"close": True}], "no HTTP/1.1 response"),
    "status of two digits": (raw("HTTP/1.1 20 OK", "Content-Length: 0"), "no HTTP/1.1 response"),
    "status 600": (raw("HTTP/1.1 600 OK", "Content-Length: 0"), "no HTTP/1.1 response"),
    "two spaces": (raw("HTTP/1.1  200 OK", "Content-Length: 0"), "no HTTP/1.1 response"),
    "switched": (raw("HTTP/1.1 101 x", "Upgrade: websocket", "Connection: upgrade"), "switches"),
    "two lengths": (raw(OK, "Content-Length: 2", "Content-Length: 3", "X-Evil: 1", body="{}x"), "Content-Length"),
    "list of lengths": (raw(OK, "Content-Length: 2, 3", body="{}x"), "Content-Length"),
    "signed length": (raw(OK, "Content-Length: +2", body="{}"), "Content-Length"),
    "length and chunks": (raw(OK, "Content-Length: 2", CHUNKED, body="0\r\n\r\n"), "both Content-Length and"),
    "other coding": (raw(OK, "Transfer-Encoding: gzip, chunked", body="0\r\n\r\n"), "transfer coding"),
    "huge field": (raw(OK, "Content-Length: 0", "X-Huge: " + "x" * MAX_HEAD_BYTES), "longer than"),
    "endless fields": ({"send": OK + "\r\nX-A: 1" * MAX_HEAD_BYTES}, "longer than"),
    "folded": (raw(OK, "Content-Length: 0", "X-A: 1", " X-Evil: 2"), "folded"),
    "no colon": (raw(OK, "Content-Length: 0", "X-Evil"), "not 'Name: value'"),
    "space in a name": (raw(OK, "Content-Length: 0", "X-Evil : 1"), "not 'Name: value'"),
    "line feed": (raw(OK, "X-A: 1\nX-Evil: 2", "Content-Length: 0"), "CRLF"),
    "carriage return": (raw(OK, "X-A: 1\rX-Evil: 2", "Content-Length: 0"), "CRLF"),
    "nul": (raw(OK, "X-Evil: \x00", "Content-Length: 0"), "control character"),
    "control character": (raw(OK, "X-Evil: \x1b[31m", "Content-Length: 0"), "control character"),
    "split in the reason": (raw(OK + "\nX-Evil: 1", "Content-Length: 0"), "CRLF"),
    "chunk size": (raw(OK, CHUNKED, body="zz\r\nX-Evil\r\n0\r\n\r\n"), "no valid size"),
    "chunk size with a sign": (raw(OK, CHUNKED, body="+1\r\na\r\n0\r\n\r\n"), "no valid size"),
    "huge chunk size": (raw(OK, CHUNKED, body="1" + "0" * 16 + "\r\n"), "no valid size"),
    "chunk too short": (raw(OK, CHUNKED, body="2\r\nabc\r\n0\r\n\r\n"), "not as long"),
    "chunk line feed": (raw(OK, CHUNKED, body="1\na\n0\n\n"), "CRLF"),
    "chunk line endless": (raw(OK, CHUNKED, body="1;" + "x" * 2000), "longer than"),
    "cut off": ([raw(OK, "Content-Length: 9", body="{}"), {"close": True}], "broke off"),
    "cut off in chunks": ([raw(OK, CHUNKED, body="5\r\nab"), {"close": True}], "broke off"),
    "no last chunk": ([raw(OK, CHUNKED, body="2\r\nab\r\n"), {"close": True}], "broke off"),
}


@pytest.mark.parametrize("script, said", MALFORMED.values(), ids=MALFORMED)
def test_malformed_answer_is_502(wire, script, said):
    script = script if isinstance(script, list) else [script, {"stall": True}]
    got, seen = wire("POST", CHAT, script=script, body=b"{}")
    error = got.error()
    assert (got.status, error["type"], error["code"]) == (502, "server_error", "upstream_error")
    assert said in error["message"]
    assert got.names() == {"content-type", "content-length", "date", "connection"}
    record = wire.record()
    assert (record["status"], record["error"], record["attempts"]) == (502, error["message"], 1)
    assert wire("POST", CHAT)[1]["connection"] > seen["connection"]


@pytest.mark.parametrize("text", [OK + "\nContent-Length: 2\n\n{}", "SSH-2.0-OpenSSH_9.6\n"], ids=["HTTP", "other"])
def test_header_of_bare_line_feeds_is_502_and_not_waited_for(tmp_path, upstream, text):
    """The request's header is refused at its first bare line feed, too."""
    with running(tmp_path, Proxy, upstream=upstream, max_attempts=1, request_timeout=20) as proxy:
        upstream.script([{"send": text}, {"stall": True}])
        assert proxy.ask(chat()).status == 502


def test_stream_with_a_bad_chunk_breaks_off(wire):
    """What came before it was passed on; the client can tell that it is not all."""
    first = "data: %s\n\n" % json.dumps(words("a")[1])
    script = [
        raw(OK, CHUNKED, "Content-Type: text/event-stream", body=chunk(first)),
        {"gate": "bad"},
        {"send": "zz\r\n"},
    ]
    wire.upstream.script(script)
    with socket.create_connection(("127.0.0.1", wire.proxy.port), TIMEOUT) as sock:
        sock.sendall(request("POST", CHAT, body=b'{"stream": true}'))
        got = b""
        while first.encode() not in got:
            got += sock.recv(65536)
        wire.upstream.open("bad")
        for piece in iter(lambda: sock.recv(65536), b""):
            got += piece
    assert Answer(got).rest == chunk(first).encode()
    wait_until(lambda: wire.record()["status"] == 502)
    assert wire.record()["partial"] is True


# ----------------------------------------------------------------------------------------------------------------------
# TLS.
# ----------------------------------------------------------------------------------------------------------------------

OPENSSL_CONFIG = """
[req]
distinguished_name = name
prompt = no
[name]
CN = localhost
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[leaf]
basicConstraints = critical, CA:FALSE
subjectAltName = DNS:%s
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""
OPENSSL_COMMANDS = """
req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -config c -extensions ca
req -newkey rsa:2048 -nodes -keyout leaf.key -out leaf.csr -config c
x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -set_serial 2 -out leaf.pem -days 2 -extfile c -extensions leaf
"""


class Certificates:
    """A certificate for a host name, with its key, and that of who signed it."""

    def __init__(self, directory, host):
        if not shutil.which("openssl"):
            pytest.skip("there is no openssl command to make a certificate with")
        (directory / "c").write_text(OPENSSL_CONFIG % host)
        for line in OPENSSL_COMMANDS.strip().splitlines():
            command = ["openssl", *line.split()]
            done = subprocess.run(command, cwd=str(directory), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            if done.returncode:
                pytest.skip("openssl cannot %s: %s" % (line, done.stdout.decode("utf-8", "replace")))
        self.ca, self.server = str(directory / "ca.pem"), str(directory / "server.pem")
        (directory / "server.pem").write_text(
            (directory / "leaf.key").read_text() + (directory / "leaf.pem").read_text()
        )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    return Certificates(tmp_path_factory.mktemp("tls"), "localhost")


@pytest.fixture
def secure(certificates):
    with contextlib.closing(Upstream(certificates.server)) as upstream:
        yield upstream


@pytest.fixture
def trusted(certificates, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", certificates.ca)


@pytest.mark.usefixtures("trusted")
def test_tls_with_a_certificate_of_the_environment(tmp_path, secure):
    stream = words("a", "b")
    with running(tmp_path, Proxy, upstream=secure) as proxy:
        secure.script(ok(body=LATIN), sse(*stream), ok(body="x" * (HOLD_BYTES + 9)))
        assert call(proxy, "POST", CHAT, body=b"y" * 1000000).body == BINARY
        assert proxy.ask(chat(stream=True)).events() == [*stream, "[DONE]"]
        assert len(call(proxy, "GET", "/v1/files/7").body) == HOLD_BYTES + 9
        assert [record["attempts"] for record in proxy.trajectory()] == [1, 1, 1]
    assert connections_of(secure) == [1, 1, 1]
    assert len(secure.seen()[0]["body"]) == 1000000
    assert values(secure.seen()[0], "host") == ["localhost:%d" % secure.port]
    wait_until(lambda: secure.connections() == 0)


@pytest.mark.usefixtures("trusted")
def test_tls_stream_passes_as_it_comes(tmp_path, secure):
    steps = sse(*words("a", "b"))
    secure.script([*steps[:2], {"gate": "go"}, *steps[2:]])
    with running(tmp_path, Proxy, upstream=secure) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port), TIMEOUT) as sock:
            sock.sendall(request("POST", CHAT, body=b'{"stream": true}'))
            got = b""
            while b"assistant" not in got:
                got += sock.recv(65536)
            assert b"[DONE]" not in got
            secure.open("go")
            for piece in iter(lambda: sock.recv(65536), b""):
                got += piece
    assert b"[DONE]" in Answer(got).body


UNCLEAN = {  # a close without TLS's own word for it, as many servers have it
    "closed": [ok(), {"close": True}],
    "until closed": [raw(OK, body="{}"), {"close": True}],
    "more behind": [{"send": ok()["send"] + "more"}],
}


@pytest.mark.parametrize("script", UNCLEAN.values(), ids=UNCLEAN)
@pytest.mark.usefixtures("trusted")
def test_tls_connection_that_is_not_clean_is_not_used_again(tmp_path, secure, script):
    secure.script(script)
    with running(tmp_path, Proxy, upstream=secure) as proxy:
        assert call(proxy, "GET", "/v1/x").body == b"{}"
        wait_until(lambda: secure.connections() == 0)
        assert proxy.ask(chat()).status == 200
        assert ([record["attempts"] for record in proxy.trajectory()], proxy.pauses) == ([1, 1], [])
    assert connections_of(secure) == [1, 2]


def assert_refused_at_once(proxy, *words):
    got = proxy.ask(chat())
    error = got.json()["error"]
    assert (got.status, error["code"], proxy.pauses) == (502, "upstream_error", [])
    assert [word for word in words if word not in error["message"]] == []
    assert proxy.trajectory()[0]["attempts"] == 1


def test_certificate_of_nobody_known_is_refused_at_once(tmp_path, secure, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with running(tmp_path, Proxy, upstream=secure) as proxy:
        assert_refused_at_once(proxy, "no TLS with localhost", "certificate")
    assert secure.seen() == []


@pytest.mark.usefixtures("trusted")
def test_certificate_of_another_host_is_refused_at_once(tmp_path, secure):
    with running(tmp_path, Proxy, proxy_base_url=secure.url.replace("localhost", "127.0.0.1")) as proxy:
        assert_refused_at_once(proxy, "no TLS with 127.0.0.1", "127.0.0.1'")
    assert secure.seen() == []


def test_upstream_without_tls_is_an_error_that_may_pass(tmp_path):
    with middleman(refusal="HTTP/1.1 400 this is plain HTTP\r\n\r\n") as plain:
        url = plain.url.replace("http:", "https:")
        with running(tmp_path, Proxy, proxy_base_url=url, max_attempts=2) as proxy:
            got = proxy.ask(chat())
    assert (got.status, len(proxy.pauses), len(plain.heads)) == (502, 1, 2)
    assert "no TLS with 127.0.0.1" in got.json()["error"]["message"]


# ----------------------------------------------------------------------------------------------------------------------
# HTTP proxies of the environment.
# ----------------------------------------------------------------------------------------------------------------------


def login():
    """A password, and the field that carries it."""
    password = a_key() + "@:/"
    return password, "Basic " + base64.b64encode(("us er:" + password).encode()).decode()


def with_login(url, password):
    return url.replace("//", "//us%%20er:%s@" % quote(password, safe=""))


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_http_goes_through_a_proxy_by_its_whole_url(tmp_path, upstream, monkeypatch, name):
    password, authorization = login()
    with middleman() as middle:
        monkeypatch.setenv(name, with_login(middle.url, password))
        with running(tmp_path, Proxy, upstream=upstream) as proxy:
            upstream.script(ok(), sse(*words("a")))
            assert call(proxy, "GET", "/v1/x?y", "Proxy-Authorization: Basic YWdlbnQ=").status == 200
            assert proxy.ask(chat(stream=True)).events()[-1] == "[DONE]"
    first, second = upstream.seen()
    assert [seen["target"] for seen in (first, second)] == [upstream.url + "/x?y", upstream.url + "/chat/completions"]
    assert values(first, "proxy-authorization") == values(second, "proxy-authorization") == [authorization]
    assert values(first, "host") == ["127.0.0.1:%d" % upstream.port]
    assert (len(middle.heads), connections_of(upstream)) == (1, [1, 1])  # kept, too
    assert_nowhere(tmp_path, (password, authorization[6:]), *proxy.logged)


@pytest.mark.usefixtures("trusted")
def test_https_goes_through_a_tunnel(tmp_path, secure, monkeypatch):
    password, authorization = login()
    with middleman() as middle:
        monkeypatch.setenv("HTTPS_PROXY", with_login(middle.url, password))
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        with running(tmp_path, Proxy, upstream=secure) as proxy:
            assert [proxy.ask(chat()).status for _ in range(2)] == [200, 200]
    (head,) = middle.heads
    where = "localhost:%d" % secure.port
    assert head.split("\r\n") == [
        "CONNECT %s HTTP/1.1" % where,
        "Host: " + where,
        "Proxy-Authorization: " + authorization,
    ]
    for seen in secure.seen():
        assert (seen["target"], seen["connection"]) == ("/v1/chat/completions", 1)
        assert (values(seen, "proxy-authorization"), values(seen, "host")) == ([], [where])
    assert_nowhere(tmp_path, (password, authorization[6:]), *proxy.logged)


def test_proxy_without_a_login_and_without_a_scheme(tmp_path, upstream, monkeypatch):
    with middleman() as middle:
        monkeypatch.setenv("HTTP_PROXY", "127.0.0.1:%d/" % middle.port)
        with running(tmp_path, Proxy, upstream=upstream) as proxy:
            assert proxy.ask(chat()).status == 200
    assert "proxy-authorization" not in middle.heads[0].lower()


def test_tunnel_that_is_refused_for_good(tmp_path, monkeypatch):
    for status in (407, 403):
        with middleman(refusal="HTTP/1.1 %d x\r\nContent-Length: 0\r\n\r\n" % status) as middle:
            password, authorization = login()
            monkeypatch.setenv("HTTPS_PROXY", with_login(middle.url, password))
            (tmp_path / str(status)).mkdir()
            with running(tmp_path / str(status), Proxy, proxy_base_url="https://model.invalid/v1") as proxy:
                assert_refused_at_once(proxy, "refused to connect to model.invalid:443", str(status))
        assert len(middle.heads) == 1
        assert_nowhere(tmp_path, (password, authorization[6:]), *proxy.logged)


@pytest.mark.usefixtures("trusted")
def test_tunnel_that_is_refused_for_now_is_tried_again(tmp_path, secure, monkeypatch):
    with middleman(refusal="HTTP/1.1 503 x\r\n\r\n") as middle:
        monkeypatch.setenv("HTTPS_PROXY", middle.url)
        with running(tmp_path, Proxy, upstream=secure) as proxy:
            proxy.server.service.pause = lambda watch, seconds: setattr(middle, "refusal", None)
            assert proxy.ask(chat()).status == 200
    assert (proxy.trajectory()[0]["attempts"], len(middle.heads)) == (2, 2)


def test_proxy_that_asks_for_a_login_is_final(tmp_path, monkeypatch):
    """What an HTTP proxy says to a whole URL is an answer, without what is between it and us."""
    refusal = "HTTP/1.1 407 x\r\nProxy-Authenticate: Basic\r\nContent-Length: 2\r\n\r\nno"
    with middleman(refusal=refusal) as middle:
        monkeypatch.setenv("HTTP_PROXY", middle.url)
        with running(tmp_path, Proxy, proxy_base_url="http://model.invalid/v1") as proxy:
            got = proxy.ask(chat())
            assert (got.status, got.body, "proxy-authenticate" in got.headers) == (407, b"no", False)
            assert (proxy.trajectory()[0]["attempts"], proxy.pauses) == (1, [])


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxy_that_is_not_there_is_tried_again(tmp_path, monkeypatch, scheme):
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        password, _ = login()
        url = "http://127.0.0.1:%d" % taken.getsockname()[1]
        monkeypatch.setenv("ALL_PROXY", with_login(url, password))
        with running(tmp_path, Proxy, proxy_base_url=scheme + "://model.invalid/v1", max_attempts=2) as proxy:
            got = proxy.ask(chat())
    assert (got.status, len(proxy.pauses)) == (502, 1)
    assert url[7:] in got.json()["error"]["message"]
    assert_nowhere(tmp_path, [password], *proxy.logged, got.body.decode())


@pytest.mark.parametrize("bypass", ["127.0.0.1", "other, 127.0.0.1", "127.0.0.1:%d", "*"])
def test_no_proxy_goes_straight(tmp_path, upstream, monkeypatch, bypass):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", bypass.replace("%d", str(upstream.port)))
    with running(tmp_path, Proxy, upstream=upstream, max_attempts=1) as proxy:
        assert proxy.ask(chat()).status == 200
    assert upstream.seen()[0]["target"] == "/v1/chat/completions"


@pytest.mark.parametrize("bypass", ["127.0.0.11", "27.0.0.1", "127.0.0.1:1", "other"])
def test_no_proxy_for_others_goes_not_straight(tmp_path, upstream, monkeypatch, bypass):
    with middleman() as middle:
        monkeypatch.setenv("HTTP_PROXY", middle.url)
        monkeypatch.setenv("NO_PROXY", bypass)
        with running(tmp_path, Proxy, upstream=upstream, max_attempts=1) as proxy:
            assert proxy.ask(chat()).status == 200
    assert len(middle.heads) == 1


BAD_PROXIES = {
    "ALL_PROXY": ("socks5://u:%s@h:1080", "ALL_PROXY must be an http URL"),
    "HTTPS_PROXY": ("https://u:%s@h:1", "HTTPS_PROXY must be an http URL"),
    "HTTP_PROXY": ("http://u:%s@h:port", "HTTP_PROXY is not a URL"),
    "http_proxy": ("http://u:%s@", "HTTP_PROXY must be an http URL"),
}


@pytest.mark.parametrize("name, url, said", [(name, *rest) for name, rest in BAD_PROXIES.items()], ids=BAD_PROXIES)
def test_proxy_of_another_kind_is_refused_at_start(tmp_path, upstream, monkeypatch, name, url, said):
    password = a_key()
    monkeypatch.setenv(name, url % password)
    with nothing_left():
        with pytest.raises(UsageError, match=said) as caught:
            Proxy(tmp_path, upstream=upstream)
    assert password not in str(caught.value)


def test_start_says_why_it_refuses_a_proxy(cli, tmp_path):
    password = a_key()
    environ = clean_environ(ALL_PROXY="socks5h://u:%s@127.0.0.1:1080" % password)
    done = cli("start", "--type", "proxy", "--port", "0", env=environ)
    assert done.returncode
    assert "ALL_PROXY must be an http URL" in done.err
    assert_nowhere(tmp_path, [password], done.out, done.err)


def test_local_service_does_not_care_about_proxies(tmp_path, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://h:1080")
    with running(tmp_path, Service) as service:
        assert service.ask(method="GET", path="/health").status == 200


# ----------------------------------------------------------------------------------------------------------------------
# Metrics.
# ----------------------------------------------------------------------------------------------------------------------


def test_metrics_count_by_status_and_known_methods(tmp_path, upstream):
    with running(tmp_path, Proxy, upstream=upstream, max_attempts=1) as proxy:
        upstream.script(ok(), ok(), answer("x", 429), [raw("garbage")])
        for _ in range(4):
            proxy.ask(chat())
        for number in range(20):
            assert call(proxy, "ODD-%d" % number, "/v1/x/%d?q=%d" % (number, number)).status == 200
        call(proxy, "GET", "/elsewhere/1")
        got = call(proxy, "GET", "/metrics")
    assert got.values("content-type")[0].startswith("text/plain")
    lines = got.body.decode().splitlines()
    counts = sorted(line.partition("_total")[2] for line in lines if line.startswith("rock_http_requests_total{"))
    assert counts == [
        '{method="GET",route="none",status="404"} 1',
        '{method="POST",route="/v1/{name}",status="200"} 2',
        '{method="POST",route="/v1/{name}",status="429"} 1',
        '{method="POST",route="/v1/{name}",status="502"} 1',
        '{method="other",route="/v1/{name}",status="200"} 20',
    ]
    assert not re.search("ODD|elsewhere", got.body.decode())
