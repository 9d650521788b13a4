"""`rock_sdk.py start` and `stop`: the tool manager as a user runs it, in processes of its own."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

import rock_ms
import rock_sdk
import sandboxes
from assistants import streams
from managers import ADD, assert_nothing_left, free_port, write_tools
from support import TIMEOUT, Later, ask, clean_environ, run_cli, wait_until
from test_vllm import Fake, are_gone

pytestmark = pytest.mark.load

SCRIPT = os.path.abspath(rock_sdk.__file__)


class ManagerCli:
    """The command line on one data directory."""

    def __init__(self, directory, environ):
        self.data_dir = str(directory)
        self.environ = environ

    def __call__(self, *words, **options):
        environ = {**self.environ, **options.pop("more", {})}
        return run_cli(*words, "--data-dir", self.data_dir, script=SCRIPT, env=environ, **options)

    def start(self, *words, **options):
        """Start a manager with processes on a free port."""
        ports = ("--port", "0", "--first-node-port", free_port())
        return self("start", "--type", "tool-manager", "--runtime", "process", *ports, *words, check=0, **options)

    @property
    def state(self):
        return rock_sdk.manager_state(self.data_dir).read()

    def ask(self, path, value=None, method="POST", **options):
        return ask(self.state["port"], value, method, path, **options)

    def status(self, tool_name, tenant_id="default"):
        got = self.ask("/check_tool_service_status", {"tool_name": tool_name, "tenant_id": tenant_id}).json()
        return got["output"]["status"], got["message"]

    def create(self, tool_name, tenant_id="default"):
        value = {"tool_name": tool_name, "tenant_id": tenant_id}
        assert self.ask("/create_tool_service", value).status == 200
        wait_until(lambda: self.status(tool_name, tenant_id)[0] != "pending")
        assert self.status(tool_name, tenant_id) == ("running", "")

    @contextlib.contextmanager
    def registry(self):
        registry = rock_sdk.ToolRegistry(os.path.join(self.data_dir, rock_sdk.REGISTRY_NAME))
        try:
            yield registry
        finally:
            registry.close()

    def kill(self):
        """Kill the manager, and nothing else."""
        os.kill(self.state["pid"], signal.SIGKILL)
        wait_until(lambda: not rock_sdk.manager_state(self.data_dir).is_running())

    def log(self):
        with open(os.path.join(self.data_dir, "tool-manager.log"), encoding="utf-8") as file:
            return file.read()


@pytest.fixture
def cli(tmp_path):
    """The command line on a directory of its own; whatever it starts is stopped, and leaves nothing."""
    kinds = (rock_sdk.ManagerSettings, rock_sdk.AssistantSettings)
    ours = {spec.metadata["env"] for kind in kinds for spec in rock_ms.fields(kind)}
    environ = {name: value for name, value in clean_environ().items() if name not in ours}
    environ["TMPDIR"] = str(tmp_path)  # by which whatever a node begins is found
    cli = ManagerCli(tmp_path / "data", environ)
    yield cli
    cli("stop", check=0)
    assert_nothing_left(tmp_path / "data")
    assert sandboxes.processes_with(str(tmp_path)) == []


@pytest.mark.everywhere
def test_start_and_stop_say_what_they_do(cli):
    started = cli.start()
    state = cli.state
    expected = "tool manager started: pid %d, http://127.0.0.1:%d, tools run as processes; --runtime process isolates"
    assert started.out.startswith(expected % (state["pid"], state["port"]))
    assert started.err == ""
    assert cli.ask("/health", method="GET").json() == {"status": "healthy"}
    assert cli.ask("/", method="GET").json()["type"] == "tool-manager"
    cli.create("RenewInstance")
    again = cli("start", "--type", "tool-manager", check=1)
    assert "a tool manager already runs (pid %d, 127.0.0.1:%d)" % (state["pid"], state["port"]) in again.err
    assert cli("stop", check=0).out == "tool manager stopped (pid %d)\n" % state["pid"]
    nothing = "no tool manager runs in the data directory {0}\nno assistant runs in the data directory {0}\n"
    assert cli("stop", check=0).out == nothing.format(cli.data_dir)
    assert "RenewInstance_default is exited: the tool manager was stopped" in cli.log()


def test_relative_directories_are_those_of_the_caller(cli, tmp_path):
    write_tools(tmp_path / "tools", add=ADD)
    words = ["start", "--runtime", "process", "--port", "0", "--first-node-port", free_port(), "--tool-dir", "tools"]
    run_cli(*words, "--data-dir", "data", script=SCRIPT, env=cli.environ, cwd=str(tmp_path), check=0)
    cli.create("add")
    got = cli.ask("/execute_tool", {"tool_name": "add", "params": {"a": 41}})
    assert got.json()["output"] == 42


def test_next_manager_finds_what_a_killed_one_left(cli):
    """Nodes that live, that have died, that were being started, and directories that are nobody's."""
    cli.start()
    for tenant in ("lives", "dies"):
        cli.create("RenewInstance", tenant)
    with cli.registry() as registry:
        lives, dies = (registry.node(tenant, "RenewInstance") for tenant in ("lives", "dies"))
        cli.kill()
        registry.put(replace(lives, tenant_id="pending", node_id="2" * 32, status="pending"))
    for node_id in ("2" * 32, "3" * 32):
        os.makedirs(os.path.join(cli.data_dir, "nodes", node_id, "work"))
    for pid in sandboxes.processes_with(dies.node_id):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert sandboxes.processes_with(lives.node_id)
    cli.start()
    assert cli.status("RenewInstance", "lives") == ("running", "")
    call = {"tool_name": "RenewInstance", "tenant_id": "lives", "params": {"instance_id": "1", "period": "2"}}
    assert cli.ask("/execute_tool", call).json()["output"] == "已完成ECS实例ID为1的续费，续费时长2月"
    assert cli.status("RenewInstance", "dies") == ("exited", "it ended")
    assert cli.status("RenewInstance", "pending")[0] == "failed"
    wait_until(lambda: os.listdir(os.path.join(cli.data_dir, "nodes")) == [lives.node_id])
    cli.create("RenewInstance", "dies")
    assert cli.ask("/remove_tool", {"tool_name": "RenewInstance", "tenant_id": "lives"}).status == 200
    assert sandboxes.processes_with(lives.node_id) == []


def test_killed_manager_whose_node_dies_later_is_told_so(cli):
    cli.start()
    cli.create("RenewInstance")
    cli.kill()
    cli.start()
    with cli.registry() as registry:
        node = registry.node("default", "RenewInstance")
    for pid in sandboxes.processes_with(node.node_id):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: cli.status("RenewInstance")[0] != "running")
    assert cli.status("RenewInstance") == ("exited", "it ended")


def test_kept_nodes_are_there_for_the_next_manager(cli):
    cli.start("--on-stop", "keep")
    cli.create("RenewInstance")
    cli("stop", check=0)
    with cli.registry() as registry:
        assert sandboxes.processes_with(registry.node("default", "RenewInstance").node_id)
    cli.start()
    assert cli.status("RenewInstance") == ("running", "")


def test_keys_are_shown_by_no_process_and_no_log(cli, tmp_path):
    config = tmp_path / "manager.json"
    config.write_text('{"tenant_keys": {"ann": "key-of-ann-012345"}}')
    cli.start("--api-key", "key-of-all-012345", "--config-file", config)
    assert cli.ask("/tools", method="GET").status == 401
    for key in ("key-of-all-012345", "key-of-ann-012345"):
        assert cli.ask("/tools", method="GET", headers={"Authorization": key}).status == 200
        assert key not in cli.log()
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open("/proc/%s/cmdline" % pid, "rb") as file:
                assert key.encode() not in file.read()
        for name in os.listdir(cli.data_dir):
            path = os.path.join(cli.data_dir, name)
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    assert key.encode() not in file.read()


def test_key_may_come_from_the_environment(cli):
    cli.start(more={"TOOL_MANAGER_AUTH": "key-of-all"})
    assert cli.ask("/tools", method="GET").status == 401
    assert cli.ask("/tools", method="GET", headers={"Authorization": "Bearer key-of-all"}).status == 200


def test_port_that_is_taken_is_said(cli):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        done = cli("start", "--runtime", "process", "--port", port, check=1)
    assert "the tool manager did not start: cannot listen on 127.0.0.1:%d" % port in done.err


def test_registry_that_cannot_be_used_is_said(cli):
    os.makedirs(os.path.join(cli.data_dir, rock_sdk.REGISTRY_NAME))
    done = cli("start", "--runtime", "process", "--port", "0", check=1)
    assert "the tool manager did not start: the registry %s" % cli.data_dir in done.err
    assert "Traceback" not in done.err + cli.log()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--runtime", "vm"], "must be docker or process"),
        (["--tool-dir", "/no/such/dir"], "must be a directory of this machine that exists"),
        (["--first-node-port", "0"], "from 1 to 65535"),
        (["--max-nodes", "x"], "--max-nodes"),
        (["--tool-env", "A=1"], "must be names of environment variables"),
        (["--node-memory", "lots"], "must be a size, as 512m"),
        (["--tool-image", "--privileged"], "--tool-image"),
        (["--on-stop", "leave"], "must be remove or keep"),
    ],
)
def test_bad_setting_is_bad_usage(cli, words, said):
    done = cli("start", *words, check=2)
    assert said in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    "keys", ['{"a/b": "key"}', '{"ann": "two words"}', '{"ann": "same", "bob": "same"}', '["key"]', '{"ann": 7}']
)
def test_bad_keys_of_tenants_are_bad_usage_and_not_shown(cli, tmp_path, keys):
    config = tmp_path / "manager.json"
    config.write_text('{"tenant_keys": %s}' % keys)
    done = cli("start", "--config-file", config, check=2)
    assert "tenant_keys" in done.err
    assert "same" not in done.err.replace("the same key", "")
    assert "two words" not in done.err


def test_missing_docker_is_said(cli, tmp_path):
    done = cli("start", "--port", "0", check=0, more={"PATH": str(tmp_path)})
    assert done.err == "%s\n" % (
        "rock-agent-servers: there is no docker command here: tools will not start; or try --runtime process"
    )
    assert cli.ask("/create_tool_service", {"tool_name": "RenewInstance"}).status == 200
    wait_until(lambda: cli.status("RenewInstance")[0] != "pending")
    status, message = cli.status("RenewInstance")
    assert status == "failed"
    assert re.match("cannot run docker: No such file or directory.*; is it installed", message)


def test_what_a_user_should_know_is_said_at_the_start(cli):
    words = ("--runtime", "process", "--host", "0.0.0.0", "--port", "0", "--tool-env", "HOME,NOT_SET_ANYWHERE")
    done = cli("start", *words, check=0)
    assert done.err.splitlines() == [
        "rock-agent-servers: --tool-env: NOT_SET_ANYWHERE is not set",
        "rock-agent-servers: it listens on 0.0.0.0 and asks for no key: anyone on the network may run tools",
    ]


def test_key_of_a_tenant_that_is_the_managers_is_bad_usage(cli, tmp_path):
    config = tmp_path / "manager.json"
    config.write_text('{"tenant_keys": {"ann": "same"}, "api_key": "same"}')
    done = cli("start", "--config-file", config, check=2)
    assert "a tenant has the manager's own api_key" in done.err


def test_help_names_every_flag_and_default(cli):
    shown = " ".join(run_cli("start", "--help", check=0, script=SCRIPT, env=cli.environ).out.split())
    for spec in rock_ms.fields(rock_sdk.ManagerSettings):
        flag = spec.metadata["flag"]
        assert not flag or flag + " " in shown
    assert "default 31511" in shown or "default: 31511" in shown


def test_ctrl_c_ends_it_in_the_foreground(cli):
    command = [sys.executable, SCRIPT, "start", "--runtime", "process", "--port", "0", "--foreground"]
    with subprocess.Popen([*command, "--data-dir", cli.data_dir], stderr=subprocess.PIPE, env=cli.environ) as process:
        wait_until(lambda: b"started" in process.stderr.readline())
        cli.create("RenewInstance")
        process.send_signal(signal.SIGINT)
        process.stderr.read()
    assert process.returncode == 0


# The assistant ------------------------------------------------------------------------------------------------------


@pytest.fixture
def assistant(cli):
    """Starts an assistant beside; what it says, and its state."""

    def start(*words, **options):
        done = cli("start", "--type", "assistant", "--port", "0", *words, check=0, **options)
        return done, rock_sdk.SERVERS["assistant"].state(cli.data_dir).read()

    yield start
    cli("stop", "--type", "assistant", check=0)


def chat_of(state, **more):
    body = {"model": "m", "messages": [{"role": "user", "content": "天气"}], **more}
    return ask(state["port"], body)


@pytest.mark.everywhere
def test_assistant_starts_and_stops_beside_a_tool_manager(cli, assistant, upstream):
    cli.start()
    done, state = assistant("--model-server", upstream.url)
    shown = (state["pid"], state["port"], upstream.url)
    assert done.out == "assistant started: pid %d, http://127.0.0.1:%d, model server %s, tools by prompt\n" % shown
    assert chat_of(state).json()["choices"][0]["message"]["content"] == "hello"
    again = cli("start", "--type", "assistant", check=1)
    assert "an assistant already runs (pid %d" % state["pid"] in again.err
    assert cli("stop", "--type", "assistant", check=0).out == "assistant stopped (pid %d)\n" % state["pid"]
    assert cli.ask("/health", method="GET").status == 200


def test_agent_calls_a_tool_in_a_process_of_the_tool_manager(cli, assistant, upstream):
    cli.start()
    _, state = assistant(
        "--model-server", upstream.url, "--tool-manager-url", "http://127.0.0.1:%d" % cli.state["port"]
    )
    upstream.script(streams('Action: RenewInstance\nAction Input: {"instance_id": "1", "period": "2"}'), streams("好"))
    value = {
        "llm_config": {"model": "m"},
        "agent_config": {"tools": ["RenewInstance"]},
        "messages": [{"role": "user", "content": "续费"}],
        "use_tool_api": True,
    }
    got = ask(state["port"], value, path="/v1/assistants/lite").json()
    assert "<result>已完成ECS实例ID为1的续费，续费时长2月</result>\nAnswer:好" in got["output"]["response"]
    assert cli.status("RenewInstance") == ("running", "")


def test_vllm_is_started_waited_for_and_ended(cli, assistant, tmp_path):
    fake = Fake(tmp_path)
    more = {**fake.environ, "FAKE": ""}
    done, state = assistant("--model", "/models/m", "--served-model-name", "m", "--vllm-args=--dtype half", more=more)
    assert "vLLM with /models/m" in done.out
    assert [item["id"] for item in ask(state["port"], None, "GET", "/v1/models").json()["data"]] == ["m"]
    fake.log_path = os.path.join(cli.data_dir, "vllm.log")
    pids = fake.pids()
    with open("/proc/%d/cmdline" % pids[0], "rb") as file:
        assert b"--dtype\0half" in file.read()
    cli("stop", "--type", "assistant", check=0)
    wait_until(lambda: are_gone(pids))


def test_progress_of_a_start_is_told_before_it_is_over():
    ready, ready_fd = os.pipe()
    told = []

    def start():
        try:
            return rock_ms._read_all(ready, TIMEOUT, told.append)
        finally:
            os.close(ready)

    starting = Later(start)
    rock_ms.tell_progress(ready_fd, "waiting for vLLM\n to load")
    wait_until(lambda: told)
    rock_ms.tell_progress(ready_fd, "still waiting")
    os.write(ready_fd, b'{"port": 1}')
    os.close(ready_fd)
    assert starting.result() == '{"port": 1}'
    assert told == ["waiting for vLLM to load", "still waiting"]


def test_vllm_that_is_missing_or_fails_is_said(cli, tmp_path):
    fake = Fake(tmp_path)
    words = ["start", "--type", "assistant", "--port", "0", "--model", "/models/m"]
    assert "vLLM is not installed" in cli(*words, check=1).err
    failed = cli(*words, check=1, more={**fake.environ, "FAKE": "fails"})
    assert "the assistant did not start: vLLM ended with exit code 1: " in failed.err
    assert "ValueError: no such model" in failed.err and "Traceback" not in failed.err


def test_help_of_start_is_that_of_the_server_asked_for():
    assert "--runtime" in run_cli("start", "--help", script=SCRIPT, check=0).out
    assistant = run_cli("start", "--type", "assistant", "--help", script=SCRIPT, check=0).out
    assert "--model-server" in assistant and "--runtime" not in assistant


@pytest.mark.parametrize(
    "words, said",
    [
        (["--type", "assitant"], "must be tool-manager or assistant, got 'assitant'"),
        (["--type", "assistant", "--runtime", "process"], "--runtime"),
        (["--type=assistant", "--model-server", "nobody"], "there is no model server nobody"),
        (["--type", "assistant", "--config-file", "CONFIG"], "unknown setting 'runtime'"),
    ],
)
def test_bad_usage_of_start_is_said(cli, tmp_path, words, said):
    config = tmp_path / "c.yaml"
    config.write_text("type: tool-manager\nruntime: process\n")
    words = [str(config) if word == "CONFIG" else word for word in words]
    assert said in cli("start", *words, check=2).err


def test_config_file_says_which_server_it_is_for(cli, tmp_path, upstream):
    config = tmp_path / "c.yaml"
    config.write_text("type: assistant\nport: 0\nmodel_server: %s\n" % upstream.url)
    assert cli("start", "--config-file", config, check=0).out.startswith("assistant started: ")
    state = rock_sdk.SERVERS["assistant"].state(cli.data_dir).read()
    assert cli("stop", check=0).out == "assistant stopped (pid %d)\n" % state["pid"]


def test_stop_ends_both_servers_that_run(cli, assistant, upstream):
    cli.start()
    assistant("--model-server", upstream.url)
    assert [line.split(" stopped")[0] for line in cli("stop", check=0).out.splitlines()] == [
        "tool manager",
        "assistant",
    ]
