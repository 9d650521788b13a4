"""The assistant: function calling in text, agents, uploads and knowledge over HTTP, in front of a scripted model."""

import contextlib
import http.client
import json
import logging
import os
import socket
import tracemalloc
from unittest import mock

import pytest

import rock_ms
import rock_sdk
from assistants import ACTION, WEATHER, Assistant, added_up, assisting, form, letters, says, streams
from managers import FakeRuntime, managing
from support import TIMEOUT, Later, ask, wait_until
from upstream import answer, delta, sse

BEIJING, SHANGHAI = ACTION % "北京", ACTION % "上海"
BOTH = [("amap_weather", '{"location": "北京"}'), ("amap_weather", '{"location": "上海"}')]


@pytest.fixture
def assistant(tmp_path, upstream):
    with assisting(tmp_path, upstream) as assistant:
        yield assistant


def sent(upstream, number=-1):
    """What the model server was asked."""
    return json.loads(upstream.seen()[number]["body"].decode("utf-8"))


def headers_of(upstream):
    """The header fields of the first request to the model server."""
    return dict(upstream.seen()[0]["headers"])


def calls_of(message):
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]


def refused(got, status, words):
    """That an answer is an error, for clients of these servers and of OpenAI."""
    assert got.status == status, got.body
    assert words in got.json()["message"]
    assert got.json()["error"]["message"] == got.json()["message"]
    assert got.json()["request_id"]
    return got


# Function calling ---------------------------------------------------------------------------------------------------


def test_seed_example_is_answered_with_its_keys(assistant, upstream):
    text = ACTION % "海淀区"
    upstream.script(says(text))
    got = assistant.chat(tools=[WEATHER], tool_choice="auto").json()
    call = got["choices"][0]["message"]["tool_calls"][0]
    assert call.pop("id").startswith("call_")
    assert got.pop("id").startswith("chatcmpl_") and got.pop("created")
    assert got.pop("request_id") == got.pop("system_fingerprint")
    assert got == {
        "message": "",
        "output": None,
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": text,
                    "tool_calls": [
                        {
                            "type": "function",
                            "function": {"name": "amap_weather", "arguments": '{"location": "海淀区"}'},
                        }
                    ],
                },
                "finish_reason": "tool_calls",
            }
        ],
        "model": "m",
        "object": "chat.completion",
        "usage": {"prompt_tokens": 267, "completion_tokens": 15, "total_tokens": 282},
    }


def test_model_gets_the_tools_as_a_prompt_and_nothing_that_it_may_not_know(assistant, upstream):
    upstream.script(says("好的"))
    assert assistant.chat(tools=[WEATHER], parallel_tool_calls=True, temperature=0.5, stop="END").status == 200
    body = sent(upstream)
    assert set(body) == {"model", "messages", "temperature", "stop"}
    assert body["stop"] == ["END", "Observation:"]
    system, user = body["messages"]
    assert system["role"] == "system" and "amap_weather" in system["content"] and "城市" in system["content"]
    assert user == {"role": "user", "content": "海淀区天气"}


def test_four_stop_words_of_the_client_are_all_that_servers_take(assistant, upstream):
    upstream.script(says(ACTION % "北京" + "Observation: sunny"))
    got = assistant.chat(tools=[WEATHER], stop=["a", "b", "c", "d"]).json()
    assert sent(upstream)["stop"] == ["a", "b", "c", "d"]
    assert "sunny" not in got["choices"][0]["message"]["content"]


@pytest.mark.parametrize("is_parallel, expected", [(None, BOTH), (True, BOTH), (False, BOTH[:1])])
def test_parallel_calls_are_as_many_as_are_allowed(assistant, upstream, is_parallel, expected):
    upstream.script(says(BEIJING + SHANGHAI), streams(*(BEIJING + SHANGHAI)))
    more = {} if is_parallel is None else {"parallel_tool_calls": is_parallel}
    choice = assistant.chat("请同时查找", tools=[WEATHER], **more).json()["choices"][0]
    assert calls_of(choice["message"]) == expected
    assert choice["finish_reason"] == "tool_calls"
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == len(expected)
    assert added_up(assistant.chat_stream("请同时查找", tools=[WEATHER], **more)) == ("", expected, "tool_calls")


def test_streamed_text_comes_as_it_is_said_and_calls_are_deltas(assistant, upstream):
    upstream.script(letters("好的，我来查询。\n\n工具调用\n" + BEIJING))
    values = assistant.chat_stream(tools=[WEATHER])
    text, calls, reason = added_up(values)
    assert (text.strip(), calls, reason) == ("好的，我来查询。\n\n工具调用", BOTH[:1], "tool_calls")
    deltas = [choice["delta"] for value in values for choice in value["choices"]]
    assert deltas[0]["role"] == "assistant"
    assert len([part for part in deltas if part.get("content")]) > 5
    first = next(part["tool_calls"][0] for part in deltas if "tool_calls" in part)
    assert first["type"] == "function" and first["id"].startswith("call_") and first["index"] == 0
    assert len({value["id"] for value in values}) == 1
    assert {value["object"] for value in values} == {"chat.completion.chunk"}


def test_text_of_a_stream_does_not_wait_for_its_end(assistant, upstream):
    begun = sse(delta("It is "), done=False)[:-1]
    upstream.script([*begun, {"gate": "go"}, {"send": ""}, *_rest(delta("sunny."), delta(finish="stop"))])
    with contextlib.closing(_connection(assistant)) as connection:
        response = _stream_of(connection, tools=[WEATHER])
        seen = b""
        while b"It is" not in seen:
            seen += response.readline()
        upstream.open("go")
        assert b"sunny." in response.read()


def _rest(*values):
    """The rest of a chunked stream of events."""
    return sse(*values)[1:]


def _connection(assistant):
    return http.client.HTTPConnection("127.0.0.1", assistant.port, timeout=TIMEOUT)


def _stream_of(connection, **more):
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True, **more}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def test_calls_of_a_stream_do_not_wait_for_what_the_model_makes_up(assistant, upstream):
    begun = sse(delta(BEIJING + "Observation: "), done=False)[:-1]
    upstream.script([*begun, {"gate": "go"}, *_rest(delta("sunny"), delta(finish="stop"))])
    with contextlib.closing(_connection(assistant)) as connection:
        response = _stream_of(connection, tools=[WEATHER])
        seen = b""
        while b'"finish_reason":"tool_calls"' not in seen:
            seen += response.readline()
        upstream.open("go")
        rest = response.read()
    assert b"sunny" not in rest and rest.endswith(b"data: [DONE]\n\n") and b"finish_reason" not in rest


def test_calls_that_the_model_makes_itself_go_through(assistant, upstream):
    call = {"id": "c", "type": "function", "function": {"name": "amap_weather", "arguments": "{}"}}
    upstream.script(sse(delta(tool_calls=[{"index": 0, **call}]), delta(finish="tool_calls")))
    assert added_up(assistant.chat_stream(tools=[WEATHER])) == ("", [("amap_weather", "{}")], "tool_calls")


def test_usage_comes_where_it_is_asked_for(assistant, upstream):
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    last = {**delta(finish="stop"), "usage": usage}
    upstream.script(sse(delta("hi"), last), sse(delta("hi"), last))
    values = assistant.chat_stream(stream_options={"include_usage": True})
    assert (values[-1]["choices"], values[-1]["usage"]) == ([], usage)
    assert all("usage" not in value for value in assistant.chat_stream())


@pytest.mark.parametrize(
    "choice, is_shown",
    [("none", False), ("auto", True), ("required", True), ({"type": "function", "function": {"name": "other"}}, False)],
)
def test_tool_choice_decides_which_tools_are_shown(assistant, upstream, choice, is_shown):
    other = {"type": "function", "function": {"name": "other", "description": "something else"}}
    upstream.script(says("text"))
    assert assistant.chat(tools=[WEATHER, other], tool_choice=choice).status == 200
    assert ("amap_weather" in json.dumps(sent(upstream))) is is_shown


def test_what_looks_like_a_call_is_text_where_no_tool_may_be_called(assistant, upstream):
    upstream.script(says(BEIJING), says(BEIJING), letters(BEIJING))
    for more in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = assistant.chat(**more).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (BEIJING, "stop")
        assert "tool_calls" not in choice["message"]
    assert added_up(assistant.chat_stream()) == (BEIJING, [], "stop")


def test_unknown_tool_stays_text(assistant, upstream):
    text = 'Action: google\nAction Input: {"q": "x"}\n'
    upstream.script(says(text), letters(text))
    choice = assistant.chat(tools=[WEATHER]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert added_up(assistant.chat_stream(tools=[WEATHER])) == (text, [], "stop")


def test_conversation_with_results_is_rendered_back(assistant, upstream):
    upstream.script(says(BEIJING), says("北京晴。"))
    first = assistant.chat("北京天气", tools=[WEATHER]).json()["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "晴，20度"}
    got = assistant.chat([{"role": "user", "content": "北京天气"}, first, result], tools=[WEATHER]).json()
    assert got["choices"][0]["message"]["content"] == "北京晴。"
    messages = sent(upstream)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"].count("Action Input:") == 1
    assert "<result>晴，20度</result>" in messages[3]["content"]
    assert "tool_calls" not in messages[2]


def test_each_choice_of_several_is_read_by_itself(assistant, upstream):
    upstream.script(says("text", BEIJING), sse(*_two_choices()))
    got = assistant.chat(tools=[WEATHER], n=2).json()["choices"]
    assert [(calls_of(choice["message"]), choice["finish_reason"]) for choice in got] == [
        ([], "stop"),
        (BOTH[:1], "tool_calls"),
    ]
    values = assistant.chat_stream(tools=[WEATHER], n=2)
    assert added_up(values, 0) == ("text", [], "stop")
    assert added_up(values, 1) == ("", BOTH[:1], "tool_calls")


def _two_choices():
    pieces = [delta("te", 0), delta(BEIJING[:9], 1), delta("xt", 0), delta(BEIJING[9:], 1)]
    return [*pieces, delta(finish="stop", index=0), delta(finish="stop", index=1)]


def test_image_parts_go_through(assistant, upstream):
    parts = [
        {"type": "text", "text": "what"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]
    upstream.script(says("a cat"))
    assert assistant.chat([{"role": "user", "content": parts}], tools=[WEATHER]).status == 200
    assert sent(upstream)["messages"][-1]["content"] == parts


def test_answer_that_was_cut_short_is_no_call(assistant, upstream):
    upstream.script(says(BEIJING[:-3], finish="length"))
    choice = assistant.chat(tools=[WEATHER]).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"].get("tool_calls")) == ("length", None)


def test_fields_of_the_model_that_are_not_content_go_through(assistant, upstream):
    upstream.script(sse(delta(reasoning_content="hm", content=None), delta("hi"), delta(finish="stop")))
    values = assistant.chat_stream(tools=[WEATHER])
    assert [v["choices"][0]["delta"].get("reasoning_content") for v in values if v["choices"]].count("hm") == 1


def test_native_tool_calling_passes_tools_through_as_json_schema(tmp_path, upstream):
    call = {"id": "c", "type": "function", "function": {"name": "amap_weather", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    upstream.script(answer({"id": "c1", "choices": [choice]}), sse(delta("hi"), delta(finish="stop")))
    with assisting(tmp_path, upstream, tool_calling="native") as assistant:
        got = assistant.chat(tools=[WEATHER]).json()
        assert got["choices"] == [choice]
        assert (got["request_id"], got["message"], got["output"]) == ("c1", "", None)
        parameters = sent(upstream)["tools"][0]["function"]["parameters"]
        assert parameters["type"] == "object" and parameters["required"] == ["location"]
        assert added_up(assistant.chat_stream(tools=[WEATHER])) == ("hi", [], "stop")


def test_what_else_is_said_of_a_tool_reaches_a_native_model(tmp_path, upstream):
    upstream.script(says("hi"))
    tool = {"type": "function", "cached": True, "function": {"name": "now", "description": "the time", "strict": True}}
    with assisting(tmp_path, upstream, tool_calling="native") as assistant:
        assert assistant.chat(tools=[tool]).status == 200
    (asked,) = sent(upstream)["tools"]
    assert asked["cached"] is True and asked["function"]["strict"] is True
    assert asked["function"]["parameters"]["type"] == "object"


@pytest.mark.parametrize(
    "more, words",
    [
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0]"),
        ({"tools": "x"}, "tools"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0]"),
        ({"tools": [WEATHER, WEATHER]}, "amap_weather"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "amap_wether"}}},
            "did you mean",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_bad_request_is_told_what_is_wrong(assistant, upstream, more, words):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}
    got = refused(ask(assistant.port, body), 400, words)
    assert got.json()["error"]["type"] == "invalid_request_error"
    assert upstream.seen() == []


def test_word_that_is_no_name_is_not_compared_in_all_its_length():
    tracemalloc.start()
    try:
        assert rock_ms.did_you_mean("ab" * 100_000, ["amap_weather"]) == "; known are amap_weather"
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# The model server ---------------------------------------------------------------------------------------------------


def test_refusal_of_the_model_server_is_passed_on(assistant, upstream):
    error = {"error": {"message": "no such key"}}
    coded = {"error": {"message": "too long", "code": "context_length_exceeded"}}
    upstream.script(
        answer(error, 401), answer(error, 429, {"Retry-After": "7"}), answer("<html>", 400), answer(coded, 400)
    )
    refused(assistant.chat(), 401, "no such key")
    assert refused(assistant.chat(stream=True), 429, "no such key").headers["retry-after"] == "7"
    refused(assistant.chat(), 400, "<html>")
    assert refused(assistant.chat(), 400, "too long").json()["error"]["code"] == "context_length_exceeded"


def test_model_server_is_asked_again_as_the_proxy_does(tmp_path, upstream):
    upstream.script(answer({"error": "busy"}, 500), says("hi"))
    with assisting(tmp_path, upstream, max_attempts=2, retry_delay_seconds=0.01) as assistant:
        assert assistant.chat().status == 200
        (record,) = assistant.trajectory()
    assert (record["attempts"], record["status"]) == (2, 200)


@pytest.mark.parametrize(
    "body",
    ['{"choices": []}', "[]", "{", '{"choices": [3]}', '{"choices": [{"message": {"content": "", "tool_calls": 3}}]}'],
)
def test_answer_that_is_none_is_a_502(assistant, upstream, body):
    upstream.script(answer(body), answer(body))
    refused(assistant.chat(), 502, "model server's answer")
    refused(assistant.lite(), 502, "model server's answer")


def test_error_in_an_answer_that_says_it_is_a_success_is_told(assistant, upstream):
    upstream.script(answer({"error": {"message": "no quota left"}}), answer({"error": {"message": "no quota left"}}))
    refused(assistant.chat(), 502, "no quota left")
    refused(assistant.lite(), 502, "no quota left")


def test_content_that_comes_in_parts_is_read_as_text(assistant, upstream):
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": BEIJING}]
    choice = {"index": 0, "message": {"role": "assistant", "content": parts}, "finish_reason": "stop"}
    upstream.script(answer({"choices": [choice]}), sse(delta(parts), delta(finish="stop")))
    assert calls_of(assistant.chat(tools=[WEATHER]).json()["choices"][0]["message"]) == BOTH[:1]
    assert added_up(assistant.chat_stream(tools=[WEATHER]))[1] == BOTH[:1]


@pytest.mark.parametrize(
    "chunk", [{"choices": 5}, {"choices": {"a": 1}}, {"choices": [3]}, {"choices": [{"delta": 3}]}, [], 3]
)
def test_chunk_that_is_none_is_passed_over(assistant, upstream, chunk):
    upstream.script(*[sse(chunk, delta("hi"), delta(finish="stop"))] * 2)
    assert added_up(assistant.chat_stream(tools=[WEATHER])) == ("hi", [], "stop")
    assert assistant.response() == "hi"


def test_events_without_empty_lines_between_them_are_read(assistant, upstream):
    upstream.script(*[sse(delta("h"), delta("i"), delta(finish="stop"), end="\n")] * 2)
    assert added_up(assistant.chat_stream()) == ("hi", [], "stop")
    assert assistant.response() == "hi"


@pytest.mark.parametrize("calls", [[3], [{"function": 4}], [{"function": {"name": "RenewInstance", "arguments": {}}}]])
def test_calls_of_a_native_model_that_are_none_are_no_bug(tmp_path, upstream, calls):
    upstream.script(sse(delta(tool_calls=calls), delta(finish="stop")), streams("done"))
    with assisting(tmp_path, upstream, tool_calling="native") as assistant:
        assert assistant.lite(agent_config={"tools": ["RenewInstance"]}).status in (200, 502)
        assert not any("bug" in line for line in assistant.logged)


def test_stream_that_breaks_off_ends_with_an_error_and_a_broken_connection(assistant, upstream):
    upstream.script([*sse(delta("It is "), done=False)[:-1], {"close": True}])
    with contextlib.closing(_connection(assistant)) as connection:
        response = _stream_of(connection)
        seen = b""
        with pytest.raises(Exception, match="IncompleteRead"):
            while True:
                seen += response.read(1) or _complete(seen)
    assert b'"error"' in seen and b"[DONE]" not in seen


def _complete(seen):
    raise AssertionError("the stream came to its end: %r" % seen)


def test_whole_answer_to_a_request_for_a_stream_becomes_one(assistant, upstream):
    upstream.script(says("text " + BEIJING), says("\n" + BEIJING))
    assert added_up(assistant.chat_stream(tools=[WEATHER]))[0].startswith("text ")
    assert added_up(assistant.chat_stream(tools=[WEATHER]))[1] == BOTH[:1]


def test_hangup_of_the_client_ends_the_call_of_the_model(assistant, upstream):
    upstream.script([*sse(delta("It is "), done=False)[:-1], {"stall": True}])
    with contextlib.closing(_connection(assistant)) as connection:
        _stream_of(connection).readline()
        response_seen = upstream.seen(1)
    assert response_seen
    upstream.wait_closed()
    wait_until(assistant.trajectory)
    assert assistant.trajectory()[0]["partial"] is True


def test_calls_are_recorded_as_the_model_got_them_without_keys(assistant, upstream):
    upstream.script(says(BEIJING))
    headers = [("Authorization", "Bearer sk-secret-of-the-client")]
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [WEATHER]}
    assert ask(assistant.port, body, headers=headers).status == 200
    assert headers_of(upstream)["authorization"] == "Bearer sk-secret-of-the-client"
    (record,) = assistant.trajectory()
    assert "amap_weather" in record["request"]["messages"][0]["content"]
    assert record["response"]["choices"][0]["message"]["content"] == BEIJING
    assert "sk-secret" not in json.dumps(record)


def test_keys_go_where_they_belong(tmp_path, upstream):
    upstream.script(says("hi"))
    keys = {"api_key": "key-of-the-assistant", "upstream_api_key": "key-of-the-model-server"}
    with assisting(tmp_path, upstream, **keys) as assistant:
        assert assistant.chat().status == 401
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
        headers = [("Authorization", "Bearer key-of-the-assistant")]
        assert ask(assistant.port, body, headers=headers).status == 200
    assert headers_of(upstream)["authorization"] == "Bearer key-of-the-model-server"


def test_key_to_the_assistant_never_reaches_the_model_server(tmp_path, upstream):
    upstream.script(says("hi"), answer({"object": "list", "data": []}))
    with assisting(tmp_path, upstream, api_key="key-of-the-assistant") as assistant:
        headers = [("Authorization", "Bearer key-of-the-assistant"), ("Cookie", "session=1")]
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
        assert ask(assistant.port, body, headers=headers).status == 200
        assert ask(assistant.port, None, "GET", "/v1/models", headers=headers).status == 200
    asked = [dict(request["headers"]) for request in upstream.seen(2)]
    assert all("authorization" not in fields and "cookie" not in fields for fields in asked)


def test_key_that_the_model_server_repeats_is_neither_told_nor_logged(tmp_path, upstream):
    error = {"error": {"message": "the key %s is no good"}}
    ours = json.loads(json.dumps(error) % "key-of-the-model-server")
    theirs = json.loads(json.dumps(error) % "sk-from-the-request")
    upstream.script(answer(ours, 401), sse(ours), sse(delta("Well"), theirs))
    with assisting(tmp_path / "a", upstream, upstream_api_key="key-of-the-model-server") as assistant:
        refused(assistant.chat(), 401, "the key [key] is no good")
        refused(assistant.lite(), 502, "the key [key] is no good")
    with assisting(tmp_path / "b", upstream) as assistant:
        with pytest.raises(http.client.IncompleteRead):
            assistant.lite(llm_config={"api_key": "sk-from-the-request"}, stream=True)
        wait_until(lambda: any("broke off" in line for line in assistant.logged))
    assert "sk-from" not in "".join(assistant.logged)


def test_assistant_that_is_its_own_model_server_says_so(assistant):
    assistant.server.service._clients._own_url = assistant.url + "/v1"
    refused(assistant.chat(), 508, "itself")


def test_models_are_those_of_the_model_server_or_the_one_that_is_served(tmp_path, upstream):
    listed = {"object": "list", "data": [{"id": "qwen-max"}]}
    upstream.script(answer(listed), says("hi"))
    with assisting(tmp_path / "a", upstream) as assistant:
        assert ask(assistant.port, None, "GET", "/v1/models").json() == listed
    with assisting(tmp_path / "b", upstream, served_model_name="Qwen2") as assistant:
        assert [m["id"] for m in ask(assistant.port, None, "GET", "/v1/models").json()["data"]] == ["Qwen2"]
        assert ask(assistant.port, None, "GET", "/v1/models/Qwen2").json()["id"] == "Qwen2"
        value = {"messages": [{"role": "user", "content": "x"}]}
        assert ask(assistant.port, value).status == 200
        assert ask(assistant.port, value, path="/v1/assistants/lite").status == 200
    assert [sent(upstream, number)["model"] for number in (-2, -1)] == ["Qwen2"] * 2


def test_port_that_is_taken_is_told_before_vllm_is_begun(tmp_path, upstream):
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        with pytest.raises(rock_ms.RockError, match="cannot listen on 127.0.0.1"):
            Assistant(tmp_path, upstream, model="path", port=taken.getsockname()[1])


class StartedVLLM:
    """What a started VLLMServer is to the assistant."""

    base_url, api_key = "http://127.0.0.1:9/v1", "key-of-vllm"
    is_there = True

    def is_alive(self):
        return self.is_there

    def bound_log(self):
        pass


@pytest.fixture
def vllm_clients(tmp_path):
    """(the model clients of an assistant with vLLM beside it, that vLLM)."""
    vllm = StartedVLLM()
    trajectory = rock_ms.AppendFile(str(tmp_path / "traj"))
    settings = rock_sdk.AssistantSettings(model="path")
    clients = rock_sdk.ModelClients(settings, trajectory, logging.getLogger("test"), vllm)
    yield clients, vllm
    clients.stop()
    clients.close()


def test_vllm_that_was_started_is_what_its_name_and_no_name_mean(vllm_clients):
    clients, _ = vllm_clients
    assert clients.named("vllm") is clients.named(None) is clients.own()
    assert clients.named("dashscope") is not clients.own()


def test_vllm_that_has_ended_is_told_at_once(vllm_clients):
    clients, vllm = vllm_clients
    vllm.is_there = False
    for ask_for in (clients.own, lambda: clients.named("vllm")):
        with pytest.raises(rock_ms.ApiError, match="vLLM has ended") as error:
            ask_for()
        assert error.value.status == 503
    assert clients.gauges()


def test_description_and_page_name_every_endpoint(assistant):
    said = ask(assistant.port, None, "GET", "/openapi.json").json()
    page = ask(assistant.port, None, "GET", "/docs").body.decode("utf-8")
    assert list(said["paths"]) == ["/v1/chat/completions", "/v1/assistants/lite", "/v1/files"]
    assert all(path in page for path in said["paths"])
    assert "multipart/form-data" in said["paths"]["/v1/files"]["post"]["requestBody"]["content"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/assistants/lite", "/v1/files"])
def test_pages_in_browsers_are_refused(assistant, path):
    got = ask(assistant.port, {}, path=path, headers=[("Origin", "http://evil.example")])
    refused(got, 403, "evil.example")


# Agents -------------------------------------------------------------------------------------------------------------

RENEW = 'Action: RenewInstance\nAction Input: {"instance_id": "123", "period": "2"}\n'


def test_agent_calls_its_tool_and_answers(assistant, upstream):
    upstream.script(streams("好的。\n" + RENEW), streams("Answer: 已完成"))
    text = assistant.response("续费", agent_config={"tools": ["RenewInstance"]})
    renewed = "<result>已完成ECS实例ID为123的续费，续费时长2月</result>"
    assert text == "好的。\n" + RENEW.rstrip() + "\nObservation: " + renewed + "\nAnswer: 已完成"
    last = sent(upstream)["messages"][-1]
    assert last["role"] == "user" and "<result>已完成ECS实例ID为123的续费" in last["content"]


def test_streamed_agent_sends_the_same_as_text(assistant, upstream):
    upstream.script(streams(*RENEW), streams("好了"))
    got = assistant.lite("续费", agent_config={"tools": ["RenewInstance"]}, stream=True)
    assert got.headers["content-type"] == "text/plain; charset=utf-8"
    text = got.body.decode("utf-8")
    assert "Observation: <result>已完成" in text and text.endswith("Answer:好了")


def test_history_and_instruction_reach_the_model(assistant, upstream):
    upstream.script(streams("ok"))
    history = [{"role": "user", "content": "I am Ann"}, {"role": "assistant", "content": "Hi Ann"}]
    assistant.response([*history, {"role": "user", "content": "Who am I?"}])
    system, *others = sent(upstream)["messages"]
    assert "you are a helpful assistant" in system["content"] and "test assistant" in system["content"]
    assert others == [*history, {"role": "user", "content": "Who am I?"}]


def test_tool_of_the_caller_ends_the_run_with_what_it_is_to_do(assistant, upstream):
    upstream.script(streams(BEIJING))
    output = assistant.lite(tools=[WEATHER["function"]]).json()["output"]
    assert output["response"] == BEIJING.rstrip()
    assert calls_of(output) == BOTH[:1]


def test_key_of_the_llm_config_goes_to_the_model_server(assistant, upstream):
    upstream.script(streams("ok"))
    assistant.response(llm_config={"api_key": "sk-from-the-request"})
    assert headers_of(upstream)["authorization"] == "Bearer sk-from-the-request"
    assert "sk-from" not in json.dumps(assistant.trajectory())


@pytest.mark.parametrize("name", ["generate_cfg", "generate_config"])
def test_more_fields_for_the_model_are_sent_along(assistant, upstream, name):
    upstream.script(streams("ok"))
    assistant.response(llm_config={name: {"temperature": 0.1}})
    assert sent(upstream)["temperature"] == 0.1


def test_agent_that_fails_before_it_says_anything_is_an_error(assistant, upstream):
    upstream.script(answer({"error": "no"}, 403), answer({"error": "no"}, 403))
    refused(assistant.lite(), 403, "no")
    refused(assistant.lite(stream=True), 403, "no")


@pytest.mark.parametrize(
    "more, words",
    [
        ({"llm_config": {"model": 3}}, "llm_config.model"),
        ({"llm_config": {"model_server": "http://169.254.169.254/"}}, "model server"),
        ({"llm_config": {"model_server": "dashcope"}}, "did you mean 'dashscope'"),
        ({"llm_config": {"api_key": "a\nb"}}, "api_key"),
        ({"agent_config": {"tools": ["RenewInstanc"]}}, "did you mean 'RenewInstance'"),
        ({"agent_config": {"tools": ["../etc/passwd"]}}, "there is no tool"),
        ({"agent_config": {"tools": [{"image_gen": {"api_key": "x"}}]}, "use_tool_api": True}, "by its name alone"),
        ({"user_token": "a\nb", "use_tool_api": True}, "user_token"),
        ({"messages": [{"role": "user", "content": "a"}, 3]}, "messages"),
        ({"messages": [{"role": "tool", "content": 3}]}, "messages[0]"),
        ({"agent_config": {"tools": [{"description": "nameless"}]}}, "function_list"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0]"),
        ({"stream": "yes"}, "stream"),
        ({"uuid_str": "../other"}, "uuid_str"),
        ({"files": "QA.txt"}, "files"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"lang": "fr"}, "lang"),
        ({"use_knowlege": True}, "did you mean use_knowledge?"),
        ({"files": ["QA.md"]}, "use_knowledge"),
        ({"use_knowledge": True, "uuid_str": None}, "uuid_str"),
        ({"llm_config": {"model": None}}, "llm_config.model"),
        ({"llm_config": {"temperature": 0.5}}, "generate_config"),
        ({"history": []}, "history"),
        ({"agent_config": {"tools": [{"RenewInstance": {"a": 1}}]}}, "RenewInstance"),
        ({"tools": [{"RenewInstance": {"a": 1}}]}, "tools[0]"),
    ],
)
def test_bad_request_for_an_agent_is_told_what_is_wrong(assistant, upstream, more, words):
    refused(assistant.lite(**more), 400, words)
    assert upstream.seen() == []


@pytest.mark.parametrize("name", ["self", "query", "history", "ref_doc", "params"])
def test_field_that_would_be_an_argument_of_ours_is_refused(assistant, name):
    body = {"messages": [{"role": "user", "content": "x"}], "llm_config": {"model": "m"}, name: 1}
    refused(ask(assistant.port, body, path="/v1/assistants/lite"), 400, name)


def test_own_tools_run_in_processes_of_their_own(tmp_path, upstream):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "leave.py").write_text("import os\n\ndef leave() -> str:\n    'Leave.'\n    os._exit(3)\n")
    upstream.script(streams("Action: leave\nAction Input: {}\n"), streams("It failed."))
    with assisting(tmp_path, upstream, tool_dir=str(tmp_path / "tools")) as assistant:
        text = assistant.response("leave", agent_config={"tools": ["leave"]})
    assert "Observation: <result>the tool leave failed" in text and text.endswith("Answer:It failed.")


def test_no_further_tool_is_called_for_a_client_that_has_hung_up(tmp_path, upstream):
    (tmp_path / "tools").mkdir()
    calls, go = tmp_path / "calls", tmp_path / "go"
    (tmp_path / "tools" / "hold.py").write_text(
        "import os, time\n\ndef hold() -> str:\n    'Hold.'\n"
        "    with open(%r, 'a') as file:\n        file.write('called\\n')\n"
        "    while not os.path.exists(%r):\n        time.sleep(0.01)\n    return 'held'\n" % (str(calls), str(go))
    )
    upstream.script(streams("Action: hold\nAction Input: {}\n" * 2))
    with assisting(tmp_path, upstream, tool_dir=str(tmp_path / "tools")) as assistant:
        body = {"messages": [{"role": "user", "content": "x"}], "llm_config": {"model": "m"}}
        body["agent_config"] = {"tools": ["hold"]}
        with contextlib.closing(_connection(assistant)) as connection:
            connection.request("POST", "/v1/assistants/lite", json.dumps(body), {"Content-Type": "application/json"})
            wait_until(calls.exists)
        go.touch()
        wait_until(lambda: any(" 499 " in line for line in assistant.logged))
    assert calls.read_text() == "called\n"


def test_tool_that_takes_long_to_load_holds_up_no_other(tmp_path, upstream):
    (tmp_path / "tools").mkdir()
    loading, go = tmp_path / "loading", tmp_path / "go"
    (tmp_path / "tools" / "slow.py").write_text(
        "import os, time\nopen(%r, 'w').close()\nwhile not os.path.exists(%r):\n    time.sleep(0.01)\n\n\n"
        "def slow() -> str:\n    'Slow.'\n    return 'slow'\n" % (str(loading), str(go))
    )
    upstream.script(streams("first"), streams("second"))
    with assisting(tmp_path, upstream, tool_dir=str(tmp_path / "tools")) as assistant:
        call = Later(lambda: assistant.response(agent_config={"tools": ["slow"]}))
        wait_until(loading.exists)
        assert assistant.response(agent_config={"tools": ["RenewInstance"]}) == "first"
        go.touch()
        assert call.result() == "second"


def test_own_tools_see_what_they_are_given_of_the_environment(tmp_path, upstream, monkeypatch):
    for name in ("ASSISTANT_API_KEY", "ASSISTANT_UPSTREAM_API_KEY", "TOOL_MANAGER_AUTH", "SECRET"):
        monkeypatch.setenv(name, "key-of-a-server")
    monkeypatch.setenv("AMAP_TOKEN", "key-of-the-tool")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "show.py").write_text(
        "import os\n\ndef show() -> str:\n    'Show.'\n    return str(sorted(os.environ.items()))\n"
    )
    upstream.script(streams("Action: show\nAction Input: {}\n"), streams("ok"))
    with assisting(tmp_path, upstream, tool_dir=str(tmp_path / "tools"), tool_env=("AMAP_TOKEN",)) as assistant:
        text = assistant.response("show", agent_config={"tools": ["show"]})
    assert "key-of-the-tool" in text and "key-of-a-server" not in text


def test_tools_of_the_tool_manager_are_called_through_it(tmp_path, upstream):
    text = 'Action: RenewInstance\nAction Input: {"instance_id": "7"}'
    upstream.script(streams(text), streams("done"), streams(text), streams("done"))
    more = {"agent_config": {"tools": ["RenewInstance"]}, "use_tool_api": True}
    with managing(tmp_path / "manager", FakeRuntime(), api_key="key-of-the-manager") as manager:
        assistant = Assistant(tmp_path / "data", upstream, tool_manager_url=manager.url, tenant_id="ann")
        assistant.server.start()
        with contextlib.closing(contextlib.ExitStack()) as ends:
            ends.callback(assistant.server.stop)
            got = refused(assistant.lite("renew", **more), 502, "asks for its API key")
            assert got.json()["message"].startswith("the tool manager at %s: " % manager.url)
            with mock.patch.dict(os.environ, TOOL_MANAGER_AUTH="key-of-the-manager"):
                whole = assistant.response("renew", **more)
        assert "<result>" in whole and whole.endswith("Answer:done")
        assert manager.node("RenewInstance", "ann").status == "running"


# Uploads and knowledge ----------------------------------------------------------------------------------------------

QA = "# 高德天气API申请\n\n在高德开放平台注册账号，然后在控制台创建应用，即可获得API的Key。\n".encode()


def test_uploaded_file_is_found_and_shown_to_the_model_with_its_name(assistant, upstream):
    got = assistant.upload(QA_md=QA)
    assert got.status == 200, got.body
    assert got.json()["output"] == {"status": "upload files success", "files": ["QA.md"]}
    upstream.script(streams("在控制台创建应用。"))
    assistant.response("高德天气API申请", use_knowledge=True, files=["QA.md"])
    system = sent(upstream)["messages"][0]["content"]
    assert "QA.md" in system and "在控制台创建应用" in system


def test_users_files_never_mix(assistant, upstream):
    assistant.upload("ann", QA_md=QA)
    assistant.upload("bob", notes_txt=b"The wifi password is on the fridge.")
    refused(assistant.lite("高德天气API申请", use_knowledge=True, uuid_str="bob"), 400, "No valid knowledge contents.")
    got = assistant.lite("高德天气API申请", use_knowledge=True, uuid_str="bob", files=["QA.md"])
    refused(got, 400, "bob has no file")
    assert upstream.seen() == []


def test_knowledge_is_limited_to_the_files_asked_for_and_to_its_length(tmp_path, upstream):
    upstream.script(streams("a"), streams("b"))
    with assisting(tmp_path, upstream, knowledge_limit=300) as assistant:
        assistant.upload(cats_txt=b"Cats sleep a lot. " * 50, dogs_txt=b"Cats and dogs sleep, too. " * 50)
        for name, other in (("cats.txt", "dogs.txt"), ("dogs.txt", "cats.txt")):
            assistant.response("How do cats sleep?", use_knowledge=True, files=[name])
            system = sent(upstream)["messages"][0]["content"]
            assert name in system and other not in system
            assert len(system) < 800


def test_file_that_cannot_be_read_is_refused_by_name_and_the_others_are_taken(assistant):
    got = assistant.upload(QA_md=QA, pic_png=b"\x89PNG").json()
    assert got["output"]["files"] == ["QA.md"]
    assert "pic.png" in got["message"]
    refused(assistant.upload(pic_png=b"\x89PNG"), 400, "pic.png")


def test_equal_file_is_not_stored_twice_and_another_of_its_name_replaces_it(assistant, upstream):
    for _ in range(2):
        assert assistant.upload(QA_md=QA).json()["output"]["files"] == ["QA.md"]
    assistant.upload(QA_md=b"Bananas are yellow.")
    refused(assistant.lite("高德天气API申请", use_knowledge=True), 400, "No valid knowledge contents.")
    upstream.script(streams("yellow"))
    assistant.response("What colour are bananas?", use_knowledge=True)
    assert sent(upstream)["messages"][0]["content"].count("Bananas are yellow") == 1


def test_upload_without_a_uuid_is_told_so(assistant):
    body, kind = form({}, {"QA.md": QA})
    refused(ask(assistant.port, body, path="/v1/files", headers=[("Content-Type", kind)]), 400, "uuid_str is missing")


@pytest.mark.parametrize("uuid_str", ["", "../other", "a/b", "x" * 65])
def test_uuid_that_is_no_name_is_refused(assistant, uuid_str):
    refused(assistant.upload(uuid_str, QA_md=QA), 400, "uuid_str")
    assert os.listdir(os.path.join(assistant.data_dir, "knowledge", "uploads")) == []


def test_upload_beyond_its_limits_is_refused_and_leaves_nothing(tmp_path, upstream):
    limits = {"max_file_bytes": 1000, "max_files": 2, "max_user_files": 3}
    with assisting(tmp_path, upstream, **limits) as assistant:
        refused(assistant.upload(big_txt=b"x" * 1001), 413, "big.txt")
        refused(assistant.upload(a_txt=b"a", b_txt=b"b", c_txt=b"c"), 413, "2")
        assert assistant.upload(a_txt=b"alpha", b_txt=b"beta").status == 200
        got = assistant.upload(c_txt=b"gamma", d_txt=b"delta").json()
        assert got["output"]["files"] == ["c.txt"] and "d.txt" in got["message"]
        assert os.listdir(os.path.join(assistant.data_dir, "knowledge", "uploads")) == []


def test_upload_that_waits_too_long_for_others_is_told_to_come_again(assistant, monkeypatch):
    monkeypatch.setattr(rock_sdk, "INDEXING_SECONDS", 0.01)
    indexing = assistant.server.service._indexing
    for _ in range(rock_sdk.PARALLEL_INDEXING):
        indexing.acquire()
    refused(assistant.upload(QA_md=QA), 503, "try again")
    indexing.release()
    assert [assistant.upload(QA_md=QA).status for _ in range(2)] == [200, 200]
    indexing.release()


def test_gigabyte_is_refused_before_it_is_sent(assistant):
    head = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    with socket.create_connection(("127.0.0.1", assistant.port), TIMEOUT) as sock:
        sock.sendall(head + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % (40 * 1024**3))
        assert sock.recv(100).startswith(b"HTTP/1.1 413")


def test_knowledge_outlives_the_assistant(tmp_path, upstream):
    with assisting(tmp_path, upstream) as assistant:
        assistant.upload(QA_md=QA)
    upstream.script(streams("ok"))
    with assisting(tmp_path, upstream) as assistant:
        assistant.response("高德天气API申请", use_knowledge=True)
    assert "控制台" in sent(upstream)["messages"][0]["content"]


# Its end ------------------------------------------------------------------------------------------------------------


def test_stop_ends_a_call_that_waits_for_another_attempt(tmp_path, upstream):
    upstream.script(answer({"error": "busy"}, 500))
    with assisting(tmp_path, upstream, max_attempts=2, retry_delay_seconds=60.0) as assistant:
        call = Later(assistant.chat)
        wait_until(lambda: any("the next one in" in line for line in assistant.logged))
    refused(call.result(), 503, "stopping")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model_server": "nobody"}, "model server nobody"),
        ({"vllm_args": ("--x",)}, "--model PATH"),
        ({"model": "w", "model_server": "openai"}, "--model-server openai"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(rock_ms.UsageError, match=words):
        rock_sdk.AssistantSettings(**settings).check()
