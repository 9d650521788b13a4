"""The local type: an agent's calls over HTTP, answered through the marker log."""

import gc
import http.client
import json
import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import tracemalloc

import pytest

import rock_ms
from support import TIMEOUT, Later, ask, chat, completion, nothing_left, raw_request, running, wait_until

RETRY = {"x-stainless-retry-count": "1"}


class Waited(threading.Event):
    """Says when somebody waits for it."""

    def __init__(self):
        super().__init__()
        self.is_waited_for = threading.Event()

    def wait(self, timeout=None):
        self.is_waited_for.set()
        return super().wait(timeout)


class Agent:
    """A chat request on a connection that stays in our hands, to hang up when we like."""

    def __init__(self, service, body, head=b""):
        self.sock = socket.create_connection(("127.0.0.1", service.port), 30)
        self.sock.sendall(raw_request(json.dumps(body).encode(), head))

    def hang_up(self):
        self.sock.close()

    def response(self):
        response = http.client.HTTPResponse(self.sock)
        response.begin()
        return response.status, response.read()

    def receive(self, count):
        data = b""
        while data.count(b"\n") < count:
            piece = self.sock.recv(65536)
            assert piece, "the server closed"
            data += piece
        return data


def waiting(service):
    return service.server.session.gauges()["rock_local_calls_waiting"]


def wait_for_waiting(service, count):
    wait_until(lambda: waiting(service) == count, "%d waiting calls" % count)


# Answers ------------------------------------------------------------------------------------------------------------


def test_answer_goes_back_as_the_trainer_wrote_it(service):
    call = service.ask_later(chat())
    service.wait_for_turns(1)
    text = '{"z":1.50,"choices":[{"vendor":{"b":1,"a":2}}],"big":123456789012345678901,"a":"\\u00e9\\ud800"}'
    service.log.append_response(1, text)
    got = call.result()
    assert (got.status, got.body.decode()) == (200, text)
    assert got.headers["content-type"] == "application/json"


def test_request_stands_in_the_log_as_the_agent_wrote_it(service):
    body = b'{ "model": "m", "n": 1.50,\n "messages": [], "b":1, "a":2, "u": "\\u00e9 \\ud83d" }'
    call = service.ask_later(body)
    service.wait_for_turns(1)
    expected = '{"model":"m","n":1.50,"messages":[],"b":1,"a":2,"u":"\\u00e9 \\ud83d"}'
    assert service.records()[0].text == expected
    service.answer(1)
    call.result()


HOSTILE = (
    "LLM_REQUEST_START LLM_REQUEST_END LLM_RESPONSE_START LLM_RESPONSE_END SESSION_END \nSESSION_END\n \0 \ud800 \udfff"
    ' 😀 𝕏 é \u2028 \r\n \\ " \x7f \x1b'
)


def test_prompt_and_answer_of_every_awkward_character_arrive_intact(service):
    call = service.ask_later(chat(HOSTILE))
    service.wait_for_turns(1)
    request = service.log.find(0).next_request.text
    assert json.loads(request) == chat(HOSTILE)
    assert "SESSION_END" not in request
    service.answer(1, HOSTILE)
    assert call.result().json()["choices"][0]["message"]["content"] == HOSTILE
    assert not service.server.session.has_ended
    (recorded,) = service.trajectory()
    assert recorded["request"] == chat(HOSTILE)


ERRORS = [
    ({"error": {"message": "m", "type": "t", "code": 503}}, 503),
    ({"error": {"message": "m", "type": "rate_limit_error", "code": None}}, 429),
    ({"error": {"message": "m", "code": "context_length_exceeded"}}, 400),
    ({"error": {"message": "m"}, "status": 418}, 418),
    ({"error": {"message": "m", "code": "²00"}}, 500),
    ({"error": "just words"}, 500),
    ({"object": "error", "message": "m", "type": "BadRequestError", "code": 400}, 400),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("answer, status", ERRORS)
def test_error_answer_is_that_http_error(service, answer, status, stream):
    call = service.ask_later(chat(stream=stream))
    service.wait_for_turns(1)
    service.answer(1, answer)
    got = call.result()
    assert (got.status, got.json()) == (status, answer)
    assert [record["status"] for record in service.trajectory()] == [status]


def test_null_error_beside_choices_is_no_error(service):
    call = service.ask_later(chat())
    service.wait_for_turns(1)
    service.answer(1, {**completion(), "error": None})
    assert call.result().status == 200


def test_foreign_answer_that_is_no_json_is_a_502_that_says_so(service):
    call = service.ask_later(chat())
    service.wait_for_turns(1)
    with open(service.paths.log_file, "ab") as file:
        file.write(b'LLM_RESPONSE_STARTnot jsonLLM_RESPONSE_END{"timestamp": 1, "index": 1}\n')
    got = call.result()
    assert got.status == 502
    assert "not JSON" in got.json()["error"]["message"]


def test_foreign_answer_that_cannot_be_a_stream_is_a_502_and_the_retry_a_new_turn(service):
    """A bad answer is an error answer: the trainer, which cannot change it, gets a new turn to answer better."""
    call = service.ask_later(chat(stream=True))
    service.wait_for_turns(1)
    service.log.append("response", '{"choices":"none"}', 1)
    got = call.result()
    assert got.status == 502
    assert "choices" in got.json()["error"]["message"]
    (recorded,) = service.trajectory()
    assert (recorded["status"], recorded["response"]) == (502, {"choices": "none"})
    assert "choices" in recorded["error"]
    wait_for_waiting(service, 0)
    retry = service.ask_later(chat(stream=True), headers=RETRY)
    assert service.wait_for_turns(2) == [1, 2]
    service.answer(2)
    assert retry.result().status == 200


def test_trainer_is_told_at_once_that_its_answer_cannot_be_a_stream(service):
    call = service.ask_later(chat(stream=True))
    service.wait_for_turns(1)
    with pytest.raises(rock_ms.UsageError, match="asks for a stream: .*choices"):
        service.answer(1, {"choices": "none"})
    service.answer(1)
    assert call.result().status == 200


# Streams and heartbeats ---------------------------------------------------------------------------------------------


def test_streaming_agent_gets_a_stream(service):
    call = service.ask_later(chat(stream=True, stream_options={"include_usage": True}))
    service.wait_for_turns(1)
    service.answer(1, "héllo", reasoning_content="why")
    got = call.result()
    assert got.headers["content-type"].startswith("text/event-stream")
    *events, done = got.events()
    assert done == "[DONE]"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert deltas == [{"role": "assistant"}, {"reasoning_content": "why"}, {"content": "héllo"}, {}]
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["usage"]["total_tokens"] == 3
    assert events[-1]["choices"] == []


def test_waiting_stream_is_kept_alive_by_comments_that_end_no_event(tmp_path):
    with running(tmp_path, heartbeat_seconds=0.01) as service:
        agent = Agent(service, chat(stream=True))
        head, _, beats = agent.receive(9).partition(b"\r\n\r\n")
        assert b"text/event-stream" in head
        assert set(beats.split(b"\r\n")[1::2]) == {b":\n"}
        service.answer(1)
        rest = agent.receive(12)
        while b"[DONE]" not in rest:
            rest += agent.receive(1)
        assert b"\n\n:" not in rest
        agent.hang_up()


def test_waiting_json_is_kept_alive_by_white_space(tmp_path):
    with running(tmp_path, heartbeat_seconds=0.01) as service:
        call = service.ask_later(chat())
        service.wait_for_turns(1)
        agent = Agent(service, chat("other"))
        agent.receive(8)
        service.answer(1)
        service.answer(2)
        assert call.result().json() == completion()
        agent.hang_up()


@pytest.mark.parametrize("stream", [False, True])
def test_error_after_heartbeats_is_an_error_body(tmp_path, stream):
    error = {"error": {"message": "m", "type": "rate_limit_error"}}
    with running(tmp_path, heartbeat_seconds=0.01) as service:
        agent = Agent(service, chat(stream=stream))
        agent.receive(8)
        service.answer(1, error)
        data = b""
        while b"0\r\n\r\n" not in data:
            data += agent.sock.recv(65536)
        assert b"rate_limit_error" in data
        assert (b"data: {" in data) == stream
        assert b"[DONE]" not in data
        agent.hang_up()
        assert [record["status"] for record in service.trajectory()] == [429]


# Parallel requests --------------------------------------------------------------------------------------------------


@pytest.mark.load
def test_five_hundred_requests_in_flight_answered_in_random_order_each_get_their_own(tmp_path):
    count = 500
    with running(tmp_path) as service:
        calls = {number: service.ask_later(chat("prompt %d" % number)) for number in range(count)}
        service.wait_for_turns(count)
        wait_for_waiting(service, count)
        requests = [record for record in service.records() if record.kind == "request"]
        assert [record.index for record in requests] == list(range(1, count + 1))
        random.Random(1).shuffle(requests)
        for record in requests:
            service.answer(record.index, "re: " + json.loads(record.text)["messages"][0]["content"])
        for number, call in calls.items():
            assert call.result().json()["choices"][0]["message"]["content"] == "re: prompt %d" % number
        assert sorted(record["index"] for record in service.trajectory()) == list(range(1, count + 1))


def test_same_prompt_asked_twice_is_two_turns(service):
    calls = [service.ask_later(chat()) for _ in range(2)]
    assert service.wait_for_turns(2) == [1, 2]
    service.answer(2, "two")
    service.answer(1, "one")
    assert {call.result().json()["choices"][0]["message"]["content"] for call in calls} == {"one", "two"}
    again = service.ask_later(chat())
    assert service.wait_for_turns(3) == [1, 2, 3]
    service.answer(3, "three")
    assert b"three" in again.result().body


# Retries ------------------------------------------------------------------------------------------------------------


def test_retry_after_a_hangup_takes_the_turn_over(service):
    agent = Agent(service, chat())
    wait_for_waiting(service, 1)
    agent.hang_up()
    wait_for_waiting(service, 0)
    retry = service.ask_later(chat())
    wait_for_waiting(service, 1)
    service.answer(1)
    assert retry.result().status == 200
    assert service.turns() == [1]
    assert [(record["index"], record["status"]) for record in service.trajectory()] == [(1, 499), (1, 200)]


def test_retry_right_behind_the_hangup_takes_the_turn_over(service):
    """The hang-up is seen even when nothing of ours has run since."""
    for number in range(1, 40):
        agent = Agent(service, chat(str(number)))
        wait_for_waiting(service, 1)
        agent.hang_up()
        retry = service.ask_later(chat(str(number)))
        wait_for_waiting(service, 1)
        service.answer(number)
        assert retry.result().status == 200
        wait_for_waiting(service, 0)
        assert service.turns() == list(range(1, number + 1))


@pytest.mark.parametrize("is_retry", [False, True])
@pytest.mark.parametrize("status, index", [(200, 2), (None, 1), (500, 2)])
def test_same_request_while_an_answer_is_on_its_way_waits_for_what_becomes_of_it(tmp_path, is_retry, status, index):
    session = rock_ms.LocalSession(rock_ms.MarkerLog(str(tmp_path / "log")), 0.1, None)
    first = session.open_call("{}", is_retry=False, is_client_gone=lambda: True)
    first.is_leaving, first.closed = True, Waited()
    again = Later(lambda: session.open_call("{}", is_retry))
    assert first.closed.is_waited_for.wait(TIMEOUT)
    session.close_call(first, status)
    assert again.result().turn.index == (1 if is_retry and status == 200 else index)


class QuickLog(rock_ms.MarkerLog):
    """Has each request answered, and the answer read by its `session`, before whoever wrote it hears of it."""

    session = None

    def append(self, kind, text, index):
        offset = super().append(kind, text, index)
        self.append_response(index, "{}")
        wait_until(lambda: self.session.gauges()["rock_local_turns_answered"] == index)
        return offset


def test_answer_that_was_read_before_its_call_could_wait_reaches_it(tmp_path):
    log = QuickLog(str(tmp_path / "log"))
    log.session = session = rock_ms.LocalSession(log, 0.01, None)
    with nothing_left():
        session.start()
        try:
            call = session.open_call("{}", is_retry=False)
            assert call.response and call.response.body == b"{}"
        finally:
            session.stop()


def test_same_request_again_and_again_does_not_look_at_all_of_its_turns(tmp_path):
    session = rock_ms.LocalSession(rock_ms.MarkerLog(str(tmp_path / "log")), 0.1, None)
    for status in [200] * 100 + [500]:
        session.close_call(session.open_call("{}", is_retry=False), status)
    looked_at = []
    sys.setprofile(lambda frame, event, _: event == "call" and looked_at.append(frame.f_code.co_name))
    try:
        calls = [session.open_call("{}", is_retry) for is_retry in (True, False)]
    finally:
        sys.setprofile(None)
    assert [call.turn.index for call in calls] == [100, 102]
    assert looked_at.count("is_waited_for") <= 4


def test_retry_of_an_error_that_another_call_still_waits_for_shares_its_turn(tmp_path):
    session = rock_ms.LocalSession(rock_ms.MarkerLog(str(tmp_path / "log")), 0.1, None)
    calls = [session.open_call("{}", is_retry) for is_retry in (False, True)]
    session.close_call(calls[0], 500)
    assert session.open_call("{}", is_retry=True).turn.index == 1


@pytest.mark.parametrize("status", [200, None])
def test_many_turns_cost_no_more_memory_than_some(tmp_path, monkeypatch, status):
    monkeypatch.setattr(rock_ms, "MAX_FINISHED_TURNS", 2)
    monkeypatch.setattr(rock_ms, "MAX_LEFT_TURNS", 2)
    session = rock_ms.LocalSession(rock_ms.MarkerLog(str(tmp_path / "log")), 0.1, None)

    def memory_after(numbers):
        for number in numbers:
            session.close_call(session.open_call('{"n":%d}' % number, is_retry=False), status)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = memory_after(range(500))
        assert memory_after(range(500, 1500)) < before + 20 * 1000
    finally:
        tracemalloc.stop()


def test_turns_that_were_hung_up_on_are_forgotten_when_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(rock_ms, "MAX_LEFT_TURNS", 2)
    session = rock_ms.LocalSession(rock_ms.MarkerLog(str(tmp_path / "log")), 0.1, None)
    waiting = [session.open_call('{"n":%d}' % number, is_retry=False) for number in range(1, 6)]
    for call in waiting[:2]:
        session.close_call(call, None)
    back = session.open_call('{"n":1}', is_retry=False)
    assert back.turn.index == 1
    for call in waiting[2:4]:
        session.close_call(call, None)
    session.close_call(back, None)
    turns = [session.open_call('{"n":%d}' % number, is_retry=True).turn.index for number in range(1, 6)]
    assert turns == [1, 6, 7, 4, 5], "2, and then 3, were left the longest ago; 5 is waited for all the time"


def test_log_that_is_replaced_by_its_copy_is_said_once_whatever_was_forgotten(service, monkeypatch):
    monkeypatch.setattr(rock_ms, "MAX_FINISHED_TURNS", 1)
    for number in range(1, 4):
        call = service.ask_later(chat())
        service.wait_for_turns(number)
        service.answer(number)
        call.result()
    shutil.copy(service.paths.log_file, service.paths.log_file + ".copy")
    os.rename(service.paths.log_file + ".copy", service.paths.log_file)
    wait_until(lambda: [line for line in service.logged if "0 turns are not in it any more, 0 without" in line])
    assert not [line for line in service.logged if "ignored" in line]


def test_turns_that_nobody_came_back_for_are_forgotten_by_a_resumed_session_too(tmp_path, monkeypatch):
    monkeypatch.setattr(rock_ms, "MAX_LEFT_TURNS", 2)
    log = rock_ms.MarkerLog(str(tmp_path / "log"))
    for number in range(1, 5):
        log.append("request", '{"n":%d}' % number, number)
        if number == 3:
            log.append("response", "{}", number)
    session = rock_ms.LocalSession(log, 0.1, logging.Logger("test"), {3: 200})
    session.start()
    turns = [session.open_call('{"n":%d}' % number, is_retry=True).turn.index for number in (4, 3, 2, 1)]
    session.stop()
    assert turns == [4, 3, 2, 5], "3 was delivered: it is none of the two that are left"


def test_turns_that_were_delivered_are_forgotten_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(rock_ms, "MAX_FINISHED_TURNS", 2)
    session = rock_ms.LocalSession(rock_ms.MarkerLog(str(tmp_path / "log")), 0.1, None)
    taken_over = None
    for number in range(1, 6):
        session.close_call(session.open_call('{"n":%d}' % number, is_retry=False), 400 if number == 2 else 200)
        taken_over = taken_over or session.open_call('{"n":1}', is_retry=True)
    session.close_call(taken_over, 200)
    turns = [session.open_call('{"n":%d}' % number, is_retry=True).turn.index for number in range(1, 6)]
    assert turns == [6, 7, 8, 4, 5]
    assert taken_over.turn.index == 1


def test_other_body_after_a_hangup_is_a_new_turn(service):
    agent = Agent(service, chat())
    wait_for_waiting(service, 1)
    agent.hang_up()
    wait_for_waiting(service, 0)
    other = service.ask_later(chat("other"), headers=RETRY)
    assert service.wait_for_turns(2) == [1, 2]
    service.answer(2)
    other.result()


def test_retry_of_a_request_in_flight_shares_its_turn_and_is_recorded_once(service):
    first = service.ask_later(chat())
    wait_for_waiting(service, 1)
    retry = service.ask_later(chat(), headers=RETRY)
    wait_for_waiting(service, 2)
    service.answer(1)
    assert first.result().body == retry.result().body
    assert service.turns() == [1]
    assert [record["status"] for record in service.trajectory()] == [200]


def test_no_call_of_a_turn_sees_the_answer_before_it_is_recorded(service):
    first = service.ask_later(chat())
    wait_for_waiting(service, 1)
    retry = service.ask_later(chat(), headers=RETRY)
    wait_for_waiting(service, 2)
    with rock_ms.AppendFile(service.paths.traj_file).locked():
        service.answer(1)
        wait_until(lambda: service.server.session.gauges()["rock_local_turns_answered"] == 1)
        assert not first.is_done()
        assert not retry.is_done()
    assert (first.result().status, retry.result().status) == (200, 200)
    assert len(service.trajectory()) == 1


@pytest.mark.parametrize("model", ["[" * 500 + "]" * 500, "1e999", "null", "{}"])
def test_model_that_is_no_name_is_no_hindrance_and_no_broken_record(service, model):
    call = service.ask_later(b'{"model":%s}' % model.encode())
    service.wait_for_turns(1)
    service.answer(1)
    assert call.result().status == 200
    (line,) = open(service.paths.traj_file).read().splitlines()
    assert '"model":null' in line


def test_retry_of_an_answer_that_was_given_gets_it_again(service):
    first = service.ask_later(chat())
    service.wait_for_turns(1)
    service.answer(1)
    first.result()
    wait_for_waiting(service, 0)
    assert service.ask(chat(), headers=RETRY).json() == completion()
    assert service.turns() == [1]
    assert len(service.trajectory()) == 1


def test_retry_after_an_error_answer_is_a_new_turn(service):
    first = service.ask_later(chat())
    service.wait_for_turns(1)
    service.answer(1, {"error": {"message": "busy", "code": 429}})
    assert first.result().status == 429
    wait_for_waiting(service, 0)
    retry = service.ask_later(chat(), headers=RETRY)
    assert service.wait_for_turns(2) == [1, 2]
    service.answer(2)
    assert retry.result().status == 200


def test_answer_that_came_while_nobody_waited_is_kept_for_the_retry(service):
    agent = Agent(service, chat())
    wait_for_waiting(service, 1)
    agent.hang_up()
    wait_for_waiting(service, 0)
    service.answer(1, "kept")
    assert b"kept" in service.ask(chat()).body
    assert service.turns() == [1]


def test_two_hangups_of_the_same_prompt_are_two_turns_for_two_retries(service):
    agents = [Agent(service, chat()) for _ in range(2)]
    wait_for_waiting(service, 2)
    for agent in agents:
        agent.hang_up()
    wait_for_waiting(service, 0)
    retries = [service.ask_later(chat()) for _ in range(2)]
    wait_for_waiting(service, 2)
    service.answer(1, "one")
    service.answer(2, "two")
    assert {retry.result().json()["choices"][0]["message"]["content"] for retry in retries} == {"one", "two"}
    assert service.turns() == [1, 2]


def test_call_that_timed_out_is_taken_over(tmp_path):
    with running(tmp_path, request_timeout=0.05) as service:
        got = service.ask(chat())
        assert got.status == 504
        assert got.json()["error"]["code"] == "timeout"
        service.answer(1)
        assert wait_until(lambda: service.ask(chat()).status == 200)
        assert service.turns() == [1]


def test_log_held_by_another_writer_delays_no_answer(service):
    call = service.ask_later(chat())
    service.wait_for_turns(1)
    service.answer(1)
    call.result()
    waiter = service.ask_later(chat("two"))
    service.wait_for_turns(2)
    wait_for_waiting(service, 1)
    record = rock_ms.encode_record("response", rock_ms.dump_json(completion()), 2, 1)
    with rock_ms.AppendFile(service.paths.log_file).locked() as file:
        new = service.ask_later(chat("three"))
        file.append(record)
        assert waiter.result().status == 200
        assert not new.is_done()
    service.wait_for_turns(3)
    service.answer(3)
    assert new.result().status == 200


# The end ------------------------------------------------------------------------------------------------------------


def test_end_of_the_session_ends_waiting_and_new_requests_with_410(service):
    waiters = [service.ask_later(chat(str(number))) for number in range(3)]
    wait_for_waiting(service, 3)
    service.server.session.end()
    service.server.session.end()
    for got in [call.result() for call in waiters] + [service.ask(chat("late"))]:
        assert got.status == 410
        assert got.json()["error"]["code"] == "session_ended"
        assert got.headers["x-should-retry"] == "false"
    assert [record.kind for record in service.records()] == ["request"] * 3 + ["end"]
    assert [record["status"] for record in service.trajectory()] == [410] * 3


def test_no_request_gets_behind_the_end_that_is_written_and_not_yet_read_back(tmp_path):
    log = rock_ms.MarkerLog(str(tmp_path / "log"))
    session = rock_ms.LocalSession(log, 0.1, None)
    session.end()
    with pytest.raises(rock_ms.ApiError, match="session has ended"):
        session.open_call("{}", is_retry=False)
    assert [record.kind for record in log.tail().read()] == ["end"]


def test_end_written_by_another_is_heard(service):
    call = service.ask_later(chat())
    wait_for_waiting(service, 1)
    with open(service.paths.log_file, "ab") as file:
        file.write(b"SESSION_END\n")
    assert call.result().status == 410


def test_answer_that_stands_before_the_end_is_given(service):
    call = service.ask_later(chat())
    wait_for_waiting(service, 1)
    with open(service.paths.log_file, "ab") as file:
        file.write(b'LLM_RESPONSE_START{"a":1}LLM_RESPONSE_END{"timestamp": 1, "index": 1}\nSESSION_END\n')
    assert call.result().status == 200


def test_stop_answers_waiting_requests_with_503_and_leaves_nothing(tmp_path):
    with running(tmp_path) as service:
        calls = [service.ask_later(chat(str(number))) for number in range(50)]
        wait_for_waiting(service, 50)
        service.server.stop()
        assert {call.result().status for call in calls} == {503}


def test_stop_under_load_loses_no_answer(tmp_path):
    """Every request is answered, or refused as one that may be repeated; whatever was answered is recorded."""
    with running(tmp_path) as service:
        tail, halt = service.log.tail(), threading.Event()

        def train():
            while not halt.is_set():
                for record in tail.read():
                    if record.kind == "request":
                        service.answer(record.index, "a%d" % record.index)

        def work(name):
            statuses = []
            for number in range(100):
                try:
                    statuses.append(ask(service.port, chat("%s-%d" % (name, number))).status)
                except (OSError, http.client.HTTPException):
                    break
            return statuses

        trainer, workers = Later(train), [Later(lambda name=name: work(name)) for name in range(8)]
        wait_until(lambda: len(service.trajectory()) > 40, "forty calls")
        service.server.stop()
        statuses = [status for worker in workers for status in worker.result()]
        halt.set()
        trainer.result()
        assert set(statuses) <= {200, 503}
        recorded = [record for record in service.trajectory() if record["status"] == 200]
        assert len(recorded) >= statuses.count(200)
        assert len({record["index"] for record in recorded}) == len(recorded)


# Resuming -----------------------------------------------------------------------------------------------------------


def one_turn(service, content="hello"):
    call = service.ask_later(chat())
    service.wait_for_turns(1)
    service.answer(1, content)
    return call.result()


def test_resumed_session_gives_an_unanswered_turn_to_the_agents_repeated_request(tmp_path):
    with running(tmp_path) as service:
        agent = Agent(service, chat())
        wait_for_waiting(service, 1)
        service.server.stop()
        assert agent.response()[0] == 503
        agent.hang_up()
    with running(tmp_path, is_resumed=True) as service:
        retry = service.ask_later(chat())
        wait_for_waiting(service, 1)
        service.answer(1)
        assert retry.result().status == 200
        assert service.turns() == [1]


def test_resumed_session_gives_an_answer_that_was_not_delivered(tmp_path):
    with running(tmp_path) as service:
        service.log.append("request", rock_ms.compact_json(json.dumps(chat())), 1)
        service.answer(1, "undelivered")
    with running(tmp_path, is_resumed=True) as service:
        assert b"undelivered" in service.ask(chat()).body
        assert service.turns() == [1]
        assert len(service.trajectory()) == 1


def test_resumed_session_goes_on_with_the_next_turn_after_one_that_was_delivered(tmp_path):
    with running(tmp_path) as service:
        one_turn(service)
    with running(tmp_path, is_resumed=True) as service:
        call = service.ask_later(chat())
        assert service.wait_for_turns(2) == [1, 2]
        service.answer(2)
        call.result()
        assert [record["index"] for record in service.trajectory()] == [1, 2]


def test_after_a_kill_the_last_answer_is_given_to_its_repeated_request(tmp_path):
    """It is in the trajectory, but its last byte may not have left."""
    with running(tmp_path) as service:
        one_turn(service, "kept")
    with running(tmp_path, is_resumed=True, earlier={"pid": 1}) as service:
        assert b"kept" in service.ask(chat()).body
        assert service.turns() == [1]
        assert len(service.trajectory()) == 1


def test_after_a_kill_an_answer_that_was_followed_by_a_request_counts_as_delivered(tmp_path):
    with running(tmp_path) as service:
        one_turn(service)
        service.log.append("request", '{"n":2}', 2)
    with running(tmp_path, is_resumed=True, earlier={"pid": 1}) as service:
        call = service.ask_later(chat())
        assert service.wait_for_turns(3) == [1, 2, 3]
        service.answer(3)
        call.result()


def test_append_mode_and_resume_do_not_take_an_earlier_sessions_turn_for_this_ones(tmp_path):
    with running(tmp_path, traj_append_mode=True) as service:
        one_turn(service, "of the earlier session")
    earlier = {"traj_start": os.path.getsize(service.paths.traj_file)}
    with running(tmp_path, traj_append_mode=True) as service:
        service.log.append("request", rock_ms.compact_json(json.dumps(chat())), 1)
        service.answer(1, "of this session")
    with running(tmp_path, traj_append_mode=True, is_resumed=True, earlier=earlier) as service:
        assert b"of this session" in service.ask(chat()).body
        assert service.turns() == [1]


def test_resuming_reads_a_record_that_lacks_only_its_newline(tmp_path):
    with running(tmp_path) as service:
        one_turn(service)
    for path in (service.paths.log_file, service.paths.traj_file):
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            file.truncate()
    with running(tmp_path, is_resumed=True) as service:
        call = service.ask_later(chat())
        assert service.wait_for_turns(2) == [1, 2]
        service.answer(2)
        call.result()
        assert [record["index"] for record in service.trajectory()] == [1, 2]


def test_resumed_session_that_has_ended_stays_ended(tmp_path):
    with running(tmp_path) as service:
        service.server.session.end()
    with running(tmp_path, is_resumed=True) as service:
        assert service.ask(chat()).status == 410


def test_new_session_sets_the_old_files_aside(tmp_path):
    for _ in range(2):
        with running(tmp_path) as service:
            call = service.ask_later(chat())
            assert service.wait_for_turns(1) == [1]
            service.answer(1)
            call.result()
    names = sorted(os.listdir(str(tmp_path)))
    assert len([name for name in names if name.startswith("LLMService.2") and name.endswith(".log")]) == 1
    assert len([name for name in names if name.startswith("LLMTraj.2") and name.endswith(".jsonl")]) == 1


def test_append_mode_goes_on_with_the_trajectory(tmp_path):
    for count in (1, 2):
        with running(tmp_path, traj_append_mode=True) as service:
            one_turn(service)
            assert len(service.trajectory()) == count


# Trajectory ---------------------------------------------------------------------------------------------------------


def test_trajectory_says_what_happened(service):
    call = service.ask_later(chat(stream=True), headers={"Authorization": "Bearer sk-secret"})
    service.wait_for_turns(1)
    service.answer(1)
    call.result()
    (record,) = service.trajectory()
    assert (record["request"], record["response"]) == (chat(stream=True), completion())
    assert (record["model"], record["stream"], record["status"], record["error"]) == ("m", True, 200, None)
    assert record["index"] == 1
    assert abs(record["end_time"] - record["start_time"] - record["response_time"]) < 1e-3
    files = [open(str(path), "rb").read() for path in service_files(service)]
    assert not any(b"sk-secret" in content for content in files)


def service_files(service):
    return [os.path.join(service.data_dir, name) for name in os.listdir(service.data_dir)]


def test_record_is_on_disk_before_the_client_sees_the_end(service):
    for number in range(1, 30):
        call = service.ask_later(chat(str(number)))
        service.wait_for_turns(number)
        service.answer(number)
        call.result()
        assert len(service.trajectory()) == number


def test_answer_that_cannot_be_recorded_is_not_given_and_comes_with_the_retry(service):
    os.mkdir(service.paths.traj_file)
    call = service.ask_later(chat())
    service.wait_for_turns(1)
    service.answer(1, "kept")
    got = call.result()
    assert (got.status, got.json()["error"]["code"]) == (500, "storage_error")
    assert b"LLMTraj" not in got.body, "no path of ours reaches a client"
    assert any("LLMTraj.jsonl: Is a directory" in line for line in service.logged)
    os.rmdir(service.paths.traj_file)
    assert b"kept" in service.ask(chat()).body
    assert len(service.trajectory()) == 1


def test_request_that_cannot_be_logged_is_an_error_and_takes_no_index(service):
    os.remove(service.paths.log_file)
    os.mkdir(service.paths.log_file)
    got = service.ask(chat())
    assert (got.status, got.json()["error"]["code"]) == (500, "storage_error")
    assert any("LLMService.log: Is a directory" in line for line in service.logged)
    os.rmdir(service.paths.log_file)
    call = service.ask_later(chat())
    assert service.wait_for_turns(1) == [1]
    service.answer(1)
    assert call.result().status == 200


# Watching -----------------------------------------------------------------------------------------------------------


def sleeper():
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_session_ends_once_when_the_last_watched_process_has_gone(service):
    agents = [sleeper(), sleeper()]
    for agent in agents:
        got = service.ask({"pid": agent.pid}, path="/v1/agent/watch")
        assert got.json() == {"status": "watching", "pid": agent.pid}
    agents[0].communicate(b"\n")
    wait_until(lambda: any("%d has gone" % agents[0].pid in line for line in service.logged))
    assert service.records() == []
    agents[1].stdin.close()  # a zombie from now on: nobody waits for it yet
    wait_until(lambda: [record.kind for record in service.records()] == ["end"])
    agents[1].wait()
    wait_until(lambda: service.server.session.has_ended)  # the service has read that end as well
    assert service.ask(chat()).status == 410
    assert service.ask({"pid": os.getppid()}, path="/v1/agent/watch").status == 410


def test_process_that_has_gone_already_ends_the_session(service):
    agent = sleeper()
    agent.communicate(b"\n")
    assert service.ask({"pid": agent.pid}, path="/v1/agent/watch").json()["status"] == "gone"
    wait_until(lambda: [record.kind for record in service.records()] == ["end"])


def test_recycled_pid_counts_as_gone(service):
    watch = rock_ms.AgentWatch(service.server.session, service.server.http.logger)
    agent = sleeper()
    watch.watch(agent.pid)
    with watch._lock:
        watch._watched[agent.pid] = "another process's start time"
    wait_until(lambda: [record.kind for record in service.records()] == ["end"])
    watch.stop()
    agent.communicate(b"\n")


@pytest.mark.parametrize("pid", [None, "1", 0, -1, 1.5, True, 2**31, [1]])
def test_what_is_no_process_number_is_refused(service, pid):
    got = service.ask({"pid": pid}, path="/v1/agent/watch")
    assert got.status == 400
    assert got.json()["error"]["param"] == "pid"


def test_service_does_not_watch_itself(service):
    assert service.ask({"pid": os.getpid()}, path="/v1/agent/watch").status == 400


# Other endpoints ----------------------------------------------------------------------------------------------------


def test_health_models_and_about(service):
    assert service.ask(method="GET", path="/health").json() == {"status": "healthy"}
    assert service.ask(method="HEAD", path="/").status == 200
    assert service.ask(method="GET", path="/").json()["type"] == "local"
    call = service.ask_later(chat(model="qwen/x"))
    service.wait_for_turns(1)
    service.answer(1)
    call.result()
    models = service.ask(method="GET", path="/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["default", "qwen/x"]
    assert service.ask(method="GET", path="/v1/models/any%2Fthing").json()["id"] == "any/thing"


def test_metrics_count_requests_and_turns(service):
    def shows(line):
        return wait_until(lambda: line in service.ask(method="GET", path="/metrics").body.decode(), line)

    service.ask(b"[]")
    call = service.ask_later(chat())
    service.wait_for_turns(1)
    assert shows('rock_http_requests_total{method="POST",route="/v1/chat/completions",status="400"} 1\n')
    assert shows("rock_local_calls_waiting 1\n")
    service.answer(1)
    call.result()
    assert shows(
        'rock_http_request_duration_seconds_count{method="POST",route="/v1/chat/completions",status="200"} 1\n'
    )
    assert shows("rock_local_turns_answered 1\n")
