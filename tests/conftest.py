"""Fixtures: each test has a directory of its own, and whatever it starts is stopped."""

import pytest

from support import run_cli, running


@pytest.fixture
def service(tmp_path):
    """A local service in this process."""
    with running(tmp_path) as service:
        yield service


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
