"""Operations of registered OpenAPI documents, called through the tool manager."""

import contextlib
import http.server
import json
import threading

import pytest

from managers import FakeRuntime, managing
from support import TIMEOUT, serving


class Todos(http.server.BaseHTTPRequestHandler):
    """A service that repeats what it was asked, or does what the name in the path says."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode("utf-8")
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append((self.command, self.path, body, headers))
        if self.path.endswith("/silent"):
            self.server.may_end.wait(TIMEOUT)
        status, text = self.server.answers.get(self.path.rpartition("/")[2], (200, '{"todos": ["milk"]}'))
        data = text.encode("utf-8")
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/todos/elsewhere")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def todos():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Todos)
    server.seen, server.answers, server.may_end = [], {}, threading.Event()
    server.url = "http://127.0.0.1:%d" % server.server_address[1]
    with serving(server):
        yield server
        server.may_end.set()


def document(url):
    username = {"in": "path", "name": "username", "schema": {"type": "string"}, "required": True}
    trace = {"in": "header", "name": "X-Trace", "schema": {"type": "string"}}
    session = {"in": "cookie", "name": "session", "schema": {"type": "string"}}
    limit = {"in": "query", "name": "limit", "schema": {"type": "integer"}}
    todo = {"type": "object", "required": ["todo"], "properties": {"todo": {"type": "string"}}}
    body = {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Todo"}}}}
    operations = {
        "get": {"operationId": "getTodos", "parameters": [username, limit, trace, session], "responses": {}},
        "post": {"operationId": "addTodo", "parameters": [username], "requestBody": body, "responses": {}},
    }
    return {
        "openapi": "3.0.1",
        "info": {"title": "TODO", "version": "v1"},
        "servers": [{"url": url}],
        "paths": {"/todos/{username}": operations},
        "components": {"schemas": {"Todo": todo}},
    }


@pytest.fixture
def manager(tmp_path):
    with managing(tmp_path / "data", FakeRuntime(), request_timeout=0.5) as manager:
        yield manager


@pytest.fixture
def registered(manager, todos):
    """That manager, with a document registered."""
    said = manager.ask("/openapi_schema", {"openapi_name": "todo", "openapi_schema": document(todos.url)})
    assert said.json()["output"] == {
        "openapi_name": "todo",
        "operations": ["getTodos", "addTodo"],
        "servers": [todos.url],
    }
    return manager


def call(manager, operation_id="getTodos", **more):
    return manager.ask("/execute_openapi", {"openapi_name": "todo", "operation_id": operation_id, **more})


def test_a_registered_document_is_returned_as_it_came_also_after_a_restart(tmp_path, todos):
    whole = document(todos.url)
    with managing(tmp_path / "data", FakeRuntime()) as manager:
        assert manager.ask("/openapi_schema", {"openapi_name": "todo", "openapi_schema": whole}).status == 200
    with managing(tmp_path / "data", FakeRuntime()) as manager:
        got = manager.ask("/openapi_schema", {"openapi_name": "todo"}).json()
        assert sorted(got) == ["message", "output", "request_id"] and got["output"] == whole
        assert call(manager, params={"username": "bob"}).json()["output"] == {"todos": ["milk"]}


def test_parameters_reach_their_places(registered, todos):
    params = {"username": "a/b", "limit": 3, "X-Trace": "t", "session": "s"}
    for given in (params, json.dumps(params)):
        got = call(registered, params=given, headers={"Authorization": "Bearer k"})
        assert (got.status, got.json()["output"]) == (200, {"todos": ["milk"]})
        method, path, body, headers = todos.seen.pop()
        assert (method, path, body) == ("GET", "/todos/a%2Fb?limit=3", "")
        assert [headers[name] for name in ("x-trace", "cookie", "authorization")] == ["t", "session=s", "Bearer k"]


@pytest.mark.parametrize("given", [{"params": {"username": "bob", "todo": "tea"}}, {"data": {"todo": "tea"}}])
def test_a_body_is_sent_as_json(registered, todos, given):
    assert call(registered, "addTodo", **{"params": {"username": "bob"}, **given}).status == 200
    method, path, body, headers = todos.seen.pop()
    assert (method, path, json.loads(body)) == ("POST", "/todos/bob", {"todo": "tea"})
    assert headers["content-type"] == "application/json"


def test_the_requests_of_modelscope_agents_client_are_understood(registered, todos):
    """Its OpenapiServiceProxy fills the path in, and sends everything else apart."""
    request = {"url": todos.url + "/todos/bob", "params": {}, "headers": {"Authorization": ""}, "method": "GET"}
    request.update(cookies={}, data={})
    assert registered.ask("/execute_openapi", request).json()["output"] == {"todos": ["milk"]}
    request.update(
        method="POST", data={"todo": "tea"}, headers={"Content-Type": "application/json", "Authorization": ""}
    )
    assert registered.ask("/execute_openapi", request).status == 200
    assert [(method, path, body) for method, path, body, _ in todos.seen] == [
        ("GET", "/todos/bob", ""),
        ("POST", "/todos/bob", '{"todo":"tea"}'),
    ]
    assert all("authorization" not in headers for _, _, _, headers in todos.seen)


@pytest.mark.parametrize(
    "value, status, said",
    [
        ({"openapi_name": "todo", "operation_id": "getTodos", "params": {}}, 400, "argument username is missing"),
        ({"openapi_name": "todo", "operation_id": "getTodo", "params": {}}, 400, "getTodo"),
        ({"openapi_name": "tod", "operation_id": "getTodos"}, 404, "did you mean 'todo'?"),
        ({"openapi_name": "todo"}, 400, "say which operation"),
        ({"operation_id": "getTodos", "params": "["}, 400, "params is not JSON"),
        ({"operation_id": "getTodos", "params": 1}, 400, "argument params must be a string or an object"),
        ({"url": "http://127.0.0.1:1/todos/bob", "params": {}}, 403, "no registered OpenAPI document"),
        ({"url": "http://169.254.169.254/latest/meta-data", "params": {}}, 403, "no registered OpenAPI document"),
        ({"url": "file:///etc/passwd", "params": {}}, 400, "url: must be an absolute http(s) URL"),
    ],
)
def test_what_is_not_an_operation_is_refused_and_nothing_is_sent(registered, todos, value, status, said):
    got = registered.ask("/execute_openapi", value)
    assert got.status == status and said in got.json()["message"], got.body
    assert todos.seen == []


def test_a_document_that_is_none_is_refused(manager):
    for value in ({}, {"openapi": "3.0.0", "paths": {}}, {**document("/relative")}):
        got = manager.ask("/openapi_schema", {"openapi_name": "x", "openapi_schema": value})
        assert got.status == 400 and got.json()["message"].startswith("openapi_schema: ")
    assert manager.ask("/openapi_schema", {"openapi_name": "x"}).status == 404


def test_a_document_is_its_tenants_alone(tmp_path, todos):
    keys = {"alice": "key-of-alice", "bob": "key-of-bob"}
    with managing(tmp_path / "data", FakeRuntime(), tenant_keys=keys) as manager:
        whole = {"openapi_name": "todo", "openapi_schema": document(todos.url)}
        alice, bob = ({"Authorization": "Bearer " + key} for key in keys.values())
        assert manager.ask("/openapi_schema", whole, headers=alice).status == 200
        wanted = {"url": todos.url + "/todos/bob", "params": {}}
        assert manager.ask("/execute_openapi", wanted, headers=alice).status == 200
        assert manager.ask("/execute_openapi", wanted, headers=bob).status == 403
        assert manager.ask("/execute_openapi", {**wanted, "tenant_id": "alice"}, headers=bob).status == 403
        assert manager.ask("/openapi_schema", {"openapi_name": "todo"}, headers=bob).status == 404
        assert manager.ask("/openapi_schema", whole).status == 401
        assert len(todos.seen) == 1


@pytest.mark.parametrize(
    "answer, status, said",
    [
        ((404, "no such user"), 502, "the operation's server answered 404: no such user"),
        ((500, ""), 502, "the operation's server answered 500: nothing"),
        ((302, ""), 502, "the operation's server answered 302: nothing"),
    ],
)
def test_a_failure_of_the_server_is_told_and_no_redirect_is_followed(registered, todos, answer, status, said):
    todos.answers["bob"] = answer
    got = call(registered, params={"username": "bob"})
    assert (got.status, got.json()["message"]) == (status, said)
    assert len(todos.seen) == 1


def test_an_answer_that_is_no_json_is_a_text_and_none_is_null(registered, todos):
    todos.answers.update(text=(200, "plain"), none=(204, ""))
    assert call(registered, params={"username": "text"}).json()["output"] == "plain"
    assert call(registered, params={"username": "none"}).json()["output"] is None


def test_a_server_that_is_silent_or_away_is_504_or_502(registered):
    got = call(registered, params={"username": "silent"})
    assert got.status == 504 and got.json()["message"].startswith("the operation's server: ")
    away = document("http://127.0.0.1:1")
    assert registered.ask("/openapi_schema", {"openapi_name": "away", "openapi_schema": away}).status == 200
    value = {"openapi_name": "away", "operation_id": "getTodos", "params": {"username": "bob"}}
    got = registered.ask("/execute_openapi", value)
    assert got.status == 502 and "cannot connect to 127.0.0.1:1" in got.json()["message"]
