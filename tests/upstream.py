"""A model's server that does what it is told: an upstream for the proxy, in a process of its own.

Each call is answered by a script, a list of steps; by that of the request's own JSON field `script`, else by the next
one that was queued, else by a plain completion.  The steps:

    {"send": text}          these bytes (latin-1)
    {"drip": text, "size": n, "pause": seconds}     the same in small pieces
    {"wait": seconds}       time passes
    {"gate": name}          until the test opens that gate
    {"stall": true}         until the other side closes
    {"close": true}         the connection ends
    {"reset": true}         it breaks

`answer`, `chunked` and `sse` make what is sent.  Run as a program it prints its port; the test talks to it in lines of
JSON on a connection that begins with a line `control`.
"""

import base64
import json
import os
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time

TIMEOUT = 90


def answer(body=None, status=200, headers=(), reason="Whatever"):
    """A whole response.  body: text, or a value to send as JSON."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    data = text.encode("utf-8").decode("latin-1")
    fields = {"Content-Type": "application/json", "Content-Length": len(data), **dict(headers)}
    lines = ["HTTP/1.1 %d %s" % (status, reason)]
    lines += ["%s: %s" % pair for pair in fields.items() if pair[1] is not None]
    return {"send": "\r\n".join(lines) + "\r\n\r\n" + data}


def chunk(data):
    """A chunk of a chunked body, of text that is latin-1 already."""
    return "%x\r\n%s\r\n" % (len(data), data)


def chunked(*pieces, **options):
    """A response in chunks: its header, each piece, its end, as so many steps.  pieces: text."""
    headers = {"Transfer-Encoding": "chunked", "Content-Length": None, **dict(options.pop("headers", ()))}
    steps = [answer("", headers=headers, **options)]
    steps += [{"send": chunk(piece.encode("utf-8").decode("latin-1"))} for piece in pieces]
    return steps + [{"send": "0\r\n\r\n"}]


def sse(*values, end="\n\n", done=True, **options):
    """A response that streams values, each as one event and one chunk."""
    events = ["data: %s%s" % (json.dumps(value, ensure_ascii=False), end) for value in values]
    events += ["data: [DONE]" + end] if done else []
    return chunked(
        *events, headers={"Content-Type": "text/event-stream", **dict(options.pop("headers", ()))}, **options
    )


def delta(content=None, index=0, finish=None, **more):
    """A chunk of a streamed completion."""
    fields = {"content": content, **more} if content is not None else more
    choice = {"index": index, "delta": fields, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def words(*texts):
    """The chunks of a streamed completion that says these texts."""
    return [delta(role="assistant")] + [delta(text) for text in texts] + [delta(finish="stop")]


class Upstream:
    """The process, as a test sees it."""

    def __init__(self, *arguments):
        command = [sys.executable, os.path.abspath(__file__), *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE)
        self.port = int(self._process.stdout.readline())
        self.control_port = int(self._process.stdout.readline())
        scheme = "https" if arguments else "http"
        self.url = "%s://%s:%d/v1" % (scheme, "localhost" if arguments else "127.0.0.1", self.port)
        self._control = socket.create_connection(("127.0.0.1", self.control_port), TIMEOUT)
        self._replies = self._control.makefile("rb")
        self._lock = threading.Lock()

    def _ask(self, **command):
        with self._lock:
            self._control.sendall(json.dumps(command).encode() + b"\n")
            return json.loads(self._replies.readline().decode())

    def script(self, *calls):
        """Queue what is done at each of the next calls: a step, or a list of steps."""
        self._ask(script=[call if isinstance(call, list) else [call] for call in calls])

    def open(self, gate):
        """Let pass what waits, or will wait, at a gate."""
        self._ask(open=gate)

    def seen(self, count=0):
        """The requests so far, waiting until there are so many: method, target, version, headers (lower-case),
        body, connection (its number)."""
        seen = self._ask(seen=count)
        for request in seen:
            request["body"] = base64.b64decode(request["body"])
        return seen

    def reset(self):
        """Forget all that was, for the next test."""
        self._ask(reset=True)

    def is_running(self):
        return self._process.poll() is None

    def wait_closed(self, count=1):
        """Wait until so many connections were closed by the other side."""
        return self._ask(closed=count)

    def connections(self):
        """How many connections are open."""
        return self._ask(connections=True)

    def is_stalling(self):
        """Whether a call is in a `stall`, on a connection that the other side has not closed."""
        return self._ask(stalling=True)

    def kill(self):
        """End the process, and all connections with it."""
        self._process.kill()
        self._process.wait()

    def close(self):
        self.kill()
        self._replies.close()
        self._control.close()
        self._process.stdout.close()
        self._process.stdin.close()


# ----------------------------------------------------------------------------------------------------------------------
# The process itself.
# ----------------------------------------------------------------------------------------------------------------------


class State:
    def __init__(self):
        self.changed = threading.Condition()
        self.connections = 0
        self.reset()

    def reset(self):
        self.scripts = []
        self.seen = []
        self.gates = set()
        self.closed = 0
        self.accepted = 0
        self.stalled = []

    def change(self, function):
        with self.changed:
            value = function()
            self.changed.notify_all()
            return value

    def wait(self, condition):
        with self.changed:
            self.changed.wait_for(condition, TIMEOUT)


class Broken(Exception):
    pass


def is_open(sock):
    """Whether the other side has not closed a connection."""
    try:
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


class Handler(socketserver.BaseRequestHandler):
    def handle(self):
        self.state = self.server.state
        self.buffer = b""
        number = self.state.change(self._opened)
        try:
            while True:
                request = self._read()
                request["connection"] = number
                for step in self.state.change(lambda request=request: self._script(request)):
                    self._do(step)
        except (Broken, OSError):
            pass
        finally:
            self.state.change(self._closed)

    def _opened(self):
        self.state.accepted += 1
        self.state.connections += 1
        return self.state.accepted

    def _closed(self):
        self.state.connections -= 1

    def _script(self, request):
        body = request.pop("raw")
        self.state.seen.append(dict(request, body=base64.b64encode(body).decode()))
        try:
            own = json.loads(body.decode("utf-8")).get("script")
        except (ValueError, AttributeError):
            own = None
        if own is None and self.state.scripts:
            own = self.state.scripts.pop(0)
        return own if own is not None else [answer(PLAIN)]

    def _read(self):
        while b"\r\n\r\n" not in self.buffer:
            self._receive()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, version = first.split(" ")
        headers = [[part.strip() for part in line.split(":", 1)] for line in lines]
        headers = [[name.lower(), value] for name, value in headers]
        length = int(dict(headers).get("content-length", 0))
        while len(self.buffer) < length:
            self._receive()
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return {"method": method, "target": target, "version": version, "headers": headers, "raw": body}

    def _receive(self):
        data = self.request.recv(65536)
        if not data:
            self.state.change(self._count_closed)
            raise Broken
        self.buffer += data

    def _count_closed(self):
        self.state.closed += 1

    def _note_stall(self):
        self.state.stalled.append(self.request)

    def _forget_stall(self):
        self.state.stalled.remove(self.request)

    def _do(self, step):
        if "send" in step:
            self.request.sendall(step["send"].encode("latin-1"))
        elif "drip" in step:
            data, size = step["drip"].encode("latin-1"), step.get("size", 1)
            for start in range(0, len(data), size):
                self.request.sendall(data[start : start + size])
                time.sleep(step.get("pause", 0))
        elif "wait" in step:
            time.sleep(step["wait"])
        elif "gate" in step:
            self.state.wait(lambda: step["gate"] in self.state.gates)
        elif "stall" in step:
            self.state.change(self._note_stall)
            try:
                while True:
                    self._receive()
            finally:
                self.state.change(self._forget_stall)
        elif "close" in step:
            raise Broken
        elif "reset" in step:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.request.close()
            raise Broken


class Control(socketserver.StreamRequestHandler):
    def handle(self):
        state = self.server.state
        for line in self.rfile:
            command = json.loads(line.decode())
            value = True
            if "script" in command:
                state.change(lambda command=command: state.scripts.extend(command["script"]))
            elif "reset" in command:
                state.wait(lambda: not state.connections)
                state.change(state.reset)
            elif "open" in command:
                state.change(lambda command=command: state.gates.add(command["open"]))
            elif "seen" in command:
                state.wait(lambda command=command: len(state.seen) >= command["seen"])
                value = state.change(lambda: list(state.seen))
            elif "closed" in command:
                state.wait(lambda command=command: state.closed >= command["closed"])
                value = state.closed >= command["closed"]
            elif "stalling" in command:
                value = state.change(lambda: any(map(is_open, state.stalled)))
            else:
                value = state.connections
            self.wfile.write(json.dumps(value).encode() + b"\n")


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 512

    def get_request(self):
        sock, address = super().get_request()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return (
            self.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False) if self.context else sock
        ), address

    def handle_error(self, request, client_address):
        pass  # of a handshake that the other side broke off


PLAIN = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
}


def main(certificate=None):
    server, control = Server(("127.0.0.1", 0), Handler), Server(("127.0.0.1", 0), Control)
    server.state = control.state = State()
    server.context = control.context = None
    if certificate:
        server.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.context.load_cert_chain(certificate)
    for each in (server, control):
        print(each.server_address[1], flush=True)
        threading.Thread(target=each.serve_forever, daemon=True).start()
    sys.stdin.read()  # the test's end ends us, too


if __name__ == "__main__":
    main(*sys.argv[1:])
