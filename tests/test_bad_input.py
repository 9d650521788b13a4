"""What the HTTP server refuses, with which status and words, and the unusual input that it takes; over raw sockets."""

import itertools
import json
import os
import socket

import pytest

from rock_ms import BODY_BYTES_PER_SECOND, MAX_HEAD_BYTES, MAX_TARGET_BYTES, ClientGone, Connection, ProtocolError
from support import TIMEOUT, running, talk

LINE = b"GET /health HTTP/1.1"
HOST = b"Host: x\r\n"
PATHS = [b"/v1/agent/watch", b"/v1/chat/completions"]
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 501: "server_error"}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """One service for all of this file: whatever a test sent, the next one is answered."""
    with running(tmp_path_factory.mktemp("service")) as service:
        yield service
        assert not any("Traceback" in line for line in service.logged), service.logged


def get(fields=HOST, line=LINE):
    return line + b"\r\n" + fields + b"\r\n"


def post(fields=b"", body=b"", path=PATHS[0]):
    return get(HOST + fields, b"POST " + path + b" HTTP/1.1") + body


def sized(body, fields=b"", path=PATHS[0]):
    return post(b"Content-Length: %d\r\n%s" % (len(body), fields), body, path)


def chunked(body, fields=b""):
    return post(b"Transfer-Encoding: chunked\r\n" + fields, body)


def last(path=b"/health"):
    """A request that the server closes after."""
    return get(HOST + b"Connection: close\r\n", b"GET " + path + b" HTTP/1.1")


class Answer:
    """One response, read strictly off the front of `data`; `rest` is what follows it."""

    def __init__(self, data, has_body=True):
        head, end, self.rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        version, status, reason = first.split(" ", 2)
        assert end and version == "HTTP/1.1" and reason, data
        self.status, self.fields, self.body = int(status), dict(line.lower().split(": ", 1) for line in lines), b""
        assert len(self.fields) == len(lines), "a header field stands there twice: %r" % head
        if self.status >= 200 and has_body:
            length = int(self.fields["content-length"])
            self.body, self.rest = self.rest[:length], self.rest[length:]
            assert len(self.body) == length, data

    @property
    def closes(self):
        return self.fields.get("connection") == "close"

    def json(self):
        assert self.fields["content-type"] == "application/json"
        return json.loads(self.body.decode("utf-8"))

    def check_error(self, status, *words):
        """Assert that it is an error as OpenAI's clients read them, whose message has all the words."""
        assert self.status == status, self.body
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and list(self.json()) == ["error"]
        assert error["type"] == ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        for word in words:
            assert word in error["message"]
        return error


def answers(data):
    """All the responses in `data`, which is nothing else."""
    found = []
    while data:
        found.append(Answer(data))
        data = found[-1].rest
    return found


def check_refused(port, data, status, *words, half_close=False):
    """Assert that the server answers once with that error and closes, and takes nothing behind it for a request."""
    (answer,) = answers(talk(port, data if half_close else data + last(), half_close))
    answer.check_error(status, *words)
    assert answer.closes
    return answer


def check_error_and_kept(port, data, status, *words):
    """Assert that the server answers with that error and then takes the connection's next request."""
    answer, following = answers(talk(port, data + last()))
    assert not answer.closes
    assert following.status == 200
    return answer, answer.check_error(status, *words)


def cases(table):
    """Parametrize by a table of name: (values...)."""
    rows = [(name, row if isinstance(row, tuple) else (row,)) for name, row in table.items()]
    return [pytest.param(*row, id=name.replace(" ", "-")) for name, row in rows]


# Malformed: answered once, then closed ------------------------------------------------------------------------------

SHAPE, TARGET, VERSION = "the request line is not", "request target", "does not end in HTTP/1.1"
REQUEST_LINES = {
    "one word": (b"GET", 400, SHAPE),
    "no version": (b"GET /health", 400, SHAPE),
    "four words": (b"GET /health /health HTTP/1.1", 400, SHAPE),
    "two spaces": (b"GET  /health HTTP/1.1", 400, SHAPE),
    "tabs": (b"GET\t/health\tHTTP/1.1", 400, SHAPE),
    "trailing space": (LINE + b" ", 400, SHAPE),
    "leading space": (b" /health HTTP/1.1", 400, "method"),
    "method that is no token": (b"G@T /health HTTP/1.1", 400, "method"),
    "method that is not ascii": (b"G\xc9T /health HTTP/1.1", 400, "method"),
    "empty target": (b"GET  HTTP/1.1", 400, TARGET),
    "target without a path": (b"GET ?health HTTP/1.1", 400, TARGET),
    "target that is not ascii": (b"GET /\xff HTTP/1.1", 400, TARGET),
    "target with a control character": (b"GET /\x01 HTTP/1.1", 400, TARGET),
    "target with a NUL": (b"GET /\0 HTTP/1.1", 400, TARGET),
    "lower case version": (b"GET /health http/1.1", 400, VERSION),
    "version without minor": (b"GET /health HTTP/1", 400, VERSION),
    "version with three digits": (b"GET /health HTTP/1.10", 400, VERSION),
    "other protocol": (b"GET /health RTSP/1.0", 400, VERSION),
    "target too long": (b"GET /%s HTTP/1.1" % (b"x" * MAX_TARGET_BYTES), 414, "%d bytes" % MAX_TARGET_BYTES),
    "version 0.9": (b"GET /health HTTP/0.9", 505, "HTTP/1.1"),
    "version 2": (b"PRI * HTTP/2.0", 505, "HTTP/1.1"),
}


@pytest.mark.parametrize("line, status, words", cases(REQUEST_LINES))
def test_bad_request_line_is_refused(service, line, status, words):
    check_refused(service.port, get(line=line), status, words)


ONE_HOST, CRLF, FIELD, FOLDED = "exactly one Host", "does not end in CRLF", "not 'Name: value'", "folded"
HEADERS = {
    "no host": (b"", ONE_HOST),
    "two hosts": (HOST + HOST, ONE_HOST),
    "host with a space": (b"Host: x y\r\n", "Host"),
    "host with a path": (b"Host: x/health\r\n", "Host"),
    "space before colon": (b"Host : x\r\n", FIELD),
    "tab before colon": (b"Host\t: x\r\n", FIELD),
    "no colon": (HOST + b"Accept\r\n", FIELD),
    "no name": (HOST + b": x\r\n", FIELD),
    "name with a space": (HOST + b"A b: x\r\n", FIELD),
    "name that is not ascii": (HOST + b"\xc9: x\r\n", FIELD),
    "folded field": (HOST + b"A: b\r\n c\r\n", FOLDED),
    "field folded with a tab": (HOST + b"A: b\r\n\tc\r\n", FOLDED),
    "space before the first field": (b" Host: x\r\n", FOLDED),
    "bare LF": (b"Host: x\nA: b\r\n", CRLF),
    "bare LF before the end": (b"Host: x\n", CRLF),
    "bare CR": (b"Host: x\rA: b\r\n", CRLF),
    "CR twice": (b"Host: x\r\r\n", CRLF),
    "NUL": (HOST + b"Aa: \0\r\n", "a header field has a control character"),
    "control character": (HOST + b"Aa: b\x1b[2J\r\n", "a header field has a control character"),
    "DEL": (HOST + b"Aa: b\x7f\r\n", "a header field has a control character"),
}


@pytest.mark.parametrize("fields, words", cases(HEADERS))
def test_bad_header_is_refused(service, fields, words):
    check_refused(service.port, get(fields), 400, words)


def test_lines_that_end_in_bare_LF_are_refused_at_once(service):
    check_refused(service.port, get().replace(b"\r\n", b"\n"), 400, CRLF)
    check_refused(service.port, b"\n" + get(), 400, CRLF)
    (answer,) = answers(talk(service.port, get().replace(b"\r\n", b"\n")))  # which is all that comes
    answer.check_error(400, CRLF)


def test_http10_request_cannot_have_two_hosts(service):
    check_refused(service.port, get(HOST + HOST, b"GET /health HTTP/1.0"), 400, ONE_HOST)


@pytest.mark.parametrize("is_finished", [True, False])
def test_too_long_a_header_is_refused(service, is_finished):
    fields = HOST + b"A: %s\r\n" % (b"x" * MAX_HEAD_BYTES)
    data = get(fields) if is_finished else LINE + b"\r\n" + fields
    check_refused(service.port, data, 431, "header", "%d bytes" % MAX_HEAD_BYTES)


LENGTH, CODING, AMBIGUOUS = "Content-Length must be one decimal number", "transfer coding", "ambiguous"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
FRAMINGS = {
    "two lengths": (b"Content-Length: 2\r\nContent-Length: 3\r\n", 400, LENGTH + ", got '2, 3'"),
    "the same length twice": (b"Content-Length: 2\r\nContent-Length: 2\r\n", 400, LENGTH),
    "list of lengths": (b"Content-Length: 2, 2\r\n", 400, LENGTH),
    "negative length": (b"Content-Length: -1\r\n", 400, LENGTH),
    "length with a sign": (b"Content-Length: +2\r\n", 400, LENGTH),
    "hexadecimal length": (b"Content-Length: 0x2\r\n", 400, LENGTH),
    "fraction as length": (b"Content-Length: 2.0\r\n", 400, LENGTH),
    "length with underscore": (b"Content-Length: 1_0\r\n", 400, LENGTH),
    "length with a space": (b"Content-Length: 1 0\r\n", 400, LENGTH),
    "word as length": (b"Content-Length: two\r\n", 400, LENGTH),
    "digit that is not ascii": (b"Content-Length: \xb2\r\n", 400, LENGTH),
    "empty length": (b"Content-Length:\r\n", 400, LENGTH),
    "length of too many digits": (b"Content-Length: %s\r\n" % (b"9" * 5000), 400, LENGTH),
    "huge length": (b"Content-Length: %s\r\n" % (b"9" * 18), 413, "larger than"),
    "length and chunked": (b"Content-Length: 2\r\n" + CHUNKED, 400, AMBIGUOUS),
    "chunked and length": (CHUNKED + b"Content-Length: 2\r\n", 400, AMBIGUOUS),
    "other coding": (b"Transfer-Encoding: gzip\r\n", 400, CODING),
    "coding before chunked": (b"Transfer-Encoding: gzip, chunked\r\n", 501, CODING),
    "coding after chunked": (b"Transfer-Encoding: chunked, identity\r\n", 400, CODING),
    "chunked twice": (CHUNKED + CHUNKED, 501, CODING),
    "chunked with parameter": (b"Transfer-Encoding: chunked;a=b\r\n", 400, CODING),
    "no-break space before chunked": (b"Transfer-Encoding: \xa0chunked\r\n", 400, CODING),
    "vertical tab before chunked": (b"Transfer-Encoding: \x0bchunked\r\n", 400, "control character"),
    "other expectation": (b"Expect: 200-ok\r\nContent-Length: 2\r\n", 417, "100-continue"),
    "two expectations": (b"Expect: 100-continue, more\r\nContent-Length: 2\r\n", 417, "100-continue"),
    "no-break space in expectation": (b"Expect: 100-continue\xa0\r\nContent-Length: 2\r\n", 417, "100-continue"),
}


@pytest.mark.parametrize("fields, status, words", cases(FRAMINGS))
def test_body_of_unclear_length_is_refused(service, fields, status, words):
    check_refused(service.port, post(fields, b"{}"), status, words)


def test_http10_request_cannot_be_chunked(service):
    data = get(CHUNKED, b"POST /v1/agent/watch HTTP/1.0") + b"0\r\n\r\n"
    check_refused(service.port, data, 400, "Transfer-Encoding in an HTTP/1.0 request")


SIZE, BETWEEN = "no valid size", "between the chunks"
CHUNKS = {
    "no size": (b"\r\n{}\r\n0\r\n\r\n", 400, SIZE),
    "negative size": (b"-2\r\n{}\r\n0\r\n\r\n", 400, SIZE),
    "size with a sign": (b"+2\r\n{}\r\n0\r\n\r\n", 400, SIZE),
    "size with 0x": (b"0x2\r\n{}\r\n0\r\n\r\n", 400, SIZE),
    "size with underscore": (b"0_2\r\n{}\r\n0\r\n\r\n", 400, SIZE),
    "size that is no number": (b"g\r\n{}\r\n0\r\n\r\n", 400, SIZE),
    "space before size": (b" 2\r\n{}\r\n0\r\n\r\n", 400, SIZE),
    "two sizes": (b"2 2\r\n{}\r\n0\r\n\r\n", 400, SIZE),
    "size of too many digits": (b"f" * 16 + b"\r\n{}", 400, SIZE),
    "huge size": (b"f" * 15 + b"\r\n{}", 413, "larger than"),
    "chunk longer than its size": (b"1\r\n{}\r\n0\r\n\r\n", 400, "not as long as it says"),
    "chunk shorter than its size": (b"3\r\n{}\r\n0\r\n\r\n", 400, "not as long as it says"),
    "chunk that ends in LF": (b"2\r\n{}\n0\r\n\r\n", 400, "not as long as it says"),
    "size that ends in LF": (b"2\n{}\r\n0\r\n\r\n", 400, BETWEEN),
    "bare CR in an extension": (b"2;a\rb\r\n{}\r\n0\r\n\r\n", 400, "chunk"),
    "control character in an extension": (b"2;a\0b\r\n{}\r\n0\r\n\r\n", 400, "chunk"),
    "too long an extension": (b"2;" + b"x" * 2000 + b"\r\n{}\r\n0\r\n\r\n", 400, BETWEEN),
    "trailer without a colon": (b"2\r\n{}\r\n0\r\nA\r\n\r\n", 400, FIELD),
    "folded trailer": (b"2\r\n{}\r\n0\r\nA: b\r\n c\r\n\r\n", 400, FOLDED),
    "trailer that ends in LF": (b"2\r\n{}\r\n0\r\nA: b\n\r\n", 400, BETWEEN),
    "too long a trailer": (b"2\r\n{}\r\n0\r\n" + b"A: b\r\n" * (MAX_HEAD_BYTES // 4 + 1) + b"\r\n", 431, "trailer"),
}


@pytest.mark.parametrize("body, status, words", cases(CHUNKS))
def test_bad_chunk_is_refused(service, body, status, words):
    check_refused(service.port, chunked(body), status, words)


IN_HEADER, IN_BODY = "closed in the middle of a request header", "closed in the middle of a request body"
CUTS = {
    "in the request line": (b"GET /hea", IN_HEADER),
    "behind the request line": (LINE + b"\r\n", IN_HEADER),
    "before the last line end": (get()[:-2], IN_HEADER),
    "in TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", IN_HEADER),
    "before the body": (post(b"Content-Length: 2\r\n"), IN_BODY),
    "in the body": (post(b"Content-Length: 3\r\n", b"{}"), IN_BODY),
    "before the first chunk": (chunked(b""), IN_BODY),
    "in a chunk size": (chunked(b"2"), IN_BODY),
    "in a chunk": (chunked(b"3\r\n{}"), IN_BODY),
    "behind a chunk": (chunked(b"2\r\n{}"), IN_BODY),
    "between chunks": (chunked(b"2\r\n{}\r\n"), IN_BODY),
    "in the trailers": (chunked(b"2\r\n{}\r\n0\r\nA: b\r\n"), IN_BODY),
}


@pytest.mark.parametrize("data, words", cases(CUTS))
def test_client_that_stops_sending_in_the_middle_is_refused(service, data, words):
    check_refused(service.port, data, 400, words, half_close=True)


@pytest.mark.parametrize("data", [b"", b"\r\n", b"\r\n\r\n"])
def test_client_that_stops_sending_between_requests_gets_no_answer(service, data):
    assert talk(service.port, data, half_close=True) == b""


def test_malformed_request_behind_good_ones_is_refused_after_their_answers(service):
    good, better, bad = answers(talk(service.port, get() + sized(b"{}") + get(b"") + last()))
    assert (good.status, better.status, bad.status) == (200, 400, 400)
    assert [answer.closes for answer in (good, better, bad)] == [False, False, True]


# Too slow: on a clock of the test -----------------------------------------------------------------------------------


class SlowClient:
    """A clock; at each look at it some seconds have gone by, and the client has sent one more piece."""

    def __init__(self, pieces, seconds):
        self.server_side, self._client_side = socket.socketpair()
        self._pieces, self._seconds, self._now = iter(pieces), seconds, 0

    def __call__(self):
        self._now += self._seconds
        for piece in itertools.islice(self._pieces, 1):
            self._client_side.sendall(piece)
        return self._now

    def connection(self):
        return Connection(self.server_side, 10**9, self)

    def reset(self):
        self._client_side.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server_side.close()
        self._client_side.close()


def pieces_of(data, size=1):
    return [data[at : at + size] for at in range(0, len(data), size)]


def test_header_that_comes_too_slowly_is_refused():
    with SlowClient(pieces_of(get()), seconds=4) as client, pytest.raises(ProtocolError, match="too slowly") as error:
        client.connection().read_head()
    assert error.value.status == 408


def test_header_may_take_some_seconds():
    with SlowClient(pieces_of(get()), seconds=0.5) as client:
        assert client.connection().read_head().path == "/health"


@pytest.mark.parametrize("fields", [b"Content-Length: 40\r\n", CHUNKED])
def test_body_that_comes_too_slowly_is_refused(fields):
    body = b"24\r\n" + b"x" * 36
    with SlowClient([post(fields)] + pieces_of(body), seconds=4) as client:
        connection = client.connection()
        head = connection.read_head()
        with pytest.raises(ProtocolError, match="too slowly") as error:
            connection.read_body(head)
    assert error.value.status == 408


@pytest.mark.parametrize("is_chunked", [False, True])
def test_long_body_may_take_longer(is_chunked):
    body, speed = b"x" * 64 * BODY_BYTES_PER_SECOND, 4 * BODY_BYTES_PER_SECOND
    framed = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    message = chunked(framed) if is_chunked else sized(body)
    with SlowClient(pieces_of(message, speed), seconds=4.5) as client:
        connection = client.connection()
        assert connection.read_body(connection.read_head()) == body


def test_idle_connection_is_closed_without_a_word():
    with SlowClient([], seconds=700) as client:
        assert client.connection().read_head() is None


def test_client_that_reset_its_connection_is_gone():
    with SlowClient([], seconds=1) as client:
        connection = client.connection()
        connection.write(b"never read")
        client.reset()
        with pytest.raises(ClientGone):
            connection.read_head()
        with pytest.raises(ClientGone):
            connection.write(b"x")


def test_client_that_takes_nothing_more_is_gone():
    with SlowClient([], seconds=100) as client, pytest.raises(ClientGone):
        client.connection().write(b"x" * 10**7)


# Well-formed, but refused -------------------------------------------------------------------------------------------

NO_ROUTE = {
    "unknown path": (get(line=b"GET /nowhere HTTP/1.1"), "/nowhere"),
    "near miss": (get(line=b"POST /v1/chat/completion HTTP/1.1"), "there are /v1/chat/completions, /v1/models"),
    "upper case": (get(line=b"GET /HEALTH HTTP/1.1"), "/HEALTH"),
    "two slashes": (get(line=b"GET //health HTTP/1.1"), "//health"),
    "percent escape": (get(line=b"GET /%68ealth HTTP/1.1"), "/%68ealth"),
    "asterisk": (get(line=b"OPTIONS * HTTP/1.1"), "*"),
    "longest target": (get(line=b"GET /%s HTTP/1.1" % (b"x" * (MAX_TARGET_BYTES - 1))), "there is no /xxx"),
}


@pytest.mark.parametrize("data, words", cases(NO_ROUTE))
def test_unknown_path_is_not_found(service, data, words):
    check_error_and_kept(service.port, data, 404, words)


NOT_ALLOWED = {
    "post to health": (b"POST /health", "get, head"),
    "delete of a model": (b"DELETE /v1/models/m", "get, head"),
    "get of chat": (b"GET /v1/chat/completions", "post"),
    "unknown method": (b"BREW /v1/agent/watch", "post"),
    "lower case method": (b"get /health", "get, head"),
}


@pytest.mark.parametrize("words, allowed", cases(NOT_ALLOWED))
def test_wrong_method_is_told_what_is_allowed(service, words, allowed):
    answer, _ = check_error_and_kept(
        service.port, get(line=words + b" HTTP/1.1"), 405, "allowed", words.split()[1].decode()
    )
    assert answer.fields["allow"] == allowed


def test_body_of_a_refused_request_is_never_taken_for_a_request(service):
    smuggled = get() * 3
    check_refused(service.port, sized(smuggled, path=b"/nowhere"), 404, "/nowhere")
    check_refused(service.port, sized(smuggled, path=b"/health"), 405, "/health")


@pytest.mark.parametrize("path", PATHS)
def test_post_without_a_length_is_refused(service, path):
    check_error_and_kept(service.port, post(path=path), 411, "Content-Length")


JSON = b"Content-Type: application/json\r\n"
MEDIA_TYPES = {
    "text": (b"Content-Type: text/plain\r\n", "text/plain"),
    "form": (b"Content-Type: application/x-www-form-urlencoded\r\n", "application/x-www-form-urlencoded"),
    "empty": (b"Content-Type:\r\n", "empty"),
    "almost json": (b"Content-Type: application/jsonx\r\n", "application/jsonx"),
    "other charset": (b"Content-Type: application/json; charset=latin-1\r\n", "latin-1"),
    "quoted charset": (b'Content-Type: application/json; charset="UTF-16"\r\n', "UTF-16"),
    "compressed": (JSON + b"Content-Encoding: gzip\r\n", "gzip"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("fields, words", cases(MEDIA_TYPES))
def test_body_that_is_not_utf8_json_by_its_header_is_refused(service, path, fields, words):
    check_error_and_kept(service.port, sized(b"{}", fields, path), 415, words)


BODIES = {
    "empty": (b"", "not JSON"),
    "white space": (b" \r\n", "not JSON"),
    "cut": (b'{"a":', "not JSON"),
    "single quotes": (b"{'a': 1}", "not JSON"),
    "two values": (b"{}{}", "not JSON"),
    "text behind": (b"{} x", "not JSON"),
    "raw newline in a string": (b'{"a":"\n"}', "not JSON"),
    "NUL behind": (b"{}\0", "not JSON"),
    "not utf-8": (b'{"a":"\xff"}', "not UTF-8 at byte 6"),
    "surrogate in utf-8": (b'{"a":"\xed\xa0\x80"}', "not UTF-8 at byte 6"),
    "utf-16": ("{}".encode("utf-16"), "not UTF-8 at byte 0"),
    "NaN": (b'{"a":NaN}', "NaN"),
    "Infinity": (b'{"a":Infinity}', "Infinity"),
    "-Infinity": (b'{"a":[-Infinity]}', "-Infinity"),
    "array": (b"[]", "must be a JSON object, got an array"),
    "string": (b'"{}"', "must be a JSON object, got a string"),
    "number": (b"1", "must be a JSON object, got a number"),
    "boolean": (b"true", "must be a JSON object, got a boolean"),
    "null": (b"null", "must be a JSON object, got null"),
    "deep arrays": (b'{"a":' + b"[" * 200000 + b"]" * 200000 + b"}", "nested too deeply"),
    "deep objects": (b'{"a":' * 200000 + b"1" + b"}" * 200000, "nested too deeply"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body, words", cases(BODIES))
def test_body_that_is_no_json_object_is_refused(service, path, body, words):
    check_error_and_kept(service.port, sized(body, JSON, path), 400, "the request body", words)


PIDS = {
    "none": (b"{}", "got null"),
    "null": (b'{"pid":null}', "got null"),
    "text": (b'{"pid":"1"}', 'got "1"'),
    "boolean": (b'{"pid":true}', "got true"),
    "fraction": (b'{"pid":1.0}', "got 1.0"),
    "zero": (b'{"pid":0}', "got 0"),
    "negative": (b'{"pid":-1}', "got -1"),
    "too large": (b'{"pid":2147483648}', "got 2147483648"),
    "lone surrogate": (b'{"pid":"\\ud800"}', r'got "\ud800"'),
    "the service itself": (b'{"pid":%d}' % os.getpid(), "is the model service itself"),
}


@pytest.mark.parametrize("body, words", cases(PIDS))
def test_bad_pid_is_refused_and_named(service, body, words):
    _, error = check_error_and_kept(service.port, sized(body), 400, words)
    assert error["param"] == "pid"


def test_no_depth_of_nesting_is_an_internal_error(service):
    for depth in list(range(900, 1000)) + [3000, 10000, 30000]:
        body = b'{"pid":' + b"[" * depth + b"]" * depth + b"}"
        answers(talk(service.port, sized(body, b"Connection: close\r\n")))[0].check_error(400)


# Limits and keys that are set ---------------------------------------------------------------------------------------


def test_body_larger_than_the_limit_is_refused(tmp_path):
    body = b'{"a":"%s"}' % (b"x" * 92)
    larger = body + b" "
    with running(tmp_path, max_body_bytes=len(body)) as service:
        check_error_and_kept(service.port, sized(body), 400, "pid")
        check_error_and_kept(
            service.port, chunked(b"32\r\n%s\r\n32\r\n%s\r\n0\r\n\r\n" % (body[:50], body[50:])), 400, "pid"
        )
        for data in (
            sized(larger),
            sized(larger, b"Expect: 100-continue\r\n"),
            chunked(b"65\r\n" + larger + b"\r\n0\r\n\r\n"),
            chunked(b"32\r\n%s\r\n33\r\n%s\r\n0\r\n\r\n" % (larger[:50], larger[50:])),
        ):
            check_refused(service.port, data, 413, "larger than 100 bytes")


def test_refused_client_may_finish_sending_and_then_reads_why(tmp_path):
    with running(tmp_path, max_body_bytes=100) as service:
        with socket.create_connection(("127.0.0.1", service.port), TIMEOUT) as sock:
            sock.sendall(sized(b"x" * 12000000))
            read_one(sock).check_error(413, "larger than 100 bytes")
            assert sock.recv(1) == b""


KEY = "open-sesame"
AUTHORISATIONS = {
    "right": ("Bearer " + KEY, 200),
    "right in lower case": ("bearer " + KEY, 200),
    "right with more spaces": ("Bearer  " + KEY + " ", 200),
    "missing": (None, 401),
    "empty": ("", 401),
    "scheme only": ("Bearer", 401),
    "key only": (KEY, 401),
    "other scheme": ("Basic " + KEY, 401),
    "wrong": ("Bearer other", 401),
    "upper case": ("Bearer " + KEY.upper(), 401),
    "begin of the key": ("Bearer " + KEY[:-1], 401),
    "key and more": ("Bearer " + KEY + "x", 401),
    "no-break space behind": ("Bearer " + KEY + "\xa0", 401),
    "not ascii": ("Bearer séame", 401),
}


@pytest.fixture(scope="module")
def locked(service, tmp_path_factory):
    """A service that asks for a key.  It needs `service` only so as to be stopped before it."""
    with running(tmp_path_factory.mktemp("locked"), host=service.settings.host, api_key=KEY) as locked:
        yield locked


@pytest.mark.parametrize("value, status", cases(AUTHORISATIONS))
def test_key_is_asked_for(locked, value, status):
    field = b"" if value is None else ("Authorization: %s\r\n" % value).encode("utf-8")
    answer, following = answers(talk(locked.port, get(HOST + field, b"GET /v1/models HTTP/1.1") + last()))
    assert (answer.status, following.status) == (status, 200)
    if status == 401:
        assert answer.check_error(401, "Authorization: Bearer")["code"] == "invalid_api_key"
        assert answer.fields["www-authenticate"] == "bearer"


def test_key_is_asked_for_before_the_body_is_read(locked):
    for path in PATHS:
        check_refused(locked.port, sized(b"x" * 10000, path=path), 401, "API key")


@pytest.mark.parametrize("path, status", [("/", 200), ("/health", 200), ("/metrics", 401), ("/v1/models/m", 401)])
def test_only_health_and_name_are_open_without_a_key(locked, path, status):
    assert answers(talk(locked.port, last(path.encode())))[0].status == status


# Unusual, but taken -------------------------------------------------------------------------------------------------

GOOD_LINES = {
    "absolute form": b"GET http://other:80/health HTTP/1.1",
    "absolute form in upper case": b"GET HTTPS://other/health HTTP/1.1",
    "trailing slash": b"GET /health/ HTTP/1.1",
    "query": b"GET /health?a=/b HTTP/1.1",
    "query behind slash": b"GET /health/?a HTTP/1.1",
    "later minor version": b"GET /health HTTP/1.9",
    "empty lines before": b"\r\n\r\nGET /health HTTP/1.1",
}
GOOD_FIELDS = {
    "empty host": b"Host:\r\n",
    "host with port": b"Host: [::1]:80\r\n",
    "no space": b"host:x\r\n",
    "much space": b"HOST: \t x \t\r\n",
    "value that is not ascii": HOST + b"A: \xff\r\n",
    "body that nobody asked for": HOST + b"Content-Length: 4\r\n\r\n{}",
    "longest header": HOST + b"A: %s\r\n" % (b"x" * (MAX_HEAD_BYTES - len(LINE + HOST) - 5)),
}


@pytest.mark.parametrize("line", cases(GOOD_LINES))
def test_unusual_request_line_is_understood(service, line):
    answer, following = answers(talk(service.port, get(line=line) + last()))
    assert answer.json() == following.json() == {"status": "healthy"}


@pytest.mark.parametrize("fields", cases(GOOD_FIELDS))
def test_unusual_header_is_understood(service, fields):
    answer, following = answers(talk(service.port, get(fields) + last()))
    assert answer.json() == following.json() == {"status": "healthy"}


@pytest.mark.parametrize("target", [b"/", b"http://x", b"http://x/", b"http://x?a=/health", b"/?/health"])
def test_target_with_an_empty_path_is_the_root(service, target):
    assert answers(talk(service.port, last(target)))[0].json()["service"] == "rock-model-service"


def echoed(service, data):
    """The pid that a request to watch a process had, as the service read it."""
    answer, following = answers(talk(service.port, data + last()))
    assert following.status == 200
    return answer.check_error(400)["message"].partition("got ")[2]


GOOD_BODIES = {
    "one chunk": chunked(b'b\r\n{"pid":"a"}\r\n0\r\n\r\n'),
    "many chunks": chunked(b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"pid":"a"}') + b"00\r\n\r\n"),
    "extensions": chunked(b'00B ;a=b; c="d;e"\r\n{"pid":"a"}\r\n0;x\r\n\r\n'),
    "trailers": chunked(b'b\r\n{"pid":"a"}\r\n0\r\nContent-Length: 9\r\nA: b\r\n\r\n'),
    "chunked in upper case": post(b"Transfer-Encoding: CHUNKED\r\n", b'b\r\n{"pid":"a"}\r\n0\r\n\r\n'),
    "leading zeros": post(b"Content-Length: 0011\r\n", b'{"pid":"a"}'),
    "byte order mark": sized(b'\xef\xbb\xbf{"pid":"a"}'),
    "suffix in the type": sized(b'{"pid":"a"}', b"Content-Type: application/vnd.x+JSON ; Charset=UTF-8\r\n"),
    "identity encoding": sized(b'{"pid":"a"}', JSON + b"Content-Encoding: identity\r\n"),
    "white space": sized(b' {\r\n\t"pid" : "a" } '),
}


@pytest.mark.parametrize("data", cases(GOOD_BODIES))
def test_unusual_body_is_understood(service, data):
    assert echoed(service, data) == '"a"'


def test_request_is_understood_however_it_is_cut_into_pieces(service):
    with socket.create_connection(("127.0.0.1", service.port), TIMEOUT) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces_of(chunked(b'b\r\n{"pid":"a"}\r\n0\r\nA: b\r\n\r\n') + last()):
            sock.sendall(piece)
        data = b"".join(iter(lambda: sock.recv(65536), b""))
    assert [answer.status for answer in answers(data)] == [400, 200]


def read_one(sock):
    """The next response on a connection, which may stay open."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(1)
    head = Answer(data, has_body=False)
    while head.status >= 200 and len(data.partition(b"\r\n\r\n")[2]) < int(head.fields["content-length"]):
        data += sock.recv(1)
    return Answer(data)


def test_connection_is_used_again_after_answers_and_errors(service):
    with socket.create_connection(("127.0.0.1", service.port), TIMEOUT) as sock:
        for data, status in ((get(), 200), (sized(b"["), 400), (get(line=b"GET /x HTTP/1.1"), 404), (get(), 200)):
            sock.sendall(data)
            answer = read_one(sock)
            assert (answer.status, answer.closes) == (status, False)


def test_pipelined_requests_are_answered_in_order(service):
    numbers = range(50)
    data = b"".join(sized(b'{"pid":"%d"}' % number) for number in numbers) + last()
    got = [answer.json() for answer in answers(talk(service.port, data))[:-1]]
    assert [value["error"]["message"].partition("got ")[2] for value in got] == ['"%d"' % number for number in numbers]


@pytest.mark.parametrize(
    "framing, body", [(b"Content-Length: 11", b'{"pid":"a"}'), (CHUNKED[:-2], GOOD_BODIES["one chunk"][-21:])]
)
def test_client_that_expects_it_is_told_to_continue(service, framing, body):
    with socket.create_connection(("127.0.0.1", service.port), TIMEOUT) as sock:
        sock.sendall(post(b"Expect: 100-Continue\r\n" + framing + b"\r\n"))
        assert read_one(sock).status == 100
        sock.sendall(body)
        read_one(sock).check_error(400, 'got "a"')


def test_client_that_sends_its_body_at_once_is_not_told_to_continue(service):
    assert echoed(service, sized(b'{"pid":"a"}', b"Expect: 100-continue\r\n")) == '"a"'


@pytest.mark.parametrize("fields", [b"", b"Connection: keep-alive\r\n", HOST + b"Expect: 100-continue\r\n"])
def test_http10_client_is_answered_and_closed(service, fields):
    data = get(fields + b"Content-Length: 2\r\n", b"POST /v1/agent/watch HTTP/1.0") + b"{}"
    (answer,) = answers(talk(service.port, data))
    answer.check_error(400, "pid")
    assert answer.closes


@pytest.mark.parametrize("value", [b"close", b"Close", b"keep-alive, close", b"x\r\nConnection: close"])
def test_client_that_asks_to_close_is_closed(service, value):
    (answer,) = answers(talk(service.port, get(HOST + b"Connection: " + value + b"\r\n") + get()))
    assert answer.status == 200
    assert answer.closes


@pytest.mark.parametrize("path, status", [(b"/health", 200), (b"/v1/models/m", 200), (b"/x", 404)])
def test_head_has_the_header_of_get_and_no_body(service, path, status):
    data = talk(service.port, get(line=b"HEAD " + path + b" HTTP/1.1") + last(path))
    head = Answer(data, has_body=False)
    (answer,) = answers(head.rest)
    assert head.status == answer.status == status
    assert head.fields["content-length"] == answer.fields["content-length"]
