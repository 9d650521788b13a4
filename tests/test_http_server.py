"""The HTTP server's parts: what must hold between its threads, and how it ends."""

import contextlib
import hashlib
import logging
import socket
import threading

import pytest

from rock_ms import ApiError, HangupWatcher, HTTPService, Metrics, ProtocolError, RockError, Route, json_reply
from support import TIMEOUT, Service, ask, nothing_left, running, talk, wait_until


@pytest.fixture
def watcher():
    with nothing_left():
        watcher = HangupWatcher()
        yield watcher
        watcher.stop()


@pytest.fixture
def pair():
    one, other = socket.socketpair()
    with contextlib.closing(one), contextlib.closing(other):
        yield one, other


def test_hangup_is_seen_once(watcher, pair):
    seen = threading.Semaphore(0)
    watcher.watch(pair[0], seen.release)
    pair[1].close()
    assert seen.acquire(timeout=TIMEOUT)
    watcher.unwatch(pair[0])
    assert not seen.acquire(blocking=False)


def test_client_that_sends_its_next_request_is_not_gone(watcher, pair):
    seen = threading.Event()
    watcher.watch(pair[0], seen.set)
    pair[1].send(b"GET")
    wait_until(lambda: pair[0] not in [key.fileobj for key in list(watcher._selector.get_map().values())])
    pair[1].close()
    assert not seen.is_set()


def test_late_look_at_an_earlier_request_leaves_the_next_one_watched(watcher, pair):
    earlier, later = threading.Event(), threading.Event()
    watcher.watch(pair[0], earlier.set)
    key = watcher._selector.get_key(pair[0])
    watcher.unwatch(pair[0])
    watcher.watch(pair[0], later.set)
    watcher._look(key)
    pair[1].close()
    assert later.wait(TIMEOUT)
    assert not earlier.is_set()


def test_watching_and_unwatching_from_many_threads_never_fails(watcher):
    """Each thread's socket becomes readable at random moments of being watched and unwatched."""
    failures = []

    def work():
        one, other = socket.socketpair()
        try:
            for _ in range(500):
                watcher.watch(one, lambda: None)
                other.send(b"x")
                watcher.unwatch(one)
                one.recv(1)
        except Exception as error:
            failures.append(error)
        finally:
            watcher.unwatch(one)
            one.close()
            other.close()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_metrics_are_prometheus_text():
    metrics = Metrics()
    metrics.count("GET", "/health", 200, 0.5)
    metrics.count("GET", "/health", 200, 0.25)
    lines = metrics.render({"rock_x": 3}).splitlines()
    assert 'rock_http_requests_total{method="GET",route="/health",status="200"} 2' in lines
    assert 'rock_http_request_duration_seconds_sum{method="GET",route="/health",status="200"} 0.750000' in lines
    assert lines[-2:] == ["# TYPE rock_x gauge", "rock_x 3"]


def test_stop_closes_idle_connections_at_once_and_twice_is_harmless(tmp_path):
    with running(tmp_path) as service:
        idle = [socket.create_connection(("127.0.0.1", service.port), TIMEOUT) for _ in range(20)]
        for sock in idle[:10]:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: len(service.server.http._connections) == 20)
        service.server.stop()
        service.server.stop()
        for sock in idle:
            assert sock.recv(1) == b""
            sock.close()


def test_service_that_never_started_can_be_stopped(tmp_path):
    with nothing_left():
        Service(tmp_path).server.stop()


def test_port_that_is_taken_is_an_error_that_leaves_nothing(tmp_path):
    with running(tmp_path) as service, nothing_left():
        with pytest.raises(RockError, match="cannot listen on 127.0.0.1:%d" % service.port):
            Service(tmp_path, port=service.port)


def test_a_bug_is_a_plain_500_and_its_traceback_goes_to_the_log(service):
    service.server.http.router.find("GET", "/v1/models")[0].handler.__self__._models = None
    got = ask(service.port, method="GET", path="/v1/models")
    assert got.status == 500
    assert got.json()["error"]["message"].startswith("internal error")
    assert b"Traceback" not in got.body
    assert any("Traceback" in line and "/v1/models" in line for line in service.logged)


def test_request_log_line_holds_no_query_and_no_header(service):
    talk(service.port, b"GET /health?key=sk-1 HTTP/1.1\r\nHost: x\r\nAuthorization: sk-2\r\nConnection: close\r\n\r\n")
    line = wait_until(lambda: [line for line in service.logged if "/health" in line])[0]
    assert "GET /health 200" in line
    assert "sk-" not in line


# Streamed bodies ----------------------------------------------------------------------------------------------------

CHUNKS = b"POST %s HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def sized(path, body, length=None, fields=b""):
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n"
    return head % (path, len(body) if length is None else length, fields) + body


class Streams:
    """A service whose routes read a streamed body to its end, a piece of it, or nothing of it."""

    def __init__(self):
        self.pieces, self.errors = [], []
        self.has_piece = threading.Event()
        routes = [
            Route("POST", "/all", self._all, is_streamed=True),
            Route("POST", "/large", self._large, is_streamed=True, max_body_bytes=10**8),
            Route("POST", "/some", lambda request: json_reply(len(next(request.pieces))), is_streamed=True),
            Route("POST", "/none", self._refuse, is_streamed=True),
            Route("POST", "/whole", lambda request: json_reply([len(request.body), *request.pieces]), max_body_bytes=5),
        ]
        self.http = HTTPService("127.0.0.1", 0, routes, logging.Logger("test"), "test", max_body_bytes=100)
        self.port = self.http.port

    def _all(self, request):
        assert request.body == b""
        try:
            for piece in request.pieces:
                self.pieces.append(piece)
                self.has_piece.set()
        except ProtocolError as error:
            self.errors.append(error.status)
            raise
        return json_reply(b"".join(self.pieces).decode())

    def _large(self, request):
        digest, sizes = hashlib.sha256(), []
        for piece in request.pieces:
            digest.update(piece)
            sizes.append(len(piece))
        return json_reply([digest.hexdigest(), sum(sizes), max(sizes)])

    def _refuse(self, request):
        raise ApiError(409, "not now")


@pytest.fixture
def streams():
    with nothing_left():
        streams = Streams()
        streams.http.start()
        yield streams
        streams.http.stop()


def said(answer):
    """(status, whether it closes) of each response; what is behind the heads is not looked at."""
    heads = [part.partition(b"\r\n\r\n")[0] for part in answer.split(b"HTTP/1.1 ")[1:]]
    return [(int(head[:3]), b"Connection: close" in head) for head in heads]


WHOLE_BODIES = {
    "sized": sized(b"/all", b"x" * 100),
    "chunked": CHUNKS % b"/all" + b"32\r\n%s\r\n32\r\n%s\r\n0\r\n\r\n" % (b"x" * 50, b"x" * 50),
    "empty": sized(b"/all", b""),
}


@pytest.mark.parametrize("data", WHOLE_BODIES.values(), ids=list(WHOLE_BODIES))
def test_streamed_body_that_is_read_leaves_the_connection_for_the_next_request(streams, data):
    assert said(talk(streams.port, data + LAST)) == [(200, False), (200, True)]
    assert b"".join(streams.pieces) == b"x" * data.count(b"x", data.index(b"\r\n\r\n"))


@pytest.mark.parametrize("is_chunked", [False, True])
def test_handler_gets_each_piece_before_the_next_is_sent(streams, is_chunked):
    with socket.create_connection(("127.0.0.1", streams.port), TIMEOUT) as sock:
        sock.sendall(CHUNKS % b"/all" + b"3\r\none\r\n" if is_chunked else sized(b"/all", b"one", 6))
        assert streams.has_piece.wait(TIMEOUT)
        assert streams.pieces == [b"one"]
        sock.sendall(b"3\r\ntwo\r\n0\r\n\r\n" if is_chunked else b"two")
        assert sock.recv(65536).endswith(b'"onetwo"\n')


def test_large_body_comes_in_bounded_pieces(streams):
    body = bytes(range(256)) * 80_000
    digest, size, largest = ask(streams.port, body, path="/large").json()
    assert (digest, size) == (hashlib.sha256(body).hexdigest(), len(body))
    assert largest < 1_000_000


TOO_LARGE = {
    "sized": (sized(b"/all", b"x" * 101), []),
    "sized for a route with more": (sized(b"/large", b"", 10**8 + 1), []),
    "chunked": (CHUNKS % b"/all" + b"65\r\n" + b"x" * 101, [413]),
    "whole for a route with less": (sized(b"/whole", b"x" * 6), []),
}


@pytest.mark.parametrize("data, met", TOO_LARGE.values(), ids=list(TOO_LARGE))
def test_streamed_body_that_is_too_large_is_refused_before_it_has_come(streams, data, met):
    assert said(talk(streams.port, data, half_close=True)) == [(413, True)]
    assert (streams.pieces, streams.errors) == ([], met)


BROKEN = {
    "sized": sized(b"/all", b"x" * 50, 51),
    "chunked": CHUNKS % b"/all" + b"1\r\nx\r\n",
    "malformed": CHUNKS % b"/all" + b"1\r\nxyz\r\n",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=list(BROKEN))
def test_handler_meets_a_body_that_breaks_off(streams, data):
    assert said(talk(streams.port, data, half_close=True)) == [(400, True)]
    assert streams.errors == [400]


@pytest.mark.parametrize("path, status", [(b"/some", 200), (b"/none", 409)])
def test_body_that_is_not_read_to_its_end_closes_the_connection_behind_the_reply(streams, path, status):
    assert said(talk(streams.port, sized(path, b"x" * 90) + LAST)) == [(status, True)]


def test_client_is_told_to_go_on_only_when_its_body_is_wanted(streams):
    fields = b"Expect: 100-continue\r\n"
    assert said(talk(streams.port, sized(b"/none", b"", 10, fields), half_close=True)) == [(409, True)]
    with socket.create_connection(("127.0.0.1", streams.port), TIMEOUT) as sock:
        sock.sendall(sized(b"/all", b"", 10, fields))
        assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"x" * 10)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_route_that_is_not_streamed_has_the_whole_body_and_no_pieces(streams):
    assert ask(streams.port, b"12345", path="/whole").json() == [5]
