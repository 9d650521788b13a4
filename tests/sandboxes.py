"""Sandboxes for the tests: what runs in them, and a stand-in that has ROCK's signatures and habits."""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
import termios
import threading
import time
import uuid

import pytest

import rock_sdk
from support import TIMEOUT

# The interpreter under test comes first in a sandbox of this machine.
PATH = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
IMAGE = os.environ.get("ROCK_TEST_IMAGE", "bare-python")


def run(coroutine):
    """Run a coroutine to its end; what it returned."""

    async def bounded():
        return await asyncio.wait_for(coroutine, 3 * TIMEOUT)

    return asyncio.run(bounded())


def local_sandbox(**options):
    env = {"PATH": PATH, **options.pop("env", {})}
    return rock_sdk.LocalSandbox(env=env, **options)


def need_engine():
    """Skip the test where no container engine answers."""
    with open(os.devnull, "w") as null:
        if shutil.which("docker") is None or subprocess.call(
            ["docker", "image", "inspect", IMAGE], stdout=null, stderr=null
        ):
            pytest.skip("no container engine answers, or it has no image %s" % IMAGE)


def processes_with(text):
    """The processes of this machine whose environment or command line holds a text."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("environ", "cmdline"):
            with contextlib.suppress(OSError), open("/proc/%s/%s" % (pid, name), "rb") as file:
                if os.fsencode(text) in file.read() and int(pid) != os.getpid():
                    found.append(int(pid))
    return sorted(set(found))


def kill_all_of(directory):
    """Kill whatever runs in a sandbox of that directory, as a reboot would."""
    for name in (rock_sdk.SANDBOX_DIR_VARIABLE, rock_sdk.LocalSandbox(str(directory))._mark_name()):
        rock_sdk.kill_marked(os.fsencode("%s=%s" % (name, directory)))


class ReadTimeout(Exception):
    """As httpx raises it."""


class Seen:
    """As ROCK's Observation."""

    def __init__(self, output, exit_code=0, failure_reason=""):
        self.output = output
        self.exit_code = exit_code
        self.failure_reason = failure_reason


class Uploaded:
    """As ROCK's UploadResponse."""

    def __init__(self, success, message):
        self.success = success
        self.message = message


class RockShapedSandbox:
    """ROCK's `Sandbox`, as its client sees it, over directories and processes of this machine.

    A command runs in an interactive bash on a terminal.  Mode "normal" raises where the command fails, and when
    `http_timeout` seconds are over, while the command runs on.  Mode "nohup" looks every 5 s at best whether it has
    ended, says 0 for whatever ended in time, and kills nothing.  Output is text, with a terminal's line ends, and
    without white space around it.
    """

    def __init__(self, directory, http_timeout=4.0, env=None):
        self.directory = str(directory)
        self.sandbox_id = "rock-shaped-" + uuid.uuid4().hex[:8]
        self.http_timeout = http_timeout
        self.calls = []  # of arun: (mode, command)
        self.is_dead = False
        self._env = {
            "PATH": PATH,
            "HOME": self.directory,
            "TMPDIR": self.directory,
            "ROCK_MODEL_SERVICE_DATA_DIR": os.path.join(self.directory, "logs"),
            "SERVICE_HOST": "127.0.0.1",
            "SERVICE_PORT": "0",
            "TERM": "dumb",
            rock_sdk.SANDBOX_DIR_VARIABLE: self.directory,
            **(env or {}),
        }
        self._sessions = {}

    async def create_session(self, session):
        self._sessions[session] = Bash(self._env, self.directory)

    async def arun(
        self,
        cmd,
        session=None,
        wait_timeout=300,
        wait_interval=10,
        mode="normal",
        response_limited_bytes_in_nohup=None,
        ignore_output=False,
        output_file=None,
    ):
        assert isinstance(cmd, str) and mode in ("normal", "nohup")
        self.calls.append((mode, cmd))
        if session is None:
            session = "bash-%d" % time.time_ns()
            await self.create_session(session)
        if mode == "normal":
            return await self._run_in_session(session, cmd)
        return await self._run_nohup(session, cmd, wait_timeout, wait_interval)

    async def _run_in_session(self, session, cmd):
        if self.is_dead:
            raise Exception("Failed to run in session: connection refused")
        bash = self._sessions[session]
        done = rock_sdk.in_thread(bash.run, cmd)
        try:
            code, output = await asyncio.wait_for(asyncio.shield(done), self.http_timeout)
        except asyncio.TimeoutError:
            message = "Command execution failed due to timeout: %r in %s seconds"
            raise ReadTimeout(message % (cmd, self.http_timeout)) from None
        if code != 0:
            raise Exception("Failed to execute command: %s" % output)
        return Seen(output)

    async def _run_nohup(self, session, cmd, wait_timeout, wait_interval):
        file = os.path.join(self.directory, "tmp_%d.out" % time.time_ns())
        begin = "nohup %s < /dev/null > %s 2>&1 & echo PIDSTART${!}PIDEND;disown" % (cmd, file)
        pid = int(re.search("PIDSTART([0-9]+)PIDEND", (await self._run_in_session(session, begin)).output).group(1))
        deadline = time.monotonic() + wait_timeout
        while time.monotonic() < deadline:
            try:
                await self._run_in_session(session, "kill -0 %d" % pid)
            except Exception:
                return await self._run_in_session(session, "cat %s" % file)
            await asyncio.sleep(max(5, wait_interval))
        output = (await self._run_in_session(session, "cat %s" % file)).output
        return Seen(output, 1, "Process %d did not complete" % pid)

    async def upload_by_path(self, file_path, target_path, upload_mode="auto"):
        if self.is_dead:
            return Uploaded(False, "upload response: connection refused")
        if not os.path.exists(str(file_path)):
            return Uploaded(False, "File not found: %s" % file_path)
        shutil.copyfile(str(file_path), target_path)
        return Uploaded(True, "Successfully uploaded file to %s" % target_path)

    async def stop(self):
        await rock_sdk.in_thread(kill_all_of, self.directory)
        for bash in self._sessions.values():
            bash.close()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.stop()


class Bash:
    """An interactive bash on a terminal, one command at a time."""

    def __init__(self, env, directory):
        self._master, slave = os.openpty()
        modes = termios.tcgetattr(slave)
        modes[3] &= ~termios.ECHO
        termios.tcsetattr(slave, termios.TCSANOW, modes)
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc", "-i"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**env, "PS1": "", "PS2": ""},
            cwd=directory,
            start_new_session=True,
        )
        os.close(slave)
        self._lock = threading.Lock()
        self._is_closed = False
        self._until("ready", "printf '%s\\n' \"rea\"dy")

    def run(self, command):
        """(exit code, output) of a command."""
        with self._lock:
            output = self._until("EXITCODE([0-9]+)END", '%s\nprintf "%%s%%s%%s" EXIT"CODE" "$?" "END"' % command)
            return int(output.group(1)), output.string[: output.start()].strip()

    def _until(self, pattern, line):
        data = os.fsencode(line + "\n")
        sender = threading.Thread(target=self._send, args=(data,), daemon=True)
        sender.start()
        seen = b""
        while True:
            try:
                seen += os.read(self._master, 65536)
            except OSError:
                raise ConnectionError("the session has ended") from None
            found = re.search(pattern, seen[-200:].decode("utf-8", "backslashreplace"))
            if found:
                sender.join()
                return re.search(pattern + r"\Z|" + pattern, seen.decode("utf-8", "backslashreplace"))

    def _send(self, data):
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._master, data[:1024]) :]

    def close(self):
        """End it, and reap it."""
        if not self._is_closed:
            self._is_closed = True
            self._process.kill()
            self._process.wait()
            os.close(self._master)
