"""Pythons that are strict, old, or built without something, and surroundings that know only ASCII."""

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

import rock_ms
import rock_sdk
from assistants import assisting, says
from managers import free_port
from support import SCRIPT, TIMEOUT, ask, clean_environ, run_cli

pytestmark = pytest.mark.load

SDK_SCRIPT = os.path.abspath(rock_sdk.__file__)
STRICT = ("-I", "-S", "-bb", "-W", "error")
# Put before all else that a Python runs: no /proc, and none of the libraries that it may have been built without.
BARE = """
import builtins, sys

sys.modules.update(dict.fromkeys(%r))
real_open = builtins.open

def open(path, *args, **options):
    if str(path).startswith("/proc/"):
        raise FileNotFoundError(2, "No such file or directory", path)
    return real_open(path, *args, **options)

builtins.open = open
"""
LIBRARIES = ("ssl", "_ssl", "sqlite3", "_sqlite3", "ctypes", "_ctypes", "bz2", "_bz2", "lzma", "_lzma", "readline")


def output_of(*command):
    """What a command prints that must succeed without a word on standard error."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environ(), timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode("utf-8")


@pytest.fixture
def bare(tmp_path):
    """The environment of a bare Python."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(BARE % (LIBRARIES,))
    return clean_environ(PYTHONPATH=str(tmp_path / "bare"))


# Strict -------------------------------------------------------------------------------------------------------------


@pytest.mark.everywhere
def test_interpreter_is_begun_again_with_the_switches_it_has():
    look = "import json, sys; print(json.dumps([sys.flags.isolated, sys.flags.no_site, sys.flags.bytes_warning]))"
    load = "import sys; sys.path.insert(0, %r); import rock_ms; " % os.path.dirname(SCRIPT)
    said = output_of(sys.executable, *STRICT, "-c", load + "print(rock_ms.dump_json(rock_ms.interpreter()))")
    command = json.loads(said)
    assert json.loads(output_of(*command, "-c", look)) == [1, 1, 2]
    warn = "import warnings\ntry: warnings.warn('x')\nexcept UserWarning: print('raised')"
    assert output_of(*command, "-c", warn) == "raised\n"


@pytest.mark.everywhere
def test_isolated_interpreter_finds_the_service_beside_the_sdk():
    version = "rock-model-service %s\n" % rock_ms.__version__
    assert output_of(sys.executable, *STRICT, SDK_SCRIPT, "--version") == version


@pytest.mark.parametrize("words", [("--type", "assistant"), ("--type", "tool-manager", "--runtime", "process")])
def test_agent_servers_answer_without_a_warning(tmp_path, words):
    strict = (sys.executable, *STRICT, SDK_SCRIPT)
    place = ("--data-dir", str(tmp_path))
    words += ("--first-node-port", str(free_port())) if "tool-manager" in words else ()
    output_of(*strict, "start", *words, "--port=0", *place)
    try:
        state = rock_sdk.SERVERS[words[1]].state(str(tmp_path)).read()
        assert ask(state["port"], method="GET", path="/openapi.json").status == 200
        if "tool-manager" in words:
            name = {"tool_name": "RenewInstance"}
            assert ask(state["port"], name, path="/create_tool_service").status == 200
    finally:
        output_of(*strict, "stop", *place)
    said = (tmp_path / (words[1] + ".log")).read_text(encoding="utf-8")
    assert "started" in said
    assert "Warning" not in said
    assert "Traceback" not in said


def test_python_that_is_too_old_says_so():
    found = [path for path in (shutil.which("python3.6", path=place) for place in os.get_exec_path()) if path]
    found = [path for path in found if subprocess.call([path, "-c", ""], stderr=subprocess.DEVNULL) == 0]
    if not found:
        pytest.skip("there is no Python 3.6")
    for script in (SCRIPT, SDK_SCRIPT):
        assert "3.7 or newer" in run_cli("demo", check=1, python=found[0], script=script).err


# Bare ---------------------------------------------------------------------------------------------------------------


def test_demo_needs_no_proc_and_no_library_that_python_may_be_built_without(bare):
    done = run_cli("demo", check=0, env=bare)
    assert done.err == ""
    assert done.out.splitlines()[-1] == "SESSION_END"


def test_child_that_has_ended_is_told_without_proc(monkeypatch):
    def no_file(path, *_):
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(rock_ms, "open", no_file, raising=False)
    child = subprocess.Popen(["sh", "-c", "read line; exit 3"], stdin=subprocess.PIPE)
    assert rock_ms.process_identity(child.pid) == rock_ms.process_identity(os.getpid()) == ""
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert rock_ms.process_identity(child.pid) is None
    assert child.wait() == 3  # and was not reaped by the look
    assert rock_ms.process_identity(child.pid) is None


def test_https_without_ssl_says_what_is_missing(bare):
    code = """import sys, urllib.error
sys.path.insert(0, %r)
import rock_ms
try:
    rock_ms.direct_opener().open("https://127.0.0.1:1/")
except urllib.error.URLError as error:
    print(error.reason)"""
    done = run_cli(code % os.path.dirname(SCRIPT), check=0, script="-c", env=bare)
    assert done.out == "this Python has no ssl module, which https needs\n"


def test_https_with_ssl_is_urllibs_own():
    pytest.importorskip("ssl")
    with pytest.raises(urllib.error.URLError) as caught:
        rock_ms.direct_opener(urllib.request.ProxyHandler({})).open("https://127.0.0.1:%d/" % free_port())
    assert isinstance(caught.value.reason, ConnectionRefusedError)


def test_tool_manager_without_sqlite_says_what_is_missing(tmp_path, bare):
    place = ("--data-dir", tmp_path)
    words = ("start", "--type", "tool-manager", "--runtime", "process", "--port=0", *place)
    done = run_cli(*words, check=1, script=SDK_SCRIPT, env=bare)
    reason = "the registry of tools needs SQLite, which this Python was built without"
    assert done.err == "rock-agent-servers: the tool manager did not start: %s\n" % reason
    rock_sdk.ToolRegistry(str(tmp_path / rock_sdk.REGISTRY_NAME)).close()  # of a manager of another Python
    assert "no tool manager runs" in run_cli("stop", *place, check=0, script=SDK_SCRIPT, env=bare).out


def test_assistant_without_sqlite_starts_and_says_what_is_missing(tmp_path, bare):
    start = ("start", "--type", "assistant", "--port=0", "--data-dir", tmp_path)
    done = run_cli(*start, check=0, script=SDK_SCRIPT, env=bare)
    run_cli("stop", "--data-dir", tmp_path, check=0, script=SDK_SCRIPT, env=bare)
    reason = "knowledge needs SQLite, which this Python was built without"
    assert done.err == "rock-agent-servers: %s; all else works\n" % reason


def test_knowledge_without_sqlite_is_refused_and_all_else_is_answered(tmp_path, upstream, monkeypatch):
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    upstream.script(says("sunny"))
    with assisting(tmp_path, upstream) as assistant:
        assert assistant.response() == "sunny"
        for got in (assistant.upload(a_txt=b"text"), assistant.lite(use_knowledge=True)):
            assert got.status == 501
            assert got.json()["error"]["code"] == "no_text_search"
            assert "needs SQLite" in got.json()["message"]
        assert os.listdir(os.path.join(assistant.data_dir, "knowledge", "uploads")) == []
    assert any("all else works" in line for line in assistant.logged)


# Only ASCII ---------------------------------------------------------------------------------------------------------

ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_path_that_the_locale_does_not_know_is_said_and_logged_as_it_is(tmp_path):
    environ = clean_environ(**ASCII)
    data_dir = os.fsencode(str(tmp_path)) + "/数据 目录".encode("utf-8")
    place = os.fsdecode(data_dir)
    done = run_cli("start", "--host=127.0.0.1", "--port=0", "--data-dir", place, check=0, env=environ)
    run_cli("stop", "--data-dir", place, check=0, env=environ)
    assert "log %s/数据 目录/LLMService.log\n" % tmp_path in done.out
    with open(os.path.join(data_dir, b"model_service.log"), encoding="utf-8") as file:
        said = file.read()
    assert "数据 目录/LLMService.log\n" in said
    assert "Traceback" not in said


def test_text_that_no_encoding_knows_is_shown_escaped():
    assert rock_ms.as_utf8("数 \udce6\udc95\udcb0 \udcff") == "数 数 ".encode("utf-8") + b"\xff"
    assert rock_ms.as_utf8("\ud83d!") == b"\\ud83d!"


def test_complaint_about_such_a_path_to_a_closed_stream_changes_no_exit_code(tmp_path):
    words = ["anti-call-llm", "--index=1", "--response-file", "/没有", "--data-dir", str(tmp_path)]
    command = ["sh", "-c", 'exec "$0" "$@" 2>&-', sys.executable, SCRIPT, *words]
    assert subprocess.call(command, env=clean_environ(**ASCII), timeout=TIMEOUT) == 2
