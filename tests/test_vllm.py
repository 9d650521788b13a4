"""vLLM as a child: how it is begun and waited for, and that it ends with us; with a package that takes its place."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest

import rock_ms
import rock_sdk
from rock_ms import RockError, UsageError
from support import clean_environ, wait_until

pytestmark = pytest.mark.load

# It says its pids, and waits for a file `ready` where FAKE says so.  On /v1 it tells how it was begun.
FAKE_SERVER = """
import http.server, json, os, signal, subprocess, sys

fake = os.environ.get("FAKE")
if fake == "fails":
    sys.exit("ValueError: no such model")
signal.signal(signal.SIGTERM, signal.SIG_IGN if fake == "stubborn" else lambda *_: sys.exit("asked to end"))
worker = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
print("pids", os.getpid(), worker.pid, flush=True)
print("loading: 10%\\rloading: 50%", end="", flush=True)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        is_ready = fake != "slow" or os.path.exists(os.environ["READY"])
        self.send_response(200 if is_ready or self.path != "/health" else 503)
        self.end_headers()
        self.wfile.write(json.dumps([sys.argv[1:], os.environ["VLLM_API_KEY"]]).encode())

    def log_message(self, *_):
        pass


http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


class Clock:
    """At each look at it some seconds have gone by."""

    def __init__(self, seconds):
        self._seconds, self._now = seconds, 0

    def __call__(self):
        self._now += self._seconds
        return self._now


class Fake:
    """What the tests use of a directory that holds the package."""

    def __init__(self, directory):
        self.log_path, self.ready = str(directory / "vllm.log"), directory / "ready"
        package = directory / "modules" / "vllm" / "entrypoints" / "openai"
        package.mkdir(parents=True)
        (package / "api_server.py").write_text(FAKE_SERVER)
        self.environ = clean_environ(PYTHONPATH=str(directory / "modules"), READY=str(self.ready))

    def server(self, mode="", words=(), name="m", **options):
        environ = {**self.environ, "FAKE": mode}
        return rock_sdk.VLLMServer("/models/m", name, list(words), self.log_path, environ, **options)

    def log(self):
        with open(self.log_path) as file:
            return file.read()

    def pids(self):
        """Of the last one that was begun, and of its worker."""
        return [int(word) for word in self.log().rpartition("pids ")[2].splitlines()[0].split()]


@pytest.fixture
def fake(tmp_path):
    return Fake(tmp_path)


def are_gone(pids):
    return [rock_ms.process_identity(pid) for pid in pids] == [None] * len(pids)


def command_line(pid):
    with open("/proc/%d/cmdline" % pid, "rb") as file:
        return file.read()


def parent_of(pid):
    with open("/proc/%d/stat" % pid, "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])


def started(server, say=None):
    server.start(say or (lambda text: None), lambda: False)
    return server


@pytest.mark.everywhere
def test_it_is_begun_with_the_flags_given_and_ends_when_it_is_closed(fake):
    server = started(fake.server(words=["--max-model-len", "4096"]))
    try:
        with urllib.request.urlopen(server.base_url) as response:
            argv, key = json.loads(response.read().decode())
        port = server.base_url.split(":")[2].partition("/")[0]
        flags = ["--model", "/models/m", "--served-model-name", "m", "--max-model-len", "4096"]
        assert argv == [*flags, "--host", "127.0.0.1", "--port", port]
        assert key == server.api_key and len(key) >= 32
        pids = fake.pids()
        assert server.is_alive() and not are_gone(pids)
    finally:
        server.close()
    wait_until(lambda: are_gone(pids))
    assert not server.is_alive()
    assert fake.log().endswith("asked to end\n")
    server.close()


def test_its_key_is_in_no_process_list(fake):
    server = started(fake.server(name=None))
    try:
        pid = fake.pids()[0]
        shown = command_line(pid) + command_line(parent_of(pid))
        assert shown.count(b"--model\0/models/m\0--host\0") == 2
        assert server.api_key.encode() not in shown
    finally:
        server.close()


def test_it_is_killed_where_it_does_not_end(fake, monkeypatch):
    monkeypatch.setattr(rock_sdk, "KILL_SECONDS", 0.1)
    server = started(fake.server("stubborn"))
    server.close()
    wait_until(lambda: are_gone(fake.pids()))


DRIVER = """import sys, rock_sdk
server = rock_sdk.VLLMServer("m", None, [], sys.argv[1])
server.start(print, lambda: False)
print("started", flush=True)
sys.stdin.read()"""


def test_it_ends_when_we_are_killed(fake):
    path = os.pathsep.join([os.path.dirname(rock_sdk.__file__), fake.environ["PYTHONPATH"]])
    command = [sys.executable, "-c", DRIVER, fake.log_path]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env={**fake.environ, "PYTHONPATH": path}, **streams) as parent:
        assert parent.stdout.readline() == b"started\n"
        pids = fake.pids()
        assert not are_gone(pids)
        parent.kill()
    wait_until(lambda: are_gone(pids), "the end of vLLM")


def test_it_ends_when_its_supervisor_is_asked_to(fake):
    server = started(fake.server())
    pids = fake.pids()
    os.kill(parent_of(pids[0]), signal.SIGTERM)
    wait_until(lambda: are_gone(pids) and not server.is_alive(), "the end of vLLM")
    server.close()


def test_it_is_noticed_when_it_dies_and_nothing_of_it_is_left(fake):
    server = started(fake.server())
    pids = fake.pids()
    os.kill(pids[0], signal.SIGKILL)
    wait_until(lambda: not server.is_alive())
    wait_until(lambda: are_gone(pids))
    server.close()


def test_its_progress_is_told_with_the_last_line_that_it_said(fake):
    told = []

    def say(text):
        told.append(text)
        if text.endswith("loading: 50%"):
            fake.ready.touch()

    started(fake.server("slow", clock=Clock(10)), say).close()
    assert "waiting for vLLM to load /models/m, for 30 s so far: " in told[0]
    assert "for 60 s so far: " in (told + ["for 60 s so far: "])[1]
    assert told[-1].endswith("so far: loading: 50%")


def test_one_that_does_not_answer_in_time_is_given_up_with_its_last_words(fake):
    server = fake.server("slow", clock=Clock(1000))
    with pytest.raises(RockError, match="did not answer within 1800 s"):
        started(server)
    assert not server.is_alive()


def test_one_that_is_not_wanted_any_more_is_ended(fake):
    server = fake.server("slow")
    with pytest.raises(RockError, match="not wanted any more"):
        server.start(print, lambda: os.path.exists(fake.log_path) and "pids" in fake.log())
    assert not server.is_alive()
    wait_until(lambda: are_gone(fake.pids()))


def test_one_that_ends_early_says_why_without_what_an_earlier_one_said(fake):
    with open(fake.log_path, "w") as file:
        file.write("of an earlier one\n")
    with pytest.raises(RockError) as error:
        started(fake.server("fails"))
    assert str(error.value) == "vLLM ended with exit code 1: ValueError: no such model"
    assert fake.log().startswith("of an earlier one\n")


def test_missing_package_is_said_in_one_line(fake, capfd):
    del fake.environ["PYTHONPATH"]
    with pytest.raises(RockError) as error:
        started(fake.server())
    python = sys.executable
    assert str(error.value) == "vLLM is not installed for %s: pip install vllm, or give --model-server" % python
    assert capfd.readouterr() == ("", "")


def test_log_that_cannot_be_written_is_said(fake):
    fake.log_path = os.path.join(fake.log_path, "none")
    with pytest.raises(RockError, match="vLLM cannot be begun: No such file"):
        started(fake.server())


@pytest.mark.parametrize("words", [["--port", "1"], ["--host=0.0.0.0"], ["--api-key", "x"]])
def test_flags_that_are_set_already_are_refused(fake, words):
    with pytest.raises(UsageError, match=words[0].partition("=")[0]):
        fake.server(words=words)
