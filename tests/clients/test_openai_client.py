"""The `openai` package, as agents use it, against the local service."""

import contextlib
import json
import socket

import openai
import pytest

from support import Later, chat, completion, raw_request, running, wait_until

TOOL_CALLS = [
    {"id": "call_a", "type": "function", "function": {"name": "ls", "arguments": '{"dir": "/"}'}},
    {"id": "call_b", "type": "function", "function": {"name": "cat", "arguments": '{"file": "é\\n😀"}'}},
]


class Agent:
    """The client on one service, its calls in threads of their own."""

    def __init__(self, service, **options):
        options = {"api_key": "any", "max_retries": 0, "timeout": 30, **options}
        self.client = openai.OpenAI(base_url="http://127.0.0.1:%d/v1" % service.port, **options)

    def ask(self, prompt="hi", **more):
        return self.client.chat.completions.create(**chat(prompt, **more))

    def ask_later(self, *args, **more):
        return Later(lambda: self.ask(*args, **more))

    def stream_later(self, *args, **more):
        """All chunks, once they are there."""
        return Later(lambda: list(self.ask(*args, stream=True, **more)))


@contextlib.contextmanager
def agent_on(service, **options):
    agent = Agent(service, **options)
    with agent.client:
        yield agent


@pytest.fixture
def agent(service):
    with agent_on(service) as agent:
        yield agent


def requests_answered(service, status):
    return sum("POST /v1/chat/completions %d " % status in line for line in service.logged)


def deltas(chunks, name):
    return [getattr(c.choices[0].delta, name) for c in chunks if c.choices and getattr(c.choices[0].delta, name, None)]


# Answers ------------------------------------------------------------------------------------------------------------


def test_call_gets_the_trainer_s_answer(service, agent):
    call = agent.ask_later("a prompt", temperature=0.5)
    service.wait_for_turns(1)
    request = json.loads(service.records()[0].text)
    assert (request["messages"], request["temperature"]) == (chat("a prompt")["messages"], 0.5)
    service.answer(1, "an answer")
    got = call.result()
    assert (got.id, got.object, got.model, got.usage.total_tokens) == ("c1", "chat.completion", "m", 3)
    (choice,) = got.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "an answer", "stop")


def test_tool_calls_of_a_whole_answer_arrive_as_they_are(service, agent):
    call = agent.ask_later()
    service.wait_for_turns(1)
    service.answer(1, None, tool_calls=TOOL_CALLS)
    (choice,) = call.result().choices
    assert [tool.model_dump() for tool in choice.message.tool_calls] == TOOL_CALLS
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")


def test_fields_of_vendors_survive_both_ways(service, agent):
    call = agent.ask_later(extra_body={"top_k": 5, "vendor": {"deep": [1.50]}})
    service.wait_for_turns(1)
    request = json.loads(service.records()[0].text)
    assert (request["top_k"], request["vendor"]) == (5, {"deep": [1.5]})
    answer = completion("x", reasoning_content="because", token_ids=[1, 2])
    answer["choices"][0]["stop_reason"] = 128009
    service.answer(1, {**answer, "prompt_token_ids": [7], "kv": {"a": None}})
    got = call.result()
    assert got.model_extra == {"prompt_token_ids": [7], "kv": {"a": None}}
    assert got.choices[0].model_extra == {"stop_reason": 128009}
    assert got.choices[0].message.model_extra == {"reasoning_content": "because", "token_ids": [1, 2]}


def test_stream_adds_up_to_the_answer(service, agent):
    call = agent.stream_later(stream_options={"include_usage": True})
    service.wait_for_turns(1)
    service.answer(1, "an answer", reasoning_content="because", tool_calls=TOOL_CALLS)
    chunks = call.result()
    assert {(c.id, c.object, c.model) for c in chunks} == {("c1", "chat.completion.chunk", "m")}
    assert deltas(chunks, "role") == ["assistant"]
    assert "".join(deltas(chunks, "reasoning_content")) == "because"
    assert "".join(deltas(chunks, "content")) == "an answer"
    tools = [tool for tools in deltas(chunks, "tool_calls") for tool in tools]
    assert [tool.index for tool in tools] == [0, 1]
    assert [tool.model_dump(exclude={"index"}) for tool in tools] == TOOL_CALLS
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["tool_calls"]
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 3)


def test_stream_has_usage_only_where_it_is_asked_for(service, agent):
    call = agent.stream_later()
    service.wait_for_turns(1)
    service.answer(1)
    chunks = call.result()
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_stream_carries_the_fields_of_vendors(service, agent):
    call = agent.stream_later()
    service.wait_for_turns(1)
    answer = completion("x", token_ids=[1, 2])
    answer["choices"][0]["stop_reason"] = 128009
    service.answer(1, {**answer, "prompt_token_ids": [7]})
    chunks = call.result()
    assert [c.model_extra for c in chunks if c.model_extra] == [{"prompt_token_ids": [7]}]
    assert deltas(chunks, "token_ids") == [[1, 2]]
    assert chunks[-1].choices[0].model_extra == {"stop_reason": 128009}


def test_client_s_own_accumulator_takes_the_stream(service, agent):
    def ask():
        with agent.client.chat.completions.stream(**chat(), stream_options={"include_usage": True}) as stream:
            return stream.get_final_completion()

    call = Later(ask)
    service.wait_for_turns(1)
    service.answer(1, "an answer", tool_calls=TOOL_CALLS)
    got = call.result()
    assert (got.choices[0].message.content, got.usage.total_tokens) == ("an answer", 3)
    assert [tool.id for tool in got.choices[0].message.tool_calls] == ["call_a", "call_b"]
    assert [tool.function.arguments for tool in got.choices[0].message.tool_calls] == [
        tool["function"]["arguments"] for tool in TOOL_CALLS
    ]


def test_parallel_calls_answered_in_reverse_order_get_each_its_own(service, agent):
    calls = {"prompt %d" % number: agent.ask_later("prompt %d" % number) for number in range(5)}
    service.wait_for_turns(5)
    prompts = {r.index: json.loads(r.text)["messages"][0]["content"] for r in service.records()}
    for index in sorted(prompts, reverse=True):
        service.answer(index, "to " + prompts[index])
        call = calls.pop(prompts[index])
        assert call.result().choices[0].message.content == "to " + prompts[index]
        assert not any(other.is_done() for other in calls.values())
    assert sorted(prompts) == [1, 2, 3, 4, 5]


def test_models_are_listed_with_those_asked_for(service, agent):
    assert [model.id for model in agent.client.models.list()] == ["default"]
    call = agent.ask_later()
    service.wait_for_turns(1)
    service.answer(1)
    call.result()
    assert [model.id for model in agent.client.models.list()] == ["default", "m"]
    assert agent.client.models.retrieve("org/model-7b").id == "org/model-7b"


# Errors -------------------------------------------------------------------------------------------------------------

ERRORS = [
    ("invalid_request_error", None, openai.BadRequestError, 400),
    ("invalid_request_error", "context_length_exceeded", openai.BadRequestError, 400),
    ("authentication_error", None, openai.AuthenticationError, 401),
    ("permission_error", None, openai.PermissionDeniedError, 403),
    ("not_found_error", "model_not_found", openai.NotFoundError, 404),
    ("conflict", 409, openai.ConflictError, 409),
    ("unprocessable", 422, openai.UnprocessableEntityError, 422),
    ("rate_limit_error", None, openai.RateLimitError, 429),
    ("insufficient_quota", "insufficient_quota", openai.RateLimitError, 429),
    ("server_error", None, openai.InternalServerError, 500),
    ("overloaded_error", None, openai.InternalServerError, 503),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind, code, exception, status", ERRORS)
def test_error_of_the_trainer_is_the_client_s_typed_exception(service, agent, kind, code, exception, status, stream):
    call = agent.ask_later(stream=stream)
    service.wait_for_turns(1)
    service.answer(1, {"error": {"message": "no luck", "type": kind, "code": code, "param": None}})
    with pytest.raises(exception, match="no luck") as caught:
        call.result()
    error = caught.value
    assert (type(error), error.status_code, error.type) == (exception, status, kind)
    assert error.body["code"] == code


def test_error_in_vllm_s_shape_is_the_client_s_typed_exception(service, agent):
    call = agent.ask_later()
    service.wait_for_turns(1)
    service.answer(1, {"object": "error", "message": "no luck", "type": "BadRequestError", "code": 400})
    with pytest.raises(openai.BadRequestError, match="no luck") as caught:
        call.result()
    assert caught.value.body["type"] == "BadRequestError"


def test_error_is_retried_by_the_client_as_a_new_turn(service):
    with agent_on(service, max_retries=1) as agent:
        call = agent.ask_later()
        service.wait_for_turns(1)
        service.answer(1, {"error": {"message": "no luck", "type": "rate_limit_error"}})
        assert service.wait_for_turns(2) == [1, 2]
        service.answer(2, "better luck")
        assert call.result().choices[0].message.content == "better luck"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_ended_session_is_410_which_the_client_does_not_retry(service, stream):
    with agent_on(service, max_retries=openai.DEFAULT_MAX_RETRIES) as agent:
        waiting = agent.ask_later("waiting", stream=stream)
        service.wait_for_turns(1)
        service.server.session.end()
        for call in (waiting, agent.ask_later("late", stream=stream)):
            with pytest.raises(openai.APIStatusError, match="session has ended") as caught:
                call.result()
            assert (caught.value.status_code, caught.value.code) == (410, "session_ended")
    wait_until(lambda: requests_answered(service, 410) >= 2, "both requests in the service's log")
    assert requests_answered(service, 410) == 2
    assert service.turns() == [1]


def test_right_api_key_is_let_in(tmp_path):
    with running(tmp_path, api_key="sesame") as service, agent_on(service, api_key="sesame") as agent:
        call = agent.ask_later()
        service.wait_for_turns(1)
        service.answer(1)
        assert call.result().choices[0].message.content == "hello"


def test_wrong_api_key_is_an_authentication_error_and_no_turn(tmp_path):
    with running(tmp_path, api_key="sesame") as service, agent_on(service, api_key="Sesame", max_retries=2) as agent:
        with pytest.raises(openai.AuthenticationError, match="API key") as caught:
            agent.ask()
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            agent.client.models.list()
        assert service.turns() == []


# Waiting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_retry_after_the_client_s_timeout_is_the_same_turn(service, stream):
    with agent_on(service, max_retries=1, timeout=0.5) as agent:
        call = agent.stream_later() if stream else agent.ask_later()
        wait_until(lambda: requests_answered(service, 499), "the client's hanging up")
        service.answer(1, "in the end")
        got = call.result()
    content = "".join(deltas(got, "content")) if stream else got.choices[0].message.content
    assert content == "in the end"
    assert service.turns() == [1]
    assert [record["status"] for record in service.trajectory()] == [499, 200]


def let_heartbeats_pass(service, count):
    """Return once another call, begun later than any now waiting, has been sent so many heartbeats."""
    body = json.dumps(chat("beats", stream=True)).encode("utf-8")
    with socket.create_connection(("127.0.0.1", service.port), 30) as sock, sock.makefile("rb") as received:
        sock.sendall(raw_request(body))
        beats = 0
        while beats < count:
            line = received.readline()
            assert line, "the service closed"
            beats += line == b":\n"


@pytest.fixture
def beating(tmp_path):
    with running(tmp_path, heartbeat_seconds=0.05) as service, agent_on(service) as agent:
        yield service, agent


def test_heartbeats_before_a_whole_answer_do_no_harm(beating):
    service, agent = beating
    call = Later(lambda: agent.client.chat.completions.with_raw_response.create(**chat()))
    service.wait_for_turns(1)
    let_heartbeats_pass(service, 4)
    service.answer(1, "in the end")
    got = call.result()
    assert got.http_response.content.startswith(b"  "), "there were no heartbeats"
    assert got.parse().choices[0].message.content == "in the end"


def test_heartbeats_before_a_stream_do_no_harm(beating):
    service, agent = beating
    call = agent.stream_later()
    service.wait_for_turns(1)
    let_heartbeats_pass(service, 4)
    service.answer(1, "in the end", tool_calls=TOOL_CALLS)
    chunks = call.result()
    assert deltas(chunks, "content") == ["in the end"]
    assert len(deltas(chunks, "tool_calls")) == 2


def test_heartbeats_keep_a_client_waiting_beyond_its_timeout(beating):
    service, _ = beating
    with agent_on(service, timeout=0.25) as agent:
        call = agent.ask_later()
        service.wait_for_turns(1)
        let_heartbeats_pass(service, 10)
        service.answer(1, "in the end")
        assert call.result().choices[0].message.content == "in the end"


def test_error_after_heartbeats_of_a_stream_is_raised(beating):
    service, agent = beating
    call = agent.stream_later()
    service.wait_for_turns(1)
    let_heartbeats_pass(service, 2)
    service.answer(1, {"error": {"message": "no luck", "type": "rate_limit_error", "code": "rate_limit_exceeded"}})
    with pytest.raises(openai.APIError, match="no luck") as caught:
        call.result()
    assert (caught.value.type, caught.value.code) == ("rate_limit_error", "rate_limit_exceeded")


def test_error_after_heartbeats_of_a_whole_answer_is_in_its_body(beating):
    service, agent = beating
    call = agent.ask_later()
    service.wait_for_turns(1)
    let_heartbeats_pass(service, 2)
    service.answer(1, {"error": {"message": "no luck", "type": "rate_limit_error"}})
    got = call.result()
    assert got.choices is None
    assert got.model_extra["error"]["message"] == "no luck"


def test_session_s_end_after_heartbeats_of_a_stream_is_raised(beating):
    service, agent = beating
    call = agent.stream_later()
    service.wait_for_turns(1)
    let_heartbeats_pass(service, 2)
    service.server.session.end()
    with pytest.raises(openai.APIError, match="session has ended"):
        call.result()
