"""Events, completions made of them, and bodies as they come in pieces: no sockets here."""

import contextlib
import gzip
import json
import random
import re
import zlib

import pytest

import rock_ms
from rock_ms import (
    ChunkedBody,
    CompletionEvents,
    EventParser,
    GzipBody,
    LengthBody,
    OtherEvents,
    ProtocolError,
    RecordedAnswer,
    ResponseHead,
    Secrets,
    UnboundedBody,
    completion_chunks,
    end_to_end,
    error_message,
    parse_response_head,
)

BOM = b"\xef\xbb\xbf"


def bytewise(data):
    return [data[at : at + 1] for at in range(len(data))]


def random_pieces(rng, data):
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(6)))
    return [data[start:end] for start, end in zip([0] + cuts, cuts + [len(data)])]


# ----------------------------------------------------------------------------------------------------------------------
# Splitting a stream into events.
# ----------------------------------------------------------------------------------------------------------------------


def parsed(*pieces):
    parser = EventParser()
    return [event for piece in pieces for event in parser.feed(piece)] + parser.end()


STREAMS = {
    "nothing": (b"", []),
    "LF": (b"data: a\n\ndata: b\n\n", [("", "a"), ("", "b")]),
    "CRLF": (b"data: a\r\n\r\ndata: b\r\n\r\n", [("", "a"), ("", "b")]),
    "CR": (b"data: a\r\rdata: b\r\r", [("", "a"), ("", "b")]),
    "mixed line ends": (b"data: a\r\n\ndata: b\n\r\ndata: c\r\r\ndata: d\n\rdata: e\r\r", [("", c) for c in "abcde"]),
    "comments": (b": hi\n\n:\n\ndata: a\n: in between\ndata: b\n\n:\n", [("", "a\nb")]),
    "several data lines": (b"data: a\ndata: b\ndata:\ndata: c\n\n", [("", "a\nb\n\nc")]),
    "no space": (b"data:a\n\ndata:  b\n\n", [("", "a"), ("", " b")]),
    "tab is no space": (b"data:\ta\n\n", [("", "\ta")]),
    "name": (b"event: start\ndata: a\n\ndata: b\n\n", [("start", "a"), ("", "b")]),
    "name behind the data": (b"data: a\nevent:start\n\n", [("start", "a")]),
    "last name counts": (b"event: a\nevent: b\ndata: c\n\n", [("b", "c")]),
    "name without data is no event": (b"event: start\n\ndata: a\n\n", [("", "a")]),
    "other fields": (b"id: 1\nretry: 10\nwhatever: x\ndata: a\nid\n\n", [("", "a")]),
    "fields are told apart by case and by space": (b"Data: x\ndata : y\n data: z\ndata: a\n\n", [("", "a")]),
    "colons": (b'data: {"a": "b:c"}\n\n', [("", '{"a": "b:c"}')]),
    "empty data": (b"data\n\ndata:\n\ndata: \n\n", [("", "")] * 3),
    "empty lines": (b"\n\n\n\ndata: a\n\n\n\n\ndata: b\n\n\n", [("", "a"), ("", "b")]),
    "no empty line at the end": (b"data: a\n\ndata: b\n", [("", "a"), ("", "b")]),
    "no line end at the end": (b"data: a\n\nevent: x\ndata: b", [("", "a"), ("x", "b")]),
    "CR at the end": (b"data: a\r", [("", "a")]),
    "byte order mark": (BOM + b"data: a\n\ndata: b\n\n", [("", "a"), ("", "b")]),
    "byte order mark in the data": (
        b"data: " + BOM + b"a\n\ndata:" + BOM + b"b\n\n",
        [("", "\ufeffa"), ("", "\ufeffb")],
    ),
    "characters of many bytes": (
        "data: é€😀\n\nevent: ü\ndata: 日\ndata: 本\n\n".encode("utf-8"),
        [("", "é€😀"), ("ü", "日\n本")],
    ),
    "other line ends are data": (
        "data: a\x0b\x0c\x85\u2028\u2029b\n\n".encode("utf-8"),
        [("", "a\x0b\x0c\x85\u2028\u2029b")],
    ),
    "not UTF-8": (b"data: a\xffb\n\ndata: c\xe2\x82\n\n", [("", "a\ufffdb"), ("", "c\ufffd")]),
    "NUL": (b"data: a\0b\n\n", [("", "a\0b")]),
}


@pytest.mark.parametrize("data, events", STREAMS.values(), ids=list(STREAMS))
def test_stream_gives_the_same_events_however_it_is_cut(data, events):
    assert parsed(data) == events
    assert parsed(*bytewise(data)) == events
    for cut in range(len(data) + 1):
        assert parsed(data[:cut], data[cut:]) == events, cut
        assert parsed(data[:cut], b"", data[cut:]) == events, cut


def test_event_is_given_as_soon_as_its_empty_line_has_come():
    parser = EventParser()
    assert parser.feed(b"data: a\n") == []
    assert parser.feed(b"\ndata: b") == [("", "a")]
    assert parser.feed(b"\r\n\r\n") == [("", "b")]
    assert parser.end() == parser.end() == []


def naive_events(data):
    """The rules of the HTML standard, line by line; but what lacks its empty line at the end counts."""
    text = data.decode("utf-8", "replace")
    found, name, values = [], "", []
    for line in re.split("\r\n|\r|\n", text[1:] if text[:1] == "\ufeff" else text) + [""]:
        key, _, value = line.partition(":")
        value = value[1:] if value[:1] == " " else value
        if key == "data":
            values.append(value)
        elif key == "event":
            name = value
        elif not line:
            found += [(name, "\n".join(values))] if values else []
            name, values = "", []
    return found


FRAGMENTS = [b"data", b"data:", b"data: ", b"event: ", b"id", b": ", b":", b" ", b"x", b"\0", b"\xff", b"\xe2\x82"]
FRAGMENTS += [b"\n", b"\n\n", b"\r", b"\r\n", b"\r\n\r\n", b"\r\r"] * 2 + ["é€😀\u2028\x85".encode("utf-8")]


@pytest.mark.parametrize("seed", range(4))
def test_random_streams_are_read_as_the_standard_says(seed):
    rng = random.Random(seed)
    for _ in range(1000):
        data = rng.choice([b"", b"", BOM]) + b"".join(rng.choice(FRAGMENTS) for _ in range(rng.randrange(25)))
        expected = naive_events(data)
        assert parsed(*random_pieces(rng, data)) == expected, data
        assert parsed(*bytewise(data)) == expected, data


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_very_long_event_is_not_searched_again_and_again(end):
    class Counted(bytearray):
        searched = 0

        def rfind(self, what, start=0):
            Counted.searched += len(self) - start
            return super().rfind(what, start)

    parser, data = EventParser(), b"data: " + b"x" * 5000000 + end
    parser._buffer = Counted()
    events = [event for at in range(0, len(data), 4096) for event in parser.feed(data[at : at + 4096])]
    assert events == [("", "x" * 5000000)]
    assert len(data) - 4 <= Counted.searched < 1.1 * len(data)


# ----------------------------------------------------------------------------------------------------------------------
# Adding up a completion.
# ----------------------------------------------------------------------------------------------------------------------


def summed(chunks):
    """CompletionEvents that took some chunks: values, or texts as they came."""
    events = CompletionEvents()
    for chunk in chunks:
        events.add("", chunk if isinstance(chunk, str) else json.dumps(chunk))
    return events


def part(index=0, finish=None, more=None, **delta):
    """A chunk with one choice."""
    return {"choices": [{"index": index, "delta": delta, "finish_reason": finish, **(more or {})}]}


def choice(index=0, finish=None, more=None, **message):
    return {"index": index, "message": {"role": "assistant", **message}, "finish_reason": finish, **(more or {})}


def call(arguments=None, name=None, **more):
    """A piece of a tool call, or a whole one."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return {**more, **({"function": function} if function else {})}


def calls(*pieces):
    return part(tool_calls=list(pieces))


def function(id, name, arguments, **more):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}, **more}


TWO_CALLS = {"choices": [choice(tool_calls=[function("a", "f", '{"x":1}'), function("b", "g", '{"y":2}')])]}


def logprob(token, **more):
    return {"token": token, "logprob": -0.5, "bytes": [1, 2], "top_logprobs": [{"token": token, "bytes": None}], **more}


COMPLETIONS = {
    "content": (
        [part(role="assistant", content=""), part(content="Hel"), part(content="lo"), part(finish="stop")],
        {"choices": [choice(finish="stop", content="Hello")]},
    ),
    "null content": (
        [part(role="assistant", content=None), part(finish="stop")],
        {"choices": [choice(0, "stop", content=None)]},
    ),
    "null says nothing": (
        [part(content="a"), part(content=None), part(content="b")],
        {"choices": [choice(content="ab")]},
    ),
    "role is whole": (
        [part(role="assistant", content="a"), part(role="assistant", content="b"), part(role="", content="c")],
        {"choices": [choice(content="abc")]},
    ),
    "another role": (
        [part(role="tool", content="a")],
        {"choices": [{**choice(), "message": {"role": "tool", "content": "a"}}]},
    ),
    "reasoning and refusal": (
        [part(reasoning_content="wh"), part(reasoning_content="y", content="a"), part(refusal="n"), part(refusal="o")],
        {"choices": [choice(reasoning_content="why", content="a", refusal="no")]},
    ),
    "parallel tool calls, interleaved": (
        [
            calls(call("", "f", index=0, id="a", type="function")),
            calls(call("", "g", index=1, id="b", type="function")),
            calls(call('{"x"', index=0), call('{"y"', index=1)),
            calls(call(":2}", index=1)),
            calls(call(":1}", index=0)),
        ],
        TWO_CALLS,
    ),
    "tool calls without index": (
        [
            calls(call('{"x"', "f", id="a", type="function")),
            calls(call(":1}")),
            calls(call('{"y":2}', "g", id="b", type="function")),
        ],
        TWO_CALLS,
    ),
    "tool calls all with index 0": (
        [
            calls(call('{"x":', "f", index=0, id="a", type="function")),
            calls(call("1}", index=0)),
            calls(call('{"y":', "g", index=0, id="b", type="function")),
            calls(call("2", index=0)),
            calls(call("}", index=0, id="b")),
        ],
        TWO_CALLS,
    ),
    "ids, types and names in every piece": (
        [
            calls(call("{", "f", index=0, id="a", type="function")),
            calls(call('"x":1}', "f", index=0, id="a", type="function")),
            calls(call("{", "g", index=1, id="b", type="function")),
            calls(call('"y":2}', "g", index=1, id="b", type="function")),
        ],
        TWO_CALLS,
    ),
    "empty ids after the first": (
        [calls(call("{", "f", index=0, id="a", type="function")), calls(call("}", index=0, id="", type=None))],
        {"choices": [choice(tool_calls=[function("a", "f", "{}")])]},
    ),
    "id that comes late": (
        [calls(call("{", "f", index=0)), calls(call("}", index=0, id="a", type="function"))],
        {"choices": [choice(tool_calls=[function("a", "f", "{}")])]},
    ),
    "name in pieces": (
        [calls(call("", "get_", index=0, id="a", type="function")), calls(call("{}", "weather", index=0))],
        {"choices": [choice(tool_calls=[function("a", "get_weather", "{}")])]},
    ),
    "same pieces of arguments twice": (
        [calls(call("1", "f", index=0, id="a", type="function")), calls(call("1", index=0)), calls(call("1", index=0))],
        {"choices": [choice(tool_calls=[function("a", "f", "111")])]},
    ),
    "tool call of a vendor": (
        [calls(call(index=0, id="a", type="custom", custom={"name": "n", "input": "x"}, vendor={"k": [1]}))]
        + [calls(call(index=0, custom={"input": "y"}))],
        {
            "choices": [
                choice(
                    tool_calls=[
                        {"id": "a", "type": "custom", "custom": {"name": "n", "input": "xy"}, "vendor": {"k": [1]}}
                    ]
                )
            ]
        },
    ),
    "function_call": (
        [part(function_call={"name": "f", "arguments": ""}), part(function_call={"arguments": "{"})]
        + [part(function_call={"arguments": "}"}), part(finish="function_call")],
        {"choices": [choice(finish="function_call", function_call={"name": "f", "arguments": "{}"})]},
    ),
    "choices, interleaved": (
        [part(1, content="B"), part(0, content="A"), part(1, content="b"), part(0, "stop"), part(1, "length")],
        {"choices": [choice(0, "stop", content="A"), choice(1, "length", content="Bb")]},
    ),
    "choices in one chunk": (
        [{"choices": part(0, content="A")["choices"] + part(2, content="C")["choices"]}, part(2, content="c")],
        {"choices": [choice(0, content="A"), choice(2, content="Cc")]},
    ),
    "choices without index": (
        [
            {"choices": [{"delta": {"content": "A"}}, {"delta": {"content": "B"}}]},
            {"choices": [{"delta": {"content": "a"}}]},
        ],
        {"choices": [choice(0, content="Aa"), choice(1, content="B")]},
    ),
    "logprobs": (
        [
            part(content="a", more={"logprobs": {"content": [logprob("a")], "refusal": None}}),
            part(content="bc", more={"logprobs": {"content": [logprob("b"), logprob("c")], "refusal": None}}),
            part(finish="stop", more={"logprobs": None}),
        ],
        {
            "choices": [
                choice(
                    0, "stop", {"logprobs": {"content": [logprob(c) for c in "abc"], "refusal": None}}, content="abc"
                )
            ]
        },
    ),
    "null logprobs": (
        [part(content="a", more={"logprobs": None})],
        {"choices": [choice(0, None, {"logprobs": None}, content="a")]},
    ),
    "token ids and stop reason": (
        [part(content="a", more={"token_ids": [1, 2]}), part(0, "stop", {"token_ids": [2], "stop_reason": "x"})]
        + [part(more={"stop_reason": 7})],
        {"choices": [choice(0, "stop", {"token_ids": [1, 2, 2], "stop_reason": 7}, content="a")]},
    ),
    "usage in the last chunk": (
        [{**part(content="a"), "usage": None}, {"choices": [], "usage": {"total_tokens": 3}}],
        {"usage": {"total_tokens": 3}, "choices": [choice(content="a")]},
    ),
    "usage in every chunk": (
        [{**part(content="a"), "usage": {"total_tokens": 1}}, {**part(), "usage": {"total_tokens": 2}}],
        {"usage": {"total_tokens": 2}, "choices": [choice(content="a")]},
    ),
    "fields of the chunk": (
        [
            {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", **part(content="a")},
            {"id": "c", "object": "chat.completion.chunk", "model": "m2", "system_fingerprint": "fp", **part()},
            {"id": None, "vendor": {"a": [1]}, "prompt_token_ids": [1], **part(content="b")},
        ],
        {
            "id": "c",
            "object": "chat.completion",
            "created": 1,
            "model": "m2",
            "system_fingerprint": "fp",
            "vendor": {"a": [1]},
            "prompt_token_ids": [1],
            "choices": [choice(content="ab")],
        },
    ),
    "content in parts, then a text": (
        [
            part(content=[{"type": "thinking", "thinking": "hm"}]),
            part(content="a"),
            part(content=[{"type": "text", "text": "b"}]),
        ],
        {
            "choices": [
                choice(
                    content=[
                        {"type": "thinking", "thinking": "hm"},
                        {"type": "text", "text": "a"},
                        {"type": "text", "text": "b"},
                    ]
                )
            ]
        },
    ),
    "a text, then content in parts": (
        [part(content="a"), part(content="b"), part(content=[{"type": "text", "text": "c"}])],
        {"choices": [choice(content=[{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}])]},
    ),
    "parts with an index": (
        [
            part(details=[{"index": 0, "type": "t", "text": "a"}]),
            part(details=[{"index": 1, "text": "b"}, {"index": 0, "text": "c"}]),
        ],
        {"choices": [choice(details=[{"index": 0, "type": "t", "text": "ac"}, {"index": 1, "text": "b"}])]},
    ),
    "legacy texts": (
        [
            {
                "object": "text_completion",
                "choices": [{"index": 0, "text": "a", "logprobs": {"tokens": ["a"], "token_logprobs": [None]}}],
            },
            {"choices": [{"index": 1, "text": "B"}]},
            {
                "choices": [
                    {
                        "index": 0,
                        "text": "b",
                        "finish_reason": "stop",
                        "logprobs": {"tokens": ["b"], "token_logprobs": [-1.5]},
                    }
                ]
            },
        ],
        {
            "object": "text_completion",
            "choices": [
                {
                    "index": 0,
                    "text": "ab",
                    "logprobs": {"tokens": ["a", "b"], "token_logprobs": [None, -1.5]},
                    "finish_reason": "stop",
                },
                {"index": 1, "text": "B", "finish_reason": None},
            ],
        },
    ),
    "finish reason is not forgotten": (
        [part(content="a"), part(0, "stop"), part(0, None), part(0, "")],
        {"choices": [choice(finish="stop", content="a")]},
    ),
    "error": (
        [part(content="a"), {"error": {"message": "boom", "code": 500}}],
        {"error": {"message": "boom", "code": 500}, "choices": [choice(content="a")]},
    ),
    "not JSON": (
        ["oops", part(content="a"), "{", '{"a":NaN}'],
        {"choices": [choice(content="a")], "unknown_events": ["oops", "{", '{"a":NaN}']},
    ),
    "not objects": (["[1]", "null", "7", '"x"', ""], {"unknown_events": ["[1]", "null", "7", '"x"']}),
    "chunks in one event": (
        [json.dumps(part(content="a")) + "\n" + json.dumps(part(content="b")) + "\n[DONE]"],
        {"choices": [choice(content="ab")]},
    ),
    "a chunk over several lines": ([json.dumps(part(content="a"), indent=1)], {"choices": [choice(content="a")]}),
    "choices that are no list": ([{"choices": value, "id": "c"} for value in ({}, "x", 7, True, None)], {"id": "c"}),
    "choices that are no objects": (
        [{"choices": [None, "x", 7, []], "id": "c"}, part(content="a")],
        {"id": "c", "choices": [choice(content="a")]},
    ),
    "numbers instead of texts": (
        [part(content=1), part(content=2), part(1, content="a", role=5), part(1, content=3)],
        {"choices": [choice(content=2), {**choice(1), "message": {"role": 5, "content": 3}}]},
    ),
    "delta that is no object": (
        [{"choices": [{"index": 0, "delta": "x"}]}],
        {"choices": [{"index": 0, "finish_reason": None}]},
    ),
    "tool calls that are none": (
        [part(tool_calls="x"), part(1, tool_calls=["x", None, 7]), part(2, tool_calls={"a": "b"})],
        {"choices": [choice(tool_calls="x"), choice(1, tool_calls=["x", None, 7]), choice(2, tool_calls={"a": "b"})]},
    ),
    "lone surrogates": (
        ['{"choices":[{"delta":{"content":"\\ud83d"}}]}', '{"choices":[{"delta":{"content":"\\ude00"}}]}'],
        {"choices": [choice(content="\ud83d\ude00")]},
    ),
    "done": ([part(content="a"), "[DONE]"], {"choices": [choice(content="a")]}),
    "nothing": ([], None),
    "only done": (["[DONE]"], None),
}


@pytest.mark.parametrize("chunks, expected", COMPLETIONS.values(), ids=list(COMPLETIONS))
def test_chunks_add_up(chunks, expected):
    got = summed(chunks).response()
    assert got == expected
    assert rock_ms.dump_json(got).encode("utf-8")


def test_arguments_may_be_split_anywhere():
    arguments = '{"path": "é\\n😀", "n": [1, 2]}'
    for cut in range(len(arguments) + 1):
        pieces = [
            calls(call(arguments[:cut], "f", index=0, id="a", type="function")),
            calls(call(arguments[cut:], index=0)),
        ]
        (got,) = summed(pieces).response()["choices"][0]["message"]["tool_calls"]
        assert got == function("a", "f", arguments)


@pytest.mark.parametrize(
    "chunks, is_over, is_finished",
    [
        ([], False, False),
        ([part(content="a")], False, False),
        ([part(content="a"), part(0, "stop")], False, True),
        ([part(0, "stop"), part(1, content="a")], False, False),
        ([part(content="a"), "[DONE]"], True, True),
        (["[DONE]"], True, True),
    ],
)
def test_end_of_a_completion_is_seen(chunks, is_over, is_finished):
    events = summed(chunks)
    assert (events.is_over, events.is_finished) == (is_over, is_finished)


@pytest.mark.parametrize("value, message", [({"message": "boom"}, "boom"), ("boom", "boom"), (None, None)])
def test_error_of_a_stream_is_told(value, message):
    assert summed([part(content="a"), {"error": value}]).error == message


def deepest_readable(make):
    """The deepest nesting, nearly, that parse_json still takes from here."""
    depth = 100
    with contextlib.suppress(ValueError):
        while rock_ms.parse_json(make(depth + 50)):
            depth += 50
    return depth - 50


def nested(opening, closing):
    return lambda depth: '{"choices":[{"delta":{"content":"a","x":%s1%s}}]}' % (opening * depth, closing * depth)


def assert_survived(chunk):
    try:
        got = summed([chunk, part(content="b")]).response()
    except RecursionError:
        got = None  # its traceback takes pytest seconds to show
    assert got, "RecursionError"
    text = got["choices"][0]["message"]["content"]
    assert text == "ab" or (text == "b" and got["unknown_events"] == [chunk])


@pytest.mark.parametrize("depth", [49, 60, 300, 10000, 100000])
@pytest.mark.parametrize("brackets", ["[]", ('{"a":', "}")])
def test_deep_nesting_is_survived(depth, brackets):
    assert_survived(nested(*brackets)(depth))


@pytest.mark.parametrize("brackets", ["[]", ('{"a":', "}")])
def test_nesting_that_can_just_be_read_is_survived(brackets):
    make = nested(*brackets)
    assert_survived(make(deepest_readable(make)))


def test_strange_indexes_of_tool_calls_are_survived():
    pieces = [call(index=[1]), call(index=[1, 1], id="b"), call(index=[1]), call(index=[1, 1], id="c")]
    assert summed([calls(piece) for piece in pieces]).response()


@pytest.mark.parametrize("seed", range(3))
def test_any_chunks_add_up_to_something_that_can_be_written_down(seed):
    rng = random.Random(seed)
    keys = ["choices", "delta", "index", "content", "tool_calls", "function", "arguments", "id", "error", "usage"]
    plain = [None, True, 0, 1, -1, 1.5, "", "x", "stop", "\ud800", [], {}]

    def value(depth):
        kind = rng.randrange(4) if depth else 0
        if kind == 1:
            return [value(depth - 1) for _ in range(rng.randrange(3))]
        if kind:
            return {rng.choice(keys): value(depth - 1) for _ in range(rng.randrange(4))}
        return rng.choice(plain)

    for _ in range(500):
        chunks = [{"choices": [value(4), value(5)], "usage": value(2)} for _ in range(4)] + [value(3)]
        events = summed(chunks)
        assert json.loads(rock_ms.dump_json(events.response()).encode("utf-8").decode("utf-8")) == events.response()


# ----------------------------------------------------------------------------------------------------------------------
# There and back.
# ----------------------------------------------------------------------------------------------------------------------

ROUND_TRIPS = {
    "content": [choice(0, "stop", content="Hello é😀\n")],
    "empty content": [choice(0, "stop", content="")],
    "length": [choice(0, "length", content="a")],
    "reasoning": [choice(0, "stop", content="a", reasoning_content="why")],
    "reasoning by another name": [choice(0, "stop", content="a", reasoning="why")],
    "refusal": [choice(0, "stop", refusal="no")],
    "tool calls": [choice(0, "tool_calls", tool_calls=TWO_CALLS["choices"][0]["message"]["tool_calls"])],
    "tool calls and content": [choice(0, "tool_calls", content="so", tool_calls=[function("a", "f", "{}")])],
    "tool calls with one id": [choice(0, "tool_calls", tool_calls=[function("a", "f", "1"), function("a", "f", "2")])],
    "vendor's tool call": [
        choice(0, "tool_calls", tool_calls=[{"id": "a", "type": "custom", "custom": {"name": "n"}}])
    ],
    "function_call": [choice(0, "function_call", function_call={"name": "f", "arguments": "{}"})],
    "choices": [choice(0, "stop", content="a"), choice(1, "length", content="b"), choice(5, "stop", content="c")],
    "logprobs": [choice(0, "stop", {"logprobs": {"content": [logprob(c) for c in "aab"]}}, content="aab")],
    "token ids": [choice(0, "stop", {"token_ids": [1, 1, 2], "stop_reason": 5}, content="a")],
    "parts": [choice(0, "stop", content=[{"type": "text", "text": "a"}, {"type": "text", "text": "a"}])],
    "vendor's fields": [
        choice(0, "stop", {"vendor": "x"}, content="a", audio={"id": "i", "data": "x", "n": [[1], [2]]})
    ],
    "another role": [{**choice(0, "stop"), "message": {"role": "tool", "content": "a"}}],
}


@pytest.mark.parametrize("choices", ROUND_TRIPS.values(), ids=list(ROUND_TRIPS))
@pytest.mark.parametrize("with_usage", [True, False])
def test_completion_survives_being_a_stream(choices, with_usage):
    answer = {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": choices,
        "vendor": {"a": 1},
    }
    answer["usage"] = {"prompt_tokens": 1, "completion_tokens": 2, "details": {"cached": 0}}
    events = summed(completion_chunks(answer, {"stream_options": {"include_usage": with_usage}}, 7, 1.0) + ["[DONE]"])
    assert events.response() == {key: value for key, value in answer.items() if with_usage or key != "usage"}
    assert events.is_over and events.error is None


# ----------------------------------------------------------------------------------------------------------------------
# Other streams, and errors.
# ----------------------------------------------------------------------------------------------------------------------


def test_other_events_are_kept_as_they_are():
    events = OtherEvents()
    for name, data in [("message_start", '{"a":1}'), ("", "{}"), ("ping", "not JSON"), ("", "[DONE]")]:
        events.add(name, data)
    assert events.response() == [
        {"event": "message_start", "data": {"a": 1}},
        {"data": {}},
        {"event": "ping", "data": "not JSON"},
        {"data": "[DONE]"},
    ]
    assert OtherEvents().response() is None


@pytest.mark.parametrize(
    "name, data, is_over",
    [
        ("message_stop", "{}", True),
        ("", '{"type":"message_stop"}', True),
        ("response.completed", "{}", True),
        ("", '{"type":"response.failed"}', True),
        ("", "[DONE]", True),
        ("message_delta", '{"type":"message_delta"}', False),
        ("ping", "[1]", False),
        ("", "", False),
    ],
)
def test_end_of_other_streams_is_seen(name, data, is_over):
    events = OtherEvents()
    events.add(name, data)
    assert events.is_over == events.is_finished == is_over


@pytest.mark.parametrize(
    "name, data, error",
    [
        ("error", '{"type":"error","error":{"type":"overloaded_error","message":"busy"}}', "busy"),
        ("", '{"error":"busy"}', "busy"),
        ("response.failed", '{"response":{"error":{"message":"busy"}}}', None),
        ("x", '{"error":null}', None),
    ],
)
def test_error_among_other_events_is_told_and_stays(name, data, error):
    events = OtherEvents()
    events.add(name, data)
    events.add("", '{"error":null}')
    assert events.error == error


ERRORS = [
    ({"error": {"message": "boom", "code": 1}}, "boom"),
    ({"error": {"code": 1}}, '{"code":1}'),
    ({"error": {"message": 7}}, "7"),
    ({"error": "boom"}, "boom"),
    ({"object": "error", "message": "boom"}, "boom"),
    ({"object": "error", "code": 7}, '{"object":"error","code":7}'),
    ({"error": None}, None),
    ({"error": ""}, None),
    ({"message": "boom"}, None),
    ({}, None),
    ([], None),
    (["error"], None),
    ("boom", None),
    (None, None),
]


@pytest.mark.parametrize("answer, message", ERRORS)
def test_what_an_error_says(answer, message):
    assert error_message(answer) == message


# ----------------------------------------------------------------------------------------------------------------------
# Bodies.
# ----------------------------------------------------------------------------------------------------------------------


def decoded(decoder, *pieces):
    """(body, what came behind it, whether it has ended)."""
    body = b""
    for number, piece in enumerate(pieces):
        body += decoder.feed(piece)
        if decoder.is_done:
            return body, decoder.rest + b"".join(pieces[number + 1 :]), True
    return body, b"", False


CHUNKED = {
    "empty": (b"0\r\n\r\n", b""),
    "one": (b"5\r\nhello\r\n0\r\n\r\n", b"hello"),
    "two": (b"1\r\nh\r\n4\r\nello\r\n0\r\n\r\n", b"hello"),
    "hex of either case": (b"a\r\n0123456789\r\nB\r\n0123456789x\r\n0\r\n\r\n", b"01234567890123456789x"),
    "leading zeros": (b"0005\r\nhello\r\n0000\r\n\r\n", b"hello"),
    "fifteen digits": (b"000000000000005\r\nhello\r\n0\r\n\r\n", b"hello"),
    "extensions": (b'5;a=b;c="d e"\r\nhello\r\n0;x\r\n\r\n', b"hello"),
    "space before extensions": (b"5 \t;a\r\nhello\r\n0  \r\n\r\n", b"hello"),
    "trailers": (b"1\r\nx\r\n0\r\nA: b\r\nX-Sum:\t1 \xe9\r\nEmpty:\r\n\r\n", b"x"),
    "line ends as data": (b"6\r\n\r\n\n\r\r\n\r\n2\r\n\r\n\r\n0\r\n\r\n", b"\r\n\n\r\r\n\r\n"),
    "chunks as data": (b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n"),
}


@pytest.mark.parametrize("wire, body", CHUNKED.values(), ids=list(CHUNKED))
@pytest.mark.parametrize("behind", [b"", b"HTTP/1.1 200 OK\r\n", b"\r\n"])
def test_chunks_are_undone_however_they_are_cut(wire, body, behind):
    data = wire + behind
    for cut in range(len(data) + 1):
        assert decoded(ChunkedBody(), data[:cut], data[cut:]) == (body, behind, True), cut
    assert decoded(ChunkedBody(), *bytewise(data)) == (body, behind, True)


@pytest.mark.parametrize("wire, body", CHUNKED.values(), ids=list(CHUNKED))
def test_chunked_body_is_not_over_before_its_last_byte(wire, body):
    for cut in range(len(wire)):
        decoder = ChunkedBody()
        assert body.startswith(decoder.feed(wire[:cut]))
        assert not decoder.is_done and not decoder.end()
    assert decoder.feed(wire[-1:]) == b"" and decoder.end()


BAD_CHUNKS = {
    "no size": (b"\r\nx", 400),
    "no number": (b"x\r\n", 400),
    "sign": (b"-1\r\n", 400),
    "plus": (b"+1\r\n", 400),
    "0x": (b"0x5\r\nhello\r\n", 400),
    "underscore": (b"1_0\r\n", 400),
    "space before": (b" 5\r\nhello\r\n", 400),
    "decimal point": (b"5.\r\nhello\r\n", 400),
    "two numbers": (b"5 5\r\nhello\r\n", 400),
    "sixteen digits": (b"FFFFFFFFFFFFFFFF\r\n", 400),
    "zeros without end": (b"0" * 16 + b"\r\n", 400),
    "LF": (b"5\nhello\r\n", 400),
    "LF alone": (b"\n", 400),
    "CR within": (b"5\r\r\nhello\r\n", 400),
    "control character in an extension": (b"5;a\0\r\nhello\r\n", 400),
    "chunk too short": (b"6\r\nhello\r\n0\r\n\r\n", 400),
    "chunk too long": (b"4\r\nhello\r\n0\r\n\r\n", 400),
    "LF behind a chunk": (b"5\r\nhello\n0\r\n\r\n", 400),
    "nothing behind a chunk": (b"5\r\nhello0\r\n\r\n", 400),
    "CR CR behind a chunk": (b"5\r\nhello\r\r\n", 400),
    "size line too long": (b"5;" + b"a" * 1022 + b"\r\n", 400),
    "size line without end": (b"5;" + b"a" * 1022, 400),
    "trailer without colon": (b"0\r\nab\r\n\r\n", 400),
    "trailer folded": (b"0\r\nA: b\r\n c\r\n\r\n", 400),
    "trailer with NUL": (b"0\r\nA: \0\r\n\r\n", 400),
    "trailer with LF": (b"0\r\nA: b\n\r\n", 400),
    "end with LF": (b"0\r\n\n", 400),
    "trailer too long": (b"0\r\nA: " + b"x" * 65536, 400),
    "too many trailers": (b"0\r\n" + (b"A: " + b"x" * 997 + b"\r\n") * 66, 431),
}


@pytest.mark.parametrize("wire, status", BAD_CHUNKS.values(), ids=list(BAD_CHUNKS))
@pytest.mark.parametrize("cut", [lambda data: [data], bytewise])
def test_bad_chunks_are_refused(wire, status, cut):
    with pytest.raises(ProtocolError) as caught:
        decoded(ChunkedBody(), *cut(wire))
    assert caught.value.status == status


def test_longest_lines_between_chunks_are_taken():
    longest = b"5;" + b"a" * (rock_ms.MAX_CHUNK_LINE_BYTES - 4)
    assert decoded(ChunkedBody(), longest + b"\r\nhello\r\n0\r\n\r\n")[0] == b"hello"
    trailers = (b"A: " + b"x" * 1021 + b"\r\n") * 62
    assert decoded(ChunkedBody(), b"0\r\n" + trailers + b"\r\n") == (b"", b"", True)


def test_what_is_certain_to_come_is_known():
    decoder = ChunkedBody()
    decoder.feed(b"fffffffffffffff\r\nab")
    assert decoder.left == 0xFFFFFFFFFFFFFFF - 2


def randomly_chunked(rng, body):
    wire = b""
    while body:
        size = rng.randrange(1, len(body) + 1)
        extension = rng.choice([b"", b"", b";a=b", b" ", b' ;q="\xe9"'])
        wire += rng.choice([b"%x", b"%X", b"00%x"]) % size + extension + b"\r\n" + body[:size] + b"\r\n"
        body = body[size:]
    return wire + b"0\r\n" + rng.choice([b"", b"", b"A: b\r\n"]) + b"\r\n"


@pytest.mark.parametrize("seed", range(2))
def test_random_chunks_are_undone(seed):
    rng = random.Random(seed)
    for _ in range(1000):
        body = bytes(rng.choice(b"\r\n0a;x") for _ in range(rng.randrange(40)))
        wire = randomly_chunked(rng, body)
        assert decoded(ChunkedBody(), *random_pieces(rng, wire + b"rest")) == (body, b"rest", True), wire


def outcome(pieces):
    """What comes of chunks; a refusal's words are an outcome, too."""
    try:
        return decoded(ChunkedBody(), *pieces)
    except ProtocolError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(2))
def test_corrupted_chunks_are_refused_or_undone_and_the_same_however_they_are_cut(seed):
    rng, refused = random.Random(seed), 0
    for _ in range(2000):
        wire = randomly_chunked(rng, bytes(rng.choice(b"\r\n0a;x") for _ in range(rng.randrange(40))))
        at = rng.randrange(len(wire))
        wire = (
            wire[:at] + rng.choice([b"", b"\r", b"\n", b"\0", b"0", b"F", b";", b" "]) + wire[at + rng.randrange(2) :]
        )
        expected = outcome([wire])
        assert outcome(bytewise(wire)) == expected, wire
        assert outcome(random_pieces(rng, wire)) == expected, wire
        refused += isinstance(expected, str)
    assert refused > 500


@pytest.mark.parametrize("length", [0, 1, 5])
def test_body_of_known_length(length):
    data = b"hello, and what follows"
    for cut in range(len(data) + 1):
        decoder = LengthBody(length)
        assert decoder.is_done == (length == 0)
        assert decoded(decoder, data[:cut], data[cut:]) == (data[:length], data[length:], True)
    assert decoded(LengthBody(length), *bytewise(data)) == (data[:length], data[length:], True)


def test_body_of_known_length_that_is_cut_off():
    decoder = LengthBody(5)
    assert (decoder.feed(b"hell"), decoder.left, decoder.end()) == (b"hell", 1, False)
    assert (decoder.feed(b"o"), decoder.left, decoder.end()) == (b"o", 0, True)


def test_body_that_ends_with_its_connection():
    decoder = UnboundedBody()
    assert (decoder.feed(b"a"), decoder.feed(b"b"), decoder.is_done) == (b"a", b"b", False)
    assert decoder.end() and decoder.is_done


def test_decoder_follows_the_header():
    kinds = [type(rock_ms.body_decoder(*framing)) for framing in ((None, True), (5, False), (None, False))]
    assert kinds == [ChunkedBody, LengthBody, UnboundedBody]


# ----------------------------------------------------------------------------------------------------------------------
# Response headers.
# ----------------------------------------------------------------------------------------------------------------------

HEADS = {
    # head: (status, content_length, is_chunked, keep_alive)
    b"HTTP/1.1 200 OK": (200, None, False, True),
    b"HTTP/1.1 200": (200, None, False, True),
    b"HTTP/1.1 200 ": (200, None, False, True),
    b"HTTP/1.1 404 Gibt es nicht \xe4": (404, None, False, True),
    b"HTTP/1.0 200 OK": (200, None, False, False),
    b"HTTP/1.0 200 OK\r\nConnection: keep-alive": (200, None, False, False),
    b"HTTP/1.1 200 OK\r\nConnection: a, Close": (200, None, False, False),
    b"HTTP/1.1 200 OK\r\nContent-Length: 0": (200, 0, False, True),
    b"HTTP/1.1 200 OK\r\nCONTENT-LENGTH:\t12 ": (200, 12, False, True),
    b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\ncontent-length: 12": (200, 12, False, True),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked": (200, None, True, True),
    b"HTTP/1.1 204 No Content": (204, 0, False, True),
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 12": (304, 0, False, True),
    b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked": (204, 0, False, True),
    b"HTTP/1.1 101 Switching Protocols": (101, None, False, True),
    b"HTTP/1.1 599 x\r\nA:\r\nA: b, c\r\nX-\xc3: d".replace(b"\xc3", b"y"): (599, None, False, True),
}


@pytest.mark.parametrize("head, expected", HEADS.items())
def test_response_header_is_read(head, expected):
    got = parse_response_head(head)
    assert (got.status, got.content_length, got.is_chunked, got.keep_alive) == expected


def test_response_fields_keep_their_names_order_and_bytes():
    got = parse_response_head(b"HTTP/1.1 200 OK\r\nB: 1\r\nset-cookie: a\r\nSet-Cookie: b\r\nX:\t \xe9 \t")
    assert got.headers == (("B", "1"), ("set-cookie", "a"), ("Set-Cookie", "b"), ("X", "\xe9"))
    assert (got.header("set-cookie"), got.header("none"), got.header("none", "x")) == ("a", None, "x")


def test_answer_to_head_has_no_body():
    got = parse_response_head(b"HTTP/1.1 200 OK\r\nContent-Length: 12", is_head=True)
    assert (got.content_length, got.is_chunked, got.header("content-length")) == (0, False, "12")
    assert parse_response_head(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked", is_head=True).content_length == 0


OK = b"HTTP/1.1 200 OK\r\n"
BAD_HEADS = [
    b"",
    b"garbage",
    b"HTTP/1.1",
    b"HTTP/1.1 20 OK",
    b"HTTP/1.1 2000 OK",
    b"HTTP/1.1 099 x",
    b"HTTP/1.1 600 x",
    b"HTTP/1.1 2x0 x",
    b"HTTP/1.1  200 OK",
    b"HTTP/2 200 OK",
    b"HTTP/2.0 200 OK",
    b"http/1.1 200 OK",
    b"ICY 200 OK",
    b" HTTP/1.1 200 OK",
    b"HTTP/1.1 200 O\0K",
    b"HTTP/1.1 200 OK\nA: b",
    b"HTTP/1.1 200 OK\rA: b",
    b"\r\nHTTP/1.1 200 OK",
    OK + b"no colon",
    OK + b"A: b\r\n folded",
    OK + b"A : b",
    OK + b": b",
    OK + b"A: \0",
    OK + b"A: \x7f",
    OK,
    OK + b"Content-Length: -1",
    OK + b"Content-Length: +1",
    OK + b"Content-Length: 1.0",
    OK + b"Content-Length: 0x1",
    OK + b"Content-Length:",
    OK + b"Content-Length: 5, 5",
    OK + b"Content-Length: 5\r\nContent-Length: 6",
    OK + b"Content-Length: " + b"9" * 19,
    OK + b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    OK + b"Transfer-Encoding: gzip, chunked",
    OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
    OK + b"Transfer-Encoding: identity",
    OK + b"Transfer-Encoding:",
    OK + b"Transfer-Encoding: \x0bchunked",
]


@pytest.mark.parametrize("head", BAD_HEADS)
def test_bad_response_header_is_refused(head):
    with pytest.raises(ProtocolError) as caught:
        parse_response_head(head)
    assert caught.value.status == 502


def test_what_is_bound_to_one_connection_is_not_passed_on():
    passed_on = [
        ("Content-Type", "a"),
        ("Set-Cookie", "a"),
        ("set-cookie", "b"),
        ("Content-Length", "5"),
        ("X-Other", ""),
    ]
    bound = "Connection Keep-Alive Proxy-Authenticate Proxy-Authorization Proxy-Connection TE Trailer Upgrade"
    headers = [(name, "x-mine, X-YOURS\t") for name in bound.split() + ["transfer-encoding"]]
    headers += [("X-Mine", "1"), ("x-yours", "2"), ("CONNECTION", "close,X-Third"), ("X-Third", "3")]
    assert end_to_end(tuple(passed_on[:2] + headers + passed_on[2:])) == passed_on
    assert end_to_end(()) == []


# ----------------------------------------------------------------------------------------------------------------------
# Compressed bodies, as they are recorded.
# ----------------------------------------------------------------------------------------------------------------------


def unzipped(*pieces):
    body = GzipBody()
    return b"".join(body.feed(piece) for piece in pieces), body.is_broken


ZIPPED = {
    "gzip": gzip.compress(b"hello"),
    "several members": gzip.compress(b"he") + gzip.compress(b"") + gzip.compress(b"llo"),
    "stored": gzip.compress(b"hello", 0),
}


@pytest.mark.parametrize("data", ZIPPED.values(), ids=list(ZIPPED))
def test_compression_is_undone_however_it_is_cut(data):
    for cut in range(len(data) + 1):
        assert unzipped(data[:cut], data[cut:]) == (b"hello", False), cut
    assert unzipped(*bytewise(data)) == (b"hello", False)


def test_truncated_gzip_gives_what_had_come():
    data = gzip.compress(b"hello", 0)
    whole = [unzipped(data[:cut]) for cut in range(len(data))]
    assert whole == sorted(whole) and all(b"hello".startswith(body) for body, _ in whole)
    assert unzipped(data[:-8]) == (b"hello", False)


def test_flushed_gzip_gives_each_piece_at_once():
    squeeze = zlib.compressobj(wbits=31)
    body = GzipBody()
    for piece in (b"data: a\n\n", b"data: b\n\n"):
        assert body.feed(squeeze.compress(piece) + squeeze.flush(zlib.Z_SYNC_FLUSH)) == piece


@pytest.mark.parametrize(
    "data, body",
    [
        (b"garbage", b""),
        (b"\x1f\x8bgarbage", b""),
        (gzip.compress(b"hello") + b"garbage", b"hello"),
        (gzip.compress(b"hello", 0)[:-8] + b"\0" * 8, b""),
    ],
)
def test_broken_gzip_ends_the_body_and_nothing_else(data, body):
    assert unzipped(data) == (body, True)
    assert unzipped(data, gzip.compress(b"more")) == (body, True)


@pytest.mark.parametrize("pieces", [1, 3])
def test_gzip_bomb_is_left_alone(monkeypatch, pieces):
    monkeypatch.setattr(rock_ms, "MAX_BODY_BYTES", 10000)
    data = gzip.compress(b"x" * 10000000)
    size = len(data) // pieces + 1
    body, is_broken = unzipped(*[data[at : at + size] for at in range(0, len(data), size)])
    assert is_broken and 10000 <= len(body) <= 10001


def test_body_of_the_largest_size_is_no_bomb(monkeypatch):
    monkeypatch.setattr(rock_ms, "MAX_BODY_BYTES", 10000)
    assert unzipped(gzip.compress(b"x" * 9000) + gzip.compress(b"x" * 1000)) == (b"x" * 10000, False)
    assert unzipped(gzip.compress(b"x" * 9000) + gzip.compress(b"x" * 1001))[1]


def test_gzip_gives_at_most_the_limit(monkeypatch):
    monkeypatch.setattr(rock_ms, "MAX_BODY_BYTES", 10000)
    assert len(unzipped(gzip.compress(b"x" * 20000))[0]) <= 10000


def test_answer_that_is_too_long_is_recorded_without_a_hole(monkeypatch):
    monkeypatch.setattr(rock_ms, "MAX_BODY_BYTES", 10)
    answer = RecordedAnswer(ResponseHead(200), False)
    for piece in (b"aaaaaa", b"bbbbbb", b"ccc"):
        answer.feed(piece)
    assert "aaaaaabbbbbbccc".startswith(json.loads(answer.text(Secrets([]))[0]))
