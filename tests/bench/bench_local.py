#!/usr/bin/env python3
"""What a local turn costs, at the start and at the end of a long session.

    python3 tests/bench/bench_local.py [--turns 10000] [--request-kb 100] [--sample 20]

One service, one log.  The agent's requests are of the given size; a turn is measured as a trainer sees it: a fresh
`anti-call-llm` process that answers request k and prints request k+1.  Between the two samples the turns are answered
through the log directly, so that the session grows quickly.  Printed are medians, their ratio (1.0: a turn at the end
costs what a turn at the start did), the same for an agent's whole call without the trainer's process, and peak memory.
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

import rock_ms  # noqa: E402

SCRIPT = os.path.join(ROOT, "rock_ms.py")
ANSWER = '{"choices":[{"index":0,"message":{"role":"assistant","content":"ok"},"finish_reason":"stop"}]}'


class Agent(threading.Thread):
    """Asks again as soon as it is answered; `seconds` holds how long each call took."""

    def __init__(self, port, turns, size):
        super().__init__(daemon=True)
        self.seconds = []
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._turns = turns
        self._padding = "x" * size

    def run(self):
        for turn in range(1, self._turns + 1):
            messages = [{"role": "user", "content": "turn %d %s" % (turn, self._padding)}]
            body = json.dumps({"model": "m", "messages": messages})
            began = time.perf_counter()
            self._connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            answer = response.read()
            self.seconds.append(time.perf_counter() - began)
            if response.status != 200:
                print("call %d failed: %d %r" % (turn, response.status, answer), file=sys.stderr)
                return


def peak_memory_mb(pid):
    with open("/proc/%d/status" % pid) as file:
        return int(file.read().split("VmHWM:")[1].split()[0]) / 1024


def trainer_turns(data_dir, first, count):
    """Answer `count` turns by fresh processes; (seconds of each, largest peak memory in MB)."""
    seconds, memory = [], 0.0
    for index in range(first, first + count):
        command = [sys.executable, SCRIPT, "anti-call-llm", "--index", str(index), "--response", ANSWER]
        began = time.perf_counter()
        process = subprocess.Popen(command + ["--data-dir", data_dir], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds.append(time.perf_counter() - began)
        process.returncode = status
        memory = max(memory, usage.ru_maxrss / 1024)
        if status:
            raise SystemExit("anti-call-llm --index %d failed" % index)
    return seconds, memory


def direct_turns(log, first, count):
    """Answer through the log, as fast as the requests come."""
    waiter = rock_ms.RequestWaiter(log, 0.1, lambda: None)
    for index in range(first, first + count):
        waiter.wait(index + 1, log.append_response(index, ANSWER), 60)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10000)
    parser.add_argument("--request-kb", type=int, default=100)
    parser.add_argument("--sample", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-local-") as data_dir:
        start = [sys.executable, SCRIPT, "start", "--host", "127.0.0.1", "--port", "0", "--data-dir", data_dir]
        subprocess.check_call(start, stdout=subprocess.DEVNULL)
        try:
            measure(args, data_dir)
        finally:
            subprocess.check_call([sys.executable, SCRIPT, "stop", "--data-dir", data_dir], stdout=subprocess.DEVNULL)


def measure(args, data_dir):
    state = rock_ms.ServiceState(data_dir).read()
    log = rock_ms.MarkerLog(state["log_file"])
    agent = Agent(state["port"], args.turns, args.request_kb * 1000)
    agent.start()
    sample = args.sample
    rock_ms.RequestWaiter(log, 0.1, lambda: None).wait(1, rock_ms.Place(), 60)
    direct_turns(log, 1, sample)
    early, early_memory = trainer_turns(data_dir, sample + 1, sample)
    middle = 2 * sample + 1
    direct_turns(log, middle, args.turns - middle - sample)
    late, late_memory = trainer_turns(data_dir, args.turns - sample, sample)
    log.append_response(args.turns, ANSWER)
    agent.join()

    direct = agent.seconds[: sample - 1], agent.seconds[-2 * sample - 2 : -sample - 2]
    print("log: %.0f MB, %d turns of %d KB" % (os.path.getsize(log.path) / 1e6, args.turns, args.request_kb))
    report("turn by anti-call-llm", early, late)
    report("turn through the log alone", *direct)
    print("peak memory: service %.0f MB, anti-call-llm %.0f MB early, %.0f MB late" % (
        peak_memory_mb(state["pid"]), early_memory, late_memory))  # fmt: skip


def report(name, early, late):
    first, last = statistics.median(early), statistics.median(late)
    print("%s: start %.1f ms, end %.1f ms, ratio %.2f" % (name, first * 1000, last * 1000, last / first))


if __name__ == "__main__":
    main()
