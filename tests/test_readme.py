"""The README is true: its tables are the code's, its commands run."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import rock_ms
import rock_sdk
import sandboxes
from assistants import ACTION, assisting, says, streams
from managers import FakeRuntime, assert_nothing_left, managing
from support import SCRIPT, TIMEOUT, Later, clean_environ, completion, run_cli, wait_until
from upstream import answer

README = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "README.md")


@pytest.fixture(scope="module")
def readme():
    with open(README, encoding="utf-8") as file:
        return file.read()


def code(name):
    return "`%s`" % name if name else ""


@pytest.mark.parametrize(
    "title, settings",
    [
        ("name", rock_ms.ServiceSettings),
        ("tool manager", rock_sdk.ManagerSettings),
        ("assistant", rock_sdk.AssistantSettings),
    ],
)
def test_settings_table_is_the_dataclass(readme, title, settings):
    rows = []
    for spec in rock_ms.fields(settings):
        default = getattr(settings(), spec.name)
        if spec.name == "proxy_rules":
            shown = "ROCK's two"
        elif default in (None, {}, ()):
            shown = "none"
        elif isinstance(default, tuple):
            shown = code(",".join(map(str, default)))
        else:
            shown = code(str(default))
        meta = spec.metadata
        cells = (code(spec.name), code(meta["flag"]), code(meta["env"]), shown, meta["help"])
        rows.append(re.sub(" +", " ", "| %s | %s | %s | %s | %s |" % cells))
    table = readme.split("| %s | flag |" % title)[1].split("\n\n")[0]
    assert [re.sub(" +", " ", row) for row in table.splitlines()[2:]] == rows


@pytest.mark.parametrize("kind", ["service", "proxy"])
def test_endpoints_table_has_every_route(readme, kind, request):
    router = request.getfixturevalue(kind).server.http.router
    for methods in list(router._exact.values()) + list(router._named.values()):
        for route in methods.values():
            shown = "any `/v1/...`" if route.method == "*" else "%s %s" % (route.method, route.path)
            assert shown.replace("{name}", "NAME") in readme


def test_commands_table_has_every_command(readme):
    commands = readme.split("## Commands")[1].split("\n\n")[1]
    for name in re.findall(r"^    ([a-z-]+) ", run_cli("--help", check=0).out, re.MULTILINE):
        assert "| `%s" % name in commands


def test_demo_prints_what_is_shown(readme):
    shown = readme.split("$ python3 rock_ms.py demo\n")[1].split("...\n")[0].splitlines()
    printed = run_cli("demo", check=0).out.splitlines()

    def general(line):
        return re.sub(r"rock-ms-demo-\w+|(?<=pid )[0-9]+|(?<=process )[0-9]+|(?<=127.0.0.1:)[0-9]+", "N", line)

    lines = [general(line) for line in printed]
    assert [general(line) for line in shown if general(line) not in lines] == []


@pytest.mark.load
def test_loop_runs_as_shown(readme, tmp_path):
    """The section's commands, word for word but for the port, the agent and where python3 is."""
    section = readme.split("## The loop")[1].split("\n## ")[0]
    begin, train = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    port = free_port()
    agent = tmp_path / "my-agent"
    agent.write_text("#!/bin/sh\nexec %s %s/agent.py\n" % (sys.executable, tmp_path))
    agent.chmod(0o755)
    (tmp_path / "agent.py").write_text(AGENT)
    (tmp_path / "python3").symlink_to(sys.executable)
    (tmp_path / "rock_ms.py").symlink_to(SCRIPT)
    answer = rock_ms.dump_json(completion("fixed"))
    policy = tmp_path / "my-policy"
    policy.write_text("#!/bin/sh\ncat >> seen\necho '%s'\n" % answer)
    policy.chmod(0o755)
    environ = clean_environ(ROCK_MODEL_SERVICE_DATA_DIR=str(tmp_path / "data"))
    environ["PATH"] = "%s:%s" % (tmp_path, environ["PATH"])

    def shell(text, name):
        script = text.replace("8080", str(port))
        with open(str(tmp_path / name), "wb") as said:
            subprocess.check_call(["sh", "-ec", script], cwd=str(tmp_path), env=environ, stdout=said, timeout=TIMEOUT)

    try:
        started = Later(lambda: shell(begin, "begun"))
        wait_until(lambda: (tmp_path / "begun").exists() and "watching process" in (tmp_path / "begun").read_text())
        shell(train, "trained")  # no sooner, or the agent might end before it is watched
        started.result()
        assert "stopped" in (tmp_path / "trained").read_text()
    finally:
        run_cli("stop", check=0, env=environ)
    assert [line[:30] for line in (tmp_path / "seen").read_text().splitlines()] == [
        '{"model":"m","messages":["one"',
        '{"model":"m","messages":["two"',
    ]
    wait_until(lambda: (tmp_path / "agent.done").exists())


def test_config_file_is_understood(readme, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)[-1])
    assert rock_ms.resolve_settings(rock_ms.ServiceSettings, {}, {}, str(path)).port == 9000


def free_port():
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


AGENT = """
import json, os, urllib.request
for prompt in ("one", "two"):
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        json.dumps({"model": "m", "messages": [prompt]}).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]})
    urllib.request.urlopen(request, timeout=60).read()
open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "agent.done"), "w").close()
"""


@pytest.mark.load
def test_recording_replaying_and_routing_run_as_shown(readme, tmp_path, upstream):
    """The section's commands, word for word but for the ports, the servers' addresses and where python3 is."""
    section = readme.split("## Recording")[1].split("\n## ")[0]
    record, replay, route = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    routes = re.search(r"```yaml\n(.*?)```", section, re.DOTALL).group(1)
    port = free_port()
    (tmp_path / "routes.yaml").write_text(re.sub(r"https?://\S+", upstream.url, routes))
    (tmp_path / "upstream.key").write_text("sk-of-the-upstream\n")
    (tmp_path / "my-agent").write_text("#!/bin/sh\nexec %s %s/agent.py\n" % (sys.executable, tmp_path))
    (tmp_path / "my-agent").chmod(0o755)
    (tmp_path / "agent.py").write_text(AGENT)
    (tmp_path / "python3").symlink_to(sys.executable)
    (tmp_path / "rock_ms.py").symlink_to(SCRIPT)
    environ = clean_environ(ROCK_MODEL_SERVICE_DATA_DIR=str(tmp_path / "data"), OPENAI_API_KEY="of-the-agent")
    environ["PATH"] = "%s:%s" % (tmp_path, environ["PATH"])
    environ["OPENAI_BASE_URL"] = "http://localhost:%d/v1" % port

    def shell(text):
        script = text.replace("8080", str(port)).replace("https://api.openai.com/v1", upstream.url)
        return subprocess.check_output(["sh", "-ec", script], cwd=str(tmp_path), env=environ, timeout=TIMEOUT).decode()

    try:
        recorded = shell(record)
        assert [recorded.count(text) for text in ('"one"', '"two"', "answer:    hello")] == [1, 1, 2]
        keys = [dict(request["headers"])["authorization"] for request in upstream.seen()]
        assert keys == ["Bearer sk-of-the-agent"] * 2
        shell(replay)
        assert len(upstream.seen()) == 2
        shell(route)
        third = upstream.seen()[2]
        assert dict(third["headers"])["authorization"] == "Bearer sk-of-the-upstream"
        assert b'"logprobs":true,"temperature":1.0' in third["body"]
    finally:
        run_cli("stop", check=0, env=environ)


@pytest.mark.load
def test_train_loop_runs_as_shown(readme, tmp_path):
    section = readme.split("## From outside")[1].split("\n## ")[0]
    train, agent = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:2]
    assert len(train.splitlines()) < 25
    printed = re.search(r"\$ python3 train.py\n(.*?)```", section, re.DOTALL).group(1)
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "agent.py").write_text(agent)
    (tmp_path / "train.py").write_text(train)
    for module in (rock_ms, rock_sdk):
        (tmp_path / os.path.basename(module.__file__)).symlink_to(module.__file__)
    environ = clean_environ(PATH=sandboxes.PATH, TMPDIR=str(tmp_path))
    command = [sys.executable, "-W", "error", "train.py"]
    assert subprocess.check_output(command, cwd=str(tmp_path), env=environ, timeout=TIMEOUT).decode() == printed
    left = set(os.listdir(str(tmp_path))) - {"__pycache__"}
    assert left == {"agent", "rock_ms.py", "rock_sdk.py", "train.py"}


@pytest.mark.docker
@pytest.mark.load
def test_train_loop_runs_in_a_container_by_the_line_that_is_shown(readme, tmp_path):
    sandboxes.need_engine()
    section = readme.split("## From outside")[1].split("\n## ")[0]
    train, agent, in_container = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:3]
    in_container = in_container.replace("python:3.12", sandboxes.IMAGE)
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "agent.py").write_text(agent)
    changed = train.replace("    async with LocalSandbox() as sandbox:\n", in_container).replace("LocalS", "DockerS")
    assert changed.count("DockerSandbox") == 2
    command = [sys.executable, "-c", changed]
    environ = clean_environ(PYTHONPATH=os.path.dirname(SCRIPT))
    assert subprocess.check_output(command, cwd=str(tmp_path), env=environ, timeout=2 * TIMEOUT) == b"0 42\n"


@pytest.mark.parametrize(
    "title, config", [("model_service_config", "ModelService"), ("rock_agent_config", "RockAgent")]
)
def test_tables_of_the_sdk_are_its_dataclasses(readme, title, config):
    config = getattr(rock_sdk, config + "Config")
    table = readme.split("| `%s" % title)[1].split("\n\n")[0]
    shown = {}
    for row in table.splitlines()[2:]:
        names, default = [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:3]]
        shown.update((name.strip("`"), default.strip("`")) for name in names.split(", "))
    defaults = vars(config())
    for name, default in shown.items():
        value = defaults.pop(name)
        assert default in (str(value), "none" if not value else None, "python", "as above")
    taken = readme.split("`agent_type`, `agent_name`")[1].split("are\ntaken, too")[0]
    assert all(config is rock_sdk.RockAgentConfig and name in "agent_type agent_name" + taken for name in defaults)


def test_endpoints_table_of_the_tool_manager_has_every_route(readme, tmp_path):
    table = readme.split("| endpoint | request,")[1].split("\n\n")[0]
    with managing(tmp_path / "data", FakeRuntime()) as manager:
        for path, methods in manager.server.http.router._exact.items():
            if path not in ("/", "/health", "/metrics"):
                first = "POST" if "POST" in methods else "GET"
                row = next(row for row in table.splitlines() if "`%s %s`" % (first, path) in row)
                assert ("or `GET`" in row) == (len(methods) == 2)
        for endpoint in manager.server.service._endpoints:
            row = next(row for row in table.splitlines() if "%s`" % endpoint.path in row)
            for name in endpoint.takes if "as create" not in row else ():
                assert "`%s`" % name in row or name in ("tool_url", "tenant_id")


def test_endpoints_table_of_the_assistant_has_every_route(readme, tmp_path, upstream):
    section = readme.split("## Function calling")[1].split("\n## ")[0]
    table = section.split("| endpoint | request |")[1].split("\n\n")[0]
    with assisting(tmp_path, upstream) as assistant:
        router = assistant.server.http.router
        for path, methods in [*router._exact.items(), *router._named.items()]:
            for method in methods if path not in ("/", "/health", "/metrics") else ():
                assert "`%s %s" % (method, path) in table
    for name in rock_sdk._LITE.takes:
        assert "`%s`" % name in table


@pytest.fixture
def servers_shell(tmp_path, upstream):
    """Runs the commands of the sections on the agent servers, word for word but for the ports, the model server's
    address and where python3 is."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    kinds = (rock_sdk.ManagerSettings, rock_sdk.AssistantSettings)
    ours = {spec.metadata["env"] for kind in kinds for spec in rock_ms.fields(kind)}
    manager_port, node_port, assistant_port = free_port(), free_port(), free_port()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    for module in (rock_ms, rock_sdk):
        (tmp_path / os.path.basename(module.__file__)).symlink_to(module.__file__)
    environ = {name: value for name, value in clean_environ().items() if name not in ours}
    environ["PATH"] = "%s:%s" % (tmp_path / "bin", environ["PATH"])
    environ["ROCK_MODEL_SERVICE_DATA_DIR"] = str(tmp_path / "data")
    environ["TOOL_MANAGER_SERVICE_URL"] = "http://localhost:%d" % manager_port
    environ["TMPDIR"] = str(tmp_path)
    environ["DASHSCOPE_API_KEY"] = "sk-of-dashscope"
    ports = " --port %d --first-node-port %d" % (manager_port, node_port)
    model_server = ' --port %d --model-servers \'{"dashscope": "%s"}\'' % (assistant_port, upstream.url)

    def shell(text):
        script = text.replace("31511", str(manager_port)).replace("31513", str(node_port))
        script = script.replace("31512", str(assistant_port))
        script = script.replace("start --type tool-manager", "start --type tool-manager" + ports)
        script = script.replace("start --type assistant", "start --type assistant" + model_server)
        return subprocess.check_output(["sh", "-ec", script], cwd=str(tmp_path), env=environ, timeout=60).decode()

    yield shell
    run_cli("stop", script=rock_ms.__file__, check=0, env=environ)
    for kind in rock_sdk.SERVERS:
        run_cli("stop", "--type", kind, script=rock_sdk.__file__, check=0, env=environ)
    assert_nothing_left(tmp_path / "data")
    assert sandboxes.processes_with(str(tmp_path)) == []


def section_on_tools(readme):
    return readme.split("## Tools for agents")[1].split("\n## ")[0]


@pytest.mark.load
def test_first_tool_runs_as_shown(readme, tmp_path, servers_shell):
    section = section_on_tools(readme)
    start = re.search(r"```sh\n(.*?)```", section, re.DOTALL).group(1)
    (tmp_path / "tool.py").write_text(re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1))
    shown = re.search(r"```console\n(.*?)```", section, re.DOTALL).group(1).splitlines()
    assert "tool manager started" in servers_shell(start)
    commands = "\n".join(line[2:] for line in shown if line.startswith("$ "))
    printed = servers_shell(commands)
    lines = [line for line in shown if not line.startswith("$ ")]
    assert re.sub("pid [0-9]+", "pid 4711", printed).splitlines() == lines


@pytest.mark.load
def test_tool_of_ones_own_runs_as_shown(readme, tmp_path, servers_shell):
    section = section_on_tools(readme)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "add.py").write_text(re.findall(r"```python\n(.*?)```", section, re.DOTALL)[1])
    managed, alone = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[1:]
    name = '{"tool_node_name":"add_default","status":"%s"}'
    outputs = [text for text in re.findall('"output":(.*)}', servers_shell(managed)) if text != name % "pending"]
    assert outputs == ["42", name % "exited"]
    printed = servers_shell(alone)
    assert '"output":42}' in printed
    assert "tool node stopped" in printed


# The assistant.


def section_on_the_assistant(readme):
    return readme.split("## Function calling")[1].split("\n## ")[0]


@pytest.mark.load
def test_assistant_runs_as_shown(readme, servers_shell, upstream):
    section = section_on_the_assistant(readme)
    start, chat, lite = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    shown = json.loads(re.search(r"```json\n(.*?)```", section, re.DOTALL).group(1))
    assert "assistant started" in servers_shell(start)
    upstream.script(says(ACTION % "海淀区", model="qwen-max"), streams("在控制台", "创建应用"))

    def general(value):
        return json.loads(re.sub(r"(chatcmpl|call)_[0-9a-f-]+|(?<=created\":)[0-9]+", "0", json.dumps(value)))

    def without_created(value):
        return {name: item for name, item in value.items() if name != "created"}

    answered = json.loads(servers_shell(chat))
    shown = json.loads(json.dumps(shown).replace("chatcmpl_...", "0").replace("call_...", "0"))
    assert without_created(general(answered)) == without_created(shown)
    assert list(answered) == list(shown)
    uploaded, _, said = servers_shell(lite).partition("\n")
    assert json.loads(uploaded)["output"] == {"status": "upload files success", "files": ["QA.md"]}
    assert '"output":{"response":"在控制台创建应用"}' in said and "assistant stopped" in said
    keys = [dict(request["headers"])["authorization"] for request in upstream.seen()]
    assert keys == ["Bearer sk-of-dashscope"] * 2
    assert "即可获得Key" in upstream.seen()[1]["body"].decode("utf-8")


@pytest.mark.load
def test_agent_with_a_tool_in_the_tool_manager_runs_as_shown(readme, tmp_path, servers_shell, upstream):
    agent = re.findall(r"```python\n(.*?)```", section_on_the_assistant(readme), re.DOTALL)[1]
    base_url = upstream.url[: -len("/v1")]
    agent = agent.replace('"dashscope"}', '"%s", "api_key": os.getenv("DASHSCOPE_API_KEY")}' % upstream.url)
    agent = agent.replace('["image_gen"]', '[{"image_gen": {"base_url": "%s"}}]' % base_url)
    agent += "assert 'Answer:' in text and 'Observation:' in text and '![IMAGEGEN]' in text\n"
    (tmp_path / "agent.py").write_text(agent, encoding="utf-8")
    task = {"task_status": "SUCCEEDED", "results": [{"url": "https://host/i.png"}]}
    action = 'Action: image_gen\nAction Input: {"text": "多啦A梦"}'
    upstream.script(streams(action), answer({"output": task}), streams("画好了"))
    servers_shell("python3 rock_sdk.py start --type tool-manager --runtime process")
    printed = servers_shell("python3 agent.py")
    assert printed == action + "\nObservation: <result>![IMAGEGEN](https://host/i.png)</result>\nAnswer:画好了\n"
    assert dict(upstream.seen()[1]["headers"])["authorization"] == "Bearer sk-of-dashscope"
