"""Sandboxes: commands and files get in and out unchanged, and nothing outlives what it belongs to."""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid

import pytest

import rock_sdk
from rock_ms import UsageError
from rock_sdk import CallFailed, ChildOutput, DockerSandbox, LocalSandbox, SandboxError, SandboxGone
from sandboxes import IMAGE, local_sandbox, need_engine, processes_with, run
from support import TIMEOUT, Later, nothing_left, wait_until

pytestmark = pytest.mark.load
in_container = [pytest.mark.docker]


@pytest.fixture(autouse=True)
def temp_dir(tmp_path, monkeypatch):
    """Where temporary files go: no test leaves one, nor a thread, a descriptor, or a process of a local sandbox."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    with nothing_left():
        yield str(directory)
    assert os.listdir(str(directory)) == []
    wait_until(lambda: not processes_with(str(tmp_path)), "the end of all processes of the test")


NAMES = []  # of all containers that are made here


def own_name():
    NAMES.append("rock-test-" + uuid.uuid4().hex[:12])
    return NAMES[-1]


@pytest.fixture(scope="module", autouse=True)
def no_container_is_left():
    """At the end, since an engine may still be about to make one that nobody waits for."""
    yield
    assert [name for name in NAMES if exists(name)] == []


@contextlib.contextmanager
def started(sandbox):
    run(sandbox.start())
    try:
        yield sandbox
    finally:
        run(sandbox.stop())


@pytest.fixture
def local():
    """A sandbox in a temporary directory."""
    with started(local_sandbox()) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def container(no_container_is_left):  # noqa: ARG001  # it has to end before that looks
    """A container for all tests that leave it as it was."""
    need_engine()
    with started(DockerSandbox(IMAGE, network="none", name=own_name())) as sandbox:
        yield sandbox


@pytest.fixture(params=["local", pytest.param("container", marks=in_container)])
def sandbox(request):
    """A sandbox of each kind."""
    return request.getfixturevalue(request.param)


def arun(sandbox, *args, **options):
    return run(sandbox.arun(*args, **options))


def docker(*words, check=True):
    """The output of a docker command."""
    done = subprocess.run(["docker", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT)
    assert not check or done.returncode == 0, (words, done.stderr)
    return done.stdout.decode("utf-8")


def exists(name):
    return docker("ps", "--all", "--quiet", "--filter", "name=^%s$" % name) != ""


def nap():
    """Seconds for a `sleep` that no other process sleeps, and that no test waits for."""
    return "1000.%09d" % random.randrange(10**9)


def alive(sandbox, text):
    """Whether a process in the sandbox has a text in its command line."""
    if isinstance(sandbox, LocalSandbox):
        return bool(processes_with(text))
    script = 'cd /proc && for p in [0-9]*; do tr "\\0" " " <$p/cmdline; done'
    return text in docker("exec", sandbox.sandbox_id, "sh", "-c", "(%s) 2>/dev/null; true" % script)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


async def cancel(task):
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


# Commands: in and out.


@pytest.mark.everywhere
@pytest.mark.parametrize(
    "command, output, exit_code, reason",
    [
        ("echo out; echo err >&2; echo more", "out\nerr\nmore\n", 0, ""),
        ("for i in 1 2 3 4 5; do printf o; printf e >&2; done", "oeoeoeoeoe", 0, ""),
        ("printf 'a\\377\\0b\\r\\n'", "a\ufffd\0b\r\n", 0, ""),
        ("echo '漢字 🎉'", "漢字 🎉\n", 0, ""),
        ("cat; echo no input", "no input\n", 0, ""),
        ("# only a comment", "", 0, ""),
        ("\n\necho a\n\necho b\n", "a\nb\n", 0, ""),
        ("cat <<'END'\n$HOME\n  'x'\nEND", "$HOME\n  'x'\n", 0, ""),
        ("[[ ab == a* ]] && echo bash", "bash\n", 0, ""),
        ("echo said; exit 3", "said\n", 3, "exit code 3"),
        ("exit 124", "", 124, "exit code 124"),
        ("exit 255", "", 255, "exit code 255"),
        ("kill -KILL $$", "", 137, "it was killed by SIGKILL (exit code 137)"),
        ("echo said; kill -TERM $$", "said\n", 143, "it was killed by SIGTERM (exit code 143)"),
        ("exit 139", "", 139, "it was killed by SIGSEGV (exit code 139)"),
    ],
)
def test_what_a_command_says_and_how_it_ends(sandbox, command, output, exit_code, reason):
    seen = arun(sandbox, command)
    assert (seen.output, seen.exit_code, seen.failure_reason) == (output, exit_code, reason)


def test_a_command_that_is_not_there_is_named(sandbox):
    seen = arun(sandbox, "no-such-command")
    assert (seen.exit_code, seen.failure_reason) == (127, "exit code 127")
    assert "no-such-command" in seen.output


AWKWARD = [
    "'\"`",
    "$HOME $(id) `id` ${x}",
    "\\ \\n \\\\",
    "a\nb\n",
    " \t ",
    "-n",
    "--",
    "* ~ ! # & ; | <>",
    "üß漢字🎉",
    "%s",
]


def test_words_reach_a_command_as_they_are(sandbox):
    seen = arun(sandbox, "printf '%s\\0' " + " ".join(map(shlex.quote, AWKWARD)))
    assert seen.output.split("\0")[:-1] == AWKWARD


@pytest.mark.parametrize("command", ["-x", "--version", "+x"])
def test_a_command_that_begins_like_an_option_is_a_command(sandbox, command):
    seen = arun(sandbox, command)
    assert seen.exit_code == 127 and "%s: command not found" % command in seen.output


def test_the_longest_command_that_is_taken_can_be_run(sandbox):
    command = "x=%s; echo ${#x}"
    count = rock_sdk.MAX_ARGUMENT_BYTES - len(command % "")
    assert arun(sandbox, command % ("x" * count)).output == "%d\n" % count


@pytest.mark.parametrize(
    "command, mode, message",
    [
        ("", "normal", "not empty"),
        (" \n\t", "nohup", "not empty"),
        (None, "normal", "must be a text"),
        (b"ls", "normal", "must be a text"),
        (["ls"], "normal", "must be a text"),
        ("echo a\0b", "normal", "NUL"),
        ("x" * (rock_sdk.MAX_ARGUMENT_BYTES + 1), "normal", "at most 131071 bytes"),
        ("ü" * (rock_sdk.MAX_ARGUMENT_BYTES // 2 + 1), "normal", "at most 131071 bytes"),
        ("ls", "background", "mode must be normal or nohup, got 'background'"),
        ("ls", None, "mode must be normal or nohup"),
        ("ls", ["nohup"], "mode must be normal or nohup"),
        ("echo \ud800", "normal", "a command"),
    ],
)
@pytest.mark.parametrize("kind", [lambda: LocalSandbox(), lambda: DockerSandbox(IMAGE)], ids=["local", "container"])
def test_what_no_shell_can_be_given_is_refused(kind, command, mode, message):
    with pytest.raises(UsageError, match=message):
        arun(kind(), command, mode=mode)


def test_both_modes_and_what_is_taken_for_the_sake_of_rock_are_the_same(sandbox):
    began = time.monotonic()
    for mode in ("normal", "nohup"):
        assert arun(sandbox, "echo $1; exit 4", "session", 300, 200, mode).exit_code == 4
    assert time.monotonic() - began < TIMEOUT, "the end of a command was not noticed at once"


def test_megabytes_come_back(sandbox):
    seen = arun(sandbox, "head -c 8000000 /dev/zero | tr '\\0' x; echo; echo end >&2")
    assert len(seen.output) == 8000005 and seen.output.strip("x") == "\nend\n"


@pytest.mark.parametrize(
    "command, output",
    [
        ("for i in $(seq 1000); do echo line $i; done", "\nline 999\nline 1000\n"),
        pytest.param("printf %01000d 7", "0007", id="one line"),
    ],
)
def test_of_too_much_output_the_end_comes_back(sandbox, command, output, monkeypatch):
    monkeypatch.setattr(rock_sdk, "MAX_OUTPUT_BYTES", 100)
    seen = arun(sandbox, command)
    assert seen.exit_code == 0 and len(seen.output) <= 100 and seen.output.endswith(output)


@pytest.mark.parametrize("again", ["echo b >/dev/stdout", "echo b | tee /dev/stderr >/dev/null"])
def test_output_that_is_opened_once_more_keeps_what_was_said(sandbox, again):
    assert arun(sandbox, "echo a; %s; echo c" % again).output == "a\nb\nc\n"


def test_a_child_in_the_background_runs_on_and_delays_nothing(sandbox):
    text = nap()
    began = time.monotonic()
    seen = arun(sandbox, "sleep %s & echo $!" % text)
    assert time.monotonic() - began < TIMEOUT
    assert seen.exit_code == 0 and alive(sandbox, text)
    assert arun(sandbox, "kill -KILL %d" % int(seen.output)).exit_code == 0
    wait_until(lambda: not alive(sandbox, text))


@pytest.mark.everywhere
def test_when_the_time_is_over_all_that_a_command_started_is_killed(sandbox):
    text, seconds = nap(), 2 if isinstance(sandbox, LocalSandbox) else 5  # an engine that is busy takes its time
    command = "trap '' TERM HUP INT; sh -c '(sleep {0}; true) & sleep {0}; true' & echo said; sleep {0}; true"
    seen = arun(sandbox, command.format(text), wait_timeout=seconds, mode="nohup")
    assert (seen.output, seen.exit_code) == ("said\n", 124)
    assert seen.failure_reason == "it did not end within %g s, and was killed" % seconds
    wait_for_end(sandbox, text)


def wait_for_end(sandbox, text):
    """Wait until no process has that text; end those that are left."""
    deadline = time.monotonic() + TIMEOUT
    while alive(sandbox, text):
        if time.monotonic() > deadline:
            arun(sandbox, "for p in $(grep -laF %s /proc/[0-9]*/cmdline); do kill -9 ${p//[a-z\\/]/}; done" % text)
            raise AssertionError("it runs on")
        time.sleep(0.02)


def test_a_command_that_talks_without_end_is_killed_like_any_other(sandbox, monkeypatch):
    monkeypatch.setattr(rock_sdk, "MAX_OUTPUT_BYTES", 1000)
    text, seconds = nap(), 2 if isinstance(sandbox, LocalSandbox) else 3
    seen = arun(sandbox, "seq 1000; exec sleep %s" % text, wait_timeout=seconds)
    assert seen.exit_code == 124
    wait_for_end(sandbox, text)


@pytest.mark.parametrize("wait_timeout", [0, -1, 0.001])
def test_a_command_without_time_is_killed_too(local, wait_timeout):
    assert arun(local, "sleep %s" % nap(), wait_timeout=wait_timeout).exit_code == 124


# Cancellation.


def test_a_command_that_is_cancelled_before_it_began_never_begins(local):
    async def main():
        task = asyncio.ensure_future(local.arun("touch began"))
        await cancel(task)

    run(main())
    assert arun(local, "[ ! -e began ]").exit_code == 0


@pytest.mark.everywhere
@pytest.mark.parametrize("steps", range(5))
def test_a_command_that_is_cancelled_as_it_begins_leaves_nothing(local, steps):
    text = nap()

    async def main():
        task = asyncio.ensure_future(local.arun("sleep %s & sleep %s" % (text, text)))
        for _ in range(steps):
            await asyncio.sleep(0)
        await cancel(task)

    run(main())
    wait_for_end(local, text)


@pytest.mark.everywhere
def test_a_command_that_is_cancelled_while_it_runs_is_killed_with_all_that_it_started(sandbox):
    text = nap()

    async def main():
        task = asyncio.ensure_future(sandbox.arun("sh -c 'sleep {0} & sleep {0}; true' & sleep {0}; true".format(text)))
        await until(lambda: alive(sandbox, text))
        await cancel(task)

    run(main())
    wait_for_end(sandbox, text)


def test_a_cancellation_is_not_lost_when_the_command_ends_at_that_moment(local):
    async def main(steps):
        threads = threading.active_count()
        task = asyncio.ensure_future(local.arun("true"))
        await asyncio.sleep(0)
        wait_until(lambda: threading.active_count() == threads, "the end of the command, while the loop stands still")
        for _ in range(steps):
            await asyncio.sleep(0)
        is_cancelled = task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() == is_cancelled, steps

    for steps in range(8):
        run(main(steps))


def test_commands_that_are_cancelled_together_all_end(local):
    text = nap()

    async def main():
        tasks = [asyncio.ensure_future(local.arun("sleep %s" % text)) for _ in range(20)]
        await until(lambda: len(processes_with(text)) >= 20)
        both = asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            task.cancel()
        assert all(isinstance(end, asyncio.CancelledError) for end in await both)

    run(main())
    wait_for_end(local, text)


# Many at once, and loops in other threads.


def test_many_commands_at_once_get_each_its_own_output(sandbox):
    count = 40 if isinstance(sandbox, LocalSandbox) else 8

    async def main():
        return await asyncio.gather(*(sandbox.arun("echo %d; exit %d" % (i, i)) for i in range(count)))

    assert [(seen.output, seen.exit_code) for seen in run(main())] == [("%d\n" % i, i) for i in range(count)]


@pytest.mark.everywhere
def test_a_loop_in_another_thread_serves_as_well():
    async def main():
        async with local_sandbox() as sandbox:
            seen = await asyncio.gather(*(sandbox.arun("exit %d" % i) for i in range(5)))
            return [one.exit_code for one in seen] + [(await sandbox.arun("sleep 1000", wait_timeout=0.1)).exit_code]

    several = [Later(lambda: run(main())) for _ in range(3)]
    assert [later.result() for later in several] == [[0, 1, 2, 3, 4, 124]] * 3


def test_one_sandbox_serves_several_loops_one_after_the_other(local):
    for i in range(3):
        assert Later(lambda i=i: arun(local, "echo %d" % i)).result().output == "%d\n" % i


# The environment.


def environ_in(sandbox):
    """The environment of a command, without what a shell adds by itself."""
    pairs = (pair.partition("=")[::2] for pair in arun(sandbox, "env -0").output.split("\0") if pair)
    return {name: value for name, value in pairs if name not in ("PWD", "OLDPWD", "SHLVL", "_")}


def test_a_local_sandbox_has_an_environment_of_its_own_and_nothing_of_the_trainer(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret-of-the-trainer")
    monkeypatch.setenv("ROCK_TEST_SECRET", "a-secret-of-the-trainer")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    with started(LocalSandbox()) as sandbox:
        environ, directory = environ_in(sandbox), sandbox.directory
        assert arun(sandbox, "pwd; cd; pwd; ls -d $TMPDIR").output == "{0}\n{0}\n{0}/tmp\n".format(directory)
    marks = [environ.pop(name) for name in list(environ) if name.startswith(rock_sdk.SANDBOX_DIR_VARIABLE)]
    assert marks == [directory]
    assert {name: environ[name] for name in environ if name not in ("PATH", "LANG", "TZ") and name[:3] != "LC_"} == {
        "HOME": directory,
        "TMPDIR": directory + "/tmp",
        "ROCK_MODEL_SERVICE_DATA_DIR": directory + "/logs",
        "SERVICE_HOST": "127.0.0.1",
        "SERVICE_PORT": "0",
    }
    assert environ["LC_ALL"] == "C.UTF-8"
    assert environ["PATH"].split(os.pathsep)[-1] == os.path.dirname(sys.executable)


VALUES = {
    "A": " a b ",
    "B": "'\"`$HOME\\n$(id)",
    "C": "",
    "D": "ü漢",
    "E": "x=y",
    "_f1": "#no comment",
    "N": 7,
    "F": 0.5,
}
TEXTS = {**VALUES, "N": "7", "F": "0.5"}


def test_values_of_the_environment_arrive_as_they_are():
    env = {**VALUES, "L": "a\nb\r\n", "HOME": "/elsewhere"}
    with started(LocalSandbox(env=env)) as sandbox:
        environ = environ_in(sandbox)
        assert {name: environ[name] for name in TEXTS} == TEXTS
        assert (environ["L"], environ["HOME"]) == ("a\nb\r\n", "/elsewhere")


def test_no_environment_hides_the_processes_of_a_sandbox(tmp_path):
    with started(local_sandbox(directory=str(tmp_path / "kept"))) as sandbox:
        marks = [name for name in environ_in(sandbox) if name.startswith(rock_sdk.SANDBOX_DIR_VARIABLE)]
    text = nap()
    with started(local_sandbox(directory=str(tmp_path / "kept"), env=dict.fromkeys(marks, "/elsewhere"))) as sandbox:
        arun(sandbox, "setsid sleep %s &" % text)
        wait_until(lambda: alive(sandbox, text), "the daemon")
    assert not processes_with(text)


@pytest.mark.parametrize("kind", [LocalSandbox, lambda env: DockerSandbox(IMAGE, env)], ids=["local", "container"])
@pytest.mark.parametrize(
    "env, message",
    [
        ({"A B": "x"}, "A B: no name"),
        ({"A=B": "x"}, "A=B: no name"),
        ({"": "x"}, "no name"),
        ({"1A": "x"}, "1A: no name"),
        ({"A\n": "x"}, "no name"),
        ({"AB": True}, "AB: must be a text"),
        ({"AB": None}, "AB: must be a text"),
        ({"AB": ["x"]}, "AB: must be a text"),
        ({"AB": "x\0"}, "AB: holds a NUL"),
        ([("AB", "x")], "must be a mapping"),
    ],
)
def test_what_no_environment_can_carry_is_refused_by_name(kind, env, message):
    with pytest.raises(UsageError, match=message):
        kind(env=env)


@pytest.mark.parametrize(
    "value", ["a\nb", "a\r", "\udcff", "x" * 70000], ids=["two lines", "carriage return", "not UTF-8", "long"]
)
def test_what_docker_cannot_carry_is_refused_by_name(value):
    with pytest.raises(UsageError, match="^env.AWKWARD: "):
        DockerSandbox(IMAGE, env={"FINE": "x", "AWKWARD": value})


# Uploads.


@pytest.fixture
def place(sandbox):
    """A directory in the sandbox that is not there yet."""
    base = sandbox.directory if isinstance(sandbox, LocalSandbox) else "/tmp"
    place = "%s/place %s" % (base, nap())
    yield place
    arun(sandbox, "rm -rf %s" % shlex.quote(place))


@pytest.fixture
def source(tmp_path):
    """Writes a file of this machine; its path."""

    def write(data, mode=0o644):
        path = tmp_path / "source"
        path.write_bytes(data)
        path.chmod(mode)
        return str(path)

    return write


def upload(sandbox, *args):
    return run(sandbox.upload_by_path(*args))


def uploaded(sandbox, source_path, target):
    """The SHA-256 of a file once it is uploaded."""
    response = upload(sandbox, source_path, target)
    assert response.success and target in response.message, response
    return arun(sandbox, "sha256sum <%s" % shlex.quote(target)).output.split()[0]


CONTENTS = [b"", b"no line end", bytes(range(256)), b"\r\n\0\x04\x1a\xff\xfe", bytes(range(256)) * 40000]


@pytest.mark.everywhere
@pytest.mark.parametrize("data", CONTENTS, ids=["empty", "text", "binary", "control", "10 MB"])
def test_a_file_arrives_as_it_is_and_where_no_directory_was(sandbox, place, source, data):
    target = place + "/a/b/file"
    assert uploaded(sandbox, source(data), target) == hashlib.sha256(data).hexdigest()
    assert arun(sandbox, "ls -A %s" % shlex.quote(place + "/a/b")).output == "file\n"


@pytest.mark.parametrize("name", ["a b", "'\"`$HOME\\", "a\nb", "ü漢", "*", "-f", "..."])
def test_a_file_may_have_any_name(sandbox, place, source, name):
    assert uploaded(sandbox, source(b"x"), "%s/%s" % (place, name)) == hashlib.sha256(b"x").hexdigest()


@pytest.mark.parametrize("name", ["here-%s", "-f%s"])
def test_a_relative_path_is_one_from_where_commands_run(sandbox, source, name):
    name %= nap()
    try:
        assert upload(sandbox, source(b"x"), name).success
        assert arun(sandbox, "cat ./%s" % name).output == "x"
    finally:
        arun(sandbox, "rm -f ./%s*" % name)


@pytest.mark.docker
@pytest.mark.load
def test_a_file_may_go_to_the_root_of_a_container(container, source):
    name = "/file-%s" % nap()
    assert upload(container, source(b"x"), name).success
    assert arun(container, "cat %s; rm %s" % (name, name)).output == "x"


def test_an_upload_replaces_a_file_whole(sandbox, place, source):
    target = place + "/file"
    see = "stat -c '%%i %%s' %s; ls -A %s" % (shlex.quote(target), shlex.quote(place))
    uploaded(sandbox, source(b"a longer one"), target)
    before = arun(sandbox, see).output.split()
    assert uploaded(sandbox, source(b"short"), target) == hashlib.sha256(b"short").hexdigest()
    after = arun(sandbox, see).output.split()
    assert (before[1:], after[1:]) == (["12", "file"], ["5", "file"])
    assert before[0] != after[0], "one that reads the earlier file would see it change"


@pytest.mark.parametrize("mode", [0o755, 0o644, 0o500, 0o444])
def test_a_program_stays_executable(sandbox, place, source, mode):
    target = place + "/program"
    uploaded(sandbox, source(b"#!/bin/sh\necho runs\n", mode), target)
    mode_there = int(arun(sandbox, "stat -c %%a %s" % shlex.quote(target)).output, 8)
    assert mode_there | 0o444 == mode | 0o444
    seen = arun(sandbox, "%s || exit 9" % shlex.quote(target))
    assert seen.output == "runs\n" if mode & 0o100 else seen.exit_code == 9


@pytest.mark.parametrize("kind", ["missing", "directory", "below a file"])
def test_a_source_that_cannot_be_read_is_named(sandbox, place, source, tmp_path, kind):
    paths = {"missing": "/no/such/file", "directory": str(tmp_path), "below a file": source(b"") + "/x"}
    response = upload(sandbox, paths[kind], place + "/file")
    assert not response.success and paths[kind] in response.message
    assert arun(sandbox, "find %s -type f 2>/dev/null" % shlex.quote(place)).output == ""


@pytest.mark.parametrize("kind", ["below a file", "a directory", "a directory with a slash", "not writable"])
def test_a_target_that_cannot_be_written_is_named_and_nothing_is_left(sandbox, place, source, kind):
    quoted = shlex.quote(place)
    assert arun(sandbox, "mkdir -p {0}/dir && touch {0}/file".format(quoted)).exit_code == 0
    targets = {"below a file": "/file/x", "a directory": "/dir", "a directory with a slash": "/dir/"}
    target = place + targets[kind] if kind in targets else "/proc/no-such-directory/x"
    response = upload(sandbox, source(b"data"), target)
    assert not response.success and target in response.message
    assert arun(sandbox, "cd %s && find . | sort" % quoted).output == ".\n./dir\n./file\n"


@pytest.mark.parametrize("paths", [("a\0b", "x"), (__file__, "a\0b")])
def test_a_path_with_a_nul_is_no_path(sandbox, paths):
    assert not upload(sandbox, *paths).success


def test_an_upload_of_what_is_no_file_ends_at_once_and_says_so(sandbox, tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    with open(fifo, "r+b", buffering=0) as writer:
        later = Later(lambda: upload(sandbox, fifo, "here"))
        deadline = time.monotonic() + TIMEOUT
        while not later.is_done() and time.monotonic() < deadline:
            time.sleep(0.01)
        is_done = later.is_done()
        writer.write(b"end")  # so that one that reads it does not wait for ever
    assert is_done and not later.result().success


@pytest.fixture
def large(source):
    """A large file, and its size."""
    path, size = source(b""), 100 * 1024 * 1024
    os.truncate(path, size)
    yield path, size
    os.unlink(path)


def test_an_upload_that_is_cancelled_leaves_the_whole_file_or_none(local, large):
    path, size = large
    place = os.path.join(local.directory, "place")
    os.mkdir(place)

    async def main():
        task = asyncio.ensure_future(local.upload_by_path(path, "place/file"))
        await until(lambda: os.listdir(place))
        await cancel(task)
        assert "file" not in os.listdir(place) or os.path.getsize(place + "/file") == size

    threads = threading.active_count()
    run(main())
    wait_until(lambda: threading.active_count() <= threads)
    assert os.listdir(place) in ([], ["file"])


@pytest.mark.docker
@pytest.mark.load
def test_an_upload_into_a_container_that_is_cancelled_leaves_the_whole_file_or_none(container, large):
    path, size = large
    place = "/tmp/place-" + nap()
    sizes = "cd %s 2>/dev/null && stat -c %%s *" % place
    arun(container, "mkdir " + place)

    async def main():
        task = asyncio.ensure_future(container.upload_by_path(path, place + "/file"))
        while not (await container.arun(sizes)).output.strip("0\n").isdigit():
            assert not task.done(), "too fast for this test"
        await cancel(task)

    run(main())
    wait_until(lambda: not alive(container, place), "the end of what saves it")
    left = arun(container, "cd %s && ls; rm -rf %s" % (place, place)).output
    assert left == ""


# The life of a local sandbox.


@pytest.mark.parametrize(
    "command",
    [
        "setsid sleep {0} >/dev/null 2>&1 &",
        "(setsid sh -c '(sleep {0} &) &' &)",
        "nohup setsid sleep {0} &",
        "setsid sh -c \"trap '' TERM HUP INT QUIT; sleep {0}; true\" &",
        "cd / && setsid env OTHER=1 sleep {0} &",
        "setsid sh -c 'while :; do sleep {0}; done' &",
        "for i in 1 2 3 4 5 6 7 8 9; do setsid sleep {0} & done",
    ],
)
def test_stop_ends_daemons(command):
    text = nap()
    with started(local_sandbox()) as sandbox:
        assert arun(sandbox, command.format(text)).exit_code == 0
        wait_until(lambda: alive(sandbox, text), "the daemon")
    assert not processes_with(text)


def test_stop_removes_a_directory_of_its_own(temp_dir):
    with started(local_sandbox()) as sandbox:
        arun(sandbox, "mkdir -p a/b; touch a/b/c; ln -s / root; chmod 500 a")
        assert os.path.dirname(sandbox.directory) == temp_dir
    assert os.listdir(temp_dir) == []


def test_stop_keeps_a_directory_that_was_given(tmp_path):
    directory = tmp_path / "given" / "deep"
    with started(local_sandbox(directory=str(directory))) as sandbox:
        assert arun(sandbox, "pwd; echo x >kept").output == "%s\n" % directory
        assert sandbox.sandbox_id == "deep"
    assert (directory / "kept").read_text() == "x\n"
    assert not [name for name in os.listdir(str(directory)) if name.startswith(".")], "a state of ours is left"


def test_a_directory_may_be_given_as_a_path_and_by_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    text = nap()
    with started(LocalSandbox(tmp_path / "link")) as sandbox:
        assert arun(sandbox, "pwd -P; setsid sleep %s >/dev/null &" % text).output == "%s\n" % (tmp_path / "real")
    assert not processes_with(text)


def test_sandboxes_do_not_see_each_other(tmp_path):
    # The name of one begins as that of the other: processes are told apart by the whole of it.
    text, other_text = nap(), nap()
    with started(local_sandbox(directory=str(tmp_path / "ab"), env={"ONLY": "here"})) as other:
        with started(local_sandbox(directory=str(tmp_path / "a"))) as sandbox:
            for one, mark in ((sandbox, text), (other, other_text)):
                arun(one, "echo x >~/%s; echo x >$TMPDIR/%s; setsid sleep %s &" % (mark, mark, mark))
                wait_until(lambda mark=mark: processes_with(mark))
            assert (
                arun(sandbox, "echo $ONLY; cat ~/%s $TMPDIR/%s" % (other_text, other_text)).output.count("No such") == 2
            )
        assert not processes_with(text)
        assert processes_with(other_text)
        assert arun(other, "cat ~/%s" % other_text).output == "x\n"


@pytest.mark.everywhere
def test_stop_ends_a_command_that_runs():
    text = nap()

    async def main():
        async with local_sandbox() as sandbox:
            task = asyncio.ensure_future(sandbox.arun("sleep %s" % text))
            await until(lambda: processes_with(text))
        seen = await task
        assert (seen.exit_code, seen.failure_reason) == (137, "it was killed by SIGKILL (exit code 137)")

    run(main())


def test_a_sandbox_is_stopped_whatever_happens_in_it(temp_dir):
    async def main():
        with pytest.raises(ZeroDivisionError):
            async with local_sandbox() as sandbox:
                await sandbox.arun("setsid sleep 1000 >/dev/null &")
                raise ZeroDivisionError
        task = asyncio.ensure_future(hold())
        await until(lambda: processes_with(temp_dir))
        await cancel(task)

    async def hold():
        async with local_sandbox() as sandbox:
            await sandbox.arun("sleep 1000")

    run(main())
    assert not processes_with(temp_dir)


def assert_is_gone(sandbox):
    with pytest.raises(SandboxGone, match="not running: it was not started"):
        arun(sandbox, "true")
    with pytest.raises(SandboxGone, match="not running: it was not started"):
        upload(sandbox, __file__, "x")


@pytest.mark.parametrize(
    "kind", [LocalSandbox, lambda: DockerSandbox("x", docker="no-such-docker")], ids=["local", "docker"]
)
def test_before_the_start_there_is_no_sandbox_and_nothing_to_stop(kind):
    sandbox = kind()
    assert_is_gone(sandbox)
    run(sandbox.stop())


def test_stop_may_be_called_twice_and_a_stopped_sandbox_started_once_more(temp_dir):
    sandbox = local_sandbox()
    for _ in range(2):
        with started(sandbox):
            assert arun(sandbox, "ls").output == "tmp\n"
        run(sandbox.stop())
        assert_is_gone(sandbox)
        assert os.listdir(temp_dir) == []


def test_without_its_directory_a_local_sandbox_is_gone_and_stop_still_ends_its_processes():
    text = nap()
    with started(local_sandbox()) as sandbox:
        arun(sandbox, "setsid sleep %s >/dev/null &" % text)
        shutil.rmtree(sandbox.directory)
        with pytest.raises(SandboxGone, match="directory .* is gone"):
            arun(sandbox, "true")
        with pytest.raises(SandboxGone, match="directory .* is gone"):
            upload(sandbox, __file__, "x")
    assert not processes_with(text)


def test_a_command_that_deletes_the_directory_ends_as_it_ends(local):
    assert arun(local, "rm -rf $HOME; echo done").output == "done\n"
    with pytest.raises(SandboxGone):
        arun(local, "true")


def test_a_directory_that_cannot_be_made_is_named(source):
    with pytest.raises(SandboxError, match="cannot make a sandbox in .*/source/x: Not a directory"):
        run(LocalSandbox(source(b"") + "/x").start())


def test_where_the_shell_cannot_be_run_the_call_has_failed():
    with started(local_sandbox(env={"LONG": "x" * 200000})) as sandbox:
        with pytest.raises(CallFailed, match="cannot run .*Argument list too long"):
            arun(sandbox, "true")


TRAINER = """
import asyncio, sys
from rock_sdk import LocalSandbox

async def main():
    sandbox = LocalSandbox(sys.argv[1] or None)
    await sandbox.start()
    await sandbox.arun("echo x >kept; setsid sleep %s >/dev/null &" % sys.argv[2])
    print(sandbox.directory, flush=True)
    await sandbox.arun("sleep " + sys.argv[2])

asyncio.run(main())
"""


@pytest.mark.parametrize("is_given", [True, False])
def test_a_sandbox_outlives_a_trainer_that_is_killed_and_is_attached_to(tmp_path, temp_dir, is_given):
    text, given = nap(), str(tmp_path / "given") if is_given else ""
    command = [sys.executable, "-c", TRAINER, given, text]
    environ = {**os.environ, "TMPDIR": temp_dir, "PYTHONPATH": os.path.dirname(rock_sdk.__file__)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ, cwd=temp_dir) as trainer:
        directory = trainer.stdout.readline().decode().strip()
        trainer.kill()
    sandbox = run(LocalSandbox.attach(directory))
    assert arun(sandbox, "cat kept").output == "x\n" and alive(sandbox, text)
    run(sandbox.stop())
    assert not processes_with(text)
    assert os.path.exists(directory) == is_given
    if not is_given:
        with pytest.raises(SandboxGone, match=directory):
            run(LocalSandbox.attach(directory))


def test_there_is_no_attaching_to_a_directory_that_is_no_sandbox(tmp_path):
    for directory in (str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises(SandboxGone, match="there is no sandbox in .*%s" % directory):
            run(LocalSandbox.attach(directory))


# Processes.


def run_process(command, timeout=TIMEOUT, **options):
    """(exit code, output, errors) of a process."""

    async def main():
        with contextlib.closing(ChildOutput()) as output, contextlib.closing(ChildOutput()) as errors:
            code = await rock_sdk.run_process(command, timeout, output, errors, **options)
            return code, output.take(), errors.take()

    return run(main())


@pytest.mark.everywhere
@pytest.mark.parametrize(
    "script, code", [("exit 0", 0), ("exit 255", 255), ("kill -TERM $$", -signal.SIGTERM), ("kill -KILL $$", -9)]
)
def test_the_exit_code_of_a_process_comes_back(script, code):
    assert run_process(["sh", "-c", "echo out; echo ' err ' >&2; " + script]) == (code, b"out\n", b" err \n")


def test_a_process_reads_what_it_is_given_and_nothing_else(tmp_path):
    (tmp_path / "input").write_bytes(b"\0\xff")
    with open(str(tmp_path / "input"), "rb") as file:
        assert run_process(["cat"], stdin=file) == (0, b"\0\xff", b"")
    assert run_process(["cat"]) == (0, b"", b"")


def test_a_process_that_cannot_be_started_leaves_nothing():
    with pytest.raises(OSError):
        run_process(["/no/such/program"])


def test_a_process_whose_time_is_over_has_no_exit_code_and_its_output_stays():
    assert run_process(["sh", "-c", "echo out; sleep %s" % nap()], timeout=2) == (None, b"out\n", b"")


def test_killing_a_group_that_has_gone_is_harmless():
    process = subprocess.Popen(["true"], start_new_session=True)
    process.wait()
    rock_sdk.kill_group(process.pid)


def test_only_processes_with_exactly_that_mark_are_killed():
    marks = ["ROCK_TEST_MARK=%s" % mark for mark in ("a", "ab", "A")]
    texts = [nap() for _ in marks]
    several = [subprocess.Popen(["env", mark, "sleep", text]) for mark, text in zip(marks, texts)]
    for text in texts:
        wait_until(lambda text=text: processes_with("sleep\0" + text))
    rock_sdk.kill_marked(marks[0].encode())
    assert several[0].wait(TIMEOUT) == -signal.SIGKILL
    assert [process.poll() for process in several[1:]] == [None, None]
    for process in several[1:]:
        process.kill()
        process.wait()


def test_a_thread_hands_back_what_its_function_returns_or_raises():
    async def main():
        assert await rock_sdk.in_thread(lambda a, b: (a, b, threading.current_thread() is main_thread), 1, 2) == (
            1,
            2,
            False,
        )
        with pytest.raises(ZeroDivisionError):
            await rock_sdk.in_thread(lambda: 1 // 0)

    main_thread = threading.current_thread()
    run(main())


@pytest.mark.filterwarnings("error")  # as which pytest reports what a thread raises, from Python 3.8
@pytest.mark.parametrize("end", ["cancelled", "loop closed"])
def test_what_a_thread_returns_when_nobody_waits_any_more_is_dropped_without_a_word(end, caplog, capsys):
    release, said, ended = threading.Event(), [], threading.Event()

    def work():
        release.wait(TIMEOUT)
        ended.set()

    async def main():
        asyncio.get_event_loop().set_exception_handler(lambda loop, context: said.append(context))
        future = rock_sdk.in_thread(work)
        if end == "cancelled":
            future.cancel()
            release.set()
            await until(ended.is_set)
            await rock_sdk.in_thread(int)

    threads = threading.active_count()
    run(main())
    release.set()
    wait_until(lambda: threading.active_count() <= threads)
    assert said == [] and caplog.records == [] and capsys.readouterr().err == ""


# Containers.


def in_containers(test):
    return pytest.mark.docker(pytest.mark.load(test))


SECRET = "secret-%032x" % random.getrandbits(128)


def command_lines():
    """The command lines of all processes of this machine."""
    lines = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open("/proc/%s/cmdline" % pid, "rb") as file:
            lines.add(file.read().decode("utf-8", "replace"))
    return lines


async def watched(coroutine):
    """The command lines that were there meanwhile."""
    task, lines = asyncio.ensure_future(coroutine), set()
    while not task.done():
        lines |= command_lines()
        await asyncio.sleep(0.02)
    await task
    return lines


@pytest.fixture(scope="module")
def configured(no_container_is_left):  # noqa: ARG001
    """A container with every option, and the command lines that were seen while it was made."""
    need_engine()
    options = {"network": "none", "memory": "256m", "cpus": 0.5, "pids_limit": 64, "workdir": "/var/tmp"}
    options["docker_args"] = ("--hostname=rock-host",)
    sandbox = DockerSandbox(IMAGE, {**VALUES, "SECRET": SECRET}, "1000:1000", name=own_name(), **options)
    try:
        lines = run(watched(sandbox.start()))
        docker("exec", sandbox.sandbox_id, "chmod", "755", "/")  # in this image it has mode 700
        yield sandbox, lines
    finally:
        run(sandbox.stop())


@in_containers
def test_the_options_of_a_container_reach_the_engine(configured):
    [seen] = json.loads(docker("inspect", configured[0].sandbox_id))
    host = seen["HostConfig"]
    assert (host["Memory"], host["PidsLimit"], host["NetworkMode"]) == (256 * 1024 * 1024, 64, "none")
    assert host["NanoCpus"] == 500000000
    assert (seen["Config"]["WorkingDir"], seen["Config"]["Hostname"]) == ("/var/tmp", "rock-host")
    assert rock_sdk.SANDBOX_LABEL in seen["Config"]["Labels"]


@in_containers
def test_commands_and_uploads_are_those_of_the_user_that_is_given(configured, source):
    sandbox = configured[0]
    assert arun(sandbox, "id -u; id -g; pwd; hostname").output == "1000\n1000\n/var/tmp\nrock-host\n"
    assert upload(sandbox, source(b"x"), "mine").success
    assert arun(sandbox, "stat -c '%u %g' /var/tmp/mine; rm mine").output == "1000 1000\n"
    for target in ("/root/x", "/etc/x", "/new/x"):
        response = upload(sandbox, source(b"x"), target)
        assert not response.success and target in response.message
    assert arun(sandbox, "ls /etc/x* /new*").exit_code != 0


@in_containers
def test_values_of_the_environment_arrive_in_a_container_as_they_are(configured):
    environ = environ_in(configured[0])
    assert {name: environ[name] for name in TEXTS} == TEXTS


@in_containers
def test_no_command_line_shows_the_environment_of_a_container(configured):
    sandbox, lines = configured
    lines |= run(watched(sandbox.arun("sleep 0.2; echo $SECRET")))
    assert any("run\0--detach" in line and sandbox.sandbox_id in line for line in lines), "it was not watched"
    assert any("exec\0" in line and sandbox.sandbox_id in line for line in lines), "it was not watched"
    assert not [line for line in lines if SECRET in line]


@in_containers
def test_processes_whose_parent_has_gone_are_reaped_in_a_container(container):
    pid = int(arun(container, "sh -c 'sleep %s >/dev/null & echo $!'" % nap()).output)
    assert arun(container, "kill -KILL %d" % pid).exit_code == 0
    wait_until(lambda: arun(container, "[ ! -e /proc/%d ]" % pid).exit_code == 0, "the end of a zombie")


@in_containers
def test_containers_do_not_see_each_other(container, configured):
    arun(container, "echo x >/tmp/here")
    assert arun(configured[0], "ls /tmp").output == ""
    assert arun(container, "echo $SECRET; rm /tmp/here").output == "\n"


@in_containers
def test_a_command_in_a_container_ends_whenever_its_time_is_over(container):
    text = nap()
    for i in range(12):
        assert arun(container, "exec sleep " + text, wait_timeout=0.02 * i).exit_code == 124
    wait_for_end(container, text)


@in_containers
def test_a_name_that_is_taken_is_refused_and_the_other_container_stays(container):
    other = DockerSandbox(IMAGE, network="none", name=container.sandbox_id)
    with pytest.raises(SandboxError) as raised:
        run(other.start())
    run(other.stop())

    async def main():
        task = asyncio.ensure_future(other.start())
        await until(lambda: any("--name=" + container.sandbox_id in line for line in command_lines()))
        await cancel(task)

    run(main())
    assert_is_gone(other)
    assert arun(container, "echo here").output == "here\n"
    assert "already in use" in str(raised.value)


@in_containers
def test_an_image_that_is_missing_is_named_with_the_reason():
    need_engine()
    sandbox = DockerSandbox("localhost:1/no-such-image", name=own_name())
    with pytest.raises(SandboxError, match="of the image localhost:1/no-such-image: .*refused"):
        run(sandbox.start())
    assert_is_gone(sandbox)


def test_a_docker_command_that_is_missing_is_named():
    message = "cannot run no-such-docker: No such file or directory"
    with pytest.raises(SandboxError, match=message):
        run(DockerSandbox(IMAGE, docker="no-such-docker").start())
    with pytest.raises(SandboxError, match=message):
        run(DockerSandbox.attach("name", docker="no-such-docker"))


@in_containers
def test_an_engine_that_is_away_for_a_while_takes_no_sandbox_with_it(container, monkeypatch):
    attached = run(DockerSandbox.attach(container.sandbox_id))
    with monkeypatch.context() as away:
        away.setenv("DOCKER_HOST", "unix:///no/such/socket")
        for call in (lambda: arun(container, "true"), lambda: upload(container, __file__, "/tmp/x")):
            with pytest.raises(CallFailed):
                call()
        with pytest.raises(SandboxError):
            run(attached.stop())
        with pytest.raises(SandboxError):
            run(DockerSandbox(IMAGE).start())
    assert arun(container, "echo back").output == "back\n"


@in_containers
@pytest.mark.parametrize("kind", ["no host", "no answer"])
def test_what_an_engine_does_not_say_is_not_taken_for_the_end(container, monkeypatch, kind):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        hosts = {
            "no host": "tcp://no-such-host.invalid:1",
            "no answer": "tcp://127.0.0.1:%d" % listener.getsockname()[1],
        }
        monkeypatch.setenv("DOCKER_HOST", hosts[kind])
        monkeypatch.setattr(DockerSandbox._call, "__defaults__", (1,))  # in place of COMMAND_SECONDS
        with pytest.raises(SandboxError) as raised:
            run(DockerSandbox.attach(container.sandbox_id))
    assert not isinstance(raised.value, SandboxGone), raised.value


@in_containers
def test_there_is_no_attaching_to_a_container_that_is_not_there():
    need_engine()
    with pytest.raises(SandboxGone, match="no-such-container"):
        run(DockerSandbox.attach("no-such-container"))


async def gone_in_mid_command(sandbox, end):
    text = nap()
    task = asyncio.ensure_future(sandbox.arun("echo said; sleep " + text))
    await until(lambda: alive(sandbox, text))
    await end()
    with pytest.raises(SandboxGone, match="the container is gone"):
        await task
    for call in (sandbox.arun("true"), sandbox.upload_by_path(__file__, "/tmp/x")):
        with pytest.raises(SandboxGone):
            await call


@in_containers
def test_a_container_is_attached_to_and_when_that_one_removes_it_the_first_says_so():
    need_engine()

    async def main():
        first = DockerSandbox(IMAGE, network="none", name=own_name())
        await first.start()
        try:
            second = await DockerSandbox.attach(first.sandbox_id)
            await first.arun("echo x >/tmp/here")
            assert (await second.arun("cat /tmp/here")).output == "x\n"
        finally:
            await gone_in_mid_command(first, second.stop)
        assert not exists(first.sandbox_id)
        await first.stop()

    run(main())


@in_containers
def test_a_container_that_was_killed_is_gone_and_stop_removes_what_is_left_of_it():
    need_engine()

    async def main():
        async with DockerSandbox(IMAGE, network="none", name=own_name()) as sandbox:
            await gone_in_mid_command(sandbox, lambda: rock_sdk.in_thread(docker, "kill", sandbox.sandbox_id))
            assert exists(sandbox.sandbox_id)
        assert not exists(sandbox.sandbox_id)

    run(main())


@in_containers
def test_a_container_ends_with_its_lifetime_and_leaves_nothing():
    need_engine()

    async def main():
        async with DockerSandbox(IMAGE, network="none", name=own_name(), lifetime_seconds=2) as sandbox:
            with pytest.raises(SandboxGone):
                await sandbox.arun("sleep %s" % nap())
            await until(lambda: not exists(sandbox.sandbox_id))

    run(main())


@in_containers
@pytest.mark.parametrize("moment", ["asked for", "made"])
def test_a_start_that_is_cancelled_leaves_no_container(moment):
    need_engine()
    sandbox = DockerSandbox(IMAGE, network="none", name=own_name())

    def has_come():
        if moment == "made":
            return exists(sandbox.sandbox_id)
        return any("--name=" + sandbox.sandbox_id in line for line in command_lines())

    async def main():
        task = asyncio.ensure_future(sandbox.start())
        await until(has_come)
        assert not task.done(), "too fast for this test"
        await cancel(task)
        assert not exists(sandbox.sandbox_id)

    run(main())
    assert_is_gone(sandbox)
