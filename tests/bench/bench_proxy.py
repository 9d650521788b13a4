"""What the proxy adds to a call: `python3 tests/bench/bench_proxy.py`.

An upstream that answers at once, in a process of its own, is asked directly and through `start --type proxy`, which
records, in turns within one run.  Printed are both figures and their ratio: what the machine is like cancels out.
Client and upstream are each one thread around `selectors`, so that it is the proxy that is measured.
"""

import contextlib
import json
import os
import re
import selectors
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(os.path.dirname(os.path.dirname(HERE)), "rock_ms.py")
SECONDS = float(os.environ.get("BENCH_SECONDS", "3"))
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "3"))
PIECES = 20000

COMPLETION = json.dumps(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "bench",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 40}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 40, "total_tokens": 140},
    }
).encode()
MESSAGES = [{"role": "system", "content": "You are a coding agent. " * 20}, {"role": "user", "content": "Go on. " * 30}]


def piece(number):
    choice = {"index": 0, "delta": {"content": " word%d" % number}, "logprobs": None, "finish_reason": None}
    base = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1700000000, "model": "bench"}
    event = b"data: " + json.dumps({**base, "choices": [choice]}).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(event), event)


# ----------------------------------------------------------------------------------------------------------------------
# The upstream: one completion, or PIECES pieces of a stream, each a write of its own.
# ----------------------------------------------------------------------------------------------------------------------


PLAIN = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(COMPLETION) + COMPLETION
)
BEGIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Upstream:
    """Runs for ever in a process of its own."""

    def __init__(self):
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(1024)
        print(self._listener.getsockname()[1], flush=True)
        self._pieces = [BEGIN] + [piece(number) for number in range(PIECES)] + [END]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._buffers = {}
        self._streams = {}  # socket -> (number of the next piece, what is left of the one before)

    def run(self):
        while True:
            for key, _ in self._selector.select(0 if self._streams else None):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.fileobj)
            for sock in list(self._streams):
                self._stream(sock)

    def _accept(self):
        sock, _ = self._listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        self._selector.register(sock, selectors.EVENT_READ)

    def _read(self, sock):
        try:
            data = sock.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            self._selector.unregister(sock)
            self._streams.pop(sock, None)
            sock.close()
            return
        data = self._buffers.pop(sock, b"") + data
        head, end, body = data.partition(b"\r\n\r\n")
        if not end or len(body) < int(re.search(rb"(?i)content-length: *(\d+)", head).group(1)):
            self._buffers[sock] = data
        elif re.search(rb'"stream": ?true', body):
            self._streams[sock] = 0, b""
        else:
            with contextlib.suppress(ConnectionError):
                sock.send(PLAIN)

    def _stream(self, sock):
        number, rest = self._streams[sock]
        with contextlib.suppress(BlockingIOError, ConnectionError):
            for _ in range(50):
                rest = rest or self._pieces[number]
                rest = rest[sock.send(rest) :]
                number += not rest
                if number == len(self._pieces):
                    break
        self._streams[sock] = number, rest
        if number == len(self._pieces):
            del self._streams[sock]


# ----------------------------------------------------------------------------------------------------------------------
# The client.
# ----------------------------------------------------------------------------------------------------------------------


def request_bytes(port, is_stream):
    body = json.dumps({"model": "bench", "messages": MESSAGES, "stream": is_stream}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept-Encoding: gzip, deflate\r\n"
        "Connection: keep-alive\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
        "User-Agent: OpenAI/Python 1.0\r\nX-Stainless-Lang: python\r\nX-Stainless-Retry-Count: 0\r\n"
        "Authorization: Bearer sk-bench-0123456789\r\nContent-Length: %d\r\n\r\n"
    )
    return (head % (port, len(body))).encode() + body


def connect(port):
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def calls(port, clients, seconds=SECONDS):
    """(calls a second, median latency in seconds), each client asking again as soon as it is answered."""
    request = request_bytes(port, False)
    selector, began, latencies = selectors.DefaultSelector(), {}, []
    for _ in range(clients):
        sock = connect(port)
        selector.register(sock, selectors.EVENT_READ)
        began[sock] = time.perf_counter()
        sock.sendall(request)
    start = now = time.perf_counter()
    received = dict.fromkeys(began, b"")
    while now - start < seconds:
        for key, _ in selector.select():
            sock = key.fileobj
            data = received[sock] + sock.recv(1 << 16)
            if not data.endswith(COMPLETION):
                received[sock] = data
                continue
            now = time.perf_counter()
            latencies.append(now - began[sock])
            received[sock], began[sock] = b"", now
            sock.sendall(request)
    for sock in began:
        sock.close()
    return len(latencies) / (now - start), statistics.median(latencies)


def pieces_a_second(port, streams):
    request, selector, left = request_bytes(port, True), selectors.DefaultSelector(), streams
    start = time.perf_counter()
    tails = {}
    for _ in range(streams):
        sock = connect(port)
        selector.register(sock, selectors.EVENT_READ)
        sock.sendall(request)
        tails[sock] = b""
    while left:
        for key, _ in selector.select():
            data = key.fileobj.recv(1 << 18)
            assert data, "a stream broke"
            tails[key.fileobj] = (tails[key.fileobj] + data)[-5:]
            if tails[key.fileobj] == b"0\r\n\r\n":
                selector.unregister(key.fileobj)
                key.fileobj.close()
                left -= 1
    return streams * PIECES / (time.perf_counter() - start)


# ----------------------------------------------------------------------------------------------------------------------
# The proxy.
# ----------------------------------------------------------------------------------------------------------------------


class Proxy:
    def __init__(self, upstream_port, data_dir):
        self._words = ["--data-dir", data_dir]
        url = "http://127.0.0.1:%d/v1" % upstream_port
        words = ["start", "--type", "proxy", "--host", "127.0.0.1", "--port", "0", "--proxy-base-url", url]
        began = time.perf_counter()
        subprocess.check_output([sys.executable, SCRIPT] + words + self._words)
        self.started_within = time.perf_counter() - began
        with open(os.path.join(data_dir, "LLMService.json")) as file:
            state = json.load(file)
        self.port, self._pid = state["port"], state["pid"]

    def status(self, name):
        with open("/proc/%d/status" % self._pid) as file:
            return int(re.search(r"%s:\s+(\d+)" % name, file.read()).group(1))

    def stop(self):
        subprocess.check_output([sys.executable, SCRIPT, "stop"] + self._words)


def compare(name, unit, function, direct, proxy, *arguments, scale=1.0):
    """Measure in turns; print both medians, and how the second relates to the first."""
    figures = [(function(direct, *arguments) * scale, function(proxy, *arguments) * scale) for _ in range(ROUNDS)]
    bare, through = (statistics.median(column) for column in zip(*figures))
    print(
        "%-34s upstream %10.4g   proxy %10.4g %-9s ratio %.3g" % (name, bare, through, unit, through / bare), flush=True
    )
    return bare, through


def main():
    print(
        "Python %s, %d cores, %g s a measurement, %d rounds" % (sys.version.split()[0], os.cpu_count(), SECONDS, ROUNDS)
    )
    data_dir = tempfile.mkdtemp(prefix="bench-proxy-")
    process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--upstream"], stdout=subprocess.PIPE)
    port = int(process.stdout.readline())
    proxy = None
    try:
        proxy = Proxy(port, data_dir)
        print("%-34s %.3f s" % ("from command to first /health", proxy.started_within))
        print("%-34s %.1f MB" % ("memory at rest", proxy.status("VmRSS") / 1024))
        calls(proxy.port, 1, 0.5)
        bare, through = compare("latency, 1 client", "ms", lambda *a: calls(*a)[1], port, proxy.port, 1, scale=1e3)
        print("%-34s %.3f ms" % ("  added at the median", through - bare))
        for clients in (1, 8, 32):
            compare("calls, %d clients" % clients, "1/s", lambda *a: calls(*a)[0], port, proxy.port, clients)
        compare("pieces, 8 streams", "1/s", pieces_a_second, port, proxy.port, 8)
        idle = [connect(proxy.port) for _ in range(1000)]
        for sock in idle:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        for sock in idle:
            sock.recv(4096)
        print("%-34s %.1f MB" % ("memory at 1,000 idle clients", proxy.status("VmRSS") / 1024))
        print("%-34s %d" % ("  threads", proxy.status("Threads")))
        for sock in idle:
            sock.close()
    finally:
        if proxy:
            proxy.stop()
        process.kill()
        process.wait()
        shutil.rmtree(data_dir, ignore_errors=True)


if __name__ == "__main__":
    Upstream().run() if sys.argv[1:] == ["--upstream"] else main()
