"""Tools in containers, on a real engine: what is in force, what is seen from outside, and what is left: nothing."""

import contextlib
import json
import os
import subprocess

import pytest

import rock_sdk
from managers import Manager, write_tools
from rock_sdk import ToolError, ToolServiceProxy
from sandboxes import IMAGE, need_engine
from support import TIMEOUT, nothing_left, wait_until

pytestmark = [pytest.mark.docker, pytest.mark.load]

SECRET = "sk-of-the-tool-0123456789"
LOOK = """
import os

class Look:
    name, description, parameters = "look", "d", []

    def __init__(self, cfg):
        self.cfg = cfg

    def call(self, params, **kwargs):
        status = open("/proc/self/status").read()
        return {"cfg": self.cfg, "kwargs": kwargs, "environ": dict(os.environ), "status": status, "uid": os.getuid()}
"""


TOOLS = {
    "look": LOOK,
    "broken": "import what_is_not_there\n",
    "json": "def json(a: int):\n    return a\n",  # named as a module of Python's own
}


def docker(*words):
    done = subprocess.run(["docker", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT)
    assert done.returncode == 0, (words, done.stdout)
    return done.stdout.decode("utf-8")


def label_of(manager):
    with manager.registry() as registry:
        return "%s=%s" % (rock_sdk.NODE_LABEL, registry.manager_id)


def containers_of(manager):
    return docker("ps", "--all", "--filter", "label=" + label_of(manager), "--format", "{{.Names}}").split()


@pytest.fixture
def start(tmp_path):
    """Starts managers whose tools run in containers, one after the other on one directory; no container is left."""
    need_engine()
    tools = write_tools(tmp_path / "tools", **TOOLS)
    settings = {"runtime": "docker", "tool_image": IMAGE, "tool_dir": tools}

    @contextlib.contextmanager
    def start(**more):
        with nothing_left():
            manager = Manager(tmp_path, **{**settings, **more})
            manager.server.start()
            try:
                yield manager
            finally:
                manager.server.stop()
        if not more:
            assert containers_of(manager) == []

    return start


def proxy(manager, tool_name, tool_cfg=None):
    return ToolServiceProxy(tool_name, tool_cfg, tool_service_manager_url=manager.url)


def test_life_of_a_tool_in_a_container(start, monkeypatch):
    monkeypatch.setenv("AMAP_TOKEN", SECRET)
    monkeypatch.setenv("OF_THE_MANAGER", "its own")
    with start(tool_env=("AMAP_TOKEN",)) as manager:
        tool = proxy(manager, "look", {"api_key": SECRET})
        assert (tool.name, tool.description, tool.parameters) == ("look", "d", [])
        seen = tool.call("{}", dashscope_api_key=SECRET + "-of-a-call")
        assert seen["cfg"] == {"api_key": SECRET} and seen["kwargs"] == {"dashscope_api_key": SECRET + "-of-a-call"}
        assert seen["environ"]["AMAP_TOKEN"] == SECRET and "OF_THE_MANAGER" not in seen["environ"]
        (name,) = containers_of(manager)
        assert_is_confined(name, seen["status"])
        assert_hides_its_secrets(manager, name)
        assert tools_of(manager) == {"look_default": "running"}
        assert manager.remove("look") == {"tool_node_name": "look_default", "status": "exited"}
        assert containers_of(manager) == [] and tools_of(manager) == {}


def tools_of(manager):
    return manager.ask("/tools/", method="GET").json()["output"]["tools"]


def assert_is_confined(name, status):
    host = json.loads(docker("inspect", "--format", "{{json .HostConfig}}", name))
    assert host["PortBindings"] == {"8080/tcp": [{"HostIp": "127.0.0.1", "HostPort": host_port(host)}]}
    assert (host["Memory"], host["PidsLimit"], host["Privileged"]) == (512 * 1024 * 1024, 256, False)
    assert "no-new-privileges" in host["SecurityOpt"] and host["NetworkMode"] != "host"
    assert not host["Binds"]
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert [facts[key] for key in ("CapEff", "CapPrm", "CapBnd", "NoNewPrivs")] == ["0" * 16] * 3 + ["1"]


def host_port(host):
    return host["PortBindings"]["8080/tcp"][0]["HostPort"]


def assert_hides_its_secrets(manager, name):
    said = docker("inspect", name) + docker("logs", name) + docker("ps", "--all", "--no-trunc")
    said += subprocess.check_output(["ps", "axww", "-o", "args"]).decode("utf-8", "replace")
    for directory, _, names in os.walk(manager.data_dir):
        for file_name in names:
            with open(os.path.join(directory, file_name), "rb") as file:
                said += file.read().decode("latin-1")
    assert SECRET not in said and "look" in said


def test_a_container_that_is_killed_is_failed_and_its_tool_can_be_begun_again(start):
    with start() as manager:
        tool = proxy(manager, "json")
        assert tool.call({"a": 1}) == 1
        docker("kill", containers_of(manager)[0])
        assert manager.status("json") == ("failed", "its container ended with exit code 137")
        with pytest.raises(ToolError, match="the tool json_default is failed: its container ended"):
            tool.call({"a": 1})
        wait_until(lambda: not containers_of(manager), "the end of what is left of it")
        assert proxy(manager, "json").call({"a": 2}) == 2


def test_a_manager_that_comes_back_finds_its_containers_and_removes_what_is_nobodys(start):
    with start(on_stop="keep") as manager:
        tool = proxy(manager, "RenewInstance")
        names = containers_of(manager)
    docker("create", "--name", rock_sdk.NODE_PREFIX + "0" * 32, "--label", label_of(manager), IMAGE, "true")
    with start() as manager:
        tool.tool_service_manager_url = manager.url
        assert tool.call({"instance_id": 1, "period": "2"}) == "已完成ECS实例ID为1的续费，续费时长2月"
        wait_until(lambda: containers_of(manager) == names, "the end of the container that is nobody's")


def test_a_tool_that_cannot_be_loaded_is_failed_with_what_its_container_said(start):
    with start() as manager:
        with pytest.raises(ToolError) as caught:
            proxy(manager, "broken")
        assert "its container ended with exit code 2" in str(caught.value)
        assert "No module named 'what_is_not_there'" in str(caught.value)


@pytest.mark.parametrize(
    "settings, environ, why",
    [
        ({"tool_image": "no.such.registry.invalid/image:1"}, {}, "docker pull: .*no.such.registry.invalid"),
        ({"docker": "no-such-docker"}, {}, "cannot run no-such-docker: No such file or directory; is it installed"),
        ({}, {"DOCKER_HOST": "unix:///no/such/engine.sock"}, "docker pull: .*no/such/engine.sock"),
    ],
    ids=["image", "command", "engine"],
)
def test_what_is_missing_is_named(start, monkeypatch, settings, environ, why):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with start(**settings, request_timeout=1) as manager:
        with pytest.raises(ToolError, match="the tool RenewInstance is failed: " + why):
            proxy(manager, "RenewInstance")
