"""The `traj` command: what it shows of a trajectory, whatever that holds."""

import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import time

import pytest

from rock_ms import TRAJ_COLUMNS, TRAJ_TABLE, TRAJ_TABS, CallSummary, conversation, main, printable
from support import SCRIPT, chat, clean_environ, completion, run_cli


def record(**fields):
    """A call as the proxy writes it down."""
    common = {"request": chat("hi"), "response": completion("hello"), "model": "m", "stream": False}
    common.update(method="POST", path="/v1/chat/completions", attempts=1, error=None)
    common.update(start_time=1700000000.25, end_time=1700000001.5, response_time=1.25, status=200)
    return {**common, **fields}


def written(tmp_path, *calls):
    """A file of these calls, objects or lines."""
    path = tmp_path / "traj.jsonl"
    lines = [call if isinstance(call, bytes) else json.dumps(call).encode("utf-8") + b"\n" for call in calls]
    path.write_bytes(b"".join(lines))
    return path


def traj(path, *flags, check=0, **options):
    """The command as a process."""
    return run_cli("traj", path, *flags, check=check, **options)


def shown(path, *flags):
    """What the command prints, run to its good end in this process."""
    with io.TextIOWrapper(io.BytesIO(), "utf-8") as out, contextlib.redirect_stdout(out):
        assert main(["traj", str(path), *flags]) == 0
        return out.buffer.getvalue().decode("utf-8")


def rows(path, *flags):
    """What is shown, without the header."""
    header, *lines = shown(path, *flags).split("\n")
    assert header == (TRAJ_TABLE if flags else TRAJ_TABS) % TRAJ_COLUMNS and lines.pop() == ""
    return lines


def what_of(**fields):
    """The last column of a call's row."""
    return CallSummary.of(1, record(**fields)).row()[-1]


def objects(path):
    """What is shown with --json."""
    return [json.loads(line) for line in shown(path, "--json").split("\n")[:-1]]


def function(name, arguments="{}"):
    return {"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}


# ----------------------------------------------------------------------------------------------------------------------
# The table.
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_calls(tmp_path):
    return written(tmp_path, record(), b"\n", record(model="a/b", status=429, response=None, error="busy", attempts=3))


TABLE = [
    " line  time                 model                     status    seconds   tok. in  tok. out  what",
    "    1  2023-11-14 22:13:20  m                            200      1.250         1         2",
    "    3  2023-11-14 22:13:20  a/b                          429      1.250         -         -  3 attempts; busy",
]


def test_table_on_a_terminal_has_a_row_for_each_call(two_calls):
    leader, follower = os.openpty()
    with open(leader, "rb", 0) as screen:
        command = [sys.executable, SCRIPT, "traj", str(two_calls)]
        subprocess.run(command, stdout=follower, env=clean_environ(TZ="UTC"), check=True)
        assert screen.read(4096).decode().splitlines() == TABLE
        os.close(follower)


def test_table_of_what_was_said_is_that_of_a_terminal(two_calls):
    shown = traj(two_calls, "--full", env=clean_environ(TZ="UTC")).out
    assert [line for line in shown.splitlines() if line in TABLE] == TABLE


def test_table_that_is_piped_has_tabs(two_calls):
    """Each row has as many, so that `cut -f` finds each column, whatever the call holds."""
    assert traj(two_calls, env=clean_environ(TZ="UTC")).out.splitlines() == [
        "line\ttime\tmodel\tstatus\tseconds\ttok. in\ttok. out\twhat",
        "1\t2023-11-14 22:13:20\tm\t200\t1.250\t1\t2\t",
        "3\t2023-11-14 22:13:20\ta/b\t429\t1.250\t-\t-\t3 attempts; busy",
    ]
    assert what_of(error="a\tb\nc") == "a\\tb\\nc"


def test_what_is_not_known_is_a_dash(tmp_path):
    (row,) = rows(written(tmp_path, {"request": None, "response": None}))
    assert row.split() == ["1", "-", "-", "200", "-", "-", "-"]


WHAT = {
    "": {},
    "stream": {"stream": True},
    "cut off; broken": {"partial": True, "error": "broken"},
    "2 attempts": {"attempts": 2},
    "POST /v1/embeddings": {"path": "/v1/embeddings"},
    "GET /v1/files; stream": {"method": "GET", "path": "/v1/files", "stream": True},
    "calls f, g": {"response": completion(None, tool_calls=[function("f"), function("g")])},
    "length": {"response": {"choices": [{"message": {"content": "x"}, "finish_reason": "length"}]}},
    "boom": {"error": "boom", "status": 502, "response": None},
}


@pytest.mark.parametrize("what, fields", WHAT.items())
def test_last_column_says_what_was_special(what, fields):
    assert what_of(**fields) == what


USAGES = {
    "chat": ({"usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}, 3, 4),
    "Responses": ({"usage": {"input_tokens": 3, "output_tokens": 4}}, 3, 4),
    "Messages": ({"type": "message", "usage": {"input_tokens": 3, "output_tokens": 4}}, 3, 4),
    "embeddings": ({"usage": {"prompt_tokens": 3, "total_tokens": 3}}, 3, None),
    "zero": ({"usage": {"prompt_tokens": 0, "completion_tokens": 0}}, 0, 0),
    "none": ({}, None, None),
    "null": ({"usage": None}, None, None),
    "events of Responses": (
        [
            {"event": "response.created", "data": {"response": {"usage": None}}},
            {"event": "response.completed", "data": {"response": {"usage": {"input_tokens": 3, "output_tokens": 4}}}},
        ],
        3,
        4,
    ),
    "events of Messages": (
        [
            {"event": "message_start", "data": {"message": {"usage": {"input_tokens": 3, "output_tokens": 1}}}},
            {"event": "ping", "data": "x"},
            {"event": "message_delta", "data": {"usage": {"output_tokens": 4}}},
        ],
        3,
        4,
    ),
    "events of others": ([{"data": {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}}, {"data": "[DONE]"}], 3, 4),
    "nulls among events": (
        [
            {"data": {"message": {"usage": {"input_tokens": 3, "output_tokens": None}}}},
            {"data": {"usage": {"input_tokens": None, "output_tokens": 4}}},
        ],
        3,
        4,
    ),
}


@pytest.mark.parametrize("response, prompt, answered", USAGES.values(), ids=list(USAGES))
def test_tokens_of_every_api_are_found(response, prompt, answered):
    summary = CallSummary.of(1, record(response=response))
    assert (summary.prompt_tokens, summary.completion_tokens) == (prompt, answered)


def test_json_has_one_object_a_call(tmp_path):
    tools = completion(None, tool_calls=[function("f"), function("g")])
    path = written(tmp_path, record(), record(response=tools, stream=True, partial=True, error="boom", status=502))
    first, second = objects(path)
    assert first == {
        "line": 1,
        "time": 1700000000.25,
        "model": "m",
        "method": "POST",
        "path": "/v1/chat/completions",
        "stream": False,
        "status": 200,
        "seconds": 1.25,
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "finish_reason": "stop",
        "tool_calls": [],
        "attempts": 1,
        "partial": False,
        "error": None,
    }
    changed = {"line": 2, "stream": True, "status": 502, "partial": True, "error": "boom"}
    assert second == {**first, **changed, "finish_reason": "tool_calls", "tool_calls": ["f", "g"]}


def test_records_of_the_local_type_and_of_rock_are_read(tmp_path):
    local = {"request": chat(), "response": completion(), "model": "m", "stream": True, "error": None, "status": 200}
    bare = {"request": chat(), "response": completion()}
    failed = {"request": chat(), "response": None, "status": "failure"}
    calls = [
        {**local, "index": 7},
        bare,
        {**bare, "status": "success"},
        {**failed, "error": "upstream_status=503"},
        failed,
    ]
    got = objects(written(tmp_path, *calls))
    assert [entry["status"] for entry in got] == [200, 200, 200, 503, 502]
    assert [entry["model"] for entry in got] == ["m", None, None, None, None]
    assert [entry["completion_tokens"] for entry in got] == [2, 2, 2, None, None]


# ----------------------------------------------------------------------------------------------------------------------
# What was said.
# ----------------------------------------------------------------------------------------------------------------------

SAID = {
    "message and answer": (record(), ["user: hi", "answer: hello"]),
    "several lines": (
        record(request=chat("a\nb"), response=completion("c\n\nd")),
        ["user: a", "b", "answer: c", "", "d"],
    ),
    "reasoning": (
        record(response=completion("yes", reasoning_content="well")),
        ["user: hi", "reasoning: well", "answer: yes"],
    ),
    "reasoning by another name": (
        record(response=completion("yes", reasoning="well")),
        ["user: hi", "reasoning: well", "answer: yes"],
    ),
    "tool calls": (
        record(response=completion(None, tool_calls=[function("f", '{"x": 1}'), function("g", {"y": "é"})])),
        ["user: hi", 'calls: f({"x": 1})', 'calls: g({"y":"é"})'],
    ),
    "tool calls and content": (
        record(response=completion("so", tool_calls=[function("f")])),
        ["user: hi", "answer: so", "calls: f({})"],
    ),
    "tool calls in the request": (
        record(
            request={
                "messages": [
                    {"role": "assistant", "content": None, "tool_calls": [function("f")]},
                    {"role": "tool", "content": "42"},
                ]
            }
        ),
        ["calls: f({})", "tool: 42", "answer: hello"],
    ),
    "choices": (
        record(
            response={"choices": [{"index": 0, "message": {"content": "a"}}, {"index": 1, "message": {"content": "b"}}]}
        ),
        ["user: hi", "answer 0: a", "answer 1: b"],
    ),
    "legacy": (
        record(request={"prompt": "Once"}, response={"choices": [{"index": 0, "text": "upon"}]}),
        ["request: {", '"prompt": "Once"', "}", "answer: upon"],
    ),
    "parts": (
        record(
            request=chat([{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:"}}, "x"])
        ),
        ["user: see", "[image_url]", "x", "answer: hello"],
    ),
    "error": (record(response=None, error="boom", status=502), ["user: hi", "error: boom"]),
    "error with a body": (
        record(response={"error": {"message": "no"}}, error="no", status=400),
        ["user: hi", "answer: {", '"error": {', '"message": "no"', "}", "}", "error: no"],
    ),
    "another API": (
        record(request={"input": "é"}, response={"data": [1]}),
        ["request: {", '"input": "é"', "}", "answer: {", '"data": [', "1", "]", "}"],
    ),
    "events": (
        record(response=[{"event": "ping", "data": "x"}]),
        ["user: hi", "answer: [", "{", '"event": "ping",', '"data": "x"', "}", "]"],
    ),
    "texts": (record(request="plain", response="text"), ["request: plain", "answer: text"]),
    "nothing": (record(request=None, response=None), []),
    "empty answer": (record(response=completion("")), ["user: hi", "answer:"]),
    "messages that are none": (record(request={"messages": ["x", 7]}), ['message: "x"', "message: 7", "answer: hello"]),
}


@pytest.mark.parametrize("call, lines", SAID.values(), ids=list(SAID))
def test_what_was_said_is_shown(call, lines):
    assert [re.sub(r": +", ": ", line.strip(), count=1) for line in conversation(call, [])] == lines


def test_what_was_said_stands_below_its_row(tmp_path):
    lines = rows(written(tmp_path, record(), record(request=chat("a\nb"))), "--full")
    assert lines[1:4] == ["    user:      hi", "    answer:    hello", ""]
    assert lines[5:] == ["    user:      a", "               b", "    answer:    hello", ""]


def test_messages_of_the_call_before_are_not_repeated(tmp_path):
    first = [{"role": "system", "content": "be good"}, {"role": "user", "content": "one"}]
    second = first + [{"role": "assistant", "content": "hello"}, {"role": "user", "content": "two"}]
    other = [{"role": "user", "content": "another"}]
    path = written(
        tmp_path, *[record(request={"messages": messages}) for messages in (first, second, other, second, second)]
    )
    calls = shown(path, "--full").split("\n\n")
    said = [[word for word in ("be good", "one", "two", "another") if word in call] for call in calls[:5]]
    assert said == [["be good", "one"], ["two"], ["another"], ["be good", "one", "two"], []]
    assert ["as in the call before: %d" % count in call for call, count in zip(calls, (0, 2, 0, 0, 4))] == [
        False,
        True,
        False,
        False,
        True,
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Files.
# ----------------------------------------------------------------------------------------------------------------------

TORN = [b'{"request":{"mess', b'{"request":"\xc3', b"oops", b'{"request":1}', b"[1]"]


@pytest.mark.parametrize("torn", TORN)
def test_torn_last_line_is_told_and_no_failure(tmp_path, torn):
    got = traj(written(tmp_path, record(), record(), torn), "--json" if torn == TORN[1] else "--full")
    assert got.err == "rock-ms: line 3: torn: its writer was stopped\n"
    assert len(re.findall('^ {4}[12]  |"line":[12],', got.out, re.MULTILINE)) == 2


def test_last_line_without_its_end_is_shown_where_it_is_whole(tmp_path):
    path = written(tmp_path, record(), json.dumps(record()).encode("utf-8"))
    assert len(rows(path)) == 2 and traj(path).err == ""


BAD_LINES = {
    b"oops": "the line is not JSON",
    b'{"request":{"mess': "the line is not JSON",
    b"[1]": "the line must be a JSON object, got an array",
    b"null": "the line must be a JSON object, got null",
    b'{"request":{}}': "a call needs both request and response",
    b'{"request":{},"response":{},"status":"x"}': 'status must be a number from 100 to 599, got "x"',
    b'{"request":{},"response":{},"status":99}': "status must be a number from 100 to 599, got 99",
    b'{"request":NaN,"response":{}}': "NaN is not a JSON value",
    b'{"request":"\xff","response":{}}': "can't decode byte 0xff",
    b'{"request":%s,"response":{}}' % (b"[" * 100000): "nested too deeply",
    b'{"request":1' + b"0" * 5000 + b"}": "",
}


def test_bad_lines_are_named_and_the_others_are_shown(tmp_path):
    lines = [part for line in BAD_LINES for part in (record(), line + b"\n")]
    got = traj(written(tmp_path, *lines, record()), check=1)
    assert [row.split()[0] for row in got.out.splitlines()] == ["line"] + [str(n) for n in range(1, len(lines) + 2, 2)]
    assert got.err.count("\n") == len(BAD_LINES)
    for complaint, (number, words) in zip(got.err.splitlines(), enumerate(BAD_LINES.values(), 1)):
        assert complaint.startswith("rock-ms: line %d: " % (2 * number)) and words in complaint


def test_file_of_another_kind_is_told_and_not_each_of_its_lines(tmp_path):
    path = written(tmp_path, *[b"LLM_REQUEST_START{}LLM_REQUEST_END{}\n"] * 1000)
    complaints = traj(path, check=1).err.splitlines()
    assert complaints[-2:] == [
        "rock-ms: 980 more lines are no calls",
        "rock-ms: %s is no trajectory, as LLMTraj.jsonl or a recording file is" % path,
    ]
    assert [complaint.split(":")[1] for complaint in complaints[:-2]] == [" line %d" % n for n in range(1, 21)]


def test_one_bad_line_is_enough_to_fail(tmp_path):
    assert traj(written(tmp_path, b"oops\n", record()), check=1).out.count("\n") == 2


@pytest.mark.parametrize("data", [b"", b"\n\n", b" \r\n"])
def test_empty_file_has_no_calls(tmp_path, data):
    got = traj(written(tmp_path, data))
    assert (got.out, got.err) == (TRAJ_TABS % TRAJ_COLUMNS + "\n", "")


def test_standard_input_is_read(tmp_path):
    path = written(tmp_path, record(), record())
    got = traj("-", input=path.read_bytes())
    assert (got.out.split("\n")[1:-1], got.err) == (rows(path), "")


@pytest.mark.parametrize("name, words", [("none.jsonl", "No such file or directory"), (".", "Is a directory")])
def test_what_cannot_be_read_is_told(tmp_path, name, words):
    path = tmp_path / name
    got = traj(path, check=1)
    assert (got.out, got.err) == ("", "rock-ms: cannot read %s: %s\n" % (path, words))


def test_file_that_cannot_be_read_on_is_named():
    """As one on a disk that fails; this one has nothing where its reading begins."""
    got = traj("/proc/self/mem", check=1)
    assert got.err == "rock-ms: cannot read /proc/self/mem: Input/output error\n"


def test_output_that_cannot_be_written_is_no_fault_of_the_file(tmp_path):
    command = [sys.executable, SCRIPT, "traj", str(written(tmp_path, record()))]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=clean_environ())
    assert (done.returncode, done.stderr) == (1, b"rock-ms: [Errno 28] No space left on device\n")


def test_full_and_json_exclude_each_other(tmp_path):
    assert "not allowed with" in traj(written(tmp_path), "--full", "--json", check=2).err


@pytest.mark.parametrize("flag", [[], ["--full"], ["--json"]])
def test_reader_that_has_seen_enough_is_no_failure(tmp_path, flag):
    path = written(tmp_path, *[record()] * 3000)  # more than a pipe holds
    command = [sys.executable, SCRIPT, "traj", str(path), *flag]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environ())
    assert process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(30) == 0


def test_output_is_utf8_whatever_the_locale(tmp_path):
    path = written(tmp_path, record(model="é日", request=chat("ü😀")))
    got = traj(path, "--full", env=clean_environ(LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0"))
    assert "é日" in got.out and "ü😀" in got.out


# ----------------------------------------------------------------------------------------------------------------------
# Hostile content.
# ----------------------------------------------------------------------------------------------------------------------

HOSTILE = "\x1b[2J\x1b]0;x\x07\x08\x00\x7f\x9b31m\r\u202ereversed\u2066\u2069\u200f\u2028\x85"
VISIBLE = r"\x1b[2J\x1b]0;x\x07\x08\x00\x7f\x9b31m\r\u202ereversed\u2066\u2069\u200f\u2028\x85"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def test_printable_text_has_escapes_for_what_a_terminal_obeys():
    assert printable(HOSTILE) == VISIBLE
    assert printable("é日😀\ta\nb\\x1b") == "é日😀\ta\nb\\x1b"
    every = "".join(map(chr, itertools.chain(range(0x2100), range(0xFE00, 0x10000))))
    assert not OBEYED.search(printable(every))


def hostile_call(text):
    calls = [{"function": {"name": text, "arguments": text}}]
    choice = {"message": {"content": text, "reasoning": text, "tool_calls": calls}, "finish_reason": text}
    request = {"messages": [{"role": "user", "content": text}, {"content": [{"type": text}]}, text]}
    return record(model=text, path=text, method=text, error=text, request=request, response={"choices": [choice]})


def test_hostile_text_is_shown_and_not_obeyed(tmp_path):
    texts = [HOSTILE, "a\nb", "\ud800", "\udfff\ud800", "a" * 100000]
    path = written(tmp_path, *map(hostile_call, texts), record(model="last"))
    plain, full = rows(path), rows(path, "--full")
    table = [re.sub("  +", " ", line.replace("\t", " ")).strip() for line in plain]
    assert len(plain) == len(texts) + 1
    assert [re.sub("  +", " ", line).strip() for line in full if re.match(" {0,4}[0-9]", line)] == table
    assert not OBEYED.search("".join(plain + full))
    assert [(entry["model"], entry["tool_calls"]) for entry in objects(path)[:-1]] == [(text, [text]) for text in texts]


def test_hostile_text_is_visible(tmp_path):
    models = {HOSTILE: VISIBLE, "a\n    2  forged": "a\\n    2  forged", "\ud800": "\\ud800"}
    shown = rows(written(tmp_path, *[record(model=model, error="\n") for model in models]))
    assert len(shown) == 3 and all(visible in row for visible, row in zip(models.values(), shown))


@pytest.mark.parametrize(
    "fields",
    [
        {"request": {"messages": [{"role": "user\n    2  2023-11-14 22:13:20  forged", "content": "x"}]}},
        {"response": {"choices": [{"index": "0\n    2  2023-11-14", "message": {"content": "x"}}] * 2}},
    ],
)
def test_line_ends_in_names_forge_no_line(fields):
    lines = "\n".join(conversation(record(**fields), [])).split("\n")
    assert all(re.match(r"    [a-z]", line) for line in lines), lines


WRONG = [None, True, 0, -1, 1e300, 10**30, "", "x", "\ud800\x1b\n", [], {}, [[]], [None], [{}], {"a": 1}, ["x", 7]]
FIELDS = ["request", "response", "model", "stream", "method", "path", "attempts", "partial", "error", "status"]
FIELDS += ["start_time", "response_time"]
PLACES = [(name,) for name in FIELDS] + [
    ("request", "messages"),
    ("request", "messages", 0),
    ("request", "messages", 0, "role"),
    ("request", "messages", 0, "content"),
    ("request", "messages", 0, "content", 0),
    ("request", "messages", 0, "content", 0, "text"),
    ("request", "messages", 0, "content", 0, "type"),
    ("response", "choices"),
    ("response", "choices", 0),
    ("response", "choices", 0, "index"),
    ("response", "choices", 0, "text"),
    ("response", "choices", 0, "finish_reason"),
    ("response", "choices", 0, "message"),
    ("response", "choices", 0, "message", "role"),
    ("response", "choices", 0, "message", "content"),
    ("response", "choices", 0, "message", "reasoning"),
    ("response", "choices", 0, "message", "tool_calls"),
    ("response", "choices", 0, "message", "tool_calls", 0),
    ("response", "choices", 0, "message", "tool_calls", 0, "function"),
    ("response", "choices", 0, "message", "tool_calls", 0, "function", "name"),
    ("response", "choices", 0, "message", "tool_calls", 0, "function", "arguments"),
    ("response", "usage"),
    ("response", "usage", "prompt_tokens"),
    ("response", "usage", "completion_tokens"),
]
EVENT_PLACES = [
    ("response", 0),
    ("response", 0, "event"),
    ("response", 0, "data"),
    ("response", 0, "data", "usage"),
    ("response", 0, "data", "response"),
    ("response", 0, "data", "message"),
    ("response", 0, "data", "message", "usage"),
    ("response", 0, "data", "message", "usage", "input_tokens"),
]


def replaced(call, place, value):
    """A copy of a call with another value there."""
    call = json.loads(json.dumps(call))
    inner = call
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return call


def odd_calls():
    message = completion("x", reasoning="r", tool_calls=[function("f")])
    call = record(request=chat([{"type": "text", "text": "x"}]), response=message)
    event = {"event": "e", "data": {"usage": {}, "response": {"usage": {}}, "message": {"usage": {"input_tokens": 1}}}}
    for start, places in ((call, PLACES), (record(response=[event]), EVENT_PLACES)):
        yield from (replaced(start, place, value) for place in places for value in WRONG)


@pytest.mark.load
@pytest.mark.parametrize("flag", [[], ["--full"], ["--json"]])
def test_wrong_types_in_every_field_are_survived(tmp_path, flag):
    calls = list(odd_calls())
    got = traj(written(tmp_path, *calls), *flag, check=1)
    named = re.findall(r"^rock-ms: line ([0-9]+): status must be .*$", got.err, re.MULTILINE)
    assert len(named) == got.err.count("\n") and 5 < len(named) < 20  # every line of it; and nothing but bad statuses
    if flag == ["--json"]:
        shown = [json.loads(line)["line"] for line in got.out.split("\n")[:-1]]
    else:
        shown = [int(line) for line in re.findall(r"^ {0,4}([0-9]+)(?:  |\t)[0-9-]", got.out, re.MULTILINE)]
    assert sorted(shown + [int(line) for line in named]) == list(range(1, len(calls) + 1))


NUMBERS = ["1e400", "-1e400", "1e308", "9" * 300, "-9e14", "9e14", "1e15", "0.0000001", "-0.0", "7"]


def test_numbers_of_any_size_are_survived(tmp_path):
    text = json.dumps(record(response={"usage": {"prompt_tokens": "NUMBER", "completion_tokens": "NUMBER"}}))
    text = re.sub(r'("NUMBER"|(?<="attempts": )1|(?<=_time": )[0-9.]+)', "NUMBER", text)
    assert text.count("NUMBER") == 6
    path = written(tmp_path, *[text.replace("NUMBER", number).encode("utf-8") + b"\n" for number in NUMBERS])
    assert len(rows(path)) == len(NUMBERS)
    for number, entry in zip(NUMBERS, objects(path)):
        expected = float(number) if abs(float(number)) < 1e15 else None
        assert [entry[key] for key in ("time", "seconds", "prompt_tokens", "attempts")] == [expected] * 4


# ----------------------------------------------------------------------------------------------------------------------
# Files larger than memory.
# ----------------------------------------------------------------------------------------------------------------------

PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """60 MB of calls of an agent whose conversation grows."""
    path = tmp_path_factory.mktemp("large") / "traj.jsonl"
    messages = [{"role": "user", "content": "x" * 2000} for _ in range(20)]
    line = json.dumps(record(request={"messages": messages}, response=completion("y" * 10000))).encode("utf-8") + b"\n"
    with open(str(path), "wb") as file:
        for _ in range(60000000 // len(line)):
            file.write(line)
    yield path
    os.unlink(str(path))


@pytest.mark.load
@pytest.mark.parametrize("flag", [[], ["--full"], ["--json"]])
def test_large_file_is_not_held_in_memory(large_file, flag):
    command = [sys.executable, "-c", PEAK, sys.executable, SCRIPT, "traj", str(large_file), *flag]
    code, kilobytes = subprocess.check_output(command, env=clean_environ()).split()
    assert code == b"0" and int(kilobytes) < 40000 < large_file.stat().st_size // 1024


def test_first_call_is_shown_before_the_last_has_come():
    command = [sys.executable, SCRIPT, "traj", "-"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean_environ())
    with process:
        data = json.dumps(record()).encode("utf-8") + b"\n"
        process.stdin.write(data * 300)
        process.stdin.flush()
        assert process.stdout.readline().decode("utf-8") == TRAJ_TABS % TRAJ_COLUMNS + "\n"
        assert time.strftime("%Y", time.localtime(1700000000)) in process.stdout.readline().decode("utf-8")
        process.stdin.close()
        assert len(process.stdout.read().splitlines()) == 299
    assert process.returncode == 0
