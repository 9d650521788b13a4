"""The proxy's main paths, one test each: forward, retry, stream, record."""

import pytest

from support import chat
from upstream import answer, sse, words


def test_answer_is_passed_on_and_recorded(proxy, upstream):
    got = proxy.ask(chat("hi"))
    assert (got.status, got.json()["choices"][0]["message"]["content"]) == (200, "hello")
    (call,) = proxy.trajectory()
    assert (call["request"], call["response"], call["status"], call["error"]) == (chat("hi"), got.json(), 200, None)
    assert upstream.seen()[0]["target"] == "/v1/chat/completions"


def test_stream_is_passed_on_and_recorded_as_one_completion(proxy, upstream):
    upstream.script(sse(*words("Hel", "lo")))
    got = proxy.ask(chat("hi", stream=True))
    assert got.events() == [*words("Hel", "lo"), "[DONE]"]
    (call,) = proxy.trajectory()
    assert call["response"]["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}
    ]


def test_failed_attempt_is_followed_by_another(proxy, upstream):
    stale = {"close": True}  # on the connection that was kept; it is no attempt
    upstream.script(answer({"error": {"message": "busy"}}, 429), stale, {"close": True})
    assert proxy.ask(chat("hi")).status == 200
    assert (proxy.pauses, proxy.trajectory()[0]["attempts"]) == ([2.0, 4.0], 3)


def test_broken_stream_is_broken_for_the_client_too(proxy, upstream):
    upstream.script([*sse(*words("a", "b"))[:3], {"gate": "broken"}, {"reset": True}])
    upstream.open("broken")
    with pytest.raises(Exception, match="IncompleteRead"):
        proxy.ask(chat("hi", stream=True))
    (call,) = proxy.trajectory()
    assert (call["status"], call["partial"], call["response"]["choices"][0]["message"]["content"]) == (502, True, "a")
