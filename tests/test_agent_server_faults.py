"""Faults that the agent servers must survive: tool node, tool manager, assistant.

Each table is a script of faults: a name, what is done, what must hold.  After each, nothing that was acknowledged is
lost, and the service either works or has said why it does not; once the fault is over, it works.

    MODEL_FAULTS      what a model server does in an assistant's call
    NODE_FAULTS       what a node does in a tool manager's
    REGISTRY_FAULTS   what becomes of a registry in use; UPLOAD_FAULTS of an index, and of an upload
    WAYS              of a call that cannot be recorded
    STARVED           what is asked where no descriptor is left
    LOG_FAULTS        what becomes of a log
    ..._is_ended, ..._is_killed: signals in the middle of calls, streams, uploads and creations
    IN_THE_WAY        what cannot be written at a start
"""

import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import http.client
import itertools
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from functools import partial
from unittest import mock

import pytest

import rock_ms
import rock_sdk
import sandboxes
from assistants import assisting, form, says, streams
from managers import FakeNode, FakeRuntime, Manager, free_port, managing, write_tools
from support import (
    SCRIPT,
    TIMEOUT,
    Later,
    Service,
    ask,
    chat,
    clean_environ,
    completion,
    files_of_at_most,
    run_cli,
    running,
    wait_until,
)
from test_model_service import sandbox_of
from test_tool_manager import bad_node
from test_tool_node import Node, wait_for_end
from upstream import answer, chunked, delta, sse

pytestmark = pytest.mark.load

DAY = 86400.0
PYTHONPATH = os.path.dirname(os.path.abspath(rock_ms.__file__))
HOLD = '''
import os, time

def hold(began: str, until: str) -> str:
    """Go on until there is a file."""
    with open(began, "w") as file:
        file.write(str(os.getpid()))
    while not os.path.exists(until):
        time.sleep(0.01)
    return "held"
'''


@pytest.fixture(autouse=True)
def prompt_stops(monkeypatch):
    """Calls that are being answered get little time when a server of this process stops."""
    monkeypatch.setattr(rock_ms.HTTPService.stop, "__defaults__", (0.2,))


@pytest.fixture
def assistant(tmp_path, upstream):
    with assisting(tmp_path, upstream) as assistant:
        yield assistant


@pytest.fixture
def runtime():
    return FakeRuntime()


# The model server behind the assistant --------------------------------------------------------------------------------

PIECE = sse(delta("It is "), done=False)[:-1]
MODEL_FAULTS = {  # what it does in a call, the status of its record, and what the client or the log is told
    "resets before it answers": ([{"reset": True}], 502, "broke the connection"),
    "closes before it answers": ([{"close": True}], 502, "without an answer"),
    "says what is no HTTP": ([{"send": "SSH-2.0-OpenSSH\r\n\r\n"}], 502, "no HTTP/1.1 response"),
    "says what is no completion": ([answer("<html>")], 200, "the model server's answer"),
    "is cut off in mid-answer": ([*chunked("{")[:-1], {"close": True}], 502, "broke off"),
    "resets in mid-stream": ([*PIECE, {"reset": True}], 502, "broke"),
    "is cut off in mid-stream": ([*PIECE, {"close": True}], 502, "broke off"),
    "ends a stream that is not over": ([*PIECE, {"send": "0\r\n\r\n"}], 200, "before its answer was over|is not"),
    "sends garbage in mid-stream": ([*PIECE, {"send": "zz\r\n"}], 502, "cannot be read"),
    "is silent": ([{"stall": True}], 504, "silent"),
    "falls silent in mid-stream": ([*PIECE, {"stall": True}], 504, "silent"),
}


def closing(steps):
    """An answer that is the last one of its connection: the next call cannot take a fault for a stale connection's."""
    first, *others = steps if isinstance(steps, list) else [steps]
    return [{"send": first["send"].replace("\r\n", "\r\nConnection: close\r\n", 1)}, *others]


def outcome(call):
    """What comes of a call, as (status, text); the status is None where the answer breaks off."""
    try:
        got = call()
        return got.status, got.body.decode()
    except http.client.IncompleteRead as error:
        return None, error.partial.decode()


@pytest.mark.parametrize("steps, status, said", MODEL_FAULTS.values(), ids=list(MODEL_FAULTS))
@pytest.mark.usefixtures("only_stalls_take_time")
def test_call_of_a_model_server_that(assistant, upstream, steps, status, said):
    ways = [partial(way, **more) for way in (assistant.chat, assistant.lite) for more in ({}, {"stream": True})]
    for call in ways:
        upstream.script(steps, closing(says("hello") if call is ways[0] else streams("hello")))
        del assistant.logged[:]
        got, text = outcome(call)
        assert got is None or got >= 500, text
        assert "[DONE]" not in text
        assert re.search(said, text if got else "\n".join(assistant.logged))
        assert not [line for line in assistant.logged if "bug" in line or "Traceback" in line]
        assert outcome(call)[0] == 200
    records = assistant.trajectory()
    assert [record["status"] for record in records] == [status, 200] * 4
    assert all(record["error"] for record in records[::2] if status != 200)


# Nodes behind the tool manager ----------------------------------------------------------------------------------------


def reset_by(sock):
    """Nothing is sent, and the connection breaks."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    return []


def stalling(sock):
    """Nothing more is sent until the other side has had enough."""
    while sock.recv(65536):
        yield b""


HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"
NODE_FAULTS = {  # what it does in a call: status and words of the answer
    "resets": (reset_by, 502, "broke the connection"),
    "dies in mid-answer": (lambda _: [HALF], 502, "broke off"),
    "is silent": (stalling, 504, "silent|longer than"),
    "falls silent in mid-answer": (lambda sock: itertools.chain([HALF], stalling(sock)), 504, "silent|longer than"),
}


@pytest.mark.parametrize("pieces, status, said", NODE_FAULTS.values(), ids=list(NODE_FAULTS))
def test_call_of_a_node_that(tmp_path, runtime, monkeypatch, pieces, status, said):
    monkeypatch.setattr(rock_sdk, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(rock_ms, "TOOL_LOAD_SECONDS", 0.05)
    with managing(tmp_path / "data", runtime, request_timeout=0.1) as manager:
        manager.create("RenewInstance")
        with bad_node(manager, runtime, pieces):
            got = manager.ask("/execute_tool", {"tool_name": "bad"})
            assert (got.status, manager.status("bad")) == (status, ("running", ""))
            assert re.search("the tool bad_default does not answer: .*(%s)" % said, got.json()["message"])
        assert manager.call("RenewInstance", "x") == "x"


# Files that are full, gone or not ours any more -----------------------------------------------------------------------


def emptied(path):
    os.truncate(path, 0)


def moved(path):
    os.rename(path, path + ".old")


def replaced(path):
    os.unlink(path)
    with open(path, "w") as file:
        file.write("not ours\n")


CHANGES = [("/create_tool_service", "amap_weather"), ("/update_tool_service", "RenewInstance")]
CHANGES += [("/remove_tool", "RenewInstance")]
REGISTRY_FAULTS = {  # what becomes of the registry while the manager runs, and what its log says
    "is removed": (os.unlink, "tools.sqlite3: .*No such file or directory"),
    "is replaced": (replaced, "tools.sqlite3 was replaced, or emptied, while it was in use"),
    "is emptied": (emptied, "tools.sqlite3 was replaced, or emptied, while it was in use"),
    "has no room": (None, "tools.sqlite3: .*(full|I/O error)"),
}


@pytest.mark.parametrize("fault, said", REGISTRY_FAULTS.values(), ids=list(REGISTRY_FAULTS))
def test_registry_that(tmp_path, runtime, fault, said):
    """Nothing is acknowledged that the next manager would not find, and no node is left."""
    with managing(tmp_path / "data", runtime) as manager:
        manager.create("RenewInstance")
        with contextlib.ExitStack() as stack:
            if fault is None:
                stack.enter_context(files_of_at_most(100))
            else:
                fault(manager.registry_path)
            for path, name in CHANGES:
                del manager.logged[:]
                got = manager.ask(path, {"tool_name": name})
                assert (got.status, got.json()["message"]) == (500, str(rock_ms.storage_failure()))
                assert [line for line in manager.logged if re.search(said, line)]
        assert manager.call("RenewInstance", "x") == "x"
    assert runtime.nodes == {}


def test_registry_that_cannot_be_read_when_the_manager_stops(tmp_path, runtime, monkeypatch):
    def unreadable(_):
        raise rock_ms.StorageError("the registry: database disk image is malformed")

    with managing(tmp_path / "data", runtime) as manager:
        manager.create("RenewInstance")
        monkeypatch.setattr(rock_sdk.ToolRegistry, "nodes", unreadable)
    assert runtime.nodes == {}
    assert [line for line in manager.logged if "malformed" in line]


WAYS = {  # of asking a model: where, with which fields, with which settings of the assistant
    "chat": ("chat", {}, {}),
    "chat as a stream": ("chat", {"stream": True}, {}),
    "chat with a native model": ("chat", {}, {"tool_calling": "native"}),
    "stream of a native model": ("chat", {"stream": True}, {"tool_calling": "native"}),
    "agent": ("lite", {}, {}),
    "agent as a stream": ("lite", {"stream": True}, {}),
}


@pytest.mark.parametrize("way, more, settings", WAYS.values(), ids=list(WAYS))
def test_call_that_cannot_be_recorded(tmp_path, upstream, way, more, settings):
    """The client must not see the end of its answer; it is told that, and the log is told why."""
    full = tmp_path / "traj.jsonl"
    with assisting(tmp_path, upstream, recording_file=str(full), **settings) as assistant:
        full.unlink()
        os.symlink("/dev/full", str(full))
        reply = [says("hello")] if (way, more) == ("chat", {}) else streams("hello", " again")
        upstream.script([*reply[:3], {"wait": 0.05}, *reply[3:]], reply)  # so that what is held is not all of a stream
        status, text = outcome(partial(getattr(assistant, way), **more))
        assert status in (None, 500) and "[DONE]" not in text, text
        assert status is None or "cannot store this call" in text
        assert str(tmp_path) not in text
        assert [line for line in assistant.logged if "No space left on device" in line]
        assert not [line for line in assistant.logged if "Traceback" in line]
        full.unlink()
        assert outcome(partial(getattr(assistant, way), **more))[0] == 200
        assert [record["status"] for record in assistant.trajectory()] == [200]


def torn(path):
    """As a writer leaves it that was killed."""
    with open(path, "ab") as file:
        file.write(b'{"request":')


@pytest.mark.parametrize("fault", [os.unlink, moved, emptied, torn], ids=lambda fault: fault.__name__)
def test_call_is_recorded_whole_after_its_trajectory_was(assistant, fault):
    path = os.path.join(assistant.data_dir, rock_sdk.ASSISTANT_TRAJ_NAME)
    for _ in range(2):
        assert assistant.chat().status == 200
        with open(path) as file:
            lines = file.read().split("\n")
        assert (json.loads(lines[-2])["status"], lines[-1]) == (200, "")
        fault(path)


def index_of(assistant):
    """The file that holds what the user `test` has uploaded."""
    name = hashlib.sha256(b"test").hexdigest()[:32] + ".sqlite3"
    return os.path.join(assistant.data_dir, "knowledge", "files", name)


def uploads_of(assistant):
    return os.path.join(assistant.data_dir, "knowledge", "uploads")


@contextlib.contextmanager
def in_the_middle(monkeypatch, function, assistant):
    """Something becomes of an index while a file is added to it."""
    with monkeypatch.context() as patch:
        chunks_of = rock_sdk.chunks_of
        patch.setattr(rock_sdk, "chunks_of", lambda text: function(index_of(assistant)) or chunks_of(text))
        yield


@contextlib.contextmanager
def moved_away(path):
    os.rename(path, path + ".away")
    yield
    os.rename(path + ".away", path)


@contextlib.contextmanager
def emptied_for_a_while(path):
    with open(path, "rb") as file:
        content = file.read()
    emptied(path)
    yield
    with open(path, "wb") as file:
        file.write(content)


UPLOAD_FAULTS = {  # what happens to an upload, what the log says, and whether what was known is known once it is over
    "has no room in the index": (lambda *_: files_of_at_most(4096), "full|I/O error", True),
    "has no room of its own": (lambda *_: files_of_at_most(10), "cannot store an upload .*File too large", True),
    "has no directory": (lambda a, _: moved_away(uploads_of(a)), "cannot store an upload .*No such file", True),
    "has its index emptied before": (lambda a, _: emptied_for_a_while(index_of(a)), "no such table", True),
    "has its index removed meanwhile": (lambda a, m: in_the_middle(m, os.unlink, a), "No such file", False),
    "has its index replaced meanwhile": (lambda a, m: in_the_middle(m, replaced, a), "replaced while a file", False),
}


def known_of(assistant, user):
    return rock_sdk.KnowledgeBase(os.path.dirname(index_of(assistant))).names(user)


@pytest.mark.parametrize("fault, said, is_kept", UPLOAD_FAULTS.values(), ids=list(UPLOAD_FAULTS))
def test_upload_that(assistant, monkeypatch, fault, said, is_kept):
    """It is not acknowledged, nothing of it is left, others go on, and what was acknowledged is known."""
    for user in ("test", "other"):
        assert assistant.upload(user, a_txt=b"tea is hot").status == 200
    with fault(assistant, monkeypatch):
        got = assistant.upload(b_txt=b"coffee is cold " * 10)
        assert (got.status, got.json()["error"]["code"]) == (500, "storage_error")
        assert str(assistant.data_dir) not in got.body.decode()
        assert [line for line in assistant.logged if re.search(said, line)]
    assert known_of(assistant, "other") == ["a.txt"]
    assert os.listdir(uploads_of(assistant)) == []
    if not is_kept:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(index_of(assistant))  # which is not ours any more
    known = ["a.txt"] if is_kept else []
    assert known_of(assistant, "test") == known
    assert assistant.upload(b_txt=b"coffee is cold").status == 200
    assert known_of(assistant, "test") == [*known, "b.txt"]


# No descriptor left ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_descriptor_left():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 2, hard))
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    try:
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Kept(contextlib.closing):
    """A client that has its connection, and keeps it."""

    def __init__(self, port):
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        super().__init__(self._connection)
        self("GET", "/health")

    def __enter__(self):
        return self

    def __call__(self, method, path, value=None, kind="application/json"):
        body = value if isinstance(value, bytes) else json.dumps(value).encode("utf-8")
        self._connection.request(method, path, body, {"Content-Type": kind})
        response = self._connection.getresponse()
        return response.status, json.loads(response.read().decode("utf-8"))


@contextlib.contextmanager
def adopted_node(directory, _):
    """A tool manager with a node that it has not begun itself."""
    directory.mkdir()
    first = Manager(directory, on_stop="keep")
    first.server.start()
    first.create("RenewInstance")
    first.server.stop()
    swept = threading.Event()
    patched = mock.patch.object(rock_sdk.ProcessRuntime, "bound_log", lambda *_: swept.set())
    with patched, managing(directory) as manager:
        assert manager.status("RenewInstance") == ("running", "")
        assert swept.wait(TIMEOUT)  # and has closed what it had opened
        yield manager


@contextlib.contextmanager
def fresh_node(directory, _):
    """A tool node whose only worker has just ended."""
    directory.mkdir()
    with running(directory, Node, tool_workers=1) as node:
        assert node.act("import os; os._exit(0)").status == 500
        yield node


@contextlib.contextmanager
def known_model(directory, upstream):
    """An assistant that has asked its model server before."""
    with assisting(directory, upstream) as assistant:
        assert assistant.chat().status == 200
        yield assistant


BODY, KIND = form({"uuid_str": "test"}, {"a.txt": b"tea"})
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TOO_MANY = "Too many open files"
STARVED = {  # a service, what it is asked, what it answers, and what once there are descriptors again
    "a living node is not taken for dead": (
        adopted_node,
        ("POST", "/check_tool_service_status", {"tool_name": "RenewInstance"}),
        (200, "it does not answer, and it cannot be seen whether it runs: " + TOO_MANY),
        (200, ""),
    ),
    "no tool is begun": (
        adopted_node,
        ("POST", "/create_tool_service", {"tool_name": "amap_weather"}),
        (503, "the tool manager cannot look for a port: " + TOO_MANY),
        (200, ""),
    ),
    "a call of a tool": (
        fresh_node,
        ("POST", "/execute_tool", {"params": {"code": "result = 1"}}),
        (500, "no process can be begun for the tool: " + TOO_MANY),
        (200, ""),
    ),
    "a call of a model": (known_model, ("POST", "/v1/chat/completions", CHAT), (502, TOO_MANY), (200, "")),
    "an upload": (assisting, ("POST", "/v1/files", BODY, KIND), (500, "cannot store this call"), (200, "")),
}


@pytest.mark.parametrize("serve, asked, starved, fed", STARVED.values(), ids=list(STARVED))
def test_without_a_descriptor(tmp_path, upstream, monkeypatch, serve, asked, starved, fed):
    """Whoever is connected is told; whoever connects waits, and is answered when there are some again."""
    monkeypatch.setattr(rock_ms, "POOL_SECONDS", -1.0)  # no connection is kept for the next call
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(serve(tmp_path / "data", upstream))
        client = stack.enter_context(Kept(service.port))
        others = [stack.enter_context(socket.socket()) for _ in range(4)]
        wait_until(lambda: len(service.server.http._connections) == 1)  # or what is being closed would leave room
        for is_starved, (status, said) in ((True, starved), (False, fed)):
            with no_descriptor_left() if is_starved else contextlib.nullcontext():
                got, answer = client(*asked)
                for other in others if is_starved else ():
                    other.settimeout(TIMEOUT)
                    other.connect(("127.0.0.1", service.port))
                if is_starved:
                    wait_until(lambda: [line for line in service.logged if "none can be accepted" in line])
            assert got == status and said in answer["message"], answer
            assert not [line for line in service.logged if "bug" in line or "Traceback" in line]
        for other in others:
            other.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert other.recv(100).startswith(b"HTTP/1.1 200 ")


def test_without_a_descriptor_a_watched_agent_lives(tmp_path):
    with running(tmp_path, Service) as service, subprocess.Popen(["sleep", "600"]) as agent:
        try:
            service.ask({"pid": agent.pid}, path="/v1/agent/watch")
            with no_descriptor_left():
                assert not service.server._watch._is_last_gone()
            assert not service.server._watch._is_last_gone()
        finally:
            agent.kill()
        wait_until(lambda: service.server.session.has_ended)


# Logs -----------------------------------------------------------------------------------------------------------------


def grown(path):
    with open(path, "ab") as file:
        file.write(b"x" * rock_ms.MAX_LOG_BYTES + b"\n")


def grown_without_room(path):
    """There is no room for a second file."""
    os.mkdir(path + ".1")
    grown(path)


LOG_FAULTS = [os.unlink, moved, replaced, emptied, grown, grown_without_room]


@pytest.mark.parametrize("fault", LOG_FAULTS, ids=lambda fault: fault.__name__)
def test_log_that_is(tmp_path, monkeypatch, fault):
    """What is said later is in the file that has the log's name."""
    monkeypatch.setattr(rock_ms, "MAX_LOG_BYTES", 1000)
    path = str(tmp_path / "assistant.log")
    logger = rock_ms.open_logger(path, False)
    logger.info("before")
    fault(path)
    logger.info("after")
    logger.handlers[0].close()
    with open(path) as file:
        said = file.read()
    assert "INFO after" in said and len(said) < 1000


def test_log_that_has_no_room_ends_nothing(tmp_path):
    path = str(tmp_path / "assistant.log")
    os.symlink("/dev/full", path)
    logger = rock_ms.open_logger(path, False)
    logger.info("before")
    os.unlink(path)
    logger.info("after")
    logger.handlers[0].close()
    with open(path) as file:
        assert "INFO after" in file.read()


def test_log_is_bounded_whoever_writes_to_it(tmp_path, monkeypatch):
    """The service's own logger, and as its standard error whatever it begins; one earlier part is kept."""
    monkeypatch.setattr(rock_ms, "MAX_LOG_BYTES", 1000)
    path = str(tmp_path / "assistant.log")
    logger = rock_ms.open_logger(path, False)
    with open(path, "ab", 0) as errors:
        for number in range(100):
            errors.write(b"of a tool: %03d\n" % number)
            logger.info("%03d", number)
    logger.handlers[0].close()
    said = ""
    for name in (path + ".1", path):
        assert os.path.getsize(name) < 1100
        with open(name) as file:
            said += file.read()
    numbers = [int(line[-3:]) for line in said.splitlines()[1:]]
    assert numbers == sorted(numbers) and numbers[-2:] == [99, 99] and len(numbers) > 25
    assert sorted(os.listdir(str(tmp_path))) == ["assistant.log", "assistant.log.1"]


def test_log_that_somebody_else_is_bounding_is_left_to_them(tmp_path, monkeypatch):
    monkeypatch.setattr(rock_ms, "MAX_LOG_BYTES", 1000)
    path = str(tmp_path / "assistant.log")
    grown(path)
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rock_ms.bound_log(path)
    assert os.listdir(str(tmp_path)) == ["assistant.log"] and os.path.getsize(path) > 1000
    rock_ms.bound_log(path)
    assert os.path.getsize(path + ".1") == 1000 and os.path.getsize(path) == 0


def test_file_that_standard_error_goes_to_is_not_ours_to_empty(tmp_path):
    """It may hold another program's output, and a directory of devices is no place for the rest of it."""
    path = str(tmp_path / "all")
    code = "import rock_ms; rock_ms.MAX_LOG_BYTES = 10; log = rock_ms.open_logger('/dev/stderr', False); log.info('a')"
    with open(path, "ab") as file:
        file.write(b"another program's line, which is longer\n")
        file.flush()
        subprocess.run(
            [sys.executable, "-c", code + "; log.info('b')"], stderr=file, cwd=os.path.dirname(SCRIPT), check=True
        )
    with open(path) as file:
        assert [line.split()[-1] for line in file] == ["longer", "a", "b"]
    assert not os.path.exists("/dev/stderr.1")


def test_log_of_a_node_that_talks_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(rock_ms, "MAX_LOG_BYTES", 10000)
    monkeypatch.setattr(rock_sdk, "SWEEP_SECONDS", 0.02)
    talk = 'def talk(text: str) -> None:\n    """Talk."""\n    print(text)\n'
    tools = write_tools(tmp_path / "tools", talk=talk)
    with managing(tmp_path / "data", tool_dir=tools) as manager:
        manager.create("talk")
        path = os.path.join(manager.place(manager.node("talk")), "node.log")
        manager.call("talk", {"text": "x" * 20000})
        wait_until(lambda: os.path.exists(path + ".1") and os.path.getsize(path) < 10000)
        assert os.path.getsize(path + ".1") <= 20000
        manager.call("talk", {"text": "and again"})
        with open(path) as file:
            assert "and again" in file.read()


def test_log_of_vllm_is_bounded_as_it_is_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(rock_ms, "MAX_LOG_BYTES", 1000)
    monkeypatch.setattr(rock_sdk.VLLMServer, "base_url", "http://127.0.0.1:9/v1")
    monkeypatch.setattr(rock_sdk.VLLMServer, "is_alive", lambda _: True)
    path = str(tmp_path / "vllm.log")
    vllm = rock_sdk.VLLMServer("weights", None, [], path)
    clients = rock_sdk.ModelClients(rock_sdk.AssistantSettings(model="weights"), None, None, vllm)
    with mock.patch.object(rock_ms, "ProxyService"):
        grown(path)
        clients.own()
    assert (os.path.getsize(path), os.path.getsize(path + ".1")) == (0, 1000)


# The clock ------------------------------------------------------------------------------------------------------------


class Clock:
    """The wall clock of this process, which somebody sets."""

    def __init__(self, monkeypatch):
        self.shift, now = 0.0, time.time
        monkeypatch.setattr(time, "time", lambda: now() + self.shift)


class SilentRuntime(FakeRuntime):
    """Its nodes are there, and answer once they are told to.  looks: how often one was looked at."""

    looks = 0

    def begin(self, node, order, _):
        self.nodes[node.node_id] = None
        self.begun.append((node, order))

    def ended(self, node):
        self.looks += 1
        return super().ended(node)

    def answer(self):
        (node, _), *_ = self.begun
        self.nodes[node.node_id] = FakeNode(node)


@contextlib.contextmanager
def starting_a_tool(directory, _):
    runtime = SilentRuntime()
    with mock.patch.object(rock_sdk, "LOOK_SECONDS", 0.01), managing(directory, runtime) as manager:
        manager.output("/create_tool_service", "RenewInstance")
        wait_until(lambda: runtime.looks)
        yield
        seen = runtime.looks
        wait_until(lambda: runtime.looks > seen + 2 or manager.status("RenewInstance")[0] != "pending")
        runtime.answer()
        assert manager.settled("RenewInstance") == ("running", "")


@contextlib.contextmanager
def waiting_for_a_node(directory, _):
    """A call through the manager; meanwhile a sweep."""
    runtime, go = FakeRuntime(), threading.Event()
    with managing(directory, runtime) as manager:
        manager.create("RenewInstance")
        fake = runtime.nodes[manager.node("RenewInstance").node_id]
        fake.execute = lambda call: go.wait(TIMEOUT) and rock_ms.envelope("done")
        call = Later(lambda: manager.call("RenewInstance"))
        yield
        go.set()
        assert call.result() == "done"


@contextlib.contextmanager
def sweeping(directory, _):
    runtime = FakeRuntime()
    with mock.patch.object(rock_sdk, "SWEEP_SECONDS", 0.05), managing(directory, runtime) as manager:
        manager.create("RenewInstance")
        yield
        runtime.end(manager.node("RenewInstance").node_id)
        wait_until(lambda: [line for line in manager.logged if "RenewInstance_default is failed: it ended" in line])


@contextlib.contextmanager
def running_a_tool(directory, _):
    directory.mkdir()
    began, until, looks = str(directory / "began"), str(directory / "until"), []
    is_alive = rock_ms.ToolWorker.is_alive
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(rock_ms, "WORKER_LOOK_SECONDS", 0.01))
        look = mock.patch.object(rock_ms.ToolWorker, "is_alive", lambda worker: looks.append(1) or is_alive(worker))
        stack.enter_context(look)
        node = stack.enter_context(running(directory, Node, source=HOLD, tool="hold"))
        client = stack.enter_context(Kept(node.port))
        call = Later(lambda: node.execute({"began": began, "until": until}))
        wait_until(lambda: os.path.exists(began))
        yield
        seen = len(looks)
        wait_until(lambda: len(looks) > seen + 2 or call.is_done())
        open(until, "w").close()
        assert call.result().json()["output"] == "held"
        assert client("GET", "/health")[0] == 200  # the connection was idle for a day, one might think


@contextlib.contextmanager
def asking_a_model(directory, upstream):
    with assisting(directory, upstream) as assistant:
        upstream.script([{"gate": "go"}, says("hello")])
        call = Later(assistant.chat)
        upstream.seen(1)
        yield
        upstream.open("go")
        assert call.result().status == 200
        (record,) = assistant.trajectory()
        assert 0 <= record["response_time"] <= TIMEOUT
        assert record["end_time"] == pytest.approx(record["start_time"] + record["response_time"], abs=0.01)
        assert abs(assistant.chat().json()["created"] - time.time()) < TIMEOUT


@pytest.mark.parametrize("shift", [DAY, -DAY], ids=["forward", "back"])
@pytest.mark.parametrize(
    "doing",
    [starting_a_tool, waiting_for_a_node, sweeping, running_a_tool, asking_a_model],
    ids=lambda doing: doing.__name__,
)
def test_clock_that_is_set_while(tmp_path, upstream, monkeypatch, doing, shift):
    """Nothing comes too early, too late or to nothing."""
    clock = Clock(monkeypatch)
    with doing(tmp_path / "data", upstream):
        clock.shift = shift


# Signals in the middle of everything ----------------------------------------------------------------------------------

SLOW = "import time\nwhile True:\n    time.sleep(0.05)\n"


class Server:
    """A server as the command line runs it in the foreground, and what it says."""

    def __init__(self, directory, module, *words):
        self.directory, self.data_dir = directory, directory / "data"
        kind = words[words.index("--type") + 1]
        self.state = rock_sdk.SERVERS[kind].state(str(self.data_dir)) if kind in rock_sdk.SERVERS else None
        self.state = self.state or rock_ms.ServiceState(str(self.data_dir))
        command = [sys.executable, "-m", module.__name__, "start", *map(str, words), "--port", "0"]
        # By its TMPDIR all that it begins is found.
        environ = clean_environ(PYTHONPATH=PYTHONPATH, TMPDIR=str(directory), SERVICE_HOST="127.0.0.1")
        with open(str(directory / "said"), "ab") as said:
            options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": said, "env": environ}
            self._process = subprocess.Popen([*command, "--foreground", "--data-dir", str(self.data_dir)], **options)
        wait_until(lambda: self.state.read().get("pid") == self._process.pid and "port" in self.state.read())
        self.port = self.state.read()["port"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.kill()
        self._process.wait()
        rock_sdk.kill_marked(os.fsencode("TMPDIR=%s" % self.directory))

    def said(self):
        return (self.directory / "said").read_text()

    def signal(self, number):
        """Send it a signal, and wait until it has been heard."""
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()
        else:
            wait_until(lambda: "stopping: %s" % signal.Signals(number).name in self.said())

    def end(self):
        """(exit code, its last line)."""
        return self._process.wait(TIMEOUT), self.said().splitlines()[-1][24:]

    def post(self, path, value):
        return ask(self.port, value, path=path)


def cut_off(call):
    """Assert that a call came to no end."""
    with pytest.raises((OSError, http.client.HTTPException)):
        call.result()


def manager_server(directory):
    tools = write_tools(directory / "tools", hold=HOLD, slow=SLOW)
    words = ("--type", "tool-manager", "--runtime", "process", "--first-node-port", free_port(), "--tool-dir", tools)
    return Server(directory, rock_sdk, *words)


def status_of(server, tool_name):
    answer = server.post("/check_tool_service_status", {"tool_name": tool_name}).json()
    return answer["output"]["status"], answer["message"]


def busy_manager(server, began, until):
    """A tool at work, and another that is being created, both acknowledged."""
    for name in ("hold", "slow"):
        assert server.post("/create_tool_service", {"tool_name": name}).status == 200
    wait_until(lambda: status_of(server, "hold") == ("running", ""))
    params = {"began": str(began), "until": str(until)}
    call = Later(lambda: server.post("/execute_tool", {"tool_name": "hold", "params": params}))
    wait_until(lambda: began.exists() and began.read_text())
    return call


def test_tool_manager_is_ended_while_a_tool_works_and_another_is_created(tmp_path):
    began, until = tmp_path / "began", tmp_path / "until"
    with manager_server(tmp_path) as server:
        call = busy_manager(server, began, until)
        server.signal(signal.SIGTERM)
        until.touch()
        assert call.result().json()["output"] == "held"
        assert server.end() == (0, "INFO stopped")
        assert sandboxes.processes_with(str(tmp_path)) == []
        assert os.listdir(str(server.data_dir / "nodes")) == []
    with contextlib.closing(rock_sdk.ToolRegistry(str(server.data_dir / rock_sdk.REGISTRY_NAME))) as registry:
        ends = [(node.tool_name, node.status, node.message) for node in registry.nodes()]
    assert ends == [(name, "exited", rock_sdk.STOPPED) for name in ("hold", "slow")]


def test_tool_manager_is_killed_while_a_tool_works_and_another_is_created(tmp_path):
    began, until = tmp_path / "began", tmp_path / "until"
    with manager_server(tmp_path) as server:
        call = busy_manager(server, began, until)
        server.signal(signal.SIGKILL)
        cut_off(call)
        wait_for_end(int(began.read_text()))  # nobody waits for that tool's answer
        with manager_server(tmp_path) as server:
            why = "the tool manager ended while it was starting the tool; create it again"
            assert status_of(server, "slow") == ("failed", why)
            assert status_of(server, "hold") == ("running", "")
            wait_until(lambda: len(os.listdir(str(server.data_dir / "nodes"))) == 1)
            params = {"began": str(began), "until": str(tmp_path)}
            assert server.post("/execute_tool", {"tool_name": "hold", "params": params}).json()["output"] == "held"
            server.signal(signal.SIGINT)
            assert server.end() == (0, "INFO stopped")
            assert sandboxes.processes_with(str(tmp_path)) == []
            assert os.listdir(str(server.data_dir / "nodes")) == []


class BusyAssistant:
    """An assistant that has taken a file and answered a call, and is in the middle of three more things.

    stream, agent: the answers to come.  began: has the process of the agent's tool.
    """

    def __init__(self, directory, port, upstream):
        self._directory, self._upstream, self.port = directory, upstream, port
        self.began, self._until = directory / "began", directory / "until"
        self._upload(b"tea", "a.txt").finish()
        upstream.script(says("hello"), [*PIECE, {"gate": "go"}, *sse(delta("2", finish="stop"))[1:]])
        assert ask(port, CHAT).status == 200
        self._client = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        self._client.request("POST", "/v1/chat/completions", json.dumps({**CHAT, "stream": True}), JSON)
        self._response = self._client.getresponse()
        self._response.readline()
        params = json.dumps({"began": str(self.began), "until": str(self._until)})
        upstream.script(streams("Action: hold\nAction Input: %s\n" % params), streams("done"))
        lite = {"messages": CHAT["messages"], "llm_config": {"model": "m"}, "agent_config": {"tools": ["hold"]}}
        self.agent = Later(lambda: ask(port, lite, path="/v1/assistants/lite"))
        wait_until(lambda: self.began.exists() and self.began.read_text())
        self.stream = Later(lambda: self._response.read())
        self._half = self._upload(b"coffee", "b.txt")

    def _upload(self, content, name):
        """A file that is half way there."""
        return HalfUpload(self.port, *form({"uuid_str": "test"}, {name: content}))

    def go_on(self):
        """Let all come to its end; what came of each."""
        self._until.touch()
        self._upstream.open("go")
        return self._half.finish(), self.stream.result(), self.agent.result()

    def cut_off(self):
        """Assert that nothing did."""
        self._half.cut_off()
        for call in (self.stream, self.agent):
            cut_off(call)
        wait_for_end(int(self.began.read_text()))

    def close(self):
        self._upstream.open("go")
        self._client.close()


class HalfUpload:
    def __init__(self, port, body, kind):
        head = "POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\n" % kind
        head += "Content-Length: %d\r\n\r\n" % len(body)
        self._sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self._sock.sendall(head.encode() + body[:-20])
        self._rest = body[-20:]

    def finish(self):
        with self._sock:
            self._sock.sendall(self._rest)
            assert self._sock.recv(65536).startswith(b"HTTP/1.1 200 ")

    def cut_off(self):
        with self._sock, contextlib.suppress(ConnectionResetError):
            assert not self._sock.recv(65536).startswith(b"HTTP/1.1 200 ")


JSON = {"Content-Type": "application/json"}


def assistant_server(directory, upstream):
    tools = write_tools(directory / "tools", hold=HOLD)
    return Server(directory, rock_sdk, "--type", "assistant", "--model-server", upstream.url, "--tool-dir", tools)


def kept_by(data_dir):
    """(the files that are known, the statuses of the calls that are recorded, what is left of uploads)."""
    knowledge = rock_sdk.KnowledgeBase(str(data_dir / "knowledge" / "files"))
    with open(str(data_dir / rock_sdk.ASSISTANT_TRAJ_NAME)) as file:
        statuses = [json.loads(line)["status"] for line in file]
    return knowledge.names("test"), sorted(statuses), len(os.listdir(str(data_dir / "knowledge" / "uploads")))


def test_assistant_is_ended_in_the_middle_of_a_stream_an_upload_and_a_tool(tmp_path, upstream):
    with assistant_server(tmp_path, upstream) as server:
        with contextlib.closing(BusyAssistant(tmp_path, server.port, upstream)) as busy:
            wait_until(lambda: kept_by(server.data_dir)[2])
            server.signal(signal.SIGHUP)
            _, stream, agent = busy.go_on()
        assert stream.endswith(b"data: [DONE]\n\n")
        assert "<result>held</result>\nAnswer:done" in agent.json()["output"]["response"]
        assert server.end() == (0, "INFO stopped")
        assert kept_by(server.data_dir) == (["a.txt", "b.txt"], [200] * 4, 0)
        assert sandboxes.processes_with(str(tmp_path)) == []


def test_assistant_is_killed_in_the_middle_of_a_stream_an_upload_and_a_tool(tmp_path, upstream):
    with assistant_server(tmp_path, upstream) as server:
        with contextlib.closing(BusyAssistant(tmp_path, server.port, upstream)) as busy:
            wait_until(lambda: kept_by(server.data_dir)[2])
            server.signal(signal.SIGKILL)
            busy.cut_off()
        assert kept_by(server.data_dir) == (["a.txt"], [200, 200], 1)
        with assistant_server(tmp_path, upstream) as server:
            assert ask(server.port, {**CHAT, "stream": True}).status == 200
            assert kept_by(server.data_dir) == (["a.txt"], [200] * 3, 0)
            server.signal(signal.SIGINT)
            assert server.end() == (0, "INFO stopped")
        assert sandboxes.processes_with(str(tmp_path)) == []


def test_assistant_cuts_off_what_does_not_end_and_writes_it_down(tmp_path, upstream):
    tools = write_tools(tmp_path / "tools", hold=HOLD)
    (tmp_path / "data").mkdir()
    with assisting(tmp_path / "data", upstream, tool_dir=tools) as assistant:
        with contextlib.closing(BusyAssistant(tmp_path, assistant.port, upstream)) as busy:
            assistant.server.stop()
            busy.cut_off()
    assert kept_by(tmp_path / "data") == (["a.txt"], [200, 200, 499, 499], 0)


def test_tool_node_is_ended_while_its_tool_works(tmp_path):
    began, until = tmp_path / "began", tmp_path / "until"
    (tmp_path / "hold.py").write_text(HOLD)
    words = ("--type", "tool-node", "--tool", "hold", "--tool-file", tmp_path / "hold.py")
    with Server(tmp_path, rock_ms, *words) as server:
        params = {"began": str(began), "until": str(until)}
        call = Later(lambda: server.post("/execute_tool", {"params": params}))
        wait_until(lambda: began.exists() and began.read_text())
        server.signal(signal.SIGHUP)
        until.touch()
        assert call.result().json()["output"] == "held"
        assert server.end() == (0, "INFO stopped")
        assert sandboxes.processes_with(str(tmp_path)) == []


BROKEN_END = """
import contextlib, logging, os, signal, sys
import rock_ms

@contextlib.contextmanager
def service():
    os.kill(os.getpid(), signal.SIGTERM)
    yield {}, logger
    raise rock_ms.StorageError("what it held cannot be written")

logger = logging.Logger("test")
logger.info = lambda *words: sys.stderr.write("takes its place: %d\\n" % os.open("other", os.O_RDWR | os.O_CREAT))
reader, writer = os.pipe()
sys.stderr.write("was told: %d\\n" % writer)
rock_ms.run_service(rock_ms.ServiceState("."), writer, service())
"""


def test_end_that_fails_is_said_in_the_log_and_in_no_other_file(tmp_path):
    """Whoever started it has been told that it runs, and the descriptor for that is another file's by now."""
    command = [sys.executable, "-c", BROKEN_END]
    environ = clean_environ(PYTHONPATH=PYTHONPATH)
    done = subprocess.run(command, cwd=str(tmp_path), stderr=subprocess.PIPE, env=environ, timeout=TIMEOUT, check=False)
    told, other, *said = done.stderr.decode().splitlines()
    assert told.rpartition(" ")[2] == other.rpartition(" ")[2]
    assert (done.returncode, said[-1].partition(": ")[2]) == (1, "what it held cannot be written")
    assert (tmp_path / "other").read_bytes() == b""


def test_end_that_fails_leaves_no_state_of_a_service_that_runs(tmp_path):
    class Broken:
        http, ready = mock.Mock(host="127.0.0.1", port=1), {"about": ""}
        start = mock.Mock()
        stop = mock.Mock(side_effect=rock_ms.StorageError("no room"))

    state, log = rock_sdk.manager_state(str(tmp_path)), str(tmp_path / "log")
    settings = rock_sdk.ManagerSettings()
    with pytest.raises(rock_ms.StorageError, match="no room"):
        with rock_ms.serving(state, settings, {}, lambda *_: Broken, log, False) as (_, logger):
            assert state.read()["pid"] == os.getpid()
    logger.handlers[0].close()
    assert "pid" not in state.read()


# Directories that cannot be written, and files that stand in the way --------------------------------------------------

DROP_CAPABILITY, WRITE_ANYWHERE = 24, 1  # PR_CAPBSET_DROP and CAP_DAC_OVERRIDE
NOBODY = 65534


def as_anybody():
    """What a child does before it begins: be bound by permissions, also where it is the administrator."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.getuid() == 0 and libc.prctl(DROP_CAPABILITY, WRITE_ANYWHERE, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot give up writing anywhere")


def somebody_elses(directory):
    """A directory that we may read, and not write, as long as we are bound by permissions."""
    directory.mkdir()
    directory.chmod(0o555)
    if os.getuid() == 0:
        os.chown(str(directory), NOBODY, NOBODY)
    return directory


def below_a_file(directory):
    """Not even the administrator can make that."""
    (directory / "file").write_text("")
    return directory / "file" / "data"


KINDS = {
    "tool-manager": (rock_sdk, "--runtime", "process"),
    "assistant": (rock_sdk, "--model-server", "http://127.0.0.1:9/v1"),
    "tool-node": (rock_ms, "--tool", "RenewInstance"),
}


def refusal_to_start(kind, data_dir, *words, **options):
    """The one line in which a server says why it does not start."""
    module, *own = KINDS[kind]
    command = (module.__name__, "start", "--type", kind, *own, *words, "--port", 0, "--data-dir", data_dir)
    done = run_cli(*command, script="-m", env=clean_environ(PYTHONPATH=PYTHONPATH), check=1, **options)
    assert done.out == ""
    (line,) = done.err.splitlines()
    return line.partition(": ")[2]


@pytest.mark.parametrize("kind", ["tool-manager", "assistant"])
def test_data_directory_that_cannot_be_made(tmp_path, kind):
    data_dir = below_a_file(tmp_path)
    said = "cannot make %s: Not a directory; %s" % (data_dir, rock_ms.GIVE_DATA_DIR)
    assert refusal_to_start(kind, data_dir) == said


@pytest.mark.parametrize("kind, where", [("tool-manager", ()), ("assistant", ["--foreground"]), ("tool-node", ())])
def test_data_directory_that_is_somebody_elses(tmp_path, kind, where):
    data_dir = somebody_elses(tmp_path / "data")
    try:
        said = refusal_to_start(kind, data_dir, *where, preexec_fn=as_anybody)
    except subprocess.SubprocessError:
        pytest.skip("the administrator cannot give up writing anywhere here")
    assert "Permission denied" in said and str(data_dir) in said


def full_disk():
    """What a child does before it begins: have no room for anything."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_full_disk_is_said_at_the_start(tmp_path):
    said = "cannot write %s: File too large" % (tmp_path / "assistant.json")
    assert refusal_to_start("assistant", tmp_path, "--foreground", preexec_fn=full_disk) == said


IN_THE_WAY = {  # of which file of which server a directory takes the place, and what is said
    "registry": ("tool-manager", "tools.sqlite3", "the registry .*tools.sqlite3: .*Is a directory"),
    "state": ("tool-manager", "tool-manager.json", "cannot write .*tool-manager.json: Is a directory"),
    "trajectory": ("assistant", "AssistantTraj.jsonl", "cannot open .*AssistantTraj.jsonl: Is a directory"),
}


@pytest.mark.parametrize("kind, name, said", IN_THE_WAY.values(), ids=list(IN_THE_WAY))
def test_directory_in_place_of_the(tmp_path, kind, name, said):
    (tmp_path / name).mkdir()
    assert re.search(said, refusal_to_start(kind, tmp_path, "--foreground").splitlines()[-1])


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"pid"'], ids=["gone", "empty", "other", "torn"])
def test_state_file_that_does_not_say_who_runs(tmp_path, monkeypatch, content):
    """What runs is not taken for another's, nor is another started beside it."""
    monkeypatch.setattr(rock_ms, "PROBE_SECONDS", 0.01)
    state = rock_sdk.manager_state(str(tmp_path))
    state.acquire()
    if content is not None:
        (tmp_path / "tool-manager.json").write_bytes(content)
    other = rock_sdk.manager_state(str(tmp_path))
    with pytest.raises(rock_ms.RockError, match="its state file does not say as which process; its log does"):
        rock_ms.stop_service(other)
    with pytest.raises(rock_ms.RockError, match="a tool manager already runs"):
        other.acquire()
    state.release()
    assert rock_ms.stop_service(other) == 0


# The model service of a sandbox, supervised by the SDK ----------------------------------------------------------------


def test_answer_for_which_a_sandbox_has_no_room_is_said_and_can_be_given_again(tmp_path):
    """As long as a file is there, what writes an answer may write nothing."""
    full, answers = tmp_path / "full", []
    full.touch()
    ask_again = "rock model-service anti-call-llm --index ${index} --response ${response_payload}"
    config = {"anti_call_llm_cmd": "if [ -e %s ]; then ulimit -f 0; fi; %s" % (full, ask_again)}

    def policy(request):
        answers.append(request["messages"][0]["content"])
        return completion("answer")

    async def supervise():
        async with sandbox_of("local", tmp_path) as sandbox:
            service = rock_sdk.ModelService(sandbox, config)
            await service.install()
            await service.start()
            port = int(re.search(r":(\d+)/", service.base_url).group(1))
            agent = Later(lambda: ask(port, chat("question")))
            with pytest.raises(rock_sdk.SandboxError, match="cannot write .*LLMService.log: File too large"):
                await service.run(policy)
            full.unlink()
            later = asyncio.ensure_future(service.run(policy, service.last_index))
            answer = await rock_sdk.in_thread(agent.result)
            with subprocess.Popen(["true"]) as ended:
                pass
            await service.watch_agent(ended.pid)
            return answer.json(), await later

    answer, count = sandboxes.run(supervise())
    assert answer["choices"][0]["message"]["content"] == "answer"
    assert (answers, count) == (["question"] * 2, 1)


# Clients that hang up -------------------------------------------------------------------------------------------------


def test_hang_up_is_seen_while_the_tool_manager_says_nothing(tmp_path, upstream):
    with assisting(tmp_path, upstream, tool_manager_url=upstream.url[: -len("/v1")]) as assistant:
        upstream.script([{"stall": True}])
        lite = {"messages": CHAT["messages"], "llm_config": {"model": "m"}, "use_tool_api": True}
        lite["agent_config"] = {"tools": ["RenewInstance"]}
        client = http.client.HTTPConnection("127.0.0.1", assistant.port, timeout=TIMEOUT)
        with contextlib.closing(client):
            client.request("POST", "/v1/assistants/lite", json.dumps(lite), JSON)
            assert upstream.seen(1)[0]["target"] == "/create_tool_service"
        upstream.wait_closed()
        wait_until(lambda: [line for line in assistant.logged if "/v1/assistants/lite 499 " in line])
