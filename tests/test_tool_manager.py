"""The tool manager over HTTP: with real processes, and with nodes of this process where something races or fails."""

import contextlib
import glob
import json
import logging
import os
import random
import re
import signal
import socket
import socketserver
import sqlite3
import stat
import threading
from dataclasses import replace
from http.client import HTTPException

import pytest

import rock_ms
import rock_sdk
import sandboxes
from managers import ADD, FakeNode, FakeRuntime, Manager, free_port, managing, write_tools
from support import TIMEOUT, Later, nothing_left, raw_request, serving, talk, wait_until

pytestmark = pytest.mark.load

KEY = "sk-of-the-tool-0123456789"
TOOLS = {
    "add": ADD,
    "environ": "import os\ndef environ(): return dict(os.environ)\n",
    "hold": "import time\ndef hold(path: str):\n    open(path, 'w').close()\n    time.sleep(600)\n",
    "leaves": "import subprocess\n"
    "def leaves(): return subprocess.Popen(['sleep', '600'], start_new_session=True).pid\n",
    "broken": "import no_such_module_of_ours\n",
    "chatty": "import os\nclass chatty:\n    def __init__(self, cfg):\n        print(cfg)\n        os._exit(3)\n",
    "configured": "class configured:\n    name = 'configured'\n    parameters = []\n"
    "    def __init__(self, cfg): self.cfg = cfg\n    def call(self, params, **kwargs): return self.cfg\n",
}


@pytest.fixture(scope="module")
def tool_dir(tmp_path_factory):
    return write_tools(tmp_path_factory.mktemp("tools"), **TOOLS)


@pytest.fixture(scope="module")
def manager(tmp_path_factory, tool_dir):
    """A manager with real processes, which the tests of this module share: each has tenants of its own."""
    os.environ["NOT_FOR_TOOLS"], os.environ["FOR_TOOLS"] = "secret-of-the-manager", "for-the-tools"
    try:
        directory = tmp_path_factory.mktemp("manager")
        with managing(directory, tool_dir=tool_dir, tool_env=("FOR_TOOLS", "NOT_SET")) as manager:
            yield manager
    finally:
        del os.environ["NOT_FOR_TOOLS"], os.environ["FOR_TOOLS"]


@pytest.fixture
def runtime():
    return FakeRuntime()


@pytest.fixture
def fake(tmp_path, runtime, tool_dir):
    """A manager whose nodes are those of `runtime`."""
    with managing(tmp_path / "data", runtime, tool_dir=tool_dir) as manager:
        yield manager


# The documented requests ----------------------------------------------------------------------------------------------

UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def answered(got, *keys):
    """The output of an answer with exactly these keys."""
    value = got.json()
    assert got.status == 200, value
    assert tuple(value) == keys
    assert UUID.fullmatch(value["request_id"])
    assert value["message"] == ""
    return value["output"]


@pytest.mark.everywhere
def test_documented_requests_have_the_documented_answers(manager):
    usual = ("request_id", "message", "output")
    body = b"""{
      "tool_name": "RenewInstance",
      "tenant_id": "default",
      "tool_cfg": {},
      "tool_image": "modelscope-agent/tool-node:lastest"
    }"""
    name = {"tool_node_name": "RenewInstance_default"}
    assert answered(manager.ask("/create_tool_service", body), *usual) == {**name, "status": "pending"}
    manager.settled("RenewInstance")
    named = b'{\n  "tool_name": "RenewInstance",\n  "tenant_id": "default"\n}'
    status = manager.ask("/check_tool_service_status/", named)
    assert answered(status, *usual) == {**name, "status": "running"}
    tools = manager.ask("/tools/?tenant_id=default", method="GET")
    assert answered(tools, "status_code", *usual) == {"tools": {"RenewInstance_default": "running"}}
    assert tools.json()["status_code"] == 200
    assert answered(manager.ask("/tool_info/", named), *usual) == {
        "name": "RenewInstance",
        "description": "续费一台包年包月ECS实例",
        "parameters": [
            {"name": "instance_id", "description": "ECS实例ID", "required": True, "type": "string"},
            {"name": "period", "description": "续费时长以月为单位", "required": True, "type": "string"},
        ],
    }
    call = rb"""{
      "tool_name": "RenewInstance",
      "tenant_id": "default",
      "params": "{\"instance_id\": 123, \"period\": \"mon\"}",
      "kwargs": {}

    }"""
    assert answered(manager.ask("/execute_tool/", call), *usual) == "已完成ECS实例ID为123的续费，续费时长mon月"
    assert answered(manager.ask("/remove_tool/", named), *usual) == {**name, "status": "exited"}
    tools = manager.ask("/tools/?tenant_id=default", method="GET")
    assert answered(tools, "status_code", *usual) == {"tools": {}}


@pytest.mark.everywhere
def test_life_of_a_tool_leaves_nothing(manager):
    manager.create("add", "life")
    node = manager.node("add", "life")
    assert manager.output("/tool_info", "add", tenant_id="life")["name"] == "add"
    assert manager.call("add", {"a": 41}, tenant_id="life") == 42
    assert manager.call("add", '{"a": 1, "b": 1}', tenant_id="life") == 2
    assert len(sandboxes.processes_with(node.node_id)) >= 2
    assert os.path.isdir(manager.place(node))
    assert manager.remove("add", "life") == {"tool_node_name": "add_life", "status": "exited"}
    assert sandboxes.processes_with(node.node_id) == []
    assert not os.path.exists(manager.place(node))
    for path in ("/check_tool_service_status", "/tool_info", "/execute_tool", "/update_tool_service", "/remove_tool"):
        got = manager.ask(path, {"tool_name": "add", "tenant_id": "life"})
        assert (got.status, list(got.json())) == (404, ["request_id", "message"])
        assert got.json()["message"] == "the tenant life has no tool add: create it first"


def test_removal_ends_what_a_tool_has_begun_elsewhere(manager):
    manager.create("leaves", "l")
    pid = manager.call("leaves", tenant_id="l")
    node_id = manager.node("leaves", "l").node_id
    wait_until(lambda: pid in sandboxes.processes_with(node_id))  # /proc shows its environment once it has begun
    manager.remove("leaves", "l")
    assert rock_ms.process_identity(pid) is None


def test_habits_of_modelscopes_client(fake):
    """GET with a query, no slash at the end, an empty key, a query beside an empty body, or beside none."""
    empty_key = {"Authorization": ""}
    created = fake.ask("/create_tool_service", {"tool_name": "RenewInstance", "tenant_id": "t"}, headers=empty_key)
    assert created.json()["output"]["status"] == "pending"
    fake.settled("RenewInstance", "t")
    query = "?tool_name=RenewInstance&tenant_id=t"
    running = {"tool_node_name": "RenewInstance_t", "status": "running"}
    for method, path in (("GET", "/check_tool_service_status"), ("GET", "/check_tool_service_status/")):
        assert fake.ask(path + query, method=method, headers=empty_key).json()["output"] == running
    assert fake.ask("/check_tool_service_status" + query, b"").json()["output"] == running
    assert fake.ask("/tool_info" + query, method="GET").json()["output"]["name"] == "RenewInstance"
    raw = "POST /remove_tool%s HTTP/1.1\r\nHost: x\r\nAuthorization:\r\nConnection: close\r\n\r\n" % query
    assert b'"status":"exited"' in talk(fake.port, raw.encode())
    tools = fake.ask("/tools?tenant_id=t", method="GET")
    assert tools.json()["output"] == {"tools": {}}


def test_query_may_hold_what_a_tool_is_made_with(fake, runtime):
    assert fake.ask("/create_tool_service?tool_name=add&tool_cfg=%7B%22a%22:1%7D", b"").status == 200
    assert fake.settled("add")[0] == "running"
    assert runtime.begun[0][1].tool_cfg == {"a": 1}


@pytest.mark.parametrize(
    "asked, used",
    [(None, "own:1"), ("", "own:1"), ("modelscope-agent/tool-node:lastest", "own:1"), ("python:3.9", "python:3.9")],
)
def test_image_of_the_original_stands_for_our_own(tmp_path, runtime, asked, used):
    with managing(tmp_path / "data", runtime, tool_image="own:1") as manager:
        manager.create("RenewInstance", tool_image=asked)
        assert runtime.begun[0][0].image == used


def test_tenants_have_tools_of_their_own(manager):
    for tenant in ("left", "right"):
        manager.create("configured", tenant, tool_cfg={"whose": tenant})
    for tenant in ("left", "right"):
        assert manager.call("configured", tenant_id=tenant) == {"whose": tenant}
    manager.remove("configured", "left")
    assert manager.status("configured", "right") == ("running", "")
    assert manager.ask("/tools/?tenant_id=left", method="GET").json()["output"] == {"tools": {}}


def test_names_that_read_the_same_are_two_tools(tmp_path, runtime):
    tools = write_tools(tmp_path / "tools", a="", a_b="")
    with managing(tmp_path / "data", runtime, tool_dir=tools) as manager:
        manager.create("a_b", "c", tool_cfg={"one": 1})
        manager.create("a", "b_c", tool_cfg={"other": 1})
        assert len(runtime.nodes) == 2
        manager.remove("a", "b_c")
        assert manager.status("a_b", "c") == ("running", "")
        assert manager.ask("/tools?tenant_id=c", method="GET").json()["output"]["tools"] == {"a_b_c": "running"}


def test_thirty_tools_created_at_once(manager):
    tenants = ["crowd%d" % number for number in range(30)]
    value = {"tool_name": "add"}
    for later in [
        Later(lambda tenant=tenant: manager.ask("/create_tool_service", {**value, "tenant_id": tenant}))
        for tenant in tenants
    ]:
        assert later.result().status == 200
    for tenant in tenants:  # 30 interpreters take their time on a machine that is busy
        wait_until(lambda tenant=tenant: manager.status("add", tenant)[0] != "pending")
    assert [manager.status("add", tenant) for tenant in tenants] == [("running", "")] * 30
    assert len({manager.node("add", tenant).port for tenant in tenants}) == 30
    calls = [Later(lambda n=n, t=t: manager.call("add", {"a": n}, tenant_id=t)) for n, t in enumerate(tenants)]
    assert [call.result() for call in calls] == list(range(1, 31))
    removals = [Later(lambda tenant=tenant: manager.remove("add", tenant)) for tenant in tenants]
    assert {removal.result()["status"] for removal in removals} == {"exited"}


# Nodes that end, hang, or do not start --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, status, said",
    [(signal.SIGKILL, "failed", "it was killed by signal 9"), (signal.SIGTERM, "exited", "it ended with exit code 0")],
    ids=["killed", "ended"],
)
def test_status_follows_a_node_that_ends(manager, number, status, said):
    tenant = "ends%d" % number
    manager.create("add", tenant)
    node = manager.node("add", tenant)
    os.kill(manager.pid(node), number)
    wait_until(lambda: manager.status("add", tenant)[0] != "running")
    assert manager.status("add", tenant) == (status, said)
    tools = manager.ask("/tools?tenant_id=" + tenant, method="GET").json()["output"]["tools"]
    assert tools == {"add_" + tenant: status}
    wait_until(lambda: not os.path.exists(manager.place(node)), "the end of what is left of it")
    assert sandboxes.processes_with(node.node_id) == []
    got = manager.ask("/execute_tool", {"tool_name": "add", "tenant_id": tenant, "params": {"a": 1}})
    assert (got.status, got.json()["message"]) == (409, "the tool add_%s is %s: %s" % (tenant, status, said))
    manager.create("add", tenant)
    assert manager.call("add", {"a": 1}, tenant_id=tenant) == 2
    manager.remove("add", tenant)


def test_node_that_hangs_runs_and_says_nothing(manager, monkeypatch):
    monkeypatch.setattr(rock_sdk, "ANSWER_SECONDS", 0.1)
    manager.create("add", "hangs")
    os.kill(manager.pid(manager.node("add", "hangs")), signal.SIGSTOP)
    assert manager.status("add", "hangs") == ("running", "it runs, and does not answer")
    assert manager.remove("add", "hangs")["status"] == "exited"
    assert manager.ask("/check_tool_service_status?tool_name=add&tenant_id=hangs", method="GET").status == 404


def test_removal_ends_a_call(manager, tmp_path):
    manager.create("hold", "t")
    node = manager.node("hold", "t")
    path = str(tmp_path / "is-called")
    value = {"tool_name": "hold", "tenant_id": "t", "params": {"path": path}}
    call = Later(lambda: manager.ask("/execute_tool", value))
    wait_until(lambda: os.path.exists(path))
    assert manager.remove("hold", "t")["status"] == "exited"
    got = call.result()
    assert got.status == 502
    assert got.json()["message"] == "the tool hold_t does not answer: it is not wanted any more"
    assert sandboxes.processes_with(node.node_id) == []


def test_update_begins_a_tool_anew_with_what_it_is_given(manager):
    manager.create("configured", "u", tool_cfg={"number": 1})
    earlier = manager.node("configured", "u")
    again = {"tool_name": "configured", "tenant_id": "u", "tool_cfg": {"number": 1}}
    assert manager.ask("/create_tool_service", again).json()["message"] == ""
    other = {**again, "tool_cfg": {"number": 2}}
    said = manager.ask("/create_tool_service", other).json()
    assert said["output"]["status"] == "running"
    assert "with another tool_cfg or tool_image: /update_tool_service begins" in said["message"]
    assert manager.call("configured", tenant_id="u") == {"number": 1}
    assert manager.ask("/update_tool_service/", other).json()["output"]["status"] == "pending"
    assert manager.settled("configured", "u") == ("running", "")
    assert manager.call("configured", tenant_id="u") == {"number": 2}
    assert sandboxes.processes_with(earlier.node_id) == []
    assert not os.path.exists(manager.place(earlier))
    manager.remove("configured", "u")


def test_tool_that_cannot_be_loaded_fails_with_its_reason(manager, tool_dir):
    manager.output("/create_tool_service", "broken")
    status, message = manager.settled("broken")
    assert status == "failed"
    assert "the tool file broken.py cannot be loaded: ModuleNotFoundError" in message
    assert "no_such_module_of_ours" in message
    assert manager.data_dir not in message
    assert tool_dir not in message
    manager.remove("broken")


def test_key_that_a_tool_prints_as_it_fails_is_hidden(manager):
    manager.output("/create_tool_service", "chatty", tool_cfg={"api_key": KEY})
    status, message = manager.settled("chatty")
    assert status == "failed"
    assert "{'api_key': '[key]'}" in message
    assert "exit code 3" in message
    assert not [line for line in manager.logged if KEY in line]
    manager.remove("chatty")


def test_secrets_are_where_they_must_be_only(manager):
    manager.create("configured", "s", tool_cfg={"api_key": KEY, "service": "a-service"})
    manager.create("environ", "s")
    assert manager.call("configured", tenant_id="s")["api_key"] == KEY
    place = manager.place(manager.node("configured", "s"))
    config = os.path.join(place, "node.json")
    assert [stat.S_IMODE(os.stat(path).st_mode) for path in (place, config)] == [0o700, 0o600]
    registry = [path for path in glob.glob(manager.registry_path + "*") if not path.endswith("-shm")]
    assert [stat.S_IMODE(os.stat(path).st_mode) for path in registry] == [0o600] * len(registry)
    node_key = manager.node("configured", "s").api_key
    assert files_with(manager.data_dir, KEY) == [config]
    assert files_with(manager.data_dir, "a-service") == [config]
    assert set(files_with(manager.data_dir, node_key)) <= {config, *registry}
    assert not [line for line in manager.logged if KEY in line or node_key in line]
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            line = file.read()
            assert KEY.encode() not in line
            assert node_key.encode() not in line
    environ = manager.call("environ", tenant_id="s")
    assert environ["FOR_TOOLS"] == "for-the-tools"
    assert "secret-of-the-manager" not in str(environ)
    assert "NOT_SET" not in environ
    assert set(environ) - set(rock_sdk.KEPT_VARIABLES) - {"FOR_TOOLS", "ROCK_TOOL_NODE", "LC_CTYPE", "LC_ALL"} == set()
    for tool_name in ("configured", "environ"):
        manager.remove(tool_name, "s")


def files_with(directory, text):
    found = []
    for parent, _, names in os.walk(directory):
        for path in (os.path.join(parent, name) for name in names):
            with open(path, "rb") as file:
                if text.encode() in file.read():
                    found.append(path)
    return sorted(found)


@contextlib.contextmanager
def answering_everything(port=0):
    """Another program's server, which answers 200 and an object to whatever comes."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            self.request.recv(65536)
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", port), Handler)) as server:
        yield server.server_address[1]


def test_port_that_another_program_takes_meanwhile_is_left_to_it(tmp_path, monkeypatch):
    """It answers where the node should, and is not taken for it."""
    is_free = rock_sdk.is_free_port
    with answering_everything() as taken:
        monkeypatch.setattr(rock_sdk, "is_free_port", lambda port: port == taken or is_free(port))
        with managing(tmp_path / "data", first_node_port=taken) as manager:
            manager.create("RenewInstance")
            assert manager.node("RenewInstance").port > taken
            assert manager.output("/tool_info", "RenewInstance")["name"] == "RenewInstance"


def free_ports(count):
    """The first of some free ports in a row, below those that systems give to outgoing connections."""
    for first in random.sample(range(15000, 30000), 200):
        if all(rock_sdk.is_free_port(port) for port in range(first, first + count)):
            return first
    raise AssertionError("no %d free ports in a row" % count)


def test_lowest_free_port_is_taken_and_used_again(tmp_path, runtime):
    first = free_ports(8)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen(1)
        with managing(tmp_path / "data", runtime, first_node_port=first) as manager:
            for tenant in "abc":
                manager.create("RenewInstance", tenant)
            ports = [manager.node("RenewInstance", tenant).port for tenant in "abc"]
            assert first < ports[0] < ports[1] < ports[2]
            manager.remove("RenewInstance", "b")
            manager.create("RenewInstance", "d")
            assert manager.node("RenewInstance", "d").port == ports[1]


def test_start_tries_so_many_ports_and_no_more(fake, runtime):
    runtime.failures = [rock_sdk.PortTaken("taken")] * rock_sdk.PORT_ATTEMPTS
    fake.output("/create_tool_service", "add")
    status, message = fake.settled("add")
    assert status == "failed"
    assert "its ports are taken by other programs: " in message
    assert len(runtime.begun) == len({node.port for node, _ in runtime.begun}) == rock_sdk.PORT_ATTEMPTS
    runtime.failures = [rock_sdk.PortTaken("taken")] * 2
    fake.create("add")


@pytest.mark.parametrize(
    "failure, said",
    [
        (rock_sdk.NodeError("no such image"), "no such image"),
        (
            PermissionError(13, "Permission denied", "/host/path"),
            "a file of the tool cannot be read: Permission denied",
        ),
        (ZeroDivisionError("of the host"), "internal error (ZeroDivisionError); the manager's own log has the details"),
    ],
    ids=["refused", "file", "bug"],
)
def test_start_that_fails_says_why(fake, runtime, failure, said):
    runtime.failures = [failure]
    fake.output("/create_tool_service", "add")
    assert fake.settled("add") == ("failed", said)
    assert runtime.removed == [runtime.begun[0][0].node_id]
    assert fake.node("add").port is None
    fake.create("add")


# Races ----------------------------------------------------------------------------------------------------------------


@pytest.mark.everywhere
def test_created_by_many_at_once_it_is_begun_once(fake, runtime):
    runtime.may_begin.clear()
    creations = [Later(lambda: fake.output("/create_tool_service", "add")) for _ in range(8)]
    assert {creation.result()["status"] for creation in creations} == {"pending"}
    runtime.may_begin.set()
    assert fake.settled("add") == ("running", "")
    assert len(runtime.begun) == 1
    assert fake.output("/create_tool_service", "add")["status"] == "running"


class MeetingRegistry(rock_sdk.ToolRegistry):
    """A registry in which two look for a tool at the same time, the first time."""

    def __init__(self, path):
        super().__init__(path)
        self._barrier = threading.Barrier(2)

    def node(self, *names):
        node = super().node(*names)
        with contextlib.suppress(threading.BrokenBarrierError):
            if node is None:
                self._barrier.wait(TIMEOUT)
                self._barrier.abort()  # nobody else is to wait
        return node


def test_created_by_two_that_both_miss_it_it_is_begun_once(tmp_path, runtime):
    registry = MeetingRegistry(str(tmp_path / rock_sdk.REGISTRY_NAME))
    settings = rock_sdk.ManagerSettings(runtime="process", first_node_port=free_port())
    manager = rock_sdk.ToolManager(registry, {"process": runtime}, settings, logging.Logger("test"))
    manager.adopt()
    creations = [Later(lambda: manager.create("t", "RenewInstance", {}, None)) for _ in range(2)]
    first, second = (creation.result() for creation in creations)
    manager.stop()
    manager.close()
    assert first.node_id == second.node_id
    assert len(runtime.begun) <= 1


def test_removed_in_the_moment_of_its_answer_it_is_cleaned_up(fake, runtime):
    def forget(node):
        with fake.registry() as registry:
            registry.forget(node)

    runtime.after_begin = forget
    fake.output("/create_tool_service", "add")
    wait_until(lambda: runtime.removed)
    assert runtime.nodes == {}


def test_pending_tool_says_so_to_a_call(fake, runtime):
    runtime.may_begin.clear()
    fake.output("/create_tool_service", "add")
    for path in ("/execute_tool", "/tool_info"):
        got = fake.ask(path, {"tool_name": "add"})
        message = "the tool add_default is still being started; ask again soon"
        assert (got.status, got.json()["message"]) == (409, message)
    runtime.may_begin.set()


def test_removed_while_pending_it_never_runs(fake, runtime):
    runtime.may_begin.clear()
    fake.output("/create_tool_service", "add")
    wait_until(lambda: runtime.begun)
    assert fake.remove("add")["status"] == "exited"
    assert runtime.begun[0][0].node_id in runtime.removed
    runtime.may_begin.set()
    assert fake.ask("/tool_info", {"tool_name": "add"}).status == 404
    assert runtime.nodes == {}
    fake.create("add")


def test_removed_while_it_waits_for_others_to_start(fake, runtime):
    """Its removal does not wait for them."""
    runtime.may_begin.clear()
    for tenant in range(rock_sdk.PARALLEL_STARTS):
        fake.output("/create_tool_service", "add", tenant_id=str(tenant))
    wait_until(lambda: len(runtime.begun) == rock_sdk.PARALLEL_STARTS)
    fake.output("/create_tool_service", "add", tenant_id="last")
    assert fake.remove("add", "last")["status"] == "exited"
    assert len(runtime.begun) == rock_sdk.PARALLEL_STARTS
    runtime.may_begin.set()


def test_updated_while_pending_only_the_later_runs(fake, runtime):
    runtime.may_begin.clear()
    fake.output("/create_tool_service", "add", tool_cfg={"number": 1})
    wait_until(lambda: runtime.begun)
    assert fake.output("/update_tool_service", "add", tool_cfg={"number": 2})["status"] == "pending"
    wait_until(lambda: len(runtime.begun) == 2)
    runtime.may_begin.set()
    assert fake.settled("add") == ("running", "")
    assert [order.tool_cfg["number"] for _, order in runtime.begun] == [1, 2]
    earlier, later = (node.node_id for node, _ in runtime.begun)
    wait_until(lambda: list(runtime.nodes) == [later], "the end of the earlier node")
    assert earlier in runtime.removed and fake.node("add").node_id == later


def test_updated_by_many_at_once_one_runs(fake, runtime):
    fake.create("add")
    updates = [Later(lambda: fake.output("/update_tool_service", "add")) for _ in range(6)]
    for update in updates:
        update.result()
    assert fake.settled("add") == ("running", "")
    wait_until(lambda: list(runtime.nodes) == [fake.node("add").node_id])


def test_creation_and_removal_in_a_crowd_leave_what_is_registered(fake, runtime):
    def worker(number):
        for step in range(6):
            path = ("/create_tool_service", "/remove_tool", "/update_tool_service")[(number + step) % 3]
            assert fake.ask(path, {"tool_name": "add", "tenant_id": str(step % 2)}).status in (200, 404)

    for later in [Later(lambda number=number: worker(number)) for number in range(6)]:
        later.result()
    with fake.registry() as registry:
        wait_until(lambda: not any(node.status == "pending" for node in registry.nodes()))
        wait_until(lambda: sorted(runtime.nodes) == sorted(node.node_id for node in registry.nodes() if node.is_live))


def test_no_more_tools_than_allowed(tmp_path, runtime):
    with managing(tmp_path / "data", runtime, max_nodes=2) as manager:
        manager.create("RenewInstance", "a")
        manager.create("amap_weather", "a")
        got = manager.ask("/create_tool_service", {"tool_name": "RenewInstance", "tenant_id": "b"})
        assert got.status == 503
        assert "2 tools run already, as many as may: remove one first" in got.json()["message"]
        assert manager.ask("/update_tool_service", {"tool_name": "RenewInstance", "tenant_id": "a"}).status == 200
        manager.remove("amap_weather", "a")
        manager.create("RenewInstance", "b")


def test_registry_that_cannot_be_written_is_an_error_and_no_endless_start(tmp_path, runtime, monkeypatch):
    monkeypatch.setattr(rock_sdk, "REGISTRY_SECONDS", 0.01)
    runtime.may_begin.clear()
    with managing(tmp_path / "data", runtime) as manager:
        manager.output("/create_tool_service", "RenewInstance")
        wait_until(lambda: runtime.begun)
        other = sqlite3.connect(manager.registry_path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        runtime.may_begin.set()
        wait_until(lambda: runtime.removed)
        got = manager.ask("/create_tool_service", {"tool_name": "amap_weather"})
        assert got.status == 500
        assert got.json()["message"] == "the service cannot store this call; its own log says why"
        other.close()
        status, message = manager.settled("RenewInstance")
        assert (status, message) == ("failed", "the tool manager's registry could not be written; create it again")
        assert [line for line in manager.logged if "database is locked" in line]
        assert runtime.nodes == {}
        manager.create("RenewInstance")


# Managers that come and go --------------------------------------------------------------------------------------------


def test_next_manager_finds_what_the_last_one_left(tmp_path, runtime):
    """Nodes that live, that have died, that were being started, and one that is nobody's."""
    directory = tmp_path / "data"
    with managing(directory, runtime, on_stop="keep") as manager:
        for tenant in ("lives", "dies"):
            manager.create("RenewInstance", tenant)
        lives, dies = (manager.node("RenewInstance", tenant) for tenant in ("lives", "dies"))
    pending = replace(lives, tenant_id="pending", node_id="2" * 32, status="pending")
    nobodys = replace(lives, node_id="3" * 32, port=free_port())
    with contextlib.closing(rock_sdk.ToolRegistry(str(directory / rock_sdk.REGISTRY_NAME))) as registry:
        registry.put(pending)
    with nothing_left():
        runtime.nodes.update({node.node_id: FakeNode(node) for node in (lives, nobodys)})
        runtime.end_of_all = (None, "it ended")
        with managing(directory, runtime) as manager:
            assert manager.status("RenewInstance", "lives") == ("running", "")
            assert manager.call("RenewInstance", "x", tenant_id="lives") == "x"
            assert manager.status("RenewInstance", "dies") == ("exited", "it ended")
            why = "the tool manager ended while it was starting the tool; create it again"
            assert manager.status("RenewInstance", "pending") == ("failed", why)
            wait_until(lambda: list(runtime.nodes) == [lives.node_id])
            assert dies.node_id in runtime.removed
    assert runtime.nodes == {}


def test_kept_nodes_go_on_with_the_next_manager(tmp_path):
    directory = tmp_path / "data"
    directory.mkdir()
    manager = Manager(directory, on_stop="keep")
    manager.server.start()
    manager.create("RenewInstance")
    node = manager.node("RenewInstance")
    manager.server.stop()
    assert sandboxes.processes_with(node.node_id)
    with managing(directory) as manager:
        assert manager.status("RenewInstance") == ("running", "")
        assert manager.node("RenewInstance") == node
    assert sandboxes.processes_with(node.node_id) == []


def test_manager_that_cannot_listen_leaves_the_nodes_alone(tmp_path, runtime):
    with managing(tmp_path / "data", runtime, on_stop="keep") as manager:
        manager.create("RenewInstance")
        with pytest.raises(rock_ms.RockError, match="cannot listen"):
            Manager(tmp_path / "data", runtime, port=manager.port)
        assert manager.status("RenewInstance") == ("running", "")


@pytest.mark.parametrize("on_stop", ["remove", "keep"])
def test_stopped_while_a_tool_starts(tmp_path, runtime, on_stop):
    runtime.may_begin.clear()
    with managing(tmp_path / "data", runtime, on_stop=on_stop) as manager:
        manager.output("/create_tool_service", "RenewInstance")
        wait_until(lambda: runtime.begun)
    node = manager.node("RenewInstance")
    assert (node.status, node.message) == ("exited", rock_sdk.STOPPED)
    assert runtime.removed == [node.node_id]


def test_stopped_under_load_it_leaves_nothing(tmp_path, tool_dir):
    statuses = []

    def worker(tenant):
        for step in range(1000):
            path = ("/create_tool_service", "/execute_tool", "/tools")[step % 3]
            try:
                value = {"tenant_id": tenant} if step % 3 == 2 else {"tool_name": "add", "tenant_id": tenant}
                got = manager.ask(path, value, "GET" if step % 3 == 2 else "POST")
            except ConnectionRefusedError:
                return
            except (OSError, HTTPException):
                continue  # cut off by the stop
            statuses.append(got.status)

    with managing(tmp_path / "data", tool_dir=tool_dir) as manager:
        workers = [Later(lambda n=n: worker("t%d" % n)) for n in range(8)]
        wait_until(lambda: statuses.count(200) > 50)
    for later in workers:
        later.result()
    assert set(statuses) <= {200, 400, 404, 409, 502, 503}
    assert {node.status for node in nodes_of(manager)} <= {"exited", "failed"}


def nodes_of(manager):
    with manager.registry() as registry:
        return registry.nodes()


# Nodes that misbehave -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bad_node(manager, runtime, answer):
    """Register a node that runs, a server of raw bytes that proves who it is.

    answer: socket -> what it sends to a request, in pieces.
    """

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            nonce = re.match(rb"GET /identity\?nonce=(\w+) ", self.request.recv(65536))
            with contextlib.suppress(OSError):
                for piece in [proof(nonce.group(1).decode())] if nonce else answer(self.request):
                    self.request.sendall(piece)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = False

    with serving(Server(("127.0.0.1", 0), Handler)) as server:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        node = rock_sdk.Node("default", "bad", "4" * 32, "process", "running", port=server.server_address[1])
        with manager.registry() as registry:
            registry.put(node)  # before there is anything of it, or it would be nobody's
            runtime.nodes[node.node_id] = None  # it has not ended
            yield
            del runtime.nodes[node.node_id]
            registry.forget(node)


def proof(nonce):
    body = rock_ms.dump_json({"output": rock_ms.node_proof("", nonce)}).encode()
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def dripping(head, piece, pause):
    yield head
    while not pause.wait(0.005):
        yield piece


@pytest.mark.parametrize(
    "head, piece",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["length", "chunked", "header", "interim"],
)
def test_node_whose_answer_drips_cannot_hold_a_call(tmp_path, runtime, monkeypatch, head, piece):
    monkeypatch.setattr(rock_sdk, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(rock_ms, "TOOL_LOAD_SECONDS", 0.05)
    pause = threading.Event()
    with managing(tmp_path / "data", runtime, request_timeout=0.1) as manager:
        with bad_node(manager, runtime, lambda _: dripping(head, piece, pause)):
            try:
                got = manager.ask("/execute_tool", {"tool_name": "bad"})
            finally:
                pause.set()
    assert got.status == 504
    assert re.search("took longer than 0.3 s|silent for too long", got.json()["message"])


def test_node_that_reads_slowly_cannot_hold_a_call(tmp_path, runtime, monkeypatch):
    monkeypatch.setattr(rock_sdk, "GRACE_SECONDS", 0.05)
    monkeypatch.setattr(rock_ms, "TOOL_LOAD_SECONDS", 0.05)
    pause = threading.Event()

    def reading(sock):
        while not pause.wait(0.02) and sock.recv(65536):
            yield b""

    with managing(tmp_path / "data", runtime, request_timeout=0.1) as manager:
        with bad_node(manager, runtime, reading):
            try:
                got = manager.ask("/execute_tool", {"tool_name": "bad", "params": "x" * 15000000})
            finally:
                pause.set()
    assert (got.status, got.json()["message"].partition(": ")[2]) == (504, "it took longer than 0.3 s")


def test_node_cannot_answer_without_end(fake, runtime, monkeypatch):
    monkeypatch.setattr(rock_sdk, "MAX_ANSWER_BYTES", 1000000)
    flood = [b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 65536] * 10000]
    with bad_node(fake, runtime, lambda _: flood):
        got = fake.ask("/execute_tool", {"tool_name": "bad"})
    assert got.status == 502
    assert "its answer has more than 1000000 bytes" in got.json()["message"]


@pytest.mark.parametrize(
    "answer, status, said",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", 502, "its answer is an array"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n\xff\xff\xff", 502, "does not answer"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\nContent-Length: 2\r\n\r\n{}", 502, "node answered 302"),
        (b"HTTP/1.1 204 No\r\n\r\n", 502, "is not JSON"),
        (b"HTTP/1.1 400 Bad\r\nContent-Length: 15\r\n\r\n" + b'{"message":"m"}', 400, "m"),
        (b"not HTTP at all\r\n\r\n", 502, "no HTTP/1.1 response"),
        (b"", 502, "closed the connection"),
    ],
    ids=["list", "bytes", "redirect", "empty", "refusal", "garbage", "nothing"],
)
def test_odd_answer_of_a_node_is_an_error(fake, runtime, answer, status, said):
    with bad_node(fake, runtime, lambda _: [answer]):
        got = fake.ask("/execute_tool", {"tool_name": "bad"})
    assert (got.status, list(got.json())) == (status, ["request_id", "message"])
    assert said in got.json()["message"]


def test_whoever_takes_a_dead_nodes_port_gets_no_key_and_is_not_believed(fake, runtime):
    """It answers whatever is asked for, with what was asked."""
    seen = []

    class Parrot(socketserver.StreamRequestHandler):
        def handle(self):
            seen.append(self.request.recv(65536))
            body = rock_ms.dump_json({"request_id": "x", "message": "", "output": seen[-1].decode()}).encode()
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True

    fake.create("add", "parrot")
    node = fake.node("add", "parrot")
    runtime.end(node.node_id)
    with serving(Server(("127.0.0.1", node.port), Parrot)):
        got = fake.ask("/execute_tool", {"tool_name": "add", "tenant_id": "parrot", "params": {"secret": "x"}})
        assert (got.status, fake.status("add", "parrot")) == (502, ("failed", "it ended"))
    assert seen and not [data for data in seen if node.api_key.encode() in data or b"secret" in data]


def test_the_operators_variables_go_into_no_image_that_a_tenant_names(tmp_path, runtime, monkeypatch):
    monkeypatch.setenv("OF_THE_OPERATOR", "its secret")
    with managing(tmp_path / "data", runtime, tool_env=("OF_THE_OPERATOR",)) as manager:
        manager.create("RenewInstance", "own")
        manager.create("RenewInstance", "other", tool_image="evil.example/image")
        manager.create("RenewInstance", "original", tool_image="modelscope-agent/tool-node:lastest")
    assert [order.tool_env for _, order in runtime.begun] == [
        {"OF_THE_OPERATOR": "its secret"},
        {},
        {"OF_THE_OPERATOR": "its secret"},
    ]


def test_what_could_not_be_removed_is_said_and_removed_later(tmp_path, runtime, monkeypatch):
    monkeypatch.setattr(rock_sdk, "SWEEP_SECONDS", 0.05)
    remove, failures = runtime.remove, [rock_sdk.NodeError("the engine is busy")]

    def remove_at_last(node_id):
        if failures:
            raise failures.pop()
        remove(node_id)

    with managing(tmp_path / "data", runtime) as manager:
        manager.create("RenewInstance")
        monkeypatch.setattr(runtime, "remove", remove_at_last)
        got = manager.ask("/remove_tool", {"tool_name": "RenewInstance"}).json()
        assert got["output"]["status"] == "exited" and "the engine is busy" in got["message"]
        wait_until(lambda: runtime.nodes == {}, "the next attempt")


def test_nodes_are_looked_after_whatever_a_look_meets(tmp_path, runtime, monkeypatch):
    monkeypatch.setattr(rock_sdk, "SWEEP_SECONDS", 0.05)
    failures = [ValueError("a bug"), rock_sdk.NodeError("no engine"), rock_ms.ApiError(503, "no thread")]
    left = []

    def left_at_last():
        if failures:
            raise failures.pop()
        return left

    monkeypatch.setattr(runtime, "left", left_at_last)
    with managing(tmp_path / "data", runtime):
        wait_until(lambda: not failures, "all failures")
        left.append("2" * 32)
        wait_until(lambda: "2" * 32 in runtime.removed, "the removal of what is nobody's")


def test_nodes_that_have_ended_make_room_for_others(tmp_path, runtime):
    with managing(tmp_path / "data", runtime, max_nodes=1) as manager:
        manager.create("RenewInstance", "first")
        assert manager.ask("/create_tool_service", {"tool_name": "RenewInstance", "tenant_id": "second"}).status == 503
        runtime.end(manager.node("RenewInstance", "first").node_id)
        manager.create("RenewInstance", "second")


def test_client_that_hangs_up_ends_its_call(fake, runtime):
    fake.create("add")
    called, may_answer = threading.Event(), threading.Event()

    def execute(_):
        called.set()
        may_answer.wait(TIMEOUT)
        return rock_ms.envelope("late")

    runtime.nodes[fake.node("add").node_id].execute = execute
    body = b'{"tool_name": "add"}'
    with socket.create_connection(("127.0.0.1", fake.port), TIMEOUT) as sock:
        sock.sendall(raw_request(body, path=b"/execute_tool"))
        assert called.wait(TIMEOUT)
    wait_until(lambda: [line for line in fake.logged if "/execute_tool 499" in line])
    may_answer.set()


# Bad requests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict(tmp_path_factory, tool_dir):
    """A manager that the tests of bad requests share."""
    runtime = FakeRuntime()
    with managing(tmp_path_factory.mktemp("strict"), runtime, tool_dir=tool_dir) as manager:
        manager.create("add")
        yield manager


BAD_NAMES = ["..", "../add", "a/b", "/etc/passwd", "add\n", "add\0", "-rf", ".add", "", "x" * 65, "ädd", "a b", "$(id)"]


@pytest.mark.parametrize("field", ["tool_name", "tenant_id"])
@pytest.mark.parametrize("name", BAD_NAMES)
def test_name_that_could_be_something_else_is_refused(strict, field, name):
    value = {"tool_name": "add", field: name}
    for path in ("/create_tool_service", "/remove_tool", "/execute_tool"):
        got = strict.ask(path, value)
        assert got.status == 400
        assert got.json()["message"].startswith(field + " must be 1 to 64 letters, digits")


@pytest.mark.parametrize(
    "path, body, status, said",
    [
        ("/create_tool_service", b'{"tool_name": ', 400, "is not JSON"),
        ("/create_tool_service", b'["add"]', 400, "must be a JSON object, got an array"),
        ("/create_tool_service", b"\xff\xfe", 400, "not UTF-8"),
        ("/create_tool_service", b'{"tool_name": NaN}', 400, "NaN"),
        ("/create_tool_service", b"{}", 400, "tool_name"),
        ("/create_tool_service", b"", 400, "tool_name"),
        ("/create_tool_service", {"tool_name": 1}, 400, "tool_name must be a string, got"),
        ("/create_tool_service", {"tool_name": None}, 400, "tool_name"),
        ("/create_tool_service", {"tool_name": "add", "tenant_id": ["t"]}, 400, "tenant_id must be a string"),
        ("/create_tool_service", {"tool_name": "add", "tool_cfg": "{}"}, 400, "tool_cfg must be an object"),
        (
            "/create_tool_service",
            {"tool_name": "add", "tool_image": "--privileged"},
            400,
            "tool_image must be the name",
        ),
        ("/create_tool_service", {"tool_name": "add", "tool_image": "a\n"}, 400, "tool_image must be the name"),
        ("/create_tool_service", {"tool_name": "add", "tool_url": "http://x"}, 400, "tool_url"),
        ("/create_tool_service", {"tool_name": "add", "tool_conf": {}}, 400, "tool_conf"),
        ("/create_tool_service?tool_name=add&tool_cfg=%7B", b"", 400, "tool_cfg is not JSON"),
        ("/create_tool_service", {"tool_name": "ad"}, 404, "there is no tool ad: did you mean 'add'?"),
        ("/update_tool_service", {"tool_name": "amap_weather"}, 404, "has no tool amap_weather: create it first"),
        ("/check_tool_service_status", {"tool_name": "add", "tenant_id": "x"}, 404, "the tenant x has no tool add"),
        ("/check_tool_service_status?tool_name=add&tool_name=environ", b"", 400, "twice"),
        ("/remove_tool?tool_name=add%00", b"", 400, "tool_name must be"),
        ("/execute_tool", {"tool_name": "add", "params": [1]}, 400, "params must be"),
        ("/execute_tool", {"tool_name": "add", "params": 1}, 400, "params must be"),
        ("/execute_tool", {"tool_name": "add", "kwargs": "x"}, 400, "kwargs must be an object"),
        ("/execute_tool", b"[" * 100000, 400, "nested too deeply"),
        ("/no_such_path", {}, 404, "there is no /no_such_path here"),
        ("/tools", {}, 405, "POST is not allowed on /tools"),
    ],
)
def test_bad_request_is_refused_with_its_reason(strict, path, body, status, said):
    got = strict.ask(path, body)
    assert (got.status, list(got.json())) == (status, ["request_id", "message"])
    assert said in got.json()["message"]
    assert strict.status("add") == ("running", "")


def test_body_of_another_type_is_refused(strict):
    """As a form of a page elsewhere, which a browser sends without asking."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert strict.ask("/remove_tool", {"tool_name": "add"}, headers={"Content-Type": kind}).status == 415


def test_fifty_megabytes_of_params_are_refused(strict):
    body = json.dumps({"tool_name": "add", "params": "x" * 50000000}).encode()
    got = strict.ask("/execute_tool", body)
    assert (got.status, got.json()["message"]) == (413, "the request body is larger than 16777216 bytes")


@pytest.mark.parametrize("params", ["a\0b", "ü\ud800", "\x7f", {"x": 1e300}, "", "{}", {}])
def test_odd_params_reach_the_tool_as_they_are(strict, params):
    assert strict.call("add", params) == (params or {})


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1", "same"])
def test_page_in_a_browser_cannot_use_it(strict, origin):
    origin = strict.url if origin == "same" else origin
    for path, method in (("/execute_tool?tool_name=add", "POST"), ("/tools", "GET")):
        got = strict.ask(path, method=method, headers={"Origin": origin})
        assert got.status == 403
        assert "from a browser" in got.json()["message"]


def test_unknown_tool_says_which_there_are(tmp_path, runtime):
    with managing(tmp_path / "data", runtime) as manager:
        got = manager.ask("/create_tool_service", {"tool_name": "renewinstance"})
        assert "did you mean 'RenewInstance'?; own ones need the manager's --tool-dir" in got.json()["message"]
        got = manager.ask("/create_tool_service", {"tool_name": "zzz"})
        assert "known are RenewInstance, amap_weather, image_gen" in got.json()["message"]


def test_tool_directory_that_is_gone_is_no_bug(tmp_path, runtime):
    tools = write_tools(tmp_path / "tools")
    with managing(tmp_path / "data", runtime, tool_dir=tools) as manager:
        os.rmdir(tools)
        assert manager.ask("/create_tool_service", {"tool_name": "mine"}).status == 404


# Keys -----------------------------------------------------------------------------------------------------------------

KEYS = {"api_key": "key-of-all", "tenant_keys": {"ann": "key-of-ann", "bob": "key-of-bob"}}


@pytest.fixture
def locked(tmp_path, runtime):
    with managing(tmp_path / "data", runtime, **KEYS) as manager:
        yield manager


def bearing(key):
    return {"Authorization": "Bearer " + key}


@pytest.mark.parametrize(
    "given, status",
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer wrong", 401),
        ("Basic key-of-all", 401),
        ("key-of-al", 401),
        ("Bearer kéy", 401),
        ("key-of-all", 200),
        ("Bearer key-of-all", 200),
        ("bearer  key-of-all", 200),
        ("key-of-ann", 200),
        ("Bearer key-of-ann", 200),
    ],
)
def test_key_is_asked_for(locked, given, status):
    headers = {} if given is None else {"Authorization": given}
    for path in ("/tools", "/tools/", "/metrics"):
        assert locked.ask(path, method="GET", headers=headers).status == status
    if status == 401:
        for path in ("/create_tool_service", "/execute_tool", "/remove_tool"):
            got = locked.ask(path, {"tool_name": "RenewInstance"}, headers=headers)
            assert (got.status, list(got.json())) == (401, ["request_id", "message"])
            assert got.headers["www-authenticate"] == "Bearer"


def test_open_without_a_key_are_health_and_documents_only(locked):
    opened = [
        path for path in ("/", "/health", "/docs", "/openapi.json") if locked.ask(path, method="GET").status == 200
    ]
    assert opened == ["/", "/health", "/docs", "/openapi.json"]


@pytest.mark.everywhere
def test_tenant_cannot_see_call_or_remove_anothers_tool(locked):
    ann, bob, everybody = (bearing(key) for key in ("key-of-ann", "key-of-bob", "key-of-all"))
    value = {"tool_name": "RenewInstance"}
    assert locked.ask("/create_tool_service", value, headers=ann).json()["output"] == {
        "tool_node_name": "RenewInstance_ann",
        "status": "pending",
    }
    assert locked.settled("RenewInstance", "ann", headers=ann) == ("running", "")
    paths = ["/create_tool_service", "/check_tool_service_status", "/update_tool_service", "/remove_tool"]
    for path in [*paths, "/tool_info", "/execute_tool"]:
        got = locked.ask(path, {**value, "tenant_id": "ann"}, headers=bob)
        assert (got.status, got.json()["message"]) == (403, "the tenant of this key is bob, not ann")
        got = locked.ask(path + "?tenant_id=ann", value, headers=bob)
        assert got.status == 403
    assert locked.ask("/tools?tenant_id=ann", method="GET", headers=bob).status == 403
    for query in ("", "?tenant_id=bob", "?tenant_id=default"):
        assert locked.ask("/tools" + query, method="GET", headers=bob).json()["output"] == {"tools": {}}
    assert locked.ask("/execute_tool", value, headers=bob).status == 404
    seen = locked.ask("/tools?tenant_id=ann", method="GET", headers=everybody).json()["output"]
    assert seen == {"tools": {"RenewInstance_ann": "running"}}
    assert locked.ask("/execute_tool", {**value, "tenant_id": "ann", "params": "x"}, headers=everybody).status == 200
    assert locked.ask("/tools", method="GET", headers=everybody).json()["output"] == {"tools": {}}


def test_tenant_named_default_is_a_tenant_as_any_other(tmp_path, runtime):
    keys = {"default": "key-of-default", "ann": "key-of-ann"}
    with managing(tmp_path / "data", runtime, tenant_keys=keys) as manager:
        assert manager.ask("/tools", method="GET", headers=bearing("key-of-ann")).status == 403
        assert manager.ask("/tools?tenant_id=ann", method="GET", headers=bearing("key-of-ann")).status == 200
        assert manager.ask("/tools", method="GET", headers=bearing("key-of-default")).status == 200


def test_keys_of_the_manager_are_in_no_log(locked):
    locked.ask("/tools", method="GET", headers=bearing("key-of-ann"))
    locked.ask("/tools", method="GET", headers=bearing("wrong-key-of-ann"))
    assert not [line for line in locked.logged if "key-of" in line]
    assert files_with(locked.data_dir, "key-of") == []


# Documents, metrics ---------------------------------------------------------------------------------------------------


def test_documents_describe_every_route(strict):
    document = strict.ask("/openapi.json", method="GET").json()
    routes = {
        (route.method.lower(), path)
        for path, methods in strict.server.http.router._exact.items()
        for route in methods.values()
        if path not in ("/", "/health", "/metrics", "/docs", "/openapi.json")
    }
    assert {(method, path) for path, methods in document["paths"].items() for method in methods} == routes
    page = strict.ask("/docs", method="GET")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for method, path in routes:
        assert "<tr><td>%s<td><code>%s</code>" % (method.upper(), path) in page.body.decode("utf-8")
    assert "http" not in re.sub("(?s)<style>.*?</style>", "", page.body.decode("utf-8"))


def test_documents_say_what_is_taken(strict):
    paths = strict.ask("/openapi.json", method="GET").json()["paths"]
    schema = paths["/execute_tool"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert list(schema["properties"]) == ["tool_name", "tenant_id", "params", "kwargs"]
    assert schema["required"] == ["tool_name"]
    query = paths["/check_tool_service_status"]["get"]["parameters"]
    assert [(item["name"], item["required"]) for item in query] == [("tool_name", True), ("tenant_id", False)]


def test_metrics_count_nodes_and_requests(fake):
    fake.create("add")
    text = fake.ask("/metrics", method="GET").body.decode()
    assert "\nrock_tool_nodes 1\n" in text
    assert 'rock_http_requests_total{method="POST",route="/create_tool_service",status="200"} 1\n' in text
    fake.remove("add")
    assert "\nrock_tool_nodes 0\n" in fake.ask("/metrics", method="GET").body.decode()
