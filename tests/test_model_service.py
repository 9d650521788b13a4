"""The model service of a sandbox, driven from outside: in a LocalSandbox, and in the stand-in for ROCK's own."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

import rock_ms
import rock_sdk
from rock_ms import SESSION_END_MARKER, NotYet, RockError, UsageError
from rock_sdk import DockerSandbox, ModelService, SandboxError, SandboxGone, StateError
from sandboxes import IMAGE, PATH, RockShapedSandbox, Seen, local_sandbox, need_engine, run
from support import SCRIPT, TIMEOUT, Later, ask, chat, completion, wait_until

pytestmark = pytest.mark.load

KINDS = ["local", "rock"]
HOME_NAME = "%s-%d" % (rock_sdk.HOME_NAME, os.getuid())
locally = pytest.mark.parametrize("shared_place", ["local"], indirect=True)
in_a_cluster = pytest.mark.parametrize("shared_place", ["rock"], indirect=True)


def make_sandbox(kind, directory, env=None, cls=RockShapedSandbox, **options):
    """A sandbox in a directory of the test's."""
    directory = os.path.join(os.path.realpath(str(directory)), "sandbox")
    os.makedirs(directory, exist_ok=True)
    if kind == "local":
        return local_sandbox(directory=directory, env=env or {})
    return cls(directory, env=env, **options)


@contextlib.asynccontextmanager
async def sandbox_of(*args, **options):
    """A sandbox that runs, and leaves no process behind."""
    async with make_sandbox(*args, **options) as sandbox:
        yield sandbox
    assert commands_in(sandbox) == {}


@contextlib.contextmanager
def place_of(*args, **options):
    """A Place, for several event loops."""
    sandbox = make_sandbox(*args, **options)
    run(sandbox.__aenter__())
    try:
        place = Place(sandbox)
        run(place.begin())
        yield place
    finally:
        run(sandbox.stop())
    assert commands_in(sandbox) == {}


def commands_in(sandbox):
    """The processes of a sandbox, by number: their command lines, without the shells that the stand-in keeps."""
    mark = re.compile(
        b"%s\\w*=%s\\Z" % (rock_sdk.SANDBOX_DIR_VARIABLE.encode(), re.escape(os.fsencode(sandbox.directory)))
    )
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            with open("/proc/%s/environ" % pid, "rb") as file:
                is_in_it = any(map(mark.match, file.read().split(b"\0")))
            with open("/proc/%s/cmdline" % pid, "rb") as file:
                words = file.read().split(b"\0")[:-1]
            if is_in_it and words and words[:2] != [b"bash", b"--noprofile"]:
                found[int(pid)] = os.fsdecode(b" ".join(words))
    return found


def services_in(sandbox):
    return [pid for pid, command in commands_in(sandbox).items() if " --foreground " in command]


def others_in(sandbox):
    """Its processes beside the service."""
    return {pid: command for pid, command in commands_in(sandbox).items() if " --foreground " not in command}


def files_in(sandbox):
    """Every file in a sandbox that is neither its installation nor the service's data, by path."""
    found = []
    for folder, _, names in os.walk(sandbox.directory):
        found += [os.path.relpath(os.path.join(folder, name), sandbox.directory) for name in names]
    return sorted(name for name in found if not re.search(r"/(bin|lib)/|\Alogs/|\A\.rock-sandbox\Z", name))


def answer_files_in(sandbox):
    return [name for name in files_in(sandbox) if "answer-" in name]


class Place:
    """A sandbox, a model service in it, and an agent on this machine that asks it."""

    def __init__(self, sandbox, config=None):
        self.sandbox = sandbox
        self.service = ModelService(sandbox, config)
        self.index = 0  # of the last request that the trainer has seen
        self.is_reusable = True
        self._asked = []

    async def begin(self):
        """Install and start."""
        await self.service.install()
        await self.service.start()
        self.index = 0
        self.is_reusable = True

    @property
    def port(self):
        return int(self.service.base_url.rsplit(":", 1)[1].split("/")[0])

    @property
    def arun_calls(self):
        return len(self.sandbox.calls)

    def ask_later(self, body=None):
        """Ask; what no other call asks, where no body is given: that might count as a repetition of the one before."""
        body = chat("question %d of this place" % len(self._asked)) if body is None else body
        self._asked.append(Later(lambda: ask(self.port, body)))
        return self._asked[-1]

    async def next(self, answer=None, **options):
        """Answer the last request, where there is an answer, and wait for the next."""
        text = await self.service.anti_call_llm(self.index, answer, **options)
        self.index += 1
        return json.loads(text)

    async def answer(self, answer, **options):
        """Answer the last request, when no other comes."""
        with pytest.raises(NotYet):
            await self.service.anti_call_llm(self.index, answer, call_timeout=0.01, **options)

    async def turn(self, answer, body=None):
        """What the trainer got as request, and the agent as answer."""
        call = self.ask_later(body)
        request = await self.next()
        await self.answer(answer)
        return request, call.result()

    def log(self):
        return rock_ms.MarkerLog(os.path.join(self.sandbox.directory, "logs", "LLMService.log"))

    def logged(self):
        """The kind and index of all that stands in the log."""
        return [(record.kind, record.index) for record in self.log().tail().read()]

    def is_quiet(self):
        return self.is_reusable and all(call.is_done() for call in self._asked)


@pytest.fixture(scope="module", params=KINDS)
def shared_place(request, tmp_path_factory):
    """A place with a service that tests use one after the other."""
    with place_of(request.param, tmp_path_factory.mktemp(request.param)) as place:
        yield place


@pytest.fixture
def place(shared_place):
    """It with all requests answered, in whatever session."""
    if not (shared_place.is_quiet() and shared_place.service.is_started and services_in(shared_place.sandbox)):
        run(shared_place.begin())
    yield shared_place
    assert wait_until(lambda: not others_in(shared_place.sandbox), "the end of all commands")
    assert files_in(shared_place.sandbox) == []


def text(value="hello", **more):
    return json.dumps(completion(value, **more))


def content(got):
    return got.json()["choices"][0]["message"]["content"]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


# An agent of several turns, as a process of its own.
AGENT = """\
import json, sys, urllib.request

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
said = "task"
for number in range(int(sys.argv[2])):
    body = {"model": "m", "messages": [{"role": "user", "content": "%s %d" % (said, number)}]}
    request = urllib.request.Request(
        sys.argv[1] + "/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    said = json.load(opener.open(request, timeout=60))["choices"][0]["message"]["content"]
    print(said, flush=True)
"""


@contextlib.contextmanager
def agent_process(place, turns=3):
    """An agent that asks so often, each time with what it was answered before."""
    process = subprocess.Popen(
        [sys.executable, "-c", AGENT, place.service.base_url, str(turns)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def echo(request):
    """A policy that says what it was asked."""
    return completion("re: " + request["messages"][-1]["content"])


ECHOED = b"re: task 0\nre: re: task 0 1\nre: re: re: task 0 1 2\n"


# The states of a service --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, why",
    [
        (lambda service: service.start(), "cannot start the model service: it is not installed: call install() first"),
        (
            lambda service: service.watch_agent(1),
            "cannot watch an agent: the model service is not started: call start()",
        ),
        (lambda service: service.anti_call_llm(0), "cannot ask for LLM calls: the model service is not started"),
        (
            lambda service: service.anti_call_llm(1, text()),
            "cannot ask for LLM calls: the model service is not started",
        ),
        (lambda service: service.run(echo), "cannot ask for LLM calls: the model service is not started"),
    ],
)
def test_a_method_before_its_time_says_what_is_missing_and_asks_nothing_of_the_sandbox(tmp_path, call, why):
    sandbox = RockShapedSandbox(tmp_path)
    with pytest.raises(RuntimeError, match=re.escape("[%s] %s" % (sandbox.sandbox_id, why))) as caught:
        run(call(ModelService(sandbox)))
    assert caught.type is StateError
    assert sandbox.calls == []


def test_stopping_what_was_never_started_does_nothing(tmp_path):
    sandbox = RockShapedSandbox(tmp_path)
    run(ModelService(sandbox).stop())
    assert sandbox.calls == []


def test_the_service_takes_its_configuration_as_object_or_mapping(tmp_path):
    sandbox = RockShapedSandbox(tmp_path)
    config = rock_sdk.ModelServiceConfig(type="proxy")
    assert ModelService(sandbox, config).config is config
    assert ModelService(sandbox, {"type": "proxy"}).config == config
    assert ModelService(sandbox).config == rock_sdk.ModelServiceConfig()


@pytest.mark.parametrize("kind", KINDS)
def test_install_start_and_stop_may_each_be_repeated(tmp_path, kind):
    async def scenario():
        async with sandbox_of(kind, tmp_path) as sandbox:
            service = ModelService(sandbox)
            await service.install()
            installed = sorted(os.walk(os.path.join(sandbox.directory)))
            await service.install()
            assert service.is_installed
            assert not service.is_started
            assert sorted(os.walk(os.path.join(sandbox.directory))) == installed

            await service.start()
            (first,) = services_in(sandbox)
            await service.start()
            (second,) = services_in(sandbox)
            assert first != second
            assert service.is_started
            assert service.base_url.startswith("http://127.0.0.1:")

            await service.stop()
            await service.stop()
            assert not service.is_started
            assert commands_in(sandbox) == {}
            with pytest.raises(StateError):
                await service.anti_call_llm(0)
            await service.start()
            assert len(services_in(sandbox)) == 1

    run(scenario())


def test_no_call_of_a_whole_life_is_one_that_rock_polls_for(tmp_path):
    async def scenario():
        async with sandbox_of("rock", tmp_path) as sandbox:
            place = Place(sandbox)
            await place.begin()
            await place.turn(text())
            await place.service.stop()
            assert {mode for mode, _ in sandbox.calls} == {"normal"}
            assert max(len(command) for _, command in sandbox.calls) < rock_sdk.MAX_ARGUMENT_BYTES

    run(scenario())


# Templates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, spelling", [("local", "${%s}"), ("rock", "<<%s>>")])
def test_templates_that_were_written_for_rock_work_unchanged(tmp_path, kind, spelling):
    port = free_port()
    config = {
        "start_cmd": "rock model-service start --type local --host 0.0.0.0 --port %d" % port,
        "stop_cmd": "rock model-service stop",
        "watch_agent_cmd": "rock model-service watch-agent --pid ${pid} --host 127.0.0.1 --port %d" % port,
        "anti_call_llm_cmd": "PYTHONWARNINGS=ignore rock model-service anti-call-llm --index ${index} "
        "--response ${response_payload}",
        "anti_call_llm_cmd_no_response": "PYTHONWARNINGS=ignore rock model-service anti-call-llm --index ${index}",
        "config_ini_cmd": "mkdir -p ~/.rock && touch ~/.rock/config.ini",
    }
    config = {
        name: re.sub(r"\$\{(\w+)\}", lambda match: spelling % match.group(1), cmd) for name, cmd in config.items()
    }

    async def scenario():
        async with sandbox_of(kind, tmp_path) as sandbox:
            place = Place(sandbox, config)
            await place.begin()
            assert place.service.base_url == "http://127.0.0.1:%d/v1" % port
            assert os.path.exists(os.path.join(sandbox.directory, ".rock", "config.ini"))
            with agent_process(place) as agent:
                await place.service.watch_agent(str(agent.pid))
                assert await place.service.run(echo) == 3
                assert agent.communicate() == (ECHOED, b"")
            await place.service.stop()

    run(scenario())


@pytest.mark.parametrize(
    "template",
    ["--response=${response_payload} --index=${index}", "--index '${index}' --response '${response_payload}'"]
    + ['--response "${response_payload}" --index "${index}" || exit $?'],
)
def test_the_answer_may_stand_anywhere_in_its_template(place, template):
    usual = place.service.config
    place.service.config = rock_sdk.ModelServiceConfig(anti_call_llm_cmd="rock model-service anti-call-llm " + template)
    try:
        for answer in ("it's '$HOME'", "x" * 40000):
            assert content(run(place.turn(text(answer)))[1]) == answer
    finally:
        place.service.config = usual


# Installation -------------------------------------------------------------------------------------------------------


NO_ROCK = "true"
ANOTHER_ROCK = "printf '#!/bin/sh\\necho another rock' >mine/rock"
OUR_ROCK = "printf '#!/bin/sh\\n>>$HOME/used\\nexec %s %s \"$@\"' >mine/rock" % (sys.executable, SCRIPT)


@pytest.mark.parametrize(
    "kind, install_cmd, is_used",
    [("local", NO_ROCK, False), ("local", ANOTHER_ROCK, False), ("local", OUR_ROCK, True), ("rock", OUR_ROCK, True)],
    ids=["nothing", "another rock", "ours", "ours in a cluster"],
)
def test_install_cmd_is_run_and_its_rock_is_used_where_it_can_be(tmp_path, kind, install_cmd, is_used):
    install_cmd = "touch $HOME/was-run; cd; mkdir mine; %s; chmod -R 755 mine" % install_cmd

    async def scenario():
        mine = os.path.join(os.path.realpath(str(tmp_path)), "sandbox", "mine")
        # Beside the interpreter there may be a `rock` of ours, installed.
        python = tmp_path / "python"
        python.mkdir()
        (python / "python3").symlink_to(os.path.realpath(sys.executable))
        path = os.pathsep.join([mine, str(python), "/usr/bin", "/bin"])
        async with sandbox_of(kind, tmp_path, env={"PATH": path}) as sandbox:
            place = Place(sandbox, {"install_cmd": install_cmd})
            await place.begin()
            assert os.path.exists(os.path.join(sandbox.directory, "was-run"))
            assert os.path.exists(os.path.join(sandbox.directory, "used")) == is_used
            assert bool(uploaded(sandbox)) != is_used
            assert (await place.turn(text("hi")))[1].status == 200

    run(scenario())


def uploaded(sandbox):
    return [folder for folder, _, names in os.walk(sandbox.directory) if "rock_ms.py" in names]


def test_an_upload_takes_the_place_of_what_an_earlier_install_cmd_brought(tmp_path):
    async def scenario():
        async with sandbox_of("local", tmp_path) as sandbox:
            await ModelService(sandbox).install()
            bin_dir = os.path.join(os.path.dirname(uploaded(sandbox)[0]), "bin")
            stale = "printf '#!/bin/sh\\nexit 9' >%s/rock; chmod +x %s/rock" % (bin_dir, bin_dir)
            place = Place(sandbox, {"install_cmd": stale})
            await place.begin()
            assert (await place.turn(text()))[1].status == 200

    run(scenario())


FAILING_INSTALLATIONS = [
    ({"install_cmd": "echo out; echo err >&2; exit 3"}, r"install_cmd failed \(exit code 3\): out\s+err\Z"),
    ({"install_cmd": "kill -9 $$"}, r"install_cmd failed \(it was killed by SIGKILL \(exit code 137\)\): \Z"),
    ({"install_cmd": "pip-of-nowhere install x"}, r"install_cmd failed \(exit code 127\): .*pip-of-nowhere"),
    ({"config_ini_cmd": "echo full >&2; false"}, r"config_ini_cmd failed \(exit code 1\): full\Z"),
    ({"install_cmd": "echo '%s' | tr x y; exit 1" % ("x" * 5000)}, r"install_cmd failed \(exit code 1\): y{2000}\Z"),
]


@pytest.mark.parametrize(
    "kind, config, message",
    [("local", *failing) for failing in FAILING_INSTALLATIONS] + [("rock", *FAILING_INSTALLATIONS[0])],
)
def test_an_installation_that_fails_says_what_its_command_said(tmp_path, kind, config, message):
    async def scenario():
        async with sandbox_of(kind, tmp_path) as sandbox:
            service = ModelService(sandbox, config)
            with pytest.raises(SandboxError, match=r"\A\[%s\] %s" % (sandbox.sandbox_id, message)):
                await service.install()
            assert not service.is_installed
            wait_until(lambda: commands_in(sandbox) == {}, "the end of its processes")
            assert files_in(sandbox) == []

    run(scenario())


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_installation_leaves_running_ends_with_it(tmp_path, kind):
    async def scenario():
        async with sandbox_of(kind, tmp_path) as sandbox:
            with pytest.raises(SandboxError, match=r"install_cmd failed \(exit code 4\): bad\Z"):
                await ModelService(sandbox, {"install_cmd": "echo bad; sleep 600 & exit 4"}).install()
            wait_until(lambda: commands_in(sandbox) == {}, "the end of its processes")

    run(scenario())


@pytest.mark.parametrize("kind", KINDS)
def test_an_installation_that_takes_too_long_is_killed_and_says_what_its_command_said(tmp_path, kind):
    async def scenario():
        async with sandbox_of(kind, tmp_path) as sandbox:
            service = ModelService(sandbox, {"install_cmd": "echo why; sleep 600 & sleep 600", "install_timeout": 0.5})
            message = r"install_cmd failed \(install_cmd did not end within 0.5 s, and was killed\): why\Z"
            with pytest.raises(SandboxError, match=message):
                await service.install()
            wait_until(lambda: commands_in(sandbox) == {})
            assert files_in(sandbox) == []

    run(scenario())


def hostile_module(name):
    return "import sys\nsys.stdout.write('{0} of the agent')\nraise SystemExit('{0} of the agent')\n".format(name)


@pytest.mark.parametrize("kind", KINDS)
def test_no_module_of_the_agents_reaches_the_service(tmp_path, kind):
    modules = tmp_path / "modules"
    modules.mkdir()
    for name in ("json", "re", "rock_ms", "sitecustomize", "usercustomize", "startup"):
        (modules / (name + ".py")).write_text(hostile_module(name))
    env = {"PYTHONPATH": str(modules), "PYTHONSTARTUP": str(modules / "startup.py"), "PYTHONINSPECT": "1"}

    async def scenario():
        async with sandbox_of(kind, tmp_path, env=env) as sandbox:
            for name in os.listdir(str(modules)):
                shutil.copy(str(modules / name), sandbox.directory)  # where its commands run
            place = Place(sandbox)
            await place.begin()
            assert (await place.turn(text("hi")))[1].status == 200
            await place.service.stop()

    run(scenario())


@pytest.mark.parametrize("kind", KINDS)
def test_any_name_of_the_temporary_directory_will_do(tmp_path, kind):
    tmpdir = os.path.join(os.path.realpath(str(tmp_path)), "sandbox", "a 'b' \"c\" it's `d` $e ${f} \\ é")
    os.makedirs(tmpdir)

    async def scenario():
        async with sandbox_of(kind, tmp_path, env={"TMPDIR": tmpdir}) as sandbox:
            place = Place(sandbox)
            await place.begin()
            for answer in ("hi", "x" * 40000):
                _, got = await place.turn(text(answer))
                assert content(got) == answer
            assert uploaded(sandbox) == [os.path.join(tmpdir, HOME_NAME, "lib")]
            assert files_in(sandbox) == []

    run(scenario())


OLD_PYTHONS = {
    "python3": ("3.6.15", "/root/.pyenv/versions/3.6.15"),
    "python": ("2.7.18", "/root/.pyenv/versions/2.7.18"),
}


def need_old_pythons():
    if not all(os.path.exists(home) for _, home in OLD_PYTHONS.values()):
        pytest.skip("this machine has not both Python 3.6.15 and 2.7.18 below /root/.pyenv")


def test_a_python_that_is_too_old_is_passed_over(tmp_path):
    need_old_pythons()
    directory = tmp_path / "old"
    directory.mkdir()
    for name, (_, home) in OLD_PYTHONS.items():
        os.symlink(home + "/bin/python", str(directory / name))
    os.symlink(sys.executable, str(directory / ("python3.%d" % sys.version_info[1])))

    async def scenario():
        async with sandbox_of("local", tmp_path, env={"PATH": "%s:/usr/bin:/bin" % directory}) as sandbox:
            place = Place(sandbox)
            await place.begin()
            assert (await place.turn(text()))[1].status == 200

    run(scenario())


@pytest.mark.docker
@pytest.mark.parametrize("has_old", [False, True])
def test_an_image_without_a_python_of_today_is_an_error_that_says_what_it_has(has_old):
    need_engine()
    pythons = OLD_PYTHONS if has_old else {}
    if has_old:
        need_old_pythons()
    found = ", ".join(sorted("/usr/bin/%s (%s)" % (name, version) for name, (version, _) in pythons.items()))
    volumes = tuple("--volume=%s:%s:ro" % (home, home) for _, home in pythons.values())

    async def scenario():
        async with DockerSandbox(IMAGE, network="none", docker_args=volumes) as sandbox:
            await sandbox.arun("rm -f /usr/bin/python* /usr/local/bin/python*")
            for name, (_, home) in pythons.items():
                await sandbox.arun("ln -s %s/bin/python /usr/bin/%s" % (home, name))
            message = "[%s] the sandbox has no Python 3.7 or newer (found: %s): use an image that has one, "
            message += "or give install_cmd"
            with pytest.raises(SandboxError) as caught:
                await ModelService(sandbox).install()
            assert str(caught.value) == message % (sandbox.sandbox_id, found or "none")

    run(scenario())


# What the service logs, and its environment -------------------------------------------------------------------------


def test_its_own_log_has_the_path_and_the_name_that_are_configured(tmp_path):
    logs = str(tmp_path / "my logs")

    async def scenario():
        async with sandbox_of("local", tmp_path) as sandbox:
            place = Place(sandbox, {"logging_path": logs, "logging_file_name": "mine.log"})
            await place.begin()
            assert os.listdir(logs) == ["mine.log"]
            await place.service.stop()

    run(scenario())


@pytest.mark.parametrize("data_dir", [None, "", "elsewhere"])
def test_without_a_path_the_log_is_where_the_service_can_write(tmp_path, data_dir):
    env = {} if data_dir is None else {"ROCK_MODEL_SERVICE_DATA_DIR": data_dir and str(tmp_path / data_dir)}
    if data_dir == "" and os.access("/", os.W_OK):
        pytest.skip("this user can write /data/logs, which is then used")

    async def scenario():
        async with sandbox_of("local", tmp_path, env=env) as sandbox:
            service = ModelService(sandbox)
            await service.install()
            await service.start()
            expected = {None: "logs", "": ".rock/logs", "elsewhere": str(tmp_path / "elsewhere")}[data_dir]
            assert os.path.exists(os.path.join(sandbox.directory, expected, "model_service.log"))
            await service.stop()

    run(scenario())


@pytest.mark.parametrize("kind", KINDS)
def test_env_reaches_the_service_and_no_process_list_and_no_file_that_stays(tmp_path, kind):
    seen = []

    class Watched(RockShapedSandbox):
        async def arun(self, cmd, *args, **options):
            seen.append(cmd)
            return await super().arun(cmd, *args, **options)

    async def scenario():
        async with sandbox_of(kind, tmp_path, cls=Watched) as sandbox:
            env = {"SESAME_KEY": "open it's $HOME", "REQUEST_TIMEOUT": "0.05"}
            place = Place(sandbox, {"env": env, "start_cmd": "ls -R $TMPDIR >$HOME/seen; rock model-service start"})
            await place.begin()
            with open(os.path.join(sandbox.directory, "seen")) as file:
                assert ".sh" not in file.read().replace("rock_ms", "")
            (pid,) = services_in(sandbox)
            with open("/proc/%d/environ" % pid, "rb") as file:
                assert b"SESAME_KEY=open it's $HOME" in file.read().split(b"\0")
            assert place.ask_later().result().status == 504
            assert not any("open it" in command for command in [*commands_in(sandbox).values(), *seen])
            for folder, _, names in os.walk(sandbox.directory):
                for name in names:
                    with open(os.path.join(folder, name), "rb") as file:
                        assert b"open it's" not in file.read()
            await place.service.stop()

    run(scenario())


@pytest.mark.parametrize(
    "env",
    [
        {"ROCK_MODEL_SERVICE_API_KEY": "sesame-of-the-service"},
        {"ROCK_MODEL_SERVICE_DATA_DIR": "logs2"},
    ],
    ids=lambda env: next(iter(env)),
)
def test_a_setting_in_env_that_the_other_commands_need_reaches_them_too(tmp_path, env):
    env = {name: str(tmp_path / "sandbox" / value) if value == "logs2" else value for name, value in env.items()}

    async def scenario():
        async with sandbox_of("local", tmp_path) as sandbox:
            place = Place(sandbox, {"env": env})
            await place.begin()
            headers = {"Authorization": "Bearer sesame-of-the-service"}
            await place.service.watch_agent(os.getpid())
            call = Later(lambda: ask(place.port, chat(), headers=headers))
            await place.next(call_timeout=TIMEOUT)
            await place.answer(text())
            assert call.result().status == 200
            await place.service.stop()
            assert services_in(sandbox) == []

    run(scenario())


# Answers ------------------------------------------------------------------------------------------------------------


def answer_of(size):
    """JSON of so many bytes."""
    return "{}" if size == 2 else '{"pad":"%s"}' % ("x" * (size - 10))


@pytest.mark.parametrize(
    "size",
    [
        2,
        1000,
        rock_sdk.INLINE_BYTES,
        rock_sdk.INLINE_BYTES + 1,
        1 << 20,
        pytest.param(20 << 20, marks=pytest.mark.load),
    ],
)
def test_an_answer_of_any_size_reaches_the_agent_as_it_is(place, size):
    answer = answer_of(size)
    assert len(answer) == size
    _, got = run(place.turn(answer))
    assert (got.status, got.body) == (200, answer.encode())


@locally
def test_only_a_large_answer_goes_by_file(place):
    uploads = []
    upload_by_path = place.sandbox.upload_by_path

    class Counting:
        sandbox_id = place.sandbox.sandbox_id
        arun = place.sandbox.arun

        async def upload_by_path(self, file_path, target_path):
            uploads.append(target_path)
            return await upload_by_path(file_path, target_path)

    async def scenario():
        service = ModelService(Counting())
        await service.install()
        await service.start(resume=True)
        del uploads[:]
        for answer in (answer_of(rock_sdk.INLINE_BYTES // 2), answer_of(rock_sdk.INLINE_BYTES + 1)):
            call = place.ask_later()
            await place.next()
            with pytest.raises(NotYet):
                await service.anti_call_llm(place.index, answer, call_timeout=0.01)
            assert call.result().status == 200
        (target,) = uploads
        assert os.path.basename(os.path.dirname(target)) == HOME_NAME

    run(scenario())


NASTY = [
    "line\nline\r\n\ttab",
    'it\'s "quoted" `id` $(id) $HOME ${HOME} !! \\ \\n',
    "é 🎉 中文 \u2028 \u0000",
    "LLM_RESPONSE_END{}\nSESSION_END\nLLM_REQUEST_START",
    "${response_payload} <<response_payload>> ${pid}",
    "--response ${response_payload} anti-call-llm --timeout 0 %s %(x)s {0}",
    "'; rm -rf /tmp/nothing; '",
]
FORMS = {
    "ascii": lambda value: json.dumps(value),
    "unicode": lambda value: json.dumps(value, ensure_ascii=False),
    "pretty": lambda value: json.dumps(value, indent=2) + "\n",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padding", [0, 40000], ids=["inline", "by file"])
def test_an_answer_with_whatever_characters_reaches_the_agent(place, form, padding):
    said = "\n".join(NASTY) + " " * padding
    _, got = run(place.turn(FORMS[form](completion(said))))
    assert content(got) == said


@pytest.mark.parametrize(
    "said",
    [
        "${index} <<index>>",
        "delete\x7f me",
    ],
    ids=["placeholder of the index", "delete"],
)
@in_a_cluster
def test_an_answer_that_the_way_there_could_change_reaches_the_agent(place, said):
    _, got = run(place.turn(json.dumps(completion(said), ensure_ascii=False)))
    assert content(got) == said


def test_an_escaped_lone_surrogate_reaches_the_agent_as_it_was_written(place):
    _, got = run(place.turn('{"choices": [], "a": "\\ud83d \\udc00"}'))
    assert got.body == b'{"choices":[],"a":"\\ud83d \\udc00"}'


def test_a_lone_surrogate_that_is_not_escaped_is_refused(place):
    with pytest.raises(UsageError, match="response_payload: .*surrogate"):
        run(place.service.anti_call_llm(place.index + 1, '{"choices": [], "a": "\ud83d"}'))


@pytest.mark.parametrize(
    "index, payload, message",
    [
        (1, "hello", "response_payload is not JSON: Expecting value: line 1 column 1 (char 0)"),
        (1, "{", "response_payload is not JSON: "),
        (1, '{"a": NaN}', "response_payload is not JSON: NaN"),
        (1, "[" * 100000, "response_payload is not JSON: the JSON is nested too deeply"),
        (1, "[]", "response_payload must be a JSON object, got an array"),
        (1, "null", "response_payload must be a JSON object, got null"),
        (1, '"text"', "response_payload must be a JSON object, got a string"),
        (1, {"choices": []}, "response_payload: must be JSON text, got dict"),
        (1, b"{}", "response_payload: must be JSON text, got bytes"),
        (0, "{}", "response_payload: index 0 waits for the first request, and answers none"),
        (-1, None, "index: must be a whole number from 0, got -1"),
        (True, None, "index: must be a whole number from 0, got True"),
        ("1", "{}", "index: must be a whole number from 0, got '1'"),
        (1.0, "{}", "index: must be a whole number from 0, got 1.0"),
        (None, None, "index: must be a whole number from 0, got None"),
    ],
)
@in_a_cluster
def test_a_bad_argument_is_refused_by_name_before_anything_is_sent(place, index, payload, message):
    del place.sandbox.calls[:]
    with pytest.raises(UsageError) as caught:
        run(place.service.anti_call_llm(index, payload))
    assert message in str(caught.value)
    assert place.sandbox.calls == []


@pytest.mark.parametrize("pid", ["", "x", "-1", "1 2", "1; id", None, 1.5])
@locally
def test_what_is_no_process_number_is_not_watched(place, pid):
    with pytest.raises(UsageError, match=re.escape("pid: must be a process number, got %r" % (pid,))):
        run(place.service.watch_agent(pid))


@pytest.mark.parametrize("size", [100, 40000], ids=["inline", "by file"])
def test_repeating_a_turn_writes_nothing_twice_and_asks_the_same_again(place, size):
    async def scenario():
        first = place.ask_later(chat("first"))
        asked = await place.next()
        assert await place.service.anti_call_llm(place.index - 1) == json.dumps(asked, separators=(",", ":"))
        await place.answer(answer_of(size))
        first.result()
        second = place.ask_later(chat("second"))
        spaced = answer_of(size).replace(":", ": ")
        requests = {
            await place.service.anti_call_llm(place.index, answer) for answer in (answer_of(size), spaced, None)
        }
        assert [json.loads(request)["messages"][0]["content"] for request in requests] == ["second"]
        place.index += 1
        await place.answer(text())
        second.result()
        assert place.logged()[-4:] == [
            (kind, index) for index in (place.index - 1, place.index) for kind in ("request", "response")
        ]

    run(scenario())


@pytest.mark.parametrize("size", [100, 40000], ids=["inline", "by file"])
def test_another_answer_to_the_same_request_is_an_error_and_the_first_one_stays(place, size):
    async def scenario():
        call = place.ask_later()
        await place.next()
        await place.answer(text("first"))
        message = r"\[%s\] anti-call-llm failed: .*request %d already has another answer; it stays as it is"
        with pytest.raises(RockError, match=message % (place.sandbox.sandbox_id, place.index)):
            await place.service.anti_call_llm(place.index, answer_of(size))
        assert content(call.result()) == "first"
        assert answer_files_in(place.sandbox) == []

    run(scenario())


@pytest.mark.parametrize("size", [100, 40000], ids=["inline", "by file"])
def test_an_answer_to_a_request_that_has_not_come_is_an_error(place, size):
    index = place.index + 7
    with pytest.raises(RockError, match="anti-call-llm failed: .*there is no request %d to answer" % index):
        run(place.service.anti_call_llm(index, answer_of(size)))
    assert answer_files_in(place.sandbox) == []


@pytest.mark.parametrize("size", [100, 40000], ids=["inline", "by file"])
def test_when_no_request_comes_in_time_that_is_said_and_the_answer_has_been_taken(place, size):
    async def scenario():
        call = place.ask_later()
        await place.next()
        message = r"\[%s\] waiting for request %d: not within 0.05 s"
        with pytest.raises(NotYet, match=message % (place.sandbox.sandbox_id, place.index + 1)):
            await place.service.anti_call_llm(place.index, answer_of(size), call_timeout=0.05)
        assert call.result().body == answer_of(size).encode()
        assert answer_files_in(place.sandbox) == []

    run(scenario())


@pytest.mark.parametrize("size", [1 << 20])
def test_a_request_of_any_size_and_any_characters_reaches_the_trainer(place, size):
    prompt = "\n".join(NASTY) + "é🎉" * (size // 8)
    asked, _ = run(place.turn(text(), chat(prompt)))
    assert asked["messages"][0]["content"] == prompt


# What an agent asks for ---------------------------------------------------------------------------------------------


def test_an_error_as_answer_is_that_http_error_for_the_agent(place):
    for status, error in ((429, {"message": "slow down", "code": 429}), (400, {"message": "too long", "code": "400"})):
        _, got = run(place.turn(json.dumps({"error": error})))
        assert (got.status, got.json()["error"]["message"]) == (status, error["message"])


def test_a_streaming_agent_gets_the_answer_as_a_stream_and_tool_calls_in_it(place):
    calls = [{"id": "t1", "type": "function", "function": {"name": "ls", "arguments": '{"path": "."}'}}]
    _, got = run(place.turn(text(None, tool_calls=calls), chat(stream=True)))
    deltas = [event["choices"][0]["delta"] for event in got.events() if event != "[DONE]" and event["choices"]]
    named = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert named[0]["function"]["name"] == "ls"
    assert "".join(call["function"].get("arguments", "") for call in named) == '{"path": "."}'
    assert got.events()[-1] == "[DONE]"


@pytest.mark.everywhere
def test_parallel_requests_of_one_agent_each_get_their_own_answer(place):
    async def scenario():
        calls = {"question %d" % number: place.ask_later(chat("question %d" % number)) for number in range(8)}
        answer, asked = None, []
        for _ in calls:
            request = await place.next(answer)
            asked.append(request["messages"][0]["content"])
            answer = json.dumps(echo(request))
        await place.answer(answer)
        assert sorted(asked) == sorted(calls)
        for question, call in calls.items():
            assert content(call.result()) == "re: " + question

    run(scenario())


# Turns in a cluster -------------------------------------------------------------------------------------------------


class Flaky(RockShapedSandbox):
    """The stand-in behind a gateway that fails every other time, in one of three ways."""

    failing = None  # or "refuses", "loses" (what was run, it does not say), "breaks" (the connection, after the run)

    async def arun(self, cmd, *args, **options):
        if not self._fails():
            return await super().arun(cmd, *args, **options)
        if self.failing == "refuses":
            raise ConnectionError("503 Service Unavailable")
        with contextlib.suppress(Exception):
            await super().arun(cmd, *args, **options)
        if self.failing == "breaks":
            raise ConnectionResetError("Connection reset by peer")
        return Seen("")

    async def upload_by_path(self, file_path, target_path, upload_mode="auto"):
        if not self._fails():
            return await super().upload_by_path(file_path, target_path)
        if self.failing != "refuses":
            await super().upload_by_path(file_path, target_path)
        raise ConnectionError("503 Service Unavailable")

    def _fails(self):
        self.asked = getattr(self, "asked", 0) + 1
        return self.failing and self.asked % 2


FAILURES = ["refuses", "loses", "breaks"]


@pytest.fixture(scope="module")
def flaky_place(tmp_path_factory):
    with place_of("rock", tmp_path_factory.mktemp("flaky"), cls=Flaky) as place:
        yield place


@pytest.mark.everywhere
def test_a_turn_is_one_call_and_by_file_three(flaky_place):
    place = flaky_place

    async def scenario():
        place.ask_later()
        await place.next()
        for size, count in ((100, 1), (40000, 2)):
            del place.sandbox.calls[:]
            call = place.ask_later()
            await place.next(answer_of(size))
            assert [mode for mode, _ in place.sandbox.calls] == ["normal"] * count
        await place.answer(text())
        assert call.result().status == 200

    run(scenario())


@pytest.mark.parametrize("failing", FAILURES)
@pytest.mark.parametrize("size", [100, 40000], ids=["inline", "by file"])
def test_calls_that_fail_now_and_then_are_repeated_and_a_turn_happens_once(flaky_place, failing, size):
    place = flaky_place
    before = place.logged()

    async def scenario():
        place.sandbox.failing = failing
        try:
            call = place.ask_later()
            await place.next(check_interval=0.01)
            await place.answer(answer_of(size), check_interval=0.01)
        finally:
            place.sandbox.failing = None
        assert call.result().body == answer_of(size).encode()

    run(scenario())
    assert place.logged()[len(before) :] == [("request", place.index), ("response", place.index)]
    assert wait_until(lambda: not others_in(place.sandbox), "the end of all commands")
    assert files_in(place.sandbox) == []


@pytest.mark.parametrize("failing", FAILURES)
def test_a_whole_life_where_every_other_call_fails(tmp_path, failing, monkeypatch):
    monkeypatch.setattr(rock_sdk, "RETRY_SECONDS", 0.1)

    async def scenario():
        async with sandbox_of("rock", tmp_path, cls=Flaky) as sandbox:
            sandbox.failing = failing
            place = Place(sandbox)
            await place.begin()
            (service,) = services_in(sandbox)
            with agent_process(place, turns=1) as agent:
                await place.service.watch_agent(agent.pid)
                await place.next(check_interval=0.01)
                assert await place.service.anti_call_llm(1, text("done"), check_interval=0.01) == SESSION_END_MARKER
                assert agent.communicate() == (b"done\n", b"")
            assert services_in(sandbox) == [service]
            assert place.logged() == [("request", 1), ("response", 1), ("end", 0)]
            await place.service.stop()
            wait_until(lambda: commands_in(sandbox) == {})
            assert files_in(sandbox) == []

    run(scenario())


@pytest.mark.parametrize("size", [100, 40000], ids=["inline", "by file"])
def test_a_wait_that_the_gateway_cuts_off_goes_on_and_nothing_happens_twice(tmp_path, size):
    async def cut_off(place, call):
        """The task of a call, once it was cut off and repeated."""
        place.sandbox.calls.clear()
        task = asyncio.ensure_future(call)
        while sum("anti-call-llm" in command for _, command in place.sandbox.calls) < 2:
            assert not task.done(), task.result()
            await asyncio.sleep(0.01)
        return task

    async def scenario():
        async with sandbox_of("rock", tmp_path, http_timeout=1.5) as sandbox:
            place = Place(sandbox)
            await place.begin()
            waiting = await cut_off(place, place.next(check_interval=0.01))
            first = place.ask_later(chat("first"))
            assert (await waiting)["messages"][0]["content"] == "first"
            waiting = await cut_off(place, place.next(answer_of(size), check_interval=0.01))
            second = place.ask_later(chat("second"))
            assert (await waiting)["messages"][0]["content"] == "second"
            await place.answer(text())
            assert first.result().body == answer_of(size).encode()
            assert second.result().status == 200
            assert place.logged() == [("request", 1), ("response", 1), ("request", 2), ("response", 2)]
            assert files_in(sandbox) == []

    run(scenario())


async def until_asked(sandbox, task):
    """Wait until a turn has its command in the sandbox."""
    while not any("anti-call-llm" in command for command in commands_in(sandbox).values()):
        assert not task.done(), task.result()
        await asyncio.sleep(0.01)


def test_a_sandbox_that_is_lost_is_an_error_with_its_name_within_bounded_time(tmp_path, monkeypatch):
    async def lost(sandbox, call):
        with pytest.raises(SandboxError, match=re.escape("[%s] the sandbox failed: " % sandbox.sandbox_id)):
            await asyncio.wait_for(call, TIMEOUT)

    async def scenario():
        dead = RockShapedSandbox(tmp_path)
        dead.is_dead = True
        async with sandbox_of("rock", tmp_path, http_timeout=1.5) as sandbox:
            place = Place(sandbox)
            await place.begin()
            place.ask_later()
            await place.next()
            waiting = asyncio.ensure_future(place.next(text()))
            await until_asked(sandbox, waiting)
            monkeypatch.setattr(rock_sdk, "LOST_SECONDS", 4.0)
            sandbox.is_dead = True
            await asyncio.gather(lost(sandbox, waiting), lost(dead, ModelService(dead).install()))

    run(scenario())


def test_a_local_sandbox_that_is_stopped_in_mid_turn_is_gone(tmp_path):
    async def scenario():
        async with sandbox_of("local", tmp_path) as sandbox:
            place = Place(sandbox)
            await place.begin()
            waiting = asyncio.ensure_future(place.next(check_interval=0.01))
            await until_asked(sandbox, waiting)
            await sandbox.stop()
            with pytest.raises(SandboxGone, match=re.escape("[%s]" % sandbox.sandbox_id)):
                await waiting
            await place.service.stop()
            assert not place.service.is_started

    run(scenario())


class Ending(rock_sdk.LocalSandbox):
    """It is stopped in the moment in which a command of it is killed, whose shell lives to tell."""

    ends = False

    async def arun(self, cmd, *args, **options):
        seen = await super().arun(cmd, *args, **options)
        if self.ends and "kill -9" in cmd:
            self._is_running = False
        return seen


KILLS_ITSELF = "sh -c 'kill -9 $$' turn-${index}"


@pytest.mark.parametrize(
    "ends, error, words",
    [(True, SandboxGone, "has been stopped"), (False, SandboxError, "anti-call-llm failed: ")],
)
def test_turn_whose_command_is_killed_says_whether_the_sandbox_is_gone(tmp_path, ends, error, words):
    async def scenario():
        async with Ending(directory=str(tmp_path), env={"PATH": PATH}) as sandbox:
            place = Place(sandbox, {"enabled": True, "anti_call_llm_cmd_no_response": KILLS_ITSELF})
            await place.begin()
            sandbox.ends = ends
            with pytest.raises(SandboxError, match=words) as caught:
                await place.next()
            assert type(caught.value) is error

    run(scenario())


# The whole loop -----------------------------------------------------------------------------------------------------


async def echo_slowly(request):
    await asyncio.sleep(0)
    return echo(request)


POLICIES = {
    "function": echo,
    "coroutine function": echo_slowly,
    "text": lambda request: json.dumps(echo(request)),
    "object with __await__": lambda request: asyncio.ensure_future(echo_slowly(request)),
}


@pytest.fixture
def session(shared_place):
    """The shared place at the begin of a session."""
    run(shared_place.begin())
    shared_place.is_reusable = False
    return shared_place


@pytest.mark.parametrize(
    "shared_place, policy",
    [("local", policy) for policy in POLICIES] + [("rock", "function")],
    indirect=["shared_place"],
)
def test_run_answers_every_request_with_the_policy_until_the_agent_has_ended(session, policy):
    async def scenario():
        with agent_process(session) as agent:
            await session.service.watch_agent(agent.pid)
            assert await session.service.run(POLICIES[policy]) == 3
            assert agent.communicate() == (ECHOED, b"")
        assert session.service.last_index == 3
        assert session.logged() == [(kind, i) for i in (1, 2, 3) for kind in ("request", "response")] + [("end", 0)]

    run(scenario())


@locally
def test_what_the_policy_raises_is_passed_on_and_its_request_can_be_answered_later(session):
    asked = []

    def fails_once(request):
        asked.append(request["messages"][-1]["content"])
        if len(asked) == 2:
            raise LookupError("no GPU is free")
        return echo(request)

    async def scenario():
        with agent_process(session) as agent:
            await session.service.watch_agent(agent.pid)
            with pytest.raises(LookupError, match="no GPU is free"):
                await session.service.run(fails_once)
            assert session.service.last_index == 1
            assert await session.service.run(fails_once, index=session.service.last_index) == 3
            assert agent.communicate() == (ECHOED, b"")
        assert asked[1] == asked[2]

    run(scenario())


@pytest.mark.parametrize(
    "answer, message",
    [
        ("not JSON", "call_llm: for request [0-9]+ it must return a completion.* but returned str: it is not JSON"),
        ([], "but returned list: it must be a JSON object, got an array"),
        (None, "but returned NoneType: it must be a JSON object, got null"),
        ("", "but returned str: it is not JSON"),
        ({"a": {1, 2}}, "but returned dict: .*set"),
    ],
)
@locally
def test_a_policys_bad_answer_is_an_error_and_the_request_can_still_be_answered(place, answer, message):
    async def scenario():
        call = place.ask_later()
        index = place.index
        with pytest.raises((UsageError, TypeError), match=message):
            await asyncio.wait_for(place.service.run(lambda _: answer, index), 10)
        await place.next()
        await place.answer(text())
        assert call.result().status == 200

    run(scenario())


@locally
def test_after_the_end_asking_again_says_so_again_and_stopping_does_not_change_that(session):
    async def scenario():
        service = session.service
        assert not await service.wait_for_session_end(0.05)
        with agent_process(session, turns=1) as agent:
            await service.watch_agent(agent.pid)
            await session.next()
            assert await service.anti_call_llm(1, text("bye")) == SESSION_END_MARKER
            assert agent.communicate() == (b"bye\n", b"")
        assert await service.wait_for_session_end(0.05)
        assert await service.anti_call_llm(1, text("bye")) == SESSION_END_MARKER
        await service.stop()
        assert await service.anti_call_llm(1, text("bye")) == SESSION_END_MARKER
        with pytest.raises(StateError):
            await service.anti_call_llm(0)
        assert session.logged() == [("request", 1), ("response", 1), ("end", 0)]

    run(scenario())


@locally
def test_an_agent_that_dies_without_asking_ends_the_session(session):
    async def scenario():
        with agent_process(session, turns=0) as agent:
            await session.service.watch_agent(agent.pid)
            assert await session.service.run(echo) == 0
            assert agent.communicate() == (b"", b"")

    run(scenario())


@locally
def test_a_request_that_nobody_answered_before_the_end_is_not_asked_any_more(session):
    async def scenario():
        with agent_process(session, turns=1) as agent:
            await session.service.watch_agent(agent.pid)
            await session.next()
            agent.kill()
            agent.wait()
            assert await session.service.wait_for_session_end(10)
        assert await session.service.anti_call_llm(1, text()) == SESSION_END_MARKER
        assert session.logged() == [("request", 1), ("end", 0)]

    run(scenario())


# A trainer that comes back ------------------------------------------------------------------------------------------


def kill_service(sandbox):
    (pid,) = services_in(sandbox)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not services_in(sandbox), "the service's end")


@pytest.mark.parametrize(
    "shared_place, fate",
    [("local", "runs"), ("local", "was killed"), ("local", "was stopped"), ("rock", "was killed")],
    indirect=["shared_place"],
)
def test_a_trainer_that_comes_back_goes_on_with_its_session(session, fate):
    async def scenario():
        earlier = session.service
        call = session.ask_later(chat("first"))
        await session.next()
        await session.answer(text("one"))
        assert content(call.result()) == "one"
        pid = services_in(session.sandbox)
        if fate == "was killed":
            kill_service(session.sandbox)
        elif fate == "was stopped":
            await earlier.stop()
        later = Place(session.sandbox)
        await later.service.install()
        await later.service.start(resume=True)
        assert later.service.is_started
        if fate == "runs":
            assert (later.service.base_url, services_in(session.sandbox)) == (earlier.base_url, pid)
        later.index = 1
        call = later.ask_later(chat("second"))
        request = await later.next(text("one"))  # said once more, as it does not know whether that was taken
        assert request["messages"][0]["content"] == "second"
        await later.answer(text("two"))
        assert content(call.result()) == "two"
        assert later.logged() == [(kind, index) for index in (1, 2) for kind in ("request", "response")]
        await earlier.start()

    run(scenario())


@locally
def test_a_killed_service_is_continued_at_the_port_that_its_agent_knows(session):
    async def scenario():
        url = session.service.base_url
        kill_service(session.sandbox)
        await session.service.start(resume=True)
        assert session.service.base_url == url
        assert (await session.turn(text()))[1].status == 200

    run(scenario())


@locally
def test_a_service_that_does_not_start_is_an_error_with_its_reason(place):
    async def scenario():
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen(1)
            start_cmd = "rock model-service start --host 127.0.0.1 --port %d" % sock.getsockname()[1]
            service = ModelService(place.sandbox, {"start_cmd": start_cmd})
            await service.install()
            message = r"\[%s\] the model service did not start \(exit code 1\): (.*\n)*.*in use"
            with pytest.raises(SandboxError, match=message % place.sandbox.sandbox_id):
                await service.start()
            assert not service.is_started
        await place.service.start()

    run(scenario())
    place.index = 0


@locally
def test_a_command_without_the_word_start_cannot_resume(place):
    async def scenario():
        service = ModelService(place.sandbox, {"start_cmd": "run-my-service"})
        await service.install()
        with pytest.raises(UsageError, match="start_cmd: cannot resume with a command that has no `start`"):
            await service.start(resume=True)

    run(scenario())


# Cancellation -------------------------------------------------------------------------------------------------------


class SlowUpload(RockShapedSandbox):
    """The stand-in, whose upload may be whole long before it says so."""

    reached = None

    async def upload_by_path(self, file_path, target_path, upload_mode="auto"):
        uploaded = await super().upload_by_path(file_path, target_path)
        if self.reached is not None:
            self.reached.set()
            await asyncio.sleep(600)
        return uploaded


async def cancel(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_turn_that_is_cancelled_while_its_answer_is_uploaded_leaves_no_file(tmp_path):
    async def scenario():
        async with sandbox_of("rock", tmp_path, cls=SlowUpload) as sandbox:
            place = Place(sandbox)
            await place.begin()
            call = place.ask_later()
            await place.next()
            sandbox.reached = asyncio.Event()
            task = asyncio.ensure_future(place.next(answer_of(40000)))
            await sandbox.reached.wait()
            assert len(answer_files_in(sandbox)) == 1
            await cancel(task)
            assert answer_files_in(sandbox) == []
            sandbox.reached = None
            await place.answer(text("later"))
            assert content(call.result()) == "later"

    run(scenario())


@pytest.mark.parametrize("size", [100, 40000], ids=["inline", "by file"])
def test_a_turn_that_is_cancelled_in_its_wait_leaves_nothing_and_can_be_repeated(place, size):
    async def scenario():
        call = place.ask_later()
        await place.next()
        task = asyncio.ensure_future(place.next(answer_of(size)))
        assert (await rock_sdk.in_thread(call.result)).body == answer_of(size).encode()
        await cancel(task)
        assert answer_files_in(place.sandbox) == []
        call = place.ask_later()
        await place.next(answer_of(size))
        await place.answer(text())
        assert call.result().status == 200

    run(scenario())


def test_cancelling_a_turn_kills_its_command_at_once_in_a_local_sandbox(tmp_path):
    async def scenario():
        async with sandbox_of("local", tmp_path) as sandbox:
            place = Place(sandbox)
            await place.begin()
            task = asyncio.ensure_future(place.next())
            await until_asked(sandbox, task)
            task.cancel()
            deadline = time.monotonic() + rock_sdk.SLICE_SECONDS / 2  # well before it would end by itself
            await asyncio.wait([task], timeout=rock_sdk.SLICE_SECONDS / 2)
            assert task.cancelled()
            while others_in(sandbox) and time.monotonic() < deadline:  # what is killed takes its moment
                await asyncio.sleep(0.01)
            assert others_in(sandbox) == {}

    run(scenario())


def test_a_cancellation_in_the_midst_of_the_clean_up_lets_that_end(tmp_path):
    class Cancelling(RockShapedSandbox):
        task = None

        async def arun(self, cmd, *args, **options):
            if self.task is not None and "rm -rf" in cmd:
                self.task.cancel()
                await asyncio.sleep(0)  # where the cancellation strikes
            return await super().arun(cmd, *args, **options)

    async def scenario():
        async with sandbox_of("rock", tmp_path, cls=Cancelling) as sandbox:
            service = ModelService(sandbox, {"config_ini_cmd": "true"})
            sandbox.task = asyncio.ensure_future(service.install())
            with pytest.raises(asyncio.CancelledError):
                await sandbox.task
            sandbox.task = None
            assert files_in(sandbox) == []

    run(scenario())


MOMENTS = [0.0, 0.003, 0.01, 0.03, 0.08, 0.15, 0.3]


async def cancel_after(seconds, call):
    """Whether a call was cancelled after so long, and did not end before."""
    task = asyncio.ensure_future(call)
    await asyncio.wait([task], timeout=seconds)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, NotYet):
        await task
    return task.cancelled()


@pytest.mark.once
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["install", "install_cmd", "start", "turn", "large turn", "run"])
def test_cancelling_at_any_moment_leaves_no_process_and_no_file_and_a_usable_service(tmp_path, kind, what):
    async def scenario():
        async with sandbox_of(kind, tmp_path) as sandbox:
            place = Place(sandbox)
            await place.begin()
            slow = ModelService(sandbox, {"install_cmd": "sleep 0.05; sleep 600 & sleep 0.05"})
            calls = {
                "install": lambda: place.service.install(),
                "install_cmd": lambda: slow.install(),
                "start": lambda: place.service.start(),
                "turn": lambda: place.service.anti_call_llm(place.index, text()),
                "large turn": lambda: place.service.anti_call_llm(place.index, answer_of(1 << 20)),
                "run": lambda: place.service.run(lambda _: completion(), place.index - 1),
            }
            if "turn" in what or what == "run":
                place.ask_later()
                await place.next()
            was_cancelled = [await cancel_after(seconds, calls[what]()) for seconds in MOMENTS]
            assert any(was_cancelled)
            wait_until(lambda: not others_in(sandbox), "the end of all commands")
            assert files_in(sandbox) == []
            assert len(services_in(sandbox)) <= 1
            await place.begin()
            assert len(services_in(sandbox)) == 1
            assert (await place.turn(text()))[1].status == 200

    run(scenario())
