"""A tool node, over HTTP: the envelope, what a tool may do to it, and what is left of that; and the real command."""

import contextlib
import glob
import hmac
import http.client
import json
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

import rock_ms
from rock_ms import ApiError, UsageError, WorkerPool, node_proof, process_identity
from support import (
    SCRIPT,
    TIMEOUT,
    Later,
    ask,
    clean_environ,
    nothing_left,
    open_descriptors,
    run_cli,
    running,
    wait_until,
)

pytestmark = pytest.mark.load

# A tool that does what it is told, in Python, and returns what that calls `result`.
ACT = """
import json

class Act:
    name = "act"
    description = "does what it is told"
    parameters = [{"name": "code", "type": "string", "required": True}]

    def __init__(self, cfg):
        self.cfg, self.calls = cfg, 0

    def call(self, params, **kwargs):
        self.calls += 1
        scope = {"self": self, "kwargs": kwargs}
        exec(json.loads(params)["code"], scope)
        return scope.get("result")
"""
KEYS = {"cfg": "sk-of-the-cfg-0123456789", "env": "sk-of-the-env-0123456789", "kwargs": "sk-of-the-call-0123456789"}


class Node:
    """A tool node in this process, of a tool with that source; see support.running."""

    def __init__(self, directory, source=ACT, tool="act", **settings):
        path = os.path.join(str(directory), "tool.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(source)
        settings = {"type": "tool-node", "host": "127.0.0.1", "port": 0, "tool": tool, "tool_file": path, **settings}
        logger, self.logged = logging.Logger("test"), []
        handler = logging.Handler()
        handler.emit = lambda record: self.logged.append(handler.format(record))
        logger.addHandler(handler)
        self.server = rock_ms.tool_server(rock_ms.ServiceSettings(**settings), logger)
        self.port = self.server.http.port

    def execute(self, params=None, **more):
        return ask(self.port, {"params": params, **more}, path="/execute_tool")

    def act(self, code, **kwargs):
        """Have the tool do that; the answer."""
        return self.execute({"code": code}, kwargs=kwargs)

    def result(self, code, **kwargs):
        """What comes of it, which must be no error."""
        reply = self.act(code, **kwargs)
        assert reply.status == 200, reply.body
        return reply.json()["output"]

    def later(self, code):
        return Later(lambda: self.act(code))


@pytest.fixture(scope="module", autouse=True)
def no_proxy_and_prompt_stops():
    """No HTTP proxy takes part, and calls that are being answered get little time when a node stops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rock_ms.HTTPService.stop, "__defaults__", (0.2,))
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The node that most tests use, one after the other."""
    cfg, environ = {"api_key": KEYS["cfg"], "user": "somebody-with-a-name"}, {"ROCK_TEST_OF_TOOL": KEYS["env"]}
    with running(tmp_path_factory.mktemp("node"), Node, tool_cfg=cfg, tool_env=environ) as node:
        yield node


@pytest.fixture
def node(shared):
    del shared.logged[:]
    yield shared
    assert shared.result("result = 6 * 7") == 42, "the node lives on"


@pytest.fixture(scope="module")
def hasty(shared, tmp_path_factory):  # noqa: ARG001  # which stops later, and sees what this one leaves
    """A node whose calls must not take a second."""
    node = Node(tmp_path_factory.mktemp("hasty"), request_timeout=1.0, tool_workers=1)
    node.server.start()
    yield node
    node.server.stop()


def wait_for_end(*pids):
    for pid in pids:
        wait_until(lambda pid=pid: process_identity(pid) is None, "the end of the process %d" % pid)


# The wire -----------------------------------------------------------------------------------------------------------


@pytest.mark.everywhere
def test_answers_are_modelscopes_envelope_byte_for_byte(node):
    reply = node.execute("{\"code\": \"result = {'a': [1.0, '\\u00e9']}\"}", request_id="r-1")
    assert reply.body == '{"request_id":"r-1","message":"","output":{"a":[1.0,"é"]}}\n'.encode()
    assert reply.headers["content-type"] == "application/json"
    reply = ask(node.port, method="GET", path="/tool_info/?request_id=r-2")
    assert reply.body == (
        b'{"request_id":"r-2","message":"","output":{"name":"act","description":"does what it is told",'
        b'"parameters":[{"name":"code","type":"string","required":true}]}}\n'
    )
    reply = node.execute({}, request_id="r-3")
    assert (reply.status, reply.body) == (
        400,
        b'{"request_id":"r-3","message":"the tool act refused: argument code is missing"}\n',
    )


def test_request_that_has_no_id_gets_one_of_its_own(node):
    replies = [node.act(""), node.execute({"code": ""}, request_id=7), node.act("1 / 0")]
    assert len({reply.json()["request_id"] for reply in replies}) == 3
    assert all(len(reply.json()["request_id"]) == 36 for reply in replies)
    assert replies[0].json() == {"request_id": replies[0].json()["request_id"], "message": "", "output": None}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "argument code is missing"),
        ({"params": ""}, "argument code is missing"),
        ({"params": {"code": []}}, "argument code must be a string or a number, got an array ([])"),
        ({"params": []}, "params must be a JSON object, got an array"),
        ({"params": "[1]"}, "params must be a JSON object, got an array"),
        ({"params": '{"code": '}, "params is not JSON"),
        ({"params": '{"code": NaN}'}, "params is not JSON"),
        ({"params": "[" * 100000}, "params is not JSON: the JSON is nested too deeply"),
        ({"params": {"code": ""}, "kwargs": []}, "kwargs must be a JSON object, got an array"),
        ({"params": {"code": ""}, "kwargs": "k"}, "kwargs must be a JSON object, got a string"),
        ({"params": {"code": ""}, "kwargs": {"params": ""}}, "kwargs must not have params"),
        ({"param": {}}, "unknown field 'param'; did you mean 'params'?"),
        ({"tool_name": "act"}, "unknown field 'tool_name'"),
        (b"[1]", "the request body must be a JSON object, got an array"),
        (b'{"params": {"code": NaN}}', "NaN is not a JSON value"),
        (b'{"params": {"code": "\xff"}}', "the request body is not UTF-8"),
        (b'{"params": ' + b'{"a":' * 100000, "nested too deeply"),
    ],
)
def test_bad_call_is_refused_and_says_what_is_wrong(node, body, message):
    reply = ask(node.port, body, path="/execute_tool")
    assert reply.status == 400
    assert sorted(reply.json()) == ["message", "request_id"]
    assert message in reply.json()["message"]


def test_params_as_deep_as_they_may_be_are_read_or_refused(node):
    pid = node.result("import os; result = os.getpid()")
    for depth in (*range(960, 1000), 5000, 20000):  # around where an older Python, and a newer one, gives up
        deep = "[" * depth + "]" * depth
        reply = ask(node.port, b'{"params":{"code":"","deep":%s}}' % deep.encode(), path="/execute_tool")
        assert (reply.status, b"nested too deeply" in reply.body) in ((200, False), (400, True)), (depth, reply.body)
    assert node.result("import os; result = os.getpid()") == pid


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/execute_tool", 405), ("POST", "/tool_info", 405), ("GET", "/v1/models", 404), ("GET", "/health", 200)],
)
def test_other_requests_are_answered_in_the_same_form(node, method, path, status):
    reply = ask(node.port, {} if method == "POST" else None, method, path)
    assert reply.status == status
    assert status == 200 or sorted(reply.json()) == ["message", "request_id"]


def test_call_gets_its_kwargs_and_the_tool_its_cfg_and_environment(node):
    code = "import os; result = [kwargs, self.cfg['user'], len(os.environ['ROCK_TEST_OF_TOOL'])]"
    assert node.result(code, a=1) == [{"a": 1}, "somebody-with-a-name", len(KEYS["env"])]
    assert node.execute({"code": "result = kwargs"}, kwargs=None).json()["output"] == {}


@pytest.mark.everywhere
def test_calls_one_after_the_other_meet_the_same_tool(node):
    first = node.result("result = self.calls")
    assert node.result("result = self.calls") == first + 1


def identity(node, query):
    return ask(node.port, method="GET", path="/identity" + query)


@pytest.mark.everywhere
def test_node_proves_that_it_has_its_key_without_being_sent_it_and_without_a_log_line(tmp_path):
    with running(tmp_path, Node, api_key="node-key-0123456789") as node:
        reply = identity(node, "?nonce=n%201")
        message = b"rock-tool-node n 1"
        assert reply.json()["output"] == hmac.new(b"node-key-0123456789", message, "sha256").hexdigest()
        assert identity(node, "?nonce=" + "n" * 128).json()["output"] == node_proof("node-key-0123456789", "n" * 128)
        assert identity(node, "?nonce=%C3%A9").json()["output"] == node_proof("node-key-0123456789", "\xe9")
        refused = [identity(node, query).status for query in ("", "?nonce=", "?nonce=" + "n" * 129, "?once=n")]
        assert refused == [400] * 4
        assert ask(node.port, method="GET", path="/tool_info").status == 401
        wait_until(lambda: len(node.logged) >= 5)
    assert [line.split()[3] for line in node.logged if "/identity" in line] == ["400"] * 4


def test_node_without_a_key_has_no_identity(node):
    assert identity(node, "?nonce=n").status == 404


# What a tool may do ---------------------------------------------------------------------------------------------------

FORKED = "import os, time\nresult = os.fork()\nif not result:\n    %s"
FAILURES = {
    "raises": ("raise ValueError('two\\nlines')", "the tool act failed: ValueError: two lines"),
    "asserts": ("assert 0", "AssertionError"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "interrupts itself": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "never returns": ("def f(): f()\nf()", "RecursionError"),
    "raises what cannot be said": (
        "class E(Exception):\n    def __str__(self): raise SystemError\nraise E",
        "E: its message cannot be made (SystemError)",
    ),
    "returns a set": ("result = {1}", "it returned what JSON cannot hold: TypeError"),
    "returns bytes": ("result = b''", "it returned what JSON cannot hold"),
    "returns a generator": ("result = (n for n in ())", "it returned what JSON cannot hold"),
    "returns NaN": ("result = float('nan')", "it returned what JSON cannot hold"),
    "returns itself": ("result = []; result.append(result)", "it returned what JSON cannot hold"),
    "returns what is deep": ("result = []\nfor _ in range(99999): result = [result]", "it returned what JSON cannot"),
    "returns what fails": (
        "class D(dict):\n    def items(self): raise KeyError\nresult = D(a=1)",
        "it returned what JSON cannot hold: KeyError",
    ),
    "asks somebody": ("input()", "EOFError"),
    "closes its output": ("import sys\nsys.stdout.close()\nsys.stderr.close()\n1 / 0", "ZeroDivisionError"),
}


@pytest.mark.parametrize(("code", "message"), list(FAILURES.values()), ids=list(FAILURES))
def test_call_fails_alone_where_its_tool(node, code, message):
    pid = node.result("import os; result = os.getpid()")
    reply = node.act(code)
    assert (reply.status, message in reply.json()["message"]) == (500, True), reply.body
    assert sorted(reply.json()) == ["message", "request_id"]
    assert reply.json()["message"] in node.logged
    assert node.result("import os; print('fine'); result = os.getpid()") == pid


# What finds the descriptor of a worker's answers, as `answers`.
FIND_ANSWERS = """
import fcntl, os, stat
def is_answers(n):
    try: s = os.fstat(n)
    except OSError: return False
    return stat.S_ISFIFO(s.st_mode) and fcntl.fcntl(n, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
answers = [n for n in map(int, os.listdir('/proc/self/fd')) if n > 2 and is_answers(n)][0]
"""
ENDS = {
    "exits at once": ("os._exit(3)", "its process ended (exit code 3)"),
    "kills itself": ("os.kill(os.getpid(), signal.SIGKILL)", "its process ended (signal 9)"),
    "kills its group": ("os.killpg(0, signal.SIGTERM)", "its process ended (signal 15)"),
    "crashes": ("os.abort()", "its process ended (signal 6)"),
    "closes every descriptor": ("os.closerange(0, 256)", "its process"),
    "says what it should not": ("os.write(%d, b'hello\\n'); time.sleep(60)", "its process cannot be understood"),
    "answers another call": (
        "os.write(%d, b'0 {\"output\":1}\\n'); time.sleep(60)",
        "its process cannot be understood",
    ),
    "says half a line": ("os.write(%d, b'[' * 9); os._exit(0)", "its process ended (exit code 0)"),
}


@pytest.mark.parametrize(("code", "message"), list(ENDS.values()), ids=list(ENDS))
def test_process_that_ends_is_replaced_and_its_children_end_where_its_tool(node, code, message):
    child = node.result("import subprocess; result = subprocess.Popen(['sleep', '600']).pid")
    code = code % node.result(FIND_ANSWERS + "result = answers") if "%d" in code else code
    reply = node.act("import os, signal, time\n" + code)
    assert (reply.status, message in reply.json()["message"]) == (500, True), reply.body
    wait_for_end(child)


SPEAKS_LATE = """
import threading, time
def speak():
    while not os.path.exists({now!r}): time.sleep(0.002)
    os.write(answers, {line!r})
    open({done!r}, "w").close()
threading.Thread(target=speak).start()
result = os.getpid()
"""


@pytest.mark.parametrize("line", [b'{"output":"late"}\n', b'%d {"output":"late"}\n', b"%d"])
def test_what_a_tool_says_between_two_calls_is_no_answer(tmp_path, line):
    now, done = str(tmp_path / "now"), str(tmp_path / "done")
    with running(tmp_path, Node, tool_workers=1) as node:
        line = line % 2 if b"%" in line else line  # which is what the next call is numbered
        pid = node.result(FIND_ANSWERS + SPEAKS_LATE.format(now=now, done=done, line=line))
        (tmp_path / "now").touch()
        wait_until(lambda: os.path.exists(done))
        reply = node.act("result = 'its own'")
        assert (reply.status, reply.json()["message"]) == (
            500,
            "the tool act failed: its process cannot be understood: it spoke before it was asked",
        )
        assert node.result("import os; result = os.getpid()") != pid


def test_more_than_an_answer_is_none(tmp_path):
    with running(tmp_path, Node, tool_workers=1) as node:
        reply = node.act(FIND_ANSWERS + "os.write(answers, b'1 {\"output\":1}\\n1 {')\nimport time; time.sleep(60)")
        assert "its process cannot be understood: it says more than its answer" in reply.json()["message"]


FINE = {
    "prints a lot": ("for n in range(2000): print('x' * 100)", None),
    "reads its standard input": ("import sys; result = sys.stdin.read()", ""),
    "forks a child that comes back": (FORKED % "pass" + "\nresult = result > 0", True),
    "forks a child that comes back late": (FORKED % "time.sleep(0.05)" + "\nresult = result > 0", True),
    "begins a thread": ("import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()", None),
    "changes its directory": ("import os; os.chdir('/')", None),
    "hides its signals": ("import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [15]); result = 1", 1),
}


@pytest.mark.everywhere
@pytest.mark.parametrize(("code", "output"), list(FINE.values()), ids=list(FINE))
def test_call_is_answered_where_its_tool(node, code, output):
    assert node.result(code) == output
    assert [node.result("result = %d" % number) for number in range(3)] == [0, 1, 2], "each gets its own answer"


def test_children_of_a_tool_stay_until_its_process_ends(node):
    stays = FORKED % "time.sleep(600); os._exit(0)"
    children = [node.result(stays), node.result("import subprocess; result = subprocess.Popen(['sleep', '600']).pid")]
    assert all(process_identity(pid) for pid in children)
    node.act("import os; os._exit(0)")
    wait_for_end(*children)


def test_many_failures_leave_neither_descriptors_nor_threads(node):
    with nothing_left():
        for code in ["import os; os._exit(0)", "1 / 0", "import os; os.abort()"] * 2:
            assert node.act(code).status == 500
        node.act("")


@pytest.mark.parametrize(
    "code",
    [
        "import time; time.sleep(600)",
        "import time\nwhile True:\n    try: time.sleep(600)\n    except BaseException: pass",
        "3 ** (3 ** 19)",  # one long calculation in C that keeps Python's lock
        "import re; re.match('(a+)+b', 'a' * 60)",
        "import os, time\nos.fork()\ntime.sleep(600)",
        "import asyncio; asyncio.new_event_loop().run_forever()",
    ],
    ids=["sleeps", "takes no end", "calculates", "matches", "forks", "loops"],
)
def test_call_that_takes_too_long_is_ended(hasty, code):
    reply = hasty.act(code)
    assert reply.status == 504
    assert reply.json()["message"] == "the tool act failed: it did not answer within 1 s, and was stopped"
    assert hasty.result("result = 6 * 7") == 42, "the node lives on"


def test_arguments_that_take_too_long_to_check_are_an_error(tmp_path):
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+b$"}}}
    source = "class T:\n  name = 't'\n  parameters = %r\n  def call(self, params): return 1" % schema
    with running(tmp_path, Node, source=source, tool="t", request_timeout=1.0) as node:
        assert node.execute({"a": "a" * 60}).status == 504
        assert node.execute({"a": "aab"}).json()["output"] == 1


def test_output_that_is_too_large_is_an_error(node):
    reply = node.act("result = 'x' * (8 << 20)")
    message = "the tool act failed: it returned 8388610 bytes of JSON; at most 8388608 are passed on"
    assert (reply.status, reply.json()["message"]) == (500, message)
    assert len(node.result("result = 'x' * ((8 << 20) - 2)")) == (8 << 20) - 2
    reply = node.act("raise ValueError('x' * (256 << 20))")
    assert len(reply.json()["message"]) < 2100


def test_params_of_megabytes_arrive(node):
    assert node.result("result = len(%r)" % ("x" * (3 << 20))) == 3 << 20


# Calls at once ------------------------------------------------------------------------------------------------------

MEET = """
import os, time
open(os.path.join(%r, str(os.getpid())), "w").close()
while len(os.listdir(%r)) < %d: time.sleep(0.002)
result = os.getpid()
"""


def test_calls_run_at_once_each_in_a_process_of_its_own(node, tmp_path):
    first = node.result("import os; result = os.getpid()")
    calls = [node.later(MEET % (str(tmp_path), str(tmp_path), 4)) for _ in range(4)]
    pids = {call.result().json()["output"] for call in calls}
    assert len(pids) == 4
    assert {node.result("import os; result = os.getpid()") for _ in range(3)} == {first}


class FakeWorker:
    def __init__(self):
        self.is_open = True

    def is_alive(self):
        return self.is_open

    def close(self):
        self.is_open = False

    kill = close


def begin_and_hang_up(node, body, begun):
    """Send that call, and close the connection when `begun()` is true, whose value is returned."""
    connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=TIMEOUT)
    with contextlib.closing(connection):
        connection.request("POST", "/execute_tool", json.dumps(body), {"Content-Type": "application/json"})
        return wait_until(begun)


def test_call_ends_when_its_client_hangs_up(tmp_path):
    (tmp_path / "met").mkdir()
    code = MEET % (str(tmp_path / "met"), str(tmp_path / "met"), 2)
    with running(tmp_path, Node, tool_workers=1) as node:
        (pid,) = begin_and_hang_up(node, {"params": {"code": code}}, lambda: os.listdir(str(tmp_path / "met")))
        assert node.result("import os; result = os.getpid()") != int(pid)
        wait_for_end(int(pid))
        line = wait_until(lambda: [line for line in node.logged if " 499 " in line])[0]
        assert line.endswith("client hung up")
        assert not [line for line in node.logged if "failed" in line]


def test_call_whose_client_hangs_up_before_a_worker_is_free_does_not_run(tmp_path):
    (tmp_path / "met").mkdir()
    code, waits = MEET % (str(tmp_path / "met"), str(tmp_path / "met"), 2), {"code": "self.calls += 100"}
    with running(tmp_path, Node, tool_workers=1) as node:
        busy = node.later(code)
        wait_until(lambda: os.listdir(str(tmp_path / "met")))
        begin_and_hang_up(node, {"params": waits}, lambda: node.server.service._pool._changed._waiters)
        wait_until(lambda: len(node.server.http.hangups._selector.get_map()) == 2)  # its own end, and the busy call
        (tmp_path / "met" / "end").touch()
        pid = busy.result().json()["output"]
        assert node.result("import os; result = [os.getpid(), self.calls]") == [pid, 2]


def test_hang_up_after_a_call_leaves_the_worker_to_the_next():
    class Worker(FakeWorker):
        interrupt = FakeWorker.close

        def call(self, text, seconds):
            during()
            return {"output": text}

    worker, call, during = Worker(), rock_ms._ClientsCall(), lambda: None
    assert call.run(worker, "1", 1) == {"output": "1"}
    call.hang_up()
    assert worker.is_open
    assert call.run(worker, "1", 1) is None
    call = rock_ms._ClientsCall()
    during = call.hang_up  # and it answers all the same
    with pytest.raises(rock_ms.ClientGone):
        call.run(worker, "1", 1)
    assert not worker.is_open


@contextlib.contextmanager
def all_busy(pool, count):
    """As many calls that use a worker each until the block ends."""
    release, begun = threading.Event(), threading.Semaphore(0)

    def use(worker):
        begun.release()
        assert release.wait(TIMEOUT)
        return worker

    calls = [Later(lambda: pool.use(use, 30)) for _ in range(count)]
    for _ in calls:
        assert begun.acquire(timeout=TIMEOUT)
    yield calls
    release.set()
    for call in calls:
        call.result()


def test_call_that_finds_all_workers_busy_is_refused_after_its_wait():
    pool = WorkerPool(FakeWorker, 2)
    with all_busy(pool, 2), pytest.raises(ApiError, match="all 2 workers of the tool are busy") as refused:
        pool.use(lambda worker: worker, 0.01)
    assert refused.value.status == 503
    assert pool.use(lambda worker: worker.is_open, 0.01)


def test_call_without_a_limit_waits_for_a_worker():
    pool = WorkerPool(FakeWorker, 1)
    with all_busy(pool, 1) as (first,):
        second = Later(lambda: pool.use(lambda worker: worker, float("inf")))
        wait_until(lambda: pool._changed._waiters)
        assert not second.is_done()
    assert second.result() is first.result()


def test_pool_that_closes_ends_its_workers_and_the_calls_that_wait():
    pool = WorkerPool(FakeWorker, 1)
    with all_busy(pool, 1) as (busy,):
        waiting = Later(lambda: pool.use(lambda worker: worker, 30))
        wait_until(lambda: pool._changed._waiters)
        pool.stop()
        with pytest.raises(ApiError, match="the tool node is stopping"):
            waiting.result()
    assert not busy.result().is_open, "its worker ends with its call"


def test_worker_that_died_unused_is_replaced():
    pool = WorkerPool(FakeWorker, 1)
    first = pool.use(lambda worker: worker, 1)
    assert pool.use(lambda worker: worker, 1) is first
    first.is_open = False
    assert pool.use(lambda worker: worker, 1).is_open


def test_pool_answers_while_it_waits_for_the_end_of_a_dead_worker():
    class SlowToClose(FakeWorker):
        def close(self):
            assert Later(lambda: pool.use(lambda worker: worker.is_open, 1)).result()

    pool, die = WorkerPool(SlowToClose, 2), lambda worker: setattr(worker, "is_open", False)
    pool.use(die, 1)
    assert pool.use(lambda worker: worker.is_open, 1)


def test_worker_killed_between_two_calls_is_replaced(node):
    pid = node.result("import os; result = os.getpid()")
    os.kill(pid, signal.SIGKILL)
    wait_for_end(pid)
    assert node.result("import os; result = os.getpid()") != pid


def test_node_that_stops_under_load_leaves_nothing(tmp_path):
    (tmp_path / "met").mkdir()
    meet = MEET % (str(tmp_path / "met"), str(tmp_path / "met"), 9)
    with running(tmp_path, Node, tool_workers=2) as node:
        busy = [node.later(meet) for _ in range(2)]
        pids = wait_until(lambda: len(os.listdir(str(tmp_path / "met"))) == 2 and os.listdir(str(tmp_path / "met")))
        waiting = node.later("")
        wait_until(lambda: node.server.service._pool._changed._waiters)
    assert waiting.result().status == 503
    for call in busy:
        with pytest.raises((OSError, http.client.HTTPException)):
            call.result()
    wait_for_end(*map(int, pids))


# Loading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def other(): pass", "tool.py has no tool 'act'; known are other"),
        ("raise ValueError(%r)" % KEYS["cfg"], "tool.py cannot be loaded: ValueError: [key]"),
        ("import os; os._exit(4)", "the tool act cannot be loaded: its process ended (exit code 4)"),
        ("import threading\nthreading.Thread(target=input).start()\nraise SystemExit", "cannot be loaded: SystemExit"),
        ("import os\nos.fork()\n" + ACT, None),
    ],
    ids=["has no tool", "fails with a key", "ends", "leaves a thread", "forks"],
)
def test_node_says_why_its_tool_cannot_be_loaded(tmp_path, source, message):
    with nothing_left(), contextlib.ExitStack() as stack:
        if message is None:
            node = stack.enter_context(running(tmp_path, Node, source=source))
            assert node.result("result = 1") == 1
            return
        with pytest.raises(UsageError) as refused:
            Node(tmp_path, source, tool_cfg={"api_key": KEYS["cfg"]})
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)


# Keys ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "raise ValueError(' '.join(keys))",
        "raise ValueError('x' * 1950 + keys[%d])",  # around where a long message is cut
        "raise ValueError('x' * 1980 + keys[%d])",
        "result = {keys[%d]: float('nan')}\nassert 0, result",
    ],
)
def test_keys_are_neither_answered_nor_logged(node, code):
    keys = "import os; keys = [self.cfg['api_key'], os.environ['ROCK_TEST_OF_TOOL'], kwargs['deep'][0]['token']]\n"
    for number in range(3):
        reply = node.act(keys + (code % number if "%d" in code else code), deep=[{"token": KEYS["kwargs"]}])
        assert reply.status == 500
        said = reply.body.decode() + "".join(node.logged)
        assert not [key for key in KEYS.values() if key[:12] in said]
        assert "[key]" in said or "..." in said


def test_name_in_the_cfg_is_no_key(node):
    assert "somebody-with-a-name" in node.act("raise ValueError(self.cfg['user'])").json()["message"]


# The command --------------------------------------------------------------------------------------------------------

API_KEY = "node-key-0123456789"


class Command:
    """The real command, on a directory of its own."""

    def __init__(self, directory, python=(sys.executable,)):
        self.directory, self.python = str(directory), python
        self.tool_file = os.path.join(self.directory, "json.py")  # which must not hide Python's own, nor this one:
        self.data_dir = os.path.join(self.directory, "data")
        self.environ = clean_environ(ROCK_MODEL_SERVICE_DATA_DIR=self.data_dir)
        for path, source in ((self.tool_file, ACT), (os.path.join(self.directory, "random.py"), "1 / 0")):
            with open(path, "w") as file:
                file.write(source)

    def started_with(self, *words):
        """The whole command of a start."""
        words = ("--host", "127.0.0.1", "--port", "0", "--tool", "act", "--tool-file", self.tool_file, *words)
        return [*self.python, SCRIPT, "start", "--type", "tool-node", *words]

    def __call__(self, *words, check=None, **environ):
        return run_cli(*words, check=check, env={**self.environ, **environ})

    def start(self, *words, **options):
        return self(*self.started_with(*words)[len(self.python) + 1 :], **options)

    @property
    def state(self):
        return rock_ms.ServiceState(self.data_dir).read()

    def act(self, code, key=API_KEY, **kwargs):
        headers = [("Authorization", "Bearer " + key)]
        return ask(
            self.state["port"], {"params": {"code": code}, "kwargs": kwargs}, path="/execute_tool", headers=headers
        )

    def written(self):
        """All that the node has written into its directory."""
        texts = []
        for path in glob.glob(os.path.join(self.data_dir, "*")):
            with open(path, encoding="utf-8", errors="replace") as file:
                texts.append(file.read())
        return "\n".join(texts)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A node in the background, with keys."""
    command = Command(tmp_path_factory.mktemp("command"))
    config = os.path.join(command.directory, "config.json")
    with open(config, "w") as file:
        json.dump({"tool_env": {"ROCK_TEST_OF_TOOL": KEYS["env"]}}, file)
    cfg = json.dumps({"api_key": KEYS["cfg"]})
    started = command.start("--tool-cfg", cfg, "--config-file", config, check=0, ROCK_MODEL_SERVICE_API_KEY=API_KEY)
    command.started = started.out
    yield command
    stopped = command("stop", check=0)
    assert stopped.out == "tool node stopped (pid %d)\n" % int(command.started.split()[4].rstrip(","))
    assert command("stop", check=0).out == "no tool node runs in the data directory %s\n" % command.data_dir


@pytest.fixture
def other(tmp_path):
    """A command with no node yet; one that it starts is stopped."""
    other = Command(tmp_path)
    yield other
    other("stop", check=0)


@pytest.mark.everywhere
def test_start_says_where_the_node_is(command):
    state = command.state
    where = (state["pid"], state["port"], command.tool_file)
    assert command.started == "tool node started: pid %d, http://127.0.0.1:%d, tool act, %s\n" % where


def test_start_warns_where_anyone_may_call_it(other):
    done = other.start("--host", "0.0.0.0", check=0)  # the later of two flags counts
    assert done.err == "rock-ms: it listens on 0.0.0.0 without a key: anyone on the network may call the tool\n"


def test_second_start_names_what_runs_there(command):
    message = "rock-ms: a tool node already runs (pid %d, 127.0.0.1:%d); " % (
        command.state["pid"],
        command.state["port"],
    )
    assert command.start(check=1).err.startswith(message)
    assert command("start", "--type", "local", "--port", "0", check=1).err.startswith(message)


def test_node_asks_for_its_key(command):
    assert command.act("result = 1").json()["output"] == 1
    for path, method in (("/execute_tool", "POST"), ("/tool_info", "GET"), ("/metrics", "GET")):
        reply = ask(command.state["port"], {}, method, path, [("Authorization", "Bearer wrong")])
        assert reply.status == 401
        assert sorted(reply.json()) == ["message", "request_id"]
        assert reply.headers["www-authenticate"] == "Bearer"
    assert ask(command.state["port"], None, "GET", "/health").status == 200


def test_node_watches_no_agent(command):
    done = command("watch-agent", "--pid", os.getpid(), "--api-key", API_KEY, check=1)
    assert "there is no /v1/agent/watch here; there are /tool_info, /execute_tool" in done.err


def test_keys_are_in_no_file_and_on_no_command_line(command):
    command.act("raise ValueError([self.cfg, kwargs])", token=KEYS["kwargs"])
    worker = command.act("import os; print('seen'); result = os.getpid()").json()["output"]
    seen = command.written()
    assert "seen" in seen
    for pid in (command.state["pid"], worker):
        with open("/proc/%d/cmdline" % pid) as file:
            seen += file.read()
    assert not [key for key in (*KEYS.values(), API_KEY) if key in seen]


def test_worker_does_not_see_what_is_the_nodes_own(command):
    environ = command.act("import os; result = dict(os.environ)").json()["output"]
    assert environ["ROCK_TEST_OF_TOOL"] == KEYS["env"]
    assert API_KEY not in str(environ)
    assert KEYS["cfg"] not in str(environ)
    with open("/proc/%d/environ" % command.act("import os; result = os.getpid()").json()["output"]) as file:
        assert API_KEY not in file.read()


def test_child_of_a_tool_gets_the_signals_that_the_node_waits_for(command):
    code = "import subprocess; child = subprocess.Popen(['sleep', '600']); child.%s; result = child.wait(20)"
    assert command.act(code % "terminate()").json()["output"] == -signal.SIGTERM
    assert command.act(code % "send_signal(1)").json()["output"] == -signal.SIGHUP


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--resume"], 2, "--resume goes on with a session, which a tool node has not"),
        (["--tool", "acts"], 1, "the tool node did not start: {file} has no tool 'acts'; did you mean 'act'?"),
        (["--tool", "acts", "--foreground"], 2, "{file} has no tool 'acts'; did you mean 'act'?"),
        (["--tool-file", "/none.py"], 1, "the tool node did not start: there is no tool file /none.py"),
        (["--tool-cfg", "[%r]" % KEYS["cfg"]], 2, "--tool-cfg: must be a JSON object"),
        (["--tool", ""], 2, "--tool: must be a text that is not empty, got ''"),
        (["--tool-workers", "0"], 2, "--tool-workers: must be a whole number above 0, got '0'"),
    ],
)
def test_start_that_cannot_be_meant_says_so_in_a_line(other, words, code, message):
    done = other.start(*words, check=code)
    assert (done.out, done.err) == ("", done.err.splitlines()[0] + "\n")
    assert done.err.startswith("rock-ms: " + message.format(file=other.tool_file))
    assert KEYS["cfg"] not in done.err


def test_workers_of_a_node_that_is_killed_end(other, tmp_path):
    other.start("--request-timeout", "2", check=0)
    sleeps = "import os, time\nopen(os.path.join(%r, str(os.getpid())), 'w').close()\n%s"
    (tmp_path / "pids").mkdir()
    codes = [sleeps % (str(tmp_path / "pids"), code) for code in ("time.sleep(600)", "3 ** (3 ** 19)")]
    calls = [Later(lambda code=code: other.act(code)) for code in codes]
    pids = wait_until(lambda: len(os.listdir(str(tmp_path / "pids"))) == 2 and os.listdir(str(tmp_path / "pids")))
    os.kill(other.state["pid"], signal.SIGKILL)
    for call in calls:
        with pytest.raises((OSError, http.client.HTTPException)):
            call.result()
    wait_for_end(*map(int, pids))
    assert other("stop", check=0).out.startswith("no tool node runs")


def test_node_in_the_foreground_runs_isolated_and_without_a_warning(tmp_path):
    command = Command(tmp_path, [sys.executable, "-I", "-S", "-W", "error"])
    with open(str(tmp_path / "said"), "wb") as said:
        process = subprocess.Popen(command.started_with("--foreground"), stderr=said, env=command.environ)
    try:
        wait_until(lambda: "port" in command.state)
        assert command.act("import sys; result = [sys.flags.isolated, sys.flags.no_site]").json()["output"] == [1, 1]
        assert command.act("import os; os._exit(0)").status == 500
        assert command.act("result = 1").json()["output"] == 1
    finally:
        process.terminate()
        assert process.wait(TIMEOUT) == 0
    said = (tmp_path / "said").read_text()
    assert "stopped" in said
    assert "Warning" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_node_in_the_foreground_that_still_loads_its_tool_ends_at_once(tmp_path, number):
    command = Command(tmp_path)
    with open(command.tool_file, "w") as file:
        file.write("import os, time\nopen(%r, 'w').write(str(os.getpid()))\n" % str(tmp_path / "pid"))
        file.write("time.sleep(600)")
    process = subprocess.Popen(command.started_with("--foreground"), stderr=subprocess.PIPE, env=command.environ)
    pid = wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.send_signal(number)
    said = process.communicate(timeout=TIMEOUT)[1].decode()
    assert (process.returncode, said) == (1, "rock-ms: the tool node is stopping\n")
    wait_for_end(int(pid))


def test_descriptors_are_closed_with_their_worker(tmp_path):
    with running(tmp_path, Node, tool_workers=1) as node:
        node.act("")
        before = open_descriptors()
        for _ in range(3):
            node.act("import os; os._exit(0)")
        node.act("")
        wait_until(lambda: open_descriptors() <= before)
