"""A trajectory answers once more: recorded with the real proxy, or written by hand where a file has to be odd."""

import contextlib
import http.client
import json
import os
import socket
import socketserver
import sys
import threading
import tracemalloc

import pytest

from rock_ms import Recording, UsageError
from support import TIMEOUT, Later, Proxy, chat, completion, nothing_left, raw_request, running, talk, wait_until
from upstream import Upstream, answer, chunked, delta, sse, words


@pytest.fixture(scope="module")
def model():
    """One upstream for all tests here; each takes all that it scripts."""
    upstream = Upstream()
    yield upstream
    upstream.close()


@pytest.fixture(autouse=True)
def prompt_stop(monkeypatch):
    """A listener looks every 5 ms whether it is to stop, not every 100: there are many services here."""
    serve = socketserver.BaseServer.serve_forever
    monkeypatch.setattr(socketserver.BaseServer, "serve_forever", lambda listener, _=0.5: serve(listener, 0.005))


def directory(parent, name):
    path = parent / name
    path.mkdir(exist_ok=True)
    return path


@contextlib.contextmanager
def recording(tmp_path, model, *scripts, **settings):
    """A proxy before the upstream, which does that."""
    model.script(*scripts)
    with running(directory(tmp_path, "recorded"), Proxy, upstream=model, max_attempts=1, **settings) as proxy:
        yield proxy


@contextlib.contextmanager
def replaying(tmp_path, **settings):
    """A service that replays what was recorded, and records nothing."""
    settings.setdefault("replay_file", str(tmp_path / "recorded" / "LLMTraj.jsonl"))
    with running(directory(tmp_path, "replay"), type="proxy", **settings) as service:
        yield service
    assert service.trajectory() == [] or service.paths.traj_file == service.settings.replay_file


def write(tmp_path, *calls):
    """A trajectory of these calls, objects or lines."""
    path = directory(tmp_path, "recorded") / "LLMTraj.jsonl"
    lines = [call if isinstance(call, bytes) else json.dumps(call).encode("utf-8") + b"\n" for call in calls]
    path.write_bytes(b"".join(lines))
    return path


def recorded(content="hello", request=None, **more):
    """A call as the proxy writes it down."""
    request = request or chat()
    response = completion(content) if isinstance(content, str) else content
    common = {"method": "POST", "path": "/v1/chat/completions", "model": request.get("model"), "stream": False}
    return {"request": request, "response": response, **common, "attempts": 1, "error": None, "status": 200, **more}


def said(got):
    """What an answer says, of whichever kind."""
    return said_by(got.json())


def said_by(response):
    return response["choices"][0]["message"]["content"]


def error_code(got):
    return got.status, got.json()["error"]["code"]


def broken_off(ask, *args, **options):
    """What came of an answer that broke off."""
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(*args, **options)
    return caught.value.partial


# ----------------------------------------------------------------------------------------------------------------------
# Recorded as a stream or not, replayed as a stream or not.
# ----------------------------------------------------------------------------------------------------------------------


def of_choices(*choices, **more):
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "details": {"cached": 1}}
    numbered = [{"index": number, **choice} for number, choice in enumerate(choices)]
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": numbered,
        "usage": usage,
        **more,
    }


def message(finish="stop", more=None, **fields):
    return {"message": {"role": "assistant", "content": None, **fields}, "finish_reason": finish, **(more or {})}


def tool_call(id, name, arguments):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def first_piece(index, id, name):
    return {"index": index, **tool_call(id, name, "")}


def next_piece(index, arguments):
    return {"index": index, "function": {"arguments": arguments}}


def logprobs(*tokens):
    return {"logprobs": {"content": [{"token": token, "logprob": -0.5, "top_logprobs": []} for token in tokens]}}


def with_logprobs(chunk, *tokens):
    chunk["choices"][0].update(logprobs(*tokens))
    return chunk


def text_chunk(text, finish=None, **more):
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return {"id": "c1", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], **more}


KINDS = {  # the answer whole, and the chunks of the same answer, without usage
    "content": (of_choices(message(content="Hé😀\nlo")), words("H", "é😀", "\nlo")),
    "empty content": (of_choices(message(content="")), words("")),
    "reasoning": (
        of_choices(message(content="yes", reasoning_content="well, ...")),
        [delta(reasoning_content="well"), delta(reasoning_content=", ..."), *words("ye", "s")],
    ),
    "tool calls": (
        of_choices(message("tool_calls", tool_calls=[tool_call("a", "f", '{"x":1}'), tool_call("b", "g", "{}")])),
        [
            delta(role="assistant"),
            delta(tool_calls=[first_piece(0, "a", "f")]),
            delta(tool_calls=[first_piece(1, "b", "g")]),
            delta(tool_calls=[next_piece(1, "{}"), next_piece(0, '{"x"')]),
            delta(tool_calls=[next_piece(0, ":1}")]),
            delta(finish="tool_calls"),
        ],
    ),
    "choices": (
        of_choices(message(content="Aa"), message("length", content="Bb")),
        [delta("A"), delta("B", 1), delta("b", 1), delta("a"), delta(index=1, finish="length"), delta(finish="stop")],
    ),
    "logprobs": (
        of_choices(message(content="ab", more=logprobs("a", "b"))),
        [with_logprobs(delta("a"), "a"), with_logprobs(delta("b"), "b"), delta(finish="stop")],
    ),
    "legacy": (
        of_choices({"text": "Hello", "finish_reason": "length"}, object="text_completion"),
        [text_chunk("Hel"), text_chunk("lo", "length")],
    ),
}


def gathered(got, is_stream):
    """What an answer comes to: [(content, reasoning, tool calls, log probabilities, finish reason)], usage."""
    chunks = got.events() if is_stream else [got.json()]
    assert not is_stream or chunks.pop() == "[DONE]"
    choices, usage = {}, None
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            sums = choices.setdefault(choice["index"], ["", "", {}, [], None])
            part = choice.get("delta" if is_stream else "message", {})
            sums[0] += choice.get("text") or part.get("content") or ""
            sums[1] += part.get("reasoning_content") or ""
            for position, call in enumerate(part.get("tool_calls") or ()):
                whole = sums[2].setdefault(call["index"] if is_stream else position, [None, None, ""])
                whole[0] = call.get("id") or whole[0]
                whole[1] = call["function"].get("name") or whole[1]
                whole[2] += call["function"]["arguments"]
            sums[3] += [entry["token"] for entry in (choice.get("logprobs") or {"content": []})["content"]]
            sums[4] = choice["finish_reason"] or sums[4]
    return [tuple(sums) for _, sums in sorted(choices.items())], usage


@pytest.mark.parametrize("whole, chunks", KINDS.values(), ids=list(KINDS))
def test_stream_or_not_replays_as_the_same_message(tmp_path, model, whole, chunks):
    last = {**chunks[-1], "choices": [], "usage": whole["usage"]}
    ask = {"path": "/v1/completions" if whole["object"] == "text_completion" else "/v1/chat/completions"}
    with recording(tmp_path, model, *[answer(whole)] * 2, *[sse(*chunks, last)] * 2) as proxy:
        expected = gathered(proxy.ask(chat(), **ask), False)
        proxy.ask(chat(), **ask)
        for _ in range(2):
            assert gathered(proxy.ask(chat(stream=True), **ask), True) == expected
    with replaying(tmp_path) as service:
        for is_stream in (False, True, False, True):
            got = service.ask(chat(stream=is_stream), **ask)
            kind = "text/event-stream; charset=utf-8" if is_stream else "application/json"
            assert (got.status, got.headers["content-type"]) == (200, kind)
            assert gathered(got, is_stream) == expected
            assert ("object", got.json()["object"]) in whole.items() if not is_stream else True


def test_whole_answer_replays_byte_by_byte_equal_as_json(tmp_path, model):
    whole = of_choices(message(content="\u2028é"), system_fingerprint=None, vendor={"n": [1.5, None, True]})
    with recording(tmp_path, model, answer(whole)) as proxy:
        proxy.ask(chat())
    with replaying(tmp_path) as service:
        assert service.ask(chat()).json() == whole


def test_answer_with_a_null_error_replays_as_a_whole_stream(tmp_path):
    write(tmp_path, recorded({**completion(), "error": None}))
    with replaying(tmp_path) as service:
        events = service.ask(chat(stream=True)).events()
    assert events[-1] == "[DONE]" and not any(event.get("error", "") is None for event in events[1:-1])


# ----------------------------------------------------------------------------------------------------------------------
# Which answer.
# ----------------------------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_each_method_and_path(tmp_path):
    other = {"path": "/v1/completions"}
    calls = [recorded("1"), recorded("x", **other), recorded("2"), recorded("p", method="PUT"), recorded("y", **other)]
    write(tmp_path, *calls, recorded("3"))
    with replaying(tmp_path) as service:
        assert said(service.ask(chat("whatever"))) == "1"
        assert said(service.ask(chat(), **other)) == "x"
        assert said(service.ask(chat(), path="/v1/completions/")) == "y"
        assert said(service.ask(chat(), method="PUT")) == "p"
        assert [said(service.ask(chat())) for _ in range(2)] == ["2", "3"]
        assert error_code(service.ask(chat())) == (404, "replay_exhausted")
        assert error_code(service.ask(chat(), **other)) == (404, "replay_exhausted")
        assert error_code(service.ask(chat(), method="PATCH")) == (404, "not_recorded")
        assert error_code(service.ask(chat(), path="/v1/embeddings")) == (404, "not_recorded")


def test_query_does_not_tell_requests_apart(tmp_path):
    write(tmp_path, recorded("1"))
    with replaying(tmp_path) as service:
        assert said(service.ask(chat(), path="/v1/chat/completions?api-version=2")) == "1"


def test_fifty_threads_get_each_answer_once(tmp_path):
    write(tmp_path, *[recorded("%d" % number) for number in range(50)])
    with replaying(tmp_path) as service:
        barrier = threading.Barrier(50)

        def ask():
            barrier.wait(TIMEOUT)
            return said(service.ask(chat()))

        got = [later.result() for later in [Later(ask) for _ in range(50)]]
        assert sorted(got, key=int) == ["%d" % number for number in range(50)]
        assert error_code(service.ask(chat())) == (404, "replay_exhausted")


def test_threads_do_not_disturb_each_others_reading(tmp_path):
    path = write(tmp_path, *[recorded("%d %s" % (number, "x" * 20000)) for number in range(400)])
    barrier, interval = threading.Barrier(8), sys.getswitchinterval()
    with contextlib.closing(Recording(str(path), False)) as recording:

        def take():
            barrier.wait(TIMEOUT)
            calls = [recording.take("POST", "/v1/chat/completions", None) for _ in range(50)]
            return [said_by(call.value["response"]) for call in calls]

        sys.setswitchinterval(1e-6)
        try:
            got = [later.result() for later in [Later(take) for _ in range(8)]]
        finally:
            sys.setswitchinterval(interval)
    numbers = [[int(content.split()[0]) for content in contents] for contents in got]
    assert sorted(sum(numbers, [])) == list(range(400)) and all(taken == sorted(taken) for taken in numbers)


def test_answers_are_found_by_their_requests(tmp_path, model):
    with recording(tmp_path, model) as proxy:
        for name in "abc":
            for step in (1, 2):
                script = [answer(completion("%s%d" % (name, step)))]
                proxy.ask(chat("agent %s" % name, step=step, script=script))
    calls = [json.loads(line) for line in (tmp_path / "recorded" / "LLMTraj.jsonl").read_bytes().splitlines()]
    with replaying(tmp_path, replay_match="request") as service:
        for number in (4, 0, 2, 5, 3, 1):  # as three agents at once might ask
            got = service.ask(calls[number]["request"])
            assert got.json() == calls[number]["response"]
        assert error_code(service.ask(calls[0]["request"])) == (404, "replay_exhausted")
        assert error_code(service.ask(chat("agent d"))) == (404, "not_recorded")


def test_same_request_twice_gives_both_answers_in_order(tmp_path):
    write(tmp_path, recorded("1"), recorded("other", chat("b")), recorded("2"))
    with replaying(tmp_path, replay_match="request") as service:
        assert [said(service.ask(chat())) for _ in range(2)] == ["1", "2"]
        assert error_code(service.ask(chat())) == (404, "replay_exhausted")
        assert said(service.ask(chat("b"))) == "other"


REQUESTS = {
    # what is asked: whether it is the request that was recorded, chat(n=1, temperature=0.5, stream=True)
    "the same": (chat(n=1, temperature=0.5, stream=True), True),
    "in another order": ({"temperature": 0.5, "n": 1, **chat(stream=True)}, True),
    "not as a stream": (chat(n=1, temperature=0.5), True),
    "with stream options": (chat(n=1, temperature=0.5, stream=True, stream_options={"include_usage": True}), True),
    "another prompt": (chat("hi!", n=1, temperature=0.5, stream=True), False),
    "another field": (chat(n=1, temperature=0.5, stream=True, top_p=1), False),
    "a field less": (chat(n=1, stream=True), False),
    "another number": (chat(n=1, temperature=0.6, stream=True), False),
}


@pytest.mark.parametrize("asked, is_found", REQUESTS.values(), ids=list(REQUESTS))
def test_what_tells_requests_apart(tmp_path, asked, is_found):
    write(tmp_path, recorded("1", chat(n=1, temperature=0.5, stream=True)))
    with replaying(tmp_path, replay_match="request") as service:
        assert service.ask(asked).status == (200 if is_found else 404)


def test_white_space_and_escapes_do_not_tell_requests_apart(tmp_path, model):
    with recording(tmp_path, model) as proxy:
        proxy.ask(b'{ "model" : "m",\n "messages": ["\\u00e9 \\ud83d"] }')
    with replaying(tmp_path, replay_match="request") as service:
        assert said(service.ask('{"messages":["é \\ud83d"],"model":"m"}'.encode("utf-8"))) == "hello"


def test_overrides_of_the_recording_do_not_tell_requests_apart(tmp_path, model):
    with recording(tmp_path, model, request_overrides={"temperature": 0, "seed": 7}) as proxy:
        proxy.ask(chat(temperature=0.5))
        assert proxy.trajectory()[0]["request"] == chat(temperature=0, seed=7)
    write_more = recorded("plain", chat("b", temperature=1))
    with open(str(tmp_path / "recorded" / "LLMTraj.jsonl"), "a") as file:
        file.write(json.dumps(write_more) + "\n")
    with replaying(tmp_path, replay_match="request") as service:
        assert error_code(service.ask(chat("b", temperature=0.5))) == (404, "not_recorded")
        assert said(service.ask(chat("b", temperature=1))) == "plain"
        assert said(service.ask(chat(temperature=0.9))) == "hello"


def test_same_request_with_and_without_overrides_gives_both_answers_in_order(tmp_path):
    plain, overridden = {"request": chat(seed=1)}, {"request": chat(seed=7), "overridden": ["seed"]}
    write(tmp_path, *[recorded("%d" % n, **(overridden if n % 2 else plain)) for n in range(4)])
    with replaying(tmp_path, replay_match="request") as service:
        assert [said(service.ask(chat(seed=1))) for _ in range(4)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("how", ["order", "request"])
def test_requests_that_are_no_json_objects_are_found_too(tmp_path, model, how):
    bodies = [b"[1]", b"plain", b"\xff\x00", b"", "é".encode("utf-8")]
    with recording(tmp_path, model, *[answer({"n": number}) for number in range(5)]) as proxy:
        for body in bodies:
            proxy.ask(body, path="/v1/x", headers={"Content-Type": "application/octet-stream"})
    with replaying(tmp_path, replay_match=how) as service:
        assert [service.ask(body, path="/v1/x").json() for body in bodies] == [{"n": number} for number in range(5)]


# ----------------------------------------------------------------------------------------------------------------------
# Failures.
# ----------------------------------------------------------------------------------------------------------------------

ERROR = {"error": {"message": "no good", "type": "bad_error", "code": "x"}}
FAILURES = {
    "400": (answer(ERROR, 400), 400, ERROR),
    "429": (answer(ERROR, 429, {"Retry-After": "0"}), 429, ERROR),
    "500": (answer(ERROR, 500), 500, ERROR),
    "500 as text": (answer("oops", 500, {"Content-Type": "text/plain"}), 500, "oops"),
    "503 as an event": (sse(ERROR, status=503, done=False), 503, ERROR),
    "404 without a body": (answer("", 404), 404, None),
    "502 of ours": ({"close": True}, 502, None),
    "502 of ours, of garbage": ({"send": "garbage\r\n\r\n"}, 502, None),
    "504 of ours": ({"stall": True}, 504, None),
}


@pytest.mark.parametrize("script, status, body", FAILURES.values(), ids=list(FAILURES))
def test_failure_replays_as_that_failure(tmp_path, model, script, status, body):
    with recording(tmp_path, model, *[script] * 2, request_timeout=0.2 if status == 504 else 20) as proxy:
        assert [proxy.ask(chat()).status for _ in range(2)] == [status] * 2
        call = proxy.trajectory()[0]
    assert (call["status"], call["response"]) == (status, body)
    with replaying(tmp_path) as service:
        for is_stream in (False, True):
            got = service.ask(chat(stream=is_stream))
            assert got.status == status
            if body is None:
                assert got.json()["error"] == {
                    **got.json()["error"],
                    "message": call["error"],
                    "code": "replayed_failure",
                }
            else:
                assert body == (got.json() if isinstance(body, dict) else got.body.decode("utf-8"))


ROCK = {
    "request and response only": ({}, completion("hello"), 200),
    "success": ({"status": "success"}, completion("hello"), 200),
    "null status": ({"status": None, "error": None}, completion("hello"), 200),
    "failure": ({"status": "failure", "error": "upstream_status=503"}, None, 503),
    "failure of another kind": ({"status": "failure", "error": "timed out"}, None, 502),
    "failure without words": ({"status": "failure"}, None, 502),
    "failure with a body": ({"status": "failure", "error": "upstream_status=400"}, ERROR, 400),
    "error alone": ({"error": "upstream_status=429"}, None, 429),
    "error of another kind alone": ({"error": "boom"}, None, 502),
    "named success": ({"status": "failure", "error": "upstream_status=200"}, None, 502),
}


@pytest.mark.parametrize("fields, response, status", ROCK.values(), ids=list(ROCK))
def test_records_of_rock_replay(tmp_path, fields, response, status):
    write(tmp_path, *[{"request": chat(), "response": response, **fields}] * 2)
    with replaying(tmp_path) as service:
        got, stream = service.ask(chat()), service.ask(chat(stream=True))
    assert (got.status, stream.status) == (status, status)
    if status == 200:
        assert (said(got), gathered(stream, True)[0][0][0]) == ("hello", "hello")
    elif response is None:
        assert got.json()["error"]["message"] == (fields.get("error") or "recorded as failed")
    else:
        assert got.json() == stream.json() == response


def record_error_in_stream(tmp_path, model):
    with recording(tmp_path, model, *[sse(*words("a", "b")[:-1], ERROR, done=False)] * 2) as proxy:
        streams = [proxy.ask(chat(stream=True)).events() for _ in range(2)]
        assert [(call["status"], call["error"]) for call in proxy.trajectory()] == [(200, "no good")] * 2
    return streams[0]


def test_error_event_in_a_stream_replays_as_that_error(tmp_path, model):
    record_error_in_stream(tmp_path, model)
    with replaying(tmp_path) as service:
        events = service.ask(chat(stream=True)).events()
        assert events[-1] == ERROR
        whole = service.ask(chat())
        assert (whole.status, whole.json()) == (500, ERROR)


def test_error_event_in_a_stream_comes_once(tmp_path, model):
    record_error_in_stream(tmp_path, model)
    with replaying(tmp_path) as service:
        assert [event for event in service.ask(chat(stream=True)).events() if "error" in event] == [ERROR]


def test_stream_does_not_seem_to_end_well_before_its_error_event(tmp_path, model):
    record_error_in_stream(tmp_path, model)
    with replaying(tmp_path) as service:
        events = service.ask(chat(stream=True)).events()
    assert {choice["finish_reason"] for event in events for choice in event.get("choices", ())} == {None}


# ----------------------------------------------------------------------------------------------------------------------
# Calls that were cut off.
# ----------------------------------------------------------------------------------------------------------------------


def record_cut_off(tmp_path, model, body, steps, path="/v1/chat/completions"):
    """Record two calls that the upstream broke off after those steps; the one call, and what its client had got."""
    gates = ["%s%d" % (tmp_path, number) for number in range(2)]
    scripts = [[*steps, {"gate": gate}, {"reset": True}] for gate in gates]
    partial = []
    with recording(tmp_path, model, *scripts, heartbeat_seconds=0.05) as proxy:
        for gate in gates:
            connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=TIMEOUT)
            with contextlib.closing(connection):
                connection.request("POST", path, json.dumps(body).encode("utf-8"), {"Content-Type": "application/json"})
                response = connection.getresponse()  # some of it was passed on: it is not asked for once more
                model.open(gate)
                partial.append(broken_off(response.read))
        calls = proxy.trajectory()
    assert [(call["status"], call["partial"]) for call in calls] == [(502, True)] * 2
    return calls[0], partial[0]


def events_of(data):
    return [
        json.loads(event.partition("data: ")[2]) for event in data.decode("utf-8").split("\n\n") if "data: " in event
    ]


def contents(chunks):
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def test_stream_that_was_cut_off_replays_cut_off(tmp_path, model):
    record_cut_off(tmp_path, model, chat(stream=True), sse(*words("a", "b"), done=False)[:4])
    with replaying(tmp_path) as service:
        chunks = events_of(broken_off(service.ask, chat(stream=True)))
        assert contents(chunks) == "ab"
        assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]] == [None] * len(chunks)
        partial = broken_off(service.ask, chat())
        assert b'"ab"' in partial
        with pytest.raises(ValueError):
            json.loads(partial.decode("utf-8"))


@pytest.mark.parametrize("is_stream", [False, True])
def test_whole_answer_that_was_cut_off_replays_cut_off(tmp_path, model, is_stream):
    text = json.dumps(completion("héllo"))
    steps = [answer("", headers={"Content-Length": len(text)}), {"send": text[:40]}]
    call, partial = record_cut_off(tmp_path, model, chat(), steps)
    assert (call["response"], partial) == (text[:40], text[:40].encode("utf-8"))
    with replaying(tmp_path) as service:
        assert broken_off(service.ask, chat(stream=is_stream)) == partial


def test_other_events_that_were_cut_off_replay_cut_off(tmp_path, model):
    event = 'event: message_start\ndata: {"type":"message_start","n":1}\n\n'
    kind = {"Content-Type": "text/event-stream"}
    _, partial = record_cut_off(
        tmp_path, model, chat(stream=True), chunked(event, headers=kind)[:2], path="/v1/messages"
    )
    with replaying(tmp_path) as service:
        assert events_of(broken_off(service.ask, chat(stream=True), path="/v1/messages")) == events_of(partial)


def test_bytes_that_were_cut_off_replay_cut_off(tmp_path, model):
    data = bytes(range(256)).decode("latin-1")
    steps = [answer("", headers={"Content-Length": 1000, "Content-Type": "audio/mpeg"}), {"send": data}]
    record_cut_off(tmp_path, model, {}, steps, path="/v1/audio/speech")
    with replaying(tmp_path) as service:
        assert broken_off(service.ask, {}, path="/v1/audio/speech") == bytes(range(256))


def test_connection_cannot_be_used_after_a_call_that_was_cut_off(tmp_path):
    write(tmp_path, recorded("1", partial=True, status=502), recorded("2"))
    with replaying(tmp_path) as service:
        received = talk(service.port, raw_request(json.dumps(chat()).encode("utf-8")) * 2)
        assert received.count(b"HTTP/1.1 ") == 1 and not received.endswith(b"0\r\n\r\n")


def test_call_whose_client_hung_up_before_anything_came_gets_no_answer(tmp_path, model):
    with recording(tmp_path, model, {"stall": True}) as proxy:
        count = len(model.seen()) + 1
        with contextlib.closing(socket.create_connection(("127.0.0.1", proxy.port), TIMEOUT)) as sock:
            sock.sendall(raw_request(json.dumps(chat()).encode("utf-8")))
            model.seen(count)
        (call,) = wait_until(proxy.trajectory, "the record")
        assert (call["status"], call["response"]) == (499, None)
    with replaying(tmp_path) as service:
        assert talk(service.port, raw_request(json.dumps(chat()).encode("utf-8"))) == b""
        assert error_code(service.ask(chat())) == (404, "replay_exhausted")


def test_legacy_stream_that_was_cut_off_behind_the_end_of_a_choice_replays_cut_off(tmp_path):
    choices = [{"index": 0, "text": "A", "finish_reason": "stop"}, {"index": 1, "text": "B", "finish_reason": None}]
    response = {"object": "text_completion", "choices": choices}
    write(tmp_path, recorded(response, path="/v1/completions", partial=True, status=502))
    with replaying(tmp_path) as service:
        partial = broken_off(service.ask, chat(stream=True), path="/v1/completions")
    assert [choice["text"] for event in events_of(partial) for choice in event["choices"]] == ["A", "B"]


@pytest.mark.parametrize("response, more", [([], {"response_format": "events"}), ("", {"response_format": "text"})])
def test_call_that_was_cut_off_with_nothing_to_show_is_no_whole_answer(tmp_path, response, more):
    write(tmp_path, {**recorded(partial=True, status=502, **more), "response": response})
    with replaying(tmp_path) as service:
        assert not talk(service.port, raw_request(json.dumps(chat(stream=True)).encode("utf-8"))).endswith(b"0\r\n\r\n")


def test_stream_that_was_cut_off_behind_its_finish_reason_keeps_it(tmp_path, model):
    record_cut_off(tmp_path, model, chat(stream=True), sse(*words("a"), done=False)[:-1])
    with replaying(tmp_path) as service:
        chunks = events_of(broken_off(service.ask, chat(stream=True)))
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]][-1] == "stop"


def test_stream_that_was_cut_off_keeps_its_logprobs(tmp_path, model):
    chunks = [with_logprobs(delta("a"), "a"), with_logprobs(delta("b"), "b")]
    record_cut_off(tmp_path, model, chat(stream=True), sse(*chunks, done=False)[:3])
    with replaying(tmp_path) as service:
        chunks = events_of(broken_off(service.ask, chat(stream=True)))
    entries = [(choice.get("logprobs") or {}).get("content", []) for chunk in chunks for choice in chunk["choices"]]
    assert [entry["token"] for entry in sum(entries, [])] == ["a", "b"]


# ----------------------------------------------------------------------------------------------------------------------
# Other APIs.
# ----------------------------------------------------------------------------------------------------------------------


def test_embeddings_replay(tmp_path, model):
    body = {"object": "list", "data": [{"index": 0, "embedding": [0.1, -1e-7]}], "usage": {"prompt_tokens": 1}}
    with recording(tmp_path, model, answer(body)) as proxy:
        proxy.ask({"model": "m", "input": "x"}, path="/v1/embeddings")
    with replaying(tmp_path) as service:
        got = service.ask({"model": "m", "input": "x"}, path="/v1/embeddings")
        assert (got.status, got.json(), got.headers["content-type"]) == (200, body, "application/json")


def named_events(*events):
    """A stream of events that have names."""
    texts = ["event: %s\ndata: %s\n\n" % (kind, json.dumps({"type": kind, **fields})) for kind, fields in events]
    return chunked(*texts, headers={"Content-Type": "text/event-stream"}), "".join(texts)


RESPONSE = {"id": "r1", "object": "response", "status": "completed", "error": None, "output": [{"type": "message"}]}
RESPONSES_EVENTS = [
    ("response.created", {"response": {**RESPONSE, "status": "in_progress", "output": []}}),
    ("response.output_text.delta", {"delta": "é\u2028\n"}),
    ("response.completed", {"response": RESPONSE}),
]
MESSAGES_EVENTS = [
    ("message_start", {"message": {"usage": {"input_tokens": 3}}}),
    ("ping", {}),
    ("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": "hi"}}),
    ("message_stop", {}),
]


def events_with_names(got):
    blocks = [block.split("\n") for block in got.body.decode("utf-8").split("\n\n") if block]
    return [(name.partition(": ")[2], json.loads(data.partition(": ")[2])) for name, data in blocks]


@pytest.mark.parametrize("path, events", [("/v1/responses", RESPONSES_EVENTS), ("/v1/messages", MESSAGES_EVENTS)])
def test_other_streams_replay_as_the_same_events(tmp_path, model, path, events):
    script, _ = named_events(*events)
    with recording(tmp_path, model, script) as proxy:
        expected = events_with_names(proxy.ask(chat(stream=True), path=path))
    assert [name for name, _ in expected] == [name for name, _ in events]
    with replaying(tmp_path) as service:
        got = service.ask(chat(stream=True), path=path)
        assert (events_with_names(got), got.headers["content-type"].split(";")[0]) == (expected, "text/event-stream")


def test_stream_of_the_responses_api_replays_whole_as_its_last_object(tmp_path, model):
    with recording(tmp_path, model, named_events(*RESPONSES_EVENTS)[0]) as proxy:
        proxy.ask(chat(stream=True), path="/v1/responses")
    with replaying(tmp_path) as service:
        got = service.ask(chat(), path="/v1/responses")
        assert (got.status, got.json()) == (200, RESPONSE)


def test_stream_that_is_no_whole_answer_is_not_made_one(tmp_path, model):
    with recording(tmp_path, model, named_events(*MESSAGES_EVENTS)[0]) as proxy:
        proxy.ask(chat(stream=True), path="/v1/messages")
    with replaying(tmp_path) as service:
        assert error_code(service.ask(chat(), path="/v1/messages")) == (404, "not_recorded")


@pytest.mark.parametrize(
    "response",
    [
        {"id": "m1", "type": "message", "content": [{"type": "text", "text": "hi"}]},
        RESPONSE,
    ],
)
def test_whole_answer_that_is_no_completion_is_not_made_a_stream(tmp_path, response):
    write(tmp_path, recorded(response, path="/v1/x"), recorded(response, path="/v1/x"))
    with replaying(tmp_path) as service:
        assert service.ask(chat(), path="/v1/x").json() == response
        got = service.ask(chat(stream=True), path="/v1/x")
        assert got.status == 404 and error_code(got) == (404, "not_recorded")


def test_stream_without_events_replays(tmp_path, model):
    script = chunked(": nothing\n\n", headers={"Content-Type": "text/event-stream"})
    with recording(tmp_path, model, script) as proxy:
        assert proxy.ask(chat(stream=True), path="/v1/messages").status == 200
    with replaying(tmp_path) as service:
        got = service.ask(chat(stream=True), path="/v1/messages")
        assert (got.status, got.body) == (200, b"")


@pytest.mark.parametrize(
    "data",
    ["[DONE]", "not JSON", "a\ndata: b", '{"a": 1}', "[1]", "null", "1.50", '"text"'],
)
def test_data_of_an_event_replays_as_it_was(tmp_path, model, data):
    with recording(
        tmp_path, model, chunked("data: %s\n\n" % data, headers={"Content-Type": "text/event-stream"})
    ) as proxy:
        expected = proxy.ask(chat(stream=True), path="/v1/x").body
    with replaying(tmp_path) as service:
        got = service.ask(chat(stream=True), path="/v1/x").body
        assert got.replace(b" ", b"").replace(b"1.5\n", b"1.50\n") == expected.replace(b" ", b"")


BODIES = {
    "binary": (bytes(range(256)), "audio/mpeg", "base64"),
    "text": ("1\n00:00 --> 00:01\nHé\n".encode("utf-8"), "text/vtt; charset=utf-8", "text"),
    "binary without a type": (b"\xff\xfe", None, "base64"),
}


@pytest.mark.parametrize("body, content_type, kind", BODIES.values(), ids=list(BODIES))
@pytest.mark.parametrize("is_stream", [False, True])
def test_bodies_that_are_no_json_replay_with_their_type(tmp_path, model, body, content_type, kind, is_stream):
    head = answer("", headers={"Content-Type": content_type, "Content-Length": len(body)})
    with recording(tmp_path, model, [head, {"send": body.decode("latin-1")}]) as proxy:
        assert proxy.ask({"input": "x"}, path="/v1/audio/speech").body == body
        assert proxy.trajectory()[0]["response_format"] == kind
    with replaying(tmp_path) as service:
        got = service.ask({"input": "x", "stream": is_stream}, path="/v1/audio/speech")
        assert (got.status, got.body, got.headers.get("content-type")) == (200, body, content_type)


def test_body_in_a_coding_that_is_not_undone_replays_in_it(tmp_path, model):
    fields = {"Content-Encoding": "br", "Content-Length": 3}
    with recording(tmp_path, model, [answer("", headers=fields), {"send": "\xff\x00\x01"}]) as proxy:
        proxy.ask(chat())
    with replaying(tmp_path) as service:
        got = service.ask(chat())
        assert (got.body, got.headers["content-encoding"]) == (b"\xff\x00\x01", "br")


def test_answer_without_a_body_replays(tmp_path, model):
    with recording(tmp_path, model, answer("", 204, {"Content-Length": None})) as proxy:
        assert proxy.ask(None, method="DELETE", path="/v1/files/a").status == 204
    with replaying(tmp_path) as service:
        got = service.ask(None, method="DELETE", path="/v1/files/a")
        assert (got.status, got.body) == (204, b"")


BAD_RESPONSES = {
    "base64": {"response": "%%%", "response_format": "base64"},
    "base64 that is no text": {"response": [1], "response_format": "base64"},
    "text that is none": {"response": {"a": 1}, "response_format": "text"},
    "events that are none": {"response": ["x"], "response_format": "events"},
    "choices that are none": {"response": {"choices": ["x"]}},
}


@pytest.mark.parametrize("fields", BAD_RESPONSES.values(), ids=list(BAD_RESPONSES))
def test_response_that_cannot_be_replayed_is_no_success(tmp_path, fields):
    write(tmp_path, recorded(**{"content": {}, **fields}), recorded())
    with replaying(tmp_path) as service:
        assert error_code(service.ask(chat(stream=True))) == (500, "bad_recording")
        assert service.ask(chat()).status == 200
        assert not any("a bug met" in line for line in service.logged)


# ----------------------------------------------------------------------------------------------------------------------
# Other recordings.
# ----------------------------------------------------------------------------------------------------------------------


def test_recording_of_the_local_type_replays(tmp_path):
    with running(directory(tmp_path, "recorded")) as service:
        for index, given in enumerate([completion("one"), {"error": {"message": "slow down", "code": 429}}], 1):
            call = service.ask_later(chat("%d" % index))
            service.wait_for_turns(index)
            service.answer(index, given)
            call.result()
        assert [call["index"] for call in service.trajectory()] == [1, 2]
    for how in ("order", "request"):
        with replaying(tmp_path, replay_match=how) as service:
            assert said(service.ask(chat("1"))) == "one"
            got = service.ask(chat("2", stream=True))
            assert (got.status, got.json()["error"]["message"]) == (429, "slow down")


def test_blank_lines_and_a_last_line_without_end_are_read(tmp_path):
    write(tmp_path, b"\n", recorded("1"), b"  \r\n", json.dumps(recorded("2")).encode("utf-8"))
    with replaying(tmp_path) as service:
        assert [said(service.ask(chat())) for _ in range(2)] == ["1", "2"]


GOOD = json.dumps(recorded()).encode("utf-8") + b"\n"
BAD_FILES = {
    "not JSON": (GOOD + b"oops\n", ", line 2: the line is not JSON"),
    "NaN": (b'{"request":NaN,"response":null}\n', ", line 1: the line is not JSON"),
    "not an object": (GOOD + GOOD + b"[1]\n", ", line 3: the line must be a JSON object, got an array"),
    "no request": (b'{"response":{}}\n', ", line 1: a call needs both request and response"),
    "no response": (GOOD + b'\n{"request":{}}\n', ", line 3: a call needs both request and response"),
    "status too large": (b'{"request":{},"response":{},"status":600}\n', ", line 1: status must be a number"),
    "status a boolean": (b'{"request":{},"response":{},"status":true}\n', ", line 1: status must be a number"),
    "status a word": (b'{"request":{},"response":{},"status":"ok"}\n', ", line 1: status must be a number"),
    "method": (b'{"request":{},"response":{},"method":1}\n', ", line 1: method and path must be strings"),
    "path": (b'{"request":{},"response":{},"path":null}\n', ", line 1: method and path must be strings"),
    "not UTF-8": (GOOD + b'{"request":"\xff","response":null}\n', ", line 2: 'utf-8' codec can't decode byte 0xff"),
    "torn last line": (GOOD + GOOD[:50], ", line 2: the line is not JSON"),
    "nested too deeply": (b'{"request":%s,"response":null}\n' % (b"[" * 100000), ", line 1: the line is not JSON"),
    "empty": (b"", " holds no call"),
    "blank": (b"\n\n \n", " holds no call"),
}


@pytest.mark.parametrize("data, words", BAD_FILES.values(), ids=list(BAD_FILES))
@pytest.mark.parametrize("is_by_request", [False, True])
def test_bad_file_is_refused_with_its_line(tmp_path, data, words, is_by_request):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(data)
    with nothing_left(), pytest.raises(UsageError) as caught:
        Recording(str(path), is_by_request)
    assert str(path) + words in str(caught.value)


def test_overridden_fields_that_are_no_names_are_refused_or_passed_over(tmp_path):
    path = write(tmp_path, recorded(overridden=[{}]))
    with contextlib.suppress(UsageError), contextlib.closing(Recording(str(path), True)) as recording:
        assert recording.count == 1


@pytest.mark.load
@pytest.mark.parametrize("name", ["not JSON", "torn last line", "empty", "missing", "directory"])
def test_bad_file_ends_start_with_one_clear_line(tmp_path, cli, name):
    path = tmp_path / "bad.jsonl"
    if name in BAD_FILES:
        path.write_bytes(BAD_FILES[name][0])
    if name == "directory":
        path.mkdir()
    got = cli("start", "--type", "proxy", "--port", "0", "--replay-file", path)
    words = {"missing": "No such file or directory", "directory": "Is a directory"}.get(name) or BAD_FILES[name][1]
    assert got.returncode != 0 and got.out == ""
    assert got.err.count("\n") == 1 and str(path) in got.err and words in got.err


def test_replay_by_the_command_line(tmp_path, cli):
    path = write(tmp_path, recorded("1"))
    cli("start", "--type", "proxy", "--port", "0", "--host", "127.0.0.1", "--replay-file", path, check=0)
    state = json.loads((tmp_path / "data" / "LLMService.json").read_text())
    connection = http.client.HTTPConnection("127.0.0.1", state["port"], timeout=TIMEOUT)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(chat()), {"Content-Type": "application/json"})
        assert json.loads(connection.getresponse().read().decode("utf-8")) == completion("1")
        connection.request("GET", "/metrics")
        assert b"rock_replay_calls_left 0" in connection.getresponse().read()


# ----------------------------------------------------------------------------------------------------------------------
# The service around it.
# ----------------------------------------------------------------------------------------------------------------------


def test_models_of_the_recording_are_listed(tmp_path):
    other = recorded("1", {"model": "b/c"})
    write(tmp_path, other, recorded("2"), other, {"request": {"model": "x"}, "response": {}}, recorded("3", model=7))
    with replaying(tmp_path) as service:
        got = service.ask(None, method="GET", path="/v1/models").json()
        assert (got["object"], [entry["id"] for entry in got["data"]]) == ("list", ["b/c", "m"])
        assert service.ask(None, method="GET", path="/v1/models/b%2Fc").json()["id"] == "b/c"


def test_another_request_is_answered_and_warned_of(tmp_path):
    write(tmp_path, recorded("1"), recorded("2"))
    with replaying(tmp_path) as service:
        assert said(service.ask(chat())) == "1"
        assert not any("another request" in line for line in service.logged)
        assert said(service.ask({**chat(), "model": "other"})) == "2"
        assert any("line 2 of the recording was the answer to another request" in line for line in service.logged)
        wait_until(lambda: any(line.endswith("replay=2") for line in service.logged))


def test_replay_file_in_its_own_data_directory_stays_as_it_is(tmp_path):
    path = write(tmp_path, recorded("1"), recorded("2", status=500))
    before, names = path.read_bytes(), sorted(os.listdir(str(path.parent)))
    with running(path.parent, type="proxy", replay_file=str(path)) as service:
        assert [service.ask(chat()).status for _ in range(3)] == [200, 500, 404]
    assert path.read_bytes() == before
    assert [name for name in sorted(os.listdir(str(path.parent))) if "Traj" in name] == names == ["LLMTraj.jsonl"]


def test_trajectory_of_an_earlier_session_stays_as_it_is(tmp_path):
    write(tmp_path, recorded("1"))
    earlier = directory(tmp_path, "replay") / "LLMTraj.jsonl"
    earlier.write_bytes(b"what an earlier session recorded")
    with running(earlier.parent, type="proxy", replay_file=str(tmp_path / "recorded" / "LLMTraj.jsonl")) as service:
        assert said(service.ask(chat())) == "1"
    assert earlier.read_bytes() == b"what an earlier session recorded"
    assert [name for name in os.listdir(str(earlier.parent)) if "Traj" in name] == ["LLMTraj.jsonl"]


def test_only_the_places_of_the_calls_are_kept(tmp_path):
    path = write(tmp_path, *[recorded("x" * 50000, chat("%d" % (number % 2))) for number in range(100)])
    offsets = [0]
    for line in path.read_bytes().splitlines(True):
        offsets.append(offsets[-1] + len(line))
    for is_by_request in (False, True):
        tracemalloc.start()
        with contextlib.closing(Recording(str(path), is_by_request)) as recording:
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            assert held < 200000 < path.stat().st_size / 20
            places = [[offset for offset, _, _ in places] for places in recording._places.values()]
        assert places == ([offsets[-3::-2], offsets[-2:0:-2]] if is_by_request else [offsets[-2::-1]])


LONG = "x" * 200000  # longer than what is read ahead


def shout(path):
    path.write_bytes(path.read_bytes().replace(LONG.encode(), LONG.upper().encode()))


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"x" * path.stat().st_size),
        lambda path: path.write_bytes(b"\n" + path.read_bytes()),
        shout,
    ],
    ids=["emptied", "overwritten", "moved by a byte", "another answer"],
)
def test_file_that_has_changed_gives_an_error_and_no_answer(tmp_path, change):
    path = write(tmp_path, recorded("1"), recorded(LONG), recorded("3"))
    with replaying(tmp_path) as service:
        assert said(service.ask(chat())) == "1"
        change(path)
        got = service.ask(chat())
        assert got.status == 500, "a wrong answer" if said(got) != LONG else "the answer as it was"
        assert error_code(got) == (500, "storage_error")
        assert any("%s has changed" % path in line for line in service.logged)


def test_file_that_was_replaced_by_another_does_not_matter(tmp_path):
    path = write(tmp_path, recorded("1"))
    with replaying(tmp_path) as service:
        path.unlink()
        write(tmp_path, recorded("other"))
        assert said(service.ask(chat())) == "1"


def test_replay_asks_for_the_key_of_the_service(tmp_path):
    write(tmp_path, recorded("1"))
    with replaying(tmp_path, api_key="sesame-open") as service:
        assert service.ask(chat()).status == 401
        assert said(service.ask(chat(), headers={"Authorization": "Bearer sesame-open"})) == "1"


def test_calls_left_are_counted(tmp_path):
    write(tmp_path, recorded("1"), recorded("2"))
    with replaying(tmp_path) as service:
        for left in (2, 1, 0):
            got = service.ask(None, method="GET", path="/metrics")
            assert b"rock_replay_calls_left %d\n" % left in got.body
            service.ask(chat())
