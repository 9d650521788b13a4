"""ToolServiceProxy: a tool of the tool manager, as an agent uses it."""

import logging

import pytest

import rock_ms
import rock_sdk
from managers import ADD, FakeRuntime, free_port, managing, write_tools
from rock_sdk import ToolError, ToolServiceProxy
from support import TIMEOUT, Later, nothing_left, wait_until


@pytest.fixture(autouse=True)
def nothing_of_the_surroundings(monkeypatch):
    for name in ("TOOL_MANAGER_SERVICE_URL", "TOOL_MANAGER_AUTH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def runtime():
    return FakeRuntime()


@pytest.fixture
def manager(tmp_path, runtime, monkeypatch):
    """A tool manager whose nodes are fakes, at the URL that the environment names."""
    with managing(tmp_path / "data", runtime) as manager:
        monkeypatch.setenv("TOOL_MANAGER_SERVICE_URL", manager.url + "/")
        yield manager


def test_tool_says_what_it_is_and_answers(tmp_path):
    tools = write_tools(tmp_path / "tools", add=ADD)
    with managing(tmp_path / "data", tool_dir=tools) as manager:
        tool = ToolServiceProxy("add", tool_service_manager_url=manager.url)
        assert (tool.name, tool.description) == ("add", "Add two numbers.")
        assert tool.parameters["properties"]["a"] == {"type": "integer", "description": "the one"}
        assert tool.call('{"a": 41}') == 42
        assert tool.call({"a": 1, "b": 2}) == 3
        with pytest.raises(ToolError, match="the tool add refused: argument a must be") as caught:
            tool.call({"a": "x"})
        assert caught.value.status == 400


def test_arguments_are_those_of_modelscopes_class(manager, runtime):
    tool = ToolServiceProxy("RenewInstance", {"test": "xxx"}, "tenant", manager.url, "token")
    node, order = runtime.begun[0]
    assert (node.tool_name, node.tenant_id, order.tool_cfg) == ("RenewInstance", "tenant", {"test": "xxx"})
    assert tool.name == "RenewInstance"
    kwargs_seen = []
    fake = runtime.nodes[node.node_id]
    fake.execute = lambda call: kwargs_seen.append(call["kwargs"]) or rock_ms.envelope(call["params"])
    assert tool.call('{"x": 1}', user_token="new", more=[1]) == '{"x": 1}'
    assert kwargs_seen == [{"user_token": "new", "more": [1]}]
    assert tool.user_token == "token"  # what one call gives is not another's


def test_it_waits_until_the_tool_runs(manager, runtime):
    runtime.may_begin.clear()
    making = Later(lambda: ToolServiceProxy("RenewInstance"))
    wait_until(lambda: [line for line in manager.logged if "/check_tool_service_status" in line])
    assert not making.is_done()
    runtime.may_begin.set()
    assert making.result().name == "RenewInstance"


def test_wait_has_an_end(manager, runtime):
    runtime.may_begin.clear()
    with pytest.raises(ToolError, match="RenewInstance is still being started after 0.01 s"):
        ToolServiceProxy("RenewInstance", timeout=0.01)
    runtime.may_begin.set()
    manager.settled("RenewInstance")


@pytest.mark.usefixtures("manager")
def test_tool_that_fails_is_an_error_with_its_reason(runtime):
    runtime.failures = [rock_sdk.NodeError("no such image")]
    with pytest.raises(ToolError, match="the tool RenewInstance is failed: no such image"):
        ToolServiceProxy("RenewInstance", timeout=TIMEOUT)
    assert ToolServiceProxy("RenewInstance").call({"x": 1}) == {"x": 1}


def test_tool_that_ends_later_is_an_error_of_its_call(manager, runtime):
    tool = ToolServiceProxy("RenewInstance")
    runtime.end(manager.node("RenewInstance").node_id)
    with pytest.raises(ToolError, match="the tool RenewInstance_default does not answer: it ended") as caught:
        tool.call({})
    assert caught.value.status == 502
    with pytest.raises(ToolError, match="is failed: it ended") as caught:
        tool.call({})
    assert caught.value.status == 409


@pytest.mark.usefixtures("manager")
def test_another_configuration_than_asked_for_is_said(caplog):
    ToolServiceProxy("RenewInstance", {"number": 1})
    ToolServiceProxy("RenewInstance", {"number": 1})
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING, "rock_sdk"):
        ToolServiceProxy("RenewInstance", {"number": 2})
    assert "RenewInstance: the tool is there already, with another tool_cfg" in caplog.messages[0]


@pytest.mark.usefixtures("manager")
def test_unknown_tool_is_an_error_that_says_which_there_are():
    with pytest.raises(ToolError, match="did you mean 'RenewInstance'") as caught:
        ToolServiceProxy("RenewInstanc")
    assert caught.value.status == 404


def test_missing_manager_is_named():
    url = "http://127.0.0.1:%d" % free_port()
    said = "^no tool manager answers at %s: .*refused; start one, or set TOOL_MANAGER_SERVICE_URL$" % url
    with pytest.raises(ToolError, match=said) as caught:
        ToolServiceProxy("add", tool_service_manager_url=url)
    assert caught.value.status is None


@pytest.mark.parametrize(
    "url, message",
    [
        ("no url", "URL must be a base URL, as https://host/v1; set TOOL_MANAGER_SERVICE_URL"),
        ("user:key-of-all@127.0.0.1", "URL must be a base URL, as https://host/v1; set TOOL_MANAGER_SERVICE_URL"),
        (
            "http://127.0.0.1/?key=key-of-all",
            "URL must be a base URL, as https://host/v1; set TOOL_MANAGER_SERVICE_URL",
        ),
        ("http://user:key-of-all@127.0.0.1", "URL must not hold a key: give it in TOOL_MANAGER_AUTH"),
    ],
)
def test_managers_url_that_is_none_or_has_a_key_in_it_is_not_shown(monkeypatch, url, message):
    monkeypatch.setenv("TOOL_MANAGER_SERVICE_URL", url)
    with pytest.raises(ToolError) as caught:
        ToolServiceProxy("add")
    assert str(caught.value) == "the tool manager's " + message


@pytest.mark.parametrize("key", ["key-of-all", "Bearer key-of-all", " key-of-all\n"])
def test_key_comes_from_the_environment(tmp_path, runtime, monkeypatch, key):
    with managing(tmp_path / "data", runtime, api_key="key-of-all") as manager:
        with pytest.raises(ToolError, match="asks for its API key") as caught:
            ToolServiceProxy("RenewInstance", tool_service_manager_url=manager.url)
        assert caught.value.status == 401
        monkeypatch.setenv("TOOL_MANAGER_AUTH", key)
        assert ToolServiceProxy("RenewInstance", tool_service_manager_url=manager.url).call({"x": 1}) == {"x": 1}


def test_key_of_a_tenant_needs_no_tenant(tmp_path, runtime, monkeypatch):
    with managing(tmp_path / "data", runtime, tenant_keys={"ann": "key-of-ann"}) as manager:
        monkeypatch.setenv("TOOL_MANAGER_AUTH", "key-of-ann")
        ToolServiceProxy("RenewInstance", tool_service_manager_url=manager.url)
        assert manager.node("RenewInstance", "ann").status == "running"


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel", 7])
def test_key_that_no_header_can_carry_is_not_shown(key):
    with pytest.raises(ToolError, match="X-Modelscope-Agent-Token must be printable ASCII") as caught:
        ToolServiceProxy("RenewInstance", user_token=key)
    assert "lines" not in str(caught.value)


def test_proxy_of_the_environment_is_not_asked_for_this_machine(manager, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:%d" % free_port())
    for host in ("127.0.0.1", "localhost"):
        url = "http://%s:%d" % (host, manager.port)
        assert ToolServiceProxy("RenewInstance", tool_service_manager_url=url).call({"x": 1}) == {"x": 1}


class Recorder:
    """What a tool manager would answer, and the heads that came."""

    def __init__(self, answer):
        self.heads = []
        self._answer = answer
        routes = [rock_ms.Route("POST", "/{name}", self._handle)]
        self.http = rock_ms.HTTPService("127.0.0.1", 0, routes, logging.Logger("recorder"), "recorder")
        self.url = "http://127.0.0.1:%d" % self.http.port

    def _handle(self, request):
        self.heads.append(request.head)
        return self._answer

    def __enter__(self):
        self.http.start()
        return self

    def __exit__(self, *_):
        self.http.stop()


def test_token_of_the_user_goes_along(monkeypatch):
    monkeypatch.setenv("TOOL_MANAGER_AUTH", "key")
    output = {"status": "running", "name": "n", "description": "d", "parameters": []}
    with nothing_left(), Recorder(rock_ms.envelope(output)) as recorder:
        tool = ToolServiceProxy("n", tool_service_manager_url=recorder.url)
        tool.call({}, user_token="token-of-the-user")
        tool.call({})
    tokens = [head.header("x-modelscope-agent-token") for head in recorder.heads]
    assert tokens == [None, None, None, "token-of-the-user", None]
    assert {head.header("authorization") for head in recorder.heads} == {"key"}


@pytest.mark.parametrize(
    "answer, said",
    [
        (rock_ms.Reply(200, b"<html>"), "no tool manager answers at .*: its answer is not JSON"),
        (rock_ms.Reply(200, b"{}"), "no tool manager answers"),
        (rock_ms.Reply(502, b"<html>bad gateway"), "the tool manager answered 502: <html>bad gateway"),
        (rock_ms.Reply(500, b'{"request_id":"x","message":"internal"}'), "^internal$"),
    ],
    ids=["page", "other", "gateway", "error"],
)
def test_what_is_no_tool_manager_is_an_error(answer, said):
    with nothing_left(), Recorder(answer) as recorder, pytest.raises(ToolError, match=said):
        ToolServiceProxy("n", tool_service_manager_url=recorder.url)


@pytest.mark.usefixtures("manager")
def test_params_that_are_too_large_are_said_to_be():
    tool = ToolServiceProxy("RenewInstance")
    with pytest.raises(ToolError, match="larger than 16777216 bytes") as caught:
        tool.call({"x": "x" * 50000000})
    assert caught.value.status == 413
