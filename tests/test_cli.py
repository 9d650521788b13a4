"""The command line, as a user or a trainer drives it: real processes, real files."""

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig

import pytest

import rock_ms
from support import SCRIPT, TIMEOUT, Later, ask, chat, clean_environ, completion, run_cli, wait_until

pytestmark = pytest.mark.load
ANSWER = json.dumps(completion())


def start(cli, *words, **options):
    """Start on a free port; the state it wrote."""
    cli("start", "--host", "127.0.0.1", "--port", "0", *words, check=0, **options)
    return state(cli)


def state(cli):
    return rock_ms.ServiceState(cli.data_dir).read()


def logged(cli, name="LLMService.log"):
    with contextlib.suppress(FileNotFoundError), open(os.path.join(cli.data_dir, name), "rb") as file:
        return file.read()
    return b""


@contextlib.contextmanager
def agent_process():
    process = subprocess.Popen(["sleep", "600"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


# The loop -----------------------------------------------------------------------------------------------------------


@pytest.mark.everywhere
def test_demo_shows_the_loop_where_there_is_only_the_file(tmp_path):
    script = shutil.copy(SCRIPT, str(tmp_path))
    # Settings of the surroundings must not reach into the demo.
    elsewhere = str(tmp_path / "elsewhere" / "log")
    environ = clean_environ(LOG_FILE=elsewhere, SERVICE_PORT="1", http_proxy="http://127.0.0.1:9")
    done = run_cli("demo", check=0, script=script, cwd=str(tmp_path), env=environ)
    lines = done.out.splitlines()
    assert lines[-1] == "SESSION_END"
    assert done.err == ""
    assert sum(line.startswith("$ ") for line in lines) == 5
    assert sum(line.startswith("traj ") for line in lines) == 2
    assert [name for name in os.listdir(str(tmp_path)) if name != "__pycache__"] == ["rock_ms.py"]


@pytest.mark.everywhere
def test_scenario_of_rocks_own_integration_test(cli):
    port = start(cli)["port"]
    request = {**chat("Hello! How are you?"), "temperature": 0.7, "stream": False}
    request["messages"].insert(0, {"role": "system", "content": "You are a helpful assistant."})
    answer = json.dumps({"content": "mock content", "usage": {"total_tokens": 1}}, ensure_ascii=False)
    with agent_process() as agent:
        cli("watch-agent", "--pid", agent.pid, check=0)

        def act():
            replies = [ask(port, request) for _ in range(3)]
            agent.kill()
            agent.wait()
            return replies

        acting = Later(act)
        for words in (["--index=0"], ["--index=1", "--response", answer], ["--index=2", "--response", answer]):
            assert "You are a helpful assistant." in cli("anti-call-llm", *words, check=0).out
        assert "You are a helpful assistant." in cli("anti-call-llm", "--index=2", "--response", answer, check=0).out
        assert cli("anti-call-llm", "--index=3", "--response", answer, check=0).out == "SESSION_END\n"
        assert all(b"mock content" in reply.body for reply in acting.result())


def test_answer_of_half_a_megabyte_goes_by_file_which_is_removed(cli, tmp_path):
    port = start(cli)["port"]
    content = "x y\n" * 125000
    path = tmp_path / "answer.json"
    path.write_text(json.dumps(completion(content), indent=1))
    call = Later(lambda: ask(port, chat()))
    cli("anti-call-llm", "--index", "0", check=0)
    words = ["anti-call-llm", "--index", "1", "--response-file", path, "--timeout", "0.2"]
    assert cli(*words, check=75).out == ""
    assert call.result().json()["choices"][0]["message"]["content"] == content
    assert not path.exists()
    assert "request 2 has not come" in cli(*words, check=75).err, "the repeated call finds its answer in the log"


def test_answer_comes_on_standard_input(cli):
    port = start(cli)["port"]
    call = Later(lambda: ask(port, chat()))
    cli("anti-call-llm", "--index", "0", check=0)
    cli("anti-call-llm", "--index=1", "--response-file", "-", "--timeout", "0", check=75, input=ANSWER.encode())
    assert call.result().status == 200


def test_request_can_be_waited_for_without_answering_the_last_one(cli):
    port = start(cli)["port"]
    calls = [Later(lambda name=name: ask(port, chat(name))) for name in ("a", "b")]
    first = cli("anti-call-llm", "--index", "0", check=0).out
    second = cli("anti-call-llm", "--index", "1", check=0).out
    assert {json.loads(line)["messages"][0]["content"] for line in (first, second)} == {"a", "b"}
    cli("anti-call-llm", "--index=2", "--response", ANSWER, "--timeout=0", check=75)
    cli("anti-call-llm", "--index=1", "--response", ANSWER, "--timeout=0", check=0)
    assert [call.result().status for call in calls] == [200, 200]


# Crashes ------------------------------------------------------------------------------------------------------------


def kill_service(cli):
    pid = state(cli)["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: rock_ms.process_identity(pid) is None)


def ask_until_answered(cli, body):
    """As an agent does: repeat the same request until it is answered."""

    def once():
        with contextlib.suppress(Exception):
            return ask(state(cli)["port"], body)

    return wait_until(once, "an answer")


@pytest.mark.parametrize("is_answered", [False, True])
def test_service_killed_in_mid_turn_and_resumed_neither_loses_nor_doubles_a_turn(cli, is_answered):
    start(cli)
    agent = Later(lambda: ask_until_answered(cli, chat("one")))
    assert "one" in cli("anti-call-llm", "--index", "0", check=0).out
    if is_answered:  # the service is stopped, so that the answer is in the log and cannot be delivered
        os.kill(state(cli)["pid"], signal.SIGSTOP)
        cli("anti-call-llm", "--index=1", "--response", ANSWER, "--timeout=0", check=75)
    kill_service(cli)
    cli("start", "--resume", "--host=127.0.0.1", "--port=%d" % state(cli)["port"], check=0)
    assert "one" in cli("anti-call-llm", "--index", "0", check=0).out
    trainer = Later(lambda: cli("anti-call-llm", "--index=1", "--response", ANSWER, check=0).out)
    assert agent.result().json() == completion()
    second = Later(lambda: ask(state(cli)["port"], chat("two")))
    assert "two" in trainer.result()
    cli("anti-call-llm", "--index=2", "--response", ANSWER, "--timeout=0", check=75)
    assert second.result().status == 200
    assert logged(cli).count(b"LLM_REQUEST_START") == 2
    assert logged(cli).count(b"LLM_RESPONSE_START") == 2
    statuses = [json.loads(line)["status"] for line in logged(cli, "LLMTraj.jsonl").splitlines()]
    assert statuses == [200, 200]


def test_session_begins_where_its_first_call_will_stand_behind_what_a_kill_left(cli):
    os.makedirs(cli.data_dir, exist_ok=True)
    with open(os.path.join(cli.data_dir, "LLMTraj.jsonl"), "w") as file:
        file.write('{"error":null}\n{"request":"half-writ')
    began = start(cli, env=clean_environ(ROCK_MODEL_SERVICE_TRAJ_APPEND_MODE="true"))
    assert began["traj_start"] == len('{"error":null}\n') == len(logged(cli, "LLMTraj.jsonl"))


def test_watched_agent_is_watched_again_after_a_kill_and_after_a_stop(cli):
    start(cli)
    with agent_process() as agent:
        cli("watch-agent", "--pid", agent.pid, check=0)
        kill_service(cli)
        start(cli, "--resume")
        cli("stop", check=0)
        start(cli, "--resume")
        assert b"SESSION_END" not in logged(cli)
        agent.kill()
        agent.wait()
        assert cli("anti-call-llm", "--index=0", "--timeout=60", check=0).out == "SESSION_END\n"


def test_resumed_service_listens_where_it_did_and_does_not_forget_its_key(cli):
    environ = clean_environ(ROCK_MODEL_SERVICE_API_KEY="k")
    before = start(cli, env=environ)
    cli("stop", check=0)
    assert "API key" in cli("start", "--resume", check=2).err
    cli("start", "--resume", check=0, env=environ)
    assert (state(cli)["host"], state(cli)["port"]) == (before["host"], before["port"])
    assert ask(before["port"], chat()).status == 401


def test_trainer_is_told_what_became_of_its_answer(cli):
    port = start(cli)["port"]
    call = Later(lambda: ask(port, chat()))
    cli("anti-call-llm", "--index=0", check=0)
    done = cli("anti-call-llm", "--index=1", "--response", ANSWER, "--timeout=0", check=75)
    assert done.err == "rock-ms: request 1 is answered; request 2 has not come within 0 s; repeat the call to wait on\n"
    assert call.result().status == 200
    call = Later(lambda: ask(port, chat("two")))
    cli("anti-call-llm", "--index=1", check=0)
    with open(os.path.join(cli.data_dir, "LLMService.log"), "ab") as file:
        file.write(b"SESSION_END\n")
    done = cli("anti-call-llm", "--index=2", "--response", ANSWER, check=0)
    assert done.err == "rock-ms: request 2 is not answered: the session has ended\n"
    assert call.result().status == 410
    cli("stop", check=0)
    done = cli("anti-call-llm", "--index=0", check=0)
    assert done.err == "rock-ms: no model service runs in the data directory %s\n" % cli.data_dir


def test_response_file_that_was_not_needed_is_kept_and_the_end_is_heard_again(cli, tmp_path):
    port = start(cli)["port"]
    call = Later(lambda: ask(port, chat()))
    cli("anti-call-llm", "--index=0", check=0)
    with open(os.path.join(cli.data_dir, "LLMService.log"), "ab") as file:
        file.write(b"SESSION_END\n")
    path = tmp_path / "answer.json"
    path.write_text(ANSWER)
    for _ in range(2):
        assert cli("anti-call-llm", "--index=1", "--response-file", path, check=0).out == "SESSION_END\n"
    assert call.result().status == 410


def test_trainer_killed_while_it_waits_comes_back_with_its_last_index(cli):
    port = start(cli)["port"]
    words = [sys.executable, SCRIPT, "anti-call-llm", "--index=0", "--data-dir", cli.data_dir]
    trainer = subprocess.Popen(words, stdout=subprocess.PIPE, env=clean_environ())
    trainer.kill()
    assert trainer.communicate()[0] == b""
    call = Later(lambda: ask(port, chat("later")))
    assert "later" in cli("anti-call-llm", "--index=0", check=0).out
    cli("anti-call-llm", "--index=1", "--response", ANSWER, "--timeout=0", check=75)
    assert call.result().status == 200


# Start and stop -----------------------------------------------------------------------------------------------------


def test_start_answers_when_it_returns_and_stop_ends_it(cli):
    running = start(cli)
    assert ask(running["port"], method="GET", path="/health").status == 200
    assert "stopped" in cli("stop", check=0).out
    assert rock_ms.process_identity(running["pid"]) is None
    with pytest.raises(OSError):
        ask(running["port"], method="GET", path="/health")
    assert "no model service runs" in cli("stop", check=0).out
    assert sorted(os.listdir(cli.data_dir)) == [
        "LLMService.json",
        "LLMService.lock",
        "LLMService.log",
        "model_service.log",
    ]


def test_service_holds_more_connections_than_the_soft_limit_of_open_files(cli):
    limits = (32, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    port = start(cli, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limits))["port"]
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT))
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_second_start_says_so_and_changes_nothing(cli):
    running = start(cli)
    done = cli("start", "--port", "0", check=1)
    assert "already runs (pid %d" % running["pid"] in done.err
    assert "already runs" in cli("start", "--port", "0", "--foreground", check=1).err
    assert state(cli) == running
    assert ask(running["port"], method="GET", path="/health").status == 200


def test_racing_starts_give_one_service(cli):
    starts = [Later(lambda: cli("start", "--host=127.0.0.1", "--port=0")) for _ in range(4)]
    codes = sorted(start.result().returncode for start in starts)
    assert codes == [0, 1, 1, 1]
    assert ask(state(cli)["port"], method="GET", path="/health").status == 200


def test_start_on_a_taken_port_says_why_and_leaves_nothing(cli):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        done = cli("start", "--host", "127.0.0.1", "--port", taken.getsockname()[1], check=1)
    assert "cannot listen on 127.0.0.1" in done.err
    assert "Traceback" not in done.err
    assert "pid" not in state(cli)


def test_stop_does_not_signal_a_process_that_is_not_the_service(cli):
    start(cli)
    with agent_process() as bystander:
        path = os.path.join(cli.data_dir, rock_ms.STATE_NAME + ".json")
        original = state(cli)
        with open(path, "w") as file:
            json.dump({**original, "pid": bystander.pid}, file)
        assert "not a process of this machine" in cli("stop", check=1).err
        assert bystander.poll() is None
        with open(path, "w") as file:
            json.dump(original, file)


def test_state_of_a_killed_service_is_no_hindrance(cli):
    start(cli)
    kill_service(cli)
    assert state(cli)
    running = start(cli)
    assert ask(running["port"], method="GET", path="/health").status == 200


def test_service_that_has_just_been_killed_does_not_count_as_running(tmp_path, monkeypatch):
    """The lock of one with threads is free a moment after its process is gone."""
    state = rock_ms.ServiceState(str(tmp_path))
    state.write({"pid": 4242, "identity": "dead"})
    for is_dead, stays in ((True, False), (False, True)):
        dying = rock_ms.ServiceState(str(tmp_path))
        dying.acquire()

        def look(pid, identity):
            assert (pid, identity) == (4242, "dead")
            if is_dead:  # noqa: B023
                dying.release()  # noqa: B023
            return not is_dead  # noqa: B023

        monkeypatch.setattr(rock_ms, "is_same_process", look)
        assert state.stays_running() is stays
        dying.release()


@pytest.mark.everywhere
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_foreground_service_ends_cleanly_by_a_signal(cli, number):
    words = [
        sys.executable,
        SCRIPT,
        "start",
        "--foreground",
        "--host=127.0.0.1",
        "--port=0",
        "--data-dir",
        cli.data_dir,
    ]
    process = subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=clean_environ(),
        # What ignores a signal (as nohup does, or a shell in the background) passes that on, and is obeyed.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    wait_until(lambda: "port" in state(cli))
    call = Later(lambda: ask(state(cli)["port"], chat()))
    wait_until(lambda: b"LLM_REQUEST_START" in logged(cli))
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT)
    assert call.result().status == 503
    assert (process.returncode, out) == (0, b"")
    assert b"POST /v1/chat/completions 503" in err
    assert b"Traceback" not in err
    assert "pid" not in state(cli)


def test_key_of_the_service_reaches_no_file_and_no_process_list(cli):
    running = start(cli, "--api-key", "sk-very-secret")
    port = running["port"]
    assert ask(port, chat()).status == 401
    with agent_process() as agent:
        assert "ROCK_MODEL_SERVICE_API_KEY" in cli("watch-agent", "--pid", agent.pid, check=1).err
        environ = clean_environ(ROCK_MODEL_SERVICE_API_KEY="sk-very-secret")
        cli("watch-agent", "--pid", agent.pid, check=0, env=environ)
    with open("/proc/%d/cmdline" % running["pid"], "rb") as file:
        assert b"sk-very-secret" not in file.read()
    for name in os.listdir(cli.data_dir):
        assert b"sk-very-secret" not in logged(cli, name)


def test_settings_come_from_flag_then_environment_then_file(cli, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("host: 127.0.0.1\nport: 1\nlogging_file_name: file.log\n")
    environ = clean_environ(SERVICE_PORT="2", ROCK_LOGGING_FILE_NAME="env.log")
    cli("start", "--config-file", config, "--port", "0", check=0, env=environ)
    assert state(cli)["host"] == "127.0.0.1"
    assert "env.log" in os.listdir(cli.data_dir)


def test_log_file_elsewhere_is_found_by_the_other_commands(cli, tmp_path):
    path = tmp_path / "elsewhere" / "talk.log"
    running = start(cli, env=clean_environ(LOG_FILE=str(path)))
    call = Later(lambda: ask(running["port"], chat()))
    cli("anti-call-llm", "--index=0", check=0)
    cli("anti-call-llm", "--index=1", "--response", ANSWER, "--timeout=0", check=75)
    assert call.result().status == 200
    assert path.exists()


def test_request_leaves_one_line_in_the_services_log(cli):
    port = start(cli)["port"]
    ask(port, method="GET", path="/nowhere?key=secret")
    cli("stop", check=0)
    lines = [line for line in logged(cli, "model_service.log").decode().splitlines() if "/nowhere" in line]
    assert len(lines) == 1
    assert "GET /nowhere 404" in lines[0]
    assert "secret" not in lines[0]


# Bad use ------------------------------------------------------------------------------------------------------------

BAD_USE = [
    (["anti-call-llm", "--index", "-1"], 2, "--index counts from 0"),
    (["anti-call-llm", "--index", "x"], 2, "invalid int"),
    (["anti-call-llm"], 2, "--index"),
    (["anti-call-llm", "--index=0", "--response", "{}"], 2, "takes no response"),
    (["anti-call-llm", "--index=1", "--response", "{", "--response-file", "x"], 2, "not allowed with"),
    (["anti-call-llm", "--index=1", "--response", "{"], 2, "--response is not JSON"),
    (["anti-call-llm", "--index=1", "--response", '{"a":NaN}'], 2, "NaN is not a JSON value"),
    (["anti-call-llm", "--index=1", "--response", "[]"], 2, "must be a JSON object, got an array"),
    (["anti-call-llm", "--index=1", "--response", "{}"], 2, "no request 1"),
    (["anti-call-llm", "--index=1", "--response-file", "/nonexistent"], 2, "/nonexistent does not exist"),
    (["anti-call-llm", "--index=1", "--response-file", "/"], 2, "cannot read the response file /"),
    (["anti-call-llm", "--index=0", "--timeout=-1"], 2, "number of seconds"),
    (["anti-call-llm", "--index=0", "--timeout=0"], 75, "repeat the call"),
    (["start", "--type", "remote"], 2, "--type: must be local, proxy or tool-node, got 'remote'"),
    (["start", "--replay-file", "r.jsonl"], 2, "--replay-file is for --type proxy"),
    (["start", "--proxy-base-url", "http://h/v1"], 2, "--proxy-base-url is for --type proxy"),
    (["start", "--type", "proxy", "--recording-file", "a", "--replay-file", "b"], 2, "exclude each other"),
    (["start", "--type", "proxy", "--replay-file", "/no/such"], 1, "cannot read the replay file /no/such"),
    (["start", "--type", "proxy", "--proxy-base-url", "http://user:sesame@h/v1"], 2, "must not hold a key"),
    (["start", "--type", "proxy", "--replay-match", "request"], 2, "--replay-match needs a --replay-file"),
    (["start", "--recording-file", "/"], 2, "/ is a directory, and should be a file"),
    (["start", "--type", "proxy", "--request-overrides", '{"stream": true}'], 2, "other than stream"),
    (["traj", "/no/such"], 1, "cannot read /no/such"),
    (["traj"], 2, "FILE"),
    (["start", "--port", "x"], 2, "--port: must be a whole number"),
    (["start", "--port", "70000"], 2, "--port: must be a whole number"),
    (["start", "--request-timeout", "0"], 2, "--request-timeout: must be a number of seconds"),
    (["start", "--config-file", "/nonexistent"], 2, "/nonexistent"),
    (["start", "--prot=1"], 2, "rock_ms.py start: error: unrecognized arguments: --prot=1; did you mean --port?\n"),
    (["start", "--upstream-api-key", "k"], 2, "unrecognized arguments: --upstream-api-key k\n"),
    (["watch-agent", "--pid", "x"], 2, "invalid process number"),
    (["watch-agent", "--pid", "-1"], 2, "invalid process number"),
    (["watch-agent", "--pid", "1"], 1, "no model service runs in the data directory"),
    (["watch-agent", "--pid", "1", "--port", "1"], 1, "no model service answers on 127.0.0.1:1: Connection refused\n"),
    (["watch-agent", "--pid", "1", "--api-key", "a\nb"], 2, "--api-key: must be printable ASCII"),
    (["start", "--data-dir", ""], 2, "--data-dir is empty"),
    (["demo", "--x"], 2, "--x"),
    (["nonsense"], 2, "invalid choice"),
    ([], 2, "Try 'rock_ms.py demo' first."),
]


@pytest.mark.parametrize("words, code, message", BAD_USE, ids=[" ".join(words) for words, _, _ in BAD_USE])
def test_bad_use_is_one_clear_line_on_standard_error(tmp_path, words, code, message):
    done = run_cli(*words, check=code, env=clean_environ(ROCK_MODEL_SERVICE_DATA_DIR=str(tmp_path / "d")))
    assert message in done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    if "usage:" not in done.err:
        assert len([line for line in done.err.splitlines() if "no model service runs" not in line]) <= 1


def test_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    done = run_cli("start", "--data-dir", str(tmp_path / "file" / "x"), check=1)
    assert "cannot make %s" % (tmp_path / "file" / "x") in done.err
    assert done.err.endswith("; give each command another --data-dir, or set ROCK_MODEL_SERVICE_DATA_DIR\n")
    assert len(done.err.splitlines()) == 1
    recording = str(tmp_path / "file" / "r.jsonl")
    done = run_cli("start", "--data-dir", str(tmp_path), "--recording-file", recording, check=1)
    assert done.err == "rock-ms: cannot make %s: File exists\n" % (tmp_path / "file")


def test_another_answer_to_the_same_request_is_refused(cli):
    port = start(cli)["port"]
    call = Later(lambda: ask(port, chat()))
    cli("anti-call-llm", "--index=0", check=0)
    cli("anti-call-llm", "--index=1", "--response", ANSWER, "--timeout=0", check=75)
    done = cli("anti-call-llm", "--index=1", "--response", '{"choices":[]}', "--timeout=0", check=1)
    assert "already has another answer" in done.err
    assert call.result().json() == completion()


@pytest.mark.everywhere
def test_text_of_any_kind_passes_a_locale_that_knows_only_ascii(cli):
    environ = clean_environ(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    port = start(cli, env=environ)["port"]
    call = Later(lambda: ask(port, json.dumps(chat("héllo 😀"), ensure_ascii=False).encode()))
    assert "héllo 😀" in cli("anti-call-llm", "--index=0", check=0, env=environ).out
    answer = json.dumps(completion("日本 😀"), ensure_ascii=False)
    cli("anti-call-llm", "--index=1", "--response", answer, "--timeout=0", check=75, env=environ)
    assert call.result().json()["choices"][0]["message"]["content"] == "日本 😀"


def test_reader_of_our_output_that_has_gone_is_no_traceback(cli):
    port = start(cli)["port"]
    call = Later(lambda: ask(port, chat()))
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, SCRIPT, "anti-call-llm", "--index=0", "--data-dir", cli.data_dir]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, env=clean_environ(), timeout=TIMEOUT)
    os.close(writing)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    cli("anti-call-llm", "--index=1", "--response", ANSWER, "--timeout=0", check=75)
    assert call.result().status == 200


@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_change_no_exit_code(cli, closing):
    shell = 'exec "$0" "$@" ' + closing
    start_words = ["start", "--host=127.0.0.1", "--port=0", "--data-dir", cli.data_dir]
    for words, code in ((start_words, 0), (["anti-call-llm", "--index=0", "--timeout=0", *start_words[-2:]], 75)):
        command = ["sh", "-c", shell, sys.executable, SCRIPT, *words]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environ(), timeout=TIMEOUT
        )
        assert (done.returncode, b"Traceback" in done.stderr) == (code, False), done.stderr
    assert ask(state(cli)["port"], method="GET", path="/health").status == 200


def test_output_that_cannot_be_written_is_an_error_without_a_traceback(cli):
    start(cli)
    with agent_process() as agent, open("/dev/full", "wb") as full:
        words = [sys.executable, SCRIPT, "watch-agent", "--pid", str(agent.pid), "--data-dir", cli.data_dir]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, env=clean_environ(), timeout=TIMEOUT)
    assert done.returncode == 1
    assert done.stderr == b"rock-ms: [Errno 28] No space left on device\n"


# A terminal ---------------------------------------------------------------------------------------------------------


class Terminal:
    """One command, with a terminal as those of its standard streams that are named."""

    def __init__(self, words, streams, environ):
        self._screen, follower = os.openpty()
        files = dict.fromkeys(streams, follower)
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, *words],
            **{"stdout": subprocess.PIPE, **files},
            env=environ,
            start_new_session=True,
        )
        os.close(follower)
        self.shown = b""

    def read(self, expected=None):
        """Read until that has been shown, or all."""
        with contextlib.suppress(OSError):  # as Linux says that nobody writes any more
            while expected is None or expected not in self.shown:
                assert select.select([self._screen], [], [], TIMEOUT)[0], self.shown
                piece = os.read(self._screen, 4096)
                if not piece:
                    break
                self.shown += piece
        assert expected is None or expected in self.shown, self.shown
        return self.shown

    def type(self, text):
        os.write(self._screen, text)

    def end(self):
        """What it printed elsewhere; asserts that it succeeded."""
        out = self.process.communicate(timeout=TIMEOUT)[0]
        assert self.process.returncode == 0, self.shown
        return out

    def close(self):
        self.process.kill()
        self.process.communicate()
        os.close(self._screen)


@contextlib.contextmanager
def on_terminal(*words, streams=("stderr",), **environ):
    terminal = Terminal(words, streams, clean_environ(**{"TERM": "vt100", **environ}))
    try:
        yield terminal
    finally:
        terminal.close()


def test_wait_for_a_request_is_told_on_a_terminal_and_wiped(cli):
    port = start(cli)["port"]
    with on_terminal("anti-call-llm", "--index=0", "--data-dir", cli.data_dir) as terminal:
        terminal.read(b"waiting for request 1; Ctrl-C ends only this wait, 1 s\r")
        call = Later(lambda: ask(port, chat()))
        assert json.loads(terminal.end().decode()) == chat()
        shown = terminal.read()
    *lines, blank, end = shown.split(b"\r")
    assert lines[0] == b"waiting for request 1; Ctrl-C ends only this wait, 1 s"
    assert (blank, end) == (b" " * len(lines[-1]), b"")
    cli("anti-call-llm", "--index=1", "--response", ANSWER, "--timeout=0", check=75)
    assert call.result().status == 200


def test_terminal_of_a_program_is_told_nothing(cli):
    """As the session of a sandbox, in whose output the request is looked for."""
    start(cli)
    with on_terminal(
        "anti-call-llm", "--index=0", "--timeout=1.2", "--data-dir", cli.data_dir, TERM="dumb"
    ) as terminal:
        assert terminal.read() == b"rock-ms: request 1 has not come within 1.2 s; repeat the call to wait on\r\n"


def test_wait_in_the_background_of_a_terminal_is_told_nothing(cli):
    """Where the terminal is one that stops whoever writes to it from there (`stty tostop`), it would not go on."""
    start(cli)
    screen, follower = os.openpty()
    command = [sys.executable, SCRIPT, "anti-call-llm", "--index=0", "--timeout=1.2", "--data-dir", cli.data_dir]
    shell = "import os, subprocess; os.close(os.open(os.ttyname(2), os.O_RDWR)); "  # which makes it the shell's own
    shell += "print(subprocess.Popen(%r, preexec_fn=os.setpgrp).wait())" % command
    with open(screen, "rb", 0) as shown, open(follower, "wb", 0) as terminal:
        process = subprocess.run(
            [sys.executable, "-c", shell],
            stdout=subprocess.PIPE,
            stderr=terminal,
            start_new_session=True,
            env=clean_environ(TERM="vt100"),
            timeout=TIMEOUT,
        )
        assert process.stdout == b"75\n"
        said = shown.read(4096)
    assert said == b"rock-ms: request 1 has not come within 1.2 s; repeat the call to wait on\r\n"


def test_wait_for_start_and_stop_is_told_on_a_terminal(cli, tmp_path):
    tool = tmp_path / "slow.py"
    code = "import os, time\nwhile not os.path.exists(%r):\n    time.sleep(0.01)\ndef slow(): pass\n"
    tool.write_text(code % str(tmp_path / "go"))
    words = ["--type=tool-node", "--tool=slow", "--tool-file", str(tool), "--host=127.0.0.1", "--port=0"]
    with on_terminal("start", *words, "--data-dir", cli.data_dir) as terminal:
        terminal.read(b"waiting for the tool node to start, 1 s\r")
        (tmp_path / "go").write_text("")
        assert terminal.end().startswith(b"tool node started")
    os.kill(state(cli)["pid"], signal.SIGSTOP)
    with on_terminal("stop", "--data-dir", cli.data_dir) as terminal:
        terminal.read(b"waiting for the tool node to stop, 1 s\r")
        os.kill(state(cli)["pid"], signal.SIGCONT)
        assert terminal.end().startswith(b"tool node stopped")


def test_who_is_to_type_is_told_how_to_end_it(cli):
    port = start(cli)["port"]
    call = Later(lambda: ask(port, chat()))
    cli("anti-call-llm", "--index=0", check=0)
    words = ["anti-call-llm", "--index=1", "--response-file=-", "--timeout=0", "--data-dir", cli.data_dir]
    with on_terminal(*words, streams=("stdin", "stderr")) as terminal:
        terminal.read(b"Ctrl-D")
        terminal.type(ANSWER.encode() + b"\n\x04")
        assert b"request 1 is answered" in terminal.read()
    assert call.result().json() == completion()


def test_start_warns_where_anyone_may_ask(cli):
    said = "it listens on 0.0.0.0 without a key: anyone on the network may use it; --host 127.0.0.1 is for this machine"
    assert said in cli("start", "--port=0", check=0).err
    cli("stop", check=0)
    assert cli("start", "--port=0", "--api-key=k", check=0).err == ""


# Names and help -----------------------------------------------------------------------------------------------------


@pytest.mark.everywhere
def test_version_and_help_speak_of_every_command():
    assert run_cli("--version", check=0).out == "rock-model-service %s\n" % rock_ms.__version__
    out = run_cli("--help", check=0).out
    for command in ("start", "stop", "watch-agent", "anti-call-llm", "demo"):
        assert command in out
        shown = run_cli(command, "--help", check=0).out
        assert "usage:" in shown
        assert command in ("stop", "demo") or shown.index("examples:") < shown.index("  --data-dir")


@pytest.mark.everywhere
@pytest.mark.parametrize("columns, shortest, longest", [("60", 40, 58), ("200", 100, 198), ("wide", 60, 78)])
def test_help_is_as_wide_as_the_terminal(columns, shortest, longest):
    options = run_cli("start", "--help", check=0, env=clean_environ(COLUMNS=columns)).out.split("optional arguments:")
    options = options[-1].split("options:")[-1].split("examples:")[0]
    assert shortest < max(map(len, options.splitlines())) <= longest


# What takes long to import, and no turn needs.
NEEDLESS = (
    "email",
    "http",
    "logging",
    "random",
    "select",
    "selectors",
    "shutil",
    "socket",
    "subprocess",
    "urllib.parse",
)


@pytest.mark.everywhere
def test_turn_imports_nothing_that_it_does_not_need(tmp_path):
    code = "import sys, argparse; sys.path.insert(0, %r); its_own = set(sys.modules); import rock_ms; rock_ms.main(); "
    code += "print(*set(sys.modules) - its_own)"  # Python 3.8's argparse imports shutil
    log = rock_ms.MarkerLog(str(tmp_path / rock_ms.LOG_FILE_NAME))
    log.append("request", json.dumps(chat()), 1)
    log.append("request", json.dumps(chat()), 2)
    command = [sys.executable, "-I", "-S", "-c", code % os.path.dirname(SCRIPT), "anti-call-llm", "--index", "1"]
    command += ["--response", ANSWER, "--data-dir", str(tmp_path)]
    request, modules = subprocess.check_output(command, env=clean_environ(), timeout=TIMEOUT).decode().splitlines()
    assert json.loads(request) == chat()
    assert [name for name in NEEDLESS if name in modules.split()] == []


@pytest.mark.everywhere
def test_rocks_own_spelling_is_understood(tmp_path):
    assert "usage:" in run_cli("model-service", "start", "--help", check=0).out
    assert "no model service" in run_cli("model-service", "stop", "--data-dir", tmp_path, check=0).out


@pytest.mark.everywhere
@pytest.mark.parametrize(
    "name, words", [("rock", ["model-service"]), ("rock-ms", ["model-service"]), ("rock-agent-servers", [])]
)
def test_installed_command_is_the_same_program(name, words):
    command = os.path.join(sysconfig.get_path("scripts"), name)
    if not os.path.exists(command):
        pytest.skip("the distribution is not installed here; tox installs it")
    done = subprocess.run([command, *words, "--version"], stdout=subprocess.PIPE, timeout=TIMEOUT)
    assert done.stdout.decode() == "rock-model-service %s\n" % rock_ms.__version__


@pytest.mark.everywhere
def test_file_imports_nothing_but_the_standard_library(tmp_path):
    script = shutil.copy(SCRIPT, str(tmp_path))
    command = [sys.executable, "-I", "-S", "-W", "error", "-bb", script, "demo"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environ(), timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, b"")


# A container --------------------------------------------------------------------------------------------------------


@pytest.mark.docker
def test_demo_runs_in_an_image_that_has_only_python_as_an_ordinary_user():
    image = os.environ.get("ROCK_TEST_IMAGE", "bare-python")
    if subprocess.call(["docker", "image", "inspect", image], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        pytest.skip("no container engine answers, or it has no image %s" % image)
    create = ["docker", "create", "--network=none", image, "sleep", "600"]
    container = subprocess.check_output(create).decode().strip()
    try:
        subprocess.check_call(["docker", "cp", SCRIPT, container + ":/rock_ms.py"])
        subprocess.check_call(["docker", "start", container], stdout=subprocess.DEVNULL)
        # An image made from a directory of root's own keeps others out of "/".
        subprocess.check_call(["docker", "exec", container, "chmod", "755", "/"])
        command = ["docker", "exec", "--user=1234:1234", container, "python3", "/rock_ms.py", "demo"]
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=120)
        assert done.returncode == 0
        assert done.stdout.decode().splitlines()[-1] == "SESSION_END"
    finally:
        subprocess.check_call(["docker", "rm", "-f", container], stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(("error", "code"), [(rock_ms.UsageError("no"), 2), (BrokenPipeError("no"), 1)])
def test_errors_of_another_program_begin_with_its_name(capsys, error, code):
    def fail(_):
        raise error

    parser = rock_ms.argparse.ArgumentParser()
    parser.set_defaults(function=fail)
    kept = os.dup(1)
    try:
        assert rock_ms.run_command(parser, [], "another") == code
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    rock_ms.complain("as well", "another")
    assert capsys.readouterr().err == "another: no\nanother: as well\n"
