"""The proxy as a process: what `start` says of it, and what `--resume` goes on with."""

import json
import os
import signal
import subprocess
import sys

import pytest

from support import SCRIPT, TIMEOUT, ask, chat, clean_environ, wait_until
from upstream import answer

pytestmark = pytest.mark.load


def state(cli):
    with open(os.path.join(cli.data_dir, "LLMService.json")) as file:
        return json.load(file)


def start(cli, *words, **options):
    return cli("start", "--type", "proxy", "--host", "127.0.0.1", "--port", "0", *words, **options)


@pytest.mark.everywhere
def test_start_says_where_calls_go_and_where_they_are_recorded(cli, tmp_path, upstream):
    recording = str(tmp_path / "run.jsonl")
    started = start(cli, "--proxy-base-url", upstream.url, "--recording-file", recording, check=0)
    assert started.out.endswith("/v1, to %s, recording %s\n" % (upstream.url, recording))
    assert ask(state(cli)["port"], chat()).status == 200
    cli("stop", check=0)
    replaying = start(cli, "--replay-file", recording, check=0)
    assert replaying.out.endswith("/v1, replaying 1 calls of %s\n" % recording)


def test_start_of_the_module_by_its_name(cli, tmp_path):
    (tmp_path / "rock_ms.py").write_bytes(open(SCRIPT, "rb").read())
    words = ["-m", "rock_ms", "start", "--host", "127.0.0.1", "--port", "0", "--data-dir", cli.data_dir]
    subprocess.run([sys.executable] + words, cwd=str(tmp_path), env=clean_environ(), check=True, timeout=TIMEOUT)
    assert ask(state(cli)["port"], method="GET", path="/health").json() == {"status": "healthy"}


def test_resumed_proxy_goes_on_as_the_killed_one_did(cli, tmp_path, upstream):
    recording = str(tmp_path / "run.jsonl")
    overrides = json.dumps({"seed": 7})
    words = ["--proxy-base-url", upstream.url, "--recording-file", recording, "--request-overrides", overrides]
    start(cli, *words, "--max-attempts", "2", check=0)
    before = state(cli)
    assert ask(before["port"], chat("1")).status == 200
    os.kill(before["pid"], signal.SIGKILL)
    wait_until(lambda: not os.path.exists("/proc/%d" % before["pid"]), "the end of the service")
    cli("start", "--resume", check=0)
    assert state(cli)["port"] == before["port"]
    assert ask(before["port"], chat("2")).status == 200
    upstream.script(*[answer({"error": {"message": "no"}}, 500, {"Retry-After": "0"})] * 2)
    assert ask(before["port"], chat("3")).status == 500
    with open(recording) as file:
        calls = [json.loads(line) for line in file]
    assert [call["request"] for call in calls] == [chat(prompt, seed=7) for prompt in "123"]
    assert [call["attempts"] for call in calls] == [1, 1, 2]


@pytest.mark.parametrize("kind", ["local", "proxy"])
def test_resumed_service_goes_on_with_its_recording_wherever_it_is_resumed(cli, tmp_path, kind):
    words = ["start", "--type", kind, "--host", "127.0.0.1", "--port", "0", "--recording-file", "run.jsonl"]
    cli(*words, check=0, cwd=str(tmp_path))
    cli("stop", check=0)
    cli("start", "--resume", check=0)
    assert state(cli)["settings"]["recording_file"] == str(tmp_path / "run.jsonl")


def test_resumed_proxy_asks_for_the_keys_it_had(cli, upstream):
    key = clean_environ(ROCK_MODEL_SERVICE_UPSTREAM_API_KEY="sk-of-the-upstream")
    start(cli, "--proxy-base-url", upstream.url, env=key, check=0)
    cli("stop", check=0)
    assert "ROCK_MODEL_SERVICE_UPSTREAM_API_KEY" in cli("start", "--resume", check=2).err
    cli("start", "--resume", env=key, check=0)
    assert ask(state(cli)["port"], chat()).status == 200
    assert dict(upstream.seen()[0]["headers"])["authorization"] == "Bearer sk-of-the-upstream"


RULES = {"default": "http://127.0.0.1:1/v1"}


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"proxy_base_url": "http://127.0.0.1:1/v1"}, "proxy only: proxy_base_url"),
        ({"max_attempts": 2, "proxy_rules": RULES}, "proxy only: proxy_rules, max_attempts"),
        ({"proxy_rules": RULES, "tool": "add"}, "proxy or tool-node only: proxy_rules, tool"),
    ],
)
def test_service_says_that_its_config_is_for_another_type(cli, tmp_path, settings, said):
    config = tmp_path / "routes.json"
    config.write_text(json.dumps({"host": "127.0.0.1", "port": 0, **settings}))
    key = clean_environ(ROCK_MODEL_SERVICE_UPSTREAM_API_KEY="sk-for-whoever-needs-one")
    started = cli("start", "--config-file", str(config), env=key, check=0)
    assert started.err == "rock-ms: this is the local type; for --type %s\n" % said
    assert state(cli)["type"] == "local"


def test_agent_of_a_proxy_is_watched_too(cli, upstream):
    """Its end is in the marker log, where a trainer written for the local type looks for it."""
    start(cli, "--proxy-base-url", upstream.url, check=0)
    cli("watch-agent", "--pid", "999999999", check=0)
    done = cli("anti-call-llm", "--index", "0", check=0)
    assert done.out == "SESSION_END\n"
    assert done.err == "rock-ms: the service in %s answers by itself: of its requests none comes here\n" % cli.data_dir
    assert ask(state(cli)["port"], chat()).status == 200
