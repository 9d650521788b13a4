"""What the tests share: a service in this process, the command line as a user types it, and plain clients."""

import contextlib
import http.client
import json
import logging
import os
import resource
import socket
import subprocess
import sys
import threading
import time

import rock_ms

SCRIPT = os.path.abspath(rock_ms.__file__)
TIMEOUT = 90  # for whatever must happen, on a machine that does ten other things; a test that reaches it has failed


def is_proxy_variable(name):
    return name.lower().endswith("_proxy")


def clean_environ(**extra):
    """This environment without any of our settings, and `extra` in it."""
    ours = {spec.metadata["env"] for spec in rock_ms.fields(rock_ms.ServiceSettings)} | {"ROCK_MODEL_SERVICE_DATA_DIR"}
    kept = {name: os.environ[name] for name in os.environ if name not in ours and not is_proxy_variable(name)}
    return {**kept, **extra}


# As the installed command does: from the bytecode that Python keeps.
IMPORTED = "import sys; sys.argv[0] = %r; sys.path[0] = %r; import %s as module; sys.exit(module.main())"


def command_of(script, python):
    """What begins a command line: one of our two modules, imported, or any other script."""
    directory, name = os.path.split(script)
    if python == sys.executable and directory == os.path.dirname(SCRIPT):
        return [python, "-c", IMPORTED % (script, directory, name[: -len(".py")])]
    return [python, script]


def run_cli(*words, check=None, python=sys.executable, script=SCRIPT, **options):
    """Run one command to its end.  check: the exit code it must have."""
    options.setdefault("env", clean_environ())
    command = [*command_of(script, python), *(str(word) for word in words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT, **options)
    done.out, done.err = done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
    if check is not None:
        assert done.returncode == check, (words, done.returncode, done.out, done.err)
    return done


def wait_until(condition, what="the condition"):
    """Poll until `condition()` is true; return what it returned."""
    deadline, pause = time.monotonic() + TIMEOUT, 0.001
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        pause = min(2 * pause, 0.02)  # some conditions read all of /proc
        time.sleep(pause)
    raise AssertionError("%s did not come about within %d s" % (what, TIMEOUT))


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def files_of_at_most(size):
    """A full disk, as far as one process can have one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def nothing_left():
    """Assert that the block leaves no thread and no descriptor behind."""
    threads, descriptors = threading.active_count(), open_descriptors()
    yield
    wait_until(lambda: threading.active_count() <= threads, "the end of all threads %r" % threading.enumerate())
    wait_until(lambda: open_descriptors() <= descriptors, "the end of all descriptors")


class Service:
    """A service in this process, on a free port, with its data in `directory`."""

    def __init__(self, directory, is_resumed=False, earlier=None, **settings):
        self.data_dir = str(directory)
        settings = {"host": "127.0.0.1", "port": 0, "polling_interval_seconds": 0.02, **settings}
        self.settings = rock_ms.ServiceSettings(**settings)
        self.paths = rock_ms.DataPaths.of(self.data_dir, self.settings)
        self.logged = []
        self.server = rock_ms.ModelServer(self.settings, self.paths, self._logger(), is_resumed, earlier)
        self.port = self.server.http.port
        self.log = rock_ms.MarkerLog(self.paths.log_file)

    def _logger(self):
        logger = logging.Logger("test")
        handler = logging.Handler()
        handler.emit = lambda record: self.logged.append(handler.format(record))
        logger.addHandler(handler)
        return logger

    def records(self):
        """All records of the marker log."""
        return list(self.log.tail().read())

    def turns(self):
        """The indexes of all requests in the log."""
        return [record.index for record in self.records() if record.kind == "request"]

    def wait_for_turns(self, count):
        return wait_until(lambda: len(self.turns()) >= count and self.turns(), "request %d in the log" % count)

    def answer(self, index, content="hello", **more):
        """Answer a request as the trainer would."""
        value = content if isinstance(content, dict) else completion(content, **more)
        self.log.append_response(index, rock_ms.compact_json(rock_ms.dump_json(value)))

    def trajectory(self):
        """All records of the trajectory."""
        with contextlib.suppress(FileNotFoundError), open(self.paths.traj_file, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
        return []

    def ask(self, *args, **options):
        return ask(self.port, *args, **options)

    def ask_later(self, *args, **options):
        return Later(lambda: ask(self.port, *args, **options))


class Proxy(Service):
    """A proxy in this process that waits for no next attempt: how long it would have waited is in `pauses`."""

    def __init__(self, directory, upstream=None, **settings):
        if upstream is not None:
            settings.setdefault("proxy_base_url", upstream.url)
        super().__init__(directory, type="proxy", **settings)
        self.pauses = []
        if self.settings.replay_file is None:
            self.server.service.pause = lambda watch, seconds: self.pauses.append(seconds)
            self.server.service.jitter = lambda: 0.5  # neither longer nor shorter


@contextlib.contextmanager
def running(directory, kind=Service, **options):
    """A Service that answers, stopped at the end without leaving anything."""
    with nothing_left():
        service = kind(directory, **options)
        service.server.start()
        try:
            yield service
        finally:
            service.server.stop()


@contextlib.contextmanager
def serving(server):
    """Run a server of `socketserver` in a thread, until the block ends."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Later:
    """A call in a thread of its own."""

    def __init__(self, function):
        self._result = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True)
        self._thread.start()

    def _run(self, function):
        try:
            self._result = (function(), None)
        except BaseException as error:
            self._result = (None, error)

    def is_done(self):
        return self._result is not None

    def result(self):
        self._thread.join(TIMEOUT)
        assert self._result is not None, "the call did not end"
        value, error = self._result
        if error:
            raise error
        return value


def completion(content="hello", **message):
    """A trainer's answer."""
    message = {"role": "assistant", "content": content, **message}
    finish = "tool_calls" if message.get("tool_calls") else "stop"
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }


def chat(prompt="hi", **more):
    """An agent's request."""
    return {"model": "m", "messages": [{"role": "user", "content": prompt}], **more}


class Got:
    """An answer over HTTP."""

    def __init__(self, response):
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    def json(self):
        return json.loads(self.body.decode("utf-8"))

    def events(self):
        """The data of each event of a stream, parsed."""
        blocks = self.body.decode("utf-8").split("\n\n")
        data = [line[6:] for block in blocks for line in block.split("\n") if line.startswith("data: ")]
        return [item if item == "[DONE]" else json.loads(item) for item in data]


def ask(port, body=None, method="POST", path="/v1/chat/completions", headers=(), timeout=TIMEOUT):
    """Send one request on a connection of its own.  body: bytes, or a value to send as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode("utf-8")
    fields = {"Content-Type": "application/json", **dict(headers)}
    try:
        connection.request(method, path, data, fields)
        return Got(connection.getresponse())
    finally:
        connection.close()


def talk(port, data, half_close=False):
    """Send raw bytes; return all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            for piece in iter(lambda: sock.recv(65536), b""):
                received += piece
        return received


def raw_request(body=b"{}", head=b"", path=b"/v1/chat/completions"):
    """A whole chat request as bytes, with more header lines."""
    lines = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n" % (path, len(body), head)
    return lines + body
