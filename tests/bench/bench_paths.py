"""What the hot paths cost: `python3 tests/bench/bench_paths.py [OTHER]`.

Each path is walked alone, in one process; then a trainer's turn is made by a process of its own, in each way to begin
one, in turns with an empty Python.  OTHER is another rock_ms.py, as of an earlier commit: both are then measured in
turns, and the last column is this file's figure as a share of the other's.  All figures are CPU time, the kernel's part
included, so that what else the machine does counts little; of a path the best round, of a process the median.
"""

import contextlib
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "15"))
ROUND_SECONDS = 0.02
TURNS = 200  # in the log of a later turn

REQUEST_HEAD = b"""POST /v1/chat/completions HTTP/1.1
Host: 127.0.0.1:8080
Accept-Encoding: gzip, deflate
Connection: keep-alive
Accept: application/json
Content-Type: application/json
User-Agent: OpenAI/Python 1.0
X-Stainless-Lang: python
X-Stainless-Retry-Count: 0
Authorization: Bearer sk-bench-0123456789
Content-Length: 1500""".replace(b"\n", b"\r\n")
RESPONSE_HEAD = b"""HTTP/1.1 200 OK
Date: Wed, 25 Nov 2026 12:00:00 GMT
Content-Type: text/event-stream; charset=utf-8
Transfer-Encoding: chunked
Connection: keep-alive
Server: bench
Cache-Control: no-cache
openai-processing-ms: 120
openai-version: 2020-10-01
x-request-id: req_0123456789abcdef
strict-transport-security: max-age=31536000""".replace(b"\n", b"\r\n")
REQUEST = json.dumps(
    {
        "model": "bench",
        "messages": [
            {"role": "system", "content": "You are a coding agent. " * 30},
            {"role": "user", "content": "Go on, \u4f60\u597d.\n" * 50},
        ],
    },
    ensure_ascii=False,
    separators=(",", ":"),
)
LONG_TEXT = 3 * "a line of a log, as it is often seen\n" + 'and one with a "quoted" word\n'
LONG_REQUEST = json.dumps({"messages": [{"role": "user", "content": LONG_TEXT * 700}]})
ANSWER = json.dumps(
    {
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "word " * 80}, "finish_reason": "stop"},
        ]
    },
    separators=(",", ":"),
)
CHUNK = {
    "id": "chatcmpl-bench",
    "object": "chat.completion.chunk",
    "created": 1700000000,
    "model": "bench",
    "choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}],
}
PIECE = b"data: " + json.dumps(CHUNK).encode() + b"\n\n"
CHUNKED_PIECE = b"%x\r\n%s\r\n" % (len(PIECE), PIECE)


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------------------------------
# The paths: each is a function without arguments, which walks it once.
# ----------------------------------------------------------------------------------------------------------------------


def paths(ms, directory):
    """(name, function) of each path of the module `ms`; its files go to `directory`."""
    response_head = ms.parse_response_head(RESPONSE_HEAD)
    log = filled_log(ms, os.path.join(directory, "turns.log"))
    appended = ms.MarkerLog(os.path.join(directory, "appended.log"))
    trajectory = ms.AppendFile(os.path.join(directory, "appended.jsonl"))
    record = ms.encode_record("request", REQUEST, 1, 1700000000000)[:-1]
    answer, decoder = ms.RecordedAnswer(response_head, True), ms.ChunkedBody()
    times = 1700000000.123, 0.5
    more = {"method": "POST", "path": "/v1/chat/completions", "upstream": "127.0.0.1:8000", "attempts": 1}

    def append_call():
        call = ms.CallRecord(REQUEST, ANSWER, "bench", False, 200, None, *times, more=more)
        trajectory.append(call.line())

    value = ms.parse_json(REQUEST)
    return [
        ("request head, ten fields", lambda: ms.parse_request_head(REQUEST_HEAD)),
        ("request head from a socket", head_reader(ms)),
        ("response head, ten fields", lambda: ms.parse_response_head(RESPONSE_HEAD)),
        ("response head, written", lambda: ms.response_head(200, response_head.headers)),
        ("SSE piece: out of its chunk", lambda: decoder.feed(CHUNKED_PIECE)),
        ("SSE piece: parsed, added up", lambda: answer.feed(PIECE)),
        ("SSE piece, socket to socket", relay(ms, response_head)),
        ("trajectory record appended", append_call),
        ("marker record appended", lambda: appended.append("request", REQUEST, 1)),
        ("marker record read", lambda: ms.parse_record(record)),
        ("turn found, at the log's end", lambda: log.find(TURNS)),
        ("JSON of 1.5 kB, read", lambda: ms.parse_json(REQUEST)),
        ("JSON of 1.5 kB, written", lambda: ms.dump_json(value)),
        ("JSON of 1.5 kB, on one line", lambda: ms.compact_json(REQUEST)),
        ("JSON of 100 kB, on one line", lambda: ms.compact_json(LONG_REQUEST)),
    ]


def filled_log(ms, path, turns=TURNS):
    """A log of answered turns, and one request more."""
    log = ms.MarkerLog(path)
    for index in range(1, turns + 1):
        log.append("request", REQUEST, index)
        log.append("response", ANSWER, index)
    log.append("request", REQUEST, turns + 1)
    return log


def head_reader(ms):
    """Reads a request's head as the server does; a client's `send` is part of it."""
    client, sock = socket.socketpair()
    connection = ms.Connection(sock, ms.MAX_BODY_BYTES)
    data = REQUEST_HEAD + b"\r\n\r\n"

    def read():
        client.send(data)
        connection.read_head()

    return read


def relay(ms, head):
    """Passes a piece on as the proxy does; the upstream's `send` and the client's `recv` are part of it."""
    upstream, upstream_sock = socket.socketpair()
    client, client_sock = socket.socketpair()
    upstream_sock.setblocking(False)
    origin = ms.Origin("http", "127.0.0.1", 8000)
    connection = ms.UpstreamConnection(upstream_sock, origin)
    response = ms.UpstreamResponse(connection, head, b"", ms.ClientWatch(client_sock), 60.0, None)
    answer, to_client = ms.RecordedAnswer(head, True), ms.Connection(client_sock, ms.MAX_BODY_BYTES)

    def pass_on():
        upstream.send(CHUNKED_PIECE)
        piece = response.read()
        answer.feed(piece)
        to_client.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        client.recv(4096)

    return pass_on


def cpu_seconds(function, count):
    began = time.process_time()
    for _ in range(count):
        function()
    return time.process_time() - began


def measure_paths(modules, directory):
    columns = []
    for number, module in enumerate(modules):
        columns.append(paths(module, tempfile.mkdtemp(dir=directory, prefix="%d-" % number)))
    for row in zip(*columns):
        name, functions = row[0][0], [function for _, function in row]
        count = max(1, int(ROUND_SECONDS / (cpu_seconds(functions[0], 100) / 100)))
        rounds = [[cpu_seconds(function, count) / count for function in functions] for _ in range(ROUNDS)]
        report(name, "us", [1e6 * min(column) for column in zip(*rounds)])


def report(name, unit, figures, note=""):
    """A line: this file's figure, and with another file that one's and their ratio."""
    mine, *other = figures
    line = "%-34s %8.2f %s%s" % (name, mine, unit, note)
    print(line + "".join("   other %8.2f   ratio %.2f" % (figure, mine / figure) for figure in other), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# A trainer's turn, as a process.
# ----------------------------------------------------------------------------------------------------------------------


def beginnings(path):
    """The ways in which `anti-call-llm` is begun in the directory of a file, by name."""
    isolated = "import sys; sys.path.insert(0, %r); import rock_ms; sys.exit(rock_ms.main())" % os.path.dirname(path)
    return {
        "rock_ms.py": [sys.executable, path],
        "-m rock_ms": [sys.executable, "-m", "rock_ms"],
        "-I -S, imported (as the SDK)": [sys.executable, "-I", "-S", "-c", isolated],
    }


def cpu_of(command, directory):
    """CPU seconds of a process that has to succeed."""
    process = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    if status:
        raise SystemExit("failed: %s" % command)
    return usage.ru_utime + usage.ru_stime


def measure_turns(ms, files, directory):
    """Print the turns, each with its ratio to the empty Python that is begun in the same way."""
    turns = {"first turn": (0, ["--index", "0"]), "later turn": (TURNS, ["--index", str(TURNS), "--response", ANSWER])}
    commands = {
        "empty Python": [([sys.executable, "-c", "pass"], ROOT)],
        "empty Python, -I -S": [([sys.executable, "-I", "-S", "-c", "pass"], ROOT)],
    }
    with contextlib.ExitStack() as services:
        for turn, (count, words) in turns.items():
            data_dir = tempfile.mkdtemp(dir=directory)
            filled_log(ms, os.path.join(data_dir, ms.LOG_FILE_NAME), count)
            state = ms.ServiceState(data_dir)
            state.acquire()  # a service runs, as far as a command can see
            services.callback(state.release)
            words = ["anti-call-llm", *words, "--data-dir", data_dir]
            for how in beginnings(files[0]):
                each = [(beginnings(file)[how] + words, os.path.dirname(file)) for file in files]
                commands["%s, %s" % (turn, how)] = each
        rounds = [[[cpu_of(*each) for each in row] for row in commands.values()] for _ in range(ROUNDS + 1)][1:]
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in zip(commands, zip(*rounds))}
    for name, figures in medians.items():
        empty = medians["empty Python, -I -S" if "-I" in name else "empty Python"][0]
        report(name, "ms", [1000 * seconds for seconds in figures], " (%.1f)" % (figures[0] / empty))


def main():
    files = [os.path.join(ROOT, "rock_ms.py")] + [os.path.abspath(path) for path in sys.argv[1:2]]
    modules = [load(path, "rock_ms_%d" % number) for number, path in enumerate(files)]
    print("Python %s, CPU time" % sys.version.split()[0])
    with tempfile.TemporaryDirectory(prefix="bench-paths-") as directory:
        measure_paths(modules, directory)
        measure_turns(modules[0], files, directory)


if __name__ == "__main__":
    main()
