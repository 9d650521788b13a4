"""The HTTP server's parts: what must hold between its threads, and how it ends."""

import contextlib
import socket
import threading

import pytest

from rock_ms import HangupWatcher, Metrics, RockError
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
