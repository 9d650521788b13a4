"""A whole answer as the stream that a client would have seen."""

import pytest

from rock_ms import completion_chunks, error_status
from support import chat, completion


def deltas(answer, request=None):
    chunks = completion_chunks(answer, request or chat(), 7, 1000.0)
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"]]


def call(name="f", arguments="{}", **more):
    return {"id": "call_x", "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def test_every_chunk_carries_what_identifies_the_completion():
    answer = {**completion(), "system_fingerprint": "fp"}
    for chunk in completion_chunks(answer, chat(), 7, 1000.0):
        common = {key: chunk[key] for key in ("id", "created", "model", "object", "system_fingerprint")}
        kind = "chat.completion.chunk"
        assert common == {"id": "c1", "created": 1, "model": "m", "object": kind, "system_fingerprint": "fp"}


def test_what_is_missing_is_filled_in():
    chunks = completion_chunks({"choices": [{"message": {"content": "x"}}]}, chat(), 7, 1000.5)
    assert {(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks} == {("chatcmpl-7", 1000, "m")}
    assert chunks[0]["choices"][0] == {"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop"}


def test_parallel_tool_calls_are_numbered_and_keep_vendor_fields():
    calls = [call("a", '{"x":1}'), call("b", {"y": 2}, vendor=3), {"function": {"name": "c"}}]
    answer = {"choices": [{"message": {"content": None, "tool_calls": calls}}]}
    got = [delta["tool_calls"] for delta in deltas(answer) if "tool_calls" in delta]
    assert [len(part) for part in got] == [1, 1, 1]
    first, second, third = (part[0] for part in got)
    assert first == {**calls[0], "index": 0}
    assert second == {**call("b", '{"y":2}', vendor=3), "index": 1}
    assert third == {"index": 2, "id": "call_7_0_2", "type": "function", "function": {"name": "c"}}
    assert completion_chunks(answer, chat(), 7, 0)[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_reasoning_comes_before_content_and_other_fields_after():
    got = deltas(completion("text", reasoning_content="why", refusal="no", vendor={"a": 1}, audio=None))
    assert got == [
        {"role": "assistant"},
        {"reasoning_content": "why"},
        {"content": "text"},
        {"refusal": "no", "vendor": {"a": 1}},
        {},
    ]


def test_several_choices_keep_their_numbers_and_logprobs():
    choices = [{"index": 1, "message": {"content": "b"}, "logprobs": {"content": []}}, {"message": {"content": "c"}}]
    chunks = completion_chunks({"choices": choices}, chat(), 1, 0)
    parts = [chunk["choices"][0] for chunk in chunks]
    assert [(part["index"], part["delta"].get("content")) for part in parts if "content" in part["delta"]] == [
        (1, "b"),
        (1, "c"),
    ]
    assert [part["logprobs"] for part in parts if "logprobs" in part] == [{"content": []}]


def test_vendor_fields_of_the_answer_come_once():
    chunks = completion_chunks({**completion(), "prompt_token_ids": [1]}, chat(), 1, 0)
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [[1]] + [None] * (len(chunks) - 1)


@pytest.mark.parametrize("options, comes", [({"include_usage": True}, True), ({"include_usage": False}, False)])
def test_usage_comes_last_when_it_was_asked_for(options, comes):
    chunks = completion_chunks(completion(), chat(stream_options=options), 1, 0)
    assert ("usage" in chunks[-1]) == comes
    assert all("usage" not in chunk for chunk in chunks[:-1])
    answer = {key: value for key, value in completion().items() if key != "usage"}
    assert all("usage" not in chunk for chunk in completion_chunks(answer, chat(stream_options=options), 1, 0))


def test_bare_message_and_legacy_text_will_do():
    assert {"content": "mock"} in deltas({"content": "mock", "usage": {}})
    assert {"content": "old"} in deltas({"choices": [{"text": "old"}]})


NO_COMPLETIONS = [
    {},
    {"choices": []},
    {"choices": None},
    {"choices": ["x"]},
    {"choices": {"0": {}}},
    {"choices": [{"message": "x"}]},
    {"choices": [{"message": {"tool_calls": "x"}}]},
    {"choices": [{"message": {"tool_calls": ["x"]}}]},
]


@pytest.mark.parametrize("answer", NO_COMPLETIONS)
def test_what_is_no_completion_is_refused(answer):
    with pytest.raises(ValueError, match="choices|tool_calls"):
        completion_chunks(answer, chat(), 1, 0)


@pytest.mark.parametrize(
    "answer, status",
    [
        (completion(), None),
        ({"content": "x"}, None),
        ({"error": None}, None),
        ({"error": {}}, None),
        ({"error": {"status": 422, "code": 400}}, 422),
        ({"error": {"code": "429"}}, 429),
        ({"error": {"code": 200}}, 500),
        ({"error": {"type": "authentication_error"}}, 401),
        ({"error": {"code": ["x"], "type": {}}}, 500),
        ({"error": {"message": "m"}, "choices": []}, None),
    ],
)
def test_status_of_an_error_answer(answer, status):
    assert error_status(answer) == status
