"""Each request of the agent servers' documentation, *Assistant Service*, as it is printed there, and its answer."""

import json

import pytest

from assistants import ACTION, added_up, assisting, form, says, streams
from support import ask

TOOLS = """[{
        "type": "function",
        "function": {
            "name": "amap_weather",
            "description": "amap weather tool",
            "parameters": [{
                "name": "location",
                "type": "string",
                "description": "城市/区具体名称，如`北京市海淀区`请描述为`海淀区`",
                "required": true
            }]
        }
    }]"""
CHAT = """{
    "tools": %s,
    "tool_choice": "auto",
    "model": "%s",
    "messages": [
        {"content": "%s", "role": "user"}
    ]
}"""
NOT_PARALLEL = """{
    "tools": %s,
    "model": "Qwen2-7B-Instruct",
    "messages": [
        {"content": "请同时调用工具查找北京和上海的天气", "role": "user"}
    ],
    "parallel_tool_calls": false
}"""
BOTH = "请同时调用工具查找北京和上海的天气"
SAID = "好的，我已经调用了amap_weather工具查询了海淀区的天气情况。现在，让我为您展示一下查询结果吧。\n\n工具调用\n"
REQUESTS = {
    "one call": (CHAT % (TOOLS, "qwen-max", "海淀区天气"), ACTION % "海淀区", ["海淀区"]),
    "parallel calls": (
        CHAT % (TOOLS, "qwen-max", BOTH),
        ACTION % "北京" + ACTION % "上海" + "\n",
        ["北京", "上海"],
    ),
    "not parallel": (NOT_PARALLEL % TOOLS, ACTION % "北京", ["北京"]),
    "text before a call": (CHAT % (TOOLS, "Qwen2-1.5B-Instruct", "海淀区天气"), SAID + ACTION % "海淀区", ["海淀区"]),
}
LITE = {
    "agent_config": {"name": "test", "description": "test assistant", "instruction": "you are a helpful assistant"},
    "llm_config": {"model": "qwen-max", "model_server": "dashscope", "api_key": None},
    "messages": [{"content": "高德天气API申请", "role": "user"}],
    "uuid_str": "test",
}


@pytest.fixture
def assistant(tmp_path, upstream):
    with assisting(tmp_path, upstream) as assistant:
        yield assistant


@pytest.mark.parametrize("name", REQUESTS)
def test_request_of_the_documentation_has_the_answer_that_is_printed(assistant, upstream, name):
    body, content, places = REQUESTS[name]
    upstream.script(says(content + "Action: amap_weather\nAction Input: {}" * (name == "not parallel")))
    got = ask(assistant.port, body.encode("utf-8"), headers=[("Authorization", "Bearer ")]).json()
    assert set(got) == {
        *("request_id", "message", "output", "id", "choices", "created", "model", "system_fingerprint", "object"),
        "usage",
    }
    (choice,) = got["choices"]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "tool_calls", "assistant")
    assert choice["message"]["content"] == content
    calls = [{key: call[key] for key in ("type", "function")} for call in choice["message"]["tool_calls"]]
    assert calls == [
        {"type": "function", "function": {"name": "amap_weather", "arguments": '{"location": "%s"}' % place}}
        for place in places
    ]
    assert set(got["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_same_request_streams(assistant, upstream, name):
    body, content, places = REQUESTS[name]
    upstream.script(streams(*content))
    value = json.loads(body)
    text, calls, reason = added_up(assistant.chat_stream(value.pop("messages"), **value))
    assert [arguments for _, arguments in calls] == ['{"location": "%s"}' % place for place in places]
    assert (reason, text.strip()) == ("tool_calls", content.partition("Action:")[0].strip())


def test_file_is_uploaded_and_asked_about(assistant, upstream):
    body, kind = form({"uuid_str": "test"}, {"ms.txt": "高德天气API申请：在控制台创建应用。".encode()})
    got = ask(assistant.port, body, path="/v1/files", headers=[("Content-Type", kind)])
    assert set(got.json()) == {"request_id", "message", "output"}
    upstream.script(streams("在控制台", "创建应用"), streams("在控制台\n", "创建应用"))
    whole = ask(assistant.port, {**LITE, "use_knowledge": True, "files": ["ms.txt"]}, path="/v1/assistants/lite")
    assert set(whole.json()) == {"request_id", "message", "output"}
    assert whole.json()["output"] == {"response": "在控制台创建应用"}
    value = {**LITE, "stream": True, "use_knowledge": True}
    lines = ask(assistant.port, value, path="/v1/assistants/lite").body.decode("utf-8").splitlines()
    assert lines == ["在控制台", "创建应用"]
