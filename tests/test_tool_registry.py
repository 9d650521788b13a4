"""The tool registry: an SQLite file that several use, and that survives who used it."""

import contextlib
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

import rock_ms
import rock_sdk
from support import SCRIPT, clean_environ, files_of_at_most

NODE = rock_sdk.Node("default", "add", "0" * 32, "process", port=1, api_key="key", image="i", wish="w")


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "tools.sqlite3")


@contextlib.contextmanager
def opened(path):
    registry = rock_sdk.ToolRegistry(path)
    try:
        yield registry
    finally:
        registry.close()


def test_node_comes_back_as_it_was_put(path):
    with opened(path) as registry:
        registry.put(NODE)
        registry.put(replace(NODE, tenant_id="other", port=None))
        manager_id = registry.manager_id
    with opened(path) as registry:
        assert registry.node("default", "add") == NODE
        assert registry.nodes() == [NODE, replace(NODE, tenant_id="other", port=None)]
        assert registry.nodes("other") == [replace(NODE, tenant_id="other", port=None)]
        assert registry.node("other", "sub") is None
        assert registry.manager_id == manager_id


def test_only_this_user_can_read_it(path):
    with opened(path) as registry:
        registry.put(NODE)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_what_is_said_of_an_earlier_node_changes_nothing(path):
    with opened(path) as registry:
        registry.put(NODE)
        earlier = replace(NODE, node_id="1" * 32)
        assert not registry.change(earlier, status="failed")
        registry.forget(earlier)
        assert registry.node("default", "add") == NODE
        assert registry.change(NODE, status="failed", message="why", port=None)
        assert registry.node("default", "add") == replace(NODE, status="failed", message="why", port=None)
        registry.forget(NODE)
        assert registry.nodes() == []


def test_documents_belong_to_their_tenants(path):
    with opened(path) as registry:
        registry.put_document("a", "pets", {"x": "ü\ud800"})
        assert registry.document("a", "pets") == {"x": "ü\ud800"}
        registry.put_document("a", "pets", {"x": 1e400})
        registry.put_document("a", "cats", {})
        assert registry.document_names("a") == ["cats", "pets"]
        assert registry.document("a", "pets") == {"x": sys.float_info.max}
        assert registry.document("b", "pets") is None


def test_two_write_at_once(path):
    with opened(path) as one, opened(path) as other:

        def write(registry, tenant):
            for number in range(20):
                registry.put(replace(NODE, tenant_id=tenant, tool_name="t%d" % number))

        threads = [threading.Thread(target=write, args=(one if n % 2 else other, "t%d" % n)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(one.nodes()) == 80


WRITER = """
import itertools, rock_sdk
registry = rock_sdk.ToolRegistry("tools.sqlite3")
for number in itertools.count():
    registry.put(rock_sdk.Node("t", "tool%d" % number, "0" * 32, "process"))
    print(number, flush=True)
"""


def test_what_was_written_survives_a_killed_writer(path, tmp_path):
    environ = clean_environ(PYTHONPATH=os.path.dirname(SCRIPT))
    command = [sys.executable, "-c", WRITER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ, cwd=str(tmp_path)) as writer:
        for _ in range(20):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        written = 20 + len(writer.stdout.read().splitlines())
    with opened(path) as registry:
        assert written <= len(registry.nodes()) <= written + 1


def make_directory(path):
    os.mkdir(path)


def make_other_file(path):
    with open(path, "w") as file:
        file.write("no database\n" * 1000)


@pytest.mark.parametrize(
    "make, said", [(make_directory, "Is a directory"), (make_other_file, "not a database")], ids=["directory", "other"]
)
def test_file_that_cannot_be_used_is_named(path, make, said):
    make(path)
    with pytest.raises(rock_ms.StorageError, match="tools.sqlite3: .*%s" % said):
        rock_sdk.ToolRegistry(path)


def test_missing_directory_is_named(tmp_path):
    with pytest.raises(rock_ms.StorageError, match="No such file"):
        rock_sdk.ToolRegistry(str(tmp_path / "none" / "tools.sqlite3"))


def test_full_disk_is_an_error_and_leaves_what_was_there(path):
    with opened(path) as registry:
        registry.put(NODE)
        with files_of_at_most(os.path.getsize(path)), pytest.raises(rock_ms.StorageError, match="tools.sqlite3: "):
            registry.put_document("a", "large", {"x": "x" * 100000})
        assert registry.nodes() == [NODE]
        assert registry.document_names("a") == []
        registry.put(replace(NODE, tool_name="later"))


def test_file_that_another_program_keeps_locked_is_an_error(path, monkeypatch):
    monkeypatch.setattr(rock_sdk, "REGISTRY_SECONDS", 0.01)
    with opened(path) as registry:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(rock_ms.StorageError, match="database is locked"):
            registry.put(NODE)
        other.close()
        registry.put(NODE)


def test_closed_one_is_an_error(path):
    with opened(path) as registry:
        pass
    with pytest.raises(rock_ms.StorageError, match="closed"):
        registry.nodes()
