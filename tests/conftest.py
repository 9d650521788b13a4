"""Fixtures: each test has a directory of its own, and whatever it starts is stopped."""

import contextlib
import faulthandler
import os
import signal

import pytest

import rock_ms
from support import TIMEOUT, Proxy, is_proxy_variable, run_cli, running
from upstream import Upstream

HANG_SECONDS = 4 * TIMEOUT  # no test has more time for what must happen in it


def pytest_configure(config):
    config.stderr_of_all = os.dup(2)  # that no test captures
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """Where a test hangs, or the end of all does, every thread's traceback is shown, and nothing else is waited for."""
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=item.config.stderr_of_all)
    yield


@pytest.fixture(autouse=True)
def no_proxy_of_the_machine(monkeypatch):
    """What is on 127.0.0.1 is asked directly, wherever the tests run."""
    for name in filter(is_proxy_variable, list(os.environ)):
        monkeypatch.delenv(name)


@pytest.fixture
def service(tmp_path):
    """A local service in this process."""
    with running(tmp_path) as service:
        yield service


@pytest.fixture(scope="session")
def upstreams():
    """The upstream process that tests use one after the other, as the one item of a list."""
    upstreams = [Upstream()]
    yield upstreams
    upstreams[0].close()


@pytest.fixture
def upstream(upstreams):
    """A model's server in a process of its own, to be scripted."""
    if not upstreams[0].is_running():  # a test has killed it
        upstreams[0].close()
        upstreams[0] = Upstream()
    upstreams[0].reset()
    return upstreams[0]


class StallWatch:
    """A ClientWatch whose time stands still while its upstream is only slow.

    Where that stalls, and nothing comes, the deadline of a wait has come.
    """

    def __init__(self, upstream, watch):
        self._upstream, self._watch, self._now = upstream, watch, 0.0

    def clock(self):
        return self._now

    def look(self):
        self._watch.look()

    def wait(self, sock, event, deadline):
        is_stalling = False
        while deadline > self._now:
            if self._watch.wait(sock, event, self._watch.clock() + 0.02):
                return True
            if is_stalling:  # and did so before that wait: all that it sends has been seen
                self._now = deadline
            is_stalling = self._upstream.is_stalling()
        return False


@pytest.fixture
def only_stalls_take_time(upstream, monkeypatch):
    """To a proxy in front of that server nothing but its stalls is a silence, however slow it is."""
    original = rock_ms.ClientWatch
    monkeypatch.setattr(rock_ms, "ClientWatch", lambda client: StallWatch(upstream, original(client)))


@pytest.fixture
def proxy(tmp_path, upstream):
    """A proxy in this process, in front of that server."""
    with running(tmp_path, Proxy, upstream=upstream) as proxy:
        yield proxy


@pytest.fixture
def start(tmp_path, upstream):
    """Starts a proxy in front of that server, with settings of its own."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running(tmp_path, Proxy, upstream=upstream, **settings))


class Cli:
    """The command line, always on one data directory."""

    def __init__(self, data_dir):
        self.data_dir = str(data_dir)

    def __call__(self, *words, **options):
        return run_cli(*words, "--data-dir", self.data_dir, **options)


@pytest.fixture
def cli(tmp_path):
    """The command line on a directory of its own; a service that it starts is stopped."""
    cli = Cli(tmp_path / "data")
    yield cli
    cli("stop", check=0)
