"""Tool managers for the tests: one in this process, and nodes that are servers of this process, too."""

import contextlib
import logging
import os
import socket
import threading
from unittest import mock

import rock_ms
import rock_sdk
import sandboxes
from support import ask, nothing_left, wait_until

ADD = '''
def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: the one
    """
    return a + b
'''


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def write_tools(directory, **texts):
    """A directory of tools, each a text by its name."""
    directory.mkdir(exist_ok=True)
    for name, text in texts.items():
        (directory / (name + ".py")).write_text(text)
    return str(directory)


class FakeNode:
    """A node that is a server of this process.  execute: from the params of a call to a Reply."""

    def __init__(self, node):
        self._key = node.api_key
        routes = [
            rock_ms.Route("GET", "/identity", self._identity, is_open=True),
            rock_ms.Route("GET", "/tool_info", self._info),
            rock_ms.Route("POST", "/execute_tool", lambda request: self.execute(request.json()[1])),
        ]
        self._info_of = {"name": node.tool_name, "description": "a fake", "parameters": []}
        self.execute = lambda call: rock_ms.envelope(call["params"], request_id=call["request_id"])
        options = {"authorise": rock_ms.bearer_check(node.api_key), "error_reply": rock_ms.envelope_error}
        self.http = rock_ms.HTTPService("127.0.0.1", node.port, routes, logging.Logger("node"), "tool-node", **options)
        self.http.start()

    def _identity(self, request):
        nonce = request.head.query.partition("=")[2]
        return rock_ms.envelope(rock_ms.node_proof(self._key, nonce))

    def _info(self, _):
        return rock_ms.envelope(self._info_of)

    def close(self):
        self.http.stop(0.0)


class FakeRuntime:
    """A runtime whose nodes are of this process.

    may_begin: cleared, no node comes further.  failures: what `begin` raises, the first first.  after_begin: called
    with each node once it is there.  begun: (node, order) of each begin.  nodes: those that live, by their ids.
    removed: ids.  end_of_all: (exit code, how) of those that do not live.  words: what they said.
    """

    warning = ""

    def __init__(self):
        self.may_begin = threading.Event()
        self.may_begin.set()
        self.failures = []
        self.after_begin = lambda node: None
        self.begun = []
        self.nodes = {}
        self.removed = []
        self.end_of_all = (1, "it ended")
        self.words = "its last words"

    def prepare(self, node, is_unwanted):
        pass

    def said(self, _):
        return self.words

    def bound_log(self, _):
        pass

    def begin(self, node, order, is_unwanted):
        self.begun.append((node, order))
        while not self.may_begin.wait(0.005):
            if is_unwanted():
                raise rock_sdk.NodeError(rock_sdk.UNWANTED)
        if self.failures:
            raise self.failures.pop(0)
        self.nodes[node.node_id] = FakeNode(node)
        self.after_begin(node)

    def ended(self, node):
        return None if node.node_id in self.nodes else self.end_of_all

    def remove(self, node_id):
        self.removed.append(node_id)
        self.end(node_id)

    def end(self, node_id):
        fake = self.nodes.pop(node_id, None)
        if fake:
            fake.close()

    def left(self):
        return list(self.nodes)


class Manager:
    """A tool manager in this process, on a free port.  fake: a FakeRuntime; None for a real one."""

    def __init__(self, directory, fake=None, **settings):
        self.data_dir = str(directory)
        self.settings = rock_sdk.ManagerSettings(
            **{"runtime": "process", "port": 0, "first_node_port": free_port(), **settings}
        )
        self.logged = []
        logger = logging.Logger("test")
        handler = logging.Handler()
        handler.emit = lambda record: self.logged.append(handler.format(record))
        logger.addHandler(handler)
        self.server = self._server(fake, logger)
        self.port = self.server.http.port
        self.url = "http://127.0.0.1:%d" % self.port

    def _server(self, fake, logger):
        if fake is None:
            return rock_sdk.tool_manager_server(self.settings, self.data_dir, logger)
        registry = rock_sdk.ToolRegistry(self.registry_path)
        manager = rock_sdk.ToolManager(registry, {"process": fake}, self.settings, logger)
        operations = rock_sdk.Operations(registry, self.settings.request_timeout)
        service = rock_sdk.ToolService(manager, operations, self.settings)
        options = {"authorise": service.authorise, "error_reply": rock_ms.envelope_error}
        return rock_ms.Server(service, self.settings, logger, **options)

    @property
    def registry_path(self):
        return os.path.join(self.data_dir, rock_sdk.REGISTRY_NAME)

    @contextlib.contextmanager
    def registry(self):
        """Its registry, opened beside it."""
        registry = rock_sdk.ToolRegistry(self.registry_path)
        try:
            yield registry
        finally:
            registry.close()

    def node(self, tool_name, tenant_id="default"):
        """What the registry says of a tool."""
        with self.registry() as registry:
            return registry.node(tenant_id, tool_name)

    def place(self, node):
        """The directory of a node that is a process."""
        return os.path.join(self.data_dir, "nodes", node.node_id)

    def pid(self, node):
        """The process of such a node."""
        return rock_ms.ServiceState(os.path.join(self.place(node), "data")).read()["pid"]

    def ask(self, path, value=None, method="POST", **options):
        return ask(self.port, value, method, path, **options)

    def output(self, path, tool_name, **more):
        """The output of an answer that must be a success."""
        got = self.ask(path, {"tool_name": tool_name, **more})
        assert got.status == 200, got.body
        return got.json()["output"]

    def status(self, tool_name, tenant_id="default", **options):
        """(status, message) of a tool."""
        value = {"tool_name": tool_name, "tenant_id": tenant_id}
        said = self.ask("/check_tool_service_status/", value, **options).json()
        return said["output"]["status"], said["message"]

    def settled(self, tool_name, tenant_id="default", **options):
        """As `status`, once it is not pending any more."""

        def settled():
            said = self.status(tool_name, tenant_id, **options)
            return said if said[0] != "pending" else None

        return wait_until(settled, "the start of %s" % tool_name)

    def create(self, tool_name, tenant_id="default", **more):
        """Create a tool that must run."""
        self.output("/create_tool_service", tool_name, tenant_id=tenant_id, **more)
        said = self.settled(tool_name, tenant_id)
        assert said == ("running", ""), said

    def call(self, tool_name, params=None, **more):
        """What a tool answers."""
        return self.output("/execute_tool", tool_name, params=params or {}, **more)

    def remove(self, tool_name, tenant_id="default"):
        return self.output("/remove_tool/", tool_name, tenant_id=tenant_id)


@contextlib.contextmanager
def managing(directory, fake=None, **options):
    """A Manager that answers, stopped at the end without leaving anything, unless it keeps its nodes."""
    directory.mkdir(exist_ok=True)
    # The processes of its nodes, and theirs, are found by their TMPDIR.
    with nothing_left(), mock.patch.dict(os.environ, TMPDIR=str(directory)):
        manager = Manager(directory, fake, **options)
        manager.server.start()
        try:
            yield manager
        finally:
            manager.server.stop()
            left = list(fake.nodes) if fake else []
            for node_id in left:
                fake.end(node_id)
        assert not left or manager.settings.on_stop == "keep"
    assert_nothing_left(directory)


def assert_nothing_left(directory):
    """That no process and no directory of a node is left."""
    assert sandboxes.processes_with(str(directory)) == []
    places = os.path.join(str(directory), "nodes")
    assert not os.path.isdir(places) or os.listdir(places) == []
