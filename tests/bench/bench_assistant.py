"""What the assistant adds to a call: `python3 tests/bench/bench_assistant.py`.

The upstream of bench_proxy.py is asked directly, through a proxy, and through an assistant whose request offers tools,
in turns within one run, each call on the same kept connection.  Printed are the medians and their ratios to the first.
"""

import contextlib
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import bench_proxy

SDK = os.path.join(os.path.dirname(bench_proxy.SCRIPT), "rock_sdk.py")
PARAMETERS = {"type": "object", "properties": {"path": {"type": "string"}, "text": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "tool_%d" % number, "description": "does it", "parameters": PARAMETERS}}
    for number in range(10)
]


def ask(connection, is_stream, tools):
    """Seconds of one call."""
    value = {"model": "bench", "messages": bench_proxy.MESSAGES, "stream": is_stream}
    body = json.dumps({**value, **({"tools": tools} if tools else {})})
    began = time.perf_counter()
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    data = response.read()
    assert response.status == 200 and b"word" in data, data[:200]
    return time.perf_counter() - began


@contextlib.contextmanager
def assistant(upstream_port, data_dir):
    """The port of one."""
    words = ["--type", "assistant", "--data-dir", data_dir]
    url = "http://127.0.0.1:%d/v1" % upstream_port
    subprocess.check_output([sys.executable, SDK, "start", "--port", "0", "--model-server", url, *words])
    with open(os.path.join(data_dir, "assistant.json")) as file:
        port = json.load(file)["port"]
    try:
        yield port
    finally:
        subprocess.check_output([sys.executable, SDK, "stop", *words])


def compare(name, is_stream, count, ports):
    with contextlib.ExitStack() as stack:
        ways = []
        for port, tools in ports:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            ways.append((stack.enter_context(contextlib.closing(connection)), tools))
        seconds = [[ask(connection, is_stream, tools) for connection, tools in ways] for _ in range(count)]
    bare, proxy, through = (statistics.median(column) * 1000 for column in zip(*seconds))
    line = "%-28s upstream %9.3f ms   proxy %9.3f ms (%.2f)   assistant %9.3f ms (%.2f)"
    print(line % (name, bare, proxy, proxy / bare, through, through / bare), flush=True)


def main():
    print("Python %s, %d cores" % (sys.version.split()[0], os.cpu_count()))
    data_dir = tempfile.mkdtemp(prefix="bench-assistant-")
    command = [sys.executable, bench_proxy.__file__, "--upstream"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    port = int(process.stdout.readline())
    proxy = None
    try:
        proxy = bench_proxy.Proxy(port, data_dir)
        with assistant(port, data_dir) as assistant_port:
            ports = [(port, None), (proxy.port, None), (assistant_port, TOOLS)]
            compare("an answer, 10 tools", False, 500, ports)
            compare("%d pieces, 10 tools" % bench_proxy.PIECES, True, 5, ports)
    finally:
        if proxy:
            proxy.stop()
        process.kill()
        process.wait()
        shutil.rmtree(data_dir, ignore_errors=True)


if __name__ == "__main__":
    main()
