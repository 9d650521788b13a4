"""What a hostile review found: upstreams, clients and files that mean harm, each met once more."""

import base64
import contextlib
import gzip
import http.client
import json
import os
import random
import select
import socket
import socketserver
import threading
import time
import zlib

import pytest

import rock_ms
from support import (
    TIMEOUT,
    Proxy,
    ask,
    chat,
    clean_environ,
    completion,
    nothing_left,
    raw_request,
    run_cli,
    running,
    serving,
    talk,
    wait_until,
)
from upstream import PLAIN, answer, chunked, delta, sse, words

CLOSE, STALL = {"close": True}, {"stall": True}
SSE = {"Content-Type": "text/event-stream"}
CHAT = "/v1/chat/completions"
PLAIN_DATA = json.dumps(PLAIN).encode()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """No HTTP proxy takes part, and a listener looks often whether it is to stop."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    serve = socketserver.BaseServer.serve_forever
    monkeypatch.setattr(socketserver.BaseServer, "serve_forever", lambda listener, _=0.5: serve(listener, 0.005))


@pytest.fixture
def start(tmp_path, upstream):
    """Starts a proxy with settings of its own."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running(tmp_path, Proxy, upstream=upstream, **settings))


@pytest.fixture
def one_attempt(start):
    return start(max_attempts=1)


@pytest.fixture
def prompt_stop(monkeypatch):
    """Calls that are being answered get no time when a service stops."""
    monkeypatch.setattr(rock_ms.HTTPService.stop, "__defaults__", (0.02,))


class Server(socketserver.ThreadingTCPServer):
    """An upstream in this process, for what no script can do: `serve(socket)` meets each connection."""

    daemon_threads = True

    def __init__(self, serve):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.serve, self.count = serve, 0
        self.url = "http://127.0.0.1:%d/v1" % self.server_address[1]

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.server.count += 1
            with contextlib.suppress(OSError):
                self.server.serve(self.request)


@contextlib.contextmanager
def before(tmp_path, serve, **settings):
    """A proxy before such a server, one attempt a call."""
    with serving(Server(serve)) as server:
        with running(tmp_path, Proxy, proxy_base_url=server.url, **{"max_attempts": 1, **settings}) as proxy:
            yield proxy


def connected(proxy, data=None):
    """A client that has sent a request, to be closed."""
    sock = socket.create_connection(("127.0.0.1", proxy.port), TIMEOUT)
    sock.sendall(raw_request(json.dumps(chat()).encode()) if data is None else data)
    return contextlib.closing(sock)


def broken_off(function, *args, **options):
    """What came of an answer that broke off."""
    with pytest.raises(http.client.IncompleteRead) as caught:
        function(*args, **options)
    return caught.value.partial


def last_call(proxy):
    """The one record there is, once it is there."""
    (call,) = wait_until(proxy.trajectory)
    return call


def outcome(call):
    return call["status"], call.get("partial", False)


def latin(data):
    return data.decode("latin-1")


def strict(line):
    """The value of a JSON text that holds nothing but JSON."""

    def refuse(name):
        raise AssertionError("%s is no JSON" % name)

    return json.loads(line, parse_constant=refuse)


def lines(proxy):
    with open(proxy.paths.traj_file, encoding="utf-8") as file:
        return file.readlines()


def recorded(response=None, request=None, **more):
    """A call as the proxy writes it down."""
    common = {"method": "POST", "path": CHAT, "model": "m", "stream": False, "error": None, "status": 200}
    response = completion() if response is None else response
    return {"request": request or chat(), "response": response, **common, "attempts": 1, **more}


@contextlib.contextmanager
def replaying(tmp_path, *calls, **settings):
    """A service that replays these calls; or, if none, the trajectory that is in tmp_path."""
    path = tmp_path / ("hand.jsonl" if calls else rock_ms.TRAJ_FILE_NAME)
    if calls:
        path.write_text("".join(json.dumps(call) + "\n" for call in calls))
    with running(tmp_path / "replay", type="proxy", replay_file=str(path), **settings) as service:
        yield service


@pytest.fixture(autouse=True)
def replay_directory(tmp_path):
    (tmp_path / "replay").mkdir()


# ----------------------------------------------------------------------------------------------------------------------
# Starting.
# ----------------------------------------------------------------------------------------------------------------------

TRAPS = ["random", "selectors", "email/__init__", "logging", "socketserver", "ssl", "http/__init__", "zlib", "marshal"]


def test_start_imports_nothing_from_the_working_directory(cli, tmp_path, upstream):
    cwd, sprung = tmp_path / "agent", tmp_path / "sprung"
    for name in TRAPS:
        path = cwd / (name + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("open(%r, 'a').write(__name__ + ' ')\nraise ImportError('a trap')\n" % str(sprung))
    where = ["--host", "127.0.0.1", "--port", "0", "--type", "proxy", "--proxy-base-url", upstream.url]
    cli("start", *where, check=0, cwd=str(cwd))
    state = json.loads((tmp_path / "data" / (rock_ms.STATE_NAME + ".json")).read_text())
    upstream.script([answer({}, status=429, headers={"Retry-After": "0"})], answer(latin(b"{}")))
    got = ask(state["port"], chat(), headers={"Accept-Encoding": "gzip"})
    assert (got.status, got.json(), sprung.exists()) == (200, {}, False)


@pytest.mark.load
def test_start_does_not_wait_for_a_child_that_reads_nothing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if b'marshal' in open('/proc/self/cmdline', 'rb').read():\n"
        "    open(%r, 'w').write(str(os.getpid()))\n"
        "    signal.pause()\n" % str(tmp_path / "pid")
    )
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        "import sys\nsys.path.insert(0, %r)\nimport rock_ms\n"
        "rock_ms.START_SECONDS = 1.0\nsys.exit(rock_ms.main())\n" % os.path.dirname(rock_ms.__file__)
    )
    words = ["start", "--port", "0", "--host", "127.0.0.1", "--data-dir", tmp_path / "data"]
    got = run_cli(*words, check=1, script=str(wrapper), env=clean_environ(PYTHONPATH=str(tmp_path)))
    assert "the model service did not start: it did not answer within" in got.err and got.err.count("\n") == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


# ----------------------------------------------------------------------------------------------------------------------
# What is recorded.
# ----------------------------------------------------------------------------------------------------------------------


def test_generation_below_models_is_recorded_and_lookups_are_not(proxy):
    for path in ("/v1/models", "/v1/models/", "/v1/models/gemini-pro", "/v1/models/a/b"):
        assert proxy.ask(method="GET", path=path).status == 200
    assert proxy.trajectory() == []
    paths = ["/v1/models/gemini-pro:generateContent", "/v1/models/gemini%2Dpro:streamGenerateContent"]
    for path in paths:
        assert proxy.ask({"contents": []}, path=path).status == 200
    calls = [(call["path"], call["model"], call["request"]) for call in proxy.trajectory()]
    assert calls == [(path, "gemini-pro", {"contents": []}) for path in paths]


def test_head_of_a_model_is_not_recorded(proxy, upstream):
    for path in ("/v1/models", "/v1/models/m"):
        upstream.script(answer(""))
        assert proxy.ask(method="HEAD", path=path).status == 200
    assert proxy.trajectory() == []


# ----------------------------------------------------------------------------------------------------------------------
# Upstreams that do not end, or end too early.
# ----------------------------------------------------------------------------------------------------------------------


def interim_responses(sock):
    sock.recv(65536)
    while True:
        sock.sendall(b"HTTP/1.1 102 Processing\r\n\r\n" * 1000)


def slow_interim_responses(sock):
    sock.recv(65536)
    while True:
        sock.sendall(b"HTTP/1.1 102 Processing\r\n\r\n")
        select.select([], [], [], 0.01)


def slow_header(sock):
    sock.recv(65536)
    sock.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        sock.sendall(b"x")
        select.select([], [], [], 0.01)


ENDLESS = [interim_responses, slow_interim_responses, slow_header]
ENDLESS_SEEN = [slow_interim_responses, slow_header]


@pytest.mark.load
@pytest.mark.parametrize("serve", ENDLESS)
def test_header_without_end_ends_with_the_timeout(tmp_path, serve):
    with before(tmp_path, serve, request_timeout=0.3) as proxy:
        assert proxy.ask(chat()).status in (502, 504)
        assert last_call(proxy)["response"] is None


def telling(serve):
    """A server, and the event of its first call."""
    begun = threading.Event()

    def serve_and_tell(sock):
        begun.set()
        serve(sock)

    return serve_and_tell, begun


@pytest.mark.parametrize("serve", ENDLESS_SEEN)
def test_header_without_end_ends_when_the_client_hangs_up(tmp_path, serve):
    serve_and_tell, begun = telling(serve)
    with before(tmp_path, serve_and_tell, request_timeout=30.0) as proxy:
        with connected(proxy):
            assert begun.wait(TIMEOUT)
        assert (last_call(proxy)["status"], last_call(proxy)["error"]) == (499, "the client hung up")


@pytest.mark.parametrize("serve", ENDLESS_SEEN)
@pytest.mark.usefixtures("prompt_stop")
def test_header_without_end_does_not_outlive_the_service(tmp_path, serve):
    serve_and_tell, begun = telling(serve)
    with before(tmp_path, serve_and_tell, request_timeout=30.0) as proxy:
        with connected(proxy):
            assert begun.wait(TIMEOUT)
            proxy.server.stop()
        assert (last_call(proxy)["status"], last_call(proxy)["error"]) == (499, "the service stopped")


def test_flood_of_interim_responses_ends_when_the_client_hangs_up():
    class Flood:
        def recv(self, _):
            return b"HTTP/1.1 102 Processing\r\n\r\n"

    client, other = socket.socketpair()
    other.close()
    with contextlib.closing(client), pytest.raises(rock_ms.ClientGone):
        watch = rock_ms.ClientWatch(client)
        rock_ms.UpstreamConnection(Flood(), None).read_head(False, watch, watch.clock() + 30)


def zipped(data):
    """Always the same bytes, whatever the time is."""
    packer = zlib.compressobj(wbits=16 + zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


UNBOUNDED = {  # version, more header lines, what is done to the body
    "HTTP/1.0": ("1.0", "", bytes),
    "close": ("1.1", "Connection: close\r\n", bytes),
    "JSON of a vendor": ("1.0", "Content-Type: application/problem+json; charset=utf-8\r\n", bytes),
    "gzip": ("1.0", "Content-Encoding: gzip\r\n", zipped),
}


def unbounded(how, data, size=None):
    """The steps of an answer that its connection's end ends; size: of what comes of it."""
    version, more, encode = UNBOUNDED[how]
    kind = "" if "Content-Type" in more else "Content-Type: application/json\r\n"
    head = "HTTP/%s 200 OK\r\n%s%s\r\n" % (version, kind, more)
    return [{"send": head + latin(encode(data)[:size])}, CLOSE]


@pytest.mark.parametrize("how", list(UNBOUNDED))
def test_json_without_a_length_that_is_cut_is_tried_again(start, upstream, how):
    proxy = start(max_attempts=3)
    cut = unbounded(how, PLAIN_DATA, 90)
    upstream.script(cut, unbounded(how, PLAIN_DATA))
    assert gzip_or_json(proxy.ask(chat())) == PLAIN
    upstream.script(cut, cut, cut)
    got = proxy.ask(chat())
    assert (got.status, got.json()["error"]["code"], len(upstream.seen())) == (502, "upstream_error", 5)
    assert [outcome(call) for call in proxy.trajectory()] == [(200, False), (502, False)]


def gzip_or_json(got):
    is_gzip = got.headers.get("content-encoding") == "gzip"
    return json.loads(gzip.decompress(got.body).decode() if is_gzip else got.body.decode())


@pytest.mark.parametrize("how", list(UNBOUNDED))
def test_long_json_without_a_length_that_is_cut_breaks_for_the_client(one_attempt, upstream, monkeypatch, how):
    monkeypatch.setattr(rock_ms, "HOLD_BYTES", 100)
    source = random.Random(1)
    words = "".join(source.choice("0123456789abcdef") for _ in range(5000))
    data = json.dumps(completion(words)).encode()
    upstream.script(unbounded(how, data, 2000), unbounded(how, data))
    came = broken_off(one_attempt.ask, chat())
    assert came == UNBOUNDED[how][2](data)[:2000]
    call = last_call(one_attempt)
    assert outcome(call) == (502, True) and call["error"]
    assert data.decode().startswith(call["response"]) and len(call["response"]) > 1000
    assert gzip_or_json(one_attempt.ask(chat())) == completion(words)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("left", [9, 3])
def test_gzip_that_is_cut_inside_a_whole_body_is_said_in_the_record(one_attempt, upstream, is_stream, left):
    data = b"".join(b"data: %s\n\n" % json.dumps(value).encode() for value in words("a")) if is_stream else PLAIN_DATA
    short = gzip.compress(data)[:-left]
    kind = SSE["Content-Type"] if is_stream else "application/json"
    head = "HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    upstream.script({"send": head % (kind, len(short)) + latin(short)})
    got = one_attempt.ask(chat(stream=is_stream))
    assert (got.status, got.body) == (200, short), "the client gets what the upstream sent"
    call = last_call(one_attempt)
    assert call["status"] == 200 and "gzip is broken" in call["error"]


# ----------------------------------------------------------------------------------------------------------------------
# Numbers, keys and sizes in answers.
# ----------------------------------------------------------------------------------------------------------------------

HUGE = '{"id":"c","choices":[{"index":0,"delta":{"content":"hi"},"logprob":-1e999,"finish_reason":"stop"}],"u":[1e999]}'


@pytest.mark.parametrize("path", [CHAT, "/v1/other"])
def test_infinite_number_in_a_stream_leaves_valid_json(tmp_path, upstream, path):
    upstream.script(chunked("data: %s\n\n" % HUGE, "data: [DONE]\n\n", headers=SSE))
    with running(tmp_path, Proxy, upstream=upstream) as proxy:
        assert "-1e999" in latin(proxy.ask(chat(stream=True), path=path).body), "bytes pass as they are"
        (line,) = lines(proxy)
        strict(line)
        assert "hi" in line
    with replaying(tmp_path) as service:
        got = service.ask(chat(stream=True), path=path)
        data = [text[6:] for text in got.body.decode().split("\n\n") if text]
        assert (got.status, data.pop()) == (200, "[DONE]")
        assert "hi" in "".join(json.dumps(strict(text)) for text in data)


def test_infinite_number_in_a_whole_answer_replays_as_valid_json(tmp_path, upstream):
    text = json.dumps({**PLAIN, "x": 0}).replace('"x": 0', '"x": 1e999')
    with running(tmp_path, Proxy, upstream=upstream) as proxy:
        upstream.script(answer(text), answer(text))
        for _ in range(2):
            proxy.ask(chat())
        for line in lines(proxy):
            strict(line)
    with replaying(tmp_path) as service:
        strict(service.ask(chat()).body.decode())
        got = service.ask(chat(stream=True))
        assert got.events()[-1] == "[DONE]"
        assert "Infinity" not in latin(got.body)


def authorised(key):
    return {"Authorization": "Bearer " + key}


def test_key_of_digits_leaves_numbers_alone(proxy, upstream):
    text = '{"n":1000000000000,"m":000000000000,"s":"a 000000000000"}'.replace('"m":000000000000,', "")
    upstream.script(answer(text))
    proxy.ask(chat(), headers=authorised("000000000000"))
    (line,) = lines(proxy)
    assert strict(line)["response"] == {"n": 1000000000000, "s": "a [key]"}


ESCAPES = {  # key, JSON text, its value without the key
    "n": ("nopqrstuvwxyz0", r'"a\nopqrstuvwxyz0"', "a\nopqrstuvwxyz0"),
    "n behind an escape": ("nopqrstuvwxyz0", r'"a\nnopqrstuvwxyz0"', "a\n[key]"),
    "t": ("tuvwxyz0123456", r'"a\tuvwxyz0123456 tuvwxyz0123456"', "a\tuvwxyz0123456 [key]"),
    "u": ("u0041bcdefghijk", r'"\u0041bcdefghijk"', "Abcdefghijk"),
    "backslash, none": ("\\nabcdefghijklm", r'"a\nabcdefghijklm"', "a\nabcdefghijklm"),
    "backslash": ("\\nabcdefghijklm", r'"a\\nabcdefghijklm"', "a[key]"),
    "backslash, spelled": ("\\nabcdefghijklm", r'"a\u005cnabcdefghijklm"', "a[key]"),
    "behind a backslash": ("nopqrstuvwxyz0", r'"a\\nopqrstuvwxyz0"', "a\\[key]"),
    "slash": ("sk-ab/cd+ef/0123", r'"bad sk-ab\/cd+ef\/0123."', "bad [key]."),
    "plus": ("sk-ab/cd+ef/0123", r'"bad sk-ab/cd\u002bef/0123."', "bad [key]."),
    "PLUS": ("sk-ab/cd+ef/0123", r'"bad sk-ab/cd\u002Bef/0123."', "bad [key]."),
    "letter": ("sk-ab/cd+ef/0123", r'"bad \u0073k-ab/cd+ef/0123."', "bad [key]."),
    "quote": ('sk-ab"cd"ef-0123', r'"bad sk-ab\"cd\u0022ef-0123."', "bad [key]."),
}


@pytest.mark.parametrize("key, text, value", ESCAPES.values(), ids=list(ESCAPES))
def test_keys_are_hidden_however_json_spells_them(proxy, upstream, key, text, value):
    upstream.script(answer('{"error":{"message":%s},%s:1}' % (text, text), status=401))
    proxy.ask(chat(), headers=authorised(key))
    call = strict(lines(proxy)[0])
    assert call["response"] == {"error": {"message": value}, value: 1}
    assert call["error"] == value


KEY = "sk-very/secret+key-0123456789"


@pytest.mark.parametrize("size", [12, 13, len(KEY) - 1, len(KEY)])
@pytest.mark.parametrize("kind", ["text", "stream", "binary"])
def test_beginning_of_a_key_at_the_end_of_a_partial_record_is_hidden(one_attempt, upstream, monkeypatch, kind, size):
    monkeypatch.setattr(rock_ms, "HOLD_BYTES", 10)
    if kind == "stream":
        steps = sse(delta("bad key " + KEY[:size]), done=False)[:-1]
    else:
        text = '{"error":{"message":"bad key ' + ("\xff\xfe " if kind == "binary" else "") + KEY[:size]
        steps = [answer("", headers={"Content-Length": 5000}), {"send": text}]
    upstream.script(steps + [{"gate": "passed"}, CLOSE])
    later = one_attempt.ask_later(chat(stream=kind == "stream"), headers=authorised(KEY))
    upstream.open("passed")
    assert KEY[:size].encode() in broken_off(later.result)
    call = last_call(one_attempt)
    response = call["response"]
    if kind == "binary":
        response = latin(base64.b64decode(response))
    said = response["choices"][0]["message"]["content"] if kind == "stream" else response
    assert outcome(call) == (502, True)
    assert said.endswith("bad key " + ("\xff\xfe " if kind == "binary" else "") + "[key]")


def test_many_tool_calls_in_one_chunk_are_added_up_in_time():
    calls = [{"index": number, "id": "c%d" % number, "function": {"name": "f"}} for number in range(20000)]
    data = json.dumps(delta(tool_calls=calls))
    began, events = time.process_time(), rock_ms.CompletionEvents()
    events.add("", data)
    assert len(events.response()["choices"][0]["message"]["tool_calls"]) == 20000
    assert time.process_time() - began < 10


def test_many_empty_gzip_members_are_undone_without_copying_all_each_time(one_attempt, upstream, monkeypatch):
    original, copied = zlib.decompressobj, []

    class Counted:
        def __init__(self, *args):
            self._object = original(*args)

        def decompress(self, data, *args):
            copied.append(len(data))
            return self._object.decompress(data, *args)

        def __getattr__(self, name):
            return getattr(self._object, name)

    monkeypatch.setattr(zlib, "decompressobj", Counted)
    data = gzip.compress(b"") * 40000 + gzip.compress(PLAIN_DATA)
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    upstream.script({"send": head % len(data) + latin(data)})
    assert one_attempt.ask(chat()).body == data
    assert last_call(one_attempt)["response"] == PLAIN
    assert sum(copied) < 500 * len(data)


LIMIT = 10000


def long_stream(framing):
    chunks = words(*["%04d " % number * 20 for number in range(100)])
    steps = sse(*chunks)
    if framing == "close":
        events = ["data: %s\n\n" % json.dumps(value) for value in chunks] + ["data: [DONE]\n\n"]
        steps = [answer("", headers={"Content-Length": None, **SSE}), *({"send": text} for text in events), CLOSE]
    return steps


@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_stream_longer_than_can_be_recorded_passes_whole(one_attempt, upstream, monkeypatch, framing):
    monkeypatch.setattr(rock_ms, "MAX_BODY_BYTES", LIMIT)
    upstream.script(long_stream(framing))
    got = one_attempt.ask(chat(stream=True))
    said = "".join(event["choices"][0]["delta"].get("content", "") for event in got.events()[:-1])
    assert got.events()[-1] == "[DONE]" and len(said) == 100 * 20 * 5
    call = last_call(one_attempt)
    assert outcome(call) == (200, False) and "too long" in call["error"]
    kept = call["response"]["choices"][0]["message"]["content"]
    assert said.startswith(kept) and 1000 < len(kept) < LIMIT


def test_json_without_a_length_that_is_longer_than_can_be_recorded_passes_whole(one_attempt, upstream, monkeypatch):
    monkeypatch.setattr(rock_ms, "MAX_BODY_BYTES", LIMIT)
    monkeypatch.setattr(rock_ms, "HOLD_BYTES", 100)
    data = json.dumps(completion("x" * 50000)).encode()
    upstream.script(unbounded("HTTP/1.0", data))
    assert one_attempt.ask(chat()).body == data
    call = last_call(one_attempt)
    assert call["status"] == 200 and "too long" in call["error"]


def test_event_without_end_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(rock_ms, "MAX_BODY_BYTES", LIMIT)
    fields = [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")]
    head = b"HTTP/1.1 200 OK\r\n" + b"\r\n".join(b"%s: %s" % (a.encode(), b.encode()) for a, b in fields)
    for line in (b"data: ", b""):
        gathered = rock_ms.RecordedAnswer(rock_ms.parse_response_head(head), True)
        gathered.feed(line)
        for _ in range(100):
            gathered.feed(b"x" * 1000)
            assert len(gathered._parser._buffer) <= LIMIT
        gathered.end()
        _, error, _ = gathered.text(rock_ms.Secrets([]))
        assert "too long" in error


# ----------------------------------------------------------------------------------------------------------------------
# Failures of our own.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(one_attempt, monkeypatch):
    """failing(error, count): so often the trajectory cannot be written."""

    def fail(error, count):
        trajectory, left = one_attempt.server.service.trajectory, [error] * count
        append = trajectory.append

        def fail_first(line):
            if left:
                raise left.pop()
            return append(line)

        monkeypatch.setattr(trajectory, "append", fail_first)

    return fail


ERRORS = [rock_ms.StorageError("full"), RuntimeError("a bug")]


@pytest.mark.parametrize("count", [1, 9], ids=["once", "always"])
@pytest.mark.parametrize("error", ERRORS, ids=["StorageError", "RuntimeError"])
def test_stream_that_cannot_be_recorded_is_broken_and_closed(one_attempt, upstream, failing, monkeypatch, error, count):
    send, responses = rock_ms.UpstreamPool.send, []

    def sending(*args):
        responses.append(send(*args))
        return responses[-1]

    monkeypatch.setattr(rock_ms.UpstreamPool, "send", sending)
    failing(error, count)
    steps = sse(*words("a"))
    upstream.script(steps[:-2] + [{"gate": "last"}, steps[-2], {"gate": "end"}])
    later = one_attempt.ask_later(chat(stream=True))
    upstream.seen(1)
    upstream.open("last")
    assert b"[DONE]" not in broken_off(later.result)
    wait_until(lambda: any("%s 50" % CHAT in line for line in one_attempt.logged))
    upstream.open("end")
    hung_up = [call for call in one_attempt.trajectory() if "hung up" in call["error"]]
    is_closed = responses[-1].is_done
    responses[-1].close()
    assert (is_closed, hung_up) == (True, [])


def test_end_of_a_reply_that_fails_is_logged_and_disturbs_nobody(one_attempt, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    def exchange():
        connection.request("POST", CHAT, json.dumps(chat()), {"Content-Type": "application/json"})
        return json.loads(connection.getresponse().read().decode())

    connection = http.client.HTTPConnection("127.0.0.1", one_attempt.port, timeout=TIMEOUT)
    with contextlib.closing(connection), monkeypatch.context() as patched:
        assert exchange() == PLAIN
        patched.setattr(rock_ms.ProxyCall, "_close", fail)
        assert one_attempt.ask(chat()).json() == PLAIN
        wait_until(lambda: sum("%s 200 " % CHAT in line for line in one_attempt.logged) == 2)
        wait_until(lambda: any("the end of the reply" in line for line in one_attempt.logged))
        assert exchange() == PLAIN
        assert exchange() == PLAIN, "on the same connection"
    assert [call["status"] for call in one_attempt.trajectory()] == [200] * 4


# ----------------------------------------------------------------------------------------------------------------------
# Names, uploads and connections.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_names(monkeypatch):
    """Names are not found until this event is set."""
    original, released = socket.getaddrinfo, threading.Event()

    def getaddrinfo(host, *args, **options):
        if host == "slow.invalid" and not options.get("flags", 0) & socket.AI_NUMERICHOST:
            released.wait(TIMEOUT)
            raise socket.gaierror(socket.EAI_NONAME, "not known, after all")
        return original(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield released
    released.set()


def resolvers():
    return [thread for thread in threading.enumerate() if thread.name == "rock-resolve"]


SLOW = {"proxy_base_url": "http://slow.invalid/v1", "max_attempts": 1}


def test_name_that_is_not_found_in_time_is_504(tmp_path, slow_names):
    with running(tmp_path, Proxy, request_timeout=0.2, **SLOW) as proxy:
        assert proxy.ask(chat()).status == 504
        assert last_call(proxy)["status"] == 504
        slow_names.set()
        wait_until(lambda: not resolvers())


def test_search_for_a_name_ends_when_the_client_hangs_up(tmp_path, slow_names):
    with running(tmp_path, Proxy, request_timeout=60.0, **SLOW) as proxy:
        with connected(proxy):
            wait_until(resolvers)
        assert (last_call(proxy)["status"], last_call(proxy)["error"]) == (499, "the client hung up")
        slow_names.set()
        wait_until(lambda: not resolvers())


@pytest.mark.usefixtures("prompt_stop")
def test_search_for_a_name_does_not_delay_the_stop(tmp_path, slow_names):
    with nothing_left():
        proxy = Proxy(tmp_path, request_timeout=60.0, **SLOW)
        proxy.server.start()
        with connected(proxy):
            wait_until(resolvers)
            proxy.server.stop()
            assert resolvers(), "the resolver still hangs"
            assert (last_call(proxy)["status"], last_call(proxy)["error"]) == (499, "the service stopped")
        slow_names.set()
        wait_until(lambda: not resolvers())


def test_search_for_a_name_that_fails_at_last_is_502(tmp_path, slow_names):
    with running(tmp_path, Proxy, request_timeout=60.0, **SLOW) as proxy:
        later = proxy.ask_later(chat())
        wait_until(resolvers)
        slow_names.set()
        assert later.result().status == 502


@pytest.mark.load
def test_upload_may_take_longer_than_the_timeout_if_it_goes_on(tmp_path):
    size, seconds = 16 * 1024 * 1024, []

    def serve(sock):
        began, left = time.monotonic(), size
        while left > 0:
            left -= len(sock.recv(128 * 1024))
            if left > 6 * 1024 * 1024:  # the rest fits into the kernel's buffers, and is no upload any more
                select.select([], [], [], 0.03)
        seconds.append(time.monotonic() - began)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    with before(tmp_path, serve, request_timeout=2.0) as proxy:
        got = proxy.ask(b"x" * size)
        assert (got.status, got.body) == (200, b"{}")
        assert seconds[0] > 2.0, "it took longer than the timeout"


def test_early_refusal_of_an_upload_reaches_the_client(tmp_path):
    ended = threading.Event()

    def serve(sock):
        sock.recv(1000)
        sock.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\n{}")
        ended.wait(TIMEOUT)  # neither reads nor closes

    with before(tmp_path, serve, request_timeout=30.0) as proxy:
        try:
            got = proxy.ask(b"x" * (20 * 1024 * 1024))
            assert (got.status, got.body) == (413, b"{}")
            assert last_call(proxy)["status"] == 413
            metrics = proxy.ask(method="GET", path="/metrics").body.decode()
            assert "rock_proxy_idle_upstream_connections 0" in metrics, "it is out of step, and not kept"
        finally:
            ended.set()


@pytest.mark.skipif(not hasattr(select, "POLLRDHUP"), reason="only Linux tells of the end behind unread bytes")
@pytest.mark.parametrize("stray", [b"\r\n", b"\n", raw_request()], ids=["CRLF", "LF", "request"])
@pytest.mark.parametrize("is_late", [False, True])
def test_hangup_behind_stray_bytes_is_seen(start, upstream, stray, is_late):
    proxy = start(request_timeout=30.0, max_attempts=1)
    upstream.script([STALL])
    data = raw_request(json.dumps(chat()).encode())
    with connected(proxy, data if is_late else data + stray) as client:
        upstream.seen(1)
        if is_late:
            client.sendall(stray)
    assert upstream.wait_closed()
    assert (last_call(proxy)["status"], last_call(proxy)["error"]) == (499, "the client hung up")


def idle(proxy):
    text = proxy.ask(method="GET", path="/metrics").body.decode()
    return int(text.partition("\nrock_proxy_idle_upstream_connections ")[2].split()[0])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"], ids=["same origin", "other origin"])
def test_idle_connections_are_closed_when_the_next_one_is_given_back(tmp_path, upstream, monkeypatch, host):
    monkeypatch.setattr(rock_ms, "POOL_SECONDS", 0.01)
    rules = {"default": upstream.url, "other": upstream.url.replace("127.0.0.1", host)}
    with running(tmp_path, Proxy, proxy_rules=rules) as proxy:
        held = {"model": "m", "script": [{"gate": "go"}, answer({})]}
        later = [proxy.ask_later(held) for _ in range(3)]
        upstream.seen(3)
        upstream.open("go")
        assert [each.result().status for each in later] == [200] * 3
        until = time.monotonic() + 0.02
        wait_until(lambda: time.monotonic() > until)
        assert proxy.ask(chat(model="other")).status == 200
        wait_until(lambda: upstream.connections() == 1)
        assert idle(proxy) == 1


def test_no_more_idle_connections_are_kept_than_allowed(one_attempt, upstream, monkeypatch):
    monkeypatch.setattr(rock_ms, "MAX_IDLE_UPSTREAMS", 2)
    later = [one_attempt.ask_later({"script": [{"gate": "go"}, answer({})]}) for _ in range(6)]
    upstream.seen(6)
    upstream.open("go")
    assert [each.result().status for each in later] == [200] * 6
    wait_until(lambda: upstream.connections() == 2)
    assert idle(one_attempt) == 2
    assert one_attempt.ask(chat()).status == 200
    assert idle(one_attempt) == 2


def test_client_that_is_gone_while_the_header_is_written_leaves_what_was_held(start, upstream, monkeypatch):
    proxy = start(heartbeat_seconds=0.05, max_attempts=1)
    write = rock_ms.Connection.write

    def gone(connection, data):
        if bytes(data).startswith(b"HTTP/1.1 200"):
            raise rock_ms.ClientGone
        write(connection, data)

    upstream.script([answer('{"id": "held', headers={"Content-Length": 5000}), STALL])
    with monkeypatch.context() as patched:
        patched.setattr(rock_ms.Connection, "write", gone)
        with connected(proxy):
            call = last_call(proxy)
            assert upstream.wait_closed()
    assert (outcome(call), call["response"]) == ((499, True), '{"id": "held')


def test_line_ends_before_a_request_do_not_go_on_for_ever(proxy, monkeypatch):
    monkeypatch.setattr(rock_ms, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(rock_ms, "LINGER_SECONDS", 0.1)
    deadline, came = time.monotonic() + TIMEOUT, b""
    with connected(proxy, b"\r\n") as client, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while not came:
            assert time.monotonic() < deadline, "it still reads"
            client.sendall(b"\r\n" * 100)
            if select.select([client], [], [], 0)[0]:
                came = client.recv(65536) or b"closed"
    assert came[:13] in (b"", b"closed", b"HTTP/1.1 408 ")


# ----------------------------------------------------------------------------------------------------------------------
# Replay.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [50, 1, 200])
def test_torn_last_line_is_refused_with_a_hint(tmp_path, end):
    path = tmp_path / "torn.jsonl"
    line = json.dumps(recorded()).encode()
    path.write_bytes(line + b"\n" + line[:end])
    with nothing_left(), pytest.raises(rock_ms.UsageError) as caught:
        rock_ms.Recording(str(path), False)
    assert ", line 2: " in str(caught.value) and "it is torn" in str(caught.value)
    path.write_bytes(line + b"\n" + line[:end] + b"\n" + line + b"\n")
    with nothing_left(), pytest.raises(rock_ms.UsageError) as caught:
        rock_ms.Recording(str(path), False)
    assert ", line 2: " in str(caught.value) and "it is torn" not in str(caught.value), (
        "it has an end: it was never whole"
    )


FORGED = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("more", [{}, {"response_format": "text"}, {"response_format": "events"}], ids=repr)
@pytest.mark.parametrize("status", [204, 304])
def test_status_without_a_body_replays_without_one(tmp_path, status, more, is_stream):
    response = {"text": FORGED, "events": [{"data": FORGED}]}.get(more.get("response_format"), completion(FORGED))
    asked = json.dumps(chat(stream=is_stream)).encode()
    with replaying(tmp_path, recorded(response, status=status, **more), recorded("next", status=200)) as service:
        came = talk(service.port, raw_request(asked) + raw_request(b"{}", b"Connection: close\r\n"))
    head, _, rest = came.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"\r\nTransfer-Encoding" not in head
    assert b"Content-Length" not in head
    assert rest.startswith(b"HTTP/1.1 200 ") and rest.endswith(b'\r\n\r\n"next"')


@pytest.mark.parametrize("status", [100, 101, 199])
def test_status_that_is_none_of_an_answer_is_refused_at_start(tmp_path, status):
    path = tmp_path / "bad.jsonl"
    path.write_text("%s\n%s\n" % (json.dumps(recorded()), json.dumps(recorded(status=status))))
    with nothing_left(), pytest.raises(rock_ms.UsageError) as caught:
        Proxy(tmp_path, replay_file=str(path))
    assert ", line 2: " in str(caught.value) and str(status) in str(caught.value)


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("first", [{"choices": []}, {"id": "c", "choices": [], "prompt_filter_results": []}], ids=str)
def test_stream_that_was_cut_before_its_first_choice_replays_as_a_break(tmp_path, upstream, first, is_stream):
    upstream.script(sse(first, done=False)[:-1] + [{"gate": "passed"}, CLOSE])
    with running(tmp_path, Proxy, upstream=upstream, max_attempts=1) as proxy:
        later = proxy.ask_later(chat(stream=True))
        upstream.open("passed")
        broken_off(later.result)
        assert outcome(last_call(proxy)) == (502, True)
    with replaying(tmp_path) as service:
        came = ended_by_break(service, chat(stream=is_stream))
        assert not came.endswith(b"}") and b"[DONE]" not in came


def ended_by_break(service, asked):
    """What came of the answer before its connection broke; not an answer, not even one of an error."""
    try:
        return broken_off(service.ask, asked)
    except (http.client.RemoteDisconnected, ConnectionResetError):
        return b""


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize(
    "response, more",
    [
        ([], {"response_format": "events"}),
        ([{"data": {"a": 1}}], {"response_format": "events"}),
        ({}, {}),
        ({"id": "c"}, {}),
        ("}", {"response_format": "text"}),
        ("", {"response_format": "base64"}),
    ],
    ids=repr,
)
def test_call_that_was_cut_off_replays_as_a_break(tmp_path, response, more, is_stream):
    call = recorded(response, status=502, partial=True, error="cut", **more)
    with replaying(tmp_path, {**call, "stream": True}, recorded("next")) as service:
        came = ended_by_break(service, chat(stream=is_stream))
        assert b"error" not in came and b"[DONE]" not in came and not came.endswith(b"}")
        assert service.ask(chat()).json() == "next"
        assert [line for line in service.logged if "bug" in line or "Traceback" in line] == []
