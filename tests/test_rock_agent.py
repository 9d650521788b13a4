"""Agents, end to end: installed in a sandbox, run with a prompt, driven turn by turn, and gone afterwards."""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import uuid
import zipfile

import pytest

import rock_sdk
from rock_ms import RockError, UsageError
from rock_sdk import Observation, RockAgent, RockAgentConfig, SandboxError, StateError
from sandboxes import IMAGE, PATH, RockShapedSandbox, kill_all_of, local_sandbox, need_engine, processes_with, run
from support import SCRIPT, TIMEOUT, Later, completion, wait_until
from upstream import answer, sse, words

pytestmark = pytest.mark.load

# The tests' agent: it asks once a turn, by turns plainly, for a stream, and for a stream with tool calls, and holds
# each answer against what its own prompt and its turn must bring.
AGENT = """
import json, os, sys, urllib.request

prompt, turns = sys.argv[1], int(os.environ["TURNS"])
url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
messages = [{"role": "user", "content": prompt}]


def ask(**more):
    body = json.dumps(dict(model="m", messages=messages, **more)).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)


def plain():
    return json.load(ask())["choices"][0]["message"]


def streamed(**more):
    message, finish = {"role": "assistant", "content": "", "tool_calls": []}, None
    with ask(stream=True, **more) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream"), response.headers
        lines = response.read().decode().replace("\\r\\n", "\\n").split("\\n")
    data = [line[5:].strip() for line in lines if line.startswith("data:")]
    assert all(not line or line.startswith(("data:", ":")) for line in lines), lines
    assert data[-1] == "[DONE]" and data.count("[DONE]") == 1, data
    for chunk in map(json.loads, data[:-1]):
        assert chunk["object"] == "chat.completion.chunk", chunk
        for choice in chunk["choices"]:
            assert finish is None, data
            finish = choice["finish_reason"]
            message["content"] += choice["delta"].get("content") or ""
            for part in choice["delta"].get("tool_calls", []):
                if part["index"] == len(message["tool_calls"]):
                    message["tool_calls"].append({"id": part["id"], "type": "function", "function": {"arguments": ""}})
                function = message["tool_calls"][part["index"]]["function"]
                function["name"] = function.get("name", "") + part["function"].get("name", "")
                function["arguments"] += part["function"].get("arguments", "")
    assert finish == ("tool_calls" if message["tool_calls"] else "stop"), data
    return message


for turn in range(1, turns + 1):
    expected = "%s, turn %d" % (prompt, turn)
    if turn % 3 == 0:
        message = streamed(tools=[{"type": "function", "function": {"name": "add"}}])
        functions = [call["function"] for call in message["tool_calls"]]
        calls = [(function["name"], json.loads(function["arguments"])) for function in functions]
        assert calls == [("add", {"of": expected}), ("look", {"at": [turn, {}]})], calls
        messages.append(message)
        messages += [{"role": "tool", "tool_call_id": call["id"], "content": "3"} for call in message["tool_calls"]]
    else:
        message = streamed() if turn % 3 == 2 else plain()
        assert message["content"] == expected, message
        messages += [message, {"role": "user", "content": "go on"}]
print("%s: %d turns were right" % (ascii(prompt), turns))
"""
RUN_AGENT = "python3 -c %s ${prompt}" % shlex.quote(AGENT)
SERVED = {"enabled": True, "env": {"POLLING_INTERVAL_SECONDS": "0.02"}}
# Puts one request on its way, and reads no answer to it.
SEND_ONE = "python3 -c %s" % shlex.quote(
    textwrap.dedent("""
        import http.client, os, time, urllib.parse
        url = urllib.parse.urlsplit(os.environ["OPENAI_BASE_URL"])
        connection = http.client.HTTPConnection(url.hostname, url.port)
        body, headers = '{"model": "m", "messages": []}', {"Content-Type": "application/json"}
        connection.request("POST", url.path + "/chat/completions", body, headers)
        line = b'"index": 1}'
        log = os.path.join(os.environ["ROCK_MODEL_SERVICE_DATA_DIR"], "LLMService.log")
        while not os.path.exists(log) or line not in open(log, "rb").read():
            time.sleep(0.01)
        """)
)
ASK_ONE = "python3 -c %s" % shlex.quote(
    textwrap.dedent("""
        import json, os, urllib.request
        url = os.environ["OPENAI_BASE_URL"] + "/chat/completions"
        body = b'{"model": "m", "messages": []}'
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
        """)
)


class Policy:
    """The trainer's side of AGENT: answers each request by its own prompt, and remembers it."""

    def __init__(self):
        self.requests = []

    def __call__(self, request):
        self.requests.append(request)
        prompt = request["messages"][0]["content"]
        turn = 1 + sum(message["role"] == "assistant" for message in request["messages"])
        text = "%s, turn %d" % (prompt, turn)
        if "tools" not in request:
            return completion(text)
        calls = [("add", {"of": text}), ("look", {"at": [turn, {}]})]
        calls = [
            {"id": "call-%d" % n, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for n, (name, arguments) in enumerate(calls)
        ]
        return completion(None, tool_calls=calls)

    def turns(self):
        """The turn of each request, in order."""
        return [1 + sum(message["role"] == "assistant" for message in r["messages"]) for r in self.requests]

    def prompts(self):
        return {request["messages"][0]["content"] for request in self.requests}


def hello(_):
    return completion("hello")


async def trainer(service, policy):
    """The loop of a trainer that was written for ROCK; how many requests it answered."""
    index, payload = 0, None
    while True:
        request = await service.anti_call_llm(index=index, response_payload=payload)
        if "SESSION_END" in request:
            return index
        index, payload = index + 1, json.dumps(policy(json.loads(request)))


async def installed(sandbox, run_cmd="sh -c ${prompt}", **config):
    """An agent; by default one that does what its prompt says in sh."""
    agent = RockAgent(sandbox)
    await agent.install({"run_cmd": run_cmd, **config})
    return agent


def nothing_runs(directory):
    """Nothing that was started in a LocalSandbox runs; what was just killed may take its time."""
    wait_until(lambda: not processes_with(directory), "the end of all processes in the sandbox")


def our_files(directory):
    """What stands in our directory of a LocalSandbox beside what an installation brings."""
    found = []
    for parent, _, names in os.walk(os.path.join(directory, "tmp")):
        ours = [os.path.join(parent, name) for name in names]
        found += [os.path.relpath(path, directory) for path in ours if not re.search(r"/(lib|bin|working_dir)/", path)]
    return found


@contextlib.asynccontextmanager
async def a_sandbox(**options):
    """A LocalSandbox of which nothing is left."""
    async with local_sandbox(**options) as sandbox:
        directory = sandbox.directory
        yield sandbox
    assert not os.path.exists(directory) and processes_with(directory) == []


def kept(*args, **config):
    """Fixture: an agent in a sandbox, for several tests, each with an event loop of its own."""
    sandbox = local_sandbox()
    run(sandbox.start())
    directory = sandbox.directory
    try:
        yield run(installed(sandbox, *args, **config))
    finally:
        run(sandbox.stop())
    assert not os.path.exists(directory) and processes_with(directory) == []


@pytest.fixture(scope="module")
def sh():
    """An agent without a model service, which does what its prompt says in sh."""
    yield from kept()


@pytest.fixture(scope="module")
def served():
    """The same with a model service; each run is a session of its own."""
    yield from kept(model_service_config=SERVED, env={"TURNS": "3"})


@pytest.fixture
def after(served):
    """The served agent, of which nothing runs when the test is over, and no file of the run is left."""
    yield served
    nothing_runs(served._sandbox.directory)
    assert our_files(served._sandbox.directory) == []


# ----------------------------------------------------------------------------------------------------------------------
# Installation.
# ----------------------------------------------------------------------------------------------------------------------

CONFIG = {
    "run_cmd": "cat pre post; echo $GREETING ${prompt}",
    "env": {"GREETING": "hello"},
    "pre_init_cmds": [{"command": "echo pre >pre", "timeout_seconds": 20}],
    "post_init_cmds": ["echo post >post"],
    "agent_run_timeout": 20,
    "model_service_config": {"enabled": False, "type": "local"},
}
CONFIG_YAML = """
# as ROCK writes it
run_cmd: "cat pre post; echo $GREETING ${prompt}"
env:
  GREETING: hello
pre_init_cmds:
  - command: "echo pre >pre"
    timeout_seconds: 20
post_init_cmds: ['echo post >post']
agent_run_timeout: 20
model_service_config:
  enabled: false
  type: local
"""


def as_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "given",
    [
        lambda _: CONFIG,
        lambda _: RockAgentConfig(**CONFIG),
        lambda path: as_file(path, "agent.yaml", CONFIG_YAML),
        lambda path: as_file(path, "agent.yml", CONFIG_YAML),
        lambda path: as_file(path, "agent.json", json.dumps(CONFIG)),
    ],
    ids=["dict", "object", "yaml", "yml", "json"],
)
def test_installs_from_whatever_holds_a_configuration(given, tmp_path):
    config = given(tmp_path)

    async def main():
        async with a_sandbox() as sandbox:
            await sandbox.agent.install(config)
            # Commands run where the sandbox says: the directory of this one.
            return await sandbox.agent.run("world")

    assert run(main()) == Observation("pre\npost\nhello world\n", 0, "")


def test_installs_from_roks_default_file(tmp_path, monkeypatch):
    as_file(tmp_path, "rock_agent_config.yaml", CONFIG_YAML)
    monkeypatch.chdir(tmp_path)

    async def main():
        async with a_sandbox() as sandbox:
            await sandbox.agent.install()
            return await sandbox.agent.run("world")

    assert run(main()).output == "pre\npost\nhello world\n"


@pytest.mark.parametrize(
    "config, message",
    [
        ({"run_cmd": "x"}, "run_cmd: must contain"),
        ({"run_cmd": "x ${prompt}", "envv": {}}, "envv: unknown setting"),
        ({"run_cmd": "x ${prompt}", "env": {"A": "b\0c"}}, "env.A: holds a NUL"),
        ({"run_cmd": "x ${prompt}", "working_dir": "/no/such"}, "working_dir: must be a directory"),
        ("/no/such.yaml", "/no/such.yaml"),
    ],
)
def test_a_bad_configuration_is_refused_before_anything_is_done(config, message):
    async def main():
        async with a_sandbox() as sandbox:
            with pytest.raises(UsageError) as caught:
                await sandbox.agent.install(config)
            assert os.listdir(sandbox._path("tmp")) == []
            with pytest.raises(StateError, match="call install"):
                await sandbox.agent.run("x")
            return str(caught.value)

    assert message in run(main())


def test_steps_of_an_installation_come_in_order(tmp_path):
    (tmp_path / "f").write_text("")

    def note(name):
        return 'ls "$TMPDIR"/rock-*/working_dir/f >/dev/null && echo %s >>"$HOME/order"' % name

    async def main():
        async with a_sandbox() as sandbox:
            await installed(
                sandbox,
                working_dir=str(tmp_path),
                pre_init_cmds=[note("pre 1"), note("pre 2")],
                runtime_env_config={"custom_install_cmd": note("runtime")},
                post_init_cmds=[note("post 1"), note("post 2")],
            )
            with open(sandbox._path("order")) as file:
                return file.read().splitlines()

    assert run(main()) == ["pre 1", "pre 2", "runtime", "post 1", "post 2"]


def test_runtime_and_model_service_are_installed_side_by_side():
    meet = 'touch "$HOME/%s"; until [ -e "$HOME/%s" ]; do sleep 0.02; done'
    service = dict(SERVED, config_ini_cmd=meet % ("service", "runtime"), install_timeout=TIMEOUT)
    runtime = {"custom_install_cmd": meet % ("runtime", "service"), "install_timeout": TIMEOUT}
    is_up = "[ -e $HOME/logs/LLMService.json ] && touch $HOME/up"

    async def main():
        async with a_sandbox() as sandbox:
            await installed(sandbox, model_service_config=service, runtime_env_config=runtime, post_init_cmds=[is_up])
            return os.path.exists(sandbox._path("up"))

    assert run(main())


def failing(step, command, tmp_path):
    """A configuration in which one step fails so."""
    if step == "unpacking working_dir":
        return {"working_dir": str(tmp_path), "agent_install_timeout": 2}
    init = {"command": command, "timeout_seconds": 2}
    if step.startswith(("pre_init_cmds", "post_init_cmds")):
        return {step.split()[0]: ["true", init]}
    if step == "runtime_env_config.custom_install_cmd":
        return {"runtime_env_config": {"custom_install_cmd": command, "install_timeout": 2}}
    if step in ("config_ini_cmd", "install_cmd"):
        return {"model_service_config": {"enabled": True, step: command, "install_timeout": 2}}
    return {"model_service_config": {"enabled": True, "start_cmd": command}}


STEPS = [
    "unpacking working_dir",
    "pre_init_cmds 2 of 2",
    "runtime_env_config.custom_install_cmd",
    "config_ini_cmd",
    "install_cmd",
    "the model service did not start",
    "post_init_cmds 2 of 2",
]


def install_failing(step, command, tmp_path):
    """(message, what was done by later steps) of an installation of which one step is this command."""
    (tmp_path / "bin").mkdir()
    tar = tmp_path / "bin" / "tar"
    tar.write_text("#!/bin/sh\n%s\n" % command)
    tar.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), PATH]) if step == "unpacking working_dir" else PATH
    config = failing(step, command, tmp_path)
    if "post_init_cmds" not in config:
        config["post_init_cmds"] = ['touch "$HOME/later"']

    async def main():
        async with rock_sdk.LocalSandbox(env={"PATH": path}) as sandbox:
            with pytest.raises(SandboxError) as caught:
                await installed(sandbox, **config)
            nothing_runs(sandbox.directory)
            assert not os.path.exists(sandbox._path("later"))
            assert [
                name for name in our_files(sandbox.directory) if "/jobs/" in name and not name.endswith(".tar.gz")
            ] == []
            return str(caught.value)

    return run(main())


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_is_named_with_the_end_of_what_it_said(step, tmp_path):
    said = install_failing(step, "seq 9000; echo no luck; echo at all >&2; exit 7", tmp_path)
    assert step in said and "exit code 7" in said and said.endswith("no luck\nat all")


@pytest.mark.parametrize("step", [step for step in STEPS if "start" not in step])  # whose time is not to be set
def test_a_step_that_takes_too_long_is_named_and_killed_with_its_children(step, tmp_path):
    said = install_failing(step, "echo before; sleep 600 & sleep 600", tmp_path)
    assert step in said and "did not end within 2 s" in said and said.endswith("before")


@pytest.mark.parametrize(
    "config",
    [
        {"post_init_cmds": ["exit 1"]},
        {"runtime_env_config": {"custom_install_cmd": 'until [ -s "$HOME/logs/LLMService.json" ]; do :; done; exit 1'}},
    ],
    ids=["post_init_cmds", "runtime"],
)
def test_a_step_that_fails_once_the_model_service_runs_leaves_none(config):
    async def main():
        async with a_sandbox() as sandbox:
            with pytest.raises(SandboxError):
                await installed(sandbox, model_service_config=SERVED, **config)
            nothing_runs(sandbox.directory)

    run(main())


def test_init_commands_and_runtime_do_not_get_the_agents_environment():
    note = 'echo "${SECRET-none} ${GREETING-none}" >>"$HOME/seen"'

    async def main():
        async with a_sandbox() as sandbox:
            agent = await installed(
                sandbox,
                env={"SECRET": "sesame"},
                pre_init_cmds=[note],
                post_init_cmds=[note],
                runtime_env_config={"custom_install_cmd": note, "env": {"GREETING": "hello"}},
            )
            return await agent.run('cat "$HOME/seen"; echo "$SECRET ${GREETING-none}"')

    assert run(main()).output.splitlines() == ["none none", "none hello", "none none", "sesame none"]


INSTALL_AGENT = 'mkdir bin && printf "#!/bin/sh\\necho mine \\"\\$1\\"\\n" >bin/ls && chmod +x bin/ls && ls new'


def test_custom_install_cmd_runs_and_the_agent_too_with_bin_dir_first_on_path():
    config = {"runtime_env_config": {"custom_install_cmd": INSTALL_AGENT + " | grep -x 'mine new'"}}

    async def main():
        async with a_sandbox() as sandbox:
            wrapped = await (await installed(sandbox, "ls ${prompt}", **config)).run("a b")
            shutil.rmtree(os.path.dirname(wrapped_dir(sandbox)))
            skipping = await installed(sandbox, "ls ${prompt}", skip_wrap_run_cmd=True, **config)
            unwrapped = await skipping.run("/dev/null")
            by_name = await installed_again(sandbox, "${bin_dir}/ls ${prompt}", skip_wrap_run_cmd=True)
            return wrapped.output, unwrapped.output, (await by_name.run("a b")).output

    assert run(main()) == ("mine a b\n", "/dev/null\n", "mine a b\n")


def wrapped_dir(sandbox):
    return os.path.join(sandbox._path("tmp"), "rock-model-service-%d" % os.getuid(), "runtime-env", "bin")


async def installed_again(sandbox, *args, **config):
    return await installed(sandbox, *args, runtime_env_config={"custom_install_cmd": "true"}, **config)


@pytest.mark.parametrize(
    "missing, runtime, message",
    [
        ("npm", {"type": "node", "custom_install_cmd": "npm install x"}, "no npm: use an image that has Node"),
        ("python3", {"pip": ["x"]}, "runtime_env_config.pip failed (exit code 127)"),
    ],
)
def test_a_runtime_that_the_sandbox_cannot_have_is_a_clear_error(missing, runtime, message, tmp_path):
    for name in {"sh", "bash", "id", "mkdir", "chmod", "rm", "mv", "sleep", "cat", "tail", "setsid", "python3"} - {
        missing
    }:
        (tmp_path / name).symlink_to(shutil.which(name))

    async def main():
        async with rock_sdk.LocalSandbox(env={"PATH": str(tmp_path)}) as sandbox:
            with pytest.raises(SandboxError) as caught:
                await installed(sandbox, runtime_env_config=runtime)
            return str(caught.value)

    assert message in run(main())


def a_wheel(directory):
    """A package that pip installs without a network and without building it."""
    path = directory / "tiny-1.0-py3-none-any.whl"
    info = "tiny-1.0.dist-info/"
    with zipfile.ZipFile(str(path), "w") as wheel:
        wheel.writestr("tiny.py", "def main():\n    print('tiny')\n")
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "entry_points.txt", "[console_scripts]\ntiny = tiny:main\n")
        wheel.writestr(info + "RECORD", "")
    return str(path)


@pytest.mark.parametrize("is_file", [False, True], ids=["packages", "requirements-file"])
def test_pip_packages_are_the_agents(is_file, tmp_path):
    wheel = a_wheel(tmp_path)
    requirements = as_file(tmp_path, "requirements.txt", "--no-index\n%s\n" % wheel)
    runtime = {"pip": requirements if is_file else ["--no-index", wheel]}

    async def main():
        async with a_sandbox() as sandbox:
            agent = await installed(sandbox, "tiny; python -c ${prompt}", runtime_env_config=runtime)
            with pytest.raises(SandboxError, match="runtime_env_config.pip failed"):
                await installed(sandbox, runtime_env_config={"pip": ["--no-index", "there-is-none"]})
            return await agent.run("import tiny; tiny.main()")

    assert run(main()).output == "tiny\ntiny\n"


# ----------------------------------------------------------------------------------------------------------------------
# Directories and placeholders.
# ----------------------------------------------------------------------------------------------------------------------

ODD_NAMES = [
    "plain",
    "a b",
    "-rf",
    "new\nline",
    "quote'\"",
    "$(touch x)",
    "*",
    "日本",
    "~",
    ".hidden",
    os.fsdecode(b"\xff"),
]


def described(root):
    """What a directory holds: path -> (mode, content or where a link points)."""
    found = {}
    for parent, directories, files in os.walk(os.fsencode(root)):
        for name in directories + files:
            path = os.path.join(parent, name)
            if os.path.islink(path):
                content = os.readlink(path)
            else:
                content = None if os.path.isdir(path) else open(path, "rb").read()
            mode = None if os.path.islink(path) else stat.S_IMODE(os.stat(path).st_mode)
            found[os.path.relpath(path, os.fsencode(root))] = (mode, content)
    return found


def test_working_dir_arrives_whole_and_anew(tmp_path):
    for number, name in enumerate(ODD_NAMES):
        (tmp_path / "sub" / "deep" / "empty").mkdir(parents=True, exist_ok=True)
        path = tmp_path / "sub" / name
        path.write_bytes(bytes(range(256)) * 40 * number)
        path.chmod([0o644, 0o755, 0o600][number % 3])
    (tmp_path / "link").symlink_to("sub/plain")
    (tmp_path / "dangling").symlink_to("/no/such/file")
    (tmp_path / "to-directory").symlink_to("sub")

    async def main():
        async with a_sandbox() as sandbox:
            agent = await installed(sandbox, working_dir=str(tmp_path))
            place = (await agent.run("pwd")).output.strip()
            assert described(place) == described(tmp_path)
            os.unlink(str(tmp_path / "link"))
            await installed(sandbox, working_dir=str(tmp_path))
            assert described(place) == described(tmp_path)

    run(main())


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, "{home}"),
        ({"project_path": "new/a b"}, "{home}/new/a b"),
        ({"working_dir": "."}, "{working_dir}"),
        ({"working_dir": ".", "use_deploy_working_dir_as_fallback": False}, "{home}"),
        ({"working_dir": ".", "project_path": "p"}, "{home}/p"),
    ],
)
def test_the_agent_runs_in_its_project_or_else_in_the_uploaded_directory(config, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    async def main():
        async with a_sandbox() as sandbox:
            agent = await installed(sandbox, "echo ${prompt}; pwd", **config)
            working_dir = os.path.join(os.path.dirname(os.path.dirname(wrapped_dir(sandbox))), "working_dir")
            place = expected.format(home=sandbox.directory, working_dir=working_dir)
            return await agent.run("x"), Observation("x\n%s\n" % place, 0, "")

    seen, wanted = run(main())
    assert seen == wanted


def test_placeholders_are_filled_in_run_cmd_env_and_init_commands(tmp_path):
    (tmp_path / "f").write_text("from working_dir\n")
    config = {
        "working_dir": str(tmp_path),
        "pre_init_cmds": ["cp ${working_dir}/f $HOME/pre"],
        "post_init_cmds": ["echo ${base_url} >$HOME/post"],
        "env": {"MY_URL": "${base_url}", "PLACE": "<<working_dir>>", "BIN": "${bin_dir}", "SHELLS": "${HOME}"},
        "model_service_config": SERVED,
    }
    run_cmd = (
        'cat "$HOME/pre" "$HOME/post" ${prompt_file}; '
        'printf "%s\\n" ${prompt} <<base_url>> "$MY_URL" "$OPENAI_BASE_URL" "$PLACE" "$BIN" ${bin_dir} "$SHELLS"'
    )

    async def main():
        async with a_sandbox() as sandbox:
            agent = await installed(sandbox, run_cmd, **config)
            url = agent.model_service.base_url
            working_dir, bin_dir = agent._working_dir, agent._bin_dir
            assert bin_dir == wrapped_dir(sandbox) and re.match(r"http://127.0.0.1:[0-9]+/v1\Z", url)
            expected = ["from working_dir", url, "hi", "hi", url, url, url, working_dir, bin_dir, bin_dir, "${HOME}"]
            return (await agent.run("hi\n")).output.split("\n"), expected

    seen, expected = run(main())
    assert [line for line in seen if line] == expected


# ----------------------------------------------------------------------------------------------------------------------
# Prompts, environments, and what they must not leave.
# ----------------------------------------------------------------------------------------------------------------------

NASTY = {
    "empty": "",
    "blank": "  ",
    "single quotes": "it's 'quoted' ''",
    "double quotes": 'say "hi" ""',
    "both": "'\"'\"'",
    "backslashes": "\\ \\\\ \\n \\' \\",
    "newlines": "\n\na\nb\n\n",
    "carriage returns": "a\r\nb\r",
    "tabs": "\ta\t\tb\t",
    "control": "".join(map(chr, range(1, 32))) + "\x7f",
    "escapes": "\x1b[31m\x03\x04\x1a\x1c",
    "substitution": "$(touch x)${HOME}$HOME$$",
    "backticks": "`touch x`",
    "history": "!! !$ !x",
    "own placeholder": "${prompt} <<prompt>> ${prompt_file}",
    "placeholders": "<<working_dir>> ${working_dir} ${base_url} ${bin_dir}",
    "formats": "%s %d %% {0} {} {prompt}",
    "leading dash": "-c --help",
    "glob": "* ? [a] ~ {a,b}",
    "separators": "a; touch x & touch x | touch x > x < x #",
    "heredoc": "<<EOF\nx\nEOF\n",
    "emoji": "\U0001f469‍\U0001f4bb \U0001f600 é",
    "lone surrogates": os.fsdecode(b"\xff\xfe caf\xe9 \xed\xa0\x80"),
    "markers": "SESSION_END\nLLM_REQUEST_END{}",
    "backreference": "\\1 \\g<0> &",
    "100 KB": "x'\n" * 34000,
    "all that fits": "y" * rock_sdk.MAX_ARGUMENT_BYTES,
}
# Says the size and the digest of its argument, so that no sandbox's ideas about output matter.
DIGEST = (
    "python3 -c 'import hashlib, os, sys; b = os.fsencode(sys.argv[1]); print(len(b), hashlib.md5(b).hexdigest())' "
)


def digest(text):
    data = os.fsencode(text)
    return "%d %s" % (len(data), hashlib.md5(data).hexdigest())


@pytest.fixture(scope="module")
def digester():
    yield from kept(DIGEST + "${prompt}")


@pytest.mark.parametrize("name", NASTY)
def test_a_prompt_reaches_the_agent_as_it_is(digester, name):
    assert run(digester.run(NASTY[name])).output.strip() == digest(NASTY[name])
    assert not os.path.exists(digester._sandbox._path("x"))


async def digests_of_all(agent):
    seen = await asyncio.gather(*(agent.run(prompt) for prompt in NASTY.values()))
    return dict(zip(NASTY, [observation.output.strip() for observation in seen]))


def test_a_prompt_reaches_an_agent_behind_a_terminal_as_it_is(tmp_path):
    async def main():
        async with RockShapedSandbox(tmp_path, http_timeout=TIMEOUT) as sandbox:
            agent = await installed(sandbox, DIGEST + "${prompt}", project_path=str(tmp_path))
            return await digests_of_all(agent)

    assert run(main()) == {name: digest(prompt) for name, prompt in NASTY.items()}
    assert not (tmp_path / "x").exists() and processes_with(str(tmp_path)) == []


@pytest.mark.parametrize("run_cmd", ['%s"${prompt}"', "%s'${prompt}'", "%s<<prompt>>", 'export A=${prompt}; %s"$A"'])
def test_a_prompt_in_quotes_of_its_own_or_in_an_assignment_is_one_word(run_cmd):
    async def main():
        async with a_sandbox() as sandbox:
            return await (await installed(sandbox, run_cmd % DIGEST)).run(NASTY["both"] + NASTY["newlines"])

    assert run(main()).output.strip() == digest(NASTY["both"] + NASTY["newlines"])


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("a\0b", "prompt: holds a NUL character.*prompt_file"),
        (
            "x" * (rock_sdk.MAX_ARGUMENT_BYTES + 1),
            "prompt: has 131072 bytes, and one argument at most 131071.*prompt_file",
        ),
        ("é" * 65536, "prompt: has 131072 bytes"),
        (b"bytes", "prompt: must be a text, got bytes"),
        (None, "prompt: must be a text"),
    ],
)
def test_a_prompt_that_no_command_line_carries_is_refused(sh, prompt, message):
    with pytest.raises(UsageError, match=message):
        run(sh.run(prompt))


@pytest.mark.parametrize("name", ["a megabyte", "all bytes", "lone surrogates", "newlines", "empty"])
def test_a_prompt_file_holds_any_prompt_and_is_removed(name):
    every = "".join(map(chr, range(128))) + "é\0"
    prompt = {"a megabyte": "12345678" * 131072, "all bytes": every, **NASTY}[name]
    read = 'import hashlib, sys; b = open(sys.argv[1], "rb").read(); print(len(b), hashlib.md5(b).hexdigest())'

    async def main():
        async with a_sandbox() as sandbox:
            seen = await (await installed(sandbox, "python3 -c '%s' ${prompt_file}" % read)).run(prompt)
            assert our_files(sandbox.directory) == []
            return seen

    assert run(main()).output.strip() == digest(prompt)


def test_values_of_the_environment_reach_the_agent_as_they_are():
    values = {"V%d" % n: value for n, value in enumerate(NASTY.values()) if "{" not in value and len(value) < 120000}
    dump = "import hashlib, json, os; print(json.dumps({k: os.environb[k.encode()].hex() for k in %r}))" % list(values)

    async def main():
        async with a_sandbox() as sandbox:
            agent = await installed(sandbox, "python3 -c ${prompt}", env=values)
            return json.loads((await agent.run(dump)).output)

    assert run(main()) == {name: os.fsencode(value).hex() for name, value in values.items()}


def test_a_key_is_in_no_process_list_and_in_no_file():
    key = "sk-" + uuid.uuid4().hex
    found = []

    def look(directory):
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open("/proc/%s/cmdline" % pid, "rb") as file:
                if key.encode() in file.read():
                    found.append("process %s" % pid)
        for parent, _, names in os.walk(directory):
            for name in names:
                with contextlib.suppress(OSError), open(os.path.join(parent, name), "rb") as file:
                    if key.encode() in file.read():
                        found.append(name)

    class Noting(rock_sdk.LocalSandbox):
        async def arun(self, cmd, **options):
            assert key not in cmd
            return await super().arun(cmd, **options)

    async def main():
        async with Noting(env={"PATH": PATH}) as sandbox:
            service = dict(SERVED, env={"OTHER_KEY": key})
            agent = await installed(sandbox, env={"MY_KEY": key}, model_service_config=service)

            def policy(request):
                look(sandbox.directory)
                return hello(request)

            seen = await agent.run(
                ASK_ONE + '; [ "$MY_KEY" = %s%s ] && echo "${OTHER_KEY-none}"' % (key[:9], "'%s'" % key[9:]), policy
            )
            look(sandbox.directory)
            return seen

    seen = run(main())
    assert seen.output == "hello\nnone\n"
    assert found == []


# ----------------------------------------------------------------------------------------------------------------------
# Runs.
# ----------------------------------------------------------------------------------------------------------------------


def agent_of_turns(prompt):
    """What the agent that runs its prompt in sh has to do, to be AGENT."""
    return "python3 -c %s %s" % (shlex.quote(AGENT), shlex.quote(prompt))


@pytest.mark.everywhere
def test_a_policy_answers_an_agents_turns(after):
    policy = Policy()
    seen = run(after.run(agent_of_turns("p"), policy))
    assert seen == Observation("'p': 3 turns were right\n", 0, "")
    assert policy.turns() == [1, 2, 3] and after.model_service.last_index == 3
    assert not after.model_service.is_started


def test_a_policy_may_be_a_coroutine_and_answer_in_text(after):
    policy = Policy()

    async def later(request):
        await asyncio.sleep(0)
        return json.dumps(policy(request))

    assert run(after.run(agent_of_turns("p"), later)).output == "'p': 3 turns were right\n"


def test_a_trainer_written_for_rock_answers_beside_the_run():
    policy = Policy()

    async def main():
        async with a_sandbox() as sandbox:
            agent = await installed(sandbox, RUN_AGENT, model_service_config=SERVED, env={"TURNS": "3"})
            return await asyncio.gather(agent.run("p"), trainer(agent.model_service, policy))

    assert run(main()) == [Observation("'p': 3 turns were right\n", 0, ""), 3]
    assert policy.turns() == [1, 2, 3]


def test_a_trainer_written_for_rock_answers_beside_a_second_run(after):
    """Its first call comes before the run has started the service again."""

    async def main():
        await after.run("true")
        both = asyncio.gather(after.run(agent_of_turns("p")), trainer(after.model_service, Policy()))
        return await asyncio.wait_for(both, TIMEOUT)

    seen, count = run(main())
    assert seen.output == "'p': 3 turns were right\n" and count == 3


def test_each_run_is_a_session_of_its_own(after):
    for prompt in ("first", "second"):
        policy = Policy()
        assert run(after.run(agent_of_turns(prompt), policy)).exit_code == 0
        assert policy.turns() == [1, 2, 3] and policy.prompts() == {prompt}


def test_runs_without_a_model_service_or_its_address(sh):
    assert run(sh.run('echo "${OPENAI_BASE_URL-none}"')) == Observation("none\n", 0, "")
    with pytest.raises(UsageError, match="call_llm needs a model service"):
        run(sh.run("true", hello))


def test_runs_at_the_same_time_do_not_meet(sh):
    async def main():
        return await asyncio.gather(*(sh.run("echo %d; exit %d" % (n, n)) for n in range(8)))

    assert [(seen.output, seen.exit_code) for seen in run(main())] == [("%d\n" % n, n) for n in range(8)]


ENDS = [
    ("echo out; echo err >&2", "out\nerr\n", 0, ""),
    ("echo half; exit 3", "half\n", 3, "exit code 3"),
    ("kill -9 $$", None, 137, "it was killed by SIGKILL (exit code 137)"),
    ("kill -9 0", "", 137, "it was killed by SIGKILL (exit code 137)"),  # and all of its group
    ("kill -SEGV $$", None, 139, "it was killed by SIGSEGV (exit code 139)"),
    ("no-such-agent", None, 127, "exit code 127"),
    ("printf 'a\\377\\000b'", "a\ufffd\0b", 0, ""),
    ("setsid sleep 600 & echo daemon", "daemon\n", 0, ""),
    ("nohup sleep 600 & exit 4", None, 4, "exit code 4"),
    ("cat", "", 0, ""),  # there is nothing on its standard input
]


@pytest.mark.everywhere
@pytest.mark.parametrize("script, output, exit_code, reason", ENDS)
def test_an_agents_end_is_told(script, output, exit_code, reason):
    async def main():
        async with a_sandbox() as sandbox:
            return await (await installed(sandbox)).run(script)

    seen = run(main())
    assert (seen.exit_code, seen.failure_reason) == (exit_code, reason)
    assert output is None or seen.output == output


@pytest.mark.parametrize(
    "script, output, exit_code, count",
    [
        ("exit 0", "", 0, 0),
        (ASK_ONE + "; exit 3", "hello\n", 3, 1),
        (ASK_ONE + "; kill -9 0", "hello\n", 137, 1),
        (ASK_ONE + "; setsid sleep 600 &", "hello\n", 0, 1),
    ],
    ids=["no call", "exit 3", "kill -9", "daemon"],
)
def test_a_session_ends_with_its_agent(script, output, exit_code, count):
    async def main():
        async with a_sandbox() as sandbox:
            agent = await installed(sandbox, model_service_config=SERVED)
            seen = await asyncio.gather(agent.run(script), trainer(agent.model_service, hello))
            assert not agent.model_service.is_started
            return seen

    seen, answered = run(main())
    assert (seen.output, seen.exit_code, answered) == (output, exit_code, count)


def test_an_agent_past_its_time_is_killed_with_its_children():
    async def main():
        async with a_sandbox() as sandbox:
            agent = await installed(sandbox, agent_run_timeout=2)
            seen = await agent.run("echo begun; sleep 600 & (sleep 600 & sleep 600) & trap '' TERM HUP; sleep 600")
            nothing_runs(sandbox.directory)
            assert our_files(sandbox.directory) == []
            return seen

    reason = "the agent did not end within 2 s, and was killed"
    assert run(main()) == Observation("begun\n", 124, reason)


def test_a_policy_is_told_the_end_of_an_agent_past_its_time():
    async def main():
        async with a_sandbox() as sandbox:
            agent = await installed(sandbox, model_service_config=SERVED, agent_run_timeout=8)
            seen = await agent.run(ASK_ONE + "; sleep 600", hello)
            nothing_runs(sandbox.directory)
            return seen, agent.model_service.last_index

    seen, answered = run(main())
    assert (seen.output, seen.exit_code, answered) == ("hello\n", 124, 1)


def test_of_much_output_the_end_is_kept(sh):
    seen = run(sh.run("head -c 20000000 /dev/zero | tr '\\0' x; echo the end"))
    assert seen.exit_code == 0 and len(seen.output) == rock_sdk.MAX_JOB_OUTPUT_BYTES
    assert seen.output.endswith("xthe end\n")


# ----------------------------------------------------------------------------------------------------------------------
# Trainers that fail, wait, leave.
# ----------------------------------------------------------------------------------------------------------------------


class Unwell(Exception):
    pass


def test_what_a_policy_raises_ends_the_agent_and_is_passed_on(after):
    def policy(_):
        raise Unwell("no GPU")

    with pytest.raises(Unwell, match="no GPU"):
        run(after.run(ASK_ONE + "; sleep 600", policy))
    assert not after.model_service.is_started


@pytest.mark.parametrize("bad", ["no JSON", 5, None, "[]"])
def test_an_answer_that_is_none_ends_the_agent_and_says_so(served, bad):
    with pytest.raises((UsageError, RockError, ValueError, TypeError)):
        run(served.run(ASK_ONE + "; sleep 600", lambda request: bad))
    nothing_runs(served._sandbox.directory)


def test_an_error_object_is_the_agents_to_handle(after):
    def policy(_):
        return {"error": {"message": "slow down", "type": "rate_limit", "code": "x", "status": 429}}

    seen = run(after.run(ASK_ONE, policy))
    assert seen.exit_code == 1 and "HTTPError" in seen.output


def test_an_answer_that_comes_when_the_agent_has_gone_gets_session_end(after):
    async def main():
        await after.model_service.start()
        running = asyncio.ensure_future(after.run(SEND_ONE + "; exit 5"))
        request = await after.model_service.anti_call_llm(0)
        seen = await running
        late = await after.model_service.anti_call_llm(1, json.dumps(hello(request)))
        again = await after.model_service.anti_call_llm(1, json.dumps(hello(request)))
        return seen.exit_code, late, again

    assert run(main()) == (5, "SESSION_END", "SESSION_END")


class Slow(rock_sdk.LocalSandbox):
    """Brings the first request of an agent only when it is told to."""

    def __init__(self):
        super().__init__(env={"PATH": PATH})
        self.may_bring = asyncio.Event()

    async def arun(self, cmd, **options):
        seen = await super().arun(cmd, **options)
        if '"messages"' in seen.output:
            await self.may_bring.wait()
        return seen


def test_a_request_that_comes_when_the_agent_has_gone_is_followed_by_session_end():
    async def main():
        async with Slow() as sandbox:
            agent = await installed(sandbox, model_service_config=SERVED)
            training = asyncio.ensure_future(trainer(agent.model_service, hello))
            seen = await agent.run(SEND_ONE + "; exit 5")
            sandbox.may_bring.set()
            return seen.exit_code, await training

    assert run(main()) == (5, 1)


def end_the_service(directory):
    with open(os.path.join(directory, "logs", "LLMService.json")) as file:
        os.kill(json.load(file)["pid"], signal.SIGKILL)


def test_a_service_that_dies_ends_the_run_with_an_error(monkeypatch):
    monkeypatch.setattr(rock_sdk, "LAST_ANSWER_SECONDS", 2.0)

    async def main():
        async with a_sandbox() as sandbox:
            agent = await installed(sandbox, model_service_config=SERVED)

            def policy(request):
                end_the_service(sandbox.directory)
                return hello(request)

            try:
                seen = await agent.run(ASK_ONE, policy)
                said = (seen.output, seen.failure_reason)
            except RockError as error:
                said = str(error)
            nothing_runs(sandbox.directory)
            return said

    said = run(main())
    assert "service" in str(said) or "exit code 1" in str(said)


class Cancelling(rock_sdk.LocalSandbox):
    """Cancels a task at one of the calls to it: before it, or after it, when its answer gets lost."""

    def __init__(self):
        super().__init__(env={"PATH": PATH})
        self.begin(None, None, None)

    def begin(self, task, call, is_after):
        self.task, self.call, self.is_after, self.calls = task, call, is_after, 0

    async def arun(self, cmd, **options):
        return await self._cancelling(super().arun(cmd, **options))

    async def upload_by_path(self, file_path, target_path):
        return await self._cancelling(super().upload_by_path(file_path, target_path))

    async def _cancelling(self, coroutine):
        self.calls += 1
        is_it = self.calls == self.call
        if is_it and not self.is_after:
            self.task.cancel()
        value = await coroutine
        if is_it and self.is_after:
            self.task.cancel()
            await asyncio.sleep(0)
        return value


async def cancel_at(sandbox, agent, call, is_after, prompt, policy=None):
    """Cancel a run at one of its calls; whether it came to that."""
    task = asyncio.ensure_future(agent.run(prompt, policy))
    sandbox.begin(task, call, is_after)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    is_cancelled = task.cancelled()
    sandbox.begin(None, None, None)
    nothing_runs(sandbox.directory)
    assert our_files(sandbox.directory) == []
    return is_cancelled


@pytest.mark.everywhere
@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_run_that_is_cancelled_leaves_nothing(call, is_after):
    """The calls: the upload of the agent's script, its start, the wait for its end."""

    async def main():
        async with Cancelling() as sandbox:
            agent = await installed(sandbox, agent_run_timeout=TIMEOUT)
            prompt = "sleep 600 & sleep 600" if (call, is_after) != (3, True) else "sleep 600 & exit"
            return await cancel_at(sandbox, agent, call, is_after, prompt)

    assert run(main())


def test_a_served_run_that_is_cancelled_leaves_nothing():
    async def main():
        async with Cancelling() as sandbox:
            agent = await installed(sandbox, model_service_config=SERVED, env={"TURNS": "3"})
            await agent.stop()
            moments = [(call, is_after) for call in range(1, 9) for is_after in (False, True)]
            prompt = agent_of_turns("p") + "; sleep 600 & sleep 0.1"
            came = [await cancel_at(sandbox, agent, *moment, prompt, Policy()) for moment in moments]
            assert (await agent.run(agent_of_turns("p"), Policy())).exit_code == 0
            return came

    # The last of them are of the clearing up: whether a run that is over is cancelled there is nobody's matter.
    assert run(main())[:12] == [True] * 12


def test_a_run_that_is_cancelled_while_the_policy_thinks_leaves_nothing(after):
    async def main():
        thinking = asyncio.Event()

        async def policy(_):
            thinking.set()
            await asyncio.Event().wait()

        task = asyncio.ensure_future(after.run(ASK_ONE + " & " + ASK_ONE, policy))
        await thinking.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not after.model_service.is_started

    run(main())


# ----------------------------------------------------------------------------------------------------------------------
# Sandboxes that are lost, trainers that are killed.
# ----------------------------------------------------------------------------------------------------------------------


def test_a_local_sandbox_that_is_lost_in_mid_turn_ends_the_run_with_a_reason():
    async def main():
        async with a_sandbox() as sandbox:
            agent = await installed(sandbox, model_service_config=SERVED)
            directory = sandbox.directory

            def policy(request):
                kill_all_of(directory)  # first: a service that is left would begin its log anew meanwhile
                shutil.rmtree(directory)
                return hello(request)

            return await agent.run(ASK_ONE, policy)

    seen = run(main())
    assert seen.exit_code == 1 and "directory" in seen.failure_reason and seen.failure_reason.endswith("is gone")


def test_a_sandbox_that_answers_no_more_ends_the_run_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(rock_sdk, "LOST_SECONDS", 3.0)

    async def main():
        async with RockShapedSandbox(tmp_path) as sandbox:
            agent = await installed(sandbox, model_service_config=SERVED)

            def policy(request):
                sandbox.is_dead = True
                return hello(request)

            return await agent.run(ASK_ONE, policy)

    seen = run(main())
    assert seen.exit_code == 1 and "connection refused" in seen.failure_reason
    assert processes_with(str(tmp_path)) == []


# The first trainer is killed when it is asked for the fourth turn; the second one goes on.
TRAINER = """
import asyncio, os, signal, sys
import rock_sdk
from sandboxes import local_sandbox
from test_rock_agent import CONTAINER, Policy, TRAINED, let_users_in

step, kind, user, place, index = sys.argv[1:]
inner = Policy()


def policy(request):
    answer = inner(request)
    print(inner.turns()[-1], flush=True)
    if step == "first" and inner.turns()[-1] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer


async def first():
    if kind == "local":
        sandbox = local_sandbox(directory=place)
    else:
        sandbox = rock_sdk.DockerSandbox(**dict(CONTAINER, user=user or None, name=place))
    await sandbox.start()
    if kind == "docker":
        let_users_in(place)
    await sandbox.agent.install(TRAINED)
    await sandbox.agent.run("p", policy)


async def second():
    if kind == "local":
        sandbox = await rock_sdk.LocalSandbox.attach(place)
    else:
        sandbox = await rock_sdk.DockerSandbox.attach(place, user=user or None)
    service = rock_sdk.ModelService(sandbox, TRAINED["model_service_config"])
    await service.install()
    await service.start(resume=True)
    last = await service.run(policy, index=int(index))
    said = await sandbox.arun('cat "${TMPDIR:-/tmp}/result"')
    await service.stop()
    await sandbox.stop()
    print(last, said.output.strip())


asyncio.run(first() if step == "first" else second())
"""
TRAINED = {
    "run_cmd": RUN_AGENT + ' >"${TMPDIR:-/tmp}/result" 2>&1',
    "env": {"TURNS": "6"},
    "model_service_config": SERVED,
}
CONTAINER = {"image": IMAGE, "network": "none", "lifetime_seconds": 600}


def train(tmp_path, *words):
    """(exit code, lines of output) of a trainer in a process of its own."""
    paths = [os.path.dirname(SCRIPT), os.path.dirname(os.path.abspath(__file__))]
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, *words],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(paths), TMPDIR=str(tmp_path)),
        cwd=str(tmp_path),
        stdout=subprocess.PIPE,
        timeout=3 * TIMEOUT,
    )
    return done.returncode, done.stdout.decode("utf-8").splitlines()


@pytest.mark.parametrize("index", [3, 1], ids=["up to date", "an older note"])
@pytest.mark.parametrize(
    "kind, user",
    [
        ("local", ""),
        pytest.param("docker", "", marks=pytest.mark.docker),
        pytest.param("docker", "1234:1234", marks=pytest.mark.docker),
    ],
)
def test_a_trainer_that_was_killed_comes_back_to_its_agents_session(kind, user, index, tmp_path):
    if kind == "docker":
        need_engine()
    place = "rock-test-" + uuid.uuid4().hex[:12] if kind == "docker" else str(tmp_path / "sandbox")
    try:
        exit_code, answered = train(tmp_path, "first", kind, user, place, "0")
        assert exit_code == -signal.SIGKILL and answered == ["1", "2", "3", "4"]
        exit_code, (*answered, result) = train(tmp_path, "second", kind, user, place, str(index))
        assert exit_code == 0 and answered == [str(turn) for turn in range(index + 1, 7)]
        assert result == "6 'p': 6 turns were right"
        # An engine keeps processes of its own about a container for a while.
        assert not is_container(place) if kind == "docker" else processes_with(place) == []
    finally:
        if kind == "docker":
            remove_container(place)
        else:
            kill_all_of(place)


def is_container(name):
    return subprocess.run(["docker", "inspect", name], stdout=subprocess.PIPE, stderr=subprocess.PIPE).returncode == 0


def let_users_in(name):
    """The root directory of the image bare-python is its owner's alone."""
    subprocess.run(["docker", "exec", "--user=0", name, "chmod", "755", "/"], check=True)


def remove_container(name):
    subprocess.run(["docker", "rm", "--force", name], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ----------------------------------------------------------------------------------------------------------------------
# Other sandboxes, many sandboxes, other threads, an upstream.
# ----------------------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def a_container(**options):
    """A container of which nothing is left."""
    need_engine()
    sandbox = rock_sdk.DockerSandbox(**dict(CONTAINER, **options))
    try:
        async with sandbox:
            let_users_in(sandbox.sandbox_id)
            yield sandbox
        assert not is_container(sandbox.sandbox_id)
    finally:
        remove_container(sandbox.sandbox_id)


@pytest.mark.docker
@pytest.mark.parametrize("user", [None, "1234:1234"])
def test_an_agent_of_several_turns_in_a_container(user):
    policy, rocks = Policy(), Policy()

    async def main():
        async with a_container(user=user) as sandbox:
            agent = await installed(sandbox, RUN_AGENT, model_service_config=SERVED, env={"TURNS": "6"})
            seen = await agent.run("it's", policy)
            assert not agent.model_service.is_started
            await agent.model_service.start()
            by_rocks_loop, count = await asyncio.gather(agent.run("p"), trainer(agent.model_service, rocks))
            by_hand = await step_by_step(sandbox)
            running = await sandbox.arun("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
            files = await sandbox.arun(
                "find /tmp/rock-model-service-*/jobs /tmp/rock-model-service-*/prompt-* 2>/dev/null"
            )
            assert "python" not in running.output and len(files.output.splitlines()) == 1
            return seen, by_rocks_loop, count, by_hand

    seen, by_rocks_loop, count, by_hand = run(main())
    assert seen == Observation('"it\'s": 6 turns were right\n', 0, "") and policy.turns() == [1, 2, 3, 4, 5, 6]
    assert (by_rocks_loop.output, count, rocks.turns()) == ("'p': 6 turns were right\n", 6, [1, 2, 3, 4, 5, 6])
    assert by_hand == "'q': 4 turns were right"


async def step_by_step(sandbox):
    """An agent that is started by hand, with each method of the model service; what it said."""
    service = rock_sdk.ModelService(sandbox, SERVED)
    await service.install()
    await service.start()
    environ = "OPENAI_BASE_URL=%s TURNS=4" % service.base_url
    script = "%s %s >/tmp/said 2>&1 & echo $!" % (environ, agent_of_turns("q"))
    pid = (await sandbox.arun("%s" % script)).output.strip()
    await service.watch_agent(pid)
    assert await service.run(Policy()) == 4
    await service.stop()
    return (await sandbox.arun("cat /tmp/said")).output.strip()


@pytest.mark.docker
def test_prompts_reach_an_agent_in_a_container_as_they_are():
    async def main():
        async with a_container() as sandbox:
            return await digests_of_all(await installed(sandbox, DIGEST + "${prompt}"))

    assert run(main()) == {name: digest(prompt) for name, prompt in NASTY.items()}


@pytest.mark.docker
def test_a_container_that_is_removed_in_mid_turn_ends_the_run_with_a_reason():
    async def main():
        async with a_container() as sandbox:
            agent = await installed(sandbox, model_service_config=SERVED)

            def policy(request):
                remove_container(sandbox.sandbox_id)
                return hello(request)

            return await agent.run(ASK_ONE, policy)

    seen = run(main())
    assert seen.exit_code == 1 and "the container is gone" in seen.failure_reason


@pytest.mark.docker
def test_an_agent_past_its_time_in_a_container_is_killed_with_its_children():
    async def main():
        async with a_container() as sandbox:
            agent = await installed(sandbox, agent_run_timeout=1)
            seen = await agent.run("sleep 611 & (sleep 611 & sleep 611) & sleep 611")
            ps = await sandbox.arun("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
            return seen.exit_code, ps.output

    exit_code, running = run(main())
    assert exit_code == 124 and "611" not in running


def test_an_agent_of_several_turns_in_a_sandbox_as_rocks(tmp_path):
    policy = Policy()

    async def main():
        async with RockShapedSandbox(tmp_path) as sandbox:
            config = {"model_service_config": SERVED, "env": {"TURNS": "6"}, "project_path": str(tmp_path / "p")}
            agent = await installed(sandbox, RUN_AGENT, **config)
            return await asyncio.gather(agent.run("it's"), trainer(agent.model_service, policy))

    seen, count = run(main())
    assert (seen.output.strip(), seen.exit_code, count) == ('"it\'s": 6 turns were right', 0, 6)
    assert policy.turns() == [1, 2, 3, 4, 5, 6] and processes_with(str(tmp_path)) == []


@pytest.mark.once
def test_two_dozen_sandboxes_at_once_do_not_meet():
    count, turns = 24, 3

    async def episode(number):
        policy = Policy()
        async with a_sandbox() as sandbox:
            agent = await installed(sandbox, RUN_AGENT, model_service_config=SERVED, env={"TURNS": str(turns)})
            seen = await agent.run("agent %d" % number, policy)
        assert policy.prompts() == {"agent %d" % number} and policy.turns() == list(range(1, turns + 1))
        return seen

    async def main():
        return await asyncio.gather(*(episode(number) for number in range(count)))

    seen = asyncio.run(asyncio.wait_for(main(), 3 * TIMEOUT))
    said = ["'agent %d': %d turns were right\n" % (number, turns) for number in range(count)]
    assert seen == [Observation(text, 0, "") for text in said]


def test_works_in_a_thread_that_is_not_the_main_one():
    async def main():
        async with a_sandbox() as sandbox:
            agent = await installed(sandbox, RUN_AGENT, model_service_config=SERVED, env={"TURNS": "2"})
            return await agent.run("p", Policy())

    assert Later(lambda: run(main())).result() == Observation("'p': 2 turns were right\n", 0, "")


def proxied(url, key):
    """A model service that asks an upstream, with a key that is its own."""
    start = "rock model-service start --type ${type} --proxy-base-url %s" % url
    env = {"ROCK_MODEL_SERVICE_UPSTREAM_API_KEY": key, "ROCK_MODEL_SERVICE_TRAJ_APPEND_MODE": "true"}
    return {"enabled": True, "type": "proxy", "start_cmd": start, "env": env}


def test_an_agent_with_an_upstream_of_its_own_never_has_the_key(upstream):
    key = "sk-" + uuid.uuid4().hex
    upstream.script(answer(completion("p, turn 1")), sse(*words("p, ", "turn 2")))

    async def main():
        async with a_sandbox() as sandbox:
            env = {"TURNS": "2", "OPENAI_API_KEY": "mine"}
            agent = await installed(sandbox, model_service_config=proxied(upstream.url, key), env=env)
            seen = await agent.run(agent_of_turns("p") + "; env")
            nothing_runs(sandbox.directory)
            with open(sandbox._path("logs/LLMTraj.jsonl")) as file:
                return seen, [json.loads(line)["status"] for line in file]

    seen, statuses = run(main())
    assert seen.output.startswith("'p': 2 turns were right\n") and key not in seen.output
    assert "OPENAI_API_KEY=mine" in seen.output and statuses == [200, 200]
    assert [dict(request["headers"])["authorization"] for request in upstream.seen(2)] == ["Bearer " + key] * 2


# ----------------------------------------------------------------------------------------------------------------------
# What is said on the way.
# ----------------------------------------------------------------------------------------------------------------------


def test_progress_is_logged(caplog):
    caplog.set_level(logging.INFO, "rock_sdk")

    async def main():
        async with a_sandbox() as sandbox:
            agent = await installed(sandbox, pre_init_cmds=["true"], model_service_config=SERVED)
            await agent.run(ASK_ONE + "; exit 3", hello)
            return sandbox.sandbox_id

    name = run(main())
    said = [record.getMessage() for record in caplog.records if record.name == "rock_sdk"]
    assert all(line.startswith("[%s] " % name) for line in said)
    for part in (
        "installing the agent",
        "running pre_init_cmds 1 of 1",
        "model service installed",
        "model service started: http://127.0.0.1:",
        "agent installed",
        "the agent has started (pid ",
        "the session has ended after 1 requests",
        "the agent has ended: exit code 3",
    ):
        assert [line for line in said if part in line], (part, said)


QUIET = """
import asyncio
from sandboxes import local_sandbox

async def main():
    async with local_sandbox() as sandbox:
        await sandbox.agent.install({"run_cmd": "echo ${prompt}; exit 3", "model_service_config": {"enabled": True}})
        assert (await sandbox.agent.run("hello")).output == "hello\\n"

asyncio.run(main())
"""


def test_nothing_is_printed_by_default():
    paths = [os.path.dirname(SCRIPT), os.path.dirname(os.path.abspath(__file__))]
    done = subprocess.run(
        [sys.executable, "-c", QUIET],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(paths)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=2 * TIMEOUT,
    )
    assert (done.returncode, done.stdout) == (0, b"")
