"""The `openai` package, as agents use it, through the proxy and against a replay."""

import asyncio
import contextlib

import openai
import pytest

from support import Proxy, chat, running
from upstream import answer, delta, sse, words

CALLS = [
    delta(role="assistant"),
    delta(tool_calls=[{"index": 0, "id": "a", "type": "function", "function": {"name": "ls", "arguments": ""}}]),
    delta(tool_calls=[{"index": 1, "id": "b", "type": "function", "function": {"name": "cat", "arguments": '{"f"'}}]),
    delta(tool_calls=[{"index": 0, "function": {"arguments": "{}"}}]),
    delta(tool_calls=[{"index": 1, "function": {"arguments": ':"é"}'}}]),
    delta(finish="tool_calls"),
    {**delta(), "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}},
]
STREAMS = {"words": words("Hel", "lo ", "wörld 😀"), "tool calls": CALLS}


@contextlib.contextmanager
def client_of(url, **options):
    options = {"api_key": "sk-agent-0123456789", "max_retries": 0, "timeout": 30, **options}
    with openai.OpenAI(base_url=url, **options) as client:
        yield client


@contextlib.contextmanager
def client_on(service, **options):
    with client_of("http://127.0.0.1:%d/v1" % service.port, **options) as client:
        yield client


def chunks_of(client, **more):
    return [chunk.to_dict() for chunk in client.chat.completions.create(**chat(stream=True, **more))]


def raw_body(client, **more):
    with client.chat.completions.with_streaming_response.create(**chat(**more)) as response:
        return response.http_response.status_code, response.http_response.read()


@pytest.mark.parametrize("name", STREAMS)
def test_stream_is_the_same_through_the_proxy_and_directly(proxy, upstream, name):
    upstream.script(sse(*STREAMS[name]), sse(*STREAMS[name]))
    with client_of(upstream.url) as direct, client_on(proxy) as through:
        assert chunks_of(direct) == chunks_of(through) == STREAMS[name]


@pytest.mark.parametrize("is_stream", [False, True])
def test_bytes_are_the_same_through_the_proxy_and_directly(proxy, upstream, is_stream):
    odd = answer('{"id" : "1",\n "vendor":1.0e2, "choices":[{"message":{"content":"\\u00e9 é"}}]}')
    upstream.script(*[sse(*CALLS) if is_stream else odd] * 2)
    with client_of(upstream.url) as direct, client_on(proxy) as through:
        assert raw_body(direct, stream=is_stream) == raw_body(through, stream=is_stream)


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("is_recorded_streaming", [False, True])
def test_recording_replays_streaming_or_not(tmp_path, upstream, name, is_recorded_streaming):
    """What the client's own aggregation makes of a replayed stream is what it gets whole."""
    for number in "123":
        (tmp_path / number).mkdir()
    upstream.script(sse(*STREAMS[name]))
    with running(tmp_path / "1", Proxy, upstream=upstream) as proxy, client_on(proxy) as client:
        if is_recorded_streaming:
            chunks_of(client)
        else:
            whole = replayed(tmp_path, upstream, STREAMS[name])
            upstream.script(answer(whole))
            client.chat.completions.create(**chat())
        recording = proxy.paths.traj_file
    (tmp_path / "two.jsonl").write_bytes(open(recording, "rb").read() * 2)
    with running(tmp_path / "3", Proxy, replay_file=str(tmp_path / "two.jsonl")) as replay, client_on(replay) as client:
        message = client.chat.completions.create(**chat()).choices[0].message.to_dict()
        with client.chat.completions.stream(**chat()) as stream:
            final = stream.get_final_completion().choices[0].message
        assert (final.content, calls_of(final.to_dict())) == (message.get("content"), calls_of(message))
        with pytest.raises(openai.NotFoundError, match="no further call"):
            client.chat.completions.create(**chat())


def replayed(directory, upstream, chunks):
    """The completion that the proxy records of a stream."""
    with running(directory / "2", Proxy, upstream=upstream) as proxy, client_on(proxy) as client:
        chunks_of(client)
        upstream.script(sse(*chunks))
        return proxy.trajectory()[0]["response"]


def calls_of(message):
    return [
        (call["id"], call["function"]["name"], call["function"]["arguments"])
        for call in message.get("tool_calls") or ()
    ]


def test_upstream_s_error_is_the_client_s_exception(proxy, upstream):
    upstream.script(*[answer({"error": {"message": "slow down", "type": "rate_limit_error"}}, 429)] * 6)
    with client_on(proxy) as client, pytest.raises(openai.RateLimitError, match="slow down"):
        client.chat.completions.create(**chat())
    assert proxy.trajectory()[0]["attempts"] == 6


def test_broken_stream_raises(proxy, upstream):
    upstream.script([*sse(*words("a", "b"))[:3], {"gate": "seen"}, {"close": True}])
    with client_on(proxy) as client:
        stream = client.chat.completions.create(**chat(stream=True))
        assert [next(stream).choices[0].delta.content for _ in range(2)] == [None, "a"]
        upstream.open("seen")
        with pytest.raises(Exception, match="incomplete chunked read|peer closed|Connection error"):
            next(stream)


def test_fifty_streams_at_once(proxy):
    async def ask(client, number):
        script = sse(*words("<", str(number), ">"))
        stream = await client.chat.completions.create(**chat(stream=True), extra_body={"script": script})
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return "".join(texts)

    async def ask_all():
        url = "http://127.0.0.1:%d/v1" % proxy.port
        async with openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0, timeout=30) as client:
            return await asyncio.gather(*[ask(client, number) for number in range(50)])

    assert asyncio.run(ask_all()) == ["<%d>" % number for number in range(50)]
    said = [call["response"]["choices"][0]["message"]["content"] for call in proxy.trajectory()]
    assert sorted(said) == sorted("<%d>" % number for number in range(50))


def test_embeddings_and_responses_pass(proxy, upstream):
    with client_on(proxy) as client:
        upstream.script(answer({"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}]}))
        got = client.embeddings.create(model="e", input="x", encoding_format="float")
        assert got.data[0].embedding == [0.5]
    assert proxy.trajectory()[0]["path"] == "/v1/embeddings"
