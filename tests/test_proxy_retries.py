"""Which failed attempts the proxy follows by another, how long it waits for that, and what the client gets at last."""

import contextlib
import http.client
import json
import socket
from email.utils import formatdate

import pytest

import rock_ms
from support import TIMEOUT, Proxy, ask, chat, raw_request, running, wait_until
from upstream import PLAIN, Upstream, answer, chunk, chunked, sse, words

CLOSE, RESET, STALL = {"close": True}, {"reset": True}, {"stall": True}
NOW = 1000000000.0
FROM_THE_FIRST_TO_THE_LAST = [2.0, 4.0, 8.0, 16.0, 32.0]

# For localhost, signed by itself: nobody trusts it.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgmUeGq2f8KNJNPKsr
77ZWKmNkFcfqwGnWvtlLzsa4vbChRANCAATAMctp6WaYJWXlJrl27M0Hz5oHFsPO
rdTk2WjPfGgPE3TFBGXPECZsozIbMS5raFarwhqJgMN0NnikZFNCKf4Q
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBlDCCATugAwIBAgIUIhK/Y439a3G+WvNjXwYEQprhSmEwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTA3NDExNVoYDzIxMjYxMDI4
MDc0MTE1WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATAMctp6WaYJWXlJrl27M0Hz5oHFsPOrdTk2WjPfGgPE3TFBGXPECZs
ozIbMS5raFarwhqJgMN0NnikZFNCKf4Qo2kwZzAdBgNVHQ4EFgQU4YMNWvFSR3AF
OH77Qx1QhYTQ6t4wHwYDVR0jBBgwFoAU4YMNWvFSR3AFOH77Qx1QhYTQ6t4wDwYD
VR0TAQH/BAUwAwEB/zAUBgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwID
RwAwRAIgCIZW77lXKR7GwP9QKfJsC+KiZQp0ZPNA0mhViioxjyACIDnVDPUpNCc8
Az0C8hBnhiLQlviOPGkkE/pyYrIOF9hr
-----END CERTIFICATE-----
"""


@pytest.fixture
def dead_port():
    """A port that is taken and that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


def send(text):
    return {"send": text}


def failed(status, text="no", **headers):
    """An error as an OpenAI-style server sends it."""
    return answer({"error": {"message": text}}, status, {name.replace("_", "-"): headers[name] for name in headers})


def head(*lines):
    return send("\r\n".join(("HTTP/1.1 200 OK",) + lines) + "\r\n\r\n")


def last_call(proxy):
    """The one record there is."""
    (call,) = proxy.trajectory()
    return call


def streamed(got):
    """The text of a stream that ended well."""
    events = got.events()
    assert events[-1] == "[DONE]"
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events[:-1])


# What is tried again ------------------------------------------------------------------------------------------------


FAILURES = {
    "closed": [CLOSE],
    "reset": [RESET],
    "closed in the header": [send("HTTP/1.1 200 OK\r\nContent-Ty"), CLOSE],
    "reset in the header": [send("HTTP/1.1 200 OK\r\nContent-Ty"), RESET],
    "closed after 100 Continue": [send("HTTP/1.1 100 Continue\r\n\r\n"), CLOSE],
    "429": [failed(429)],
    "500": [failed(500)],
    "500 in chunks": chunked("{", "}", status=500),
    "500 until close": [send("HTTP/1.1 500 No\r\n\r\nno"), CLOSE],
    "body cut short": [answer("{", headers={"Content-Length": 100}), CLOSE],
    "body not begun": [answer("", headers={"Content-Length": 100}), CLOSE],
    "body reset": [answer("{", headers={"Content-Length": 100}), RESET],
    "chunks cut short": [*chunked('{"half', "never")[:2], CLOSE],
    "last chunk missing": [*chunked('{"whole": 1}')[:-1], CLOSE],
}


UNREADABLE = {
    "another protocol": [send("SSH-2.0-OpenSSH_9.6\r\n\r\n")],
    "HTTP/2": [send("HTTP/2.0 200 OK\r\n\r\n")],
    "bare line ends": [send("HTTP/1.1 200 OK\nContent-Length: 2\r\n\r\n{}")],
    "folded field": [head("X: a", " b", "Content-Length: 0")],
    "header without an end": [send("HTTP/1.1 200 OK\r\nX: " + "x" * 70000)],
    "two lengths": [head("Content-Length: 2", "Content-Length: 3"), send("{} ")],
    "length and chunks": [head("Content-Length: 2", "Transfer-Encoding: chunked"), send("0\r\n\r\n")],
    "length that is no number": [head("Content-Length: -1")],
    "unknown coding": [head("Transfer-Encoding: gzip, chunked"), send("0\r\n\r\n")],
    "chunk without a size": [head("Transfer-Encoding: chunked"), send("zz\r\n")],
    "chunk that is longer": [head("Transfer-Encoding: chunked"), send("1\r\n{}\r\n0\r\n\r\n")],
    "protocol switch": [send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n")],
}


@pytest.mark.parametrize("failure", UNREADABLE.values(), ids=list(UNREADABLE))
def test_answer_that_cannot_be_read_is_final(proxy, upstream, failure):
    """The upstream has answered, and would answer so again: for money."""
    upstream.script(failure)
    got = proxy.ask(chat())
    assert (got.status, got.json()["error"]["code"]) == (502, "upstream_error")
    call = last_call(proxy)
    assert (call["status"], call["attempts"], call["error"]) == (502, 1, got.json()["error"]["message"])
    assert (proxy.pauses, len(upstream.seen())) == ([], 1)


@pytest.mark.parametrize("failure", FAILURES.values(), ids=list(FAILURES))
def test_failure_is_followed_by_another_attempt(proxy, upstream, failure):
    upstream.script(failure)
    got = proxy.ask(chat())
    assert (got.status, got.json()) == (200, PLAIN)
    call = last_call(proxy)
    assert (call["status"], call["response"], call["attempts"], call["error"]) == (200, PLAIN, 2, None)
    assert "partial" not in call
    assert proxy.pauses == [2.0]
    assert [request["body"] for request in upstream.seen()] == [json.dumps(chat()).encode()] * 2


SILENCES = {
    "no answer": [STALL],
    "half a header": [send("HTTP/1.1 200 OK\r\n"), STALL],
    "header only": [answer("", headers={"Content-Length": 100}), STALL],
    "half a body": [answer("{", headers={"Content-Length": 100}), STALL],
    "half a chunked body": [*chunked("{", "}")[:2], STALL],
}


@pytest.mark.parametrize("silence", SILENCES.values(), ids=list(SILENCES))
@pytest.mark.usefixtures("only_stalls_take_time")
def test_silence_is_followed_by_another_attempt_and_is_504_in_the_end(start, upstream, silence):
    proxy = start(request_timeout=0.1, max_attempts=2)
    upstream.script(silence, answer(PLAIN), silence, silence)
    assert proxy.ask(chat()).json() == PLAIN
    got = proxy.ask(chat())
    error = got.json()["error"]
    assert (got.status, error["type"], error["code"]) == (504, "server_error", "upstream_timeout")
    calls = proxy.trajectory()
    assert [(call["status"], call["attempts"]) for call in calls] == [(200, 2), (504, 2)]
    assert (calls[1]["response"], calls[1]["error"]) == (None, error["message"])
    assert "silent" in error["message"]
    assert proxy.pauses == [2.0, 2.0]
    assert upstream.wait_closed(3), "connections that were given up are closed"


@pytest.mark.parametrize(
    "codes, retried, passed",
    [
        ((429, 500), (429, 500), (400, 401, 403, 404, 408, 409, 413, 422, 502, 503, 504, 529)),
        ((502, 503), (502, 503), (429, 500)),
        ((400, 201), (400, 201), (404, 200)),
        ((), (), (429, 500)),
    ],
)
def test_statuses_that_are_tried_again(start, upstream, codes, retried, passed):
    proxy = start(retryable_status_codes=codes)
    for status in retried:
        upstream.script(failed(status), answer({"after": status}))
        assert proxy.ask(chat()).json() == {"after": status}
    for status in passed:
        upstream.script(failed(status, "as it is"))
        got = proxy.ask(chat())
        assert (got.status, got.json()) == (status, {"error": {"message": "as it is"}})
    wanted = [(200, 2)] * len(retried) + [(status, 1) for status in passed]
    assert [(call["status"], call["attempts"]) for call in proxy.trajectory()] == wanted
    assert len(proxy.pauses) == len(retried)


def test_default_statuses():
    assert rock_ms.ServiceSettings().retryable_status_codes == (429, 500)


def test_certificate_that_is_not_trusted_is_not_tried_again(tmp_path):
    (tmp_path / "certificate.pem").write_text(CERTIFICATE)
    upstream = Upstream(str(tmp_path / "certificate.pem"))
    with contextlib.closing(upstream), running(tmp_path, Proxy, upstream=upstream) as proxy:
        got = proxy.ask(chat())
        assert (got.status, got.json()["error"]["code"]) == (502, "upstream_error")
        assert "certificate" in got.json()["error"]["message"]
        assert (last_call(proxy)["status"], last_call(proxy)["attempts"], proxy.pauses) == (502, 1, [])


def test_kept_connection_that_was_closed_is_replaced_without_an_attempt(proxy, upstream):
    upstream.script(answer(PLAIN), CLOSE, answer({"second": 1}))
    proxy.ask(chat())
    assert proxy.ask(chat()).json() == {"second": 1}
    assert (proxy.trajectory()[1]["attempts"], proxy.pauses) == (1, [])
    assert [request["connection"] for request in upstream.seen()] == [1, 1, 2]


def test_kept_connection_that_breaks_in_the_middle_of_an_answer_is_an_attempt(proxy, upstream):
    upstream.script(answer(PLAIN), [send("HTTP/1.1 200 OK\r\n"), CLOSE], answer({"second": 1}))
    proxy.ask(chat())
    assert proxy.ask(chat()).json() == {"second": 1}
    assert (proxy.trajectory()[1]["attempts"], proxy.pauses) == (2, [2.0])


def test_whole_answer_of_a_later_attempt_has_nothing_of_the_earlier_ones(proxy, upstream):
    broken = [answer('{"from": "first", ', headers={"Content-Length": 1000, "X-From": "first"}), CLOSE]
    upstream.script(broken, broken, answer({"from": "third"}, 201, {"X-From": "third"}))
    got = proxy.ask(chat())
    assert (got.status, got.headers["x-from"], got.body) == (201, "third", b'{"from": "third"}')
    assert got.headers["content-length"] == str(len(got.body))
    assert (last_call(proxy)["response"], last_call(proxy)["attempts"]) == ({"from": "third"}, 3)


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "PUT"])
def test_other_methods_and_paths_are_tried_again_too(proxy, upstream, method):
    upstream.script(CLOSE, answer({"x": 1}))
    body = b"{}" if method == "PUT" else None
    got = proxy.ask(body, method=method, path="/v1/files/f1?a=b")
    assert (got.status, got.body) == (200, b"" if method == "HEAD" else b'{"x": 1}')
    assert [(request["method"], request["target"]) for request in upstream.seen()] == [(method, "/v1/files/f1?a=b")] * 2


# How often, and how long until then ---------------------------------------------------------------------------------


def test_six_attempts_and_then_the_last_answer_as_it_is(proxy, upstream):
    upstream.script(*[failed(429, "try %d" % number, x_request_id="r%d" % number) for number in range(1, 7)])
    got = proxy.ask(chat())
    assert (got.status, got.body) == (429, b'{"error": {"message": "try 6"}}')
    assert (got.headers["x-request-id"], got.headers["content-type"]) == ("r6", "application/json")
    assert proxy.pauses == FROM_THE_FIRST_TO_THE_LAST
    call = last_call(proxy)
    assert (call["status"], call["attempts"], call["error"]) == (429, 6, "try 6")
    assert call["response"] == {"error": {"message": "try 6"}}
    assert len(upstream.seen()) == 6


def test_last_answer_passes_whatever_it_holds(start, upstream):
    proxy = start(max_attempts=2)
    upstream.script(failed(500), answer("<h1>Größe</h1>", 500, {"Content-Type": "text/html", "Set-Cookie": "a=b"}))
    got = proxy.ask(chat())
    assert (got.status, got.body) == (500, "<h1>Größe</h1>".encode("utf-8"))
    assert (got.headers["content-type"], got.headers["set-cookie"]) == ("text/html", "a=b")
    call = last_call(proxy)
    assert (call["response"], call["response_format"], call["content_type"]) == ("<h1>Größe</h1>", "text", "text/html")
    assert call["error"] == "the upstream answered 500"


@pytest.mark.parametrize("jitter, factor", [(0.0, 0.5), (0.5, 1.0), (1.0, 1.5)])
def test_delays_are_half_to_one_and_a_half_times_as_long(proxy, upstream, jitter, factor):
    proxy.server.service.jitter = lambda: jitter
    upstream.script(*[failed(500)] * 6)
    proxy.ask(chat())
    assert proxy.pauses == [seconds * factor for seconds in FROM_THE_FIRST_TO_THE_LAST]


def test_jitter_differs_from_attempt_to_attempt(tmp_path):
    with running(tmp_path, type="proxy", proxy_base_url="http://127.0.0.1:9/v1") as service:
        drawn = [service.server.service.jitter() for _ in range(100)]
    assert all(0 <= jitter <= 1 for jitter in drawn)
    assert len(set(drawn)) > 90


@pytest.mark.parametrize(
    "settings, pauses",
    [
        ({"max_attempts": 1}, []),
        ({"max_attempts": 2}, [2.0]),
        ({"max_attempts": 3, "retry_delay_seconds": 0.5}, [0.5, 1.0]),
        ({"max_attempts": 8, "retry_delay_seconds": 1.0}, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]),
    ],
)
def test_settings_of_attempts_and_delays(start, upstream, settings, pauses):
    proxy = start(**settings)
    upstream.script(*[failed(500)] * 9)
    assert proxy.ask(chat()).status == 500
    assert proxy.pauses == pauses
    assert (last_call(proxy)["attempts"], len(upstream.seen())) == (settings["max_attempts"],) * 2


@pytest.mark.parametrize("asks_for_stream", [False, True])
def test_upstream_that_is_not_there_is_502(tmp_path, dead_port, asks_for_stream):
    with running(tmp_path, Proxy, proxy_base_url="http://127.0.0.1:%d/v1" % dead_port) as proxy:
        got = proxy.ask(chat(stream=asks_for_stream))
        error = got.json()["error"]
        assert (got.status, got.headers["content-type"]) == (502, "application/json")
        assert (error["type"], error["code"], error["param"]) == ("server_error", "upstream_error", None)
        assert "cannot connect to 127.0.0.1:%d: Connection refused" % dead_port in error["message"]
        assert proxy.pauses == FROM_THE_FIRST_TO_THE_LAST
        call = last_call(proxy)
        assert (call["status"], call["attempts"], call["response"]) == (502, 6, None)
        assert (call["error"], call["stream"]) == (error["message"], asks_for_stream)


@pytest.mark.parametrize("name", ["closed", "reset", "body cut short"])
def test_failure_of_every_attempt_is_502(proxy, upstream, name):
    upstream.script(*[FAILURES[name]] * 6)
    got = proxy.ask(chat())
    assert (got.status, got.json()["error"]["code"]) == (502, "upstream_error")
    assert (len(proxy.pauses), len(upstream.seen())) == (5, 6)
    call = last_call(proxy)
    assert (call["status"], call["attempts"], call["response"]) == (502, 6, None)
    assert call["error"] == got.json()["error"]["message"]


def test_attempts_of_all_kinds_count_together(proxy, upstream):
    upstream.script([CLOSE], failed(429, retry_after="7"), CLOSE, FAILURES["closed in the header"], failed(500))
    assert proxy.ask(chat()).json() == PLAIN
    # What follows 429 on its connection finds that closed, which is no attempt.
    assert (proxy.pauses, last_call(proxy)["attempts"]) == ([2.0, 7.0, 8.0, 16.0], 5)


def test_each_wait_is_logged(proxy, upstream):
    upstream.script(failed(429), [RESET], [CLOSE])
    proxy.ask(chat())
    said = [line for line in proxy.logged if line.startswith("attempt ")]
    call = "attempt 1 of POST /v1/chat/completions ('m')"
    assert said[0] == call + " failed: the upstream answered 429; the next one in 2 s"
    assert [line.split(" failed")[0] for line in said] == [call, call.replace("1", "2", 1)]


# What the upstream asks for -----------------------------------------------------------------------------------------


def date(seconds):
    return formatdate(NOW + seconds, usegmt=True)


ASKED = [  # header fields, the wait: None where the answer goes through
    ({"Retry-After": "7"}, 7.0),
    ({"Retry-After": "0"}, 0.0),
    ({"Retry-After": "0.25"}, 0.25),
    ({"retry-after": " 3 "}, 3.0),
    ({"Retry-After": "600"}, 600.0),
    ({"Retry-After": "601"}, None),
    ({"Retry-After": "600.5"}, None),
    ({"Retry-After": "999999999999"}, None),
    ({"Retry-After": date(30)}, 30.0),
    ({"Retry-After": date(600)}, 600.0),
    ({"Retry-After": date(601)}, None),
    ({"Retry-After": date(-1)}, 0.0),
    ({"Retry-After": date(-1000000)}, 0.0),
    ({"Retry-After": "Sunday, 09-Sep-01 01:46:50 GMT"}, 10.0),
    ({"Retry-After": "Sun Sep  9 01:46:50 2001"}, 10.0),
    ({"retry-after-ms": "1500"}, 1.5),
    ({"retry-after-ms": "0.5"}, 0.0005),
    ({"Retry-After-Ms": "1500", "Retry-After": "7"}, 1.5),
    ({"Retry-After": "7", "retry-after-ms": "600001"}, None),
    ({"Retry-After": "601", "retry-after-ms": "1"}, 0.001),
    ({"retry-after-ms": "soon", "Retry-After": "7"}, 7.0),
    ({"retry-after-ms": date(5)}, 2.0),
    ({"Retry-After": "soon"}, 2.0),
    ({"Retry-After": "-5"}, 2.0),
    ({"Retry-After": "1e3"}, 2.0),
    ({"Retry-After": "5 s"}, 2.0),
    ({"Retry-After": ""}, 2.0),
    ({"Retry-After": "NaN"}, 2.0),
    ({"Retry-After": "1, 2"}, 2.0),
]


def test_what_the_upstream_asks_for_is_waited_for(proxy, upstream):
    proxy.server.service.clock = lambda: NOW
    for headers, wait in ASKED:
        del proxy.pauses[:]
        upstream.script(
            answer({"error": {"message": "busy"}}, 429, headers), *([] if wait is None else [answer(PLAIN)])
        )
        got = proxy.ask(chat())
        assert (got.status, proxy.pauses) == ((429, []) if wait is None else (200, [wait])), headers
        if wait is None:
            assert got.json() == {"error": {"message": "busy"}}
            assert got.headers["retry-after"] == headers["Retry-After"], "so that the client may wait"
    attempts = [(call["status"], call["attempts"]) for call in proxy.trajectory()]
    assert attempts == [(429, 1) if wait is None else (200, 2) for _, wait in ASKED]


def test_what_is_asked_for_has_no_jitter_and_does_not_disturb_the_backoff(proxy, upstream):
    proxy.server.service.jitter = lambda: 1.0
    upstream.script(failed(429), failed(429, retry_after="5"), failed(500))
    proxy.ask(chat())
    assert proxy.pauses == [3.0, 5.0, 12.0]


def test_wait_that_is_asked_for_does_not_add_attempts(proxy, upstream):
    upstream.script(*[failed(429, retry_after="0")] * 7)
    assert proxy.ask(chat()).status == 429
    assert (proxy.pauses, len(upstream.seen())) == ([0.0] * 5, 6)


def test_status_that_is_not_tried_again_may_ask_for_what_it_likes(proxy, upstream):
    upstream.script(failed(503, retry_after="1"))
    got = proxy.ask(chat())
    assert (got.status, got.headers["retry-after"], proxy.pauses) == (503, "1", [])


@pytest.mark.parametrize("headers, wait", [(headers, wait) for headers, wait in ASKED if wait is not None])
def test_retry_after(headers, wait):
    seen = rock_ms.retry_after(tuple((name, value.strip()) for name, value in headers.items()), NOW)
    assert seen == (wait if wait != 2.0 else None)


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ((), None),
        ((("Date", date(9)),), None),
        ((("Retry-After", "601"),), 601.0),
        ((("RETRY-AFTER", "1."),), 1.0),
        ((("Retry-After", "1000000000000"),), None),  # more digits than any time has
        ((("Retry-After", date(86400)),), 86400.0),
    ],
)
def test_retry_after_beyond_the_policy(headers, seconds):
    assert rock_ms.retry_after(headers, NOW) == seconds


def test_retry_after_of_an_impossible_year_is_nonsense():
    assert rock_ms.retry_after((("Retry-After", "Fri, 31 Dec 99999 23:59:59 GMT"),), NOW) is None


def test_answer_with_an_impossible_year_is_like_any_other(proxy, upstream):
    upstream.script(failed(429, retry_after="Fri, 31 Dec 99999 23:59:59 GMT"))
    assert proxy.ask(chat()).status == 200
    assert (last_call(proxy)["attempts"], proxy.pauses) == (2, [2.0])


@pytest.mark.parametrize(
    "attempt, headers, jitter, delay",
    [
        (1, {}, 0.5, 2.0),
        (1, {}, 0.0, 1.0),
        (1, {}, 1.0, 3.0),
        (2, {}, 0.5, 4.0),
        (5, {}, 0.5, 32.0),
        (5, {}, 0.25, 24.0),
        (6, {}, 0.5, None),
        (7, {}, 0.5, None),
        (1, {"Retry-After": "9"}, 1.0, 9.0),
        (5, {"Retry-After": "9"}, 0.0, 9.0),
        (6, {"Retry-After": "9"}, 0.5, None),
        (1, {"Retry-After": "600"}, 0.5, 600.0),
        (1, {"Retry-After": "601"}, 0.5, None),
        (1, {"Retry-After": date(60)}, 0.5, 60.0),
        (1, {"Retry-After": "?"}, 0.5, 2.0),
        (3, {"Retry-After": "0"}, 0.5, 0.0),
    ],
)
def test_delay_of_the_policy(attempt, headers, jitter, delay):
    policy = rock_ms.RetryPolicy(6, 2.0, (429, 500))
    assert policy.delay(attempt, tuple(headers.items()), NOW, jitter) == delay


# Waits that are real ------------------------------------------------------------------------------------------------


@pytest.fixture
def waiting(tmp_path, upstream):
    """A proxy, and a client whose call waits ten minutes for its second attempt: (service, socket)."""
    upstream.script(failed(500), failed(500))
    settings = {"type": "proxy", "proxy_base_url": upstream.url, "retry_delay_seconds": 600}
    with running(tmp_path, **settings) as service:
        with socket.create_connection(("127.0.0.1", service.port), TIMEOUT) as sock:
            sock.sendall(raw_request(json.dumps(chat()).encode()))
            wait_until(lambda: any(line.startswith("attempt 1 ") for line in service.logged))
            yield service, sock


def ended_wait(service, upstream):
    """The record of a call whose wait has ended, and that no further attempt was made."""
    (call,) = wait_until(service.trajectory)
    assert (call["attempts"], len(upstream.seen())) == (1, 1)
    assert call["response_time"] < 60
    return call


def test_wait_ends_when_the_client_hangs_up(waiting, upstream):
    service, sock = waiting
    sock.close()
    call = ended_wait(service, upstream)
    assert (call["status"], call["error"], call["response"]) == (499, "the client hung up", None)
    wait_until(lambda: any(" 499 " in line for line in service.logged))


def test_wait_ends_when_the_service_stops(waiting, upstream):
    service, sock = waiting
    service.server.stop()
    got = http.client.HTTPResponse(sock)
    got.begin()
    assert (got.status, json.loads(got.read().decode())["error"]["code"]) == (503, "service_stopping")
    assert sock.recv(1) == b"", "the connection has ended, too"
    call = ended_wait(service, upstream)
    assert (call["status"], call["error"]) == (503, "the model service is stopping")


def test_wait_is_as_long_as_it_says(tmp_path, upstream):
    upstream.script(failed(500, retry_after="0.2"))
    with running(tmp_path, type="proxy", proxy_base_url=upstream.url, retry_delay_seconds=600) as service:
        assert service.ask(chat()).status == 200
        assert 0.2 <= last_call(service)["response_time"] < 60


# Streams ------------------------------------------------------------------------------------------------------------


SSE_HEAD = sse()[0]
STREAM_FAILURES = {
    "500": failed(500),
    "429": failed(429),
    "closed": CLOSE,
    "reset": RESET,
    "header and no byte": [SSE_HEAD, CLOSE],
    "header and a reset": [SSE_HEAD, RESET],
    "header and half a chunk's size": [SSE_HEAD, send("f"), CLOSE],
    "length and no byte": [answer("", headers={"Content-Type": "text/event-stream", "Content-Length": 10}), CLOSE],
}


@pytest.mark.parametrize("failure", STREAM_FAILURES.values(), ids=list(STREAM_FAILURES))
def test_stream_that_fails_before_its_first_byte_is_tried_again(proxy, upstream, failure):
    for asks in (True, False):
        upstream.script(failure, sse(*words("Hel", "lo"), headers={"Connection": "close"}))
        got = proxy.ask(chat(stream=asks))
        assert (got.status, streamed(got)) == (200, "Hello")
    for call in proxy.trajectory():
        assert (call["attempts"], call["response"]["choices"][0]["message"]["content"]) == (2, "Hello")
    assert proxy.pauses == [2.0, 2.0]


@pytest.mark.usefixtures("only_stalls_take_time")
def test_stream_that_is_silent_before_its_first_byte_is_tried_again(start, upstream):
    proxy = start(request_timeout=0.1)
    upstream.script([STALL], [SSE_HEAD, STALL], sse(*words("Hello")))
    assert streamed(proxy.ask(chat(stream=True))) == "Hello"
    assert (proxy.pauses, last_call(proxy)["attempts"]) == ([2.0, 4.0], 3)


@pytest.mark.parametrize("asks", [True, False], ids=["asked", "unasked"])
def test_stream_that_ends_by_close_before_its_first_byte_is_tried_again(proxy, upstream, asks):
    upstream.script([head("Content-Type: text/event-stream"), CLOSE], sse(*words("Hello")))
    assert streamed(proxy.ask(chat(stream=asks))) == "Hello"


BREAKS = {
    "closed": [CLOSE],
    "no valid chunk": [send("zz\r\n")],
    "a length too short": [send("1\r\nxx\r\n")],
    "silent": [STALL],
}


def talked(proxy, upstream, value, first, gate):
    """Ask on a connection of its own, read `first` of the answer's body, open the gate, see the rest break off."""
    with socket.create_connection(("127.0.0.1", proxy.port), TIMEOUT) as sock:
        sock.sendall(raw_request(json.dumps(value).encode()))
        got = http.client.HTTPResponse(sock)
        got.begin()
        assert not first or got.read(len(first)) == first
        upstream.open(gate)
        with pytest.raises(http.client.IncompleteRead):
            got.read()
    assert proxy.pauses == []
    assert len(upstream.seen()) == 1
    call = wait_until(proxy.trajectory)[0]
    assert (call["attempts"], call["partial"]) == (1, True)
    return got.status, call


@pytest.mark.parametrize("end", BREAKS.values(), ids=list(BREAKS))
@pytest.mark.usefixtures("only_stalls_take_time")
def test_stream_that_breaks_after_its_first_byte_is_not_tried_again(start, upstream, end):
    proxy = start(request_timeout=0.2)
    upstream.script([SSE_HEAD, send(chunk(":")), {"gate": "seen"}, *end])
    _, call = talked(proxy, upstream, chat(stream=True), b":", "seen")
    assert call["status"] == (504 if end == [STALL] else 502)


def test_stream_whose_header_was_passed_on_is_not_tried_again(start, upstream):
    proxy = start(heartbeat_seconds=0.05)
    upstream.script([SSE_HEAD, {"gate": "header seen"}, CLOSE])
    _, call = talked(proxy, upstream, chat(stream=True), b"", "header seen")
    assert call["status"] == 502


def test_answer_too_long_to_be_held_is_not_tried_again(proxy, upstream, monkeypatch):
    monkeypatch.setattr(rock_ms, "HOLD_BYTES", 1000)
    text = "x" * 2000
    upstream.script([answer(text, 500, {"Content-Length": 3000}), {"gate": "long enough"}, CLOSE])
    status, call = talked(proxy, upstream, chat(), text.encode(), "long enough")
    assert (status, call["status"], call["response"]) == (500, 502, text)


@pytest.mark.parametrize("status", [429, 500])
def test_stream_request_gets_the_error_of_the_last_attempt(start, upstream, status):
    proxy = start(max_attempts=3)
    upstream.script(*[failed(status, "busy")] * 3)
    got = proxy.ask(chat(stream=True))
    assert (got.status, got.json(), got.headers["content-type"]) == (
        status,
        {"error": {"message": "busy"}},
        "application/json",
    )
    assert (last_call(proxy)["attempts"], last_call(proxy)["error"], last_call(proxy)["stream"]) == (3, "busy", True)


# The client's connection --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("only_stalls_take_time")
def test_connection_of_the_client_survives_failures(start, upstream):
    proxy = start(max_attempts=2, request_timeout=0.2)
    upstream.script([CLOSE], failed(500), failed(500), [CLOSE], [CLOSE], [STALL], [STALL])
    upstream.script(answer(PLAIN), sse(*words("Hello")))
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=TIMEOUT)
    statuses, sockets = [], set()
    with contextlib.closing(connection):
        for number in range(5):
            body = json.dumps(chat("call %d" % number, stream=number == 4))
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            sockets.add(connection.sock)
            got = connection.getresponse()
            statuses.append(got.status)
            assert got.getheader("Connection") is None
            data = got.read()
        assert data.endswith(b"data: [DONE]\n\n")
    calls = proxy.trajectory()
    assert [call["request"]["messages"][0]["content"] for call in calls] == ["call %d" % number for number in range(5)]
    assert statuses == [call["status"] for call in calls]
    assert len(sockets) == 1, "one connection for all of them"
    assert (statuses, [call["attempts"] for call in calls]) == ([500, 502, 504, 200, 200], [2, 2, 2, 1, 1])


def test_concurrent_calls_have_attempts_of_their_own(proxy, upstream):
    def script(number):
        return chat(str(number), script=[failed(429, retry_after=str(number)), {"close": True}])

    calls = [proxy.ask_later(script(number)) for number in range(1, 9)]
    statuses = {call.result().status for call in calls}
    assert statuses == {429}
    assert sorted(proxy.pauses) == sorted([float(number) for number in range(1, 9)] * 5)
    assert {call["attempts"] for call in proxy.trajectory()} == {6}
    assert len(upstream.seen()) == 48


def test_upstream_that_dies_between_two_calls_is_502(start, upstream):
    proxy = start(max_attempts=2)
    assert proxy.ask(chat()).status == 200
    upstream.kill()
    got = ask(proxy.port, chat())
    assert (got.status, "cannot connect" in got.json()["error"]["message"]) == (502, True)
    assert proxy.pauses == [2.0]
