"""Fixtures: each test has a directory of its own, and whatever it starts is stopped."""

import pytest

from support import Proxy, run_cli, running
from upstream import Upstream


@pytest.fixture
def service(tmp_path):
    """A local service in this process."""
    with running(tmp_path) as service:
        yield service


@pytest.fixture(scope="session")
def upstreams():
    """The upstream process that tests use one after the other; a new one where a test has killed it."""
    running = []
    yield running
    for upstream in running:
        upstream.close()


@pytest.fixture
def upstream(upstreams):
    """A model's server in a process of its own, to be scripted."""
    if not upstreams or not upstreams[-1].is_running():
        upstreams.append(Upstream())
    upstreams[-1].reset()
    return upstreams[-1]


@pytest.fixture
def proxy(tmp_path, upstream):
    """A proxy in this process, in front of that server."""
    with running(tmp_path, Proxy, upstream=upstream) as proxy:
        yield proxy


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
