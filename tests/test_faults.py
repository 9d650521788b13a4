"""A script of faults: what the local service, the proxy and the replay do when the disk, the clock, a file, a
descriptor or a process fails them in mid-service.

FAULTS, at the end, is the table: what is done, and what must hold.  Most rows meet a real process that has been through
the rows before, and end in its `check`: every acknowledged call (one whose client got all of its answer) stands in the
trajectory, once, with that answer, and a call that follows works.
"""

import ast
import collections
import contextlib
import ctypes
import errno
import http.client
import inspect
import itertools
import json
import logging
import mmap
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from email.utils import formatdate

import pytest

import rock_ms
from support import (
    SCRIPT,
    TIMEOUT,
    Later,
    Proxy,
    ask,
    chat,
    clean_environ,
    completion,
    raw_request,
    run_cli,
    running,
    wait_until,
)
from upstream import Upstream, answer, delta, sse

pytestmark = [
    pytest.mark.load,
    pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of a running process are set on Linux only"),
]
DAY = 86400.0
JUMPING = float("inf")  # a clock that is a day ahead and a day behind in turn, at each look
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL]
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
LIBC = ctypes.CDLL(None)

# A command line whose wall clock can be set from outside: `rock_ms` with another time.time.
WITH_CLOCK = """
import itertools, mmap, struct, sys, time
with open(sys.argv[1], "rb") as file:
    shift = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
real, days = time.time, itertools.cycle((-86400.0, 86400.0))
def now():
    seconds, = struct.unpack("d", shift)
    return real() + (next(days) if seconds == float("inf") else seconds)
time.time = now
sys.path.insert(0, sys.argv[2])
sys.argv[:3] = ["rock-ms"]
import rock_ms
sys.exit(rock_ms.main())
"""


def be_ordinary():
    """In a new process: signals as a terminal gives them, and, of root, no right to write what is not writable."""
    for number in SIGNALS[:-1]:
        signal.signal(number, signal.SIG_DFL)
    LIBC.prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)  # it holds from the next exec on


def must_be_unwritable(directory):
    command = ["sh", "-c", ': > "$0"', os.path.join(str(directory), "probe")]
    if subprocess.run(command, preexec_fn=be_ordinary, stderr=subprocess.DEVNULL).returncode == 0:
        pytest.skip("this user may write whatever the modes say, and cannot give that up")


def prompt_of(record):
    return record["request"]["messages"][0]["content"]


def content_of(record):
    return record["response"]["choices"][0]["message"]["content"]


def reply_to(prompt):
    return "re: " + prompt


class Clock:
    """The wall clock of processes that run WITH_CLOCK."""

    def __init__(self, path):
        path.write_bytes(bytes(8))
        self.path, self.seconds = str(path), 0.0
        with open(self.path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8)

    def shift(self, seconds):
        """Be so many seconds ahead, or JUMPING."""
        self._map[:] = struct.pack("d", seconds)
        self.seconds = seconds

    def __call__(self):
        return time.time() + (self.seconds if self.seconds != JUMPING else 0)

    def command(self, *words):
        return [sys.executable, "-c", WITH_CLOCK, self.path, os.path.dirname(SCRIPT), *words]


class ServiceProcess:
    """A service in a process of its own.  acknowledged: (prompt, what its client got), of all calls so far."""

    words = ()
    is_broken = False  # a row on it has failed
    append_mode = "false"

    def __init__(self, directory):
        self.data_dir = str(directory / "data")
        self.clock = Clock(directory / "clock")
        self.acknowledged = []
        self.process = None
        self._errors = open(str(directory / "errors"), "ab+")
        self._numbers = itertools.count(1)

    def path(self, name):
        return os.path.join(self.data_dir, name)

    @property
    def log(self):
        return self.path("LLMService.log")

    @property
    def trajectory(self):
        return self.path("LLMTraj.jsonl")

    @property
    def own_log(self):
        return self.path("model_service.log")

    def said(self):
        """The service's own log."""
        with open(self.own_log, encoding="utf-8") as file:
            return file.read()

    def wait_for_words(self, pattern):
        return wait_until(lambda: re.search(pattern, self.said()), pattern)

    def start(self, *more):
        words = ["start", "--foreground", "--data-dir", self.data_dir, "--host", "127.0.0.1", *self.words, *more]
        environ = clean_environ(REQUEST_TIMEOUT="600", SERVICE_PORT="0")
        environ["ROCK_MODEL_SERVICE_TRAJ_APPEND_MODE"] = self.append_mode
        command, streams = self.clock.command(*words), {"stdout": self._errors, "stderr": self._errors}
        self.process = subprocess.Popen(command, env=environ, preexec_fn=be_ordinary, **streams)
        state = rock_ms.ServiceState(self.data_dir)
        is_up = lambda: state.read().get("pid") == self.process.pid and "port" in state.read()  # noqa: E731
        wait_until(lambda: self.process.poll() is not None or is_up(), "the service")
        assert self.process.poll() is None, self.errors()
        self.port = state.read()["port"]
        return self

    def errors(self):
        self._errors.seek(0)
        return self._errors.read().decode("utf-8")

    def send(self, number):
        self.process.send_signal(number)

    def ended(self):
        """Its exit code."""
        return self.process.wait(TIMEOUT)

    def close(self):
        if self.process is not None and self.process.poll() is None:
            self.send(signal.SIGTERM)
            self.send(signal.SIGCONT)
            self.ended()
        self._errors.close()

    def new_prompt(self):
        return "prompt %d" % next(self._numbers)

    @contextlib.contextmanager
    def limited(self, what, soft):
        """The limit of a resource, lowered for as long as the block lasts."""
        _, hard = before = resource.prlimit(self.process.pid, what)
        resource.prlimit(self.process.pid, what, (soft, hard))
        try:
            yield
        finally:
            resource.prlimit(self.process.pid, what, before)

    def full_disk(self, path, room=20):
        """No file can grow beyond what this one has, and so many bytes: its next record is cut in the middle."""
        return self.limited(resource.RLIMIT_FSIZE, (os.path.getsize(path) if path else 0) + room)

    @contextlib.contextmanager
    def unwritable(self):
        """All of the data directory is read-only, also to root without its privilege."""
        names = [name for name in os.listdir(self.data_dir) if os.path.isfile(self.path(name))]
        modes = {self.path(name): 0o644 for name in names}
        for path in modes:
            os.chmod(path, 0o444)
        os.chmod(self.data_dir, 0o555)
        try:
            must_be_unwritable(self.data_dir)
            yield
        finally:
            os.chmod(self.data_dir, 0o755)
            for path, mode in modes.items():
                os.chmod(path, mode)

    def ask(self, prompt, **more):
        return ask(self.port, chat(prompt, **more))

    def acknowledge(self, prompt, got):
        assert got.status == 200, (got.status, got.body)
        content = got.json()["choices"][0]["message"]["content"]
        assert content == reply_to(prompt)
        self.acknowledged.append((prompt, content))

    def calls(self):
        """All of the trajectory."""
        with open(self.trajectory, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def check(self):
        """What must hold after every fault."""
        self.good_call()
        found = [(prompt_of(call), content_of(call)) for call in self.calls() if call["status"] == 200]
        assert sorted(found) == sorted(self.acknowledged)
        assert "Traceback" not in self.said() + self.errors()


class LocalProcess(ServiceProcess):
    """The local service, its trainer being the test."""

    def requests(self):
        """prompt -> index, of all requests in the log."""
        records = [record for record in rock_ms.LogTail(self.log).read() if record.kind == "request"]
        return {json.loads(record.text)["messages"][0]["content"]: record.index for record in records}

    def park(self, prompt):
        """A call that waits for its answer."""
        before = self.requests().get(prompt)
        call = Later(lambda: self.ask(prompt))
        wait_until(lambda: self.requests().get(prompt, before) != before, "%s in the log" % prompt)
        return call

    def answer(self, prompt):
        log = rock_ms.MarkerLog(self.log, clock=self.clock)
        log.append_response(self.requests()[prompt], json.dumps(completion(reply_to(prompt))))

    def finish(self, prompt, call):
        """Answer it, and have that acknowledged."""
        self.answer(prompt)
        self.acknowledge(prompt, call.result())

    def good_call(self):
        prompt = self.new_prompt()
        self.finish(prompt, self.park(prompt))

    def check(self):
        super().check()
        with open(self.log, "rb") as file:
            indexes = [record.index for record in map(rock_ms.parse_record, file.read().split(b"\n")) if record]
        assert len(indexes) == 2 * len(set(indexes)), "each turn has one request and one answer"


class ProxyProcess(ServiceProcess):
    """The proxy, before the scripted upstream."""

    def __init__(self, directory, upstream):
        super().__init__(directory)
        self.words = ["--type", "proxy", "--proxy-base-url", upstream.url, "--max-attempts", "2"]
        self.words += ["--retry-delay-seconds", "0.01"]
        self.upstream = upstream

    def ask(self, prompt, **more):
        return super().ask(prompt, **{"script": [answer(completion(reply_to(prompt)))], **more})

    def good_call(self):
        prompt = self.new_prompt()
        self.acknowledge(prompt, self.ask(prompt))


class ReplayProcess(ServiceProcess):
    """The replay: its good calls are those of the recording, in order; /v1/large has one more than sockets hold."""

    SIZES = [20000] * 20  # of the answers, in bytes: more than a file's buffer holds
    LARGE = 8 << 20

    def __init__(self, directory):
        super().__init__(directory)
        self.source = str(directory / "recording.jsonl")
        self.words = ["--type", "proxy", "--replay-file", self.source]
        with open(self.source, "w") as file:
            for number, size in enumerate(self.SIZES):
                content = "%d %s" % (number, "x" * size)
                response = {"choices": completion(content)["choices"]}  # without `created`
                file.write(json.dumps({"request": chat(), "response": response}) + "\n")
            large = {"path": "/v1/large", "request": chat(), "response": completion("x" * self.LARGE)}
            file.write(json.dumps(large) + "\n")

    def start(self, *more):
        self._numbers = itertools.count()
        return super().start(*more)

    def good_call(self):
        content = self.ask("next").json()["choices"][0]["message"]["content"]
        assert content.split()[0] == str(next(self._numbers))

    def check(self):
        self.good_call()
        assert "Traceback" not in self.said() + self.errors()


@pytest.fixture(scope="module")
def services(tmp_path_factory):
    """The processes that the rows share, by kind; one that a row has left broken is begun anew."""
    made, upstream = {}, Upstream()

    def service(kind):
        if kind not in made or made[kind].is_broken:
            arguments = [upstream] if kind is ProxyProcess else []
            made[kind] = kind(tmp_path_factory.mktemp(kind.__name__), *arguments)
            stack.callback(made[kind].close)
            made[kind].start().good_call()
        return made[kind]

    with contextlib.ExitStack() as stack:
        stack.callback(upstream.close)
        yield service


def storage_error(got):
    """Assert that a call was refused since it could not be stored, in words without a path."""
    assert (got.status, got.json()["error"]["code"]) == (500, "storage_error")
    assert b"LLM" not in got.body
    return True


# Disks ----------------------------------------------------------------------------------------------------------------


def request_meets_a_full_disk(service):
    before = os.path.getsize(service.log)
    with service.full_disk(service.log):
        storage_error(service.ask("lost"))
        assert os.path.getsize(service.log) == before, "no half record stays"
    service.good_call()
    assert re.search("no space left for|lines are missing here: No space left|File too large", service.said())


def local_answer_meets_a_full_disk(service):
    prompt = service.new_prompt()
    call = service.park(prompt)
    with service.full_disk(service.trajectory):
        service.answer(prompt)
        storage_error(call.result())
        storage_error(service.ask(prompt))
    index = service.requests()[prompt]
    service.acknowledge(prompt, service.ask(prompt))
    assert service.requests()[prompt] == index, "the answer waited for this"


def trainer_meets_a_full_disk(service):
    prompt = service.new_prompt()
    call, before = service.park(prompt), os.path.getsize(service.log)
    command = ["anti-call-llm", "--index", service.requests()[prompt], "--timeout", 0, "--data-dir", service.data_dir]
    command += ["--response", json.dumps(completion(reply_to(prompt)))]
    limit = (before + 20, resource.RLIM_INFINITY)
    full = run_cli(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit), check=1)
    assert (full.out, full.err.count("\n")) == ("", 1) and "no space left for" in full.err
    assert os.path.getsize(service.log) == before
    run_cli(*command, check=75)
    service.acknowledge(prompt, call.result())


def answer_file_cannot_be_removed(tmp_path):
    """The answer is taken, and the turn goes on."""
    log, directory = rock_ms.MarkerLog(str(tmp_path / "LLMService.log")), tmp_path / "read-only"
    log.append("request", json.dumps(chat("one")), 1)
    log.append("request", json.dumps(chat("two")), 2)
    directory.mkdir()
    (directory / "answer").write_text(json.dumps(completion()))
    directory.chmod(0o555)
    must_be_unwritable(directory)
    words = ["anti-call-llm", "--index=1", "--response-file", directory / "answer", "--data-dir", tmp_path]
    for _ in range(2):
        done = run_cli(*words, check=0, preexec_fn=be_ordinary)
        assert json.loads(done.out) == chat("two")
        assert "read-only/answer: Permission denied; its content is in the log" in done.err
    assert [record.kind for record in log.tail().read()] == ["request", "request", "response"]


def proxy_answer_meets_a_full_disk(service):
    with service.full_disk(service.trajectory):
        storage_error(service.ask(service.new_prompt()))
        _, stream = half_a_stream(service, "full disk")
        service.upstream.open("full disk")
        with pytest.raises(http.client.IncompleteRead):
            stream.read()


def own_log_meets_a_full_disk(service):
    os.rename(service.own_log, service.own_log + ".1")
    os.symlink("/dev/full", service.own_log)
    service.good_call()
    service.good_call()
    os.remove(service.own_log)
    service.good_call()
    wait_until(lambda: os.path.exists(service.own_log))
    service.wait_for_words(r"\([0-9]+ lines are missing here: No space left on device\)\n.*POST /v1/chat")
    os.remove(service.own_log)
    os.rename(service.own_log + ".1", service.own_log)


class FullOnce:
    """A stream that has no room for its first line."""

    def __init__(self):
        self.said = None

    def write(self, text):
        if self.said is None:
            self.said = ""
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.said += text

    def flush(self):
        pass


def standard_error_meets_a_full_disk(tmp_path, monkeypatch):
    """As of a service in the foreground: the line is lost, and nothing is said of that in its place."""
    stream = FullOnce()
    monkeypatch.setattr(sys, "stderr", stream)
    logger = rock_ms.open_logger(str(tmp_path / "log"), is_loud=True)
    logger.info("one")
    logger.info("two")
    rock_ms.complain("three")
    for handler in logger.handlers:
        handler.close()
    assert re.match(r"[0-9-]+ [0-9:,]+ INFO two\nrock-ms: three\n\Z", stream.said)


def state_meets_a_full_disk(service):
    def watch(process):
        return ask(service.port, {"pid": process.pid}, path="/v1/agent/watch")

    agent, other = (subprocess.Popen(["sleep", "600"]) for _ in range(2))
    try:
        with service.full_disk(None, room=0):
            storage_error(watch(other))  # and so it is not waited for
        assert watch(agent).json()["status"] == "watching"
        with service.full_disk(None, room=100):  # for the log's last line, but not for the state
            agent.kill()
            agent.wait()
            wait_until(lambda: os.path.getsize(service.log), "SESSION_END")
        wait_until(lambda: rock_ms.ServiceState(service.data_dir).read()["watched"] == {}, "nothing watched")
    finally:
        for process in (agent, other):
            process.kill()
            process.wait()
    with open(service.log) as file:
        assert file.read() == "SESSION_END\n"


def local_directory_becomes_unwritable(service):
    prompt = service.new_prompt()
    call = service.park(prompt)
    service.answer(prompt)
    service.acknowledge(prompt, call.result())
    with service.unwritable():
        storage_error(service.ask("lost"))
        service.wait_for_words("LLMService.log: Permission denied")


def proxy_directory_becomes_unwritable(service):
    with service.unwritable():
        storage_error(service.ask(service.new_prompt()))
        service.wait_for_words("LLMTraj.jsonl: Permission denied")


def starts_without_a_disk(tmp_path):
    """Each start says in a line why, leaves the earlier session as it was, and stands in the way of no other."""
    data, other = tmp_path / "data", tmp_path / "other"
    (tmp_path / "file").write_text("")
    other.mkdir()
    (other / "LLMService.log").write_bytes(b"an earlier session's\n")
    no_room = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))  # noqa: E731
    data.mkdir()
    (data / "run.jsonl").write_text("{}")
    data.chmod(0o555)
    must_be_unwritable(data)
    recording = ["--recording-file", data / "run.jsonl"]
    for directory, more, why, options in [
        (data / "below", [], "cannot make .*/data/below: Permission denied; give each", be_ordinary),
        (data, [], "cannot start the model service: .*Permission denied: '.*/data/model_service.log'", be_ordinary),
        (tmp_path / "file" / "x", [], "cannot make .*/file/x: Not a directory; give each", None),
        (other, recording, "did not start: cannot set aside .*/data/run.jsonl: Permission denied", be_ordinary),
        (other, [], "did not start: cannot write .*/other/LLMService.json: File too large", no_room),
    ]:
        words = ["start", "--host=127.0.0.1", "--port=0", "--data-dir", directory]
        done = run_cli(*words, *more, preexec_fn=options)
        assert (done.returncode, done.out, done.err.count("\n")) == (1, "", 1), done.err
        assert re.search(why, done.err)
    assert (other / "LLMService.log").read_bytes() == b"an earlier session's\n"
    try:
        run_cli(*words, check=0)
    finally:
        run_cli("stop", "--data-dir", other, check=0)


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


def commands_on_a_read_only_mount(tmp_path):
    """What only reads works; what has to write says why."""
    log = rock_ms.MarkerLog(str(tmp_path / "LLMService.log"))
    log.append("request", json.dumps(chat("one")), 1)
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", READ_ONLY, str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run(inside + ["true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no mount namespace can be made here")

    def run(*words):
        command = inside + [sys.executable, SCRIPT, *words, "--data-dir", str(tmp_path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environ())
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    code, out, _ = run("anti-call-llm", "--index=0")
    assert (code, json.loads(out)) == (0, chat("one"))
    for typed in (["anti-call-llm", "--index=1", "--response={}"], ["start", "--port=0"]):
        code, out, err = run(*typed)
        assert (code, out) == (1, "") and "Read-only file system" in err
    assert run("stop")[0] == 0


# Files that someone else touches --------------------------------------------------------------------------------------


def copy_in_place(path):
    shutil.copy(path, path + ".copy")
    os.replace(path + ".copy", path)


def empty(path):
    os.truncate(path, 0)


def cut_the_last_record(path):
    os.truncate(path, os.path.getsize(path) - 15)


def log_is_touched(service):
    """What a waiting call meets: its answer where its request is still there, else an error that asks for a retry."""
    for touch in (copy_in_place, os.remove, empty, cut_the_last_record):
        prompt = service.new_prompt()
        call = service.park(prompt)
        index = service.requests()[prompt]
        touch(service.log)
        if touch is not copy_in_place:
            assert storage_error(call.result()) and b"has lost this request" in call.result().body
            call = service.park(prompt)
            assert service.requests()[prompt] == index + 1
        service.finish(prompt, call)
    assert re.search("LLMService.log was removed, .* 1 without answer", service.said())


def log_is_replaced_by_another_sessions(service):
    prompt = service.new_prompt()
    call = service.park(prompt)
    foreign = rock_ms.MarkerLog(service.log + ".foreign")
    for index in range(1, service.requests()[prompt] + 1):
        foreign.append("request", json.dumps(chat("foreign")), index)
        foreign.append("response", json.dumps(completion("foreign")), index)
    os.replace(foreign.path, service.log)
    assert call.result().status == 500, "another request's answer is not given"
    service.finish(prompt, service.park(prompt))


def trajectory_is_touched(service):
    for touch in (os.remove, empty):
        service.good_call()
        touch(service.trajectory)
        service.acknowledged.clear()
        service.good_call()
        service.wait_for_words("LLMTraj.jsonl was removed, replaced or cut short")
        service.check()
    with open(service.trajectory, "ab") as file:
        file.write(b'{"request":{"mod')  # as of a writer that was killed in the middle
    service.check()
    service.wait_for_words("the half-written last line of .*LLMTraj.jsonl was cut off")


def own_log_is_moved(service):
    os.rename(service.own_log, service.own_log + ".1")
    service.good_call()
    service.good_call()
    wait_until(lambda: os.path.exists(service.own_log), "a new log")
    service.wait_for_words("POST /v1/chat/completions 200")
    with open(service.own_log, "rb") as new, open(service.own_log + ".1", "ab") as old:
        old.write(new.read())
    os.replace(service.own_log + ".1", service.own_log)


def replayed_file_is_touched(service):
    service.good_call()
    with open(service.source, "rb") as file:
        whole = file.read()
    os.truncate(service.source, sum(ReplayProcess.SIZES) // 10)
    storage_error(service.ask("cut"))
    storage_error(service.ask("cut"))
    with open(service.source, "r+b") as file:
        file.write(whole)
    service.good_call()  # the call that could not be read was not used up
    os.remove(service.source)  # a file that is open stays
    service.good_call()
    with open(service.source, "wb") as file:
        file.write(whole)


# The clock ------------------------------------------------------------------------------------------------------------


def local_clock_jumps(service):
    """No wait ends early, nothing gets out of order; a resumed service knows what was delivered."""
    prompts = []
    for shift in (DAY, -DAY, JUMPING):
        prompts.append(service.new_prompt())
        call = service.park(prompts[-1])
        service.clock.shift(shift)
        service.finish(prompts[-1], call)
    took = [call["response_time"] for call in service.calls() if prompt_of(call) in prompts]
    assert len(took) == 3 and all(0 <= seconds < TIMEOUT for seconds in took)
    last = max(service.requests().values())
    service.clock.shift(0)
    service.send(signal.SIGTERM)
    assert service.ended() == 0
    service.start("--resume")
    for prompt in prompts:  # delivered before: the same once more is a new turn
        call = service.park(prompt)
        assert service.requests()[prompt] > last
        service.finish(prompt, call)


def waiting_call_lives_through_jumps(tmp_path, monkeypatch):
    """A call with a limit of ten minutes, whose every sign of life comes on another day."""
    days = itertools.count(1)
    with running(tmp_path, request_timeout=600, heartbeat_seconds=0.01) as service:
        monkeypatch.setattr(time, "time", lambda: next(days) * DAY)
        sock = socket.create_connection(("127.0.0.1", service.port), TIMEOUT)
        with sock, sock.makefile("rb") as stream:
            sock.sendall(raw_request(json.dumps(chat(stream=True)).encode()))
            beats = 0
            while beats < 5:
                line = stream.readline()
                assert line and b"error" not in line
                beats += line.startswith(b":")
            service.answer(1)
            assert b"data: [DONE]\n" in iter(stream.readline, b"")


def wall_clock_users(node, name=""):
    """The dotted names of the functions that speak of `time.time`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Attribute) and (getattr(child.value, "id", None), child.attr) == ("time", "time"):
            yield name
        is_named = isinstance(child, (ast.ClassDef, ast.FunctionDef))
        yield from wall_clock_users(child, ("%s.%s" % (name, child.name)).strip(".") if is_named else name)


def only_timestamps_ask_the_wall_clock():
    """Every wait and every limit goes by the monotonic clock, in whatever process."""
    asks = set(wall_clock_users(ast.parse(open(SCRIPT, encoding="utf-8").read())))
    assert asks == {
        "DataPaths.earlier_set_aside",  # the dated name
        "MarkerLog.__init__",  # the records' timestamps
        "Exchange._headers",  # Date
        "LocalService.__init__",  # start_time, and `created` of a stream, as of the next two
        "ProxyService.__init__",  # and to understand a Retry-After that is a date
        "ReplayService.__init__",
    }


def clock_was_set_back_before_a_kill(tmp_path):
    """In append mode an earlier session's call, of the same index and of tomorrow, is not taken for this one's."""
    service = LocalProcess(tmp_path)
    with contextlib.closing(service):
        service.append_mode = "true"
        service.start().good_call()
        service.send(signal.SIGTERM)
        service.ended()
        service.clock.shift(-DAY)
        prompt = service.new_prompt()
        service.start()
        call = service.park(prompt)
        with rock_ms.AppendFile(service.log).locked():  # so that the service does not hold it, for ever
            service.send(signal.SIGSTOP)
        service.answer(prompt)
        service.send(signal.SIGKILL)
        with pytest.raises(OSError):
            call.result()
        service.ended()
        service.start("--resume")
        service.acknowledge(prompt, service.ask(prompt))
        service.check()


def proxy_clock_jumps(service):
    prompt = service.new_prompt()
    call = Later(lambda: service.ask(prompt, script=[{"gate": "clock"}, answer(completion(reply_to(prompt)))]))
    wait_until(lambda: any(b"clock" in request["body"] for request in service.upstream.seen()), "the call upstream")
    service.clock.shift(JUMPING)
    service.upstream.open("clock")
    service.acknowledge(prompt, call.result())
    service.clock.shift(-DAY)
    busy, now = service.new_prompt(), formatdate(time.time(), usegmt=True)
    # An upstream that asks for no wait at all, by its own clock.
    limited = answer({"error": {"message": "busy"}}, 429, {"Date": now, "Retry-After": now})
    service.upstream.script(limited, answer(completion(reply_to(busy))))
    service.acknowledge(busy, service.ask(busy, script=None))
    for record in service.calls():
        assert 0 <= record["response_time"] < TIMEOUT and record["start_time"] <= record["end_time"]
    service.clock.shift(0)


def replay_clock_jumps(service):
    service.clock.shift(JUMPING)
    next(service._numbers)
    events = service.ask("as a stream", stream=True).events()
    assert len({event["created"] for event in events[:-1]}) == 1 and events[-1] == "[DONE]"
    service.good_call()
    service.clock.shift(0)


# Descriptors ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_descriptor_left(service):
    """While no file can be opened and no connection accepted; gives a connection that was there before."""
    kept = http.client.HTTPConnection("127.0.0.1", service.port, timeout=TIMEOUT)
    kept.request("GET", "/health")
    kept.getresponse().read()
    before = service.said().count("connections have to wait")
    with contextlib.ExitStack() as stack:
        stack.callback(kept.close)
        with service.limited(resource.RLIMIT_NOFILE, 4):
            for _ in range(50):
                stack.enter_context(socket.create_connection(("127.0.0.1", service.port), TIMEOUT))
            service.wait_for_words("connections have to wait, since none can be accepted: Too many open files")
            yield kept
        assert service.said().count("connections have to wait") <= before + 1
        service.good_call()


def ask_on(connection, prompt):
    connection.request("POST", "/v1/chat/completions", json.dumps(chat(prompt)), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())["error"]["code"]


def local_descriptors_run_out(service):
    parked = service.new_prompt()
    call = service.park(parked)
    with no_descriptor_left(service) as kept:
        service.answer(parked)
        assert ask_on(kept, "lost") == (500, "storage_error")
        service.wait_for_words("cannot read .*LLMService.log: Too many open files; trying again")
        assert not call.is_done()
    service.acknowledge(parked, call.result())
    assert service.said().count("cannot read") == 1


def proxy_descriptors_run_out(service):
    with no_descriptor_left(service) as kept:
        assert ask_on(kept, service.new_prompt())[0] in (500, 502), "recorded or not, it was not answered"


def replay_descriptors_run_out(service):
    with no_descriptor_left(service) as kept:  # it needs none for an answer
        kept.request("POST", "/v1/chat/completions", json.dumps(chat()), {"Content-Type": "application/json"})
        assert json.loads(kept.getresponse().read().decode())["choices"]
        next(service._numbers)


def service_sees_nothing_without_descriptors(tmp_path, monkeypatch):
    """A process that cannot be looked at has not gone, and a log that cannot be read is complained of once."""
    tried, agent = [], subprocess.Popen(["sleep", "600"])

    def cannot_open(path, *_, **__):
        tried.append(str(path))
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with running(tmp_path) as service:
        try:
            assert service.ask({"pid": agent.pid}, path="/v1/agent/watch").json()["status"] == "watching"
            call = service.ask_later(chat())
            service.wait_for_turns(1)
            monkeypatch.setattr(rock_ms, "open", cannot_open, raising=False)
            log = rock_ms.encode_record("response", json.dumps(completion()), 1, 0)
            rock_ms.AppendFile(service.paths.log_file).append(log)
            for path in ("/proc/%d/stat" % agent.pid, service.paths.log_file):
                wait_until(lambda path=path: tried.count(path) > 2, "several looks at " + path)
            assert not call.is_done() and not service.server.session.has_ended
            monkeypatch.undo()
            assert call.result().status == 200
        finally:
            agent.kill()
            agent.wait()
        wait_until(lambda: service.server.session.has_ended, "the end of the session")
        assert sum("cannot read" in line for line in service.logged) == 1
        assert sum("has gone" in line for line in service.logged) == 1


def upstreams_name_cannot_be_looked_up(proxy, monkeypatch):
    """An error like any other of the upstream's, and no bug."""

    def no_pair(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    url = "http://upstream.invalid:1/v1"
    proxy.server.service._upstreams[proxy.settings.proxy_base_url] = rock_ms.Upstream.of(url)
    monkeypatch.setattr(socket, "socketpair", no_pair)
    got = proxy.ask(chat())
    monkeypatch.undo()
    assert (got.status, got.json()["error"]["message"]) == (
        502,
        "cannot resolve upstream.invalid: Too many open files",
    )


def watching_finds_no_thread(tmp_path, monkeypatch):
    """What a limit of processes does: that call fails, and the next one watches both."""

    def no_thread(_):
        raise RuntimeError("can't start new thread")

    agent = subprocess.Popen(["sleep", "600"])
    try:
        with running(tmp_path) as service:
            monkeypatch.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(RuntimeError):
                service.server._watch.watch(agent.pid)
            monkeypatch.undo()
            assert service.ask({"pid": agent.pid}, path="/v1/agent/watch").json()["status"] == "watching"
            agent.kill()
            agent.wait()
            wait_until(lambda: service.server.session.has_ended, "the end of the session")
    finally:
        agent.kill()
        agent.wait()


def accepting_does_not_spin(number):
    """Each failure is followed by a pause; the first one is said."""
    logged, pauses = [], []
    service = type("", (), {"logger": logging.Logger("test"), "stopping": type("", (), {"wait": pauses.append})})
    service.logger.addFilter(lambda record: logged.append(record.getMessage()))
    complaint = rock_ms.Complaint()
    for _ in range(3):
        rock_ms._bear_exhaustion(service, OSError(number, os.strerror(number)), complaint)
    assert (len(pauses), len(logged)) == (3, 1) and os.strerror(number) in logged[0]


# Signals --------------------------------------------------------------------------------------------------------------


def tear(path):
    """Leave half of a record at the end, as a writer that is killed in the middle does."""
    with open(path, "rb+") as file:
        last = file.read().splitlines(True)[-1]
        file.write(last[: len(last) // 2])


def local_is_ended_by(service, number):
    prompt = service.new_prompt()
    call = service.park(prompt)
    index = service.requests()[prompt]
    service.send(number)
    if number == signal.SIGKILL:
        with pytest.raises(OSError):
            call.result()
        tear(service.log)
        tear(service.trajectory)
    else:
        assert (call.result().status, call.result().json()["error"]["code"]) == (503, "service_stopping")
    assert service.ended() == (-number if number == signal.SIGKILL else 0)
    if number != signal.SIGKILL:
        assert service.said().endswith("stopped\n") and "stopping: %s" % signal.Signals(number).name in service.said()
    service.start("--resume")
    again = Later(lambda: service.ask(prompt))  # takes the turn over
    service.finish(prompt, again)
    assert service.requests()[prompt] == index


def starting_service_is_killed(tmp_path):
    """What it leaves is enough to go on with the session before it."""
    state, left = rock_ms.ServiceState(str(tmp_path)), []
    session = {"watched": {"1": "then"}, "traj_start": 7}
    state.write({"type": "local", **session})

    def open_server(*_):
        left.append(state.read())
        raise rock_ms.RockError("killed")

    log = str(tmp_path / "model_service.log")
    with pytest.raises(rock_ms.RockError, match="killed"):
        with rock_ms.serving(state, rock_ms.ServiceSettings(), {}, open_server, log, is_loud=False):
            pass
    assert left[0]["pid"] == os.getpid() and session.items() <= left[0].items()
    assert state.read() == {"type": "local", **session}


class Trainer:
    """A call of `anti-call-llm`; all that it says is in a file."""

    def __init__(self, path, words):
        self._path = str(path)
        command = [sys.executable, SCRIPT, *words]
        with open(path, "wb") as file:
            streams = {"stdout": file, "stderr": file, "stdin": subprocess.DEVNULL}
            self.process = subprocess.Popen(command, preexec_fn=be_ordinary, env=clean_environ(), **streams)

    def said(self):
        with open(self._path) as file:
            return file.read()


def trainers_are_ended_by_signals(tmp_path):
    """Nothing on standard output, nothing in the log, and the same call once more gets its request."""
    log = rock_ms.MarkerLog(str(tmp_path / "LLMService.log"))
    log.append("request", json.dumps(chat("one")), 1)
    words = ["anti-call-llm", "--index=1", "--response", json.dumps(completion()), "--data-dir", str(tmp_path)]
    waiting = [Trainer(tmp_path / signal.Signals(number).name, words) for number in SIGNALS]
    try:
        for trainer, number in zip(waiting, SIGNALS):
            wait_until(lambda: "no model service runs" in trainer.said(), "its answer is written")  # noqa: B023
            trainer.process.send_signal(number)
            assert trainer.process.wait(TIMEOUT) == (130 if number == signal.SIGINT else -number)
            assert trainer.said().count("\n") == 1
    finally:
        for trainer in waiting:
            trainer.process.kill()
            trainer.process.wait()
    log.append("request", json.dumps(chat("two")), 2)
    assert json.loads(run_cli(*words, check=0).out) == chat("two")
    assert [(record.kind, record.index) for record in log.tail().read()] == [
        ("request", 1),
        ("response", 1),
        ("request", 2),
    ]


def half_a_stream(service, gate):
    """A stream that has begun and waits at a gate: its prompt, and the response."""
    prompt = service.new_prompt()
    *begun, end = sse(delta(role="assistant"), delta(reply_to(prompt)), delta(finish="stop"))
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=TIMEOUT)
    body = json.dumps(chat(prompt, stream=True, script=begun[:2] + [{"gate": gate}] + begun[2:] + [end]))
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    return prompt, response


def proxy_is_ended_by(service, number):
    prompt, response = half_a_stream(service, signal.Signals(number).name)
    service.send(number)
    if number == signal.SIGKILL:
        with pytest.raises((http.client.IncompleteRead, OSError)):
            response.read()
        tear(service.trajectory)
    else:
        service.wait_for_words("stopping: %s" % signal.Signals(number).name)
        service.upstream.open(signal.Signals(number).name)
        assert response.read().endswith(b"data: [DONE]\n\n"), "what can end is let end"
        service.acknowledged.append((prompt, reply_to(prompt)))
    assert service.ended() == (-number if number == signal.SIGKILL else 0)
    service.start("--resume")


def replay_is_ended_by(service, number):
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=TIMEOUT)
    connection.request("POST", "/v1/large", json.dumps(chat()), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.read(1) == b"{"
    service.send(number)
    if number == signal.SIGKILL:
        service.ended()
        with pytest.raises((http.client.IncompleteRead, OSError)):
            response.read()
    else:
        assert json.loads("{" + response.read().decode())["choices"], "what can end is let end"
    assert service.ended() == (-number if number == signal.SIGKILL else 0)
    service.start()  # and from the beginning


# Upstreams ------------------------------------------------------------------------------------------------------------

HEAD = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
HALF = answer(completion())["send"][:-20]
BEGUN = sse(delta(role="assistant"), delta("half"), done=False)[:-1]
CLOSE, RESET, STALL = {"close": True}, {"reset": True}, {"stall": True}

BROKEN = ("broken", 502, 504)  # an error still, where its end came before its beginning was passed on

# What the upstream does at each attempt, whether the client asks for a stream, and what it may get.
UPSTREAM_FAULTS = [
    ("closes", [CLOSE], False, (502,)),
    ("resets", [RESET], False, (502,)),
    ("stalls", [STALL], False, (504,)),
    ("closes in its header", [{"send": HEAD}, CLOSE], False, (502,)),
    ("stalls in its header", [{"send": HEAD}, STALL], False, (504,)),
    ("sends garbage", [{"send": "\x00\xff garbage\r\n\r\n"}, CLOSE], False, (502,)),
    ("sends another protocol", [{"send": "SSH-2.0-OpenSSH_9.6\r\n"}], False, (502,)),
    ("sends a bad length", [{"send": HEAD + "Content-Length: -1\r\n\r\n{}"}], False, (502,)),
    ("sends a header without end", [{"send": HEAD + "X: " + "x" * 70000}, CLOSE], False, (502,)),
    ("closes in its body", [{"send": HALF}, CLOSE], False, (502,)),
    ("resets in its body", [{"send": HALF}, RESET], False, (502,)),
    ("stalls in its body", [{"send": HALF}, STALL], False, BROKEN),
    ("closes a body of unknown length", [{"send": HEAD + '\r\n{"choices": ['}, CLOSE], False, (502,)),
    ("is busy", [answer({"error": {"message": "busy"}}, 429)], False, (429,)),
    ("fails", [answer("<html>oops", 500, {"Content-Type": "text/html"})], False, (500,)),
    ("closes before the first event", [BEGUN[0], CLOSE], True, (502,)),
    ("closes in a stream", [*BEGUN, CLOSE], True, BROKEN),
    ("resets in a stream", [*BEGUN, RESET], True, BROKEN),
    ("stalls in a stream", [*BEGUN, STALL], True, BROKEN),
    ("sends a bad chunk in a stream", [*BEGUN, {"send": "xyz\r\n"}, STALL], True, BROKEN),
]


def what_came(service, body):
    try:
        return service.ask(body).status
    except http.client.IncompleteRead:
        return "broken"


def upstream_goes_through_all_its_faults(service):
    """One fault after the other, a good call between: each ends as it says, and is recorded as what it was."""
    for name, script, is_stream, outcomes in UPSTREAM_FAULTS:
        came = what_came(service, chat(name, stream=is_stream, script=script))
        assert came in outcomes, name
        *_, call = service.trajectory()
        assert (prompt_of(call), bool(call.get("partial"))) == (name, came == "broken")
        assert call["error"] and call["status"] in ((502, 504) if came == "broken" else (came,)), name
        good = chat("after it " + name, script=[answer(completion(reply_to(name)))])
        assert service.ask(good).json() == completion(reply_to(name))
    good_calls = [(prompt_of(call), content_of(call)) for call in service.trajectory() if call["status"] == 200]
    assert good_calls == [("after it " + name, reply_to(name)) for name, *_ in UPSTREAM_FAULTS]
    assert len(service.trajectory()) == 2 * len(UPSTREAM_FAULTS)


# The table ------------------------------------------------------------------------------------------------------------

Fault = collections.namedtuple("Fault", "name holds script kind given")


def fault(name, holds, script, kind=None, **given):
    return Fault(name, holds, script, kind, given)


def signals(name, holds, script, kind):
    return [fault(name % signal.Signals(n).name, holds, script, kind, number=n) for n in SIGNALS]


FAULTS = [
    # what is done, what must hold
    fault("full disk: local log", "500, no half record, no index taken", request_meets_a_full_disk, LocalProcess),
    fault("full disk: local trajectory", "500, and the answer waits", local_answer_meets_a_full_disk, LocalProcess),
    fault("full disk: trainer's answer", "exit 1, and can be repeated", trainer_meets_a_full_disk, LocalProcess),
    fault("full disk: proxy's trajectory", "500, or a broken stream", proxy_answer_meets_a_full_disk, ProxyProcess),
    fault("full disk: own log", "answers go on, lost lines are counted", own_log_meets_a_full_disk, LocalProcess),
    fault("full disk: standard error", "a lost line is one line", standard_error_meets_a_full_disk),
    fault("full disk: state", "500, nothing watched; one SESSION_END", state_meets_a_full_disk, ProxyProcess),
    fault("no disk at the start", "exit 1 with the reason; later starts work", starts_without_a_disk),
    fault("read-only mount", "reading works, writing says why", commands_on_a_read_only_mount),
    fault("unwritable directory: trainer's file", "taken, said, goes on", answer_file_cannot_be_removed),
    fault("unwritable directory: local", "500, said, works again", local_directory_becomes_unwritable, LocalProcess),
    fault("unwritable directory: proxy", "500, said, works again", proxy_directory_becomes_unwritable, ProxyProcess),
    fault("local log copied, removed, emptied, cut", "said; what is lost is asked again", log_is_touched, LocalProcess),
    fault("local log of another session", "no foreign answer", log_is_replaced_by_another_sessions, LocalProcess),
    fault("local trajectory removed, emptied, torn", "said; only whole calls", trajectory_is_touched, LocalProcess),
    fault("proxy's trajectory removed, emptied, torn", "said; only whole calls", trajectory_is_touched, ProxyProcess),
    fault("own log moved away", "a new one is begun", own_log_is_moved, ProxyProcess),
    fault(
        "replayed file cut, mended, removed", "500, no answer is passed over", replayed_file_is_touched, ReplayProcess
    ),
    fault("clock jumps: local", "no wait ends, no turn doubles", local_clock_jumps, LocalProcess),
    fault("clock jumps: waiting call", "it is not timed out", waiting_call_lives_through_jumps),
    fault("clock jumps: all waits", "they go by another clock", only_timestamps_ask_the_wall_clock),
    fault("clock set back, then a kill", "no call of another session counts", clock_was_set_back_before_a_kill),
    fault("clock jumps: proxy", "no wait ends, Retry-After is understood", proxy_clock_jumps, ProxyProcess),
    fault("clock jumps: replay", "one `created` in a stream", replay_clock_jumps, ReplayProcess),
    fault("no descriptors: local", "500, said once, the answer comes later", local_descriptors_run_out, LocalProcess),
    fault("no descriptors: proxy", "5xx, said once, works again", proxy_descriptors_run_out, ProxyProcess),
    fault("no descriptors: replay", "said once, works again", replay_descriptors_run_out, ReplayProcess),
    fault("no descriptors: name of the upstream", "502", upstreams_name_cannot_be_looked_up),
    fault("no thread: watched agent", "an error, and the next one is watched", watching_finds_no_thread),
    fault("no descriptors: agent and log", "not taken for gone; said once", service_sees_nothing_without_descriptors),
    *[
        fault(
            "no connection accepted: %s" % errno.errorcode[number], "said once", accepting_does_not_spin, number=number
        )
        for number in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
    ],
    *signals("%s: parked call", "503 or cut off; the turn is taken over", local_is_ended_by, LocalProcess),
    *signals("%s: half a stream", "it ends whole, or is cut off", proxy_is_ended_by, ProxyProcess),
    *signals("%s: half an answer of the replay", "it ends whole, or is cut off", replay_is_ended_by, ReplayProcess),
    fault("SIGKILL: starting service", "the session before can be resumed", starting_service_is_killed),
    fault("signals: waiting trainer", "no output, and can be repeated", trainers_are_ended_by_signals),
    fault("upstream: all that it can do", "each is that error, and recorded so", upstream_goes_through_all_its_faults),
]


@pytest.fixture
def service(tmp_path, upstream, only_stalls_take_time):  # noqa: ARG001
    """A proxy in this process, whose calls have two attempts."""
    with running(tmp_path, Proxy, upstream=upstream, max_attempts=2) as proxy:
        yield proxy


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault(request, services, fault):
    given = dict(fault.given)
    if fault.kind:
        given["service"] = services(fault.kind)
    names = set(inspect.signature(fault.script).parameters) - set(given)
    shared = given.get("service")
    try:
        fault.script(**given, **{name: request.getfixturevalue(name) for name in names})
        if shared:
            shared.check()
    except BaseException:
        if shared:
            shared.is_broken = True
        raise
