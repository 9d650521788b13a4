"""Tool arguments: what parameters mean, which arguments fit them, and what a mistake in either is answered with."""

import collections
import enum
import functools
import json
import random
import sys
import typing
from dataclasses import dataclass

import pytest

from rock_ms import arguments_schema, check_arguments, function_tool, parse_arguments

RENEW_INSTANCE = [
    {"name": "instance_id", "description": "ECS实例ID", "required": True, "type": "string"},
    {"name": "period", "description": "续费时长以月为单位", "required": True, "type": "string"},
]


def schema_of(**properties):
    return arguments_schema({"type": "object", "properties": properties})


def refusal(function, *args, **named):
    with pytest.raises(ValueError) as caught:
        function(*args, **named)
    assert type(caught.value) is ValueError
    return str(caught.value)


def complaint(schema, **arguments):
    return refusal(check_arguments, arguments, schema)


def fits(value, schema):
    """Whether a value fits a schema, as the argument x."""
    try:
        check_arguments({"x": value}, schema)
    except ValueError:
        return False
    return True


INTEGER, TEXT = {"type": "integer"}, {"type": "string"}


def array(items=None, **more):
    return {"type": "array", **({"items": items} if items else {}), **more}


# Parameters as modelscope-agent's list ------------------------------------------------------------------------------


def test_the_documented_call_fits_the_documented_parameters():
    text, arguments = parse_arguments('{"instance_id": 123, "period": "mon"}')
    check_arguments(arguments, arguments_schema(RENEW_INSTANCE))
    assert text == '{"instance_id": 123, "period": "mon"}'


def test_a_list_becomes_a_schema_with_all_that_a_model_is_told():
    more = {"name": "input.mode", "type": "str", "enum": ["a", "b"], "default": "a", "in": "query"}
    assert arguments_schema([*RENEW_INSTANCE, more]) == {
        "type": "object",
        "properties": {
            "instance_id": {"type": ["string", "number"], "description": "ECS实例ID"},
            "period": {"type": ["string", "number"], "description": "续费时长以月为单位"},
            "input.mode": {"type": ["string", "number"], "enum": ["a", "b"], "default": "a", "in": "query"},
        },
        "required": ["instance_id", "period"],
    }


STRING, NUMBER, WHOLE, BOOLEAN, ARRAY, OBJECT = "a", 2.5, 3, True, [1], {"a": 1}
VALUES = [STRING, NUMBER, WHOLE, BOOLEAN, ARRAY, OBJECT, None]
LIST_TYPES = [
    ("string String STR text", [STRING, NUMBER, WHOLE]),
    ("integer int INT", [WHOLE]),
    ("number float Double", [NUMBER, WHOLE]),
    ("boolean Bool", [BOOLEAN]),
    ("array list List", [ARRAY]),
    ("object dict", [OBJECT]),
    ("file image any null", VALUES),
]


@pytest.mark.parametrize("words, good", LIST_TYPES, ids=[words for words, _ in LIST_TYPES])
@pytest.mark.parametrize("shape", ["type", "schema"])
def test_a_type_of_the_list_form_takes(shape, words, good):
    for word in words.split():
        item = {"name": "x", "type": word} if shape == "type" else {"name": "x", "schema": {"type": word}}
        schema = arguments_schema([item])
        assert [value for value in VALUES if fits(value, schema)] == good, word


def test_several_types_of_the_list_form_are_alternatives():
    types = {"x": ["int", "Str"], "y": ["int", "file"], "z": ["int"]}
    schema = arguments_schema([{"name": name, "type": words} for name, words in types.items()])
    assert schema["properties"] == {"x": {"type": ["integer", "string", "number"]}, "y": {}, "z": INTEGER}


def test_a_schema_in_the_list_form_carries_more():
    inner = {"type": "array", "items": {"type": "string"}, "maxItems": 2, "description": "old"}
    schema = arguments_schema([{"name": "x", "description": "new", "schema": inner}])
    assert schema["properties"]["x"] == {**inner, "description": "new"}
    assert fits(["a", "b"], schema)
    assert complaint(schema, x=["a", 1]) == "argument x[1] must be a string, got a number (1)"
    assert complaint(schema, x=["a"] * 3) == 'argument x must have 2 or fewer items, got an array (["a","a","a"])'


@pytest.mark.parametrize("enum", ["", [], None])
def test_an_empty_enum_of_the_list_form_is_none(enum):
    assert fits("a", arguments_schema([{"name": "x", "type": "string", "enum": enum}]))


@pytest.mark.parametrize(
    "required, is_required",
    [(True, True), ("true", True), ("True", True), (False, False), ("false", False), (None, False)],
)
def test_required_in_the_list_form(required, is_required):
    schema = arguments_schema([{"name": "x", "required": required}])
    assert schema["required"] == (["x"] if is_required else [])
    if is_required:
        assert complaint(schema) == "argument x is missing"


def test_arguments_that_a_list_does_not_name_are_let_through():
    check_arguments({"y": 1}, arguments_schema([{"name": "x", "type": "string"}]))


@pytest.mark.parametrize("parameters", [None, {}, [], {"type": "object"}, {"properties": {}}])
def test_a_tool_without_parameters_takes_whatever_comes(parameters):
    schema = arguments_schema(parameters)
    assert (schema["type"], schema.get("properties", {})) == ("object", {})
    check_arguments({"x": 1}, schema)


def test_a_tool_without_parameters_has_a_schema_that_providers_accept():
    assert arguments_schema(None) == arguments_schema({}) == {"type": "object", "properties": {}}


def test_parameters_may_be_written_with_whatever_is_json_in_the_end():
    parameters = {"type": ["object", "null"], "properties": collections.OrderedDict(x={"enum": ("a", "b")})}
    schema = arguments_schema(parameters)
    assert schema == {"type": "object", "properties": {"x": {"enum": ["a", "b"]}}}
    assert parameters["type"] == ["object", "null"]
    assert complaint(schema, x="c") == 'argument x must be one of "a", "b", got a string ("c")'


# Parameters that cannot be meant ------------------------------------------------------------------------------------

CIRCLE = {}
CIRCLE["properties"] = {"x": CIRCLE}
TYPES = "string, number, integer, boolean, array, object, null, or an array of these"
BAD_PARAMETERS = [
    ("a", 'parameters must be a list or a JSON Schema, got a string ("a")'),
    (True, "parameters must be a list or a JSON Schema, got a boolean (true)"),
    ({"type": "string"}, 'parameters.type must be "object", got a string ("string")'),
    ({"type": None}, 'parameters.type must be "object", got null'),
    ({"type": ["string", "null"]}, 'parameters.type must be "object", got an array (["string","null"])'),
    (CIRCLE, "parameters are nested too deeply"),
    ({"default": {1, 2}}, "parameters must be JSON: Object of type set is not JSON serializable"),
    (["a"], 'parameters[0] must be an object, got a string ("a")'),
    ([{"name": "a"}, {"type": "string"}], "parameters[1] has no name"),
    ([{"name": ""}], "parameters[0] has no name"),
    ([{"name": 5}], "parameters[0].name must be a string, got a number (5)"),
    ([{"name": "a"}, {"name": "a"}], 'parameters[1] is a second one named "a"'),
    ([{"name": "a", "type": 5}], "parameters[0].type must be a string, got an array ([5])"),
    ([{"name": "a", "required": "yes"}], 'parameters[0].required must be true or false, got a string ("yes")'),
    ([{"name": "a", "required": 1}], "parameters[0].required must be true or false, got a number (1)"),
    ([{"name": "a", "enum": "b"}], 'parameters[0].enum must be an array, got a string ("b")'),
    ([{"name": "a", "schema": ["b"]}], 'parameters[0].schema must be an object, got an array (["b"])'),
    ([{"name": "a", "pattern": "("}], 'parameters[0].pattern must be a regular expression, got a string ("(")'),
    (
        [{"name": "a", "schema": {"items": {"type": "int"}}}],
        'parameters[0].items.type must be one of %s, got a string ("int")' % TYPES,
    ),
    ({"$ref": "#/$defs/a"}, "parameters.$ref (#/$defs/a) points at nothing in the parameters"),
    ({"$ref": "other.json", "other.json": {}}, "parameters.$ref (other.json) points at nothing in the parameters"),
    ({"$ref": "#name"}, "parameters.$ref (#name) points at nothing in the parameters"),
    ({"$ref": "#/x/01", "x": [{}, {}]}, "parameters.$ref (#/x/01) points at nothing in the parameters"),
    ({"$ref": "#/x/0/1", "x": ["abc"]}, "parameters.$ref (#/x/0/1) points at nothing in the parameters"),
    ({"$ref": "#/x", "x": [{}]}, "parameters.$ref (#/x) must be a JSON Schema, got an array ([{}])"),
    ({"x": {"enum": 3}, "$ref": "#/x"}, "parameters.$ref (#/x).enum must be an array, got a number (3)"),
    ({"$ref": "#"}, "parameters.$ref (#) leads back to itself"),
    (
        {"properties": {"a b": {"type": []}}},
        'parameters.properties["a b"].type must be one of %s, got an array ([])' % TYPES,
    ),
    ({"minItems": -1}, "parameters.minItems must be a whole number from 0, got a number (-1)"),
    ({"minimum": "1"}, 'parameters.minimum must be a number, got a string ("1")'),
    ({"exclusiveMaximum": []}, "parameters.exclusiveMaximum must be a number, got an array ([])"),
    ({"multipleOf": 0}, "parameters.multipleOf must be a number above 0, got a number (0)"),
    ({"uniqueItems": 1}, "parameters.uniqueItems must be true or false, got a number (1)"),
    ({"$ref": 1}, "parameters.$ref must be a string, got a number (1)"),
    ({"required": "x"}, 'parameters.required must be an array of strings, got a string ("x")'),
    ({"not": []}, "parameters.not must be a JSON Schema, got an array ([])"),
    ({"anyOf": []}, "parameters.anyOf must be an array of JSON Schemas that is not empty, got an array ([])"),
    ({"items": 1}, "parameters.items must be a JSON Schema or an array of them, got a number (1)"),
    ({"properties": []}, "parameters.properties must be an object of JSON Schemas, got an array ([])"),
    ({"$defs": {"a": {"not": {"enum": 1}}}}, "parameters.$defs.a.not.enum must be an array, got a number (1)"),
    ({"anyOf": [{}, {"items": [{}, 3]}]}, "parameters.anyOf[1].items[1] must be a JSON Schema, got a number (3)"),
]


@pytest.mark.parametrize("parameters, message", BAD_PARAMETERS, ids=[message for _, message in BAD_PARAMETERS])
def test_the_place_of_a_mistake_is_named(parameters, message):
    assert refusal(arguments_schema, parameters) == message


BAD_KEYWORDS = {
    "type": ["text", "String", None, 1, [], ["string", "int"], [["string"]]],
    "enum": [3, "ab", {}],
    "required": ["x", True, [1], {}],
    "properties patternProperties $defs definitions": [[], "a", None, {"a": 1}, {"a": None}],
    "patternProperties": [{"(": {}}],
    "additionalProperties propertyNames contains not if then else additionalItems": ["a", None, [], 1],
    "items": ["string", None, [None], 1],
    "anyOf oneOf allOf prefixItems": [[], {}, "a", [1], [{}, None]],
    "minItems maxItems minLength maxLength minProperties maxProperties": [-1, 1.5, "1", None, True],
    "minimum maximum": ["a", None, True, []],
    "exclusiveMinimum exclusiveMaximum": ["a", None, []],
    "multipleOf": [0, -1, "1", True, None],
    "uniqueItems nullable": ["true", 1, None],
    "pattern": ["(", "a{2,1}", "[", 3, None, "a{99999999999999999999}"],
    "$ref": [3, None, {}, "", "a", "#/nowhere"],
}


@pytest.mark.parametrize("keywords", BAD_KEYWORDS)
def test_a_keyword_whose_value_cannot_be_meant_is_refused_with_its_place(keywords):
    for keyword in keywords.split():
        for value in BAD_KEYWORDS[keywords]:
            message = refusal(schema_of, x={keyword: value})
            assert message.startswith("parameters.properties.x.%s" % keyword), (keyword, value, message)


LOOPS = [
    {"a": {"$ref": "#/$defs/a"}},
    {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{}, {"$ref": "#/$defs/a"}]}},
    {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/b"}]}, "b": {"not": {"$ref": "#/$defs/a"}}},
    {"a": {"if": {"oneOf": [{"$ref": "#/$defs/a"}]}}},
    {"a": {"then": {"$ref": "#/$defs/b"}}, "b": {"else": {"$ref": "#/$defs/a"}}},
    # Reached first where data is consumed, which is no loop.
    {"a": {"items": {"$ref": "#/$defs/b"}, "allOf": [{"$ref": "#/$defs/b"}]}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}},
]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_reference_that_comes_back_without_consuming_data_is_refused(loop):
    assert refusal(arguments_schema, {"$defs": loop}).endswith("leads back to itself")


# What fits a JSON Schema --------------------------------------------------------------------------------------------

# A schema, the values that fit it, and those that do not: by the specification.
FITTING = [
    ({}, [None, True, 1, "a", [], {}], []),
    (True, [None, 1, {}], []),
    (False, [], [None, 1, {}]),
    ({"type": "integer"}, [0, -3, 3.0, 10**30, 1e20], [2.5, True, "3", None, float("inf")]),
    ({"type": "number"}, [0, 2.5, 10**30], [False, "3", None, []]),
    ({"type": "string"}, ["", "a"], [1, None, True, ["a"]]),
    ({"type": "boolean"}, [True, False], [0, 1, "true", None]),
    ({"type": "null"}, [None], [0, False, "", "null"]),
    ({"type": "array"}, [[], [1]], [{}, "a"]),
    ({"type": "object"}, [{}, {"a": 1}], [[], "a", None]),
    ({"type": ["integer", "null"]}, [1, None], ["a", 1.5, False]),
    ({"type": "string", "nullable": True}, ["a", None], [1]),
    ({"type": "string", "nullable": False}, ["a"], [None]),
    ({"enum": ["a", None], "nullable": True}, ["a", None], ["b"]),
    ({"enum": []}, [], [None, 1]),
    ({"enum": [1, "a", [2], {"b": 3}]}, [1, 1.0, "a", [2.0], {"b": 3.0}], [True, "1", [], {"b": True}, None]),
    ({"enum": [True, 0]}, [True, 0, 0.0], [1, False]),
    ({"enum": [[False], {"a": 1, "b": 2}]}, [[False], {"b": 2, "a": 1}], [[0], False, {"a": 1}]),
    ({"const": 1}, [1, 1.0], [True, "1", [1]]),
    ({"const": False}, [False], [0, None, "", []]),
    ({"const": None}, [None], [0, False]),
    ({"const": {"a": [1, {}]}}, [{"a": [1.0, {}]}], [{"a": [True, {}]}, {"a": [1]}, {}]),
    ({"minimum": 2}, [2, 2.0, 3, "1", None, True], [1, 1.9, -5]),
    ({"maximum": 2}, [2, 2.0, -3], [3, 2.1]),
    ({"exclusiveMinimum": 2}, [2.1, 3, "a"], [2, 2.0, 1]),
    ({"exclusiveMaximum": 2}, [1.9, 1, []], [2, 2.0, 3]),
    ({"minimum": 2, "exclusiveMinimum": True}, [3, 2.1], [2, 1]),
    ({"minimum": 2, "exclusiveMinimum": False}, [2, 3], [1]),
    ({"exclusiveMaximum": True, "maximum": 2}, [1, 1.9], [2, 3]),
    ({"exclusiveMaximum": True}, [1, 10**9], []),
    ({"multipleOf": 3}, [0, 3, -6, 9.0, "a"], [1, 4.5]),
    ({"multipleOf": 0.1}, [0.3, 1.1, 4, 0, -0.7, 1e20], [0.35, 0.01]),
    ({"multipleOf": 0.0001}, [0.0075, 1], [0.00751]),
    ({"multipleOf": 1.5}, [3, 4.5], [1, 2.0, float("inf")]),
    ({"minLength": 2}, ["ab", "😀😀", 1, []], ["", "a", "😀"]),
    ({"maxLength": 2}, ["", "ab", "😀😀"], ["abc", "e\u0301e"]),
    ({"maxLength": 2.0}, ["ab"], ["abc"]),
    ({"pattern": "b+"}, ["b", "abba", 1, None], ["", "aca"]),
    ({"pattern": "^a$"}, ["a"], ["ab", "ba", ""]),
    ({"minItems": 1}, [[1], "", {}], [[]]),
    ({"maxItems": 0}, [[]], [[1]]),
    ({"maxItems": 1}, [[], [1], "abc"], [[1, 2]]),
    ({"uniqueItems": True}, [[], [1, 2], [1, True, "1"], [[1], [True]], [{"a": 1}, {"b": 1}], "aa"], [[1, 1.0]]),
    ({"uniqueItems": True}, [], [[[1], [1.0]], [{"a": 1, "b": 2}, {"b": 2, "a": 1}], [None, None], ["a", "b", "a"]]),
    ({"uniqueItems": False}, [[1, 1]], []),
    ({"items": {"type": "integer"}}, [[], [1, 2], "a", {"0": "a"}], [["a"], [1, None]]),
    ({"items": False}, [[], "a"], [[1]]),
    ({"items": [{"type": "integer"}, {"type": "string"}]}, [[], [1], [1, "a", None]], [["a"], [1, 2]]),
    ({"items": [{}], "additionalItems": False}, [[], ["a"]], [["a", 1]]),
    ({"items": [{}], "additionalItems": {"type": "string"}}, [[1], [1, "a"]], [[1, 2], [1, "a", 2]]),
    ({"items": {}, "additionalItems": False}, [[1, 2, 3]], []),
    ({"additionalItems": False}, [[1]], []),
    ({"prefixItems": [{"type": "integer"}]}, [[], [1], [1, "a"]], [["a"]]),
    ({"items": {"type": "string"}, "prefixItems": [{"type": "integer"}]}, [[1], [1, "a"]], [["a"], [1, 2]]),
    ({"prefixItems": [{}, {}], "items": False}, [[], [1], [1, 2]], [[1, 2, 3]]),
    ({"contains": {"type": "integer"}}, [[1], ["a", 1], "a"], [[], ["a"]]),
    ({"minProperties": 1}, [{"a": 1}, [], ""], [{}]),
    ({"maxProperties": 1}, [{}, {"a": 1}], [{"a": 1, "b": 2}]),
    ({"required": ["a", "b"]}, [{"a": 1, "b": None}, [], "a"], [{}, {"a": 1}]),
    ({"properties": {"a": {"type": "string"}}}, [{}, {"a": "b"}, {"b": 1}, [1]], [{"a": 1}, {"a": None}]),
    ({"properties": {"a": False}}, [{}, {"b": 1}], [{"a": 1}]),
    ({"properties": {"a": {}}, "additionalProperties": False}, [{}, {"a": 1}], [{"b": 1}, {"a": 1, "b": 1}]),
    ({"additionalProperties": {"type": "string"}}, [{}, {"a": "b"}], [{"a": 1}]),
    ({"patternProperties": {"^n_": {"type": "number"}}}, [{"n_a": 1}, {"a": "b"}, {"an_": "b"}], [{"n_a": "b"}]),
    ({"patternProperties": {"a": {"minimum": 2}, "b": {"maximum": 3}}}, [{"ab": 2}, {"a": 9}], [{"ab": 4}, {"ab": 1}]),
    ({"patternProperties": {"^n_": {}}, "additionalProperties": False}, [{"n_a": 1}], [{"an_": 1}]),
    ({"patternProperties": {"": {}}, "additionalProperties": False}, [{"a": 1}], []),
    ({"propertyNames": {"maxLength": 2}}, [{}, {"ab": 1}, "abc"], [{"abc": 1}]),
    ({"anyOf": [{"type": "integer"}, {"minLength": 2}]}, [1, "ab", None], ["a"]),
    ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, [1, 2.5, "a"], [3, 1.5]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [None]),
    ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, [1, 2, "a"], [0, 3]),
    ({"allOf": [True, {"type": "null"}]}, [None], [0]),
    ({"not": {"type": "string"}}, [1, None], ["a"]),
    ({"not": {}}, [], [1, None]),
    ({"if": {"type": "string"}, "then": {"minLength": 2}, "else": {"minimum": 2}}, ["ab", 2, None], ["a", 1]),
    ({"if": {"type": "string"}, "then": {"minLength": 2}}, ["ab", 1], ["a"]),
    ({"if": {"type": "string"}, "else": {"minimum": 2}}, ["a", 2], [1]),
    ({"then": False, "else": False}, [1, "a"], []),
    ({"$ref": "#/$defs/short", "minLength": 1}, ["a", 3], ["", "abc"]),
    ({"format": "date", "x-more": {"type": 3}, "default": 1, "$comment": []}, ["a", 1], []),
]


@pytest.mark.parametrize("schema, good, bad", FITTING, ids=[json.dumps(schema) for schema, _, _ in FITTING])
def test_by_this_schema(schema, good, bad):
    checked = arguments_schema({"properties": {"x": schema}, "$defs": {"short": {"maxLength": 2}}})
    assert [value for value in good if not fits(value, checked)] == []
    assert [value for value in bad if fits(value, checked)] == []


def test_the_arguments_themselves_are_held_to_the_schema_too():
    schema = arguments_schema({"minProperties": 1, "propertyNames": {"pattern": "^[a-z]+$"}})
    assert complaint(schema) == "the arguments must have 1 or more members, got an object ({})"
    assert complaint(schema, aB=1) == 'argument aB has a name that must match "^[a-z]+$", got a string ("aB")'


# References ---------------------------------------------------------------------------------------------------------

POINTERS = [
    ("#/$defs/a", {"$defs": {"a": {"type": "integer"}}}),
    ("#/definitions/a", {"definitions": {"a": {"type": "integer"}}}),
    ("#/components/schemas/a", {"components": {"schemas": {"a": {"type": "integer"}}}}),
    ("#/$defs/a~1b~0c~01", {"$defs": {"a/b~c~1": {"type": "integer"}}}),
    ("#/$defs/a%20b%C3%A9%25", {"$defs": {"a bé%": {"type": "integer"}}}),
    ("#/x-types/1", {"x-types": [{}, {"type": "integer"}]}),
    ("#/$defs/", {"$defs": {"": {"type": "integer"}}}),
    ("#/$defs/a", {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "integer"}}}),
]


@pytest.mark.parametrize("reference, document", POINTERS, ids=[reference for reference, _ in POINTERS])
def test_a_reference_is_a_pointer_into_the_parameters(reference, document):
    schema = arguments_schema({**document, "properties": {"x": {"$ref": reference}}})
    assert (fits(1, schema), fits("a", schema)) == (True, False)


TREE = {
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"id": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["id"],
        }
    },
}


def test_a_schema_may_be_recursive_in_its_data():
    schema = arguments_schema(TREE)
    check_arguments({"root": {"id": 1, "kids": [{"id": 2}, {"id": 3, "kids": [{"id": 4}]}]}}, schema)
    bad = {"id": 1, "kids": [{"id": 2}, {"id": 3, "kids": [{"kids": []}]}]}
    assert complaint(schema, root=bad) == "argument root.kids[1].kids[0].id is missing"
    whole = arguments_schema({"properties": {"me": {"$ref": "#"}}, "additionalProperties": False})
    check_arguments({"me": {"me": {}}}, whole)
    assert complaint(whole, me={"me": {"you": 1}}) == "there is no argument `me.me.you`; known are me"


def test_references_side_by_side_do_not_double_the_work_at_each_step():
    steps = {"s%d" % n: {"anyOf": [{"$ref": "#/$defs/s%d" % (n + 1)}] * 2} for n in range(60)}
    schema = arguments_schema({"$defs": {**steps, "s60": {"const": 1}}, "properties": {"x": {"$ref": "#/$defs/s0"}}})
    check_arguments({"x": 1}, schema)
    assert complaint(schema, x=2) == "argument x must be 1, got a number (2)"


def nested(depth, wrap, value):
    for _ in range(depth):
        value = wrap(value)
    return value


DEPTH = 20_000


@pytest.mark.parametrize(
    "x",
    [
        nested(DEPTH, lambda inner: {"items": inner}, {}),
        nested(DEPTH, lambda inner: {"allOf": [inner]}, {}),
        {"enum": [nested(DEPTH, lambda inner: [inner], 1)]},
    ],
    ids=["items", "allOf", "enum"],
)
def test_parameters_nested_too_deeply_are_refused(x):
    assert refusal(schema_of, x=x).endswith("nested too deeply")


@pytest.mark.parametrize(
    "x",
    [
        {"$ref": "#/$defs/list"},
        {"uniqueItems": True},
        {"const": 1},
        {"type": "string"},
    ],
    ids=lambda x: next(iter(x)),
)
def test_data_nested_too_deeply_is_refused(x):
    schema = arguments_schema({"properties": {"x": x}, "$defs": {"list": {"items": {"$ref": "#/$defs/list"}}}})
    assert complaint(schema, x=nested(DEPTH, lambda inner: [inner], 1)) == "the arguments are nested too deeply"


# What a call is told ------------------------------------------------------------------------------------------------

PET = {"anyOf": [{"properties": {"kind": {"const": "cat"}}}, {"properties": {"kind": {"const": "dog"}, "age": {}}}]}
MESSAGES = [
    ({"type": "string"}, 3, "argument x must be a string, got a number (3)"),
    ({"type": ["integer", "null"]}, "a", 'argument x must be an integer or null, got a string ("a")'),
    ({"type": "object"}, None, "argument x must be an object, got null"),
    ({"type": "array"}, "a" * 500, "argument x must be an array, got a string (%s...)" % ('"' + "a" * 76)),
    ({"enum": ["a", 1]}, "é\n", 'argument x must be one of "a", 1, got a string ("é\\n")'),
    ({"const": {"a": 1}}, [], 'argument x must be {"a":1}, got an array ([])'),
    ({"minimum": 1}, 0, "argument x must be at least 1, got a number (0)"),
    ({"maximum": 1.5}, 2, "argument x must be at most 1.5, got a number (2)"),
    ({"exclusiveMinimum": 1}, 1, "argument x must be above 1, got a number (1)"),
    ({"maximum": 1, "exclusiveMaximum": True}, 1, "argument x must be below 1, got a number (1)"),
    ({"multipleOf": 0.1}, 0.25, "argument x must be a multiple of 0.1, got a number (0.25)"),
    ({"minLength": 2}, "a", 'argument x must have 2 or more characters, got a string ("a")'),
    ({"pattern": "^a%s$"}, "b", 'argument x must match "^a%s$", got a string ("b")'),
    ({"minItems": 2}, [1], "argument x must have 2 or more items, got an array ([1])"),
    (
        {"uniqueItems": True},
        [1, 2, 1],
        "argument x must not have the same item twice, as at [0] and [2], got an array ([1,2,1])",
    ),
    ({"contains": {"type": "null"}}, [], 'argument x must have an item that fits {"type":"null"}, got an array ([])'),
    ({"not": {"const": 1}}, 1, 'argument x must not fit {"const":1}, got a number (1)'),
    ({"oneOf": [{}, {}]}, 1, "argument x must fit one of 2 schemas alone, not 2 of them, got a number (1)"),
    ({"items": False}, [1], "argument x[0] must not be given, got a number (1)"),
    ({"items": {"properties": {"i": TEXT}}}, [{}, {"i": 3}], "argument x[1].i must be a string, got a number (3)"),
    ({"properties": {"a b": {"type": "null"}}}, {"a b": 1}, 'argument x["a b"] must be null, got a number (1)'),
    ({"required": ["a"]}, {}, "argument x.a is missing"),
    ({"additionalProperties": False}, {"a": 1}, "there is no argument `x.a`"),
    (
        {"properties": {"id": {}}, "additionalProperties": False},
        {"i": 1},
        "there is no argument `x.i`; did you mean 'id'?",
    ),
    ({"anyOf": [TEXT, {"type": "null"}]}, 1, "argument x must be a string, or must be null, got a number (1)"),
    ({"anyOf": [{"type": "null"}, array(TEXT)]}, [1], "argument x[0] must be a string, got a number (1)"),
    (PET, {"kind": "bird"}, 'argument x.kind must be "cat", or must be "dog", got a string ("bird")'),
    ({"type": "null"}, "a" * 78, 'argument x must be null, got a string ("%s")' % ("a" * 78)),
    ({"type": "null"}, "a" * 79, 'argument x must be null, got a string ("%s...)' % ("a" * 76)),
    ({"multipleOf": 2}, float("inf"), "argument x must be a multiple of 2, got a number (1.7976931348623157e+308)"),
    ({"maxProperties": 0}, {"a": 1}, 'argument x must have 0 or fewer members, got an object ({"a":1})'),
    (
        {"oneOf": [{"properties": {"a": {"const": 1}}}, {"required": ["b"]}]},
        {"a": 2},
        "argument x.a must be 1, got a number (2); or argument x.b is missing",
    ),
]


@pytest.mark.parametrize("schema, value, message", MESSAGES, ids=[message for _, _, message in MESSAGES])
def test_a_message_names_the_place_what_was_expected_and_what_came(schema, value, message):
    assert complaint(schema_of(x=schema), x=value) == message


def test_the_list_form_says_that_a_number_would_do():
    schema = arguments_schema(RENEW_INSTANCE)
    message = "argument instance_id must be a string or a number, got a boolean (true)"
    assert complaint(schema, instance_id=True, period=1) == message


NAMES = [("input.prompt", "input.prompt"), ("a b", "a b"), ("a\nb", '["a\\nb"]'), ("", '[""]')]


@pytest.mark.parametrize("name, called", NAMES)
def test_an_argument_is_called_by_its_name_where_that_can_be_read(name, called):
    schema = schema_of(**{name: {"type": "null"}})
    assert complaint(schema, **{name: 1}) == "argument %s must be null, got a number (1)" % called


def test_an_unknown_argument_is_told_the_nearest_known_one():
    schema = arguments_schema({"properties": {"period": {}, "id": {}}, "additionalProperties": False})
    assert complaint(schema, perod=1) == "there is no argument `perod`; did you mean 'period'?"
    assert complaint(schema, zzz=1) == "there is no argument `zzz`; known are period, id"


def test_the_first_problem_in_the_order_of_the_schema_is_told():
    parts = [("required", ["b"]), ("properties", {"c": {"type": "null"}, "a": {"type": "null"}})]
    assert complaint(arguments_schema(dict(parts)), a=1, c=1) == "argument b is missing"
    assert complaint(arguments_schema(dict(reversed(parts))), a=1, c=1).startswith("argument c must be null")


def test_few_alternatives_are_told_of_many():
    schema = schema_of(x={"anyOf": [{"const": n} for n in range(100)]})
    assert complaint(schema, x="a") == (
        'argument x must be 0, or must be 1, or must be 2, or must be 3, got a string ("a")'
    )


# A call's params ----------------------------------------------------------------------------------------------------

PARAMS = [
    ('{"a": 1.50}', '{"a": 1.50}', {"a": 1.5}),
    (' {"a":\n 1}\n', ' {"a":\n 1}\n', {"a": 1}),
    ("", "{}", {}),
    (" \n", "{}", {}),
    (None, "{}", {}),
    ({}, "{}", {}),
    ({"a": (1, "é")}, '{"a":[1,"é"]}', {"a": [1, "é"]}),
    ('{"a\tb":\n"1\n2\\n\\"\r\0"}', '{"a\\u0009b":\n"1\\u000a2\\n\\"\\u000d\\u0000"}', {"a\tb": '1\n2\n"\r\0'}),
    ('{"a": "\\\\\n"}', '{"a": "\\\\\\u000a"}', {"a": "\\\n"}),
]


@pytest.mark.parametrize("params, text, value", PARAMS)
def test_params_are_read(params, text, value):
    assert parse_arguments(params) == (text, value)
    assert json.loads(text) == value


BAD_PARAMS = [
    ("[]", "params must be a JSON object, got an array"),
    ([], "params must be a JSON object, got an array"),
    ("1", "params must be a JSON object, got a number"),
    ('"{}"', "params must be a JSON object, got a string"),
    ("null", "params must be a JSON object, got null"),
    (True, "params must be a JSON object, got a boolean"),
    ("{'a': 1}", "params is not JSON: Expecting property name"),
    ('{"a": "b\nc}', "params is not JSON: "),
    ('{"a": "\\\n"}', "params is not JSON: "),
    ('{"a": NaN}', "params is not JSON: NaN is not a JSON value"),
    ('{"a": %s' % ("[" * 100_000), "params is not JSON: "),
    (b"{}", "params must be JSON: Object of type bytes is not JSON serializable"),
    ({"a": {1}}, "params must be JSON: Object of type set is not JSON serializable"),
]


@pytest.mark.parametrize("params, message", BAD_PARAMS, ids=[message for _, message in BAD_PARAMS])
def test_params_that_are_no_object_are_refused(params, message):
    assert refusal(parse_arguments, params).startswith(message)


# Random schemas and values ------------------------------------------------------------------------------------------

KEYWORDS = sorted({keyword for schema, _, _ in FITTING if isinstance(schema, dict) for keyword in schema})
LEAVES = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    0.5,
    3.0,
    10**20,
    "",
    "a",
    "ab",
    "^a",
    "(",
    "string",
    "array",
    "#",
    "#/$defs/a",
]


def random_value(rng, depth=0):
    kind = rng.randrange(4 if depth < 4 else 2)
    if kind < 2:
        return rng.choice(LEAVES)
    parts = [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return parts if kind == 2 else {rng.choice(["a", "ab", "", "x"]): part for part in parts}


def random_schema(rng, depth=0):
    """A schema, of whose keywords now and then one has a value that it cannot have."""
    if rng.random() < 0.03:
        return random_value(rng)
    inner = [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 3))] if depth < 3 else [{}]
    whole = [case for case in FITTING if isinstance(case[0], dict)]
    schema = dict(rng.choice(whole)[0])
    for keyword in rng.sample(KEYWORDS, 2):
        schema[keyword] = rng.choice(
            [inner, inner[0], {"a": inner[0]}, ["a"], 1, "a", random_value(rng)]
            if rng.random() < 0.03
            else [case[0][keyword] for case in whole if keyword in case[0]]
        )
    structure = [("properties", {"a": inner[0]}), ("items", inner[0]), ("anyOf", inner), ("$ref", "#/$defs/a")]
    schema.update([rng.choice(structure)])
    return schema


@pytest.mark.parametrize("seed", range(4))
def test_random_schemas_and_values_raise_nothing_but_value_error(seed):
    rng = random.Random(seed)
    counts = collections.Counter()
    for _ in range(150):
        defs = {"a": random_schema(rng, 2), "short": {"maxLength": 2}}
        parameters = {"properties": {"x": random_schema(rng), "y": random_schema(rng)}, "$defs": defs}
        try:
            schema = arguments_schema(parameters)
        except ValueError as error:
            assert type(error) is ValueError and str(error).startswith("parameters"), error
            counts["refused"] += 1
            continue
        assert arguments_schema(schema) == schema
        for _ in range(10):
            counts[fits(random_value(rng), schema)] += 1
    assert min(counts[outcome] for outcome in (True, False, "refused")) > 20, counts


# Functions as tools -------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclass
class Point:
    x: int


class Name(str):
    pass


class Crowd(list):
    pass


UserId = typing.NewType("UserId", int)
T = typing.TypeVar("T")
NOTHING = object()


ANNOTATIONS = [
    (str, TEXT),
    (int, INTEGER),
    (float, {"type": "number"}),
    (bool, {"type": "boolean"}),
    (None, {"type": "null"}),
    (Name, TEXT),
    (list, array()),
    (dict, {"type": "object"}),
    (tuple, array()),
    (set, array()),
    (typing.Any, {}),
    (object, {}),
    (T, {}),
    (bytes, {}),
    (json.JSONDecoder, {}),
    (typing.Callable[[int], str], {}),
    (typing.List[int], array(INTEGER)),
    (typing.List, array()),
    (typing.Sequence[str], array(TEXT)),
    (typing.Iterable[typing.List[int]], array(array(INTEGER))),
    (typing.Set[str], array(TEXT)),
    (typing.Deque[str], array(TEXT)),
    (Crowd, {}),
    (typing.List[typing.Any], array()),
    (typing.Tuple[int, ...], array(INTEGER)),
    (typing.Tuple[int, str], array(prefixItems=[INTEGER, TEXT], minItems=2, maxItems=2)),
    (typing.Dict[str, int], {"type": "object", "additionalProperties": INTEGER}),
    (typing.Mapping[str, typing.Any], {"type": "object"}),
    (typing.Optional[int], {"type": ["integer", "null"]}),
    (typing.Union[int, str], {"type": ["integer", "string"]}),
    (typing.Union[int, typing.Any], {}),
    (typing.Optional[typing.List[int]], {"anyOf": [array(INTEGER), {"type": "null"}]}),
    (typing.Union[typing.List[int], typing.Sequence[int]], array(INTEGER)),
    (typing.List["Point"], array({"type": "object"})),
    (Point, {"type": "object"}),
    (Colour, {"type": "string", "enum": ["red", "blue"]}),
    (Level, {"enum": [1, 2]}),
    (UserId, INTEGER),
    ("typing.List[int]", array(INTEGER)),
    ("Colour", {"type": "string", "enum": ["red", "blue"]}),
    ("Nowhere", {}),
    ("not python at all", {}),
    (3, {}),
]
if sys.version_info >= (3, 8):
    ANNOTATIONS += [
        (typing.Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (typing.Literal[1, "a", None], {"enum": [1, "a", None]}),
        (typing.TypedDict("Options", {"a": int}), {"type": "object"}),
    ]
if sys.version_info >= (3, 9):
    ANNOTATIONS += [
        (list[int], array(INTEGER)),
        ("dict[str, list[str]]", {"type": "object", "additionalProperties": array(TEXT)}),
        (typing.Annotated[int, "seconds"], INTEGER),
    ]
if sys.version_info >= (3, 10):
    ANNOTATIONS += [(int | None, {"type": ["integer", "null"]}), ("str | list[int]", {"anyOf": [TEXT, array(INTEGER)]})]


@pytest.mark.parametrize("annotation, schema", ANNOTATIONS, ids=[str(annotation) for annotation, _ in ANNOTATIONS])
def test_an_annotation_becomes_a_schema(annotation, schema):
    def tool(x):
        pass

    tool.__annotations__ = {"x": annotation, "return": "Nowhere"}
    parameters = function_tool(tool)[2]
    assert parameters["properties"] == {"x": schema}
    assert arguments_schema(parameters) == parameters


def test_a_signature_becomes_parameters():
    async def renew(instance_id: str, period: "int" = 1, *, mode=Colour.RED, at=NOTHING, **kwargs):
        """Renew an instance."""

    name, description, parameters = function_tool(renew)
    assert (name, description) == ("renew", "Renew an instance.")
    assert parameters == {
        "type": "object",
        "properties": {
            "instance_id": {"type": "string"},
            "period": {"type": "integer", "default": 1},
            "mode": {"default": "red"},
            "at": {},
        },
        "required": ["instance_id"],
    }
    check_arguments({"instance_id": "i", "whatever": 1}, arguments_schema(parameters))


def test_a_function_without_kwargs_takes_no_unknown_argument():
    def tool(period: int = float("inf")):
        pass

    name, description, parameters = function_tool(tool)
    assert (description, parameters["properties"]) == ("", {"period": {"type": "integer"}})
    assert complaint(parameters, perod=1) == "there is no argument `perod`; did you mean 'period'?"


def test_a_default_of_none_may_be_given():
    def tool(
        a=None,
        b: str = None,
        c: typing.Optional[typing.List[int]] = None,
        d: typing.Optional[int] = None,
        e: None = None,
    ):
        pass

    properties = function_tool(tool)[2]["properties"]
    assert properties["a"] == {"default": None}
    assert properties["b"] == {"type": ["string", "null"], "default": None}
    assert properties["c"] == {"anyOf": [array(INTEGER), {"type": "null"}], "default": None}
    assert properties["d"] == {"type": ["integer", "null"], "default": None}
    assert properties["e"] == {"type": "null", "default": None}


def test_a_method_is_a_tool_without_its_self():
    class Shop:
        def buy(self, what: "Colour"):
            """Buy."""

    name, description, parameters = function_tool(Shop().buy)
    assert (name, description, list(parameters["properties"])) == ("buy", "Buy.", ["what"])
    assert parameters["properties"]["what"]["enum"] == ["red", "blue"]


def takes_star(*words):
    pass


NO_TOOLS = [
    (takes_star, "takes_star takes *words, which has no names: make it one parameter, a list"),
    (lambda x: x, "a tool must be a function with a name, got <function"),
    (len, "len takes obj by position only: remove the / behind it"),
    ("len", "a tool must be a function with a name, got 'len'"),
    (json, "a tool must be a function with a name, got <module"),
    (functools.partial(len), "a tool must be a function with a name, got functools.partial"),
]


@pytest.mark.parametrize("function, message", NO_TOOLS, ids=[message for _, message in NO_TOOLS])
def test_what_cannot_be_called_by_names_is_no_tool(function, message):
    assert refusal(function_tool, function).startswith(message)


GOOGLE = """Find flights.

    All of them: cheap and dear.

    Note that prices change.

    Args:
        start (str): where from,
            as a code
        end: where to

        day (Optional[Tuple[int, int]], optional): when: month
            and day
        **options: more

    Returns:
        start: nothing of the kind
    """
NUMPY = """Find flights.

    All of them: cheap and dear.

    Note that prices change.

    Parameters
    ----------
    start, end : str
        where
    day : tuple of int, optional
        when: month

        and day

    Returns
    -------
    start
        nothing of the kind
    """
REST = """Find flights.

    All of them: cheap and dear.

    Note that prices change.

    :param start: where from,
        as a code
    :param str end: where to
    :type end: str
        of three letters
    :param day: when: month
      and day
    :returns: nothing
    """
FROM_TO_WHEN = {"start": "where from, as a code", "end": "where to", "day": "when: month and day"}
DOCSTRINGS = [
    (GOOGLE, FROM_TO_WHEN),
    (NUMPY, {"start": "where", "end": "where", "day": "when: month and day"}),
    (REST, FROM_TO_WHEN),
]


@pytest.mark.parametrize("docstring, expected", DOCSTRINGS, ids=["Google", "NumPy", "reST"])
def test_a_docstring_describes_the_tool_and_its_parameters(docstring, expected):
    def flights(start, end, day=None, other=None):
        pass

    flights.__doc__ = docstring
    _, description, parameters = function_tool(flights)
    assert description == "Find flights.\n\nAll of them: cheap and dear.\n\nNote that prices change."
    found = {name: part["description"] for name, part in parameters["properties"].items() if "description" in part}
    assert found == expected


def test_a_heading_without_a_colon_is_text():
    def notes():
        """Make
        Notes
        :class:`str` of them.
        """

    assert function_tool(notes)[1] == "Make\nNotes\n:class:`str` of them."


def test_a_whole_tool_from_function_to_call():
    def weather(city: str, days: int = 1, units: typing.Optional[Colour] = None):
        """The weather.

        Args:
            city: its name
        """

    _, _, parameters = function_tool(weather)
    schema = arguments_schema(json.loads(json.dumps(parameters)))
    check_arguments({"city": "Hangzhou", "units": None}, schema)
    assert complaint(schema, days=2) == "argument city is missing"
    assert complaint(schema, city=5) == "argument city must be a string, got a number (5)"
    assert complaint(schema, city="a", days="2") == 'argument days must be an integer, got a string ("2")'
