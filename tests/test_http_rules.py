"""What RFC 9112 and RFC 9110 ask of servers and proxies, rule by rule, over raw sockets.

Sections are those of RFC 9112 (messages) where they stand alone, and of RFC 9110 (semantics) behind an "S".  A rule
that another test has is in ELSEWHERE, by that test's name.

Not kept, on purpose: a POST that failed is tried again (S9.2.2); interim answers other than our own are not passed on
(S15.2); an answer with a space before a field's colon is refused and not mended (5.1); a server answers 405 and not 501
to a method that it does not know (S9.1).
"""

import contextlib
import os
import re
import socket
from collections import namedtuple

import pytest

from rock_ms import MAX_TARGET_BYTES, request_head, response_head
from support import TIMEOUT, Proxy, running, talk
from upstream import Upstream

HERE = os.path.dirname(os.path.abspath(__file__))
CLOSE = b"Connection: close\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n"
HEALTHY = b'{"status":"healthy"}\n'
PID = b'{"pid":"a"}'


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with running(tmp_path_factory.mktemp("service")) as service:
        yield service
        assert not any("Traceback" in line for line in service.logged), service.logged


@pytest.fixture(scope="module")
def wire(service, tmp_path_factory):  # noqa: ARG001
    """A proxy and its upstream, for all of this file.  It needs `service` only so as to be stopped before it."""
    with contextlib.closing(Upstream()) as upstream:
        with running(tmp_path_factory.mktemp("proxy"), Proxy, upstream=upstream, max_attempts=1) as proxy:
            yield proxy, upstream
            assert not any("Traceback" in line for line in proxy.logged), proxy.logged


class Response:
    """A response read strictly off the front of `data`, in whichever framing it says; `rest` is what follows it."""

    def __init__(self, data, is_head):
        head, end, rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        match = re.match(r"HTTP/1\.1 ([1-5][0-9]{2}) [A-Z][A-Za-z -]*\Z", first)
        assert match and end, data
        assert all(re.match(r"[\w-]+: [^\r\n\0]*\Z", line) for line in lines), head
        self.status, self.head = int(match.group(1)), head.decode("latin-1")
        self.fields = [tuple(line.split(": ", 1)) for line in lines]
        has_body = not is_head and self.status >= 200 and self.status not in (204, 304)
        self.body, self.rest = self._body(rest) if has_body else (b"", rest)

    def values(self, name):
        return [value for key, value in self.fields if key.lower() == name]

    def _body(self, data):
        lengths, codings = self.values("content-length"), self.values("transfer-encoding")
        assert len(lengths + codings) == 1 or (not lengths and not codings and self.closes), self.head
        if codings:
            return self._chunks(data)
        size = int(lengths[0]) if lengths else len(data)
        assert len(data) >= size
        return data[:size], data[size:]

    def _chunks(self, data):
        body = b""
        while True:
            line, _, data = data.partition(b"\r\n")
            size = int(line, 16)
            assert data[size : size + 2] == b"\r\n"
            body, data = body + data[:size], data[size + 2 :]
            if not size:
                return body, data

    @property
    def closes(self):
        return self.values("connection") == ["close"]


def responses(data, is_head=False):
    """All the responses in `data`, which is nothing else.  is_head: the first one answers HEAD."""
    found = []
    while data:
        found.append(Response(data, is_head and not found))
        data = found[-1].rest
    return found


def get(target=b"/health", fields=b"", method=b"GET", version=b"HTTP/1.1", host=b"Host: x\r\n"):
    return b"%s %s %s\r\n%s%s\r\n" % (method, target, version, host, fields)


def post(fields, body=b"", target=b"/v1/agent/watch", version=b"HTTP/1.1"):
    """A request whose answer is a 400 that says which pid was understood, the connection being kept."""
    return get(target, fields, b"POST", version) + body


def sized(body=PID, fields=b"", **options):
    return post(b"Content-Length: %d\r\n%s" % (len(body), fields), body, **options)


def chunked(body, fields=b"", **options):
    return post(CHUNKED + fields, body, **options)


def host(value):
    return get(host=b"Host: %s\r\n" % value)


def ids(rules):
    return [pytest.param(rule, id=re.sub(r"[^\w.]+", "-", "%s %s" % rule[:2])) for rule in rules]


# ----------------------------------------------------------------------------------------------------------------------
# Servers.
# ----------------------------------------------------------------------------------------------------------------------

Rule = namedtuple("Rule", "section requires sent statuses words")

GOOD, REFUSED = [200], 400
PROTECTED = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"  # hidden in what may be no request

# What is answered: an int is the only answer, after which the server has closed; a list is that of all answers, after
# which the connection's next request is answered.  words: what the first answer has in it; "!" before them: it has not;
# "1": once; "~": they are a pattern.
SERVER = [
    # The message.
    Rule("2.2", "an empty line before a request is ignored", b"\r\n" + get(), GOOD, [HEALTHY]),
    Rule("2.2", "one behind a body, too, as old clients send it", sized() + b"\r\n" + get(), [400, 200], [b'\\"a\\"']),
    Rule("2.2", "bare CR is no line end and no space", get(fields=b"A: b\rC: d\r\n"), REFUSED, [b"CRLF"]),
    Rule("2.2", "bare CR in the request line", get(b"/health\r"), REFUSED, [b"CRLF"]),
    Rule("2.2", "bare LF may end a line, here it does not", get(fields=b"A: b\nC: d\r\n"), REFUSED, [b"CRLF"]),
    Rule("2.2", "bare LF in the empty line", PROTECTED[:-2] + b"\n", REFUSED, [b"CRLF"]),
    Rule("2.2", "space before the first field", get(host=b" A: b\r\nHost: x\r\n"), REFUSED, [b"folded"]),
    Rule("2.2", "a header is octets and not UTF-8", get(fields=b"A: \xff\xc3\r\n"), GOOD, [HEALTHY]),
    Rule("2.3", "the version has its case", get(version=b"http/1.1"), REFUSED, [b"HTTP/1.1"]),
    Rule("S2.5", "a later minor version is as our own", get(version=b"HTTP/1.7"), GOOD, [HEALTHY]),
    Rule("S15.6.6", "another major version is 505", get(version=b"HTTP/3.0"), 505, [b"HTTP/1.1"]),
    # Targets.
    Rule("3", "a request line of 8000 octets", get(b"/health?" + b"x" * 7979), GOOD, [HEALTHY]),
    Rule("3", "a longer target than any is 414", get(b"/" + b"x" * MAX_TARGET_BYTES), 414, [b"longer"]),
    Rule("3.2", "a request line is not repaired", get(b"/health /x"), REFUSED, [b"request line"]),
    Rule("3.2", "a target has no fragment", get(b"/health#/x"), REFUSED, [b"percent-encoded"]),
    Rule("3.2", "nor behind its query", get(b"/health?a#b"), REFUSED, [b"percent-encoded"]),
    Rule("3.2.2", "absolute form is accepted", get(b"http://x/health?a"), GOOD, [HEALTHY]),
    Rule("3.2.2", "its host and not the Host field counts", get(b"http://y:1/health"), GOOD, [HEALTHY]),
    Rule("3.2.2", "which has to be there and valid", get(b"http://y/health", host=b""), REFUSED, [b"Host"]),
    Rule("3.2.1", "an absolute target without a path is the root", get(b"http://[::1]:8?a"), GOOD, [b'"service"']),
    Rule("S4.2.1", "an http URL without a host", get(b"http:///health"), REFUSED, [b"no host"]),
    Rule("S4.2.1", "an https URL with a port alone", get(b"HTTPS://:80/health"), REFUSED, [b"no host"]),
    Rule("S4.2.1", "an http URL that is a query", get(b"http://?/health"), REFUSED, [b"no host"]),
    Rule("S4.2.4", "a login in a URL is an error", get(b"http://a:b@x/health"), REFUSED, [b"more than a host"]),
    Rule("3.2.2", "an authority with a bad port", get(b"http://x:y/health"), REFUSED, [b"more than a host"]),
    Rule("3.2.2", "an authority with half a bracket", get(b"http://[::1/health"), REFUSED, [b"more than a host"]),
    Rule("3.2.2", "a scheme that is none of ours", get(b"ftp://x/health"), REFUSED, [b"http URL"]),
    Rule("3.2.3", "authority form is for CONNECT", get(b"x:80"), REFUSED, [b"neither a path"]),
    Rule("S9.3.6", "which is not implemented", get(b"x:80", method=b"CONNECT"), REFUSED, [b"neither a path"]),
    Rule("S4.2.3", "an escaped slash is none", get(b"/v1/models/a%2Fb"), GOOD, [b'"id":"a/b"']),
    Rule("S4.2.3", "a bad escape stays as it is", get(b"/v1/models/%zz%"), GOOD, [b'"id":"%zz%"']),
    Rule("S17.4", "an escaped line end that is shown", get(b"/v1/models/a%0D%0AB:c"), GOOD,
         [b'"a\\r\\nB:c"', "!\r\nB"]),
    Rule("S17.4", "an escaped line end in an error", get(b"/%0d%0aB:c"), [404], [b"/%0d%0aB:c"]),
    # Host.
    *[Rule("3.2", "Host: %s is valid" % value.decode(), host(value), GOOD, [HEALTHY]) for value in (
        b"", b"x:", b"x:8080", b"[::1]", b"[fe80::1%25eth0]:80", b"[v1.a:b]", b"a_b.c-d~", b"x%41.example",
        b"!$&'()*+,;=",
    )],
    *[Rule("3.2", "Host: %s is invalid" % value.decode("latin-1"), host(value), REFUSED, [b"Host"]) for value in (
        b"x:y", b"x:1:2", b"x:-1", b"[::1", b"::1", b"[::1]x", b"x[::1]", b"[]", b"a@x", b"x%4", b"x y", b"x/",
        b"http://x",
        b"x, y", b"x?", b"x#", b"x\\", b"\xe9",
    )],
    Rule("3.2", "without Host", get(host=b""), REFUSED, [b"Host"]),
    Rule("3.2", "with two that are the same", get(fields=b"HOST: x\r\n"), REFUSED, [b"Host"]),
    Rule("3.2", "HTTP/1.0 may go without Host", get(host=b"", version=b"HTTP/1.0"), 200, [HEALTHY]),
    Rule("3.2", "a bad Host is bad in HTTP/1.0", get(host=b"Host: x:y\r\n", version=b"HTTP/1.0"), REFUSED, [b"Host"]),
    # Fields.
    Rule("5", "names have no case", get(host=b"hOsT: x\r\n", fields=b"CONNECTION: CLOSE\r\n"), 200, [HEALTHY]),
    Rule("5.1", "white space around a value is not its", sized(fields=b"A:\t b \t\r\n"), [400], [b'\\"a\\"']),
    Rule("5.1", "a space before the colon", get(fields=b"A : b\r\n"), REFUSED, [b"Name: value"]),
    Rule("5.1", "a length with a space before the colon", post(b"Content-Length : 0\r\n"), REFUSED, [b"Name: value"]),
    Rule("5.2", "a folded line", get(fields=b"A: b\r\n\tc\r\n"), REFUSED, [b"folded"]),
    Rule("5.2", "a folded coding", post(b"Transfer-Encoding:\r\n chunked\r\n", b"0\r\n\r\n"), REFUSED, [b"folded"]),
    Rule("S5.5", "NUL in a value", get(fields=b"A: b\0\r\n"), REFUSED, [b"control character"]),
    # Where a body ends.
    Rule("6.3", "a request that says nothing has no body", get() + get(b"/x"), [200, 404], [HEALTHY]),
    Rule("6", "a GET may have a body, which is no request", get(fields=b"Content-Length: %d\r\n" % len(PROTECTED))
         + PROTECTED, GOOD, [HEALTHY]),
    Rule("6.1", "two framings may be refused, and are", chunked(b"0\r\n\r\n", b"Content-Length: 5\r\n") + PROTECTED,
         400, [b"ambiguous"]),
    Rule("6.1", "HTTP/1.0 has no codings", chunked(b"0\r\n\r\n", version=b"HTTP/1.0") + PROTECTED, 400, [b"HTTP/1.0"]),
    Rule("6.1", "a coding that is not understood is 501", post(b"Transfer-Encoding: gzip, chunked\r\n") + PROTECTED,
         501, [b"transfer coding"]),
    Rule("6.1", "over two lines, too", post(b"Transfer-Encoding: gzip\r\n" + CHUNKED) + PROTECTED, 501, [b"coding"]),
    *[Rule("6.3", "Transfer-Encoding %r ends nowhere" % coding.decode("latin-1"),
           post(b"Transfer-Encoding: %s\r\n" % coding, b"0\r\n\r\n") + PROTECTED, 400, [b"coding"]) for coding in (
        b"gzip", b"chunked, gzip", b"chunked, identity", b"identity", b"xchunked", b"chunked;a=b", b'"chunked"', b"",
    )],
    *[Rule("6.3", "Content-Length %r is no length" % length.decode(),
           post(b"Content-Length: %s\r\n" % length, b"{}") + PROTECTED, 400, [b"decimal"]) for length in (
        b"2, 3", b"2,2", b"+2", b"2 ;", b"2\t2", b'"2"', b"0b10", b"1e1",
    )],
    Rule("6.3", "lengths that differ", post(b"Content-Length: 2\r\ncontent-length: 0\r\n", b"{}"), 400, [b"decimal"]),
    # Chunks.
    Rule("7", "codings have no case", post(b"Transfer-Encoding: ChunKed\r\n", b"B\r\n%s\r\n0\r\n\r\n" % PID), [400],
         [b'\\"a\\"']),
    Rule("7.1", "a size may have zeros before it", chunked(b"00000b\r\n%s\r\n000\r\n\r\n" % PID), [400], [b'\\"a\\"']),
    Rule("7.1", "no size overflows", chunked(b"1" + b"0" * 16 + b"\r\n") + PROTECTED, 400, [b"valid size"]),
    Rule("7.1.1", "extensions are ignored", chunked(b'b ;a; b = "c;\\"d" ;e\r\n%s\r\n0;f=g\r\n\r\n' % PID), [400],
         [b'\\"a\\"']),
    Rule("7.1.1", "and limited", chunked(b"b;" + b"a" * 5000 + b"\r\n" + PID) + PROTECTED, 400, [b"longer than"]),
    Rule("7.1.1", "a line end hidden in one", chunked(b'b;a="\n"\r\n%s\r\n0\r\n\r\n' % PID) + PROTECTED, 400,
         [b"CRLF"]),
    Rule("7.1.2", "trailers are no header", chunked(
        b"b\r\n%s\r\n0\r\nContent-Length: 99\r\nConnection: close\r\nHost: y\r\nExpect: z\r\n\r\n" % PID), [400],
        [b'\\"a\\"', "!Connection"]),
    Rule("7.1.2", "but are read as strictly", chunked(b"0\r\nA : b\r\n\r\n") + PROTECTED, 400, [b"Name: value"]),
    Rule("7.1.3", "what is behind the last chunk is the next request", chunked(b"0\r\n\r\n") + get(), [400, 200],
         [b"JSON"]),
    # Methods.
    Rule("S9.3.2", "HEAD has the length of what GET answers, and no body", get(method=b"HEAD"), GOOD,
         [b"Content-Length: %d\r\n" % len(HEALTHY), b"Date: "]),
    Rule("S9.3.2", "an error to HEAD has no body", get(b"/x", method=b"HEAD"), [404], [b"Content-Length: "]),
    Rule("S9.3.2", "HEAD where GET is not allowed", get(b"/v1/chat/completions", method=b"HEAD"), [405],
         [b"Allow: POST"]),
    Rule("S9.1", "methods have their case", get(method=b"Get"), [405], [b"Allow: GET, HEAD\r\n"]),
    Rule("S9.3.7", "OPTIONS is refused by what is allowed", get(method=b"OPTIONS"), [405], [b"Allow: GET, HEAD\r\n"]),
    Rule("S9.3.7", "OPTIONS of the server as a whole is not implemented", get(b"*", method=b"OPTIONS"), [404], []),
    Rule("S9.3.8", "TRACE is not implemented, and shows nothing", get(fields=b"Cookie: me\r\n", method=b"TRACE"), [405],
         [b"Allow: ", "!me\r\n"]),
    # Answers.
    Rule("S6.6.1", "there is one Date, in GMT", get(), GOOD,
         [rb"~\r\nDate: [A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT\r\n", "1Date: "]),
    Rule("S6.6.1", "in errors, too", get(b"/x"), [404], [b"\r\nDate: "]),
    Rule("S15.5.1", "and in those of no request", b"x\r\n\r\n", 400, [b"\r\nDate: ", b"Connection: close"]),
    Rule("6.1", "no coding is answered to HTTP/1.0", get(version=b"HTTP/1.0", host=b""), 200, ["!Transfer-Encoding"]),
    Rule("2.3", "HTTP/1.0 is answered in our own version", get(version=b"HTTP/1.0"), 200, [b"HTTP/1.1 200 OK"]),
    # Expectations.
    Rule("S10.1.1", "no body, nothing to go on with", get(fields=b"Expect: 100-continue\r\n"), GOOD, [HEALTHY]),
    Rule("S10.1.1", "an empty list of expectations", get(fields=b"Expect: , \r\n"), GOOD, [HEALTHY]),
    Rule("S5.6.1", "empty members of a list", sized(fields=b"Expect: ,100-CONTINUE ,\r\n"), [400], [b'\\"a\\"']),
    Rule("S10.1.1", "another expectation is 417", sized(fields=b"Expect: 100-continue, a=b\r\n"), 417,
         [b"100-continue"]),
    # Connections.
    Rule("9.3", "a connection goes on", get() + get(b"/x") + sized(), [200, 404, 400], [HEALTHY, "!Connection"]),
    Rule("9.6", "what is behind `close` is no request", get(fields=CLOSE) + get(), 200, [b"Connection: close"]),
    Rule("9.6", "among other options", get(fields=b"Connection: a,, Close ,b\r\n") + get(), 200,
         [b"Connection: close"]),
    Rule("9.3", "an option that is only alike", get(fields=b"Connection: closed, x-close\r\n"), GOOD, ["!Connection"]),
    Rule("9.3", "HTTP/1.0 is closed, whatever it asks for", get(fields=b"Connection: keep-alive\r\n",
         version=b"HTTP/1.0"), 200, [b"Connection: close", HEALTHY]),
    Rule("S7.8", "an upgrade may be ignored, and is", get(fields=b"Connection: upgrade\r\nUpgrade: h2c\r\n"), GOOD,
         ["!Upgrade", HEALTHY]),
]  # fmt: skip


def check_words(data, words):
    for word in words:
        if isinstance(word, str):
            assert data.count(word[1:].encode("latin-1")) == (word[0] == "1"), data
        elif word[:1] == b"~":
            assert re.search(word[1:], data, re.DOTALL), data
        else:
            assert word in data


@pytest.mark.parametrize("rule", ids(SERVER))
def test_server_keeps_the_rule(service, rule):
    is_kept = isinstance(rule.statuses, list)
    data = talk(service.port, rule.sent + LAST)
    found = responses(data, rule.sent.startswith(b"HEAD "))
    expected = [*rule.statuses, 200] if is_kept else [rule.statuses]
    assert [answer.status for answer in found] == expected, data
    assert [answer.closes for answer in found] == [False] * (len(expected) - 1) + [True]
    check_words(data[: len(data) - len(found[0].rest)], rule.words)


INCOMPLETE = [  # 8, and 9.6: what the client stops sending is answered, and was never acted upon
    ("8", "in the header", get()[:-2], [400]),
    ("8", "in the body", sized()[:-1], [400]),
    ("8", "before the last chunk", chunked(b"b\r\n%s\r\n" % PID), [400]),
    ("S10.1.1", "where a body is expected", post(b"Expect: 100-continue\r\nContent-Length: 2\r\n"), [100, 400]),
    ("S10.1.1", "which HTTP/1.0 does not understand", post(b"Expect: 100-continue\r\nContent-Length: 2\r\n",
     version=b"HTTP/1.0"), [400]),
    ("9.6", "between two requests", get(), [200]),
    ("9.6", "behind several", get() * 3, [200] * 3),
]  # fmt: skip


@pytest.mark.parametrize("rule", ids(INCOMPLETE))
def test_client_that_closes_its_side_is_answered_to_the_end(service, rule):
    found = responses(talk(service.port, rule[2], half_close=True))
    assert [answer.status for answer in found] == rule[3]
    assert not any(PID[1:] in answer.body for answer in found)


# ----------------------------------------------------------------------------------------------------------------------
# Proxies: requests.
# ----------------------------------------------------------------------------------------------------------------------

X = b"/v1/x"
VIA = r"rock-[0-9a-f]{8}\Z"

# What reaches the upstream: its target, body, and fields by name; a field is a list of its values, or a pattern of the
# only one.
REQUESTS = [
    ("2.3", "a proxy speaks its own version", get(X, CLOSE, version=b"HTTP/1.0"), "/v1/x", b"", {}),
    ("3.2.2", "Host is that of the next server", get(b"http://y:1/v1/x", CLOSE), "/v1/x", b"",
     {"host": r"127\.0\.0\.1:[0-9]+\Z"}),
    ("S7.6.1", "what Connection names goes no further",
     get(X, b"Connection: A, close,, B\r\na: 1\r\nB: 2\r\nAB: 3\r\n"),
     "/v1/x", b"", {"connection": [], "a": [], "b": [], "ab": ["3"]}),
    ("S7.6.1", "in any of several, before or behind it",
     get(X, b"A: 1\r\nConnection: a\r\nB: 2\r\n%sConnection: b\r\n" % CLOSE),
     "/v1/x", b"", {"connection": [], "a": [], "b": []}),
    ("S7.6.1", "but takes nothing from how a message is framed", chunked(
        b"2\r\n{}\r\n0\r\n\r\n", b"Connection: close, host, content-length, transfer-encoding, via\r\n", target=X),
     "/v1/x", b"{}", {"host": r"127", "content-length": ["2"], "transfer-encoding": [], "via": r"1\.1 " + VIA}),
    ("S7.6.1", "Keep-Alive and its like go no further", get(X, CLOSE + b"Keep-Alive: 1\r\nProxy-Connection: b\r\n"
     b"TE: trailers\r\nUpgrade: h2c\r\nTrailer: A\r\nProxy-Authorization: Basic eDp5\r\n"), "/v1/x", b"",
     {"keep-alive": [], "proxy-connection": [], "te": [], "upgrade": [], "trailer": [], "proxy-authorization": []}),
    ("S7.6.2", "Max-Forwards is counted down", get(X, CLOSE + b"Max-Forwards: 10\r\n", b"OPTIONS"), "/v1/x", b"",
     {"max-forwards": ["9"]}),
    ("S7.6.2", "to nothing", get(X, CLOSE + b"Max-Forwards: 01\r\n", b"OPTIONS"), "/v1/x", b"",
     {"max-forwards": ["0"]}),
    ("S7.6.2", "not for other methods", get(X, CLOSE + b"Max-Forwards: 5\r\n"), "/v1/x", b"", {"max-forwards": ["5"]}),
    ("S7.6.2", "nor where it is no number", get(X, CLOSE + b"Max-Forwards: -1\r\n", b"OPTIONS"), "/v1/x", b"",
     {"max-forwards": ["-1"]}),
    ("S7.6.3", "Via says which version came", get(X, CLOSE, version=b"HTTP/1.9"), "/v1/x", b"",
     {"via": r"1\.1 " + VIA}),
    ("S7.6.3", "HTTP/1.0, too, behind those before", get(X, b"Via: 1.1 a\r\n", version=b"HTTP/1.0"), "/v1/x", b"",
     {"via": r"1\.1 a, 1\.0 " + VIA}),
    ("S5.1", "unknown fields pass", get(X, CLOSE + b"X-New: a\r\n"), "/v1/x", b"", {"x-new": ["a"]}),
    ("S5.3", "fields of one name keep their order", get(X, b"A: 2\r\n%sB: x\r\na: 1\r\nA: 2\r\n" % CLOSE), "/v1/x", b"",
     {"a": ["2", "1", "2"]}),
    ("S17.4", "an escaped line end stays escaped", get(b"/v1/x%0d%0aA:b?c%0D%0AD:e", CLOSE),
     "/v1/x%0d%0aA:b?c%0D%0AD:e", b"", {"a": [], "d": []}),
    ("S4.2.3", "escapes stay as they were", get(b"/v1/%7e%7E%2f%zz", CLOSE), "/v1/%7e%7E%2f%zz", b"", {}),
    ("11.2", "a request in a body is a body", sized(PROTECTED, CLOSE, target=X), "/v1/x", PROTECTED, {}),
    ("11.2", "a request in chunks is a body", chunked(b"%x\r\n%s\r\n0\r\n\r\n" % (len(PROTECTED), PROTECTED), CLOSE,
     target=X), "/v1/x", PROTECTED, {"content-length": [str(len(PROTECTED))]}),
    ("7.1.2", "trailers are not merged into the header",
     chunked(b"0\r\nAuthorization: a\r\nX-B: c\r\n\r\n", CLOSE, target=X),
     "/v1/x", b"", {"authorization": [], "x-b": []}),
    ("6.3", "a length with zeros before it is sent as it counts", post(b"Content-Length: 0002\r\n" + CLOSE, b"{}", X),
     "/v1/x", b"{}", {"content-length": ["2"]}),
    ("S10.1.1", "an expectation is met here", sized(b"{}", CLOSE + b"Expect: 100-continue\r\n", target=X), "/v1/x",
     b"{}", {"expect": []}),
]  # fmt: skip


def exchange(wire, data, *scripts):
    """The answers to `data`, and the requests that the upstream saw."""
    proxy, upstream = wire
    count = len(upstream.seen())
    if scripts:
        upstream.script(*scripts)
    found = responses(talk(proxy.port, data), data.startswith(b"HEAD "))
    return found, upstream.seen()[count:]


@pytest.mark.parametrize("rule", ids(REQUESTS))
def test_proxy_keeps_the_rule_for_requests(wire, rule):
    _, _, sent, target, body, fields = rule
    (got,), (seen,) = exchange(wire, sent)
    assert (got.status, seen["version"]) == (200, "HTTP/1.1")
    assert (seen["target"], seen["body"]) == (target, body)
    for name, expected in fields.items():
        values = [value for key, value in seen["headers"] if key == name]
        if isinstance(expected, list):
            assert values == expected, name
        else:
            assert len(values) == 1 and re.match(expected, values[0]), (name, values)


METHODS = b"Allow: DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT\r\n"
NOT_FORWARDED = [  # sent, the status, words of the answer
    ("S7.6.2", "an OPTIONS that may go no further", get(X, b"Max-Forwards: 0\r\n" + CLOSE, b"OPTIONS"), 204,
     [METHODS, "!Content-Length", "!Content-Type"]),
    ("S7.6.2", "written otherwise", get(X, b"max-forwards:00\r\n" + CLOSE, b"OPTIONS"), 204, [METHODS]),
    ("S9.3.8", "TRACE", get(X, CLOSE, b"TRACE"), 405, [METHODS, b"not passed on"]),
    ("S9.3.6", "CONNECT", get(X, CLOSE, b"CONNECT"), 405, [METHODS, b"not passed on"]),
    ("S9.3.6", "CONNECT of an authority", get(b"x:80", CLOSE, b"CONNECT"), 400, [b"neither a path"]),
    ("3.2.4", "OPTIONS of this server as a whole", get(b"*", CLOSE, b"OPTIONS"), 404, []),
    ("3.2", "a target with a fragment", get(b"/v1/x#y", CLOSE), 400, [b"percent-encoded"]),
    ("S4.2.4", "a login in the target", get(b"http://u@x/v1/x", CLOSE), 400, [b"more than a host"]),
    ("11.2", "two framings", post(CHUNKED + b"Content-Length: 3\r\n", b"0\r\n\r\n" + get(X), X), 400, [b"ambiguous"]),
    ("6.3", "a body without an end", post(b"Transfer-Encoding: chunked, x\r\n", b"0\r\n\r\n" + get(X), X), 400,
     [b"coding"]),
    ("6.3", "a coding that hides", post(b"Transfer-Encoding: chunked\0\r\n", b"0\r\n\r\n", X), 400, [b"control"]),
    ("8", "half a body", sized(b"{}", target=X)[:-1], 400, [b"closed in the middle"]),
]  # fmt: skip


@pytest.mark.parametrize("rule", ids(NOT_FORWARDED))
def test_proxy_keeps_from_the_upstream(wire, rule):
    _, _, sent, status, words = rule
    proxy, upstream = wire
    count = len(upstream.seen())
    data = talk(proxy.port, sent, half_close=True)
    (got,) = responses(data)
    assert (got.status, got.closes) == (status, True)
    assert upstream.seen()[count:] == []
    check_words(data, words)


# ----------------------------------------------------------------------------------------------------------------------
# Proxies: answers.
# ----------------------------------------------------------------------------------------------------------------------

GET, HEAD = get(X, CLOSE), get(X, CLOSE, b"HEAD")
OLD_HEAD = get(X, method=b"HEAD", version=b"HTTP/1.0")
TWO = "Content-Length: 2\r\n"
CODED = "Transfer-Encoding: chunked\r\n"


def said(fields=TWO, body="{}", first="HTTP/1.1 200 OK"):
    return "%s\r\n%s\r\n%s" % (first, fields, body)


# What the upstream says, to which request, and what the client gets: status, body, words of the header.
ANSWERS = [
    ("S2.5", "a later minor version is as our own", said(first="HTTP/1.4 200 OK"), GET, 200, b"{}",
     [b"HTTP/1.1 200 OK\r\n"]),
    ("S2.5", "another major version is none", said(first="HTTP/2.0 200 OK"), GET, 502, None, []),
    ("4", "the reason is not passed on", said(first="HTTP/1.1 200 Set-Cookie: a"), GET, 200, b"{}", ["!Set-Cookie"]),
    ("4", "a status of no class", "HTTP/1.1 099 x\r\n\r\n" + said(), GET, 502, None, []),
    ("S15", "an unknown status passes", said(first="HTTP/1.1 499 x"), GET, 499, b"{}", []),
    ("S15.2", "interim answers are no answer", "HTTP/1.1 100 x\r\n\r\nHTTP/1.1 102 x\r\nA: b\r\n\r\n" + said(), GET,
     200, b"{}", ["!A: b"]),
    ("S15.2", "and have no body, whatever they say", "HTTP/1.1 103 x\r\nContent-Length: 99\r\n\r\n" + said(), GET, 200,
     b"{}", [b"Content-Length: 2\r\n"]),
    ("S15.2", "an interim answer that is malformed", "HTTP/1.1 100 x\r\nA : b\r\n\r\n" + said(), GET, 502, None, []),
    ("6.1", "a 204 has no length", said("Content-Length: 0\r\n", "", "HTTP/1.1 204 x"), GET, 204, b"",
     ["!Content-Length"]),
    ("6.1", "nor to HEAD", said(TWO, "", "HTTP/1.1 204 x"), HEAD, 204, b"", ["!Content-Length"]),
    ("6.1", "nor chunks", said(CODED, "", "HTTP/1.1 204 x"), HEAD, 204, b"", ["!Transfer-Encoding"]),
    ("6.1", "HEAD of HTTP/1.0 is told of no coding", said(CODED, ""), OLD_HEAD, 200, b"", ["!Transfer-Encoding"]),
    ("6.1", "HEAD of HTTP/1.1 may be", said(CODED, ""), HEAD, 200, b"", [CODED.encode(), "!Content-Length"]),
    ("6.2", "HEAD keeps its length", said(TWO, ""), HEAD, 200, b"", [b"Content-Length: 2\r\n"]),
    ("S8.6", "a length that came twice is sent once", said(TWO + TWO), GET, 200, b"{}",
     [TWO.encode(), "1Content-Length"]),
    ("S8.6", "to HEAD", said(TWO + TWO, ""), HEAD, 200, b"", [TWO.encode(), "1Content-Length"]),
    ("S8.6", "in a 304", said(TWO + "A: b\r\n" + TWO, "", "HTTP/1.1 304 x"), GET, 304, b"",
     [TWO.encode(), "1Content-Length", b"A: b\r\n"]),
    ("6.3", "lengths that differ, to HEAD", said(TWO + "Content-Length: 3\r\n", ""), HEAD, 502, b"", []),
    ("6.1", "HTTP/1.0 has no codings", said(CODED, "0\r\n\r\n", "HTTP/1.0 200 OK"), GET, 502, None, []),
    ("6.3", "a length with zeros before it is sent as it counts", said("Content-Length: 002\r\n"), GET, 200, b"{}",
     [b"Content-Length: 2\r\n"]),
    ("7.1.1", "extensions of chunks go no further", said(CODED, '2;a="b\tc"\r\n{}\r\n0;d\r\n\r\n'), GET, 200, b"{}",
     []),
    ("7.1.2", "trailers are not merged into the header", said(CODED, "2\r\n{}\r\n0\r\nSet-Cookie: a\r\n\r\n"), GET,
     200, b"{}", ["!Set-Cookie"]),
    ("7.1.2", "and are read as strictly", said(CODED, "2\r\n{}\r\n0\r\nA\nB: c\r\n\r\n"), GET, 502, None, []),
    ("S7.6.1", "what Connection names goes no further", said(TWO + "A: 1\r\nConnection: a, B\r\nb: 2\r\nC: 3\r\n"),
     GET, 200, b"{}", ["!A: 1", "!b: 2", b"C: 3\r\n"]),
    ("S7.6.1", "not even what frames the message, which is framed anew", said(TWO + "Connection: content-length\r\n"),
     GET, 200, b"{}", [b"Content-Length: 2\r\n"]),
    ("S11.7.1", "a challenge of a proxy is for its client", said(TWO + "Proxy-Authenticate: Basic\r\n",
     first="HTTP/1.1 407 x"), GET, 407, b"{}", ["!Proxy-Authenticate"]),
    ("S11.6.1", "one of the server passes", said(TWO + "WWW-Authenticate: Basic\r\n", first="HTTP/1.1 401 x"), GET, 401,
     b"{}", [b"WWW-Authenticate: Basic\r\n"]),
    ("S6.6.1", "an answer without a Date gets one", said(), GET, 200, b"{}", [b"Date: "]),
    ("S6.6.1", "that of the server is kept", said(TWO + "Date: then\r\n"), GET, 200, b"{}",
     [b"Date: then\r\n", "1Date: "]),
    ("S7.6.3", "Via passes, and need not be added to", said(TWO + "Via: 1.1 a\r\n"), GET, 200, b"{}",
     [b"Via: 1.1 a\r\n"]),
    ("11.1", "a body that looks like an answer is a body", said("Content-Length: %d\r\n" % len(said()), said()), GET,
     200, said().encode(), []),
    ("11.1", "a line end in a value splits nothing", said(TWO + "Location: /\nSet-Cookie: a\r\n"), GET, 502, None,
     ["!Set-Cookie"]),
    ("11.1", "nor does half of one", said(TWO + "Location: /\rSet-Cookie: a\r\n"), GET, 502, None, ["!Set-Cookie"]),
    ("11.1", "nor one in the reason", said(first="HTTP/1.1 200 OK\rSet-Cookie: a"), GET, 502, None, ["!Set-Cookie"]),
    ("11.1", "a letter whose low byte is a line end is none", said(TWO + "A: b\xc4\x8aSet-Cookie: c\r\n"), GET, 200,
     b"{}", [b"A: b\xc4\x8aSet-Cookie: c\r\n", "!\nSet-Cookie"]),
    ("5.2", "a folded line", said(TWO + "A: b\r\n Content-Length: 9\r\n"), GET, 502, None, []),
]  # fmt: skip


@pytest.mark.parametrize("rule", ids(ANSWERS))
def test_proxy_keeps_the_rule_for_answers(wire, rule):
    """And what the upstream said has no part in what the next client gets."""
    _, _, text, sent, status, body, words = rule
    (got,), (_,) = exchange(wire, sent, [{"send": text}] + [{"stall": True}] * (status == 502))
    assert got.status == status
    assert got.body == body if body is not None else b"the upstream's answer cannot be read" in got.body
    check_words(got.head.encode("latin-1") + b"\r\n", words)
    (following,), _ = exchange(wire, GET)
    assert (following.status, b"hello" in following.body) == (200, True)


def test_second_answer_of_an_upstream_is_that_of_no_request(wire):
    """11.1: of two requests in a pipeline, too, the second one gets its own."""
    evil = said("Content-Length: 4\r\n", "EVIL")
    found, seen = exchange(wire, get(X) + get(b"/v1/y", CLOSE), {"send": said() + evil})
    assert [answer.body for answer in found][0] == b"{}"
    assert b"hello" in found[1].body
    assert [request["target"] for request in seen] == ["/v1/x", "/v1/y"]
    assert seen[0]["connection"] != seen[1]["connection"]


def test_pipeline_with_a_head_in_it_is_answered_in_order(wire):
    """9.3.2: none of the bodies is taken for another's."""
    (head, got), seen = exchange(wire, get(X, method=b"HEAD") + GET, {"send": said("Content-Length: 9\r\n", "")})
    assert (head.values("content-length"), head.body, got.status) == (["9"], b"", 200)
    assert [request["method"] for request in seen] == ["HEAD", "GET"]


def test_interim_answer_is_not_sent_again_to_a_client_that_goes_on(wire):
    """S10.1.1: one 100 of the proxy's own, none of the upstream's."""
    proxy, upstream = wire
    upstream.script({"send": "HTTP/1.1 100 Continue\r\n\r\n" + said()})
    with socket.create_connection(("127.0.0.1", proxy.port), TIMEOUT) as sock:
        sock.sendall(post(b"Expect: 100-continue\r\nContent-Length: 2\r\n" + CLOSE, target=X))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"{}")
        (got,) = responses(b"".join(iter(lambda: sock.recv(65536), b"")))
    assert (got.status, got.body) == (200, b"{}")


# ----------------------------------------------------------------------------------------------------------------------
# Elsewhere.
# ----------------------------------------------------------------------------------------------------------------------

ELSEWHERE = [
    ("2.2", "other bad header lines", "test_bad_input", "test_bad_header_is_refused"),
    ("2.2", "bare LF is seen before the header's end", "test_bad_input",
     "test_lines_that_end_in_bare_LF_are_refused_at_once"),
    ("3", "other bad request lines", "test_bad_input", "test_bad_request_line_is_refused"),
    ("S5.4", "limits of a header", "test_bad_input", "test_too_long_a_header_is_refused"),
    ("6.3", "other bad lengths and codings", "test_bad_input", "test_body_of_unclear_length_is_refused"),
    ("7.1", "other bad chunks and trailers", "test_bad_input", "test_bad_chunk_is_refused"),
    ("8", "other places to stop at", "test_bad_input", "test_client_that_stops_sending_in_the_middle_is_refused"),
    ("9.3.2", "pipelines", "test_bad_input", "test_pipelined_requests_are_answered_in_order"),
    ("9.5", "timeouts", "test_bad_input", "test_header_that_comes_too_slowly_is_refused"),
    ("9.6", "a refusal is read before the close", "test_bad_input",
     "test_refused_client_may_finish_sending_and_then_reads_why"),
    ("S10.1.1", "100 where the body has not come", "test_bad_input", "test_client_that_expects_it_is_told_to_continue"),
    ("S10.1.1", "none where it has", "test_bad_input",
     "test_client_that_sends_its_body_at_once_is_not_told_to_continue"),
    ("S10.1.1", "no 100 before a refusal", "test_http_server",
     "test_client_is_told_to_go_on_only_when_its_body_is_wanted"),
    ("S11.6.1", "401 has a challenge", "test_bad_input", "test_key_is_asked_for"),
    ("S15.5.6", "405 has Allow", "test_bad_input", "test_wrong_method_is_told_what_is_allowed"),
    ("11.2", "bodies that are refused are no requests", "test_bad_input",
     "test_body_of_a_refused_request_is_never_taken_for_a_request"),
    ("6.1", "chunks become a length", "test_proxy_forwarding", "test_chunked_request_arrives_with_its_length"),
    ("6.1", "HTTP/1.0 clients get no chunks", "test_proxy_forwarding", "test_client_of_http_1_0_gets_no_chunks"),
    ("6.3", "each framing of an answer", "test_proxy_forwarding", "test_answer_passes"),
    ("6.3", "bad answers are 502", "test_proxy_forwarding", "test_malformed_answer_is_502"),
    ("8", "a cut answer is cut for the client", "test_proxy_streams",
     "test_break_of_the_upstream_is_one_for_the_client"),
    ("8", "in HTTP/1.0, too", "test_proxy_streams", "test_client_of_http_1_0_sees_a_break_as_a_reset"),
    ("9.3", "which connections are used again", "test_proxy_forwarding",
     "test_connection_that_is_not_clean_is_not_used_again"),
    ("9.3.1", "one that has ended is replaced", "test_proxy_forwarding",
     "test_kept_connection_that_ends_as_it_is_used_is_no_attempt"),
    ("11.1", "late answers are nobody's", "test_proxy_forwarding",
     "test_answer_that_nobody_asked_for_is_not_that_of_the_next_call"),
    ("S4.2.3", "dot segments are not passed on", "test_proxy_forwarding", "test_path_that_leads_out_is_refused"),
    ("S7.6.1", "all fields of a connection, in requests", "test_proxy_forwarding",
     "test_request_fields_pass_but_those_of_the_connection"),
    ("S7.6.1", "and in answers", "test_proxy_forwarding", "test_answer_fields_pass_but_those_of_the_connection"),
    ("S7.6.3", "loops", "test_proxy_forwarding", "test_call_to_itself_is_refused"),
    ("S9.1", "unknown methods pass", "test_proxy_forwarding", "test_method_passes"),
    ("S8.6", "a length where the method means one", "test_proxy_forwarding",
     "test_empty_body_has_a_length_where_the_method_means_one"),
    ("S12.5.3", "no coding that the client does not take", "test_proxy_forwarding",
     "test_gzip_is_asked_for_where_the_client_takes_it"),
]  # fmt: skip


@pytest.mark.parametrize("module", sorted({rule[2] for rule in ELSEWHERE}))
def test_rules_that_stand_elsewhere_do(module):
    with open(os.path.join(HERE, module + ".py"), encoding="utf-8") as file:
        text = file.read()
    missing = [name for _, _, place, name in ELSEWHERE if place == module and "\ndef %s(" % name not in text]
    assert missing == []


UNSENDABLE = [
    ("X", "a\r\nY: b"), ("X", "a\nb"), ("X", "a\rb"), ("X", "a\0"), ("X", "\x7f"), ("X\r\nY", "a"), ("X Y", "a"),
    ("X:", "a"), ("", "a"), ("\xe9", "a"),
]  # fmt: skip


@pytest.mark.parametrize("field", UNSENDABLE, ids=repr)
def test_field_that_would_break_a_header_is_not_sent(field):
    fields = [("A", "b"), field, ("C", "d")]
    with pytest.raises(ValueError, match="cannot be sent"):
        response_head(200, fields)
    with pytest.raises(ValueError, match="cannot be sent"):
        request_head("GET", "/", fields)
