"""Tools: how they are found and made, what they are called with, and the built-in ones against a scripted service."""

import asyncio
import contextlib
import http.server
import json
import sys
import textwrap
import urllib.error
import urllib.request
from urllib.parse import parse_qs, urlsplit

import pytest

import rock_ms
from rock_ms import UsageError, direct_opener, load_tool, raised, secrets_in
from support import serving

NUMBER = [{"name": "n", "type": "integer", "required": True}]


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """A worker loads one tool in its life; here, what loading leaves in the process is taken away again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    forget_loaded()


@pytest.fixture
def loop():
    """The event loop that a process has at first, which ends with it."""
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        asyncio.set_event_loop(loop)
        yield
    asyncio.set_event_loop(None)


def forget_loaded():
    for name in list(sys.modules):
        if name.partition(".")[0] in ("rock_tool", "modelscope_agent", "beside"):
            del sys.modules[name]


@pytest.fixture
def load(tmp_path):
    """Loads a tool of a file with that source."""

    def load(source, name="t", cfg=None, file_name="tool.py"):
        path = tmp_path / file_name
        path.write_text(textwrap.dedent(source), encoding="utf-8")
        forget_loaded()
        return load_tool(name, str(path), cfg or {})

    return load


def call(tool, params=None, **kwargs):
    """Call a tool as a worker does."""
    return tool.run(*tool.check(params), kwargs)


# Kinds of tools -----------------------------------------------------------------------------------------------------


def test_class_is_called_with_json_text_and_kwargs(load):
    tool = load(
        """
        class Anything:
            name, description = "t", "says what it got"
            parameters = [{"name": "n", "type": "integer", "required": True}]

            def call(self, params, **kwargs):
                return [params, kwargs]
        """
    )
    assert tool.info() == {"name": "t", "description": "says what it got", "parameters": NUMBER}
    assert call(tool, '{"n": 1}', key="k") == ['{"n": 1}', {"key": "k"}]
    text, kwargs = call(tool, {"n": 1, "other": None})
    assert (json.loads(text), kwargs) == ({"n": 1, "other": None}, {})


def test_function_is_called_with_arguments_by_name(load):
    tool = load(
        '''
        def t(n: int, unit: str = "m") -> str:
            """Measure.

            Args:
                n: how many
            """
            return "%d %s" % (n, unit)
        '''
    )
    assert tool.description == "Measure."
    assert tool.parameters["properties"]["n"] == {"type": "integer", "description": "how many"}
    assert call(tool, {"n": 2}) == "2 m"
    assert call(tool, '{"n": 2, "unit": "km"}', key="not for it") == "2 km"
    with pytest.raises(ValueError, match="there is no argument `units`; did you mean 'unit'"):
        call(tool, {"n": 2, "units": "km"})


def test_arguments_of_a_function_come_before_kwargs_of_the_same_name(load):
    tool = load("def t(n, **more): return n, more")
    assert call(tool, {"n": 1, "a": 2}, n=3, a=4, b=5) == (1, {"a": 2, "b": 5})


@pytest.mark.parametrize(
    "source",
    [
        "async def t(n: int): return n + 1",
        "import json\nclass T:\n  name = 't'\n  async def call(self, params): return json.loads(params)['n'] + 1",
        "import asyncio\nasync def later(n): return n + 1\ndef t(n): return later(n)",
    ],
    ids=["function", "method", "something to be awaited"],
)
@pytest.mark.usefixtures("loop")
def test_asynchronous_tool_is_awaited_at_every_call(load, source):
    tool = load(source)
    assert [call(tool, {"n": 1}), call(tool, {"n": 2})] == [2, 3]


KEEPS = """
import asyncio
class T:
  name = 't'
  def __init__(self): self.made = %s
  async def call(self, params):
    loop = asyncio.get_event_loop()
    self.made = self.made or asyncio.Event()
    if json.loads(params): raise SystemExit
    loop.call_soon(self.made.set)
    await self.made.wait()
    self.made.clear()
    self.loops = getattr(self, "loops", []) + [loop]
    return len(set(map(id, self.loops)))
import json
"""


@pytest.mark.parametrize("made", ["None", "asyncio.Event()"])
@pytest.mark.usefixtures("loop")
def test_asynchronous_tool_may_keep_what_belongs_to_its_loop(load, made):
    tool = load(KEEPS % made)
    assert [call(tool), call(tool)] == [1, 1]
    with pytest.raises(SystemExit):
        call(tool, {"exit": 1})
    assert call(tool) == 1


@pytest.mark.parametrize(
    ("signature", "got"),
    [
        ("params, **kwargs", {"key": "k", "user": "u"}),
        ("params, key=None", {"key": "k"}),
        ("params, *, user", {"user": "u"}),
        ("params", {}),
    ],
)
def test_method_gets_the_kwargs_that_it_takes(load, signature, got):
    body = "return {name: value for name, value in {**locals(), **locals().get('kwargs', {})}.items()}"
    tool = load("class T:\n  name = 't'\n  def call(self, %s): %s" % (signature, body))
    assert {name: value for name, value in call(tool, key="k", user="u").items() if value in ("k", "u")} == got


@pytest.mark.parametrize(
    ("attributes", "name"),
    [
        ("name = 'wanted'", "wanted"),  # by its attribute
        ("pass", "Wanted"),  # by the name of the class
        ("name = ''", "Wanted"),
        ("name = property(lambda self: 'wanted')", "Wanted"),
    ],
)
def test_class_is_found_by_its_name(load, attributes, name):
    source = "class Other:\n  name = 'other'\nclass Wanted:\n  %s\n  def call(self, params): return 'this one'"
    tool = load(source % attributes, name)
    assert call(tool) == "this one"
    assert tool.name.lower() == "wanted"


def test_tool_of_json_schema_and_one_without_parameters(load):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "required": ["n"]}
    source = "class T:\n  name = 't'\n  %s\n  def call(self, params): return params"
    tool = load(source % ("parameters = %r" % schema))
    assert tool.info()["parameters"] == schema
    with pytest.raises(ValueError, match="argument n must be at least 1"):
        call(tool, {"n": 0})
    assert call(load(source % "pass")) == "{}"
    assert call(load(source % "parameters = ({'name': 'n'},)"), {"n": 1}) == '{"n":1}'


# Params -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "argument n is missing"),
        ("", "argument n is missing"),
        (None, "argument n is missing"),
        ({"n": "1"}, 'argument n must be an integer, got a string ("1")'),
        ({"n": None}, "argument n must be an integer, got null"),
        ([], "params must be a JSON object, got an array"),
        ('["n"]', "params must be a JSON object, got an array"),
        (7, "params must be a JSON object, got a number"),
        ('{"n": ', "params is not JSON"),
        ('{"n": NaN}', "NaN is not a JSON value"),
        ('{"n": %s}' % ("[" * 100000), "params is not JSON: the JSON is nested too deeply"),
    ],
)
def test_bad_params_are_refused_by_name(load, params, message):
    tool = load("class T:\n  name = 't'\n  parameters = %r\n  def call(self, params): pass" % NUMBER)
    with pytest.raises(ValueError, match="(?s).*") as refused:
        tool.check(params)
    assert message in str(refused.value)


# Cfg ----------------------------------------------------------------------------------------------------------------

BASED = """
from modelscope_agent.tools.base import BaseTool, register_tool

@register_tool("t")
class Based(BaseTool):
    name = "t"

    def call(self, params, **kwargs):
        return self.cfg
"""


@pytest.mark.parametrize("cfg", [{"a": 1}, {"t": {"a": 1}}, {"t": {"a": 1}, "other": {"a": 2}}])
def test_tool_of_modelscope_gets_its_part_of_the_cfg(load, cfg):
    assert call(load(BASED, cfg=cfg))["a"] == 1


def test_plain_class_gets_the_cfg_as_it_is_and_one_that_takes_none_gets_none(load):
    source = "class T:\n  name = 't'\n  %s\n  def call(self, params): return getattr(self, 'cfg', None)"
    assert call(load(source % "def __init__(self, cfg): self.cfg = cfg", cfg={"t": {"a": 1}})) == {"t": {"a": 1}}
    assert call(load(source % "def __init__(self): pass", cfg={"a": 1})) is None
    assert call(load(source % "pass", cfg={"a": 1})) is None


# modelscope-agent ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "holder"),
    [
        ("from modelscope_agent.tools import base", "base"),
        ("from modelscope_agent import tools", "tools"),
        ("import modelscope_agent.tools.base as base", "base"),
        ("import modelscope_agent.tools.base", "modelscope_agent.tools.base"),
    ],
)
def test_stand_in_is_imported_in_every_way(load, statement, holder):
    names = "BaseTool, register_tool = %s.BaseTool, %s.register_tool" % (holder, holder)
    source = BASED.replace("from modelscope_agent.tools.base import BaseTool, register_tool", statement + "\n" + names)
    assert call(load(source, cfg={"a": 1}))["a"] == 1


def test_registered_name_is_found_before_any_other(load):
    source = BASED + "\nclass Other(BaseTool):\n    name = 'other'\n\n    def call(self, params): return 'other'\n"
    assert call(load(source.replace('"t")', '"other")'), "other", cfg={"a": 1})) == {"a": 1}
    assert call(load("%s\n\n@register_tool('f')\ndef g(): return 'g'" % source, "f")) == "g"


def test_installed_package_is_used_where_there_is_one(load, tmp_path):
    for name in ("modelscope_agent/__init__.py", "modelscope_agent/tools/__init__.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    base = "class BaseTool:\n  def __init__(self, cfg): self.cfg = {'installed': cfg}\n"
    base += "register_tool = lambda name: lambda cls: cls"
    (tmp_path / "modelscope_agent" / "tools" / "base.py").write_text(base)
    sys.path.insert(0, str(tmp_path))
    assert call(load(BASED, cfg={"a": 1})) == {"installed": {"a": 1, "t": {"a": 1}}}


INSTALLED = """
class Registry(dict):
    def __getitem__(self, name): raise ImportError(name)
    get = __contains__ = __iter__ = items = keys = values = __getitem__

TOOL_REGISTRY = Registry(its_own={'class': int})

def register_tool(name):
    def register(cls):
        TOOL_REGISTRY[name] = %s
        return cls
    return register

class BaseTool:
    def __init__(self, cfg): self.cfg = {}
"""


@pytest.mark.parametrize("entry", ["{'class': cls}", "cls"])
def test_what_is_registered_in_the_installed_package_is_found(load, tmp_path, entry):
    for name in ("modelscope_agent/__init__.py", "modelscope_agent/tools/__init__.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    (tmp_path / "modelscope_agent" / "tools" / "base.py").write_text(INSTALLED % entry)
    sys.path.insert(0, str(tmp_path))
    source = BASED.replace('register_tool("t")', 'register_tool("another")')
    assert call(load(source, "another")) == {}
    with pytest.raises(UsageError, match="did you mean 'another'"):
        load(source, "anther")


def test_tools_of_two_files_are_loaded_by_one_process(load, tmp_path):
    load(BASED)
    (tmp_path / "second.py").write_text(BASED.replace("self.cfg", "2"))
    assert call(load_tool("t", str(tmp_path / "second.py"), {})) == 2
    (tmp_path / "third.py").write_text("def t(): return 3")
    assert call(load_tool("t", str(tmp_path / "third.py"), {})) == 3, "and not what an earlier one has registered"


def test_tool_verifies_its_arguments_itself_as_the_original_does(load):
    source = BASED.replace("return self.cfg", "return self._verify_args(kwargs['given'])")
    tool = load(source.replace('name = "t"', 'name = "t"\n    parameters = %r' % NUMBER))
    assert call(tool, {"n": 1}, given='{"n": "as\nit is"}') == {"n": "as\nit is"}
    with pytest.raises(ValueError, match="param `n` is required"):
        call(tool, {"n": 1}, given="{}")
    schema = {"type": "object", "properties": {"n": {}}, "required": ["n"]}
    tool = load(source.replace('name = "t"', 'name = "t"\n    parameters = %r' % schema))
    with pytest.raises(ValueError, match="param `n` is required"):
        call(tool, {"n": 1}, given="{}")


# Files --------------------------------------------------------------------------------------------------------------


def test_tool_file_may_be_named_like_a_module_of_python_and_stand_beside_others(load, tmp_path):
    (tmp_path / "random.py").write_text("raise SystemExit('this hides the one of Python')")
    (tmp_path / "beside.py").write_text("VALUE = 7")
    sys.modules.pop("random", None)
    tool = load("import json, random, beside\ndef t(): return json.dumps(beside.VALUE)", file_name="json.py")
    assert call(tool) == "7"
    assert hasattr(sys.modules["json"], "dumps")


# A metaclass of an attribute that raises.
RAISES = "class Meta(type):\n  @property\n  def %s(cls): raise RuntimeError('no')\n"
NO_TOOL = "class Weather:\n  def call(self, params): pass\ndef helper(): pass\nfrom os import getcwd\n_hidden = helper"


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (NO_TOOL, "forecast", "has no tool 'forecast'; known are Weather, helper"),
        (NO_TOOL, "weather", "has no tool 'weather'; did you mean 'Weather'?"),
        (NO_TOOL, "getcwd", "has no tool 'getcwd'"),
        ("", "t", "has no tool 't'; known are none"),
        ("t = 5", "t", "has no tool 't'"),
        ("def t(:", "t", "cannot be loaded: SyntaxError: invalid syntax (tool.py, line 1)"),
        ("import no_such_thing", "t", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("raise SystemExit(4)", "t", "cannot be loaded: SystemExit: 4"),
        ("def t(*args): pass", "t", "the tool t: t takes *args"),
        ("class t:\n  pass", "t", "the tool t needs a description, which is a text, and a method call"),
        ("class t:\n  description = 1\n  call = print", "t", "needs a description"),
        ("class t:\n  def __init__(self): raise KeyError('x')", "t", "the tool t cannot be made: KeyError: 'x'"),
        ("class t:\n  def __init__(self): raise ValueError('no key')", "t", "the tool t: no key"),
        ("class t:\n  def __init__(self, a, b): pass", "t", "the tool t cannot be made: TypeError"),
        ("class t:\n  call = property(lambda self: 1 / 0)", "t", "the tool t cannot be made: ZeroDivisionError"),
        ("class t:\n  call = print\n  parameters = 5", "t", "has bad parameters: parameters must be a list"),
        ("class t:\n  call = print\n  parameters = [{}]", "t", "has bad parameters: parameters[0] has no name"),
        (RAISES % "__module__" + "class t(metaclass=Meta): pass", "t", "the tool t cannot be made: RuntimeError: no"),
        (RAISES % "name" + "class t(metaclass=Meta): pass", "t", "the tool t cannot be made: RuntimeError: no"),
        (RAISES % "name" + "class u(metaclass=Meta): pass", "t", "the tool t cannot be made: RuntimeError: no"),
        ("class t:\n  call = print\n  name = property(lambda self: 1 / 0)", "t", "cannot be made: ZeroDivisionError"),
        (
            "class t:\n  def __init__(self): raise type('E', (ValueError,), {'__str__': None})",
            "t",
            "the tool t: its mess",
        ),
        ("class t:\n  def __init__(self): raise ValueError('a\\nb')", "t", "the tool t: a b"),
        (
            "class t:\n  call = print\n  parameters = [{'name': {1}}]",
            "t",
            "has bad parameters: parameters must be JSON",
        ),
    ],
)
def test_file_without_a_good_tool_is_refused_with_the_reason(load, source, name, message):
    if "SyntaxError" in message and sys.version_info >= (3, 9):
        message = message.partition("invalid")[0]  # newer ones have words of their own for each mistake
    with pytest.raises(UsageError) as refused:
        load(source, name)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.py", "there is no tool file"), (".", "there is no tool file"), ("tool.txt", "must end in .py")],
)
def test_file_that_is_no_python_file_is_refused(tmp_path, name, message):
    (tmp_path / "tool.txt").write_text("def t(): pass")
    with pytest.raises(UsageError, match=message):
        load_tool("t", str(tmp_path / name), {})


def test_unknown_built_in_tool_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="no built-in tool 'image-gen'; did you mean 'image_gen'"):
        load_tool("image-gen", None, {})


# What is said of errors, and what is not ----------------------------------------------------------------------------


class Unspeakable(Exception):
    def __str__(self):
        raise self


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("two\n lines "), "ValueError: two lines"),
        (AssertionError(), "AssertionError"),
        (Unspeakable(), "Unspeakable: its message cannot be made (Unspeakable)"),
    ],
)
def test_error_is_said_in_a_line(error, said):
    assert raised(error) == said


def test_secrets_are_told_by_their_names_however_deep():
    value = {"api_key": "a", "plain": "b", "list": [{"Token": {"any": ["c", 1]}}], "x": {"password": "d"}}
    assert sorted(secrets_in(value)) == ["1", "a", "c", "d"]
    deep = {"key": "a"}
    for _ in range(5000):
        deep = {"part": deep}
    assert secrets_in(deep) == ["a"]


# Built-in tools -----------------------------------------------------------------------------------------------------


class WebService(http.server.HTTPServer):
    """Answers one request after the other with what `answers` has: (status, JSON value or bytes)."""

    def __init__(self, *answers):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.answers, self.asked = list(answers), []
        self.url = "http://127.0.0.1:%d" % self.server_address[1]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.server.asked.append((self.command, self.path, self.headers, body and json.loads(body.decode())))
            status, value = self.server.answers.pop(0)
            if status is None:
                self.wfile.write(value)
                return
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET

        def log_message(self, *_):
            pass


@contextlib.contextmanager
def built_in(name, *answers, cfg=None):
    """(tool, service) for a built-in tool whose service answers that."""
    with serving(WebService(*answers)) as service:
        yield load_tool(name, None, {"base_url": service.url + "/", "api_key": "k/1+2", **(cfg or {})}), service


def test_renewing_an_instance_says_what_the_original_says():
    tool = load_tool("RenewInstance", None, {"test": "xxx"})
    assert call(tool, '{"instance_id": 123, "period": "mon"}') == "已完成ECS实例ID为123的续费，续费时长mon月"
    with pytest.raises(ValueError, match="argument period is missing"):
        call(tool, '{"instance_id": 123}')


DISTRICT = (200, {"status": "1", "districts": [{"adcode": "110108"}]})
LIVE = (200, {"status": "1", "lives": [{"weather": "晴", "temperature": "21"}]})


def test_weather_is_asked_for_by_the_code_of_the_place():
    with built_in("amap_weather", DISTRICT, LIVE) as (tool, service):
        assert call(tool, {"location": "海淀区"}) == "海淀区的天气是晴温度是21度。"
    first, second = (urlsplit(asked[1]) for asked in service.asked)
    assert (first.path, second.path) == ("/v3/config/district", "/v3/weather/weatherInfo")
    assert parse_qs(first.query) == {"keywords": ["海淀区"], "subdistrict": ["0"], "key": ["k/1+2"]}
    assert parse_qs(second.query) == {"city": ["110108"], "key": ["k/1+2"]}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"status": "0", "info": "INVALID_USER_KEY"}), "AMap refused: INVALID_USER_KEY"),
        ((200, {"districts": []}), "AMap knows no such place"),
        ((200, {"districts": [1]}), "AMap refused"),
        ((200, []), "AMap refused"),
        ((200, b"<html>"), "answer cannot be read: JSONDecodeError"),
        ((200, b"\xff"), "answer cannot be read"),
        ((503, b"busy"), "the service answered 503: busy"),
        ((302, b""), "the service answered 302"),
        ((None, b"SSH-2.0\r\n"), "answer cannot be read: BadStatusLine"),
        ((None, b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n{"), "answer cannot be read"),
        ((None, b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx"), "answer cannot be read: IncompleteRead"),
        ((None, b""), "the service does not answer|answer cannot be read"),
    ],
)
def test_what_the_weather_service_says_is_passed_on_without_the_key(answer, message):
    with built_in("amap_weather", answer) as (tool, _), pytest.raises((RuntimeError, ValueError), match=message) as got:
        call(tool, {"location": "x"})
    assert "k/1+2" not in str(got.value)
    assert "k%2F1%2B2" not in str(got.value)


def test_opener_for_keys_follows_no_redirect_and_takes_handlers():
    with serving(WebService((302, b""))) as service, pytest.raises(urllib.error.HTTPError) as refused:
        direct_opener(urllib.request.ProxyHandler({"http": service.url})).open("http://host.invalid/there")
    with refused.value:
        assert refused.value.code == 302
    assert [asked[1] for asked in service.asked] == ["http://host.invalid/there"]


def test_service_that_does_not_listen_is_an_error():
    with built_in("amap_weather") as (tool, _):
        pass
    with pytest.raises(RuntimeError, match="the service does not answer: .*refused"):
        call(tool, {"location": "x"})


def task(status, **more):
    return 200, {"output": {"task_id": "t-1", "task_status": status, **more}}


IMAGE = task("SUCCEEDED", results=[{"url": "https://host/i.png?a=1"}])


def test_image_is_asked_for_until_it_is_made(monkeypatch):
    pauses = []
    monkeypatch.setattr(rock_ms.time, "sleep", pauses.append)
    with built_in("image_gen", task("PENDING"), task("RUNNING"), IMAGE) as (tool, service):
        answer = call(tool, {"text": "a cat", "resolution": "720*1280"}, dashscope_api_key="its-own")
    assert answer == "![IMAGEGEN](https://host/i.png?a=1)"
    assert [asked[:2] for asked in service.asked] == [
        ("POST", "/api/v1/services/aigc/text2image/image-synthesis"),
        ("GET", "/api/v1/tasks/t-1"),
        ("GET", "/api/v1/tasks/t-1"),
    ]
    assert {asked[2]["Authorization"] for asked in service.asked} == {"Bearer its-own"}
    assert service.asked[0][2]["X-DashScope-Async"] == "enable"
    parameters = {"n": 1, "size": "720*1280"}
    assert service.asked[0][3] == {"model": "wanx-v1", "input": {"prompt": "a cat"}, "parameters": parameters}
    assert pauses == [0.5, 1.0]


def test_image_of_an_unknown_resolution_and_of_another_model():
    with built_in("image_gen", IMAGE, cfg={"model": "wanx-v2"}) as (tool, service):
        call(tool, {"text": "a cat", "resolution": "1*1"})
    assert service.asked[0][3]["model"] == "wanx-v2"
    assert service.asked[0][3]["parameters"]["size"] == "1280*720"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, {"code": "InvalidApiKey"}), 'the service answered 400: {"code": "InvalidApiKey"}'),
        ((200, {"code": "x"}), "DashScope answered without an output"),
        (task("FAILED", message="no"), 'DashScope made no image: .*"no"'),
        (task("SUCCEEDED", results=[]), "DashScope made no image"),
        (task("SUCCEEDED", results=[{"code": "x"}]), "DashScope made no image"),
        (task("PENDING", task_id="../x"), "DashScope's answer has no task_id"),
    ],
)
def test_what_the_image_service_says_is_passed_on(monkeypatch, answer, message):
    monkeypatch.setattr(rock_ms.time, "sleep", lambda _: None)
    with built_in("image_gen", answer) as (tool, _), pytest.raises(RuntimeError, match=message):
        call(tool, {"text": "a cat"})


def test_key_of_the_environment_goes_to_a_service_of_the_environment_only(monkeypatch):
    monkeypatch.setenv("AMAP_TOKEN", "of-the-environment")
    with built_in("amap_weather", DISTRICT, LIVE, cfg={"api_key": ""}) as (tool, service):
        with pytest.raises(ValueError, match="amap_weather needs a key.*amap_api_key in the call's kwargs.*tool_cfg$"):
            call(tool, {"location": "x"})
        monkeypatch.setenv("AMAP_BASE_URL", service.url)
        call(load_tool("amap_weather", None, {}), {"location": "x"})
    assert {parse_qs(urlsplit(asked[1]).query)["key"][0] for asked in service.asked} == {"of-the-environment"}
    monkeypatch.delenv("AMAP_TOKEN")
    with pytest.raises(ValueError, match="or as AMAP_TOKEN in its environment"):
        call(load_tool("amap_weather", None, {}), {"location": "x"})


@pytest.mark.parametrize("key", ["two words", "zwölf", 5, ["k"]])
def test_key_that_cannot_be_sent_is_refused(key):
    with built_in("image_gen") as (tool, _), pytest.raises(ValueError, match="the key of image_gen must be printable"):
        call(tool, {"text": "a cat"}, dashscope_api_key=key)


@pytest.mark.parametrize("url", ["ftp://host", "https://user:key@host", "host", 5])
def test_base_url_that_cannot_be_meant_is_refused_at_the_start(url):
    with pytest.raises(UsageError, match="the tool image_gen: its base_url must be a URL without a key in it"):
        load_tool("image_gen", None, {"base_url": url})
