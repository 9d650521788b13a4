#!/usr/bin/env python3
"""An hour's worth of traffic, compressed: is a service at the end of it what it was at the beginning?

    python3 tests/bench/bench_load.py [--part parked] [--part turns] ... [--scale 0.1]

Each part has a service of its own, started by the command line.  The load comes from this process, the local type's
answers from another, a trainer's, and the proxy's from a third, its upstream.  Printed are, of the service's process
and those that it begins, together and from outside: resident memory, descriptors and threads, when a step of the load
is over and (at their most) during it, and how long a call took, and (by processor time) those processes for it.  In
the first rows a service warms up; from then on rows of one name should agree.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import resource
import selectors
import statistics
import subprocess
import sys
import tempfile
import threading
import time

import bench_assistant
import bench_proxy

ROOT = os.path.dirname(bench_proxy.SCRIPT)
sys.path[:0] = [ROOT]

import rock_ms  # noqa: E402

SETTLE_SECONDS = 5.0  # for a service to come to rest after a step; what it has not by then is printed
SAMPLE_SECONDS = 0.1
PIECE_SECONDS = 0.2  # from a piece of a slow stream to the next
SLOW_PIECES = 20
STEPS = 5  # rows of a part that has no rounds
ROUNDS = 5
NUMBERED = re.compile(rb'"([0-9]{6}) Go on\. ')
ANSWER = '{"choices":[{"index":0,"message":{"role":"assistant","content":"answer to %s"},"finish_reason":"stop"}]}'


# ----------------------------------------------------------------------------------------------------------------------
# The services, seen from outside.
# ----------------------------------------------------------------------------------------------------------------------


class Service:
    """One that runs.  seconds: how long its start took."""

    def __init__(self, state_path, seconds):
        with open(state_path) as file:
            state = json.load(file)
        self.port, self.pid, self.seconds = state["port"], state["pid"], seconds

    def sample(self):
        """(resident memory in MB, descriptors, threads) of its process and those that it began, together."""
        samples = []
        for pid in processes(self.pid):
            with contextlib.suppress(OSError):  # it may have ended by now
                listed = (len(os.listdir("/proc/%d/%s" % (pid, name))) for name in ("fd", "task"))
                samples.append((resident_mb(pid), *listed))
        return tuple(map(sum, zip(*samples)))

    def processor_seconds(self):
        """How long all of them have been running on a processor."""
        ticks = 0
        for pid in processes(self.pid):
            with contextlib.suppress(OSError), open("/proc/%d/stat" % pid) as file:
                ticks += sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def waiting(self):
        """Calls of agents that wait for their answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            return int(re.search(rb"calls_waiting (\d+)", connection.getresponse().read()).group(1))


def processes(pid):
    """A process, and all that come of it."""
    found = [pid]
    with contextlib.suppress(OSError):
        for thread in os.listdir("/proc/%d/task" % pid):
            with open("/proc/%d/task/%s/children" % (pid, thread)) as file:
                found += [one for child in file.read().split() for one in processes(int(child))]
    return found


def resident_mb(pid):
    with open("/proc/%d/status" % pid) as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read()).group(1)) / 1024


def timed(script, *words):
    """Seconds that a command takes."""
    began = time.perf_counter()
    subprocess.check_call([sys.executable, script, *words], stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


@contextlib.contextmanager
def serving(data_dir, *words, script=bench_proxy.SCRIPT, state="LLMService.json"):
    """A Service of the command line, until the block ends."""
    where = ["--data-dir", data_dir]
    seconds = timed(script, "start", "--port", "0", *words, *where)
    try:
        yield Service(os.path.join(data_dir, state), seconds)
    finally:
        timed(script, "stop", *where)


class Watch:
    """Samples a service while it works, and prints a row for each step of the load."""

    def __init__(self, service):
        self._service = service
        self._most = service.sample()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._rest = self._most[1:]
        self._ran = service.processor_seconds()

    def __enter__(self):
        self._thread.start()
        self.row("at rest")
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _run(self):
        while not self._over.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self):
        now = self._service.sample()
        with self._lock:
            self._most = tuple(map(max, self._most, now))
        return now

    def settled(self):
        """Wait until descriptors and threads are what they were after the last step, or do not become that."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline and any(a > b for a, b in zip(self._service.sample()[1:], self._rest)):
            time.sleep(SAMPLE_SECONDS)
        self._rest = self._service.sample()[1:]

    def row(self, name, calls=0, seconds=0.0):
        """What holds now, and the most since the last row."""
        now, ran, before = self._look(), self._service.processor_seconds(), self._ran
        with self._lock:
            most, self._most, self._ran = self._most, now, ran
        times = (seconds, ran - before)
        cost = "%8.2f ms/call (%.2f)" % tuple(1000 * one / calls for one in times) if calls else ""
        memory, rest = "%8.1f MB (%.1f)" % (now[0], most[0]), [x for pair in zip(now[1:], most[1:]) for x in pair]
        print("%-28s %-20s  descriptors %4d (%4d)  threads %4d (%4d) %s" % (name, memory, *rest, cost), flush=True)


def fact(name, value, *args):
    print("%-52s %s" % (name, value % args), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The load: calls that tell one from another, on connections that are kept.
# ----------------------------------------------------------------------------------------------------------------------


def numbered(request, number):
    """The same request, and of the same length, with a number in it."""
    return request.replace(b"Go on. ", b"%06d " % number, 1)


def is_whole(data):
    """Whether an answer has come to its end."""
    head, end, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    return bool(end) and (len(body) >= int(length.group(1)) if length else data.endswith(b"0\r\n\r\n"))


class Agents:
    """Connections that ask.  mark: what must stand in each answer, given the number of its call."""

    def __init__(self, port, count, is_stream=False, mark=lambda number: b""):
        self._request = bench_proxy.request_bytes(port, is_stream)
        self._mark = mark
        self._sockets = [bench_proxy.connect(port) for _ in range(count)]
        self._selector = selectors.DefaultSelector()
        self._asked = {}  # socket -> (number of the call that it waits for, what has come of its answer)

    def ask(self, numbers):
        """Begin a call on each connection that is free, as long as there are numbers."""
        for sock in self._sockets:
            if sock not in self._asked:
                self._ask(sock, numbers)

    def _ask(self, sock, numbers):
        number = next(iter(numbers), None)
        if number is not None:
            sock.sendall(numbered(self._request, number))
            self._asked[sock] = number, b""
            self._selector.register(sock, selectors.EVENT_READ)

    def finish(self, numbers=()):
        """Ask again on each connection that was answered, until every number was, once."""
        while self._asked:
            for key, _ in self._selector.select():
                self._receive(key.fileobj, numbers)

    def _receive(self, sock, numbers):
        number, data = self._asked[sock]
        received = sock.recv(1 << 16)
        data += received
        if not received or not data.startswith(b"HTTP/1.1 200"):
            raise SystemExit("call %d failed: %r" % (number, data[:300]))
        self._asked[sock] = number, data
        if is_whole(data):
            if self._mark(number) not in data:
                raise SystemExit("call %d has another's answer: %r" % (number, data[-300:]))
            del self._asked[sock]
            self._selector.unregister(sock)
            self._ask(sock, numbers)

    def close(self):
        """Hang up."""
        self._selector.close()
        for sock in self._sockets:
            sock.close()


def all_calls(port, numbers, connections, is_stream=False):
    """Seconds that the calls of these numbers take, on so many connections."""
    began, numbers = time.perf_counter(), iter(numbers)
    with contextlib.closing(Agents(port, connections, is_stream)) as agents:
        agents.ask(numbers)
        agents.finish(numbers)
    return time.perf_counter() - began


@contextlib.contextmanager
def helper(*words):
    """This script in another process, which reads lines and writes lines."""
    command = [sys.executable, os.path.abspath(__file__), *words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


# ----------------------------------------------------------------------------------------------------------------------
# Local: parked requests, and a long session.
# ----------------------------------------------------------------------------------------------------------------------


def answer_for_ever(log_path):
    """Be a trainer: for each line `FIRST LAST` answer these requests, then say how many seconds it took."""
    log = rock_ms.MarkerLog(log_path)
    waiter = rock_ms.RequestWaiter(log, 0.1, lambda: True)
    for line in sys.stdin:
        first, last = map(int, line.split())
        began = time.perf_counter()
        place = log.find(first - 1)
        for index in range(first, last + 1):
            request = waiter.wait(index, place, None)
            place = log.append_response(index, ANSWER % NUMBERED.search(request.encode()).group(1).decode())
        print(time.perf_counter() - began, flush=True)


class Trainer:
    """Has another process answer."""

    def __init__(self, process):
        self._process = process

    def begin(self, first, last):
        self._process.stdin.write(b"%d %d\n" % (first, last))
        self._process.stdin.flush()

    def seconds(self):
        """How long the answers took that were begun last."""
        return float(self._process.stdout.readline())

    @property
    def memory_mb(self):
        return resident_mb(self._process.pid)


@contextlib.contextmanager
def trained(data_dir):
    with helper("--answer", os.path.join(data_dir, "LLMService.log")) as process:
        yield Trainer(process)


def answer_to(number):
    return b"answer to %06d" % number


def wait_for_calls(service, count):
    deadline = time.monotonic() + 60
    while service.waiting() != count:
        if time.monotonic() > deadline:
            raise SystemExit("%d calls wait, not %d" % (service.waiting(), count))
        time.sleep(SAMPLE_SECONDS)


def parked(data_dir, scaled):
    """1,000 requests wait at once, are answered, and come again; then their agents hang up."""
    count, first, words = scaled(1000), 1, ["--host", "127.0.0.1"]
    with serving(data_dir, *words) as service, trained(data_dir) as trainer, Watch(service) as watch:
        for is_answered in [True] * 2 * ROUNDS + [False] * ROUNDS + [True] * ROUNDS:
            agents = Agents(service.port, count, mark=answer_to)
            began = time.perf_counter()
            agents.ask(iter(range(first, first + count)))
            wait_for_calls(service, count)
            watch.row("%d parked" % count, count, time.perf_counter() - began)
            if is_answered:
                trainer.begin(first, first + count - 1)
                agents.finish()
                fact("  an answer took the trainer", "%.2f ms", trainer.seconds() / count * 1000)
            agents.close()
            first += count
            wait_for_calls(service, 0)
            watch.settled()
            watch.row("  all answered" if is_answered else "  all hung up")


def turns(data_dir, scaled):
    """100,000 turns, one after the other."""
    count, log_path = scaled(100000), os.path.join(data_dir, "LLMService.log")
    step = max(1, count // STEPS)
    words = ["--host", "127.0.0.1"]
    with serving(data_dir, *words) as service, trained(data_dir) as trainer, Watch(service) as watch:
        for first in range(1, count + 1, step):
            last = min(count, first + step - 1)
            trainer.begin(first, last)
            numbers, began = iter(range(first, last + 1)), time.perf_counter()
            with contextlib.closing(Agents(service.port, 1, mark=answer_to)) as agents:
                agents.ask(numbers)
                agents.finish(numbers)
            watch.settled()
            watch.row("turns to %d" % last, last - first + 1, time.perf_counter() - began)
            call = ["anti-call-llm", "--index", str(last - 1), "--data-dir", data_dir]
            place = statistics.median(timed(bench_proxy.SCRIPT, *call) for _ in range(9))
            memory, size = trainer.memory_mb, os.path.getsize(log_path) / 1e6
            fact("  the trainer's memory; the log; an anti-call-llm", "%.1f MB; %.0f MB; %.3f s", memory, size, place)
    with serving(data_dir, *words, "--resume") as service:
        fact("start --resume", "%.2f s, %.1f MB", service.seconds, service.sample()[0])
    with serving(data_dir, *words) as service:
        fact("start, which sets the log aside", "%.2f s, %.1f MB", service.seconds, service.sample()[0])


# ----------------------------------------------------------------------------------------------------------------------
# Proxy: many streams at once, and many calls.
# ----------------------------------------------------------------------------------------------------------------------


class SlowUpstream(bench_proxy.Upstream):
    """Sends each stream a few pieces, with a pause before each."""

    def __init__(self):
        super().__init__()
        self._pieces[SLOW_PIECES + 1 : -1] = []
        self._due = {}  # socket -> when its next piece is

    def run(self):
        while True:
            for key, _ in self._selector.select(0.01 if self._streams else None):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.fileobj)
            now = time.monotonic()
            for sock in list(self._streams):
                if self._due.setdefault(sock, now) <= now:
                    self._due[sock] += PIECE_SECONDS
                    self._stream(sock)

    def _stream(self, sock):
        number, _ = self._streams[sock]
        with contextlib.suppress(ConnectionError):
            sock.sendall(self._pieces[number])
        self._streams[sock] = number + 1, b""
        if number + 1 == len(self._pieces):
            del self._streams[sock], self._due[sock]


def proxy(data_dir, scaled):
    """500 streams at once, several times, then 100,000 calls; then what is done with their records."""
    streams, calls, first = scaled(500), scaled(100000), 1
    step = max(1, calls // STEPS)
    with helper("--upstream") as upstream:
        url = "http://127.0.0.1:%d/v1" % int(upstream.stdout.readline())
        words = ["--host", "127.0.0.1", "--type", "proxy"]
        with serving(data_dir, *words, "--proxy-base-url", url) as service, Watch(service) as watch:
            for _ in range(ROUNDS):
                seconds = all_calls(service.port, range(first, first + streams), streams, is_stream=True)
                first += streams
                watch.settled()
                watch.row("%d streams at once" % streams, streams, seconds)
            for _ in range(STEPS):
                seconds = all_calls(service.port, range(first, first + step), 8)
                first += step
                watch.settled()
                watch.row("%d calls, 8 at once" % step, step, seconds)
    records = os.path.join(data_dir, "LLMTraj.jsonl")
    check_records(records, first - 1)
    fact("traj", "%.2f s", timed(bench_proxy.SCRIPT, "traj", records))
    for match in ("order", "request"):
        replayed(data_dir, [*words, "--replay-file", records, "--replay-match", match], first, 2 * ROUNDS * streams)


def check_records(path, count):
    """Print how many calls were recorded, and how many of these not exactly once."""
    seen = collections.Counter()
    with open(path, "rb") as file:
        seen.update(int(NUMBERED.search(line).group(1)) for line in file)
    wrong = [number for number in range(1, count + 1) if seen[number] != 1] + [n for n in seen if n > count]
    size = os.path.getsize(path) / 1e6
    fact("recorded", "%d calls, %d of them not once, in %.0f MB", sum(seen.values()), len(wrong), size)


def replayed(data_dir, words, end, count):
    """Start a replay, and have it replay the last calls."""
    with serving(data_dir, *words) as service, Watch(service) as watch:
        fact("the start of a replay, by " + words[-1], "%.2f s", service.seconds)
        for last in (end - count // 2, end):
            seconds = all_calls(service.port, range(last - count // 2, last), 8)
            watch.settled()
            watch.row("%d replayed" % (count // 2), count // 2, seconds)


# ----------------------------------------------------------------------------------------------------------------------
# The tool node, the tool manager, the assistant.
# ----------------------------------------------------------------------------------------------------------------------


def ask_again(port, path, value, count):
    """Seconds that the same call takes so many times, on one connection."""
    connection, body = http.client.HTTPConnection("127.0.0.1", port), json.dumps(value)
    began = time.perf_counter()
    with contextlib.closing(connection):
        for _ in range(count):
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data = response.read()
            if response.status != 200:
                raise SystemExit("%s failed: %d %r" % (path, response.status, data[:300]))
    return time.perf_counter() - began


def repeated(service, what, path, value, count, at_once=4):
    """Ask a service the same in steps, with a row for each."""
    share = max(1, count // STEPS // at_once)
    with Watch(service) as watch:
        for _ in range(STEPS):
            began = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
                done = [pool.submit(ask_again, service.port, path, value, share) for _ in range(at_once)]
            for one in done:
                one.result()
            seconds = time.perf_counter() - began
            watch.settled()
            watch.row("%d %s, %d at once" % (share * at_once, what, at_once), share * at_once, seconds)


PARAMS = {"instance_id": "123", "period": "1"}


def node(data_dir, scaled):
    """10,000 calls of a tool, by its node."""
    with serving(data_dir, "--host", "127.0.0.1", "--type", "tool-node", "--tool", "RenewInstance") as service:
        repeated(service, "calls", "/execute_tool", {"params": PARAMS}, scaled(10000))


def manager(data_dir, scaled):
    """10,000 calls of a tool, by the manager."""
    words = ["--type", "tool-manager", "--runtime", "process"]
    with serving(data_dir, *words, script=bench_assistant.SDK, state="tool-manager.json") as service:
        ask_again(service.port, "/create_tool_service", {"tool_name": "RenewInstance"}, 1)
        status = b""
        while b"running" not in status:
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port)) as connection:
                connection.request("GET", "/check_tool_service_status?tool_name=RenewInstance")
                status = connection.getresponse().read()
        call = {"tool_name": "RenewInstance", "params": PARAMS}
        repeated(service, "calls", "/execute_tool", call, scaled(10000))


def assistant(data_dir, scaled):
    """10,000 calls that offer tools."""
    with helper("--upstream") as upstream:
        url = "http://127.0.0.1:%d/v1" % int(upstream.stdout.readline())
        words = ["--type", "assistant", "--model-server", url]
        with serving(data_dir, *words, script=bench_assistant.SDK, state="assistant.json") as service:
            value = {"model": "bench", "messages": bench_proxy.MESSAGES, "tools": bench_assistant.TOOLS}
            repeated(service, "answers", "/v1/chat/completions", value, scaled(10000))


PARTS = {part.__name__: part for part in (parked, turns, proxy, node, manager, assistant)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="one of the parts; default: all")
    parser.add_argument("--scale", type=float, default=1.0, help="how much of the load there is; default: all, 1.0")
    args = parser.parse_args()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    print("Python %s, %d cores" % (sys.version.split()[0], os.cpu_count()))
    for name in args.part or PARTS:
        print("\n%s: %s" % (name, PARTS[name].__doc__))
        with tempfile.TemporaryDirectory(prefix="bench-load-") as data_dir:
            PARTS[name](data_dir, lambda count: max(1, int(count * args.scale)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        answer_for_ever(sys.argv[2])
    elif sys.argv[1:2] == ["--upstream"]:
        SlowUpstream().run()
    else:
        main()
