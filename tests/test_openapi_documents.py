"""OpenAPI documents: what registers, the requests that are made of calls, and what can leave its place in none."""

import copy
import json
import random
import re

import pytest

import rock_sdk
from rock_sdk import HTTPCall, OpenAPIDocument, describe

SERVER = "https://api.example.com/v1"
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
TEXT, ANY, HAS_A = {"type": "string"}, {"type": "object"}, {"type": "object", "required": ["a"]}

# As modelscope-agent's demonstration has it, with a `required` where none belongs.
TODO = {
    "openapi": "3.0.1",
    "info": {"title": "TODO Plugin", "description": "Creates and manages a TODO list.", "version": "v1"},
    "servers": [{"url": "http://localhost:5003"}],
    "paths": {
        "/todos/{username}": {
            "get": {
                "operationId": "getTodos",
                "summary": "Get the list of todos",
                "parameters": [
                    {
                        "in": "path",
                        "name": "username",
                        "schema": {"type": "string"},
                        "required": True,
                        "description": "The name of the user.",
                    }
                ],
                "responses": {"200": {"description": "OK"}},
            },
            "post": {
                "operationId": "addTodo",
                "summary": "Add a todo to the list",
                "parameters": [{"in": "path", "name": "username", "schema": {"type": "string"}, "required": True}],
                "requestBody": {
                    "required": True,
                    "content": {JSON: {"schema": {"$ref": "#/components/schemas/addTodoRequest"}}},
                },
                "responses": {"200": {"description": "OK"}},
            },
        }
    },
    "components": {
        "schemas": {
            "addTodoRequest": {
                "type": "object",
                "required": ["todo"],
                "properties": {"todo": {"type": "string", "description": "The todo to add.", "required": True}},
            }
        }
    },
}


def document_of(operation, path="/items", method="get", **members):
    """A document with that one operation, whose id is `it`."""
    one = {
        "openapi": "3.1.0",
        "servers": [{"url": SERVER}],
        "paths": {path: {method: {"operationId": "it", **operation}}},
    }
    return {**one, **members}


def swagger_of(operation, path="/items", method="get", **members):
    one = {"swagger": "2.0", "host": "api.example.com", "basePath": "/v1"}
    return {**one, "paths": {path: {method: {"operationId": "it", **operation}}}, **members}


def body_of(schema, media_type=JSON, required=False, **media):
    return {"requestBody": {"required": required, "content": {media_type: {"schema": schema, **media}}}}


def parameter(place, schema=None, name="color", **members):
    return {"name": name, "in": place, "required": place == "path", "schema": schema or {}, **members}


def target_of(call):
    """What a request's URL has behind the server's."""
    assert call.url.startswith(SERVER + "/")
    return call.url[len(SERVER) :]


def call_with(one, value, path="/items", swagger=False, **options):
    """The request of an operation with that one parameter."""
    document = (swagger_of if swagger else document_of)({"parameters": [one]}, path)
    return OpenAPIDocument(document).call("it", {one["name"]: value}, **options)


def refusal(function, *args, **options):
    with pytest.raises(ValueError) as caught:
        function(*args, **options)
    assert type(caught.value) is ValueError, repr(caught.value)
    return str(caught.value)


# The demonstration --------------------------------------------------------------------------------------------------


def test_the_demonstration_of_modelscope_agent_registers_and_is_called():
    document = OpenAPIDocument(TODO)
    assert list(document.operations) == ["getTodos", "addTodo"]
    assert document.servers == ("http://localhost:5003",)
    assert document.call("getTodos", {"username": "ann"}) == HTTPCall("GET", "http://localhost:5003/todos/ann", (), b"")
    added = HTTPCall("POST", "http://localhost:5003/todos/ann", (("Content-Type", JSON),), b'{"todo":"tea"}')
    assert document.call("addTodo", {"username": "ann", "todo": "tea"}) == added
    assert document.call("addTodo", {"username": "ann"}, body={"todo": "tea"}) == added
    headers = {"Content-Type": JSON, "Authorization": ""}
    assert document.call("addTodo", {"username": "ann", "todo": "tea"}, headers=headers) == added
    url = "http://localhost:5003/todos/ann"
    assert document.call_of_url("POST", url, {}, headers, {}, {"todo": "tea"}) == added


def test_a_document_is_described_as_tools():
    get, add = describe(OpenAPIDocument(TODO))
    assert (get["name"], get["description"]) == ("getTodos", "Get the list of todos")
    assert get["parameters"] == {
        "type": "object",
        "properties": {"username": {"description": "The name of the user.", "type": "string"}},
        "required": ["username"],
        "additionalProperties": False,
    }
    assert add["parameters"]["properties"]["todo"] == {"type": "string", "description": "The todo to add."}
    assert add["parameters"]["required"] == ["username", "todo"]


def test_reading_and_calling_leave_the_document_and_the_arguments_as_they_were():
    document, arguments = copy.deepcopy(TODO), {"username": "ann", "todo": "tea"}
    OpenAPIDocument(document).call("addTodo", arguments)
    assert document == TODO
    assert arguments == {"username": "ann", "todo": "tea"}


# Serialisation ------------------------------------------------------------------------------------------------------

ARRAY, OBJECT = ["blue", "black", "brown"], {"R": 100, "G": 200, "B": 150}

# place, style, explode, value, what is written: OpenAPI 3.1.1's table of examples, row by row, and its defaults.
STYLES = [
    ("path", "matrix", False, "blue", "/;color=blue"),
    ("path", "matrix", False, ARRAY, "/;color=blue,black,brown"),
    ("path", "matrix", False, OBJECT, "/;color=R,100,G,200,B,150"),
    ("path", "matrix", True, "blue", "/;color=blue"),
    ("path", "matrix", True, ARRAY, "/;color=blue;color=black;color=brown"),
    ("path", "matrix", True, OBJECT, "/;R=100;G=200;B=150"),
    ("path", "label", False, "blue", "/.blue"),
    ("path", "label", False, ARRAY, "/.blue,black,brown"),
    ("path", "label", False, OBJECT, "/.R,100,G,200,B,150"),
    ("path", "label", True, "blue", "/.blue"),
    ("path", "label", True, ARRAY, "/.blue.black.brown"),
    ("path", "label", True, OBJECT, "/.R=100.G=200.B=150"),
    ("path", "simple", False, "blue", "/blue"),
    ("path", "simple", False, ARRAY, "/blue,black,brown"),
    ("path", "simple", False, OBJECT, "/R,100,G,200,B,150"),
    ("path", "simple", True, "blue", "/blue"),
    ("path", "simple", True, ARRAY, "/blue,black,brown"),
    ("path", "simple", True, OBJECT, "/R=100,G=200,B=150"),
    ("path", None, None, ARRAY, "/blue,black,brown"),
    ("path", None, None, OBJECT, "/R,100,G,200,B,150"),
    ("query", "form", False, "", "?color="),
    ("query", "form", False, "blue", "?color=blue"),
    ("query", "form", False, ARRAY, "?color=blue,black,brown"),
    ("query", "form", False, OBJECT, "?color=R,100,G,200,B,150"),
    ("query", "form", True, "", "?color="),
    ("query", "form", True, "blue", "?color=blue"),
    ("query", "form", True, ARRAY, "?color=blue&color=black&color=brown"),
    ("query", "form", True, OBJECT, "?R=100&G=200&B=150"),
    ("query", None, None, ARRAY, "?color=blue&color=black&color=brown"),
    ("query", None, None, OBJECT, "?R=100&G=200&B=150"),
    ("query", "spaceDelimited", False, ARRAY, "?color=blue%20black%20brown"),
    ("query", "spaceDelimited", None, OBJECT, "?color=R%20100%20G%20200%20B%20150"),
    ("query", "spaceDelimited", True, ARRAY, "?color=blue&color=black&color=brown"),
    ("query", "pipeDelimited", False, ARRAY, "?color=blue%7Cblack%7Cbrown"),
    ("query", "pipeDelimited", None, OBJECT, "?color=R%7C100%7CG%7C200%7CB%7C150"),
    ("query", "pipeDelimited", True, ARRAY, "?color=blue&color=black&color=brown"),
    ("query", "deepObject", True, OBJECT, "?color%5BR%5D=100&color%5BG%5D=200&color%5BB%5D=150"),
    ("query", "deepObject", None, OBJECT, "?color%5BR%5D=100&color%5BG%5D=200&color%5BB%5D=150"),
    ("query", "deepObject", True, {"a": {"b": 1}}, "?color%5Ba%5D%5Bb%5D=1"),
    ("query", "deepObject", True, {"a": [2, None, 3]}, "?color%5Ba%5D%5B0%5D=2&color%5Ba%5D%5B2%5D=3"),
    ("query", "deepObject", True, "blue", "?color=blue"),
    ("query", None, None, [], ""),
    ("query", "form", False, [], ""),
    ("query", None, None, True, "?color=true"),
    ("query", None, None, [False, 1, 1.5, -2e-7], "?color=false&color=1&color=1.5&color=-2e-07"),
    ("query", None, None, None, ""),
    ("query", None, None, ["a", None], "?color=a"),
    ("query", None, None, {"a": None, "b": 0}, "?b=0"),
    ("header", None, None, "blue", "color: blue"),
    ("header", None, None, "", "color: "),
    ("header", "simple", False, ARRAY, "color: blue,black,brown"),
    ("header", "simple", False, OBJECT, "color: R,100,G,200,B,150"),
    ("header", "simple", True, ARRAY, "color: blue,black,brown"),
    ("header", "simple", True, OBJECT, "color: R=100,G=200,B=150"),
    ("header", None, None, True, "color: true"),
    ("header", None, None, "Tue, 15 Nov 1994; \xe9", "color: Tue, 15 Nov 1994; \xe9"),
    ("cookie", None, None, "blue", "Cookie: color=blue"),
    ("cookie", "form", False, ARRAY, "Cookie: color=blue,black,brown"),
    ("cookie", "form", False, OBJECT, "Cookie: color=R,100,G,200,B,150"),
    ("cookie", "form", True, ARRAY, "Cookie: color=blue; color=black; color=brown"),
    ("cookie", "form", True, OBJECT, "Cookie: R=100; G=200; B=150"),
    ("cookie", None, None, "a;b=c d\r\n", "Cookie: color=a%3Bb%3Dc%20d%0D%0A"),
]  # fmt: skip


def written(call, prefix=""):
    fields = ["%s: %s" % field for field in call.headers]
    target = target_of(call)
    assert target.startswith(prefix)
    return [part for part in (target[len(prefix) :], *fields) if part] or [""]


@pytest.mark.parametrize("place, style, explode, value, expected", STYLES)
def test_a_value_is_written_as_openapi_says(place, style, explode, value, expected):
    how = {key: one for key, one in (("style", style), ("explode", explode)) if one is not None}
    call = call_with(parameter(place, **how), value, "/items/{color}" if place == "path" else "/items")
    assert written(call, "/items") == [expected]


@pytest.mark.parametrize(
    "place, how, expected",
    [
        ("query", None, "?color=blue,black,brown"),
        ("query", "csv", "?color=blue,black,brown"),
        ("query", "ssv", "?color=blue%20black%20brown"),
        ("query", "tsv", "?color=blue%09black%09brown"),
        ("query", "pipes", "?color=blue%7Cblack%7Cbrown"),
        ("query", "multi", "?color=blue&color=black&color=brown"),
        ("path", None, "/blue,black,brown"),
        ("path", "ssv", "/blue%20black%20brown"),
        ("path", "pipes", "/blue%7Cblack%7Cbrown"),
        ("header", "csv", "color: blue,black,brown"),
        ("header", "ssv", "color: blue black brown"),
        ("header", "pipes", "color: blue|black|brown"),
    ],
)
def test_an_array_is_written_as_swagger_says(place, how, expected):
    one = {"name": "color", "in": place, "required": place == "path", "type": "array", "items": {"type": "string"}}
    one.update({"collectionFormat": how} if how else {})
    call = call_with(one, ARRAY, "/items/{color}" if place == "path" else "/items", swagger=True)
    assert written(call, "/items") == [expected]


@pytest.mark.parametrize(
    "value, plain, reserved",
    [
        ("a b", "a%20b", "a%20b"),
        ("a+b", "a%2Bb", "a%2Bb"),
        ("a&b=c#d", "a%26b%3Dc%23d", "a%26b=c%23d"),
        ("http://h/p?q;r", "http%3A%2F%2Fh%2Fp%3Fq%3Br", "http://h/p?q%3Br"),
        ("50%", "50%25", "50%25"),
        ("%26", "%2526", "%26"),
        ("é\n", "%C3%A9%0A", "%C3%A9%0A"),
        ("-._~", "-._~", "-._~"),
        (["a,b", "c"], "a%2Cb,c", "a%2Cb,c"),
    ],
)
def test_no_value_leaves_its_place_in_a_query(value, plain, reserved):
    one = parameter("query", explode=False, name="q")
    assert target_of(call_with(one, value)) == "/items?q=" + plain
    assert target_of(call_with({**one, "allowReserved": True}, value)) == "/items?q=" + reserved


@pytest.mark.parametrize(
    "name, expected", [("a b", "a%20b"), ("x[]", "x%5B%5D"), ("a&b=", "a%26b%3D"), ("é", "%C3%A9")]
)
def test_a_name_is_percent_encoded_too(name, expected):
    assert target_of(call_with(parameter("query", name=name), "1")) == "/items?%s=1" % expected


@pytest.mark.parametrize(
    "value, segment",
    [
        ("../x", "..%2Fx"),
        ("a/b", "a%2Fb"),
        ("a\\b", "a%5Cb"),
        ("?x", "%3Fx"),
        ("#", "%23"),
        ("%2e%2e", "%252e%252e"),
        ("%2F", "%252F"),
        ("..;", "..%3B"),
        ("...", "..."),
        (" ", "%20"),
        ("\r\n\0", "%0D%0A%00"),
        ("{color}", "%7Bcolor%7D"),
        ("中", "%E4%B8%AD"),
        (["", "a"], ",a"),
        (False, "false"),
        (0, "0"),
    ],
)
def test_no_value_leaves_its_segment_of_a_path(value, segment):
    call = call_with(parameter("path"), value, "/items/{color}/end")
    assert target_of(call) == "/items/%s/end" % segment


@pytest.mark.parametrize(
    "path, style, value, why",
    [
        ("/a/{color}", "simple", "", "color: must not be empty"),
        ("/a/{color}", "simple", [], "color: must not be empty"),
        ("/a/{color}", "simple", {}, "color: must not be empty"),
        ("/a/{color}", "simple", [""], "color: must not be empty"),
        ("/a/{color}", "simple", None, "color: must not be empty"),
        ("/a/x{color}", "simple", "", "color: must not be empty"),
        ("/a/{color}", "label", "", "color: must not be empty"),
        ("/a/{color}", "matrix", "", "color: must not be empty"),
        ("/a/{color}", "simple", ".", "color: would make another path"),
        ("/a/{color}/b", "simple", "..", "color: would make another path"),
        ("/a/.{color}", "simple", ".", "color: would make another path"),
        ("/a/{color}.", "simple", ".", "color: would make another path"),
        ("/a/{color}", "label", ".", "color: would make another path"),
        ("/a/{color}", "simple", [["a"]], "color: has an array in a place for"),
        ("/a/{color}", "simple", {"a": {}}, "color: has an object in a place for"),
        ("/a/{color}", "simple", "\ud800", "color: holds a lone surrogate"),
    ],
)
def test_a_value_that_would_make_another_path_is_refused(path, style, value, why):
    assert refusal(call_with, parameter("path", style=style), value, path).startswith(why)


@pytest.mark.parametrize(
    "one, value, why",
    [
        (parameter("header"), "a\r\nb: c", "color: has a character that no header can have"),
        (parameter("header"), "a\n", "color: has a character"),
        (parameter("header"), "\0", "color: has a character"),
        (parameter("header"), "中", "color: has a character"),
        (parameter("header"), ["a,b"], "color: has a part with ',' in it"),
        (parameter("query"), [["a"]], "color: has an array"),
        (parameter("query", style="deepObject"), {"a][b": 1}, "color: has a member with a bracket"),
        (parameter("query", name="q"), "\udfff", "q: holds a lone surrogate"),
        (parameter("header"), {"a": "b,c"}, "color: has a part with ',' in it"),
    ],
)
def test_a_value_that_cannot_be_written_is_refused_with_its_argument(one, value, why):
    assert refusal(call_with, one, value).startswith(why)


def test_no_member_of_a_value_is_written_as_another_parameter():
    for place in ("query", "cookie"):
        document = OpenAPIDocument(
            document_of({"parameters": [parameter(place), parameter(place, {"maximum": 5}, "limit")]})
        )
        message = "color: has a member that is named as another parameter is"
        assert refusal(document.call, "it", {"color": {"a": 1, "limit": 9}}) == message
        assert document.call("it", {"color": {"a": 1, "color": 2}, "limit": 5})


def test_a_parameter_with_content_is_written_as_json():
    content = {JSON: {"schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
    for place, expected in [
        ("query", "?f=%7B%22a%22%3A1%7D"),
        ("header", 'f: {"a":1}'),
        ("cookie", "Cookie: f=%7B%22a%22%3A1%7D"),
    ]:
        one = {"name": "f", "in": place, "content": content}
        assert written(call_with(one, {"a": 1}), "/items") == [expected]
    assert refusal(call_with, one, {"a": "x"}).startswith("argument f.a must be an integer")
    for content in ({"application/xml": {}}, {JSON: {}, "text/plain": {}}):
        one = {"name": "f", "in": "query", "content": content}
        assert refusal(call_with, one, 1).startswith("#/paths/~1items/get/parameters/0/content: ")


# Arguments ----------------------------------------------------------------------------------------------------------

PET = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string"},
        "id": {"type": "integer"},
        "kind": {"enum": ["cat", "dog"]},
        "owner": {"$ref": "#/components/schemas/Owner"},
    },
}
OWNER = {"type": "object", "properties": {"pets": {"type": "array", "items": {"$ref": "#/components/schemas/Pet"}}}}
PETS = {
    **document_of(
        {
            "parameters": [
                parameter("path", {"type": "integer"}, "id"),
                parameter("query", {"type": "boolean"}, "loud"),
                parameter("query", {"type": "array", "items": {"type": "number"}}, "sizes"),
                parameter("header", {"type": "integer"}, "X-Count"),
                parameter("cookie", {"type": "string"}, "session"),
            ],
            **body_of({"$ref": "#/components/schemas/Pet"}, required=True),
        },
        "/pets/{id}",
        "put",
    ),
    "components": {"schemas": {"Pet": PET, "Owner": OWNER}},
}


def put_pet(arguments, **options):
    return OpenAPIDocument(PETS).call("it", arguments, **options)


def test_parameters_and_members_of_the_body_are_told_apart_by_name():
    call = put_pet(
        {"id": 7, "name": "Tom", "kind": "cat", "loud": True, "sizes": [1, 2.5], "X-Count": 3, "session": "s"}
    )
    assert target_of(call) == "/pets/7?loud=true&sizes=1&sizes=2.5"
    assert call.headers == (("X-Count", "3"), ("Cookie", "session=s"), ("Content-Type", JSON))
    assert json.loads(call.body.decode()) == {"name": "Tom", "kind": "cat"}


def test_a_name_that_a_parameter_has_is_that_of_the_parameter():
    call = put_pet({"id": 7, "body.id": 8, "name": "Tom"})
    assert (target_of(call), json.loads(call.body.decode())) == ("/pets/7", {"id": 8, "name": "Tom"})
    same = [parameter(place, {"type": "string"}, "id") for place in ("cookie", "query", "path")]
    document = OpenAPIDocument(document_of({"parameters": same}, "/a/{id}"))
    call = document.call("it", {"id": "1", "query.id": "2", "cookie.id": "3"})
    assert (target_of(call), call.headers) == ("/a/1?id=2", (("Cookie", "id=3"),))


@pytest.mark.parametrize("text, count", [("7", "7"), ("-0", "0"), ("12345678901234567890", "12345678901234567890")])
def test_a_text_that_reads_as_a_number_will_do_for_a_parameter(text, count):
    call = put_pet({"id": text, "name": "Tom", "sizes": ["1", "2.5"], "loud": "false", "X-Count": text})
    assert target_of(call) == "/pets/%s?loud=false&sizes=1&sizes=2.5" % count
    assert call.headers[0] == ("X-Count", count)


def test_a_text_stays_one_where_texts_are_wanted():
    number = {"type": "number"}
    for schema in [TEXT, {"type": ["number", "string"]}, {"anyOf": [number, TEXT]}, {}]:
        assert target_of(call_with(parameter("query", schema), "1.50")) == "/items?color=1.50"
    for schema in [number, {"anyOf": [number, {"type": "null"}]}]:
        assert target_of(call_with(parameter("query", schema), "1.50")) == "/items?color=1.5"


@pytest.mark.parametrize("text, flag", [("true", "true"), ("True", "true"), ("false", "false"), ("False", "false")])
def test_a_text_that_reads_as_a_boolean_will_do_for_a_parameter(text, flag):
    assert target_of(call_with(parameter("query", {"type": "boolean"}), text)) == "/items?color=" + flag


@pytest.mark.parametrize(
    "change, named",
    [
        ({"id": None}, "id"),
        ({"id": "x"}, "id"),
        ({"id": "1.5"}, "id"),
        ({"id": "0x7"}, "id"),
        ({"id": " 7"}, "id"),
        ({"id": True}, "id"),
        ({"loud": "yes"}, "loud"),
        ({"loud": 1}, "loud"),
        ({"sizes": 1}, "sizes"),
        ({"sizes": [1, "x"]}, r"sizes\[1\]"),
        ({"session": 5}, "session"),
        ({"name": 5}, "name"),
        ({"kind": "cow"}, "kind"),
        ({"body.id": "8"}, "body.id"),
        ({"nmae": "x"}, "nmae"),
        ({"owner": {"pets": [{}]}}, r"owner.pets\[0\].name"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change, named):
    message = refusal(put_pet, {"id": 7, "name": "Tom", **change})
    assert re.search(r"[ `\[\"]%s" % named, message), message


@pytest.mark.parametrize("missing", ["id", "name"])
def test_an_argument_that_is_missing_is_named(missing):
    arguments = {"id": 7, "name": "Tom"}
    del arguments[missing]
    assert "argument %s is missing" % missing in refusal(put_pet, arguments)


def test_a_body_as_a_whole_leaves_no_other_members_among_the_arguments():
    assert json.loads(put_pet({"id": 7}, body={"name": "Tom"}).body.decode()) == {"name": "Tom"}
    assert "name" in refusal(put_pet, {"id": 7, "name": "Tom"}, body={"name": "Tom"})
    assert "body.name" in refusal(put_pet, {"id": 7}, body={})
    assert "body" in refusal(put_pet, {"id": 7}, body=[1])
    assert refusal(put_pet, {"id": 7, "body": {}}, body={"name": "Tom"}) == "body: is given twice"


def test_an_operation_that_is_not_there_is_refused_with_the_nearest():
    assert refusal(OpenAPIDocument(TODO).call, "getTodo", {}) == "no operation 'getTodo'; did you mean 'getTodos'?"
    for what in (None, 5, ["it"], {}):
        assert refusal(OpenAPIDocument(TODO).call, what, {}).startswith("no operation")


@pytest.mark.parametrize("arguments", [5, "x", [1]])
def test_arguments_must_be_an_object(arguments):
    assert refusal(OpenAPIDocument(TODO).call, "getTodos", arguments).startswith("arguments: must be an object")


# Bodies -------------------------------------------------------------------------------------------------------------

BODIES = [
    # media type, schema, arguments, body, Content-Type, bytes
    (JSON, {"type": "array", "items": {"type": "integer"}}, {"body": [1, 2]}, None, JSON, b"[1,2]"),
    (JSON, {"type": "array"}, {}, [1], JSON, b"[1]"),
    (JSON, TEXT, {"body": "é"}, None, JSON, '"é"'.encode()),
    (JSON, {}, {}, False, JSON, b"false"),
    (JSON, {}, {"body": {"a": 1}}, None, JSON, b'{"a":1}'),
    (JSON, ANY, {"a": 1, "b": {}}, None, JSON, b'{"a":1,"b":{}}'),
    (JSON, {**ANY, "additionalProperties": {"type": "integer"}}, {"a": 1}, None, JSON, b'{"a":1}'),
    (JSON, {"properties": {"a": {}}, "additionalProperties": True}, {"b": 1}, None, JSON, b'{"b":1}'),
    (JSON, {"allOf": [HAS_A, {"properties": {"b": {}}}]}, {"a": 1, "b": 2}, None, JSON, b'{"a":1,"b":2}'),
    (JSON, {"oneOf": [HAS_A, {"properties": {"b": {}}}]}, {"b": 2}, None, JSON, b'{"b":2}'),
    (JSON, {"type": ["object", "null"], "properties": {"a": {}}}, {"a": 1}, None, JSON, b'{"a":1}'),
    (JSON, {"anyOf": [ANY, {"type": "null"}]}, {"a": 1}, None, JSON, b'{"a":1}'),
    (JSON, {"anyOf": [{"properties": {"a": {}}}, {"type": "array"}]}, {"body": {"a": 1}}, None, JSON, b'{"a":1}'),
    ("application/vnd.api+json", ANY, {"a": 1}, None, "application/vnd.api+json", b'{"a":1}'),
    ("application/json; charset=utf-8", ANY, {"a": 1}, None, "application/json; charset=utf-8", b'{"a":1}'),
    ("*/*", ANY, {"a": 1}, None, JSON, b'{"a":1}'),
    (FORM, ANY, {"a": "x y&z=é", "b": [1, "c"], "d": True}, None, FORM, b"a=x%20y%26z%3D%C3%A9&b=1&b=c&d=true"),
    (FORM, ANY, {"a": {"b": 1}, "c": [{"d": 2}]}, None, FORM, b"a=%7B%22b%22%3A1%7D&c=%7B%22d%22%3A2%7D"),
    (FORM, ANY, {}, {"a": 1}, FORM, b"a=1"),
    ("text/plain", TEXT, {"body": "a\r\nb"}, None, "text/plain; charset=utf-8", b"a\r\nb"),
    ("text/plain", {"type": "integer"}, {}, 5, "text/plain; charset=utf-8", b"5"),
]  # fmt: skip


@pytest.mark.parametrize("media_type, schema, arguments, body, content_type, data", BODIES)
def test_a_body_is_written_in_its_media_type(media_type, schema, arguments, body, content_type, data):
    document = OpenAPIDocument(document_of(body_of(schema, media_type, required=True), method="post"))
    call = document.call("it", arguments, body)
    assert (call.method, call.headers, call.body) == ("POST", (("Content-Type", content_type),), data)


def test_a_body_that_need_not_be_is_not_sent_where_nothing_of_it_is_given():
    optional = OpenAPIDocument(document_of(body_of(PET), method="post", components=PETS["components"]))
    assert optional.call("it", {}) == HTTPCall("POST", SERVER + "/items", (), b"")
    assert "body.name" in refusal(optional.call, "it", {"id": 5})
    needed = OpenAPIDocument(document_of(body_of(ANY, required=True), method="post"))
    assert needed.call("it", {}).body == b"{}"


def test_json_is_sent_where_an_operation_takes_it_and_a_form_before_a_text():
    content = {"text/plain": {}, "application/xml": {}, FORM: {}, JSON: {}}
    for sent in (JSON, FORM, "text/plain; charset=utf-8"):
        document = OpenAPIDocument(document_of({"requestBody": {"content": content}}, method="post"))
        body = {} if sent == FORM else "x"
        assert document.call("it", {}, body).headers == (("Content-Type", sent),)
        del content[sent.partition(";")[0]]


def test_members_of_a_form_are_written_as_their_encoding_says():
    encoding = {
        "a": {"style": "spaceDelimited", "explode": False},
        "b": {"style": "deepObject"},
        "c": {"contentType": JSON},
    }
    document = OpenAPIDocument(document_of(body_of(ANY, FORM, encoding=encoding), method="post"))
    call = document.call("it", {"a": [1, 2], "b": {"x": 1}, "c": {"y": 2}})
    assert call.body == b"a=1%202&b%5Bx%5D=1&c=%7B%22y%22%3A2%7D"


@pytest.mark.parametrize(
    "media_type", ["multipart/form-data", "application/xml", "text/xml", "application/octet-stream"]
)
def test_a_body_that_cannot_be_written_is_refused_when_it_is_called(media_type):
    document = OpenAPIDocument(document_of(body_of(ANY, media_type, required=True), method="post"))
    assert refusal(document.call, "it", {}) == "body: the operation takes %s, which is not sent" % media_type
    assert refusal(document.call, "it", {}, {"a": 1}).startswith("body: ")
    assert describe(document) == []
    optional = OpenAPIDocument(document_of(body_of(ANY, media_type), method="post"))
    assert optional.call("it", {}).body == b""


@pytest.mark.parametrize(
    "media_type, body",
    [("text/plain", "\ud800"), ("text/plain", [1]), (FORM, [1]), (FORM, {"a": [[1], {"b": "\ud800"}]})],
)
def test_a_body_that_does_not_fit_its_media_type_is_refused(media_type, body):
    document = OpenAPIDocument(document_of(body_of({}, media_type), method="post"))
    if media_type == FORM and isinstance(body, dict):  # in JSON it is an escape
        assert document.call("it", {}, body).body == b"a=%5B1%5D&a=%7B%22b%22%3A%22%5Cud800%22%7D"
    else:
        assert re.match("body: ", refusal(document.call, "it", {}, body))


def test_a_body_is_refused_where_there_is_none():
    document = OpenAPIDocument(document_of({}))
    assert refusal(document.call, "it", {}, {"a": 1}) == "body: the operation takes none, which is not sent"
    assert "a" in refusal(document.call, "it", {"a": 1})


@pytest.mark.parametrize("media_type", ["a", "a/b\r\nX: y", "", "a/b; c=\0", "/", "a b/c"])
def test_a_media_type_that_would_break_a_header_does_not_register(media_type):
    assert "is no media type" in refusal(OpenAPIDocument, document_of(body_of(ANY, media_type)))


def test_a_property_that_only_answers_have_is_not_needed():
    schema = {"required": ["id", "a"], "properties": {"id": {"type": "integer", "readOnly": True}, "a": {}}}
    assert OpenAPIDocument(document_of(body_of(schema, required=True))).call("it", {"a": 1}).body == b'{"a":1}'


def test_swagger_has_bodies_among_its_parameters():
    whole = {"name": "pet", "in": "body", "required": True, "schema": {"$ref": "#/definitions/Pet"}}
    pet = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    document = OpenAPIDocument(swagger_of({"parameters": [whole]}, method="post", definitions={"Pet": pet}))
    call = document.call("it", {"name": "Tom"})
    assert (call.url, call.headers, call.body) == (SERVER + "/items", (("Content-Type", JSON),), b'{"name":"Tom"}')
    assert document.call("it", {"name": "Tom"}, headers={"Content-Type": JSON}) == call


def test_swagger_has_forms_among_its_parameters():
    fields = [
        {"name": "a", "in": "formData", "type": "string", "required": True},
        {"name": "b", "in": "formData", "type": "array", "items": {"type": "integer"}},
    ]
    document = OpenAPIDocument(swagger_of({"parameters": fields}, method="post", consumes=[JSON]))
    call = document.call("it", {"a": "x y", "b": [1, 2]})
    assert (call.headers, call.body) == ((("Content-Type", FORM),), b"a=x%20y&b=1,2")
    assert "argument a is missing" in refusal(document.call, "it", {"b": [1]})
    assert "argument b[0] must be an integer" in refusal(document.call, "it", {"a": "x", "b": ["y"]})
    document = OpenAPIDocument(swagger_of({"parameters": [*fields, {"name": "f", "in": "formData", "type": "file"}]}))
    assert (
        refusal(document.call, "it", {"a": "x"}) == "body: the operation takes multipart/form-data, which is not sent"
    )
    document = OpenAPIDocument(swagger_of({"parameters": fields, "consumes": ["text/xml"]}))
    assert refusal(document.call, "it", {}) == "body: the operation takes text/xml, which is not sent"


# Headers and cookies ------------------------------------------------------------------------------------------------


def get_with(headers=None, cookies=None, operation=None):
    return OpenAPIDocument(document_of(operation or {})).call("it", {}, None, headers, cookies).headers


def test_other_headers_and_cookies_are_passed():
    headers = {"Authorization": "Bearer k", "X-A": "\xe9", "Cookie": "a=b; c=d", "X-Empty": "", "X-Null": None}
    passed = (("Authorization", "Bearer k"), ("X-A", "\xe9"), ("Cookie", "a=b; c=d; token=a/+=%"))
    assert get_with(headers, {"token": "a/+=%", "none": ""}) == passed


SENDERS = ["Host", "Content-Length", "content-length", "Transfer-Encoding", "Connection", "Keep-Alive", "TE", "Trailer"]
SENDERS += ["Upgrade", "Expect", "Proxy-Authorization", "Proxy-Connection", "Content-Encoding"]


@pytest.mark.parametrize("name", SENDERS)
def test_headers_that_are_the_senders_are_refused(name):
    assert refusal(get_with, {name: "x"}) == "headers: %s is set by what sends the request, or given twice" % name
    assert get_with({name: ""}) == ()


@pytest.mark.parametrize(
    "headers, cookies",
    [
        ({"X-A": "a\r\nX-B: c"}, {}),
        ({"X-A": "a\n"}, {}),
        ({"X-A": "a\rb"}, {}),
        ({"X-A": "a\0"}, {}),
        ({"X-A": "a\x7f"}, {}),
        ({"X-A": "a\x85"}, {}),
        ({"X-A": "中"}, {}),
        ({"X-A": 5}, {}),
        ({"X-A": ["a"]}, {}),
        ({"X-A\r\nX-B": "a"}, {}),
        ({"X-A:": "a"}, {}),
        ({"X A": "a"}, {}),
        ({"": "a"}, {}),
        ({"é": "a"}, {}),
        ({"X-A": "a", "x-a": "b"}, {}),
        ({"Content-Type": "a\r\nX-B: c"}, {}),
        ({}, {"a": "b; c=d"}),
        ({}, {"a": "b\r\nX: y"}),
        ({}, {"a": "b c"}),
        ({}, {"a": 'b"'}),
        ({}, {"a": "é"}),
        ({}, {"a": 5}),
        ({}, {"a=b": "c"}),
        ({}, {"a;": "c"}),
        ({}, {"": "c"}),
        ([], {}),
        ("X-A: a", {}),
        ({}, ["a"]),
    ],
)
def test_what_a_header_cannot_have_is_refused_without_showing_it(headers, cookies):
    if headers == []:
        headers = ["X-A"]
    message = refusal(get_with, headers, cookies)
    assert re.match("(headers|cookies|header|cookie): ", message)
    assert "c=d" not in message and "X-B: c" not in message


def test_a_header_parameter_may_stand_among_the_headers_in_any_case():
    operation = {"parameters": [parameter("header", {"type": "integer"}, "X-Count"), parameter("cookie", {}, "sid")]}
    document = OpenAPIDocument(document_of(operation))
    for arguments, headers, cookies in [
        ({"X-Count": 5, "sid": "a;b"}, {}, {}),
        ({}, {"x-count": "5"}, {"sid": "a;b"}),
    ]:
        assert document.call("it", arguments, None, headers, cookies).headers == (
            ("X-Count", "5"),
            ("Cookie", "sid=a%3Bb"),
        )
    assert "X-Count: is given twice" in refusal(document.call, "it", {"X-Count": 5}, None, {"x-count": "5"})
    assert "X-Count" in refusal(document.call, "it", {}, None, {"x-count": "five"})
    assert document.call("it", {}, None, {"X-Count": ""}, {"sid": ""}).headers == ()


def test_header_parameters_that_are_sent_otherwise_are_none():
    names = ["Accept", "content-type", "Authorization", "Host", "Content-Length", "Cookie", "Connection"]
    operation = {"parameters": [parameter("header", TEXT, name, required=True) for name in names]}
    assert get_with({"Authorization": "Bearer k"}, operation=operation) == (("Authorization", "Bearer k"),)
    document = OpenAPIDocument(swagger_of({"parameters": [{"name": "Accept", "in": "header", "type": "string"}]}))
    assert document.call("it", {"Accept": JSON}).headers == (("Accept", JSON),)


@pytest.mark.parametrize(
    "given, is_taken",
    [(JSON, True), ("Application/JSON; charset=utf-8", True), (FORM, True), ("text/xml", False), ("*/*", False)],
)
def test_a_content_type_must_be_one_of_the_operation(given, is_taken):
    document = OpenAPIDocument(
        document_of({"requestBody": {"content": {FORM: {}, JSON: {"schema": ANY}}}}, method="post")
    )
    if is_taken:
        assert document.call("it", {"a": 1}, headers={"content-type": given}).headers == (("Content-Type", JSON),)
    else:
        assert "Content-Type must be %s or %s" % (FORM, JSON) in refusal(
            document.call, "it", {"a": 1}, headers={"content-type": given}
        )
    assert get_with({"content-type": given}) == ()  # without a body it says nothing


# URLs ---------------------------------------------------------------------------------------------------------------

SHOP = {
    "openapi": "3.0.3",
    "servers": [
        {"url": "https://Shop.Example.com/api"},
        {"url": "http://localhost:8080"},
        {"url": "http://[::1]:80/x%20y/"},
    ],
    "paths": {
        path: {
            "get": {"operationId": path, "parameters": [parameter("path", {"type": "string"}, name) for name in names]}
        }
        for path, names in [
            ("/", []),
            ("/items", []),
            ("/items/", []),
            ("/items/{id}", ["id"]),
            ("/items/mine", []),
            ("/items/{id}/parts/{part}", ["id", "part"]),
            ("/{shelf}/mine", ["shelf"]),
            ("/{shelf}/{id}.json", ["shelf", "id"]),
            ("/maps/{lat},{lng}", ["lat", "lng"]),
            ("/caf\xe9/a b/{id}", ["id"]),
        ]
    },
}

URLS = [
    # URL, operation, URL of the request
    ("https://shop.example.com/api/items", "/items", None),
    ("https://shop.example.com/api/items/", "/items/", None),
    ("https://shop.example.com/api/", "/", None),
    ("HTTPS://SHOP.example.COM:443/api/items", "/items", "https://shop.example.com/api/items"),
    ("https://shop.example.com:0443/api/items", "/items", "https://shop.example.com/api/items"),
    ("http://localhost:8080/items/7", "/items/{id}", None),
    ("http://localhost:8080", "/", "http://localhost:8080/"),
    ("http://[::1]/x%20y/items", "/items", None),
    ("http://[::1]:80/x y/items", "/items", "http://[::1]/x%20y/items"),
    ("http://[::1]/x%20y//items", "/items", "http://[::1]/x%20y/items"),
    ("https://shop.example.com/api/items/mine", "/items/mine", None),
    ("https://shop.example.com/api/items/%6Dine", "/items/mine", "https://shop.example.com/api/items/mine"),
    ("https://shop.example.com/api/boxes/mine", "/{shelf}/mine", None),
    ("https://shop.example.com/api/items/Mine", "/items/{id}", None),
    ("https://shop.example.com/api/items/x.json", "/items/{id}", None),
    ("https://shop.example.com/api/boxes/x.json", "/{shelf}/{id}.json", None),
    ("https://shop.example.com/api/items/7/parts/a%26b", "/items/{id}/parts/{part}", None),
    ("https://shop.example.com/api/maps/-1.5,2", "/maps/{lat},{lng}", None),
    ("https://shop.example.com/api/items/Ann Lee", "/items/{id}", "https://shop.example.com/api/items/Ann%20Lee"),
    ("https://shop.example.com/api/items/\u4e2d", "/items/{id}", "https://shop.example.com/api/items/%E4%B8%AD"),
    ("https://shop.example.com/api/items/%e4%b8%ad", "/items/{id}", "https://shop.example.com/api/items/%E4%B8%AD"),
    ("https://shop.example.com/api/items/a+b;c=1", "/items/{id}", "https://shop.example.com/api/items/a%2Bb%3Bc%3D1"),
    ("https://shop.example.com/api/items/%252e%252e", "/items/{id}", None),
    ("https://shop.example.com/api/items/..;", "/items/{id}", "https://shop.example.com/api/items/..%3B"),
    ("https://shop.example.com/api/items/{id}", "/items/{id}", "https://shop.example.com/api/items/%7Bid%7D"),
    ("https://shop.example.com/api/caf\xe9/a b/1", "/caf\xe9/a b/{id}", "https://shop.example.com/api/caf%C3%A9/a%20b/1"),
    ("https://shop.example.com/api/caf%c3%a9/a%20b/1", "/caf\xe9/a b/{id}", "https://shop.example.com/api/caf%C3%A9/a%20b/1"),
]  # fmt: skip


@pytest.fixture(scope="module")
def shop():
    return OpenAPIDocument(SHOP)


def call_url(document, url, method="GET", query=None, headers=None, cookies=None, body=None):
    return document.call_of_url(method, url, query, headers, cookies, {} if body is None else body)


@pytest.mark.parametrize("url, operation, sent", URLS)
def test_a_url_is_that_of_the_operation_it_fits(shop, url, operation, sent, monkeypatch):
    found = []
    request = rock_sdk._request
    monkeypatch.setattr(rock_sdk, "_request", lambda one, *args: found.append(one.id) or request(one, *args))
    assert call_url(shop, url).url == (sent or url)
    assert found == [operation]


@pytest.mark.parametrize(
    "url",
    [
        "https://shop.example.com/items",
        "https://shop.example.com/apiary/items",
        "https://shop.example.com/API/items",
        "https://shop.example.com",
        "http://shop.example.com/api/items",
        "http://shop.example.com:443/api/items",
        "https://shop.example.com:8443/api/items",
        "https://shop.example.com.evil.com/api/items",
        "https://shop.example.com./api/items",
        "https://evil.com/https://shop.example.com/api/items",
        "https://evil.com/api/items",
        "http://localhost/items",
        "http://localhost:80801/items".replace("80801", "8081"),
        "http://127.0.0.1:8080/items",
        "http://[::2]/x%20y/items",
        "http://[::1]/x/items",
        "https://shop.example.com/api//items",
        "https://shop.example.com/api/items//",
        "https://shop.example.com/api/items/7/parts",
        "https://shop.example.com/api/items/7/parts/",
        "https://shop.example.com/api/Items",
        "https://shop.example.com/api/items/7/",
        "https://shop.example.com/api/maps/1",
        "https://shop.example.com/api/maps/1,",
        "https://shop.example.com/api/boxes/.json",
        "https://shop.example.com/api%3Fitems",
    ],
)
def test_a_url_of_another_server_or_path_is_none_of_the_document(shop, url):
    assert call_url(shop, url) is None


@pytest.mark.parametrize(
    "url",
    [
        "",
        None,
        5,
        ["https://shop.example.com/api/items"],
        "/api/items",
        "//shop.example.com/api/items",
        "ftp://shop.example.com/api/items",
        "file:///etc/passwd",
        "http\u017f://shop.example.com/api/items",
        " https://shop.example.com/api/items",
        "https:/shop.example.com/api/items",
        "https:///api/items",
        "https://user@shop.example.com/api/items",
        "https://user:word@shop.example.com/api/items",
        "https://shop.example.com@evil.com/api/items",
        "https://shop.example.com\\@evil.com/api/items",
        "https://shop.example.com\\evil/api/items",
        "https://shop.example.com:/api/items",
        "https://shop.example.com:0/api/items",
        "https://shop.example.com:65536/api/items",
        "https://shop.example.com:443x/api/items",
        "https://shop.example.com:\u0664\u0664\u0663/api/items",
        "https://sh\u00f6p.example.com/api/items",
        "https://shop.example.com%2Fapi/items",
        "https://shop.example.com /api/items",
        "https://shop.example.com/api/items#x",
        "https://shop.example.com/api/../api/items",
        "https://shop.example.com/api/./items",
        "https://shop.example.com/api/items/..",
        "https://shop.example.com/api/items/%2e%2E",
        "https://shop.example.com/api/items/.%2e/items",
        "https://shop.example.com/api/%2e/items",
        "https://shop.example.com/api%2Fitems",
        "https://shop.example.com/api/items/a%2fb",
        "https://shop.example.com/api/items/a%5Cb",
        "https://shop.example.com/api\\items",
        "https://shop.example.com/api/items/a%",
        "https://shop.example.com/api/items/a%2",
        "https://shop.example.com/api/items/%zz",
        "https://shop.example.com/api/items/%ff",
        "https://shop.example.com/api/items/%c0%af",
        "https://shop.example.com/api/items/%00",
        "https://shop.example.com/api/items/%0d%0a",
        "https://shop.example.com/api/items/a\r\nHost: evil",
        "https://shop.example.com/api/items\n",
        "https://shop.example.com/api/items/\ud800",
    ],
)
def test_a_url_that_may_be_read_in_two_ways_is_refused(shop, url):
    assert refusal(call_url, shop, url)


@pytest.mark.parametrize(
    "method, is_found", [("get", True), ("Get", True), ("POST", False), ("", False), (None, False)]
)
def test_a_url_is_that_of_an_operation_with_its_method_alone(shop, method, is_found):
    assert (call_url(shop, "http://localhost:8080/items", method) is not None) == is_found


SEARCH = document_of(
    {
        "parameters": [
            parameter("path", {"type": "integer"}, "shop"),
            parameter("query", {"type": "string"}, "q", required=True),
            parameter("query", {"type": "integer", "minimum": 1}, "limit"),
            parameter("query", {"type": "array", "items": {"type": "integer"}}, "ids"),
            parameter("query", {"type": "array", "items": TEXT}, "tags", style="pipeDelimited"),
            {"name": "filter", "in": "query", "content": {JSON: {"schema": {"type": "object"}}}},
            parameter("header", TEXT, "X-A"),
            parameter("cookie", TEXT, "sid"),
        ],
    },
    "/{shop}/search",
)


@pytest.mark.parametrize(
    "url, query, headers, cookies, expected",
    [
        ("", {"q": "x"}, {}, {}, ["?q=x"]),
        ("?q=x", {}, {}, {}, ["?q=x"]),
        ("?q=a+b%26c", {}, {}, {}, ["?q=a%20b%26c"]),
        ("?q=", {}, {}, {}, ["?q="]),
        ("?q", {}, {}, {}, ["?q="]),
        ("?&q=x&", {}, {}, {}, ["?q=x"]),
        ("?limit=5", {"q": "x"}, {}, {}, ["?q=x&limit=5"]),
        ("?limit=&ids=&tags=&filter=", {"q": ""}, {}, {}, ["?q="]),
        ("?ids=1&ids=2", {"q": "x"}, {}, {}, ["?q=x&ids=1&ids=2"]),
        ("?tags=a|b%7Cc", {"q": "x"}, {}, {}, ["?q=x&tags=a%7Cb%7Cc"]),
        ("?filter=%7B%22a%22%3A1%7D", {"q": "x"}, {}, {}, ["?q=x&filter=%7B%22a%22%3A1%7D"]),
        ("", {"q": "x", "limit": "", "ids": "", "filter": ""}, {"X-A": ""}, {"sid": ""}, ["?q=x"]),
        ("", {"q": "x", "limit": 5, "ids": [1, 2]}, {}, {}, ["?q=x&limit=5&ids=1&ids=2"]),
        ("", {"q": "x"}, {"x-a": "b"}, {"sid": "s"}, ["?q=x", "X-A: b", "Cookie: sid=s"]),
    ],
)  # fmt: skip
def test_parameters_of_a_url_and_beside_it_are_taken(url, query, headers, cookies, expected):
    call = call_url(OpenAPIDocument(SEARCH), SERVER + "/7/search" + url, "GET", query, headers, cookies)
    assert written(call, "/7/search") == expected


@pytest.mark.parametrize(
    "url, query, named",
    [
        ("/x/search?q=x", {}, "shop"),
        ("/7/search", {}, "q"),
        ("/7/search?q=x&q=y", {}, "q"),
        ("/7/search?q=x", {"q": "x"}, "q"),
        ("/7/search?q=x&limit=0", {}, "limit"),
        ("/7/search?q=x&limit=x", {}, "limit"),
        ("/7/search?q=x&ids=1,2", {}, "ids"),
        ("/7/search?q=x&filter=%7B", {}, "filter"),
        ("/7/search?q=x&filter=5", {}, "filter"),
        ("/7/search?q=x&shop=8", {}, "shop"),
        ("/7/search?q=x&session=1", {}, "session"),
        ("/7/search?q=x", {"shop": 8}, "shop"),
        ("/7/search?q=x", {"limt": 8}, "limt"),
        ("/7/search?q=%ff", {}, "url"),
        ("/7/search", "q=x", "query"),
    ],
)
def test_a_parameter_of_a_url_that_does_not_fit_is_named(url, query, named):
    message = refusal(call_url, OpenAPIDocument(SEARCH), SERVER + url, "GET", query)
    assert re.search(r"(argument |\A)%s\b" % named, message), message


PROMPT = {"prompt": "p"}


@pytest.mark.parametrize(
    "style, schema, segment",
    [("label", TEXT, ".a.b"), ("matrix", {"type": "integer"}, ";id=5"), ("simple", {"type": "array"}, "a,b")],
)
def test_a_segment_of_a_url_is_read_in_the_style_of_its_parameter(style, schema, segment):
    document = OpenAPIDocument(document_of({"parameters": [parameter("path", schema, "id", style=style)]}, "/a/{id}"))
    assert call_url(document, SERVER + "/a/" + segment).url == SERVER + "/a/" + segment


NESTED = {
    "type": "object",
    "required": ["model", "input"],
    "properties": {
        "model": TEXT,
        "note": TEXT,
        "input": {"type": "object", "properties": {"prompt": TEXT, "size": {"properties": {"w": {"type": "integer"}}}}},
        "a.b": TEXT,
    },
}


@pytest.mark.parametrize(
    "body, sent",
    [
        ({"model": "m", "input": {}}, {"model": "m", "input": {}}),
        ({"model": "", "note": "", "input": {}}, {"model": "", "input": {}}),
        ({"model": "m", "input.prompt": "p"}, {"model": "m", "input": {"prompt": "p"}}),
        ({"model": "m", "input.prompt": "p", "input.size.w": 5}, {"model": "m", "input": {**PROMPT, "size": {"w": 5}}}),
        ({"model": "m", "input": PROMPT, "input.size.w": 5}, {"model": "m", "input": {**PROMPT, "size": {"w": 5}}}),
        ({"model": "m", "input": {}, "a.b": "c", "d.e": "f"}, {"model": "m", "input": {}, "a.b": "c", "d.e": "f"}),
    ],
)  # fmt: skip
def test_a_body_that_modelscope_agents_client_has_flattened_is_put_together(body, sent):
    document, given = OpenAPIDocument(document_of(body_of(NESTED, required=True), method="post")), copy.deepcopy(body)
    assert json.loads(call_url(document, SERVER + "/items", "POST", body=body).body.decode()) == sent
    assert body == given


@pytest.mark.parametrize(
    "body", [{"model": "m", "input": "", "input.prompt": 5}, {"model": "m", "input": 5, "input.prompt": ""}]
)
def test_a_flattened_body_is_checked(body):
    document = OpenAPIDocument(document_of(body_of(NESTED, required=True), method="post"))
    assert "input" in refusal(call_url, document, SERVER + "/items", "POST", body=body)


def test_an_empty_body_of_that_client_is_none_where_none_is_needed():
    for operation in ({}, body_of(PET), body_of(ANY, "multipart/form-data")):
        document = OpenAPIDocument(document_of(operation, method="post", components=PETS["components"]))
        call = call_url(
            document,
            SERVER + "/items",
            "POST",
            headers={"Content-Type": "" if "requestBody" in operation else JSON},
            body={},
        )
        assert (call.headers, call.body) == ((), b"")
    assert refusal(call_url, OpenAPIDocument(document_of({})), SERVER + "/items", body={"a": 1}).startswith("body: ")


# Servers and paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "servers, urls",
    [
        ([{"url": "https://h"}], ["https://h"]),
        ([{"url": "HTTP://H:80/A"}, {"url": "https://h:8443/"}], ["http://h/A", "https://h:8443/"]),
        ([{"url": "https://h/a b/%7e"}], ["https://h/a%20b/~"]),
        ([{"url": "{s}://a:{p}/v", "variables": {"s": {"default": "http"}, "p": {"default": "81"}}}], ["http://a:81/v"]),
    ],
)  # fmt: skip
def test_servers_are_in_normal_form_with_their_variables_filled_in(servers, urls):
    assert OpenAPIDocument(document_of({}, servers=servers)).servers == tuple(urls)


def test_a_path_follows_a_server_with_one_slash():
    for url in ("https://h/v1", "https://h/v1/"):
        document = OpenAPIDocument(document_of({}, servers=[{"url": url}]))
        assert document.call("it", {}).url == "https://h/v1/items"


def test_servers_of_an_operation_go_before_those_of_its_path_and_these_before_the_documents():
    document = document_of({})
    item = document["paths"]["/items"]
    item.update(post={"operationId": "other"}, servers=[{"url": "https://path"}])
    item["get"]["servers"] = [{"url": "https://operation"}, {"url": "https://second"}]
    document["paths"]["/plain"] = {"get": {"operationId": "plain"}}
    document = OpenAPIDocument(document)
    urls = [document.call(name, {}).url for name in ("it", "other", "plain")]
    assert urls == ["https://operation/items", "https://path/items", SERVER + "/plain"]
    assert document.servers == (SERVER, "https://operation", "https://second", "https://path")
    assert call_url(document, "https://second/items").url == "https://second/items"
    assert call_url(document, SERVER + "/items") is None
    assert call_url(document, "https://operation/items", "POST") is None


@pytest.mark.parametrize(
    "url, place",
    [
        ("/v1", "#/servers/0"),
        ("", "#/servers/0"),
        ("//h/v1", "#/servers/0"),
        ("h/v1", "#/servers/0"),
        ("ftp://h", "#/servers/0"),
        ("https://user@h", "#/servers/0"),
        ("https://h#x", "#/servers/0"),
        ("https://h?a=b", "#/servers/0"),
        ("https://h/../x", "#/servers/0"),
        ("https://h/}", "#/servers/0"),
        ("https://h/{", "#/servers/0"),
        ("https://{h}", "#/servers/0"),
        ("https://h\r\n", "#/servers/0"),
        (None, "#/servers/0"),
        (5, "#/servers/0/url"),
    ],
)
def test_a_server_that_is_no_absolute_url_does_not_register(url, place):
    message = refusal(OpenAPIDocument, document_of({}, servers=[{"url": url}]))
    assert message.startswith(place + ": ")
    if url == "/v1":
        assert "a server needs an absolute http(s) URL, got '/v1'" in message


@pytest.mark.parametrize("members", [{"servers": []}, {"servers": None}, {"servers": [], "paths": {}}])
def test_a_document_without_servers_does_not_register(members):
    assert "has no servers: the absolute http(s) URL of one is needed" in refusal(
        OpenAPIDocument, document_of({}, **members)
    )


@pytest.mark.parametrize(
    "members, servers",
    [
        ({}, ("https://api.example.com/v1",)),
        ({"schemes": ["http"]}, ("http://api.example.com/v1",)),
        ({"schemes": ["http", "wss", "https"]}, ("https://api.example.com/v1", "http://api.example.com/v1")),
        ({"basePath": None, "host": "H:8080"}, ("https://h:8080",)),
        ({"schemes": ["ws"]}, None),
        ({"host": None}, None),
        ({"host": "user@h"}, None),
        ({"basePath": "?x"}, None),
    ],
)
def test_swaggers_servers_are_put_together(members, servers):
    document = swagger_of({}, **members)
    if servers:
        assert OpenAPIDocument(document).servers == servers
    else:
        assert "server" in refusal(OpenAPIDocument, document)


@pytest.mark.parametrize(
    "path",
    ["items", "", "/a?b", "/a#b", "/{", "/a{}", "/{a}{b}", "/{a}/{a}", "/../a", "/%2e", "/a%2Fb", "/\\b", "/\n", "/%"],
)  # fmt: skip
def test_a_path_that_may_be_read_in_two_ways_does_not_register(path):
    names = sorted(set(re.findall(r"\{(\w+)\}", path)))
    document = document_of({"parameters": [parameter("path", {}, name) for name in names]}, path)
    assert refusal(OpenAPIDocument, document).startswith("#/paths/" + path.replace("/", "~1"))


def test_operations_without_an_id_are_named_after_method_and_path():
    paths = ["/", "/todos/{username}", "/a/b", "/a_b", "/a-b", "/caf\xe9"]
    document = document_of({"operationId": "GET_a_b_2"})
    document["paths"].update({path: {"get": {"parameters": []}, "delete": {}} for path in paths})
    document["paths"]["/todos/{username}"]["parameters"] = [parameter("path", {}, "username")]
    names = "GET_ GET_todos_username GET_a_b GET_a_b_3 GET_a_b_4 GET_caf"
    found = OpenAPIDocument(document).operations
    assert [name for name in found if name.startswith("GET")] == ["GET_a_b_2", *names.split()]
    assert found["GET_a_b_4"].path == "/a-b"
    assert found["DELETE_todos_username"].method == "DELETE"


# References ---------------------------------------------------------------------------------------------------------


def test_references_are_followed_wherever_openapi_has_them():
    document = document_of({})
    document["paths"] = {"/a~b/{id}": {"$ref": "#/components/pathItems/one~01"}, "x-y": 5}
    tree = {"left": {"$ref": "#/components/schemas/Tree"}, "value": {"$ref": "#/x/0/type"}}
    ids = {"a/b c": {"$ref": "#/components/parameters/id"}, "id": parameter("path", {"$ref": "#/x/1"}, "id")}
    put = {"$ref": "#/nothing", "requestBody": {"$ref": "#/components/requestBodies/b"}}
    document["components"] = {
        "pathItems": {"one~1": {"parameters": [{"$ref": "#/components/parameters/a~1b%20c"}], "put": put}},
        "parameters": ids,
        "requestBodies": {"b": {"content": {JSON: {"schema": {"$ref": "#/components/schemas/Tree"}}}}},
        "schemas": {"Tree": {"type": "object", "properties": tree}},
    }
    document["x"] = [{"type": {"type": "integer"}}, {"$ref": "#/x/0/type"}]
    document = OpenAPIDocument(document)
    call = document.call("PUT_a_b_id", {"id": 5, "left": {"left": {"value": 1}}})
    assert (call.url, call.body) == (SERVER + "/a~b/5", b'{"left":{"left":{"value":1}}}')
    assert "left.left.value" in refusal(document.call, "PUT_a_b_id", {"id": 5, "left": {"left": {"value": "x"}}})
    assert "id" in refusal(document.call, "PUT_a_b_id", {"id": "x"})


def test_a_schema_that_is_described_has_all_that_it_refers_to():
    parameters = describe(OpenAPIDocument(PETS))[0]["parameters"]
    text = json.dumps(parameters)
    names = set(re.findall(r'"\$ref": "([^"]*)"', text))
    assert names == {"#/$defs/Pet", "#/$defs/Owner"}
    assert set(parameters["$defs"]) == {"Pet", "Owner"}


@pytest.mark.parametrize(
    "target, why",
    [
        ("#/components/x", "points at nothing"),
        ("#/paths/~1items/get/parameters/1", "points at nothing"),
        ("#/paths/~1items/get/parameters/-1", "points at nothing"),
        ("#/paths/~1items/get/operationId/x", "points at nothing"),
        ("#/", "points at nothing"),
        ("#", "must begin with #/"),
        ("", "must begin with #/"),
        ("Pet", "must begin with #/"),
        ("other.json#/Pet", "must begin with #/"),
        ("https://evil.com/#/Pet", "must begin with #/"),
        ("file:///etc/passwd", "must begin with #/"),
        (None, "must begin with #/"),
        (5, "must be a string"),
        ({}, "must be a string"),
    ],
)
def test_a_reference_that_leads_nowhere_or_elsewhere_does_not_register(target, why):
    for operation, place in [
        ({"parameters": [{"$ref": target}]}, "/parameters/0"),
        ({"parameters": [parameter("query", {"$ref": target})]}, "/parameters/0/schema"),
        ({"requestBody": {"$ref": target}}, "/requestBody"),
        (body_of({"items": {"$ref": target}}), "/requestBody/content/application~1json/schema/items"),
    ]:
        message = refusal(OpenAPIDocument, document_of(operation, method="get"))
        assert message.startswith("#/paths/~1items/get" + place) and why in message


def test_references_in_a_circle_do_not_register():
    circle = {"a": {"$ref": "#/x/b"}, "b": {"$ref": "#/x/a"}}
    for operation in ({"parameters": [{"$ref": "#/x/a"}]}, {"requestBody": {"$ref": "#/x/a"}}):
        assert "$ref leads back to itself" in refusal(OpenAPIDocument, document_of(operation, x=circle))
    document = document_of({}, x=circle)
    document["paths"]["/b"] = {"$ref": "#/x/a"}
    assert refusal(OpenAPIDocument, document) == "#/paths/~1b: $ref leads back to itself"
    for schema in ({"$ref": "#/x/a"}, {"not": {"$ref": "#/x/a"}}, {"allOf": [{"$ref": "#/x/c"}]}):
        document = document_of(body_of(schema), x={**circle, "c": {"anyOf": [{"$ref": "#/x/c"}]}})
        assert re.match("#/paths/~1items/get.*: (of its schemas|\\$ref leads back)", refusal(OpenAPIDocument, document))


# Documents that are no good -----------------------------------------------------------------------------------------


def at(place, value):
    """A document with one value replaced."""
    document = copy.deepcopy(SEARCH)
    *steps, last = place.split("|")
    into = document
    for step in steps:
        into = into[int(step) if isinstance(into, list) else step]
    into[int(last) if isinstance(into, list) else last] = value
    return document


GET = "paths|/{shop}/search|get"


@pytest.mark.parametrize(
    "place, value, where, why",
    [
        ("openapi", "2.0", "#", "is neither"),
        ("openapi", "3.10", "#", "is neither"),
        ("openapi", "4.0.0", "#", "is neither"),
        ("openapi", None, "#", "is neither"),
        ("openapi", 3.1, "#/openapi", "must be a string, got a number"),
        ("paths", None, "#", "has no paths"),
        ("paths", [], "#/paths", "must be an object, got an array"),
        ("paths|/{shop}/search", [], "~", "must be an object"),
        ("paths|/{shop}/search|parameters", {}, "~/parameters", "must be an array"),
        (GET, True, "~/get", "must be an object, got a boolean"),
        (GET + "|operationId", "", "~/get/operationId", "must be a name"),
        (GET + "|operationId", 5, "~/get/operationId", "must be a string"),
        (GET + "|description", [], "~/get/description", "must be a string"),
        (GET + "|servers", {}, "~/get/servers", "must be an array"),
        (GET + "|parameters|1", None, "~/get/parameters/1", "must be an object"),
        (GET + "|parameters|1|name", None, "~/get/parameters/1", "needs a name"),
        (GET + "|parameters|1|in", "body", "~/get/parameters/1", "`in` that is path or query"),
        (GET + "|parameters|1|in", "path", "~/get", "are not those of /{shop}/search"),
        (GET + "|parameters|0|in", "query", "~/get", "are not those of /{shop}/search"),
        (GET + "|parameters|1|required", "yes", "~/get/parameters/1/required", "must be a boolean"),
        (GET + "|parameters|1|style", "simple", "~/get/parameters/1/style", "must be form or"),
        (GET + "|parameters|1|explode", 1, "~/get/parameters/1/explode", "must be a boolean"),
        (GET + "|parameters|1|schema", 5, "~/get/parameters/1/schema", "must be an object"),
        (GET + "|parameters|1|schema|type", "text", "~/get", "of its schemas, parameters.properties.q"),
        (GET + "|parameters|1|schema|required", "x", "~/get/parameters/1/schema/required", "must be an array"),
        (GET + "|parameters|6|name", "X A", "~/get/parameters/6", "no name of a header"),
        (GET + "|parameters|6|name", "X\r\nA", "~/get/parameters/6", "no name of a header"),
        (GET + "|requestBody", [], "~/get/requestBody", "must be an object"),
        (GET + "|requestBody", {"content": {"text/plain": 5}}, "~/get/requestBody/content/text~1plain", "must be"),
        (GET + "|requestBody", {"required": 1}, "~/get/requestBody/required", "must be a boolean"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_document_is_named_with_its_place(place, value, where, why):
    message = refusal(OpenAPIDocument, at(place, value))
    assert message.startswith(where.replace("~", "#/paths/~1{shop}~1search", 1) + ": ") and why in message


@pytest.mark.parametrize(
    "document", [None, 5, "x", [], True, {}, {"swagger": "1.2"}, {"openapi": "3.0.0"}, {"swagger": "2.0"}]
)
def test_what_is_no_document_does_not_register(document):
    assert refusal(OpenAPIDocument, document).startswith("#: ")


def test_an_id_stands_for_one_operation_only():
    document = document_of({})
    document["paths"]["/other"] = {"get": {"operationId": "it"}}
    message = refusal(OpenAPIDocument, document)
    assert message == "#/paths/~1other/get/operationId: must be a name that no other operation has, got 'it'"


def nested(depth, key):
    value = {}
    for _ in range(depth):
        value = {key: value} if key else [value]
    return value


@pytest.mark.load
@pytest.mark.parametrize("depth", [200, 5000, 100_000])
@pytest.mark.parametrize("key", ["items", "properties", "x-deep", None])
def test_what_is_nested_too_deeply_does_not_register_and_is_not_sent(depth, key):
    too_deep = nested(depth, key)
    assert "#: is nested more than" in refusal(OpenAPIDocument, document_of(body_of(too_deep)))
    document = OpenAPIDocument(document_of(body_of(ANY), method="post"))
    assert "is nested more than" in refusal(document.call, "it", {"a": too_deep})
    assert "is nested more than" in refusal(document.call, "it", {}, {"a": too_deep})
    with_header = OpenAPIDocument(document_of({"parameters": [parameter("header"), parameter("query", name="q")]}))
    assert "is nested more than" in refusal(with_header.call, "it", {}, None, {"color": too_deep})
    assert "is nested more than" in refusal(call_url, with_header, SERVER + "/items", "GET", {"q": too_deep})
    dots = {"input" + ".a" * depth: 1}
    document = OpenAPIDocument(document_of(body_of(NESTED), method="post"))
    assert "is nested more than" in refusal(call_url, document, SERVER + "/items", "POST", body=dots)


def test_too_many_servers_do_not_register():
    assert OpenAPIDocument(document_of({}, servers=[{"url": SERVER}] * 100)).servers == (SERVER,)
    assert (
        refusal(OpenAPIDocument, document_of({}, servers=[{"url": SERVER}] * 101))
        == "#: has 101 servers; 100 are the most"
    )


def test_too_many_operations_do_not_register():
    document = document_of({})
    document["paths"] = {"/%d" % number: {"get": {}} for number in range(1000)}
    assert len(OpenAPIDocument(document).operations) == 1000
    document["paths"]["/more"] = {"get": {}}
    assert refusal(OpenAPIDocument, document) == "#: has 1001 operations; 1000 are the most"


@pytest.mark.parametrize("shared", ["servers", "parameters", "get"])
def test_what_references_make_too_large_to_be_read_does_not_register(shared, monkeypatch):
    monkeypatch.setattr(rock_sdk, "MAX_DOCUMENT_STEPS", 20_000)
    many = {"servers": [{"url": SERVER}], "parameters": [{"$ref": "#/x/p"}], "get": {}}
    many["servers" if shared == "servers" else "parameters"] *= 100
    if shared == "get":
        many["get"] = {"parameters": many["parameters"]}
    document = document_of({}, x={"item": many, "p": parameter("header", {}, "Host")})
    document["paths"] = {"/%d" % number: {"$ref": "#/x/item"} for number in range(900)}
    assert "is too large to be read" in refusal(OpenAPIDocument, document)


def test_schemas_that_grow_too_large_by_their_references_do_not_register():
    document = document_of({}, x={"type": "string", "description": "x" * 10_000})
    document["paths"] = {
        "/%d" % number: {"get": {"parameters": [parameter("query", {"$ref": "#/x"})]}} for number in range(900)
    }
    assert "characters" in refusal(OpenAPIDocument, document)
    document["x"]["description"] = "x"
    assert len(OpenAPIDocument(document).operations) == 900


# At random ----------------------------------------------------------------------------------------------------------

VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e400,
    10**30,
    "",
    "x",
    "\ud800",
    "\n",
    "#/",
    "#/paths",
    "https://h",
    [],
    {},
    [[]],
    [None],
]
VALUES += [
    {"$ref": "#/components/schemas/Pet"},
    {"$ref": "#/paths"},
    {"type": "array"},
    "object",
    "query",
    "form",
    {"x": {}},
]
VALUES += [["object"], ["name"], {"type": "integer"}, {"allOf": [{}]}, {"nullable": True}]

SWAGGER = swagger_of(
    {
        "consumes": [FORM],
        "parameters": [
            {"name": "id", "in": "path", "required": True, "type": "integer"},
            {"name": "q", "in": "query", "type": "array", "items": {"type": "string"}, "collectionFormat": "multi"},
            {"name": "f", "in": "formData", "type": "string", "enum": ["a", "b"]},
        ],
    },
    "/a/{id}",
    "post",
    schemes=["https"],
)


def places_of(value):
    """Every place of a value that something else can be put in: (what holds it, key)."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places_of(value[key])


def mutated(rng, document):
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 2, 3])):
        holder, key = rng.choice(list(places_of(document)))
        other, its_key = rng.choice(list(places_of(document)))
        choice = rng.randrange(4)
        if choice == 0 and len(holder) > 1:
            del holder[key]
        elif choice == 1:
            holder[key] = copy.deepcopy(other[its_key])
        elif choice == 2 and isinstance(holder, dict):
            holder[rng.choice(["", "/", "x", "$ref", "type", "schema", "get", "servers", "/{a}"])] = copy.deepcopy(
                rng.choice(VALUES)
            )
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
    return document


def tries(rng, document):
    """Calls of each operation, with arguments that fit and with some that do not."""
    for operation in document.operations.values():
        some = {
            name: rng.choice([*VALUES, 1, "1", ["a"], {"a": 1}]) for name in [*operation.schema["properties"], "y"][:6]
        }
        fitting = {one: rng.choice([1, "a"]) for one in operation.schema["required"]}
        yield document.call, (operation.id, some)
        yield document.call, (operation.id, fitting)
        yield (
            document.call,
            (operation.id, fitting, rng.choice(VALUES), {"X-A": rng.choice(VALUES)}, {"a": rng.choice(VALUES)}),
        )
        url = operation.servers[0] + re.sub(r"\{.*?\}", "1", operation.path)
        yield document.call_of_url, (operation.method, url, some, {}, {}, rng.choice(VALUES))
        yield document.call_of_url, (operation.method, url, {}, rng.choice(VALUES), {}, fitting)


@pytest.mark.parametrize(
    "document", [TODO, PETS, SEARCH, SHOP, SWAGGER], ids=["todo", "pets", "search", "shop", "swagger"]
)
def test_whatever_stands_in_a_document_nothing_but_a_value_error_comes(document):
    rng = random.Random(20)
    read = refused = called = 0
    for _ in range(120):
        text = json.dumps(mutated(rng, document))
        try:
            one = OpenAPIDocument(json.loads(text))
        except ValueError:
            refused += 1
            continue
        read += 1
        json.dumps(describe(one))
        for function, arguments in tries(rng, one):
            try:
                call = function(*arguments)
            except ValueError:
                continue
            called += call is not None
            assert call is None or is_sound(call, one), (text, arguments, call)
    assert min(read, refused, called) > 5


def is_sound(call, document):
    """Whether a request can be sent as it is, and goes to one of the document's servers."""
    is_url = re.match(r"https?://[a-z0-9.:\[\]-]+(/[!$&-;=@-Z_a-z~%]*)?(\?[!$&-;=?@-Z_a-z~%/]*)?\Z", call.url)
    is_ours = any(call.url.startswith(server.rstrip("/") + "/") for server in document.servers)
    are_fields = all(re.match(r"[!#$%&'*+.^_`|~\w-]+: [ -~\xa0-\xff]*\Z", "%s: %s" % field) for field in call.headers)
    return is_url and is_ours and are_fields and "/../" not in call.url and isinstance(call.body, bytes)
