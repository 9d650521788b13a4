"""The `openai` package against the assistant, as the agent servers' documentation shows it."""

import openai
import pytest

from assistants import ACTION, WEATHER, assisting, letters, says, streams
from upstream import answer


@pytest.fixture
def client(tmp_path, upstream):
    with assisting(tmp_path, upstream) as assistant:
        options = {"api_key": "empty", "max_retries": 0, "timeout": 30}
        with openai.OpenAI(base_url=assistant.url + "/v1/", **options) as client:
            yield client


def create(client, query="海淀区天气是什么？", **more):
    messages = query if isinstance(query, list) else [{"role": "user", "content": query}]
    return client.chat.completions.create(messages=messages, model="qwen-max", tools=[WEATHER], **more)


def test_example_of_the_documentation(client, upstream):
    upstream.script(says(ACTION % "海淀区"))
    choice = create(client, tool_choice="auto").choices[0]
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "amap_weather")
    assert call.function.arguments == '{"location": "海淀区"}'
    assert choice.finish_reason == "tool_calls" and call.id


@pytest.mark.parametrize("is_parallel, places", [(True, ["北京", "上海"]), (False, ["北京"])])
def test_streamed_calls(client, upstream, is_parallel, places):
    upstream.script(letters("好的。\n" + ACTION % "北京" + ACTION % "上海"))
    text, calls, reasons = "", {}, []
    options = {"stream_options": {"include_usage": True}}
    for chunk in create(client, stream=True, parallel_tool_calls=is_parallel, **options):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for part in choice.delta.tool_calls or ():
                call = calls.setdefault(part.index, ["", "", ""])
                for number, more in enumerate((part.id, part.function.name, part.function.arguments)):
                    call[number] += more or ""
    assert (text.strip(), reasons) == ("好的。", ["tool_calls"])
    assert [call[1:] for call in calls.values()] == [["amap_weather", '{"location": "%s"}' % place] for place in places]
    assert all(call[0].startswith("call_") for call in calls.values())


def test_helper_that_puts_a_stream_together_agrees(client, upstream):
    upstream.script(streams("好的。\n" + ACTION % "北京"))
    messages = [{"role": "user", "content": "天气"}]
    tool = {"type": "function", "function": {**WEATHER["function"], "parameters": {"type": "object", "properties": {}}}}
    with client.chat.completions.stream(messages=messages, model="m", tools=[tool]) as stream:
        whole = stream.get_final_completion()
    assert whole.choices[0].message.tool_calls[0].function.arguments == '{"location": "北京"}'
    assert whole.choices[0].finish_reason == "tool_calls"


def test_conversation_goes_on_with_the_answers_message(client, upstream):
    upstream.script(says(ACTION % "北京"), says("北京晴。"))
    message = create(client).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "晴"}
    history = [{"role": "user", "content": "北京天气"}, message, result]
    assert create(client, history).choices[0].message.content == "北京晴。"


def test_errors_are_the_clients_own(client, upstream):
    upstream.script(answer({"error": {"message": "no such key"}}, 401))
    with pytest.raises(openai.AuthenticationError, match="no such key"):
        create(client)
    with pytest.raises(openai.BadRequestError, match="tool_choice"):
        create(client, tool_choice="always")
