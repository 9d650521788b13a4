"""Assistants for the tests: in this process, in front of the scripted upstream."""

import contextlib
import json
import os
import uuid

import rock_sdk
from support import Service, ask, nothing_left
from upstream import answer, sse, words

WEATHER = {
    "type": "function",
    "function": {
        "name": "amap_weather",
        "description": "amap weather tool",
        "parameters": [
            {
                "name": "location",
                "type": "string",
                "description": "城市/区具体名称，如`北京市海淀区`请描述为`海淀区`",
                "required": True,
            }
        ],
    },
}
ACTION = 'Action: amap_weather\nAction Input: {"location": "%s"}\n'


def says(*texts, finish="stop", **more):
    """A whole answer of a model that says one text, or each as a choice."""
    choices = [
        {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        for index, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": 267, "completion_tokens": 15, "total_tokens": 282}
    return answer({"id": "c1", "object": "chat.completion", "model": "m", "choices": choices, "usage": usage, **more})


def streams(*texts):
    """A streamed answer of a model that says a text in these pieces."""
    return sse(*words(*texts))


def letters(text):
    """The same, a letter at a time."""
    return streams(*text)


class Assistant(Service):
    """An assistant in this process, on a free port; the scripted upstream is its model server."""

    def __init__(self, directory, upstream, **settings):
        self.data_dir = str(directory)
        defaults = {"port": 0, "model_servers": {"dashscope": upstream.url}, "max_attempts": 1}
        self.settings = rock_sdk.AssistantSettings(**{**defaults, **settings})
        self.logged = []
        self.server = rock_sdk.AssistantServer(self.settings, self.data_dir, self._logger())
        self.port = self.server.http.port
        self.url = "http://127.0.0.1:%d" % self.port

    def trajectory(self):
        """What the model was asked and answered, as recorded."""
        path = self.settings.recording_file or os.path.join(self.data_dir, rock_sdk.ASSISTANT_TRAJ_NAME)
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
        return []

    def chat(self, prompt="海淀区天气", **more):
        """The answer of /v1/chat/completions."""
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        return ask(self.port, {"model": "qwen-max", "messages": messages, **more})

    def chat_stream(self, prompt="海淀区天气", **more):
        """The chunks of a streamed one, which must come to its end."""
        got = self.chat(prompt, stream=True, **more)
        assert got.status == 200, got.body
        assert got.headers["content-type"].startswith("text/event-stream")
        return chunks(got.body)

    def lite(self, query="海淀区天气", **more):
        """The answer of /v1/assistants/lite."""
        messages = query if isinstance(query, list) else [{"role": "user", "content": query}]
        llm = {"model": "qwen-max", "model_server": "dashscope", **more.pop("llm_config", {})}
        agent = {"name": "test", "description": "test assistant", "instruction": "you are a helpful assistant"}
        agent.update(more.pop("agent_config", {}))
        value = {"llm_config": llm, "agent_config": agent, "messages": messages, "uuid_str": "test", **more}
        return ask(self.port, value, path="/v1/assistants/lite")

    def response(self, *args, **more):
        """The text of one that must be a success."""
        got = self.lite(*args, **more)
        assert got.status == 200, got.body
        return got.json()["output"]["response"]

    def upload(self, uuid_str="test", **files):
        """The answer of /v1/files.  files: bytes by name, `_` in place of the dot."""
        named = {name.replace("_", "."): data for name, data in files.items()}
        body, kind = form({"uuid_str": uuid_str}, named)
        return ask(self.port, body, path="/v1/files", headers=[("Content-Type", kind)])


def form(fields, files):
    """(body, content type) of multipart/form-data."""
    boundary = uuid.uuid4().hex
    body = b""
    for name, value in fields.items():
        body += ('--%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (boundary, name, value)).encode()
    for name, data in files.items():
        head = 'Content-Disposition: form-data; name="files"; filename="%s"\r\nContent-Type: text/plain' % name
        body += ("--%s\r\n%s\r\n\r\n" % (boundary, head)).encode() + data + b"\r\n"
    return body + ("--%s--\r\n" % boundary).encode(), "multipart/form-data; boundary=" + boundary


def chunks(body):
    """The values of a stream of events that ends as it should."""
    events = [event for event in body.decode("utf-8").split("\n\n") if event]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    return [json.loads(event[len("data: ") :]) for event in events[:-1]]


def added_up(values, index=0):
    """(text, calls, finish_reason) of the chunks of one choice; calls as (name, arguments)."""
    text, calls, reason = "", {}, None
    for value in values:
        for choice in value["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            text += delta.get("content") or ""
            for call in delta.get("tool_calls", ()):
                entry = calls.setdefault(call["index"], ["", ""])
                entry[0] += call["function"].get("name", "")
                entry[1] += call["function"].get("arguments", "")
            reason = choice["finish_reason"] or reason
    return text, [tuple(calls[number]) for number in sorted(calls)], reason


@contextlib.contextmanager
def assisting(directory, upstream, **settings):
    """An Assistant that answers, stopped at the end without leaving anything."""
    with nothing_left():
        assistant = Assistant(directory, upstream, **settings)
        assistant.server.start()
        try:
            yield assistant
        finally:
            assistant.server.stop()
