#!/usr/bin/env python3
"""The ROCK model service in one file: an agent's LLM calls, recorded, and answered by a trainer or a model's server.

Inside a sandbox an agent calls an OpenAI endpoint.  This file is that endpoint.  Of type `local` it writes every call
to a log file, hands it to whoever trains the agent, and carries the answer back.  Of type `proxy` it passes every call
on to a model's server, or answers it from a recording.

    python3 rock_ms.py demo                                   the whole loop, in two seconds
    python3 rock_ms.py start --port 8080                      the service, in the background
    python3 rock_ms.py watch-agent --pid 4242                 end the session when this process ends
    python3 rock_ms.py anti-call-llm --index 0                wait for request 1 and print it
    python3 rock_ms.py anti-call-llm --index 1 --response R   answer request 1, wait for request 2
    python3 rock_ms.py start --type proxy --proxy-base-url https://host/v1
    python3 rock_ms.py start --type proxy --replay-file R     answer from the recording R
    python3 rock_ms.py traj R                                 show a recording
    python3 rock_ms.py stop

Endpoints: POST /v1/chat/completions, GET /v1/models, POST /v1/agent/watch, GET /health, GET /metrics; any /v1/ path of
a proxy.

The marker log, `LLMService.log`, holds one record a line:

    LLM_REQUEST_START{request JSON}LLM_REQUEST_END{"timestamp": <ms>, "index": <n>}
    LLM_RESPONSE_START{response JSON}LLM_RESPONSE_END{"timestamp": <ms>, "index": <n>}
    SESSION_END

It needs Python 3.7 or newer on a POSIX system and nothing else, and it imports nothing of ours: copy this one file
into any sandbox image.  It is read from top to bottom; each section uses only what stands above it:

    Names and limits . JSON text . Errors . Marker records . HTTP messages . Completions . Event streams
    . Tool arguments . Typed functions . YAML . Settings . Files . Marker log . Anti-call . Secrets . Trajectory
    . Processes . HTTP connections . HTTP server . Local session . Local service . Upstreams . Forwarded calls
    . Proxy service . Replay service . Built-in tools . Tools . Tool workers . Tool node . Servers . Standard streams
    . Running a service . Reading trajectories . Command line
"""

from __future__ import annotations  # an older Python fails here: it must be 3.7 or newer

import argparse
import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass, field, fields, replace
from operator import ge, gt, le, lt

# Imports that only the running service needs stand in the functions that need them: `anti-call-llm` runs once a
# turn, and http.server alone would double the time it takes to start.  Patterns that neither a request nor a turn is
# read with are texts, which `re` compiles where they are first used.


# ======================================================================================================================
# Names and limits: the words of the wire formats, and every bound, with its reason.
# ======================================================================================================================

__version__ = "0.1.0"

REQUEST_START_MARKER = "LLM_REQUEST_START"
REQUEST_END_MARKER = "LLM_REQUEST_END"
RESPONSE_START_MARKER = "LLM_RESPONSE_START"
RESPONSE_END_MARKER = "LLM_RESPONSE_END"
SESSION_END_MARKER = "SESSION_END"

LOG_FILE_NAME = "LLMService.log"
TRAJ_FILE_NAME = "LLMTraj.jsonl"
STATE_NAME = "LLMService"  # of the service's state and lock files: NAME.json, NAME.lock
DEFAULT_DATA_DIR = "/data/logs"
FALLBACK_DATA_DIR = "~/.rock/logs"
GIVE_DATA_DIR = "give each command another --data-dir, or set ROCK_MODEL_SERVICE_DATA_DIR"

NO_SSL = "this Python has no ssl module, which https needs"

EXIT_FAILED, EXIT_USAGE, EXIT_NOT_YET = 1, 2, 75
OUT_OF_DESCRIPTORS = frozenset((errno.EMFILE, errno.ENFILE))
STOP_SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))  # that end a service

MAX_HEAD_BYTES = 64 * 1024  # request line and header fields together; agents send long tokens, not novels
MAX_TARGET_BYTES = 8 * 1024  # what RFC 9112 asks every server to support as a request line
MAX_CHUNK_LINE_BYTES = 1024  # a chunk's size and its extensions, which nobody uses and an attacker could
MAX_BODY_BYTES = 256 * 1024 * 1024  # a long conversation with images is tens of MB
HEAD_SECONDS = 30.0  # from a request's first byte to the end of its header
IDLE_SECONDS = 600.0  # between requests: an agent that runs a tool for minutes keeps its connection
BODY_GRACE_SECONDS = 30.0  # a body may take this long, and one second more for each of the next:
BODY_BYTES_PER_SECOND = 16 * 1024
SEND_SECONDS = 60.0  # for each piece of this size that a client does not take:
SEND_PIECE_BYTES = 256 * 1024
LINGER_SECONDS = 2.0  # after an early refusal we read on so long, or the client sees a reset and not the reason
MAX_LOG_BYTES = 16 * 1024 * 1024  # of a service's own log, some 150,000 requests; one earlier such part is kept
STOP_SECONDS = 5.0  # how long open connections may take to finish when the service stops
START_SECONDS = 30.0  # for the service to answer after `start`
TOOL_LOAD_SECONDS = 120.0  # for a tool to be loaded, whatever it imports
REQUEST_SECONDS = 10.0  # for a command's own request to the service
BACKLOG = 1024  # connections waiting to be accepted; the default of five drops a burst of agents

READ_BLOCK_BYTES = 1024 * 1024
SCAN_BLOCK_BYTES = 256 * 1024
ACCEPT_PAUSE_SECONDS = 0.1  # while no connection can be accepted
COMPLAINT_SECONDS = 60.0  # what fails again and again is said so often: a full disk must not be filled by its own news
LOCK_SECONDS = 10.0  # a log is locked for well under a millisecond at a time
MIN_POLL_SECONDS = 0.002
POLL_FRACTION = 0.02  # a poll waits this share of the time already waited: a turn is delayed by 2 % at most
HOLD_BYTES = 8 * 1024 * 1024  # of an answer that is held until it is whole, so that it can be asked for once more
RETRY_AFTER_SECONDS = 600.0  # an upstream that asks for a longer wait than this is not waited for
MAX_GUESSED_CHARACTERS = 200  # of a word that is compared with those that are known: difflib takes 40 bytes for each
MIN_SECRET_LENGTH = 12  # shorter ones are words, as "unused", that stand elsewhere too
PROXY_TIMEOUT_SECONDS = 120.0  # ROCK's default for the proxy type
TOOL_CALL_SECONDS = 60.0  # after which a tool that hangs is killed
PROGRESS_SECONDS = 1.0  # after which a person at a terminal is told what a command waits for, and how long by now
MAX_BAD_LINES = 20  # of a trajectory that are named; a file of another kind has only such
IDLE_POLL_SECONDS = 1.0  # nobody waits for an answer, only another writer's SESSION_END can come
WATCH_SECONDS = 0.2  # how often a watched process is looked at
GONE_SECONDS = 30.0  # how long anti-call-llm lets the service be away, for a restart with --resume
LIVENESS_SECONDS = 1.0  # how often it looks
PROBE_SECONDS = 0.5  # how long a starting service may take to get its lock from such a look, and to say who it is
DELIVERY_SECONDS = 5.0  # that the end of an answer's sending is waited for, before the same request is looked at
MAX_FINISHED_TURNS = 4096  # remembered for an agent's late retry; each costs some 500 bytes
MAX_LEFT_TURNS = 65536  # the same of those whose agents hung up: all that wait may do so at once, and come again
CONNECT_SECONDS = 15.0  # for each address of an upstream: one that does not answer must not use up a call's time
POOL_SECONDS = 90.0  # after which a connection to an upstream that nobody needed is closed
MAX_IDLE_UPSTREAMS = 256  # connections kept open
MAX_MODEL_NAMES = 100  # listed by /v1/models; the names come from the agent
MAX_TOOL_OUTPUT_BYTES = 8 * 1024 * 1024  # of what a tool returns, as JSON
MAX_NONCE_CHARACTERS = 128  # of what a client has a tool node prove itself with
MAX_SAID_CHARACTERS = 2000  # of what a tool or a web service said, in an error message
TOOL_HTTP_SECONDS = 30.0  # for a built-in tool at each silence of its web service
WORKER_LOOK_SECONDS = 0.2  # how often a silent worker is looked at
WORKER_GRACE_SECONDS = 1.0  # after which one whose time is over ends by itself, where no node has ended it


# ======================================================================================================================
# JSON text: payloads stay the text their author wrote, so that no number, key order or escape is changed on the way.
# ======================================================================================================================

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')


def _refuse_constant(name):
    raise ValueError("%s is not a JSON value" % name)


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_json(text: str, object_pairs_hook=None) -> object:
    """The value of a JSON text by RFC 8259: NaN and Infinity are refused.

    Raises ValueError, whose message says what is wrong and where; also for nesting too deep to be read.
    """
    try:
        if object_pairs_hook is None:
            return _DECODER.decode(text)
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=object_pairs_hook)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def compact_json(text: str) -> str:
    """A valid JSON text without the white space between its tokens: one line, every token as it was written."""
    parts, is_string = [], False
    for part in text.split('"'):  # on long strings many times as quick as a pattern
        if is_string:
            is_string = (len(part) - len(part.rstrip("\\"))) % 2 == 1  # it goes on: the quote behind it is escaped
        else:
            part, is_string = "".join(part.split()), True
        parts.append(part)
    return '"'.join(parts)


def dump_json(value: object) -> str:
    """A value as one line of JSON that can be encoded as UTF-8, lone surrogates included.

    A number that was too large for a float, as 1e400, becomes the largest one: Infinity is no JSON.
    """
    try:
        text = _ENCODER.encode(value)
    except ValueError:
        value = _finite(value)
        text = _ENCODER.encode(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, separators=(",", ":"))
    return text


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    if isinstance(value, float):
        return max(-sys.float_info.max, min(sys.float_info.max, value))
    return value


def parse_object(text: str, what: str) -> dict:
    """The value of a JSON text that must be one object.  Raises ValueError naming `what`."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ValueError("%s is not JSON: %s" % (what, error)) from None
    if not isinstance(value, dict):
        raise ValueError("%s must be a JSON object, got %s" % (what, json_type(value)))
    return value


def json_object(text: str, what: str) -> tuple[str, dict]:
    """The same, and the text as one line, which takes several times as long.  Raises ValueError naming `what`."""
    value = parse_object(text, what)
    return compact_json(text), value


def json_type(value: object) -> str:
    """JSON's own word for the type of a parsed value."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# ======================================================================================================================
# Errors: what this module raises on purpose. Each carries what the command line or the HTTP server does with it.
# ======================================================================================================================


class RockError(Exception):
    """Something failed that the user can do something about; the message says what.  Exit code 1."""

    exit_code = EXIT_FAILED


class UsageError(RockError):
    """A command, flag, setting or payload that cannot be meant.  Exit code 2."""

    exit_code = EXIT_USAGE


class NotYet(RockError):
    """What was waited for has not come within the time given; the same call may be repeated.  Exit code 75."""

    exit_code = EXIT_NOT_YET


class StorageError(RockError):
    """A file of ours could not be read or written.  Its message has paths in it: it is for logs, not for clients."""


class ClientGone(Exception):
    """The HTTP client hung up, or takes no more bytes: there is nobody left to answer."""


ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}


class ReplyBroken(Exception):
    """A reply that has begun and cannot be ended: the client must see a broken connection.

    status: what the request counts as, in the log and the metrics.
    """

    status = 502


class NotRecorded(ReplyBroken):
    """An answer cannot be written down, so that its end is kept back.  The message has paths in it: it is for logs."""

    status = 500


class ApiError(RockError):
    """An error to be answered over HTTP, in OpenAI's shape.

    status: the HTTP status, 400 to 599.  code: a word for programs, as `session_ended`.  param: the offending field
    of the request.  headers: (name, value) pairs to send along.
    """

    def __init__(self, status, message, code=None, param=None, headers=()):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = tuple(headers)

    def body(self) -> bytes:
        """The error as `{"error": {"message", "type", "param", "code"}}` in UTF-8."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return dump_json({"error": error}).encode("utf-8")


def storage_failure() -> ApiError:
    """What a client is told of a StorageError."""
    return ApiError(500, "the service cannot store this call; its own log says why", code="storage_error")


class ProtocolError(ApiError):
    """A message that is malformed or ambiguous as HTTP.  The connection cannot be used after it."""


def did_you_mean(word: str, known: list) -> str:
    """A hint at the nearest of `known`, or what there is."""
    near = nearest(word, known)
    return "; did you mean %r?" % near if near else "; known are %s" % ", ".join(known)


class Complaint:
    """Tells when to say again what fails again and again: the first time, and every COMPLAINT_SECONDS.

    For one thread at a time.  clock: in seconds.
    """

    def __init__(self, clock=time.monotonic):
        self._clock = clock
        self._due = float("-inf")

    def is_due(self) -> bool:
        """Whether to say it now; it counts as said then."""
        now = self._clock()
        if now < self._due:
            return False
        self._due = now + COMPLAINT_SECONDS
        return True


def _said_by(error):
    try:
        return " ".join(str(error)[:READ_BLOCK_BYTES].split())
    except Exception as other:
        return "its message cannot be made (%s)" % type(other).__name__


def raised(error: BaseException) -> str:
    """What was raised, in a line for people: its type and what it says, which may be long."""
    said = _said_by(error)
    return "%s: %s" % (type(error).__name__, said) if said else type(error).__name__


def shortened(text: str) -> str:
    """A text for a message; of a long one, its beginning."""
    return text if len(text) <= MAX_SAID_CHARACTERS else text[:MAX_SAID_CHARACTERS] + " ..."


def nearest(word: str, known: list, likeness: float = 0.6) -> str | None:
    """The one of `known` that was meant, or None.  likeness: from 0 to 1, how much they must have in common."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word[:MAX_GUESSED_CHARACTERS], known, 1, likeness)), None)


# ======================================================================================================================
# Marker records: the lines of the marker log, without I/O.
#
#   Grammar      line    = (request | response | "SESSION_END") LF
#                request = "LLM_REQUEST_START"  json "LLM_REQUEST_END"  meta     ; written by the service
#                response= "LLM_RESPONSE_START" json "LLM_RESPONSE_END" meta     ; written by the trainer's side
#                meta    = {"timestamp": milliseconds, "index": n}               ; n = 1, 2, 3, ...
#   Writing      A marker word inside a JSON string is data: its last underscore is written \u005f, which is the same
#                JSON.  (A marker word cannot stand outside a string, nor overlap an escape, in valid JSON.)
#   Reading      A marker counts only where it stands structurally: a START at the start of the line, the last END
#                before the metadata, SESSION_END as the whole line.  So ROCK's own records, unescaped, are read too.
#   After a      A line that is no record is passed over.  One exception: ROCK's client appends right behind a torn
#   crash        line, so a line that starts torn may still end in a whole record, told by its JSON being valid.
# ======================================================================================================================

_MARKER_WORD = re.compile(r"(LLM_(?:REQUEST|RESPONSE))_(START|END)|(SESSION)_(END)")
_KINDS = (
    ("request", REQUEST_START_MARKER.encode(), REQUEST_END_MARKER.encode()),
    ("response", RESPONSE_START_MARKER.encode(), RESPONSE_END_MARKER.encode()),
)
SESSION_END_LINE = SESSION_END_MARKER.encode() + b"\n"


@dataclass(frozen=True)
class Record:
    """One line of the marker log.

    kind: "request", "response" or "end".  index: the turn, from 1; 0 for "end".  body: the JSON text in UTF-8, as it
    stands in the log.  offset: where in the file the line starts, in bytes.  timestamp: milliseconds since the epoch.
    """

    kind: str
    index: int = 0
    body: bytes = b""
    offset: int = 0
    timestamp: int = 0

    @property
    def text(self) -> str:
        """The body as text, marker words escaped, whoever wrote it."""
        return escape_markers(self.body.decode("utf-8", "replace"))


def escape_markers(text: str) -> str:
    """The same JSON without a marker word in it."""
    if "_START" not in text and "_END" not in text:
        return text
    return _MARKER_WORD.sub(lambda m: "%s\\u005f%s" % (m.group(1) or m.group(3), m.group(2) or m.group(4)), text)


def encode_record(kind: str, text: str, index: int, timestamp_ms: int) -> bytes:
    """A record's line, newline included.  `text` is valid JSON on one line (see `json_object`)."""
    start, end = next((start, end) for name, start, end in _KINDS if name == kind)
    meta = '{"timestamp": %d, "index": %d}\n' % (timestamp_ms, index)
    return b"".join((start, escape_markers(text).encode("utf-8"), end, meta.encode()))


def parse_record(line: bytes, offset: int = 0) -> Record | None:
    """The record a line holds, or None where it holds none.  `line` comes without its newline."""
    line = line.rstrip(b"\r")
    if line == SESSION_END_MARKER.encode():
        return Record("end", offset=offset)
    for kind, start, end in _KINDS:
        if line.startswith(start):
            record = _parse_body(kind, line[len(start) :], end, offset)
            if record and (not _holds_start(record.body) or _is_json(record.body)):
                return record
            return _parse_behind_torn(line, offset) or record
    at = min((line.find(start) for _, start, _ in _KINDS if start in line), default=0)
    is_torn = at and any(marker.startswith(line[:at]) for marker in (_KINDS[0][1], _KINDS[1][1], b"SESSION_END"))
    return parse_record(line[at:], offset) if is_torn else None


def _parse_body(kind, rest, end, offset):
    at = rest.rfind(end)
    if at < 0:
        return None
    try:
        meta = parse_json(rest[at + len(end) :].decode("ascii"))
        index, timestamp = meta.get("index"), meta.get("timestamp")
    except (ValueError, AttributeError):
        return None
    if type(index) is not int or index < 1:
        return None
    return Record(kind, index, rest[:at], offset, timestamp if type(timestamp) is int else 0)


def _holds_start(body):
    return any(start in body for _, start, _ in _KINDS)


def _is_json(body):
    try:
        parse_json(body.decode("utf-8"))
    except ValueError:
        return False
    return True


def _parse_behind_torn(line, offset):
    at = max(line.rfind(start) for _, start, _ in _KINDS)
    for kind, start, end in _KINDS:
        if at > 0 and line.startswith(start, at):
            record = _parse_body(kind, line[at + len(start) :], end, offset)
            if record and _is_json(record.body):
                return record
    return None


# ======================================================================================================================
# HTTP messages: RFC 9112 as a server that forwards and records must read it, without I/O. What is malformed, or could
# be read in two ways by two programs, is refused and never repaired.
# ======================================================================================================================

_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_FIELD_VALUE = r"[\t \x21-\x7e\x80-\xff]*"
_FIELD = re.compile(r"(%s):(%s)\Z" % (_TOKEN, _FIELD_VALUE))
_FIELDS_TO_SEND = re.compile(r"(?:\r\n%s: %s)*\Z" % (_TOKEN, _FIELD_VALUE))
_METHOD = re.compile(_TOKEN + r"\Z")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t \x21-\x7e\x80-\xff]*)?\Z")
_TARGET = re.compile(r"[\x21\x22\x24-\x7e]+\Z")  # no "#": a fragment is the client's own
_HOST = re.compile(r"(?:\[[\w.~!$&'()*+,;=%:-]+\]|(?:[\w.~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?\Z", re.ASCII)
_VERSION = re.compile(r"HTTP/([0-9])\.([0-9])\Z")
_STATUS_LINE = re.compile(r"HTTP/1\.([0-9]) ([1-5][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?\Z")
_JSON_TYPE = re.compile(r"application/(?:[\w.+-]+\+)?json\Z")


KNOWN_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))  # others count as "other"


@dataclass(frozen=True)
class RequestHead:
    """A request's first line and header.

    path: the target's path as sent.  query: what follows "?", None where there is none.  headers: (lower-case name,
    value) pairs in order.  content_length: bytes, None where the message has no such field.
    """

    method: str
    path: str
    query: str | None
    is_http10: bool
    headers: tuple = ()
    content_length: int | None = None
    is_chunked: bool = False
    expects_continue: bool = False
    keep_alive: bool = True

    def header(self, name: str, default: str | None = None) -> str | None:
        """The first field of that lower-case name."""
        return next((value for key, value in self.headers if key == name), default)

    @property
    def has_body(self) -> bool:
        """Whether body bytes follow the header."""
        return self.is_chunked or bool(self.content_length)


def parse_request_head(head: bytes) -> RequestHead:
    """Read a request's header, given without its final empty line.  Raises ProtocolError with the status to answer."""
    if _has_bare_line_end(head):
        raise ProtocolError(400, "a line of the request header does not end in CRLF")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, is_http10 = _parse_request_line(first)
    headers = tuple((name.lower(), value) for name, value in map(_parse_field, lines))
    _check_host(headers, is_http10)
    return RequestHead(
        method,
        *_split_target(target),
        is_http10=is_http10,
        headers=headers,
        keep_alive=not is_http10 and "close" not in _tokens(headers, "connection"),
        **_parse_framing(headers, is_http10),
    )


def _has_lone_lf(data):
    return data.count(b"\n") != data.count(b"\r\n")


def _has_bare_line_end(data):
    """Whether it has an LF or a CR without the other."""
    return _has_lone_lf(data) or data.count(b"\r") != data.count(b"\n")


def _parse_request_line(line):
    parts = line.split(" ")
    if len(parts) != 3:
        raise ProtocolError(400, "the request line is not 'METHOD target HTTP/1.1'")
    method, target, version = parts
    if not _METHOD.match(method):
        raise ProtocolError(400, "the request method is not a token")
    if len(target) > MAX_TARGET_BYTES:
        raise ProtocolError(414, "the request target is longer than %d bytes" % MAX_TARGET_BYTES)
    if not _TARGET.match(target):
        raise ProtocolError(400, "the request target has a character that must be percent-encoded")
    numbers = _VERSION.match(version)
    if not numbers:
        raise ProtocolError(400, "the request line does not end in HTTP/1.1")
    if numbers.group(1) != "1":
        raise ProtocolError(505, "this server speaks HTTP/1.1 and HTTP/1.0")
    return method, target, numbers.group(2) == "0"


def _split_target(target):
    path, mark, query = target.partition("?")
    if path.lower().startswith(("http://", "https://")):
        authority, _, path = path.split("//", 1)[1].partition("/")
        if authority[:1] in ("", ":") or not _HOST.match(authority):
            raise ProtocolError(400, "the request target names no host, or more than a host and a port")
        path = "/" + path
    if not path.startswith("/") and path != "*":
        raise ProtocolError(400, "the request target is neither a path nor an http URL")
    return path, query if mark else None


def _parse_field(line):
    match = _FIELD.match(line)
    if match:
        return match.group(1), match.group(2).strip(" \t")
    if line[:1] in (" ", "\t"):
        raise ProtocolError(400, "a header field is folded over two lines")
    name = re.match(_TOKEN + ":", line)
    if not name:
        raise ProtocolError(400, "a header line is not 'Name: value'")
    raise ProtocolError(400, "a header field has a control character", param=name.group()[:-1])


def _values(headers, name):
    return [value for key, value in headers if key == name]


def _tokens(headers, name):
    return [token.strip(" \t").lower() for value in _values(headers, name) for token in value.split(",")]


def _check_host(headers, is_http10):
    hosts = _values(headers, "host")
    if len(hosts) != 1 and not (is_http10 and not hosts):
        raise ProtocolError(400, "a request needs exactly one Host field")
    if hosts and not _HOST.match(hosts[0]):
        raise ProtocolError(400, "the Host field is not a host name with a port")


def _parse_framing(headers, is_http10):
    """Where the body ends (RFC 9112, section 6), as fields of RequestHead."""
    lengths, codings = _values(headers, "content-length"), _values(headers, "transfer-encoding")
    if lengths and codings:
        raise ProtocolError(400, "both Content-Length and Transfer-Encoding: where the body ends is ambiguous")
    if len(lengths) > 1 or any(not re.match(r"[0-9]{1,18}\Z", length) for length in lengths):
        raise ProtocolError(400, "Content-Length must be one decimal number, got %r" % ", ".join(lengths))
    if codings and is_http10:
        raise ProtocolError(400, "Transfer-Encoding in an HTTP/1.0 request")
    if codings and [coding.lower() for coding in codings] != ["chunked"]:
        # Where "chunked" is not the last, the request has no end that could be found, whoever understands the others.
        status = 501 if _tokens(headers, "transfer-encoding")[-1] == "chunked" else 400
        raise ProtocolError(status, "the only transfer coding understood is 'chunked', got %r" % ", ".join(codings))
    expectations = set(_tokens(headers, "expect")) - {""}
    if expectations - {"100-continue"}:
        raise ProtocolError(417, "the only expectation understood is '100-continue'")
    return {
        "content_length": int(lengths[0]) if lengths else None,
        "is_chunked": bool(codings),
        "expects_continue": bool(expectations) and not is_http10,
    }


@dataclass(frozen=True)
class ResponseHead:
    """A response's first line and header.

    headers: (name, value) pairs as sent and in order.  content_length: bytes, None where the body ends otherwise.
    """

    status: int
    headers: tuple = ()
    content_length: int | None = None
    is_chunked: bool = False
    keep_alive: bool = True

    def header(self, name: str, default: str | None = None) -> str | None:
        """The first field of that lower-case name."""
        return next((value for key, value in self.headers if key.lower() == name), default)


def parse_response_head(head: bytes, is_head: bool = False) -> ResponseHead:
    """Read a response's header, given without its final empty line.  Raises ProtocolError 502.

    is_head: it answers a HEAD request, so that no body follows whatever it says.
    """
    if _has_bare_line_end(head):
        raise ProtocolError(502, "a line of the response header does not end in CRLF")
    first, *lines = head.decode("latin-1").split("\r\n")
    match = _STATUS_LINE.match(first)
    if not match:
        raise ProtocolError(502, "what came is no HTTP/1.1 response")
    try:
        headers = tuple(map(_parse_field, lines))
    except ProtocolError as error:
        raise ProtocolError(502, "in the response, %s" % error) from None
    if match.group(1) == "0" and any(name.lower() == "transfer-encoding" for name, _ in headers):
        raise ProtocolError(502, "Transfer-Encoding in an HTTP/1.0 response")
    status, lowered = int(match.group(2)), tuple((name.lower(), value) for name, value in headers)
    length, is_chunked = _response_framing(lowered)
    if is_head or status in (204, 304):
        length, is_chunked = 0, False
    keep_alive = match.group(1) != "0" and "close" not in _tokens(lowered, "connection")
    return ResponseHead(status, headers, length, is_chunked, keep_alive)


def _response_framing(headers):
    """(content_length, is_chunked) of a response (RFC 9112, section 6.3)."""
    lengths, codings = set(_values(headers, "content-length")), _values(headers, "transfer-encoding")
    if lengths and codings:
        raise ProtocolError(502, "the response has both Content-Length and Transfer-Encoding")
    if len(lengths) > 1 or any(not re.match(r"[0-9]{1,18}\Z", length) for length in lengths):
        raise ProtocolError(502, "the response's Content-Length is not one decimal number")
    if codings and [coding.lower() for coding in codings] != ["chunked"]:
        raise ProtocolError(502, "the response has a transfer coding other than 'chunked'")
    return (int(lengths.pop()) if lengths else None), bool(codings)


_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer")
    + ("transfer-encoding", "upgrade")
)


def end_to_end(headers: tuple) -> list:
    """The header fields that a proxy passes on: those that neither HTTP nor `Connection` binds to one connection."""
    bound = {token for name, value in headers if name.lower() == "connection" for token in value.lower().split(",")}
    bound = _HOP_BY_HOP | {token.strip(" \t") for token in bound}
    return [(name, value) for name, value in headers if name.lower() not in bound]


class LengthBody:
    """A body of known length.  `feed` takes bytes as they come and returns those of the body.

    left: how many are still certain to come.  is_done: whether the body has ended.  rest: what came behind its end.
    """

    def __init__(self, length: int):
        self.left = length
        self.is_done = not length
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """Take what was received."""
        body, self.rest = data[: self.left], data[self.left :]
        self.left -= len(body)
        self.is_done = not self.left
        return body

    def end(self) -> bool:
        """The sender closed; whether the body may end so."""
        return self.is_done


class UnboundedBody:
    """A body that ends with its connection; as LengthBody."""

    left, rest = 0, b""

    def __init__(self):
        self.is_done = False

    def feed(self, data: bytes) -> bytes:
        """Take what was received."""
        return data

    def end(self) -> bool:
        """The sender closed; whether the body may end so."""
        self.is_done = True
        return True


class ChunkedBody:
    """A body in chunks; as LengthBody.  Extensions and trailers are checked and dropped.  Raises ProtocolError."""

    def __init__(self):
        self.left = 0
        self.is_done = False
        self.rest = b""
        self._pending = b""  # a line, or a chunk's CRLF, that has not come whole
        self._is_in_chunk = False  # its CRLF has not been read yet
        self._trailer_bytes = None  # from the last chunk on

    def feed(self, data: bytes) -> bytes:
        """Take what was received."""
        data, self._pending = self._pending + data, b""
        pieces, at = [], 0
        while not self.is_done:
            if self._is_in_chunk:
                piece = data[at : at + self.left]
                pieces.append(piece)
                at += len(piece)
                self.left -= len(piece)
                if self.left or not self._ends_chunk(data[at : at + 2]):
                    break
                at += 2
            end = self._line_end(data, at)
            if end < 0:
                break
            self._on_line(data[at : end - 1])
            at = end + 1
        if self.is_done:
            self.rest = data[at:]
        else:
            self._pending = data[at:]
        return b"".join(pieces)

    def end(self) -> bool:
        """The sender closed; whether the body may end so."""
        return self.is_done

    def _ends_chunk(self, mark):
        if not b"\r\n".startswith(mark):
            raise ProtocolError(400, "a chunk of the body is not as long as it says")
        self._is_in_chunk = len(mark) < 2
        return not self._is_in_chunk

    def _line_end(self, data, at):
        """Where the line's LF is, -1 where it has not come."""
        limit = MAX_CHUNK_LINE_BYTES if self._trailer_bytes is None else MAX_HEAD_BYTES
        end = data.find(b"\n", at, at + limit)
        if end < 0 and len(data) - at >= limit:
            raise ProtocolError(400, "a line between the chunks of the body is longer than %d bytes" % limit)
        if end == at or (end > at and data[end - 1] != 13):
            raise ProtocolError(400, "a line between the chunks of the body does not end in CRLF")
        return end

    def _on_line(self, line):
        if self._trailer_bytes is None:
            self.left = parse_chunk_size(line)
            self._is_in_chunk = bool(self.left)
            self._trailer_bytes = None if self.left else 0
            return
        self._trailer_bytes += len(line)
        if self._trailer_bytes > MAX_HEAD_BYTES:
            raise ProtocolError(431, "the trailer section is longer than %d bytes" % MAX_HEAD_BYTES)
        if line:
            _parse_field(line.decode("latin-1"))
        self.is_done = not line


def body_decoder(content_length: int | None, is_chunked: bool) -> object:
    """What turns a message's bytes into its body's: a LengthBody, ChunkedBody or UnboundedBody."""
    if is_chunked:
        return ChunkedBody()
    return UnboundedBody() if content_length is None else LengthBody(content_length)


def parse_chunk_size(line: bytes) -> int:
    """The size on a chunk's first line; extensions are ignored.  Raises ProtocolError."""
    match = _CHUNK_LINE.match(line)
    if not match:
        raise ProtocolError(400, "a chunk of the body has no valid size")
    return int(match.group(1), 16)


def response_head(status: int, headers: list) -> bytes:
    """A response's first line and header, from (name, value) pairs.

    Raises ValueError for a name or value that would break the header: what is reflected cannot split a response.
    """
    from http.client import responses

    return _message_head("HTTP/1.1 %d %s" % (status, responses.get(status, "Unknown")), headers)


def request_head(method: str, target: str, headers: list) -> bytes:
    """A request's first line and header; as `response_head`."""
    return _message_head("%s %s HTTP/1.1" % (method, target), headers)


def _message_head(first_line, headers):
    lines = "".join(["\r\n%s: %s" % pair for pair in headers])
    # As many line ends as fields: no name and no value has one of its own.
    if lines.count("\n") != len(headers) or not _FIELDS_TO_SEND.match(lines):
        raise ValueError("a header field cannot be sent: %s" % ", ".join(name for name, _ in headers))
    return (first_line + lines + "\r\n\r\n").encode("latin-1")


def is_json_type(content_type: str) -> bool:
    """Whether a Content-Type is one of JSON, a vendor's own included."""
    return bool(_JSON_TYPE.match(content_type.partition(";")[0].strip().lower()))


def check_json_type(content_type: str | None, content_encoding: str | None) -> None:
    """Refuse, with 415, a body that says it is not UTF-8 JSON.  No Content-Type at all is taken for JSON."""
    if content_encoding and content_encoding.lower() != "identity":
        raise ApiError(415, "Content-Encoding %s is not understood: send the body uncompressed" % content_encoding)
    if content_type is None:
        return
    media_type, _, parameters = content_type.partition(";")
    if not is_json_type(content_type):
        raise ApiError(415, "Content-Type is %s: send application/json" % (media_type.strip() or "empty"))
    charset = re.search(r"charset\s*=\s*\"?([\w-]+)", parameters, re.IGNORECASE)
    if charset and charset.group(1).lower() not in ("utf-8", "utf8", "us-ascii"):
        raise ApiError(415, "the body's charset is %s: send UTF-8" % charset.group(1))


# ======================================================================================================================
# Completions: a whole answer as the Server-Sent Events that a streaming client would have seen, and what an error says.
# ======================================================================================================================

SSE_HEADERS = (("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no"))
SSE_TYPE = "text/event-stream; charset=utf-8"
SSE_DONE = b"data: [DONE]\n\n"
SSE_HEARTBEAT = b":\n"  # a comment line; an empty line after it would end an event, and some clients parse that as one
JSON_HEARTBEAT = b" "
_MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "function_call", "refusal")
_EVERY_CHUNK_KEYS = ("id", "created", "model", "system_fingerprint", "service_tier")


def sse_event(value: object) -> bytes:
    """One event of a stream."""
    return b"data: " + dump_json(value).encode("utf-8") + b"\n\n"


def completion_chunks(answer: dict, request: dict, index: int, now: float, is_whole: bool = True) -> list:
    """The `chat.completion.chunk` objects that add up to a completion.

    answer: the completion as the trainer wrote it; a bare message (`{"content": ...}`) will do, as in ROCK's tests.
    request: the agent's request, for `model` and `stream_options.include_usage`.  index: the turn, for ids that are
    missing.  now: seconds, for a missing `created`.  is_whole: False for the beginning of an answer, whose choices have
    not all come to their `finish_reason`.  Raises ValueError for an answer with neither choices nor message.
    """
    base = {"id": "chatcmpl-%d" % index, "created": int(now), "model": request.get("model", "")}
    base.update((key, answer[key]) for key in _EVERY_CHUNK_KEYS if answer.get(key) is not None)
    base["object"] = "chat.completion.chunk"
    known = _EVERY_CHUNK_KEYS + _MESSAGE_KEYS + ("choices", "usage", "object")
    extra = {key: value for key, value in answer.items() if key not in known}
    chunks = []
    for position, choice in enumerate(_choices(answer)):
        for delta in _choice_deltas(choice, position, index, is_whole):
            chunks.append({**base, **({} if chunks else extra), "choices": [delta]})
    options = request.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage") and answer.get("usage") is not None:
        chunks.append({**base, "choices": [], "usage": answer["usage"]})
    return chunks


def _choices(answer):
    choices = answer.get("choices")
    if choices is None and any(key in answer for key in _MESSAGE_KEYS):
        return [{"message": {key: answer[key] for key in _MESSAGE_KEYS if key in answer}}]
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise ValueError('the answer needs choices, as {"choices": [{"message": {...}}]}')
    return choices


def _choice_deltas(choice, position, index, is_whole):
    """The `choices[0]` of each chunk that one choice becomes."""
    message = choice.get("message")
    if message is None:
        message = {"content": choice.get("text")}
    if not isinstance(message, dict):
        raise ValueError("choices[%d].message must be an object, got %s" % (position, json_type(message)))
    number = choice["index"] if type(choice.get("index")) is int else position
    calls = _tool_call_deltas(message.get("tool_calls"), number, index)
    rest = {k: v for k, v in message.items() if k not in ("role", "content", "tool_calls") and v is not None}
    content = message.get("content")
    deltas = [{"role": message.get("role") or "assistant"}]
    deltas[0].update({"content": None} if content is None and "content" in message else {})
    deltas += [{key: rest.pop(key)} for key in ("reasoning_content", "reasoning") if key in rest]
    deltas += [{"content": content}] if content is not None else []
    deltas += [{"tool_calls": [call]} for call in calls]
    deltas += [rest] if rest else []
    extra = {k: v for k, v in choice.items() if k not in ("index", "message", "text", "delta", "finish_reason")}
    for delta in deltas:
        yield {"index": number, "delta": delta, "finish_reason": None}
    finish = choice.get("finish_reason") or (("tool_calls" if calls else "stop") if is_whole else None)
    if finish or extra:
        yield {"index": number, "delta": {}, "finish_reason": finish, **extra}


def _tool_call_deltas(calls, choice_number, index):
    """Tool calls as a stream carries them: numbered, with an id, their arguments a string."""
    if calls is None:
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ValueError("tool_calls must be an array of objects")
    deltas = []
    for position, call in enumerate(calls):
        delta = {"type": "function", **call, "index": position}
        delta["id"] = call.get("id") or "call_%d_%d_%d" % (index, choice_number, position)
        function = call.get("function")
        if isinstance(function, dict) and not isinstance(function.get("arguments", ""), str):
            delta["function"] = {**function, "arguments": dump_json(function["arguments"])}
        deltas.append(delta)
    return deltas


_STATUS_BY_WORD = {
    "invalid_request_error": 400,
    "context_length_exceeded": 400,
    "authentication_error": 401,
    "invalid_api_key": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "model_not_found": 404,
    "timeout_error": 408,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "overloaded_error": 503,
}


def error_status(answer: dict) -> int | None:
    """The HTTP status of an answer that is an error object, None for any other answer.

    Understood are OpenAI's `{"error": {...}}` and vLLM's `{"object": "error", ...}`.  The status is the one named by
    `status`, `status_code` or a numeric `code`, else the usual one of its `type` or `code`, else 500.
    """
    error = answer.get("error")
    if answer.get("object") == "error":
        error = answer
    if not error or "choices" in answer:
        return None
    details = error if isinstance(error, dict) else {}
    for value in [source.get(key) for key in ("status", "status_code", "code") for source in (details, answer)]:
        if re.match(r"[45][0-9][0-9]\Z", str(value)):
            return int(value)
    words = (details.get("code"), details.get("type"))
    return next((_STATUS_BY_WORD[word] for word in words if isinstance(word, str) and word in _STATUS_BY_WORD), 500)


def error_message(answer: object) -> str | None:
    """What an error object says, in whichever of the usual shapes; None where it is none."""
    if not isinstance(answer, dict):
        return None
    error = answer.get("error", answer if answer.get("object") == "error" else None)
    if isinstance(error, dict):
        return str(error.get("message") or dump_json(error))
    return str(error) if error else None


# ======================================================================================================================
# Event streams: Server-Sent Events that come in pieces, as the whole answer that they add up to.
#
#   Adding up    A chunk's choices are told apart by `index`, and so are the entries of their lists, as tool calls.
#                Texts are joined, objects added up field by field, lists appended to; of what is whole in each piece
#                (_WHOLE: `id`, `type`, ...) and of numbers the last counts, and null says nothing.  Fields of the chunk
#                itself, as `usage`, are whole too.  So a vendor's own fields survive without being known here.
# ======================================================================================================================

_WHOLE = frozenset(("id", "type", "role", "index", "format", "finish_reason", "stop_reason"))
_MAX_OPEN_ENTRIES = 128  # of a list, to which further pieces may belong
_MAX_UNFINISHED_BYTES = 64 * 1024  # looked at with each line that is added to it
_MAX_EVENT_DEPTH = 50  # of nested objects and lists; what is deeper is kept as text
# What tells a client of the APIs that have such events that the stream is over, before its last byte.
_LAST_EVENTS = frozenset(("response.completed", "response.failed", "response.incomplete", "message_stop"))


def is_last_event(name: str | None, data: str) -> bool:
    """Whether a client can see by this event that its stream is over."""
    return data == "[DONE]" or name in _LAST_EVENTS


class EventParser:
    """Splits a stream of Server-Sent Events, in pieces of any size, by the rules of the HTML standard."""

    def __init__(self):
        self._buffer = bytearray()
        self._is_after_cr = False

    def feed(self, data: bytes) -> list:
        """The events that this piece completes, as (name, data) texts; an event without data is none."""
        if self._is_after_cr or b"\r" in data:
            data = self._with_line_feeds(data)
        searched = max(0, len(self._buffer) - 1)
        self._buffer += data
        end = self._buffer.rfind(b"\n\n", searched)
        if end < 0:
            return []
        blocks = bytes(self._buffer[:end]).split(b"\n\n")
        del self._buffer[: end + 2]
        return [event for event in map(_parse_event, blocks) if event]

    def unfinished(self) -> tuple | None:
        """The event that lacks but its empty line, unless it is a long one; None where there is none."""
        if not self._buffer.endswith(b"\n") or len(self._buffer) > _MAX_UNFINISHED_BYTES:
            return None
        return _parse_event(bytes(self._buffer))

    def end(self) -> list:
        """The stream is over: the event that lacked its empty line, which some servers forget."""
        last, self._buffer = bytes(self._buffer), bytearray()
        event = _parse_event(last)
        return [event] if event else []

    def _with_line_feeds(self, data):
        """CRLF and CR as LF; a CR at the end waits for what follows."""
        data = b"\r" + data if self._is_after_cr else data
        self._is_after_cr = data.endswith(b"\r")
        data = data[:-1] if self._is_after_cr else data
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _parse_event(block):
    if block.startswith(b"data: ") and b"\n" not in block:
        return "", block[6:].decode("utf-8", "replace")
    name, data = "", []
    for line in block.decode("utf-8", "replace").lstrip("\ufeff").split("\n"):
        field_name, _, value = line.partition(":")
        value = value[1:] if value.startswith(" ") else value
        if field_name == "data":
            data.append(value)
        elif field_name == "event":
            name = value
    return (name, "\n".join(data)) if data else None


class CompletionEvents:
    """Adds the chunks of a streamed completion up to the completion that they are.

    is_over: whether the client can see that the stream is over.  error: what an error event said, or None.
    """

    kind = None  # of the response in a CallRecord: JSON

    def __init__(self):
        self.is_over = False
        self.error = None
        self._whole = {}
        self._choices = {}  # index -> choice; texts in it are _Text
        self._unknown = []

    @property
    def is_finished(self) -> bool:
        """Whether the model has said all, though the stream may not have said that it is over."""
        choices = self._choices.values()
        return self.is_over or bool(choices) and all(choice.get("finish_reason") for choice in choices)

    def add(self, _: str, data: str) -> list:
        """Take one event; the chunks that it holds, usually one."""
        if data == "[DONE]":
            self.is_over = True
            return []
        try:
            chunk = parse_json(data)
        except ValueError:
            chunk = None
        if isinstance(chunk, dict) and not _is_deep(data, chunk):
            self._add_chunk(chunk)
            return [chunk]
        if "\n" in data:  # events without the empty line between them
            return [chunk for line in data.split("\n") for chunk in self.add("", line)]
        if data:
            self._unknown.append(data)
        return []

    def _add_chunk(self, chunk):
        for key, value in chunk.items():
            if key == "choices":
                for position, choice in enumerate(value if isinstance(value, list) else ()):
                    if isinstance(choice, dict):
                        index = choice.get("index")
                        number = index if type(index) is int else position
                        _merge(self._choices.setdefault(number, {}), choice)
            elif value is not None:
                self._whole[key] = value
        self.error = error_message(chunk) or self.error

    def response(self) -> dict | None:
        """The completion so far; None where nothing came."""
        whole = dict(self._whole)
        if whole.get("object") == "chat.completion.chunk":
            whole["object"] = "chat.completion"
        if self._choices:
            whole["choices"] = [_whole_choice(number, choice) for number, choice in sorted(self._choices.items())]
        if self._unknown:
            whole["unknown_events"] = self._unknown
        return whole or None


def _whole_choice(number, choice):
    choice = _settled(choice)
    delta = choice.pop("delta", None)
    whole = {"index": number}
    if isinstance(delta, dict):
        for call in delta["tool_calls"] if isinstance(delta.get("tool_calls"), list) else ():
            if isinstance(call, dict):
                call.pop("index", None)
        whole["message"] = {"role": "assistant", **delta}
    choice.pop("index", None)
    whole.update(choice)
    whole.setdefault("finish_reason", None)
    return whole


def _is_deep(text, value, depth=0):
    """Whether a value is nested too deeply to be added up; most texts tell by having few brackets."""
    if not depth and text.count("{") + text.count("[") <= _MAX_EVENT_DEPTH:
        return False
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > _MAX_EVENT_DEPTH or any(_is_deep(text, part, depth + 1) for part in parts)


class _Text(list):
    """The pieces of a text."""


def _merge(into, more):
    """Add an object to the one that earlier pieces have made."""
    for key, value in more.items():
        old = into.get(key)
        if value is None:
            into.setdefault(key, None)
        elif isinstance(value, str):
            _merge_text(into, key, old, value)
        elif isinstance(value, dict):
            if not isinstance(old, dict):
                old = into[key] = {}
            _merge(old, value)
        elif isinstance(value, list):
            if not isinstance(old, list) or isinstance(old, _Text):
                old = into[key] = [{"type": "text", "text": old}] if old else []
            _merge_list(old, value, key == "tool_calls")
        else:
            into[key] = value


def _merge_text(into, key, old, value):
    if key in _WHOLE:
        if value or old is None:
            into[key] = value
    elif isinstance(old, _Text):
        if key != "name" or old != [value]:  # some servers repeat a function's name in every piece
            old.append(value)
    elif isinstance(old, list):  # content in parts, as from models that think aloud
        old.append({"type": "text", "text": value})
    else:
        into[key] = _Text([value])


def _merge_list(entries, more, are_calls):
    for item in more:
        if not isinstance(item, dict):
            entries.append(item)
            continue
        entry = _entry_of(entries, item, are_calls)
        if entry is None:
            entry = {}
            entries.append(entry)
        _merge(entry, item)


def _entry_of(entries, item, are_calls):
    """The entry that a piece belongs to, None where it begins one.

    Some servers give every tool call the index 0, or none: then a new id is a new call.
    """
    index = item.get("index")
    if type(index) is not int and not are_calls:
        return None
    open_entries = entries[-_MAX_OPEN_ENTRIES:]
    same = [entry for entry in open_entries if isinstance(entry, dict) and entry.get("index") == index]
    if not same:
        return None
    if are_calls and item.get("id") and same[-1].get("id"):
        return next((entry for entry in same if entry.get("id") == item["id"]), None)
    return same[-1]


def _settled(value):
    """The value with its texts joined."""
    if isinstance(value, _Text):
        return "".join(value)
    if isinstance(value, dict):
        return {key: _settled(part) for key, part in value.items()}
    return [_settled(part) for part in value] if isinstance(value, list) else value


class OtherEvents:
    """Keeps the events of any other stream, as `[{"event": name, "data": value}]`; else as CompletionEvents."""

    kind = "events"

    def __init__(self):
        self.is_over = False
        self.error = None
        self._events = []

    @property
    def is_finished(self) -> bool:
        """Whether the stream has said that it is over."""
        return self.is_over

    def add(self, name: str, data: str) -> None:
        """Take one event."""
        try:
            value = parse_json(data)
        except ValueError:
            value = data
        if isinstance(value, str) or _is_deep(data, value):
            value = data
        kind = name or (value.get("type") if isinstance(value, dict) else None)
        self.is_over = self.is_over or is_last_event(kind, data)
        if isinstance(value, dict) and (kind == "error" or "error" in value):
            self.error = error_message(value) or self.error
        self._events.append({"event": name, "data": value} if name else {"data": value})

    def response(self) -> list | None:
        """The events so far; None where nothing came."""
        return self._events or None


# ======================================================================================================================
# Tool arguments: what a tool's parameters mean, and whether a call's arguments fit them.
#
#   Parameters   modelscope-agent's list is rewritten as a JSON Schema, so that there is one thing to check against. Of
#                JSON Schema, drafts 4 to 2020-12, all that tools use is read; a keyword not known here says nothing.
#   Checking     A schema is checked once, as a tool is taken in. After that only the arguments can be wrong.
#   Faults       What does not fit is a list of (keys and indexes that lead there, what it must be, what came). They are
#                alternatives, as from the branches of an anyOf: one of them has to be put right. No faults: it fits.
# ======================================================================================================================

_MAX_FAULTS = 4  # alternatives that one message names
_MAX_SHOWN = 80  # characters of a value, or of a name, in a message
_NOTHING, _UNKNOWN = object(), object()  # in place of what came: there is no value; there is no such argument

_TYPES = {"string": "a string", "number": "a number", "integer": "an integer", "boolean": "a boolean"}
_TYPES.update({"array": "an array", "object": "an object", "null": "null"})
_LIST_TYPES = {name: name for name in _TYPES if name != "null"}
_LIST_TYPES.update({"str": "string", "text": "string", "int": "integer", "float": "number", "double": "number"})
_LIST_TYPES.update({"bool": "boolean", "list": "array", "dict": "object"})


def arguments_schema(parameters: object) -> dict:
    """The JSON Schema, of type object, that a tool's `parameters` mean.

    parameters: modelscope-agent's list of `{"name", "type", "description", "required", "enum"?, "schema"?}`, or a JSON
    Schema; None and {} are those of a tool that takes none.  In the list form a number will do for a string, as in
    modelscope-agent's own example, and arguments that are not in the list are let through.  Raises ValueError, which
    names the place of what is wrong, as `parameters[1] has no name`.
    """
    try:
        parameters = parse_json(_json_text(parameters, "parameters"))  # whatever a tool's class is written with
        schema, waiting = _unchecked_schema(parameters)
        seen = set()
        while waiting:
            place, part = waiting.pop(0)
            _check_schema(place, part, schema, seen, waiting, ())
    except RecursionError:
        raise ValueError("parameters are nested too deeply") from None
    return schema


def _json_text(value, what):
    try:
        return dump_json(value)
    except TypeError as error:
        raise ValueError("%s must be JSON: %s" % (what, error)) from None
    except RecursionError:
        raise ValueError("%s are nested too deeply" % what) from None


def _unchecked_schema(parameters):
    """The parameters as a JSON Schema, and the (place, part) pairs to check in it."""
    if isinstance(parameters, list):
        schema = _schema_of_list(parameters)
        parts = [("parameters[%d]" % number, part) for number, part in enumerate(schema["properties"].values())]
        return schema, [*parts, ("parameters", schema)]
    if parameters is not None and not isinstance(parameters, dict):
        raise ValueError("parameters must be a list or a JSON Schema, got %s" % _shown(parameters))
    schema = {"type": "object", **(parameters or {"properties": {}})}
    if schema["type"] != "object" and not (isinstance(schema["type"], list) and "object" in schema["type"]):
        raise ValueError('parameters.type must be "object", got %s' % _shown(schema["type"]))
    schema["type"] = "object"
    return schema, [("parameters", schema)]


def _schema_of_list(parameters):
    properties, required = {}, []
    for number, item in enumerate(parameters):
        place = "parameters[%d]" % number
        if not isinstance(item, dict):
            raise ValueError("%s must be an object, got %s" % (place, _shown(item)))
        name = item.get("name")
        if name in (None, ""):
            raise ValueError("%s has no name" % place)
        if not isinstance(name, str):
            raise ValueError("%s.name must be a string, got %s" % (place, _shown(name)))
        if name in properties:
            raise ValueError("%s is a second one named %s" % (place, dump_json(name)))
        properties[name] = _schema_of_item(item, place)
        is_required = {"true": True, "false": False, "none": False}.get(str(item.get("required")).lower())
        if is_required is None:
            raise ValueError("%s.required must be true or false, got %s" % (place, _shown(item["required"])))
        required += [name] if is_required else []
    return {"type": "object", "properties": properties, "required": required}


def _schema_of_item(item, place):
    schema = item.get("schema") or {}
    if not isinstance(schema, dict):
        raise ValueError("%s.schema must be an object, got %s" % (place, _shown(schema)))
    schema = {**schema, **{key: item[key] for key in item if key not in ("name", "required", "schema")}}
    if schema.get("enum") in (None, "", []):
        schema.pop("enum", None)
    types = _types_of_item(schema.pop("type", None), place)
    return {"type": types[0] if len(types) == 1 else types, **schema} if types else schema


def _types_of_item(words, place):
    """JSON Schema's words for a `type` of the list form; none where it says what JSON has no type for, as "file"."""
    words = words if isinstance(words, list) else [words]
    if not all(word is None or isinstance(word, str) for word in words):
        raise ValueError("%s.type must be a string, got %s" % (place, _shown(words)))
    types = [_LIST_TYPES.get(str(word).strip().lower()) for word in words]
    types += ["number"] if "string" in types else []
    return [] if None in types else list(dict.fromkeys(types))


def _check_schema(place, schema, document, seen, waiting, above):
    """Check a schema and those within it that see the same value; those that see parts of it are left in `waiting`.

    seen: the ids of the schemas that are done.  above: the ids of those that this one is within.
    """
    if not _is_schema(schema):
        raise ValueError("%s must be a JSON Schema, got %s" % (place, _shown(schema)))
    if id(schema) in above:
        raise ValueError("%s leads back to itself" % place)
    if isinstance(schema, bool) or id(schema) in seen:
        return
    seen.add(id(schema))
    above = (*above, id(schema))
    for keyword, value in schema.items():
        (test, expected), _, _ = _KEYWORDS.get(keyword, _UNKNOWN_KEYWORD)
        if not test(value):
            raise ValueError("%s must be %s, got %s" % (_place(place, keyword), expected, _shown(value)))
    for keys, part in _parts(schema):
        if keys[0] in ("allOf", "anyOf", "oneOf", "not", "if", "then", "else"):
            _check_schema(_place(place, *keys), part, document, seen, waiting, above)
        else:
            waiting.append((_place(place, *keys), part))
    if "$ref" in schema:
        place = "%s.$ref (%s)" % (place, _shortened(schema["$ref"]))
        _check_schema(place, _target(document, schema["$ref"], place), document, seen, waiting, above)


def _parts(schema):
    """The schemas in a schema, each with the keys that lead to it."""
    for keyword, value in schema.items():
        rule = _KEYWORDS.get(keyword, _UNKNOWN_KEYWORD)[0]
        if rule in (_SCHEMA_LIST, _ITEMS) and isinstance(value, list):
            yield from (((keyword, number), part) for number, part in enumerate(value))
        elif rule in (_SCHEMA_MAP, _PATTERN_MAP):
            yield from (((keyword, name), part) for name, part in value.items())
        elif rule in (_SCHEMA, _ITEMS):
            yield (keyword,), value


def _target(document, reference, place="parameters"):
    """What a $ref within the document points at.  Raises ValueError."""
    from urllib.parse import unquote

    target = document
    start, *keys = unquote(reference).split("/")
    try:
        if start != "#":
            raise KeyError(start)
        for key in keys:
            members = {str(number): item for number, item in enumerate(target)} if isinstance(target, list) else target
            target = members[key.replace("~1", "/").replace("~0", "~")]
    except (KeyError, TypeError):
        raise ValueError("%s points at nothing in the parameters" % place) from None
    return target


def parse_arguments(params: object) -> tuple[str, dict]:
    """A call's `params` as JSON text, and their value.

    params: the JSON text of an object, or the object; '' and None are {}.  Models leave line ends and other control
    characters in strings as they are; in the text returned they are escaped.  Raises ValueError.
    """
    text = params if isinstance(params, str) else "" if params is None else _json_text(params, "params")
    text = text if text.strip() else "{}"
    try:
        return text, parse_object(text, "params")
    except ValueError:
        text = re.sub(r'"[^"\\]*(?:\\[^\x00-\x1f][^"\\]*)*"', _escaped_controls, text)
        return text, parse_object(text, "params")


def _escaped_controls(match):
    return re.sub(r"[\x00-\x1f]", lambda control: "\\u%04x" % ord(control.group()), match.group())


def check_arguments(arguments: dict, schema: dict) -> None:
    """Check a call's arguments against what `arguments_schema` returned.

    Raises ValueError for the first that does not fit, in the order of the schema: where it stands, what it must be and
    what came, as `argument items[2].id must be a string, got a number (3)`.
    """
    try:
        faults = _Checker(schema).faults(schema, arguments)
        message = _message(faults)
    except RecursionError:
        raise ValueError("the arguments are nested too deeply") from None
    if faults:
        raise ValueError(message)


def _message(faults):
    sentences = {}  # those about the same value are one
    for path, expected, came in faults:
        sentences.setdefault((path, id(came)), (came, []))[1].append(expected)
    return "; or ".join(_sentence(path, ", or ".join(all_), came) for (path, _), (came, all_) in sentences.items())


def _sentence(path, expected, came):
    if came is _UNKNOWN:
        return "there is no argument `%s`%s" % (_place("", *path), expected)
    subject = "argument " + _place("", *path) if path else "the arguments"
    return "%s %s%s" % (subject, expected, "" if came is _NOTHING else ", got " + _shown(came))


def _place(place, *keys):
    """Where something stands, as `items[2].id`."""
    for key in keys:
        if isinstance(key, int):
            place += "[%d]" % key
        elif key and not place and key.isprintable():
            place = _shortened(key)
        else:
            place += "." + _shortened(key) if re.match(r"[\w$-]+\Z", key) else "[%s]" % _shortened(dump_json(key))
    return place


def _shown(value):
    """A value for a message: its type and the start of its JSON."""
    return "null" if value is None else "%s (%s)" % (json_type(value), _shortened(dump_json(value)))


def _shortened(text):
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


class _Checker:
    """Applies a schema, and what it refers to in its document, to the parts of one call's arguments."""

    def __init__(self, document):
        self._document = document
        self._known = {}  # (id of a $ref's target, id of a value) -> faults; or references side by side double the work

    def faults(self, schema, value):
        """What keeps a value from fitting a schema."""
        if isinstance(schema, bool):
            return [] if schema else [((), "must not be given", value)]
        if value is None and schema.get("nullable"):
            return []
        kind = json_type(value)
        for keyword, argument in schema.items():
            _, of_kind, check = _KEYWORDS.get(keyword, _UNKNOWN_KEYWORD)
            faults = check(self, argument, value, schema) if of_kind in (kind, _EACH) else []
            if faults:
                return faults
        return []

    def first(self, parts):
        """The faults of the first (key, schema, value) that has some, seen from what holds the key."""
        for key, schema, value in parts:
            faults = self.faults(schema, value)
            if faults:
                return [((key, *path), expected, came) for path, expected, came in faults]
        return []

    def referred(self, reference, value, _):
        """The faults by the schema that a $ref points at."""
        target = _target(self._document, reference)
        key = (id(target), id(value))
        if key not in self._known:
            self._known[key] = self.faults(target, value)
        return self._known[key]


def _fault(expected, value):
    return [((), expected, value)]


def _check_type(_, types, value, __):
    types = types if isinstance(types, list) else [types]
    phrases = [_TYPES[name] for name in types]
    fits = json_type(value) in phrases or ("integer" in types and _is_whole(value))
    return [] if fits else _fault("must be " + " or ".join(phrases), value)


def _check_enum(_, choices, value, __):
    if _frozen(value) in map(_frozen, choices):
        return []
    expected = "must be one of " if len(choices) > 1 else "must be "
    return _fault(expected + _shortened(", ".join(map(dump_json, choices))), value)


def _frozen(value):
    """Something hashable that is equal for what is equal as JSON: 1 is 1.0 and not true."""
    if isinstance(value, list):
        return (list, *map(_frozen, value))
    if isinstance(value, dict):
        return dict, frozenset((key, _frozen(part)) for key, part in value.items())
    return (bool, value) if isinstance(value, bool) else value


def _limit(expected, test, measure=None, other=None):
    """The check of a limit.  other: the limit that is itself excluded where this one is true, as in draft 4."""

    def check(_, limit, value, schema):
        if isinstance(limit, bool):
            limit = schema.get(other) if limit else None
        fits = limit is None or test(measure(value) if measure else value, limit)
        return [] if fits else _fault(expected % dump_json(limit), value)

    return check


def _is_multiple(value, divisor):
    """By the decimals as they are written: 0.3 is a multiple of 0.1."""
    from fractions import Fraction

    if value in (float("inf"), float("-inf")):  # a number too large for a float
        return False
    return (Fraction(repr(value)) / Fraction(repr(divisor))).denominator == 1


def _check_required(_, names, value, __):
    return next(([((name,), "is missing", _NOTHING)] for name in names if name not in value), [])


def _check_properties(checker, properties, value, _):
    return checker.first((name, part, value[name]) for name, part in properties.items() if name in value)


def _check_pattern_properties(checker, patterns, value, _):
    return checker.first(
        (name, part, value[name]) for pattern, part in patterns.items() for name in value if re.search(pattern, name)
    )


def _check_additional_properties(checker, part, value, schema):
    known, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    others = [name for name in value if name not in known and not any(re.search(p, name) for p in patterns)]
    if part is False and others:
        return [((others[0],), did_you_mean(others[0], list(known)) if known else "", _UNKNOWN)]
    return checker.first((name, part, value[name]) for name in others)


def _check_names(checker, part, value, _):
    found = ((name, checker.faults(part, name)) for name in value)
    return next(([((name,), "has a name that " + f[1], f[2]) for f in faults] for name, faults in found if faults), [])


def _check_items(checker, part, value, schema):
    if isinstance(part, list):
        parts = part + [schema.get("additionalItems", True)] * (len(value) - len(part))
    else:
        prefix = len(schema.get("prefixItems", ()))
        parts = [True] * prefix + [part] * (len(value) - prefix)
    return checker.first((number, *pair) for number, pair in enumerate(zip(parts, value)))


def _check_prefix(checker, parts, value, _):
    return checker.first((number, *pair) for number, pair in enumerate(zip(parts, value)))


def _check_contains(checker, part, value, _):
    has_one = any(not checker.faults(part, item) for item in value)
    return [] if has_one else _fault("must have an item that fits " + _shortened(dump_json(part)), value)


def _check_unique(_, is_unique, value, __):
    numbers = {}
    for number, item in enumerate(value if is_unique else ()):
        first = numbers.setdefault(_frozen(item), number)
        if first != number:
            return _fault("must not have the same item twice, as at [%d] and [%d]" % (first, number), value)
    return []


def _check_all(checker, parts, value, _):
    return next(filter(None, (checker.faults(part, value) for part in parts)), [])


def _check_any(checker, parts, value, _):
    found = []
    for part in parts:
        faults = checker.faults(part, value)
        if not faults:
            return []
        found += faults
    return _nearest(found)


def _check_one(checker, parts, value, _):
    results = [checker.faults(part, value) for part in parts]
    if results.count([]) > 1:
        return _fault("must fit one of %d schemas alone, not %d of them" % (len(parts), results.count([])), value)
    return [] if [] in results else _nearest([fault for faults in results for fault in faults])


def _nearest(faults):
    """The faults of those alternatives that were meant, most likely: what is wrong deeper inside was right so far."""
    deeper = [fault for fault in faults if fault[0]] or faults
    return list({fault[:2]: fault for fault in deeper}.values())[:_MAX_FAULTS]


def _check_not(checker, part, value, _):
    return [] if checker.faults(part, value) else _fault("must not fit " + _shortened(dump_json(part)), value)


def _check_if(checker, part, value, schema):
    return checker.faults(schema.get("else" if checker.faults(part, value) else "then", True), value)


def _is_schema(value):
    return isinstance(value, (dict, bool))


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value):
    return _is_number(value) and (isinstance(value, int) or value.is_integer())


def _is_types(value):
    names = value if isinstance(value, list) and value else [value]
    return all(isinstance(name, str) and name in _TYPES for name in names)


def _is_pattern(value):
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, OverflowError, RecursionError):
        return False


# What the value of a keyword must be: a test, and how an error says it.
_COUNT = (lambda value: _is_whole(value) and value >= 0, "a whole number from 0")
_NUMBER = (_is_number, "a number")
_LIMIT = (lambda value: _is_number(value) or isinstance(value, bool), "a number")
_ABOVE_0 = (lambda value: _is_number(value) and 0 < value < float("inf"), "a number above 0")
_FLAG = (lambda value: isinstance(value, bool), "true or false")
_TEXT = (lambda value: isinstance(value, str), "a string")
_TEXTS = (lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value), "an array of strings")
_TYPE_NAMES = (_is_types, "one of %s, or an array of these" % ", ".join(_TYPES))
_PATTERN = (_is_pattern, "a regular expression")
_LIST = (lambda value: isinstance(value, list), "an array")
_SCHEMA = (_is_schema, "a JSON Schema")
_SCHEMA_LIST = (lambda value: isinstance(value, list) and value, "an array of JSON Schemas that is not empty")
_ITEMS = (lambda value: isinstance(value, (dict, bool, list)), "a JSON Schema or an array of them")
_SCHEMA_MAP = (lambda value: isinstance(value, dict), "an object of JSON Schemas")
_PATTERN_MAP = (lambda v: isinstance(v, dict) and all(map(_is_pattern, v)), "an object with patterns as keys")
_WHATEVER = (lambda _: True, "")

# For each keyword: what its value must be, the kind of value that it says something about, and its check.
_EACH, _NONE = "each", "none"
_KEYWORDS = {
    "type": (_TYPE_NAMES, _EACH, _check_type),
    "enum": (_LIST, _EACH, _check_enum),
    "const": (_WHATEVER, _EACH, lambda _, constant, value, __: _check_enum(None, [constant], value, None)),
    "$ref": (_TEXT, _EACH, _Checker.referred),
    "allOf": (_SCHEMA_LIST, _EACH, _check_all),
    "anyOf": (_SCHEMA_LIST, _EACH, _check_any),
    "oneOf": (_SCHEMA_LIST, _EACH, _check_one),
    "not": (_SCHEMA, _EACH, _check_not),
    "if": (_SCHEMA, _EACH, _check_if),
    "then": (_SCHEMA, _NONE, None),
    "else": (_SCHEMA, _NONE, None),
    "$defs": (_SCHEMA_MAP, _NONE, None),
    "definitions": (_SCHEMA_MAP, _NONE, None),
    "nullable": (_FLAG, _NONE, None),
    "required": (_TEXTS, "an object", _check_required),
    "properties": (_SCHEMA_MAP, "an object", _check_properties),
    "patternProperties": (_PATTERN_MAP, "an object", _check_pattern_properties),
    "additionalProperties": (_SCHEMA, "an object", _check_additional_properties),
    "propertyNames": (_SCHEMA, "an object", _check_names),
    "minProperties": (_COUNT, "an object", _limit("must have %s or more members", ge, len)),
    "maxProperties": (_COUNT, "an object", _limit("must have %s or fewer members", le, len)),
    "prefixItems": (_SCHEMA_LIST, "an array", _check_prefix),
    "items": (_ITEMS, "an array", _check_items),
    "additionalItems": (_SCHEMA, _NONE, None),
    "contains": (_SCHEMA, "an array", _check_contains),
    "uniqueItems": (_FLAG, "an array", _check_unique),
    "minItems": (_COUNT, "an array", _limit("must have %s or more items", ge, len)),
    "maxItems": (_COUNT, "an array", _limit("must have %s or fewer items", le, len)),
    "minLength": (_COUNT, "a string", _limit("must have %s or more characters", ge, len)),
    "maxLength": (_COUNT, "a string", _limit("must have %s or fewer characters", le, len)),
    "pattern": (_PATTERN, "a string", _limit("must match %s", lambda text, pattern: re.search(pattern, text))),
    "minimum": (_NUMBER, "a number", _limit("must be at least %s", ge)),
    "maximum": (_NUMBER, "a number", _limit("must be at most %s", le)),
    "exclusiveMinimum": (_LIMIT, "a number", _limit("must be above %s", gt, None, "minimum")),
    "exclusiveMaximum": (_LIMIT, "a number", _limit("must be below %s", lt, None, "maximum")),
    "multipleOf": (_ABOVE_0, "a number", _limit("must be a multiple of %s", _is_multiple)),
}
_UNKNOWN_KEYWORD = (_WHATEVER, _NONE, None)


# ======================================================================================================================
# Typed functions: a plain function as a tool, its parameters from its signature, its words from its docstring.
# ======================================================================================================================


def function_tool(function) -> tuple[str, str, dict]:
    """A plain typed function as a tool: (name, description, parameters as a JSON Schema).

    The parameters are those of the signature, their schemas come from the annotations, and what is not annotated, or
    with something that JSON has no type for, is not checked.  An Enum's member is given as its value, a set or a tuple
    as a list.  Description: the docstring's text before its sections; those of parameters may be in Google's, NumPy's
    or reST's style.  Raises ValueError for a function that cannot be called with named arguments alone.
    """
    import inspect

    name = getattr(function, "__name__", "")
    if not callable(function) or not name.isidentifier():
        raise ValueError("a tool must be a function with a name, got %r" % (function,))
    description, described = _docstring_parts(inspect.getdoc(function) or "")
    schema = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind == parameter.VAR_KEYWORD:
            del schema["additionalProperties"]
            continue
        if parameter.kind == parameter.VAR_POSITIONAL:
            raise ValueError("%s takes *%s, which has no names: make it one parameter, a list" % (name, parameter.name))
        if parameter.kind == parameter.POSITIONAL_ONLY:
            raise ValueError("%s takes %s by position only: remove the / behind it" % (name, parameter.name))
        schema["properties"][parameter.name] = _parameter_schema(function, parameter, described.get(parameter.name))
        if parameter.default is parameter.empty:
            schema["required"].append(parameter.name)
    return name, description, schema


def _parameter_schema(function, parameter, description):
    """A parameter's schema: of its annotation, with its description, and its default where JSON can hold that."""
    schema = _type_schema(_resolved(function, parameter.annotation))
    if parameter.default is None:  # `text: str = None` is how many write Optional
        schema = _union([schema, {"type": "null"}])
    if description:
        schema["description"] = description
    with contextlib.suppress(TypeError, ValueError, RecursionError):  # where there is none, there is no JSON either
        schema["default"] = _plain(parameter.default)
    return schema


def _plain(value):
    """A value as JSON holds it, an Enum's member by its value.  Raises TypeError, ValueError or RecursionError."""
    from enum import Enum

    return parse_json(_ENCODER.encode(value.value if isinstance(value, Enum) else value))


def _resolved(function, annotation):
    """An annotation with the names in it looked up; Any where that cannot be done."""
    import inspect
    import types
    import typing

    holder = types.SimpleNamespace(__annotations__={"hint": annotation})
    try:
        return typing.get_type_hints(holder, getattr(inspect.unwrap(function), "__globals__", {}))["hint"]
    except Exception:  # whatever it is that evaluating it runs into
        return typing.Any


def _type_schema(hint):
    """The schema of a type, {} for one that JSON does not have."""
    import typing
    from enum import Enum

    origin, args = getattr(hint, "__origin__", None), getattr(hint, "__args__", None) or ()
    if origin is typing.Union or type(hint).__name__ == "UnionType":
        return _union([_type_schema(arg) for arg in args])
    if origin is getattr(typing, "Literal", _NOTHING):
        return _choice_schema(args)
    if hasattr(hint, "__supertype__"):  # a NewType
        return _type_schema(hint.__supertype__)
    kind = origin or hint
    if not isinstance(kind, type):
        return {}
    if issubclass(kind, Enum):
        return _choice_schema(kind)
    plain = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    name = next((plain[base] for base in plain if issubclass(kind, base)), None)
    return {"type": name} if name else _container_schema(kind, args)


def _choice_schema(values):
    try:
        choices = [_plain(value) for value in values]
    except (TypeError, ValueError, RecursionError):
        return {}
    is_text = all(isinstance(choice, str) for choice in choices)
    return {"type": "string", "enum": choices} if is_text else {"enum": choices}


def _container_schema(kind, args):
    from collections import abc

    args = [arg for arg in args if arg != ()]  # which Tuple[()] has
    parts = [_type_schema(arg) for arg in args if arg is not Ellipsis]
    if issubclass(kind, abc.Mapping) or hasattr(kind, "__dataclass_fields__"):
        return {"type": "object", **({"additionalProperties": parts[1]} if parts[1:] and parts[1] else {})}
    is_array = kind.__module__ in ("builtins", "collections", "collections.abc") and issubclass(kind, abc.Iterable)
    if not is_array or issubclass(kind, (bytes, bytearray)):
        return {}
    if issubclass(kind, tuple) and parts and args[-1] is not Ellipsis:
        return {"type": "array", "prefixItems": parts, "minItems": len(parts), "maxItems": len(parts)}
    return {"type": "array", **({"items": parts[0]} if parts and parts[0] else {})}


def _union(schemas):
    parts = [part for schema in schemas for part in schema.get("anyOf", [schema])]
    if {} in parts:
        return {}
    if all(set(part) == {"type"} for part in parts):
        types = [part["type"] if isinstance(part["type"], list) else [part["type"]] for part in parts]
        types = list(dict.fromkeys(sum(types, [])))
        return {"type": types if len(types) > 1 else types[0]}
    parts = [part for number, part in enumerate(parts) if part not in parts[:number]]
    return {"anyOf": parts} if len(parts) > 1 else parts[0]


_DOC_HEADING = (
    r"(?:((?:Other |Keyword )?(?:Args|Arguments|Parameters|Params))|Returns?|Yields?|Receives|Raises|Warns|Warnings?"
    r"|Examples?|Notes?|See Also|References|Attributes|Todo)(:?)\s*\Z"
)
_DOC_FIELD = r"\s*:(?:param|parameter|arg|argument|key|keyword|type|returns?|rtype|raises?|yields?)\b[^:]*:"
_DOC_ENTRIES = {  # the first line of what a section says of a parameter: its names, and what follows
    "Google": r"\s*\*{0,2}(\w+)\s*(?:\(.*?\)\s*)?:(.*)",
    "NumPy": r"\s*(\*{0,2}\w+(?:,\s*\*{0,2}\w+)*)\s*(?::.*)?()\Z",
    "reST": r"\s*:(?:param|parameter|arg|argument|key|keyword)\s(?:[^:]*\s)?\*{0,2}(\w+)\s*:(.*)",
}


def _docstring_parts(text):
    """What a docstring says: the text before its sections, and {parameter: its description}."""
    sections = [("", [])]  # style, lines
    lines = text.split("\n")
    for line, following in zip(lines, [*lines[1:], ""]):
        heading, is_underlined = re.match(_DOC_HEADING, line), following.startswith("---")
        if heading and (is_underlined or heading.group(2)):
            sections.append((heading.group(1) and ("NumPy" if is_underlined else "Google"), []))
        else:
            sections += [("reST", [])] if re.match(_DOC_FIELD, line) else []
            sections[-1][1].append(line)
    described = {}
    for style, lines in sections:
        for names, words in _entries(lines, _DOC_ENTRIES[style]) if style else ():
            described.update(dict.fromkeys(names, " ".join(words).strip()))
    return "\n".join(sections[0][1]).strip(), described


def _entries(lines, pattern):
    """The (names, words) of a section's entries, which go on in lines that are further in than the first one."""
    entries, first_depth = [], None
    for line in filter(str.strip, lines):
        depth = len(line) - len(line.lstrip())
        first_depth = depth if first_depth is None else first_depth
        match = re.match(pattern, line) if depth <= first_depth else None
        if match:
            entries.append((re.findall(r"\w+", match.group(1)), match.group(2).split()))
        elif depth <= first_depth:
            entries.append(((), []))
        else:
            entries[-1][1].extend(line.split())
    return entries


# ======================================================================================================================
# YAML: the part that configuration files are written in: mappings, lists in both styles, plain and quoted scalars,
# block texts ("|" and ">"), comments. What it reads, it reads as PyYAML does; whatever else YAML has, or means
# differently in its versions, is refused with its line number; without the text, which may be a secret.
# ======================================================================================================================

_YAML_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **{word: True for base in ("yes", "true", "on") for word in (base, base.title(), base.upper())},
    **{word: False for base in ("no", "false", "off") for word in (base, base.title(), base.upper())},
}
_YAML_INT = r"[-+]?(0|[1-9][0-9]*)\Z"
_YAML_FLOAT = r"[-+]?(0|[1-9][0-9]*)\.[0-9]*\Z"
_YAML_AMBIGUOUS = (
    r"([-+]?0[0-7_]+|[-+]?0[oxXbB][0-9a-fA-F_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|[-+]?[0-9][0-9_]*\.?[0-9_]*"
    r"([eE][-+]?[0-9]+)?|[-+]?\.[0-9_]+([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)|<<|=|[yYnN]"
    r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt \t].*)?)\Z"
)
_YAML_ESCAPES = dict(zip('0abtnvfre"\\/ ', '\0\a\b\t\n\v\f\r\x1b"\\/ '))
_YAML_ESCAPE = r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))"
_YAML_QUOTED = r'"((?:[^"\\]|\\.)*)"|\'((?:[^\']|\'\')*)\''
_YAML_BLOCK_TEXT = r"([|>])([-+]?)(?: +#.*)?\Z"
_YAML_PLAIN_IN_FLOW = r"(?::(?! |[,\[\]{}]|$)|[^,\[\]{}#:?]|(?<! )#)*"
_YAML_UNPRINTABLE = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]"
_YAML_MAX_DEPTH = 32
_YAML_MAX_KEY = 1000  # a little below YAML's own limit
_YAML_MAX_NUMBER = 100


def parse_yaml(text: str) -> object:
    """The value of a YAML text.  Raises ValueError that starts with the line number."""
    lines = re.findall(r".*\n|.+", re.sub(r"\r\n?", "\n", text))
    for number, line in enumerate(lines, 1):
        if re.search(_YAML_UNPRINTABLE, line):
            raise _yaml_error(number, "a control character: use an escape in double quotes")
    return _YamlBlock(lines).read()


def _yaml_error(number, message):
    return ValueError("line %d: %s" % (number, message))


def _yaml_indentation(line):
    return len(line) - len(line.lstrip(" "))


class _YamlBlock:
    """Reads lines, which keep their line breaks, as nested blocks."""

    def __init__(self, lines):
        self._lines = lines
        self._at = 0

    def read(self):
        if self._skip().rstrip(" \n") == "---":
            self._at += 1
        number, indent, _ = self._peek()
        value = self._block(indent, 0) if number else None
        number, _, _ = self._peek()
        if number:
            raise _yaml_error(number, "the indentation fits no line above")
        return value

    def _skip(self):
        """Pass over blank lines and comments; the line that comes then, "" at the end."""
        while self._at < len(self._lines):
            line = self._lines[self._at]
            if line.strip(" \n") and not line.lstrip(" ").startswith("#"):
                return line
            self._at += 1
        return ""

    def _peek(self):
        """(number, indentation, content) of the next line that says something; the number is 0 at the end."""
        line = self._skip()
        content = line.strip(" \n")
        if not content:
            return 0, -1, ""
        if content.startswith("\t"):
            raise _yaml_error(self._at + 1, "a tab in the indentation: use spaces")
        if line.startswith(("---", "...", "%")):
            raise _yaml_error(self._at + 1, "several documents and directives are not understood")
        return self._at + 1, _yaml_indentation(line), content

    def _block(self, indent, depth):
        number, _, content = self._peek()
        if depth > _YAML_MAX_DEPTH:
            raise _yaml_error(number, "nested too deeply")
        if content == "-" or content.startswith("- "):
            return self._list(indent, depth)
        if self._split_key(number, content) is None:
            self._at += 1
            return _yaml_value(number, content)
        return self._mapping(indent, depth)

    def _list(self, indent, depth):
        items = []
        while True:
            number, at, content = self._peek()
            if at != indent or not (content == "-" or content.startswith("- ")):
                return items
            rest = content[1:].lstrip(" ")
            if not rest or rest.startswith("#"):
                self._at += 1
                items.append(self._nested(indent, depth))
            elif rest.startswith("- ") or self._split_key(number, rest) is not None:
                below = at + len(content) - len(rest)
                self._lines[self._at] = " " * below + rest + "\n"
                items.append(self._block(below, depth + 1))
            else:
                self._at += 1
                items.append(self._value(number, indent, rest))

    def _mapping(self, indent, depth):
        mapping = {}
        while True:
            number, at, content = self._peek()
            if at != indent or content == "-" or content.startswith("- "):
                return mapping
            split = self._split_key(number, content)
            if split is None:
                raise _yaml_error(number, "expected 'key: value'")
            key, rest = split
            if key in mapping:
                raise _yaml_error(number, "the key %r stands here a second time" % (key,))
            self._at += 1
            is_empty = not rest or rest.startswith("#")
            mapping[key] = self._nested(indent, depth, True) if is_empty else self._value(number, indent, rest)

    def _nested(self, indent, depth, in_mapping=False):
        """The block below a key or dash, or None.  A list may stand at its key's own indentation."""
        _, at, content = self._peek()
        is_list_at_key = in_mapping and at == indent and (content == "-" or content.startswith("- "))
        return self._block(at, depth + 1) if at > indent or is_list_at_key else None

    def _value(self, number, indent, rest):
        """The value that stands behind a key or dash, or is the block text that begins there."""
        header = re.match(_YAML_BLOCK_TEXT, rest)
        if header:
            text = self._block_text(self._block_text_indent(indent))
            return _yaml_chomp(_yaml_fold(text) if header.group(1) == ">" else text, header.group(2))
        if re.match(r"[|>][-+]?[0-9]", rest):
            raise _yaml_error(number, "an indentation indicator, as in |2, is not understood: use double quotes")
        return _yaml_value(number, rest)

    def _block_text_indent(self, outer):
        """The indentation of the block text that begins at this line: that of its first line that is not blank."""
        indent = outer + 1
        for number in range(self._at + 1, len(self._lines) + 1):
            line = self._lines[number - 1]
            at = _yaml_indentation(line)
            if line.strip(" \n") and outer < at < indent:
                raise _yaml_error(number, "a block text whose first line has fewer spaces than a blank line above it")
            if line[at:].startswith("\t"):
                raise _yaml_error(number, "a block text that begins with a tab: use double quotes")
            indent = max(indent, at)
            if line.strip(" \n"):
                break
        return indent

    def _block_text(self, indent):
        """The lines that are indented by `indent` or blank, without that indentation."""
        start = self._at
        while self._at < len(self._lines) and not self._lines[self._at][:indent].strip(" \n"):
            self._at += 1
        return "".join(line[min(indent, _yaml_indentation(line)) :] for line in self._lines[start : self._at])

    @staticmethod
    def _split_key(number, content):
        """(key, what follows its colon), or None where the line is no mapping entry."""
        if content[0] in "\"'":
            quoted = re.match(_YAML_QUOTED, content)
            rest = content[quoted.end() :].lstrip(" ") if quoted else ""
            if not rest.startswith(":") or rest[1:2] not in ("", " "):
                return None
            end = len(content) - len(rest)
            key, rest = _yaml_unquote(number, quoted), rest[1:].strip(" ")
        elif content[0] in "[{":
            return None
        else:
            plain = re.match(r"((?:[^:#]|:(?! |$)|(?<! )#)+?) *:(?: +|$)", content)
            if not plain:
                return None
            end = len(plain.group(0).rstrip(" "))
            key, rest = _yaml_plain(number, plain.group(1)), content[plain.end() :]
        if end > _YAML_MAX_KEY:
            raise _yaml_error(number, "a key longer than %d characters" % _YAML_MAX_KEY)
        return key, rest


def _yaml_fold(text):
    """Lines are joined by a space, or by the blank lines between them; not where one is indented further."""

    def fold(match):
        return match.group(1) + ("" if match.group(2) else " ")

    return re.sub(r"^([^ \t\n].*)\n(?=(\n*)[^ \t\n])", fold, text, flags=re.MULTILINE)


def _yaml_chomp(text, chomping):
    """A block text with all the line breaks at its end ("+"), with none ("-"), or with that of its last line."""
    if chomping == "+":
        return text
    chomped = text.rstrip("\n")
    return chomped if chomping == "-" or not chomped else text[: len(chomped) + 1]


def _yaml_value(number, text):
    """The value of one line's text: flow collection, quoted or plain scalar, then at most a comment."""
    value, rest = _yaml_flow(number, text, 0) if text[0] in "[{" else _yaml_scalar(number, text)
    if rest and not re.match(r" +#| *\Z", rest):
        raise _yaml_error(number, "something follows the value: put all of it in quotes")
    return value


def _yaml_scalar(number, text):
    if text[0] in "\"'":
        quoted = re.match(_YAML_QUOTED, text)
        if not quoted:
            raise _yaml_error(number, "a quote that does not end on its line")
        return _yaml_unquote(number, quoted), text[quoted.end() :]
    plain = re.split(r" +#", text, maxsplit=1)[0].rstrip(" ")
    if re.search(r":( |$)", plain):
        raise _yaml_error(number, "a second ': ' in one line: put the value in quotes")
    return _yaml_plain(number, plain), ""


def _yaml_unquote(number, quoted):
    if quoted.group(1) is None:
        return quoted.group(2).replace("''", "'")

    def unescape(match):
        code = match.group(1) or match.group(2) or match.group(3)
        try:
            return chr(int(code, 16)) if code else _YAML_ESCAPES[match.group(4)]
        except (KeyError, ValueError, OverflowError):
            raise _yaml_error(number, "the escape %s is not understood" % match.group(0)) from None

    return re.sub(_YAML_ESCAPE, unescape, quoted.group(1))


def _yaml_plain(number, text):
    if text in _YAML_WORDS:
        return _YAML_WORDS[text]
    if text[0] in "&*!|>%@`#,[]{}\"'" or text in ("-", "?", ":") or text[:2] in ("- ", "? ", ": "):
        raise _yaml_error(
            number, "a value that begins with %r is YAML that is not understood here: use quotes for a text" % text[0]
        )
    if "\t" in text:
        raise _yaml_error(number, "a tab in a value: use quotes")
    if re.match(_YAML_INT, text) and len(text) <= _YAML_MAX_NUMBER:
        return int(text)
    if re.match(_YAML_FLOAT, text) and len(text) <= _YAML_MAX_NUMBER:
        return float(text)
    if re.match(_YAML_AMBIGUOUS, text):
        raise _yaml_error(number, "a value that YAML readers take for different things: use quotes for a text")
    return text


def _yaml_flow(number, text, depth):
    """A flow list or mapping at the start of `text`; returns it and the rest."""
    closing = "]" if text[0] == "[" else "}"
    is_list = closing == "]"
    value = [] if is_list else {}
    rest = text[1:].lstrip(" ")
    if depth > _YAML_MAX_DEPTH:
        raise _yaml_error(number, "nested too deeply")
    while not rest.startswith(closing):
        entry = rest
        item, rest = _yaml_flow_item(number, rest, depth)
        if is_list:
            value.append(item)
        else:
            is_key = not isinstance(item, (list, dict)) and len(entry) - len(rest) <= _YAML_MAX_KEY
            if not rest.startswith(":") or not is_key or item in value:
                raise _yaml_error(number, "expected 'key: value' with a new key in a mapping")
            value[item], rest = _yaml_flow_item(number, rest[1:].lstrip(" "), depth)
        if rest.startswith(","):
            rest = rest[1:].lstrip(" ")
        elif not rest.startswith(closing):
            raise _yaml_error(number, "a list or mapping that does not end with %r on its line" % closing)
    return value, rest[1:]


def _yaml_flow_item(number, text, depth):
    if text[:1] in ("[", "{"):
        item, rest = _yaml_flow(number, text, depth + 1)
    elif text[:1] in ('"', "'"):
        item, rest = _yaml_scalar(number, text)
    else:
        plain = re.match(_YAML_PLAIN_IN_FLOW, text).group(0)
        if not plain.strip(" ") or plain.startswith(":"):
            raise _yaml_error(number, "an entry of a list or mapping is missing")
        item, rest = _yaml_plain(number, plain.strip(" ")), text[len(plain) :]
    return item, rest.lstrip(" ")


# ======================================================================================================================
# Settings: one dataclass says what can be set; flags, environment, config file, help and README follow its fields.
# ======================================================================================================================


def as_text(value: object) -> str:
    """A setting that is a text."""
    if not isinstance(value, str) or not value:
        raise ValueError("must be a text that is not empty")
    return value


def as_api_key(value: object) -> str:
    """A setting that is a key, as it can be sent in a header."""
    if not isinstance(value, str) or not re.match(r"[\x21-\x7e]+\Z", value):
        raise ValueError("must be printable ASCII without spaces")
    return value


def as_port(value: object) -> int:
    """A setting that is a port."""
    if isinstance(value, bool) or not re.match(r"[0-9]{1,5}\Z", str(value)) or int(value) > 65535:
        raise ValueError("must be a whole number from 0 to 65535 (0: any free port)")
    return int(value)


def as_seconds(value: object) -> float:
    """A setting that is a number of seconds."""
    try:
        seconds = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = float("nan")
    if not 0 < seconds < 1e9:
        raise ValueError("must be a number of seconds above 0")
    return seconds


def as_wait(value: object) -> float:
    """A setting that is a number of seconds, or none for no limit: inf."""
    return float("inf") if str(value).lower() in ("none", "unlimited") else as_seconds(value)


def as_flag(value: object) -> bool:
    """A setting that is true or false, in any of the usual words."""
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    if str(value).lower() not in words:
        raise ValueError("must be true or false")
    return words[str(value).lower()]


def as_bytes(value: object) -> int:
    """A setting that is a number of bytes."""
    if isinstance(value, bool) or not re.match(r"[0-9]{1,15}\Z", str(value)) or int(value) < 1:
        raise ValueError("must be a whole number of bytes above 0")
    return int(value)


def as_count(value: object) -> int:
    """A setting that is a whole number above 0."""
    if isinstance(value, bool) or not re.match(r"[0-9]{1,6}\Z", str(value)) or int(value) < 1:
        raise ValueError("must be a whole number above 0")
    return int(value)


def one_of(*words: str):
    """What reads a setting that is one of some words."""

    def parse(value):
        if value not in words:
            raise ValueError("must be %s" % " or ".join(filter(None, (", ".join(words[:-1]), words[-1]))))
        return value

    parse.metavar = "{%s}" % ",".join(words)
    return parse


_BASE_URL = r"https?://(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?(?:/[!$&-;=@-Z_a-z~%]*)?\Z"


def as_url(value: object) -> str:
    """A setting that is a base URL, without its last slash.  Raises UsageError for one with a key in it."""
    if "@" in str(value).partition("://")[2].partition("/")[0]:
        raise UsageError("a base URL must not hold a key: give it in ROCK_MODEL_SERVICE_UPSTREAM_API_KEY")
    match = re.match(_BASE_URL, str(value))
    if not match or not 0 < int(match.group(1) or 1) < 65536:
        raise ValueError("must be a base URL, as https://host/v1")
    return str(value).rstrip("/")


def as_object(value: object) -> dict:
    """A setting that is a JSON object, or the text of one."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            value = None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError("must be a JSON object")
    return value


def _as_environ(value):
    texts = value.items() if isinstance(value, dict) else ((None, None),)
    if not all(isinstance(text, str) and "\0" not in text and re.match(r"\w+\Z", str(name)) for name, text in texts):
        raise ValueError("must be a mapping of names to texts")
    return value


def _as_overrides(value):
    with contextlib.suppress(ValueError):
        value = as_object(value)
    if not isinstance(value, dict) or "stream" in value:
        raise ValueError('must be a JSON object of request fields other than stream, as {"logprobs": true}')
    return value


def _as_rules(value):
    if not isinstance(value, dict):
        raise ValueError("must be a mapping of model names to base URLs")
    return {str(model): as_url(url) for model, url in value.items()}


def _as_status_codes(value):
    if value == "none":
        return ()
    codes = value if isinstance(value, list) else str(value).split(",")
    if not all(re.match(r" *[45][0-9][0-9] *\Z", str(code)) for code in codes):
        raise ValueError("must be HTTP status codes from 400 to 599, as 429,500, or none")
    return tuple(int(code) for code in codes)


def setting(default, parse, help, env=None, flag=None, secret=False, only=None) -> object:
    """A field of a settings dataclass.

    parse: makes a value of what was given, or raises ValueError.  env, flag: where else than in the config file it can
    be given.  secret: its value is shown nowhere; with a flag it needs an env.  only: the one type that it is for.
    """
    help = "%s: %s" % (only, help) if only else help
    meta = {"parse": parse, "help": help, "env": env, "flag": flag, "secret": secret, "only": only}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class ServiceSettings:
    """What `start` can be told.  Precedence: command line, environment, config file, default."""

    type: str = setting(
        "local",
        one_of("local", "proxy", "tool-node"),
        "who answers: local (a trainer), proxy (a model's server), or tool-node (a tool)",
        flag="--type",
    )
    host: str = setting("0.0.0.0", as_text, "address to listen on", "SERVICE_HOST", "--host")
    port: int = setting(8080, as_port, "port to listen on, 0 for any free one", "SERVICE_PORT", "--port")
    api_key: str | None = setting(
        None, as_api_key, "bearer token that clients must send", "ROCK_MODEL_SERVICE_API_KEY", "--api-key", secret=True
    )
    request_timeout: float | None = setting(
        None,
        as_wait,
        "seconds that a call waits for its answer, and a proxy at each silence of the upstream; "
        "default: local none (no limit), proxy 120, tool-node 60",
        "REQUEST_TIMEOUT",
        "--request-timeout",
    )
    # Load balancers cut a connection after 60 s of silence.
    heartbeat_seconds: float = setting(
        30.0,
        as_seconds,
        "seconds of silence after which a waiting client gets a sign of life; proxy: how long an answer is held",
        "HEARTBEAT_SECONDS",
    )
    polling_interval_seconds: float = setting(
        0.1, as_seconds, "longest time that a finished answer may lie unseen", "POLLING_INTERVAL_SECONDS"
    )
    max_body_bytes: int = setting(MAX_BODY_BYTES, as_bytes, "largest request body", "MAX_BODY_BYTES")
    log_file: str | None = setting(None, as_text, "marker log; default: LLMService.log in the data dir", "LOG_FILE")
    recording_file: str | None = setting(
        None, as_text, "trajectory; default: LLMTraj.jsonl in the data dir", flag="--recording-file"
    )
    traj_append_mode: bool = setting(
        False, as_flag, "go on with an earlier trajectory", "ROCK_MODEL_SERVICE_TRAJ_APPEND_MODE"
    )
    logging_path: str | None = setting(
        None, as_text, "directory of the service's own log; default: the data dir", "ROCK_LOGGING_PATH"
    )
    logging_file_name: str = setting(
        "model_service.log", as_text, "name of the service's own log", "ROCK_LOGGING_FILE_NAME"
    )
    proxy_base_url: str | None = setting(None, as_url, "where every call goes", flag="--proxy-base-url", only="proxy")
    proxy_rules: dict = setting(
        {"gpt-3.5-turbo": "https://api.openai.com/v1", "default": "https://api-inference.modelscope.cn/v1"},
        _as_rules,
        "where the calls of each model go, and of all others (`default`)",
        only="proxy",
    )
    upstream_api_key: str | None = setting(
        None,
        as_api_key,
        "key sent upstream in place of the agent's",
        "ROCK_MODEL_SERVICE_UPSTREAM_API_KEY",
        secret=True,
        only="proxy",
    )
    request_overrides: dict = setting(
        {},
        _as_overrides,
        "fields set in every request, as a JSON object",
        flag="--request-overrides",
        only="proxy",
    )
    retryable_status_codes: tuple = setting(
        (429, 500),
        _as_status_codes,
        "answers worth another attempt",
        flag="--retryable-status-codes",
        only="proxy",
    )
    max_attempts: int = setting(
        6, as_count, "attempts that a call has, the first included", flag="--max-attempts", only="proxy"
    )
    retry_delay_seconds: float = setting(
        2.0,
        as_seconds,
        "seconds before the second attempt; doubled each time",
        flag="--retry-delay-seconds",
        only="proxy",
    )
    replay_file: str | None = setting(
        None, as_text, "answer from this trajectory, without an upstream", flag="--replay-file", only="proxy"
    )
    replay_match: str = setting(
        "order",
        one_of("order", "request"),
        "replay in order, or by request",
        flag="--replay-match",
        only="proxy",
    )
    tool: str | None = setting(None, as_text, "name of the tool", flag="--tool", only="tool-node")
    tool_file: str | None = setting(
        None, as_text, "Python file that has the tool; default: a built-in one", flag="--tool-file", only="tool-node"
    )
    tool_cfg: dict = setting(
        {},
        as_object,
        "what the tool is made with, as a JSON object",
        "ROCK_TOOL_CFG",
        "--tool-cfg",
        secret=True,
        only="tool-node",
    )
    tool_env: dict = setting({}, _as_environ, "environment variables of the tool", secret=True, only="tool-node")
    tool_workers: int = setting(
        4, as_count, "calls that run at once, each in a process of its own", flag="--tool-workers", only="tool-node"
    )

    @property
    def wait_limit(self) -> float:
        """request_timeout, or what it is by default; in seconds, inf for no limit."""
        if self.request_timeout is not None:
            return self.request_timeout
        return {"proxy": PROXY_TIMEOUT_SECONDS, "tool-node": TOOL_CALL_SECONDS}.get(self.type, float("inf"))

    def to_resume(self) -> dict:
        """The settings that `start --resume` goes on with, unless they are given anew; no keys."""
        names = ["recording_file", "replay_file"]
        for spec in fields(self):
            if spec.metadata["only"] == self.type and not spec.metadata["secret"]:
                names.append(spec.name)
        kept = {name: getattr(self, name) for name in names}
        for name in ("recording_file", "replay_file"):  # --resume may be typed in another directory
            kept[name] = kept[name] and os.path.abspath(kept[name])
        return {name: value for name, value in kept.items() if value is not None}

    def check(self, given: dict) -> None:
        """Refuse, with UsageError, settings that contradict each other.  given: those of the command line."""
        for spec in fields(self):
            if spec.metadata["only"] not in (None, self.type) and given.get(spec.name) is not None:
                raise UsageError("%s is for --type %s" % (spec.metadata["flag"], spec.metadata["only"]))
        if self.recording_file and self.replay_file:
            raise UsageError("recording_file and replay_file exclude each other: a replay is not recorded")
        if given.get("replay_match") is not None and not self.replay_file:
            raise UsageError("--replay-match needs a --replay-file")
        if self.replay_file and self.type != "proxy":
            raise UsageError("replay_file is for --type proxy")
        if self.type == "tool-node" and not self.tool:
            raise UsageError("--type tool-node needs a --tool")

    def unused(self) -> list:
        """The fields that were set, and not by the environment, for another type than this one."""
        others = [spec for spec in fields(self) if spec.metadata["only"] not in (None, self.type)]
        default = ServiceSettings()
        return [
            spec
            for spec in others
            if not spec.metadata["env"] and getattr(self, spec.name) != getattr(default, spec.name)
        ]


def resolve_settings(cls: type, flags: dict, environ: dict, config_file: str | None, earlier=()) -> object:
    """An instance of a settings dataclass.  Raises UsageError that names the source, the value and what is allowed.

    flags: by field name, None where not given.  environ: as os.environ; an empty value counts as not set.  earlier:
    values by field name that stand in for the defaults, as of the service that is resumed.
    """
    config = {} if config_file is None else read_config_file(config_file, [spec.name for spec in fields(cls)])
    values = {}
    for spec in fields(cls):
        flag, env = spec.metadata["flag"], spec.metadata["env"]
        if flags.get(spec.name) is not None:
            source, raw = flag, flags[spec.name]
        elif env and environ.get(env):
            source, raw = env, environ[env]
        elif spec.name in config and (config[spec.name] is not None or spec.default is None):
            source, raw = "%s: %s" % (config_file, spec.name), config[spec.name]
        elif spec.name in earlier:
            source, raw = "the last service's " + spec.name, earlier[spec.name]
        else:
            continue
        try:
            values[spec.name] = None if raw is None else spec.metadata["parse"](raw)
        except ValueError as error:
            got = "" if spec.metadata["secret"] else ", got %r" % (raw,)
            raise UsageError("%s: %s%s" % (source, error, got)) from None
    return cls(**values)


def read_config_file(path: str, known: list) -> dict:
    """The settings in a config file, JSON or YAML.  Raises UsageError; a key that is not `known` names the nearest."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError("cannot read the config file %s: %s" % (path, reason)) from None
    try:
        is_json = text.lstrip().startswith("{")
        config = parse_json(text, _unique_keys) if is_json else parse_yaml(text)
    except ValueError as error:
        raise UsageError("%s: %s" % (path, error)) from None
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise UsageError("%s: settings must be a mapping, got %s" % (path, json_type(config)))
    for key in config:
        if key not in known:
            raise UsageError("%s: unknown setting %r%s" % (path, key, did_you_mean(str(key), known)))
    return config


def _unique_keys(pairs):
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("a key stands in its object a second time")
    return mapping


def resolve_data_dir(flag: str | None, environ: dict) -> str:
    """The directory of log, trajectory and state: --data-dir, ROCK_MODEL_SERVICE_DATA_DIR, /data/logs, ~/.rock/logs.

    Every command finds it in this same way.  /data/logs counts where it can be written or made.  Raises UsageError.
    """
    if flag == "":
        raise UsageError("--data-dir is empty")
    chosen = flag or environ.get("ROCK_MODEL_SERVICE_DATA_DIR")
    if chosen:
        return os.path.abspath(os.path.expanduser(chosen))
    existing = DEFAULT_DATA_DIR
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    if os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK):
        return DEFAULT_DATA_DIR
    fallback = os.path.expanduser(FALLBACK_DATA_DIR)
    if not os.path.isabs(fallback):
        raise UsageError("%s cannot be written and this user has no home; %s" % (DEFAULT_DATA_DIR, GIVE_DATA_DIR))
    return fallback


# ======================================================================================================================
# Files: appending whole lines safely, setting old files aside.
#
#   Appending    One line is one write to an O_APPEND descriptor under flock(2), so lines never mix.  A line left
#                half-written by a writer that was killed is closed off with a newline by the next one; readers pass
#                over it.  A write cut short by a full disk is taken back.  Who removes or moves a file has a new one
#                begun with the next line.
# ======================================================================================================================


class Storing:
    """Makes an OSError in a with-block the StorageError that says what cannot be done with which file."""

    __slots__ = ("_what", "_path")

    def __init__(self, what: str, path: str):
        self._what = what
        self._path = path

    def __enter__(self):
        pass

    def __exit__(self, _, error, __):
        if isinstance(error, OSError):
            raise StorageError("cannot %s %s: %s" % (self._what, self._path, error.strerror)) from error


def set_aside(path: str, now: float) -> str | None:
    """Rename an earlier session's file to a dated name beside it; return that name, None where there was nothing."""
    try:
        if not os.path.getsize(path):
            return None
    except FileNotFoundError:
        return None
    root, extension = os.path.splitext(path)
    dated = "%s.%s" % (root, time.strftime("%Y%m%d-%H%M%S", time.localtime(now)))
    target, number = dated + extension, 1
    while os.path.exists(target):
        target, number = "%s-%d%s" % (dated, number, extension), number + 1
    os.rename(path, target)
    return target


@dataclass(frozen=True)
class DataPaths:
    """Where a service's files are."""

    data_dir: str
    log_file: str
    traj_file: str
    logging_file: str

    @classmethod
    def of(cls, data_dir: str, settings: ServiceSettings) -> DataPaths:
        """Those that the settings name, the rest in the data directory."""
        return cls(
            data_dir,
            os.path.abspath(settings.log_file or os.path.join(data_dir, LOG_FILE_NAME)),
            os.path.abspath(settings.recording_file or os.path.join(data_dir, TRAJ_FILE_NAME)),
            os.path.join(os.path.abspath(settings.logging_path or data_dir), settings.logging_file_name),
        )

    def make_directories(self) -> None:
        """Make those that do not exist.  Raises OSError; UsageError where a directory stands in a file's place."""
        for path in (self.log_file, self.traj_file, self.logging_file):
            if os.path.isdir(path):
                raise UsageError("%s is a directory, and should be a file" % path)
        os.makedirs(self.data_dir, exist_ok=True)
        for path in (self.log_file, self.traj_file, self.logging_file):
            os.makedirs(os.path.dirname(path), exist_ok=True)

    @contextlib.contextmanager
    def earlier_set_aside(self, keeps_trajectory: bool, logger):
        """Give the files of an earlier session a dated name, unless the block fails.  Raises StorageError."""
        moved = []
        try:
            for path in [self.log_file] + ([] if keeps_trajectory else [self.traj_file]):
                with Storing("set aside", path):
                    target = set_aside(path, time.time())
                if target:
                    moved.append((path, target))
            yield
        except BaseException:
            for path, target in moved:
                with contextlib.suppress(OSError):
                    os.replace(target, path)
            raise
        for path, target in moved:
            logger.info("the earlier session's %s is now %s", path, target)


def write_whole(path: str, data: bytes) -> None:
    """Replace a file's content at once: a reader sees the old or the new, never a part."""
    temporary = "%s.%d.tmp" % (path, os.getpid())
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def bound_log(path: str) -> None:
    """Where a log has become larger than MAX_LOG_BYTES, move the end of it, as much as that, to `path`.1.

    It is emptied, not renamed: others append to it, too, as their standard error.  Where there is no room for a copy
    there is none, as what is to be stored is worth more.  What is behind /dev/stdout is for its owner to bound.
    """
    if path.startswith("/dev/"):
        return
    with contextlib.suppress(OSError):
        if os.path.getsize(path) > MAX_LOG_BYTES:
            with open(path, "rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # or who else does it now would copy what is gone
                _move_end(file, path + ".1")


def _move_end(file, earlier):
    size = os.fstat(file.fileno()).st_size
    if size <= MAX_LOG_BYTES:
        return
    from shutil import copyfileobj

    try:
        with open(earlier, "wb") as kept:
            file.seek(size - MAX_LOG_BYTES)
            copyfileobj(file, kept, READ_BLOCK_BYTES)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(earlier)
    os.truncate(file.fileno(), 0)


class LockedFile:
    """A file that this process has locked for writing.  Made by `AppendFile.locked`.  size: in bytes."""

    def __init__(self, descriptor, info, path):
        self.descriptor = descriptor
        self.size, self.inode = info.st_size, info.st_ino
        self._path = path

    def append(self, line: bytes) -> int:
        """Add one line, newline included; return the file's size then.  Raises StorageError, nothing added."""
        before = self.size
        with Storing("write", self._path):
            written = os.write(self.descriptor, line)
            if written < len(line) and os.fstat(self.descriptor).st_size == before + written:
                os.ftruncate(self.descriptor, before)
        if written < len(line):
            raise StorageError("cannot write %s: no space left for %d bytes" % (self._path, len(line)))
        self.size += written
        return self.size

    def has_torn_line(self) -> bool:
        """Whether the last line lacks its newline.  Raises StorageError."""
        with Storing("read", self._path):
            return bool(self.size) and os.pread(self.descriptor, 1, self.size - 1) != b"\n"

    def torn_line(self) -> bytes:
        """What follows the last newline.  Raises StorageError."""
        with Storing("read", self._path):
            return b"".join(next(lines_backwards(self.descriptor, self.size)))

    def cut(self, size: int) -> None:
        """Take so many bytes off the end.  Raises StorageError."""
        with Storing("write", self._path):
            os.ftruncate(self.descriptor, self.size - size)
        self.size -= size


def lines_backwards(descriptor: int, size: int):
    """Yield the lines of a file's first `size` bytes from the last to the first, each as its pieces; the very first one
    yielded is what follows the last newline."""
    pieces = []  # of the line being put together, last first
    while size > 0:
        length = min(SCAN_BLOCK_BYTES, size)
        size -= length
        block, end = os.pread(descriptor, length, size), length
        at = block.rfind(b"\n")
        while at >= 0:
            yield [block[at + 1 : end], *reversed(pieces)]
            pieces, end = [], at
            at = block.rfind(b"\n", 0, end)
        pieces.append(block[:end])
    yield pieces[::-1]


@contextlib.contextmanager
def held(lock: threading.Lock, path: str):
    """Hold a lock that guards writing to `path`, within the time that a file's own lock is waited for.

    Raises StorageError: without this bound those who wait would wait for each other's waits.
    """
    if not lock.acquire(timeout=LOCK_SECONDS):
        raise StorageError("%s stays locked by another writer" % path)
    try:
        yield
    finally:
        lock.release()


class AppendFile:
    """A file of lines that several threads and processes append to.

    path: its directory must exist.  The file is opened anew for each use, so that a file that was moved away or
    removed is not written to.
    """

    def __init__(self, path: str):
        self.path = path
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def locked(self):
        """Hold the file against every other writer; yields a LockedFile.  Raises StorageError."""
        with held(self._lock, self.path):
            file = self._open_locked()
            try:
                if file.has_torn_line():
                    self._mend(file)
                yield file
            finally:
                with Storing("write", self.path):  # some file systems say only now that they could not
                    os.close(file.descriptor)

    def _mend(self, file):
        """Do what has to be done where the last line is half-written."""
        file.append(b"\n")

    def prepare(self) -> None:
        """Make the file, or end its half-written last line, before it is read.  Raises StorageError."""
        with self.locked():
            pass

    def close_torn_line(self) -> None:
        """As `prepare`, but a file that does not exist is not made."""
        if os.path.exists(self.path):
            self.prepare()

    def append(self, line: bytes) -> int:
        """Add one line, newline included; return the file's size then.  Raises StorageError."""
        with self.locked() as file:
            return file.append(line)

    def _open_locked(self):
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            with Storing("open", self.path):
                descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            info = self._info_if_locked(descriptor)
            if info is not None:
                return LockedFile(descriptor, info, self.path)
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise StorageError("%s stays locked by another process" % self.path)
            time.sleep(0.001)

    def _info_if_locked(self, descriptor):
        """Lock it; what it is, None where another holds it or the path has come to mean another file meanwhile."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            info = os.fstat(descriptor)
            return info if os.path.samestat(info, os.stat(self.path)) else None
        except (BlockingIOError, FileNotFoundError):
            return None
        except OSError as error:
            os.close(descriptor)
            raise StorageError("cannot lock %s: %s" % (self.path, error.strerror)) from error


# ======================================================================================================================
# Marker log: the log as a file. The service appends requests and follows what is appended; the trainer's side appends
# answers and finds its place from the end. Neither reads what it has read before.
# ======================================================================================================================


class LogTail:
    """Follows a marker log: each `read` yields the records that were completed since the last one.

    offset: where in the file to begin, at the start of a line.  A file that was replaced, removed or cut short is read
    anew from its start, and `was_replaced` says so; taking back the line that is being written is no cut.
    on_replaced: called each time, before the first record of it is yielded.
    """

    def __init__(self, path: str, offset: int = 0, on_replaced=lambda: None):
        self._path = path
        self._on_replaced = on_replaced
        self._offset = offset  # the first byte not yet read
        self._partial = bytearray()  # the last line so far, without its newline
        self._inode = None
        self._expected = 0  # how long the file has been, as far as somebody counts on it
        self.was_replaced = False

    def expect(self, size: int) -> None:
        """The file is so long, read or not: where it is found shorter, it was cut short.  For any thread."""
        self._expected = max(self._expected, size)

    def read(self):
        """Yield new Records, oldest first.  A log that does not exist (yet) has none.  Raises OSError."""
        expected = self._expected  # before the size is looked at: at any time it grows, and more is counted on
        try:
            info = os.stat(self._path)
            self._notice(info, expected)
            if info.st_size == self._offset:
                return
            file = open(self._path, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            if self._inode is not None or expected:
                self._begin_anew()
            self._inode = None
            return
        with file:
            if os.fstat(file.fileno()).st_ino != self._inode:
                return  # it was replaced just now
            if not self._goes_on(file):
                self._begin_anew()
            file.seek(self._offset)
            for block in iter(lambda: file.read(READ_BLOCK_BYTES), b""):
                yield from self._records(block)

    def _goes_on(self, file):
        """Whether the lines that were read end where they did: a file may get the inode number of one just removed."""
        line_start = self._offset - len(self._partial)
        return not line_start or os.pread(file.fileno(), 1, line_start - 1) == b"\n"

    def _notice(self, info, expected):
        line_start = self._offset - len(self._partial)
        if self._inode not in (None, info.st_ino) or info.st_size < max(line_start, expected):
            self._begin_anew()
        elif info.st_size < self._offset:
            self._restart(line_start)
        self._inode = info.st_ino

    def _begin_anew(self):
        self._restart(0)
        self._expected = 0
        self.was_replaced = True
        self._on_replaced()

    def _restart(self, offset):
        self._offset = offset
        self._partial.clear()

    def _records(self, block):
        start = self._offset - len(self._partial)
        self._offset += len(block)
        first, *others = block.split(b"\n")
        self._partial += first
        for following in others:
            record = parse_record(bytes(self._partial), start)
            start += len(self._partial) + 1
            self._partial = bytearray(following)
            if record:
                yield record


@dataclass
class Place:
    """What a log says around turn `index`: its request and response, the next turn's request and whether that is
    answered, whether the session is over, and `end`: the offset behind the last whole line."""

    request: Record | None = None
    response: Record | None = None
    next_request: Record | None = None
    next_is_answered: bool = False
    has_ended: bool = False
    end: int = 0


_PLAIN_META = re.compile(rb'LLM_(REQUEST|RESPONSE)_END\{"timestamp": [0-9]{1,20}, "index": ([1-9][0-9]{0,18})\}\r?\Z')
_PLAIN_META_BYTES = 82  # the longest that matches


def _is_beside(line_end, index):
    """Whether the end of a line shows that it is no record of turn `index` or the next, and no earlier request."""
    meta = _PLAIN_META.search(line_end[-_PLAIN_META_BYTES:])
    number = int(meta.group(2)) if meta else index
    return number > index + 1 or (number < index and meta.group(1) == b"RESPONSE")


def find_place(descriptor: int, size: int, index: int) -> Place:
    """Find a turn by reading backwards from `size`.

    Requests stand in the order of their index and an answer stands behind its request, so the search ends at request
    `index`: it costs what was written since, and the memory of the longest line.  Of other turns, which are many where
    many requests wait at once, only the last bytes are looked at.
    """
    lines = lines_backwards(descriptor, size)
    place = Place(end=size - sum(map(len, next(lines))))
    for pieces in lines:
        record = None if _is_beside(pieces[-1], index) else parse_record(b"".join(pieces))
        if record is None:
            continue
        if record.kind == "end":
            place.has_ended = True
        elif record.kind == "response":
            if record.index == index:
                place.response = record
            place.next_is_answered |= record.index == index + 1
        elif record.index == index + 1:
            place.next_request = record
            if index == 0:
                break
        elif record.index <= index:
            place.request = record if record.index == index else None
            break
    return place


def check_streamable(request: Record, text: str) -> None:
    """Refuse, with UsageError, an answer that cannot be made the stream that its request asks for."""
    if b'"stream"' not in request.body:
        return
    try:
        body = parse_object(request.text, "the request")
    except ValueError:
        return  # another writer's, which no agent of ours waits for
    answer = parse_json(text)
    if body.get("stream") and error_status(answer) is None:
        try:
            completion_chunks(answer, body, request.index, 0)
        except ValueError as error:
            raise UsageError("request %d asks for a stream: %s" % (request.index, error)) from None


def _is_same_json(one, other):
    try:
        return one == other or _canonical(one) == _canonical(other)
    except ValueError:
        return False


def _canonical(text):
    return json.dumps(parse_json(text), sort_keys=True)


class MarkerLog:
    """The marker log's writer and reader."""

    def __init__(self, path: str, clock=time.time):
        self.path = path
        self._file = AppendFile(path)
        self._clock = clock

    def append(self, kind: str, text: str, index: int) -> int:
        """Add a "request" or "response"; return the log's size then.  Raises StorageError."""
        return self._file.append(self._encode(kind, text, index))

    def append_session_end(self) -> None:
        """Add SESSION_END.  Raises StorageError."""
        self._file.append(SESSION_END_LINE)

    def prepare(self) -> None:
        """As of an AppendFile.  Raises StorageError."""
        self._file.prepare()

    def append_response(self, index: int, text: str) -> Place:
        """Answer request `index`, unless it has that very answer or the session is over; return the place after.

        Raises UsageError where the log has no such request, or the answer cannot be a stream and has to be one;
        RockError where there is another answer; StorageError.
        """
        if not os.path.exists(self.path):
            raise UsageError("there is no request %d to answer: %s does not exist" % (index, self.path))
        with self._file.locked() as file:
            place = find_place(file.descriptor, file.size, index)
            if place.request is None:
                raise UsageError("there is no request %d to answer in %s" % (index, self.path))
            if place.response is None and not place.has_ended:
                check_streamable(place.request, text)
                file.append(self._encode("response", text, index))
                place.response, place.end = Record("response", index, text.encode("utf-8")), file.size
            elif place.response is not None and not _is_same_json(place.response.text, text):
                raise RockError("request %d already has another answer; it stays as it is" % index)
            return place

    def find(self, index: int) -> Place:
        """The place of turn `index`; all empty where there is no log.  Raises StorageError."""
        with Storing("read", self.path):
            try:
                with open(self.path, "rb") as file:
                    return find_place(file.fileno(), os.fstat(file.fileno()).st_size, index)
            except FileNotFoundError:
                return Place()

    def record_at(self, offset: int) -> Record | None:
        """The record whose line starts at `offset`; None where there is none (any more)."""
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                return parse_record(file.readline().rstrip(b"\n"), offset)
        except OSError:
            return None

    def tail(self, offset: int = 0, on_replaced=lambda: None) -> LogTail:
        """Follow the log from a line's start."""
        return LogTail(self.path, offset, on_replaced)

    def _encode(self, kind, text, index):
        return encode_record(kind, text, index, int(self._clock() * 1000))


def poll_delay(waited: float, interval: float) -> float:
    """Seconds until the next look, after `waited` seconds: a fixed share of the wait, at most `interval`.

    A quick turn is seen at once, and a long wait costs no CPU.
    """
    return min(interval, max(MIN_POLL_SECONDS, waited * POLL_FRACTION))


# ======================================================================================================================
# Anti-call: the trainer's side of a turn. One call answers request k and waits for request k+1.
#
#   Repeating a call is always safe: an answer that stands in the log is not written again, and the same request is
#   printed again.  After SESSION_END a request that was never answered has nobody waiting, so the session's end is
#   what the trainer hears.
# ======================================================================================================================


class RequestWaiter:
    """Waits for a request to appear in a marker log.

    interval: the longest time between two looks, in seconds.  is_service_alive: () -> True, False (it was killed), or
    None (there is none, and as far as known there was none).  clock, sleep: as in `time`, for tests.
    """

    def __init__(self, log: MarkerLog, interval: float, is_service_alive, clock=time.monotonic, sleep=time.sleep):
        self._log = log
        self._interval = interval
        self._is_service_alive = is_service_alive
        self._clock = clock
        self._sleep = sleep

    def wait(self, index: int, place: Place, timeout: float | None) -> str:
        """The text of request `index` (JSON, markers escaped), or SESSION_END.

        place: of turn `index - 1`.  Raises NotYet after `timeout` seconds, RockError when the service stays away.
        """
        if place.has_ended and (place.next_request is None or not place.next_is_answered):
            return SESSION_END_MARKER
        if place.next_request is not None:
            return place.next_request.text
        tail = self._log.tail(place.end)
        began = last_present = next_look = self._clock()
        was_seen = None
        while True:
            found = self._look(tail, index)
            if found is not None:
                return found
            now = self._clock()
            if timeout is not None and now - began >= timeout:
                raise NotYet("request %d has not come within %g s; repeat the call to wait on" % (index, timeout))
            if now >= next_look:
                next_look = now + LIVENESS_SECONDS
                is_alive = self._is_service_alive()
                was_seen = was_seen or is_alive is not None
                last_present = now if is_alive or not was_seen else last_present
                if now - last_present > GONE_SECONDS:
                    raise RockError("the model service is gone; run start --resume, then repeat this call")
            left = self._interval if timeout is None else max(0.0, began + timeout - now)
            self._sleep(min(left, poll_delay(now - began, self._interval)))

    def _look(self, tail, index):
        request = None
        for record in tail.read():
            if record.kind == "end":
                return SESSION_END_MARKER
            if record.kind == "request" and record.index == index:
                request = record
        if tail.was_replaced and index > 1:
            message = "%s was replaced or removed: a new session has begun, at --index 0, or its log was lost"
            raise RockError(message % self._log.path)
        return request.text if request else None


# ======================================================================================================================
# Secrets: keys that must not be written down, nor told to anyone.
# ======================================================================================================================


class Secrets:
    """Keys that must not be written down, though an upstream may have sent them back.

    is_cut: whether what is searched was cut off, perhaps in the middle of a key.  Only what is long enough is taken for
    a key: agents are given words like "unused".
    """

    def __init__(self, keys: list, is_cut: bool = False):
        long_enough = {key for key in keys if key and len(key) >= MIN_SECRET_LENGTH}
        self._keys = sorted(long_enough, key=len, reverse=True)  # or the end of one that begins as another would stay
        self._is_cut = is_cut

    def hide(self, text: str | None) -> str | None:
        """A text without them."""
        for key in self._keys if text else ():
            text = text.replace(key, "[key]")
            beginnings = range(len(key) - 1, MIN_SECRET_LENGTH - 1, -1) if self._is_cut else ()
            size = next((size for size in beginnings if text.endswith(key[:size])), 0)
            text = text[:-size] + "[key]" if size else text
        return text

    def hide_in_json(self, text: str | None) -> str | None:
        """A JSON text without them, however its strings write their characters."""
        if not text or not self._keys or not self._may_hold_some(text):
            return text
        return _STRING.sub(self._hide_in_string, text)

    def _may_hold_some(self, text):
        is_plain = not self._is_cut and "\\/" not in text and "\\u00" not in text
        return not is_plain or any(dump_json(key)[1:-1] in text for key in self._keys)

    def _hide_in_string(self, match):
        token = match.group()
        if len(token) < MIN_SECRET_LENGTH:
            return token
        string = parse_json(token)
        hidden = self.hide(string)
        return token if hidden == string else dump_json(hidden)

    def in_body(self, body: bytes) -> tuple[str | None, str | None]:
        """A body that is no JSON, as the JSON text of a string, and what that holds: "text" or "base64"; else None."""
        if not body:
            return None, None
        try:
            return dump_json(self.hide(body.decode("utf-8"))), "text"
        except UnicodeDecodeError:
            from base64 import b64encode

            text = self.hide(body.decode("latin-1"))
            return dump_json(b64encode(text.encode("latin-1")).decode()), "base64"


_SECRET_NAME = re.compile("key|token|secret|passw|auth|credential|cookie", re.IGNORECASE)


def secrets_in(value: object) -> list:
    """The values in a configuration that are secrets, as their names tell; as texts."""
    secrets, waiting = [], [(value, False)]
    while waiting:
        part, is_secret = waiting.pop()
        if isinstance(part, dict):
            waiting += [(part[name], is_secret or bool(_SECRET_NAME.search(name))) for name in part]
        elif isinstance(part, list):
            waiting += [(item, is_secret) for item in part]
        elif is_secret:
            secrets.append(str(part))
    return secrets


# ======================================================================================================================
# Trajectory: LLMTraj.jsonl, one JSON object a call.
# ======================================================================================================================


@dataclass
class CallRecord:
    """One call, as it is written down.

    request, response: JSON texts, None where there was none.  model: as asked for, where that is a text.  status: of
    HTTP, 499 where the client hung up.  error: what went wrong, or None.  start_time: seconds since the epoch.
    response_time: seconds.  index: the turn, of the local type.  more: further fields, as the proxy has.
    """

    request: str | None
    response: str | None
    model: str | None
    stream: bool
    status: int
    error: str | None
    start_time: float
    response_time: float
    index: int | None = None
    more: dict = field(default_factory=dict)

    def line(self) -> bytes:
        """As a line of JSON.  `status` and `index` end it, where `recorded_turns` finds them without parsing."""
        rest = {
            "model": self.model,
            "stream": self.stream,
            **self.more,
            "error": self.error,
            "start_time": self.start_time,
            "end_time": round(self.start_time + self.response_time, 6),
            "response_time": round(self.response_time, 6),
            "status": self.status,
        }
        if self.index is not None:
            rest["index"] = self.index
        texts = '{"request":%s,"response":%s,' % (self.request or "null", self.response or "null")
        return (texts + dump_json(rest)[1:] + "\n").encode("utf-8")


_CALL_START = b'{"request":'  # of each line


class Trajectory(AppendFile):
    """A service's trajectory file.  Every line of it is a whole call, whoever was killed.

    A half-written last line is cut off: the client of that call has not seen the end of its answer.  Where the file was
    removed, replaced or cut short since the last call, the logger is told, and a new one is begun.
    """

    def __init__(self, path: str, logger):
        super().__init__(path)
        self._logger = logger
        self._known = None  # (inode, size) after the last call

    def append(self, line: bytes) -> int:
        """Add one call; return the file's size then.  Raises StorageError."""
        with self.locked() as file:
            if self._known and (file.inode != self._known[0] or file.size < self._known[1]):
                message = "%s was removed, replaced or cut short while in use: earlier calls are not in it any more"
                self._logger.error(message, self.path)
            self._known = file.inode, file.append(line)
            return file.size

    def size(self) -> int:
        """Where the next call will stand, in bytes.  Raises StorageError."""
        self.close_torn_line()
        try:
            return os.path.getsize(self.path)
        except OSError:
            return 0

    def _mend(self, file):
        line = file.torn_line()
        if line.startswith(_CALL_START[: len(line)]) and not _is_json(line):
            file.cut(len(line))
            self._logger.warning("the half-written last line of %s was cut off: its writer was killed", self.path)
        else:  # another writer's, or all of it but the newline
            super()._mend(file)


def recorded_status(record: dict) -> int:
    """The HTTP status of a trajectory's record, of ROCK's kind too.  Raises ValueError."""
    status, error = record.get("status"), record.get("error")
    if type(status) is int and 100 <= status < 600:
        return status
    if status in (None, "success", "failure"):
        named = re.match(r"upstream_status=([45][0-9][0-9])\Z", str(error))
        if named:
            return int(named.group(1))
        return 200 if status == "success" or not (status or error) else 502
    raise ValueError("status must be a number from 100 to 599, got %s" % dump_json(status))


_TRAJ_LINE_END = rb'"error":null,[^{}]*"status":([0-9]+),"index":([0-9]+)\}\n\Z'


def recorded_turns(path: str, start: int) -> dict:
    """The turns whose answer stands in a trajectory file, each with that answer's HTTP status.

    start: where the session's calls begin: in append mode other sessions' turns of the same index stand before them,
    and no clock could tell them apart.
    """
    turns = {}
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        if start <= os.fstat(file.fileno()).st_size:  # else it was emptied, or is another, since then
            file.seek(start)
        for line in file:
            match = re.search(_TRAJ_LINE_END, line[-512:])
            if match:
                status, index = match.groups()
                turns[int(index)] = int(status)
    return turns


# ======================================================================================================================
# Processes: is this process alive and still the same; is the service running, and whose state is this; how a process
# of our own is begun.
# ======================================================================================================================


def process_identity(pid: int) -> str | None:
    """What tells a living process from a later one with its number; None for one that is gone or a zombie.

    That is its start time from /proc.  Without /proc, or a descriptor to read it, it is "", and neither a recycled
    number nor a zombie that is not our own child can be told.
    """
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            fields_after_name = file.read().rpartition(b")")[2].split()
    except OSError:
        return "" if _answers_signal(pid) and not _is_dead_child(pid) else None
    if fields_after_name[0] in (b"Z", b"X"):
        return None
    return fields_after_name[19].decode()


def is_same_process(pid: int, identity: str | None) -> bool:
    """Whether a process lives and is not known to be another than the one of that identity.

    It cannot be told where /proc cannot be read, as without a free descriptor, now or when the identity was looked up.
    """
    now = process_identity(pid)
    return now is not None and identity is not None and (now == identity or "" in (now, identity))


def _answers_signal(pid):
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _is_dead_child(pid):
    """Whether it is a child of ours that has ended and is not reaped yet; it is not reaped by this."""
    with contextlib.suppress(OSError, AttributeError):  # some systems have no waitid
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return False


SESSION_STATE = ("traj_start", "watched")  # what a service's state says of its session alone


def stopped_state(state: dict) -> dict:
    """What remains of a service's state when it stops: what --resume and anti-call-llm go on with."""
    kept = ("type", "host", "port", "has_api_key", "has_upstream_api_key", "settings", "log_file", *SESSION_STATE)
    return {key: state[key] for key in kept if key in state}


def trajectory_start(state: dict) -> int:
    """Where in the trajectory file the calls of a service's session begin, by its state."""
    start = state.get("traj_start")
    return start if type(start) is int and start >= 0 else 0


def watched_by(state: dict) -> dict:
    """The processes that a service's state says it watched, as pid -> identity."""
    watched = state.get("watched")
    pairs = watched.items() if isinstance(watched, dict) else ()
    return {int(pid): identity for pid, identity in pairs if re.match(r"[0-9]{1,9}\Z", pid)}


class ServiceState:
    """Which service, if any, runs on a data directory.

    A lock file is held as long as the service lives, so that a killed one frees it and no process number is trusted;
    a state file beside it says the rest: pid, identity, host, port, has_api_key, log_file, traj_start (see
    `trajectory_start`), watched (pid: identity).
    What a stopped one leaves has no pid.  What a killed one leaves has, and is how one knows.

    name: of the two files.  title: what messages call the service.
    """

    def __init__(self, data_dir: str, name: str = STATE_NAME, title: str = "model service"):
        self.data_dir = data_dir
        self.title = title
        self._lock_path = os.path.join(data_dir, name + ".lock")
        self._state_path = os.path.join(data_dir, name + ".json")
        self._descriptor = None

    def acquire(self) -> None:
        """Become the service of this directory.  Raises RockError where one runs, StorageError."""
        try:
            self._descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            is_ours = self._lock_within(PROBE_SECONDS)
        except OSError as error:
            self.release()
            raise StorageError("cannot lock %s: %s" % (self._lock_path, error.strerror)) from error
        if not is_ours:
            self.release()
            raise RockError(self.running_message())

    def _lock_within(self, seconds):
        """Lock, with patience for those who only look (`is_running`)."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
            time.sleep(0.005)

    def release(self) -> None:
        """Stop being it.  Harmless where it was not."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def write(self, state: dict) -> None:
        """Publish the state.  Only the holder does.  Raises StorageError."""
        with Storing("write", self._state_path):
            write_whole(self._state_path, dump_json(state).encode("utf-8"))

    def read(self) -> dict:
        """The state last written; empty where there is none, or it cannot be read."""
        try:
            with open(self._state_path, encoding="utf-8") as file:
                state = parse_json(file.read())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def is_running(self) -> bool:
        """Whether a service holds this directory now.  Raises StorageError where no descriptor is left to look."""
        try:
            descriptor = os.open(self._lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
                raise StorageError("cannot open %s: %s" % (self._lock_path, error.strerror)) from error
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return False

    def stays_running(self) -> bool:
        """As `is_running`, with patience for one that has just been killed: its threads end one by one."""
        deadline = time.monotonic() + PROBE_SECONDS
        while self.is_running():
            state = self.read()
            pid = state.get("pid")
            if (type(pid) is int and is_same_process(pid, state.get("identity"))) or time.monotonic() > deadline:
                return True
            time.sleep(0.005)
        return False

    def liveness(self) -> bool | None:
        """True where a service runs, False where one was killed, None where neither."""
        if self.is_running():
            return True
        return False if "pid" in self.read() else None

    def running_message(self) -> str:
        """Why a second one cannot start."""
        state = self.read()
        where = "%s:%s" % (state.get("host", "?"), state.get("port", "?"))
        article = "an" if self.title[0] in "aeiou" else "a"
        message = "%s %s already runs (pid %s, %s); stop it first, or give another --data-dir"
        return message % (article, self.title, state.get("pid", "?"), where)

    def verified_pid(self, seconds: float) -> int | None:
        """The running service's process number, None where it is not the process that wrote the state.

        seconds: how long a service that is just starting has to write it.
        """
        deadline = time.monotonic() + seconds
        while True:
            state = self.read()
            pid, identity = state.get("pid"), state.get("identity")
            if type(pid) is int and pid > 0 and process_identity(pid) == identity:
                return pid
            if time.monotonic() > deadline:
                return None
            time.sleep(0.005)


# The service is handed the bytecode of this file on its standard input.  Compiling it there would take as long as all
# else that it does to start, and leave it with 10 MB that it never needs again.
# It must not import from the working directory, which is the agent's.
RUN_BYTECODE = """import marshal, sys
sys.path[:] = filter(None, sys.path)
__file__ = sys.argv.pop(1)
__bytecode__ = sys.stdin.buffer.read(int(sys.stdin.buffer.readline()))
exec(marshal.loads(__bytecode__))"""


def interpreter() -> list:
    """The command of this interpreter, as isolated and as strict as it was started itself."""
    flags = sys.flags
    switches = ["-I"] * flags.isolated + ["-S"] * flags.no_site + ["-b"] * flags.bytes_warning
    return [sys.executable, *switches, *("-W" + option for option in sys.warnoptions)]


def own_bytecode() -> bytes:
    """This file's bytecode, with its length on a line before it: what RUN_BYTECODE reads."""
    code = globals().get("__bytecode__")
    if code is None:
        import marshal

        code = marshal.dumps(__loader__.get_code(__loader__.name))  # run by -m, it is not called what we are
    return b"%d\n%s" % (len(code), code)


# ======================================================================================================================
# HTTP connections: a client's socket, read and written within bounds, and seen when its other side closes.
# ======================================================================================================================


def _peek(sock):
    """True: the other side closed.  False: it sent more.  None: neither."""
    import socket

    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) if _is_readable(sock) else None
    except BlockingIOError:
        return None
    except (OSError, ValueError):
        return True


def _is_readable(sock):
    """Whether something has come: bytes, the end, an error."""
    import select

    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


class HangupWatcher:
    """One thread that sees clients hang up while their requests wait.

    A client that only closes its sending side cannot be told from one that is gone, and counts as gone.
    """

    def __init__(self):
        import selectors
        import socket

        self._lock = threading.Lock()  # register and unregister are two steps each, in Python and in the kernel
        self._selector = selectors.DefaultSelector()
        self._stop_receiver, self._stop_sender = socket.socketpair()
        self._selector.register(self._stop_receiver, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="rock-hangups", daemon=True)
        self._thread.start()

    def watch(self, sock: object, callback: object) -> None:
        """Call `callback()` once when the other side of `sock` closes."""
        with self._lock:
            self._selector.register(sock, 1, callback)

    def unwatch(self, sock: object) -> None:
        """Stop watching.  Must come before the socket is closed; harmless where it was not watched."""
        with self._lock, contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def stop(self) -> None:
        """End the thread.  Harmless a second time."""
        if not self._thread.is_alive():
            return
        self._stop_sender.send(b"x")
        self._thread.join()
        self._selector.close()
        self._stop_sender.close()
        self._stop_receiver.close()

    def _run(self):
        while True:
            for key, _ in self._selector.select(IDLE_POLL_SECONDS):
                if key.data is None:
                    return
                self._look(key)

    def _look(self, key):
        with self._lock:
            if self._selector.get_map().get(key.fd) is not key:
                return  # its request is done with, and the socket may wait for another by now
            is_gone = _peek(key.fileobj)
            if is_gone is not None:  # gone, or the client sends its next request already: nothing more can be seen
                self._selector.unregister(key.fileobj)
        if is_gone:
            key.data()


class Connection:
    """A client's socket, read and written within bounds.  Used by one thread."""

    _READABLE, _WRITABLE = 1, 4  # POLLIN and POLLOUT

    def __init__(self, sock: object, max_body_bytes: int, clock=time.monotonic):
        import select

        sock.setblocking(False)
        self.sock = sock
        self._max_body_bytes = max_body_bytes
        self._clock = clock
        self._buffer = bytearray()
        self._poll = select.poll()

    def read_head(self) -> RequestHead | None:
        """The next request's header; None where the client closed, or was idle for too long.

        Raises ProtocolError: malformed, too large (431), too slow (408).
        """
        if not self._buffer and not self._receive(self._clock() + IDLE_SECONDS, idle=True):
            return None
        deadline = self._clock() + HEAD_SECONDS
        while True:
            while self._buffer.startswith(b"\r\n"):
                del self._buffer[:2]
            end = self._buffer.find(b"\r\n\r\n")
            if end > MAX_HEAD_BYTES or (end < 0 and len(self._buffer) > MAX_HEAD_BYTES):
                raise ProtocolError(431, "the request header is longer than %d bytes" % MAX_HEAD_BYTES)
            if end >= 0:
                head = bytes(self._buffer[:end])
                del self._buffer[: end + 4]
                return parse_request_head(head)
            if _has_lone_lf(self._buffer):
                raise ProtocolError(400, "a line of the request header does not end in CRLF")
            if not self._receive(deadline):
                if not self._buffer:
                    return None
                raise ProtocolError(400, "the connection was closed in the middle of a request header")

    def read_body(self, head: RequestHead, max_bytes: int | None = None) -> bytes:
        """The request's whole body.  Raises as `body_pieces`, and so do its pieces."""
        body = bytearray()
        for piece in self.body_pieces(head, max_bytes):
            body += piece
        return bytes(body)

    def body_pieces(self, head: RequestHead, max_bytes: int | None = None) -> object:
        """The request's body as an iterator of bytes as they come, in pieces of no more than was received at a time.

        Nothing is read, and no client is told to go on, before the first piece is asked for.  max_bytes: None for the
        connection's.  Raises ProtocolError 413 where the header says more than that; the iterator raises ProtocolError:
        malformed, too large (413), too slow (408).
        """
        max_bytes = self._max_body_bytes if max_bytes is None else max_bytes
        _check_body_size(head.content_length or 0, max_bytes)
        return self._read_pieces(head, max_bytes) if head.has_body else iter(())

    def _read_pieces(self, head, max_bytes):
        if head.expects_continue and not self._buffer:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        began, size = self._clock(), 0
        decoder = body_decoder(head.content_length, head.is_chunked)
        while True:
            data = bytes(self._buffer)
            self._buffer.clear()
            piece = decoder.feed(data)
            size += len(piece)
            _check_body_size(size + decoder.left, max_bytes)
            if decoder.is_done:
                self._buffer += decoder.rest
            if piece:
                yield piece
            if decoder.is_done:
                return
            expected = max(size, head.content_length or 0)
            if not self._receive(began + BODY_GRACE_SECONDS + expected / BODY_BYTES_PER_SECOND):
                raise ProtocolError(400, "the connection was closed in the middle of a request body")

    def _receive(self, deadline, idle=False):
        """Read what there is into the buffer; False at the end of what the client sends."""
        while self._clock() < deadline:
            try:
                data = self.sock.recv(SEND_PIECE_BYTES)
                self._buffer += data
                return bool(data)
            except BlockingIOError:
                pass
            except OSError as error:
                raise ClientGone from error
            self._wait(self._READABLE, deadline)
        if idle:
            return False
        raise ProtocolError(408, "the request came too slowly")

    def write(self, data: bytes) -> None:
        """Send all of it.  Raises ClientGone, also where the client does not take a piece within SEND_SECONDS."""
        view = memoryview(data)
        for start in range(0, len(view), SEND_PIECE_BYTES):
            self._write_piece(view[start : start + SEND_PIECE_BYTES])

    def _write_piece(self, piece):
        deadline = None
        while piece:
            try:
                piece = piece[self.sock.send(piece) :]
            except BlockingIOError:
                deadline = deadline or self._clock() + SEND_SECONDS
                if not self._wait(self._WRITABLE, deadline):
                    raise ClientGone from None
            except OSError as error:
                raise ClientGone from error

    def _wait(self, event, deadline):
        """Wait until the socket is ready; False where the deadline came first."""
        left = deadline - self._clock()
        self._poll.register(self.sock, event)
        return left > 0 and bool(self._poll.poll(left * 1000))

    def reset(self) -> None:
        """Close the connection so that the client sees it break."""
        import socket
        import struct

        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.sock.close()

    def linger(self) -> None:
        """After an early refusal: take what the client still sends, for a moment, so that it can read the refusal."""
        import socket

        deadline = self._clock() + LINGER_SECONDS
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
            while self._wait(self._READABLE, deadline) and self.sock.recv(SEND_PIECE_BYTES):
                pass


def _check_body_size(size, max_bytes):
    if size > max_bytes:
        raise ProtocolError(413, "the request body is larger than %d bytes" % max_bytes)


# ======================================================================================================================
# HTTP server: one core for every service of this module. It routes, authorises, answers, logs, counts, and ends every
# thread and socket it began. A service gives it a table of routes.
# ======================================================================================================================


@dataclass(frozen=True)
class Reply:
    """What a route's handler returns.

    body: the whole body; None where there is none, and the headers say all that is to be said of it, as after HEAD.
    Or `pieces`: an iterator of bytes, each sent as it comes.  An exception out of `pieces` breaks the connection, so
    that a client never takes a part for the whole.  length: of all pieces, where it is known.  content_type: None where
    `headers` has it.  done: called once, with whether all was sent.  note: () -> words for the request's log line.
    """

    status: int = 200
    body: bytes | None = b""
    content_type: str | None = "application/json"
    headers: tuple = ()
    pieces: object = None
    length: int | None = None
    done: object = None
    note: object = str


def json_reply(value: object, status: int = 200) -> Reply:
    """A Reply that carries a JSON value."""
    return Reply(status, dump_json(value).encode("utf-8") + b"\n")


def error_reply(error: ApiError) -> Reply:
    """A Reply that carries an error."""
    return Reply(error.status, error.body() + b"\n", headers=error.headers)


def models_reply(names: object) -> Reply:
    """The answer of /v1/models."""
    return json_reply({"object": "list", "data": [model_object(name) for name in names]})


def model_reply(escaped_name: str) -> Reply:
    """The answer of /v1/models/NAME, whose name stands in the path."""
    from urllib.parse import unquote

    return json_reply(model_object(unquote(escaped_name)))


def model_object(name: str) -> dict:
    """A model, as OpenAI describes it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "rock-model-service"}


@dataclass(frozen=True)
class Request:
    """What a route's handler is given.

    name: what stood for `{name}` in the route's path.  watch_hangup: call it with a function, once, and that function
    is called from another thread when the client hangs up before the reply is done.  sock: the client's socket, to be
    looked at only.  pieces: on a streamed route an iterator of the body's bytes as they come, in bounded pieces, and
    `body` is empty; it raises ApiError for what is wrong with them.  A hang-up can be seen only once it is at its end.
    """

    head: RequestHead
    body: bytes
    name: str
    watch_hangup: object
    sock: object
    pieces: object = ()

    def is_client_gone(self) -> bool:
        """Whether the client has hung up."""
        return _peek(self.sock) is True

    def json(self) -> tuple[str, dict]:
        """The body as one line of JSON text, and its value.  Raises ApiError 400 or 415."""
        check_json_type(self.head.header("content-type"), self.head.header("content-encoding"))
        try:
            return json_object(self.body.decode("utf-8-sig"), "the request body")
        except UnicodeDecodeError as error:
            raise ApiError(400, "the request body is not UTF-8 at byte %d" % error.start) from None
        except ValueError as error:
            raise ApiError(400, str(error)) from None


@dataclass(frozen=True)
class Route:
    """A method and path, and who answers.

    method: "*" for any other.  path may end in "/{name}".  is_open: answered without the API key.  is_body_optional: a
    POST without a length counts as one without a body, and is not refused.  is_quiet: no log line for what succeeds.
    is_streamed: the handler reads the body, from the request's `pieces`; where it leaves some of it, the connection is
    closed behind the reply.  max_body_bytes: None for the service's.
    """

    method: str
    path: str
    handler: object
    is_open: bool = False
    is_body_optional: bool = False
    is_quiet: bool = False
    is_streamed: bool = False
    max_body_bytes: int | None = None


class Router:
    """Finds the route of a request."""

    def __init__(self, routes: list):
        self._exact = {}
        self._named = {}
        for route in routes:
            prefix, brace, _ = route.path.partition("{name}")
            (self._named if brace else self._exact).setdefault(prefix, {})[route.method] = route

    def find(self, method: str, path: str) -> tuple[Route, str]:
        """The route, and what stands for its {name}.  HEAD goes where GET does.  Raises ApiError 404, 405."""
        path = path.rstrip("/") or "/"
        methods, name = self._exact.get(path), ""
        if methods is None:
            prefix = next((prefix for prefix in self._named if path.startswith(prefix)), None)
            if prefix is None:
                known = list(self._exact) + [prefix + "..." for prefix in self._named]
                raise ApiError(404, "there is no %s here; there are %s" % (path, ", ".join(known)))
            methods, name = self._named[prefix], path[len(prefix) :]
        route = methods.get(method) or methods.get("GET" if method == "HEAD" else "*") or methods.get("*")
        if route is None:
            allowed = ", ".join(sorted(methods) + (["HEAD"] if "GET" in methods else []))
            message = "%s is not allowed on %s; allowed: %s" % (method, path, allowed)
            raise ApiError(405, message, headers=[("Allow", allowed)])
        return route, name


class Metrics:
    """Counts requests and their durations; renders them as Prometheus text."""

    def __init__(self):
        self._lock = threading.Lock()
        self._totals = {}  # (method, route, status) -> [count, seconds]

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        """Add one request."""
        with self._lock:
            total = self._totals.setdefault((method, route, status), [0, 0.0])
            total[0] += 1
            total[1] += seconds

    def render(self, gauges: dict) -> str:
        """All series, and `gauges` by name."""
        with self._lock:
            totals = sorted((key, tuple(total)) for key, total in self._totals.items())
        labels = ['{method="%s",route="%s",status="%d"}' % key for key, _ in totals]
        lines = ["# TYPE rock_http_requests_total counter"]
        lines += ["rock_http_requests_total%s %d" % (label, total[0]) for label, (_, total) in zip(labels, totals)]
        lines += ["# TYPE rock_http_request_duration_seconds summary"]
        for label, (_, (count, seconds)) in zip(labels, totals):
            lines.append("rock_http_request_duration_seconds_sum%s %.6f" % (label, seconds))
            lines.append("rock_http_request_duration_seconds_count%s %d" % (label, count))
        for name, value in gauges.items():
            lines += ["# TYPE %s gauge" % name, "%s %g" % (name, value)]
        return "\n".join(lines) + "\n"


class Exchange:
    """One request and its reply.  Used by one thread, once."""

    def __init__(self, service: HTTPService, connection: Connection, client: str):
        self._service = service
        self._connection = connection
        self._client = client
        self._head = None
        self._route = None
        self._is_watched = False
        self._has_unread = True  # there may be bytes of this request that we do not mean to read
        self._began = time.monotonic()

    def run(self) -> bool:
        """Read, answer, write down; whether the connection can take another request.  Raises ClientGone."""
        try:
            reply = self._reply()
            return self._send(reply) if reply else False
        except ClientGone:
            if self._head:
                self._write_down(499, 0, "client hung up")
            raise
        finally:
            if self._is_watched:
                self._service.hangups.unwatch(self._connection.sock)

    def _reply(self):
        """What to answer; None where no request came."""
        try:
            self._head = self._connection.read_head()
            if self._head is None:
                return None
            self._began = time.monotonic()
            self._service.set_idle(self._connection.sock, False)
            return self._dispatch()
        except ApiError as error:
            return self._service.error_reply(error)
        except StorageError as error:
            self._service.logger.error("%s met: %s", self._name(), error)
            return self._service.error_reply(storage_failure())
        except ClientGone:
            raise
        except Exception:
            self._service.logger.exception("a bug met %s", self._name())
            return self._service.error_reply(ApiError(500, "internal error; the service's own log has the details"))

    def _dispatch(self):
        head, service = self._head, self._service
        self._has_unread = head.has_body
        self._route, name = service.router.find(head.method, head.path)
        if not self._route.is_open:
            service.authorise(head)
        needs_body = self._route.method in ("POST", "PUT", "PATCH") and not self._route.is_body_optional
        if needs_body and head.content_length is None and not head.is_chunked:
            raise ApiError(411, "a %s needs a Content-Length, or a chunked body" % head.method)
        body, pieces = b"", ()
        if self._route.is_streamed:
            pieces = self._streamed(self._connection.body_pieces(head, self._route.max_body_bytes))
        else:
            body = self._connection.read_body(head, self._route.max_body_bytes)
            self._has_unread = False
        return self._route.handler(Request(head, body, name, self._watch_hangup, self._connection.sock, pieces))

    def _streamed(self, pieces):
        yield from pieces
        self._has_unread = False

    def _watch_hangup(self, callback):
        self._is_watched = True
        self._service.hangups.watch(self._connection.sock, callback)

    def _send(self, reply):
        keep_alive = bool(self._head and self._head.keep_alive) and not self._has_unread
        keep_alive = keep_alive and not self._service.stopping.is_set()
        status, size, is_sent = 499, 0, False
        try:
            size = self._write(reply, keep_alive)
            status, is_sent = reply.status, True
        except ClientGone:
            pass
        except ReplyBroken as error:
            status = error.status
            self._service.logger.warning("the reply to %s broke off: %s", self._name(), error)
            if self._head.is_http10:  # to which only a reset tells the break from the end
                self._connection.reset()
        except Exception:
            status = 500
            self._service.logger.exception("the reply to %s broke off", self._name())
        if reply.done:
            try:
                reply.done(is_sent)
            except Exception:
                self._service.logger.exception("the end of the reply to %s failed", self._name())
        self._write_down(status, size, reply.note())
        if self._has_unread:
            self._connection.linger()
        return keep_alive and is_sent

    def _write(self, reply, keep_alive):
        """Send the whole reply; how many bytes its body had."""
        headers = self._headers(reply, keep_alive)
        if reply.pieces is None:
            is_head = self._head is not None and self._head.method == "HEAD"
            body = b"" if is_head or reply.body is None or reply.status in (204, 304) else reply.body
            self._connection.write(response_head(reply.status, headers) + body)
            return len(body)
        return self._write_pieces(reply, headers)

    def _headers(self, reply, keep_alive):
        headers = [] if reply.content_type is None else [("Content-Type", reply.content_type)]
        headers += reply.headers
        given = {name.lower() for name, _ in reply.headers}
        if "date" not in given:
            headers.append(("Date", _http_date(int(time.time()))))
        if not keep_alive:
            headers.append(("Connection", "close"))
        if reply.pieces is not None and reply.length is None:
            if not self._head.is_http10:
                headers.append(("Transfer-Encoding", "chunked"))
        elif reply.body is not None and reply.status not in (204, 304):
            headers.append(("Content-Length", len(reply.body) if reply.pieces is None else reply.length))
        return headers

    def _write_pieces(self, reply, headers):
        write, size = self._connection.write, 0
        is_chunked = reply.length is None and not self._head.is_http10
        with contextlib.closing(reply.pieces) as pieces:
            write(response_head(reply.status, headers))
            for piece in filter(None, pieces):  # an empty one would be the last chunk
                size += len(piece)
                write(b"%x\r\n%s\r\n" % (len(piece), piece) if is_chunked else piece)
        if is_chunked:
            write(b"0\r\n\r\n")
        return size

    def _name(self):
        return "%s %s" % (self._head.method, self._head.path) if self._head else "a malformed request"

    def _write_down(self, status, size, note):
        seconds = time.monotonic() - self._began
        method = self._head.method if self._head and self._head.method in KNOWN_METHODS else "other"
        route = self._route.path if self._route else "none"
        self._service.metrics.count(method, route, status, seconds)
        if self._route and self._route.is_quiet and status < 400:
            return
        line = "%s %s %d %.1fms %dB %s"
        self._service.logger.info(line, self._client, self._name(), status, seconds * 1000, size, note)


@functools.lru_cache(maxsize=2)
def _http_date(now):
    from email.utils import formatdate

    return formatdate(now, usegmt=True)


def bearer_check(api_key: str | None):
    """What raises ApiError 401 for a request's head without that bearer token; None asks for none."""

    def authorise(head):
        scheme, _, token = (head.header("authorization") or "").partition(" ")
        if api_key is not None and not (scheme.lower() == "bearer" and is_same_key(token.strip(" \t"), api_key)):
            raise unauthorised()

    return authorise


def is_same_key(given: str, key: str) -> bool:
    """Whether what came in a header is the key, in a time that does not tell how much of it is."""
    from hmac import compare_digest

    return compare_digest(given.encode("latin-1"), key.encode("utf-8"))


def unauthorised() -> ApiError:
    """What is answered to a client without the right key."""
    message = "this service asks for its API key: send 'Authorization: Bearer KEY'"
    return ApiError(401, message, code="invalid_api_key", headers=[("WWW-Authenticate", "Bearer")])


class HTTPService:
    """A listening server with its routes.

    host, port: where to listen; port 0 takes a free one (see `port`).  routes: a list of Route; `/`, `/health` and
    `/metrics` are added.  logger: as from `logging`.  kind: what `/` calls the service.  gauges: () -> numbers by name
    for `/metrics`.  authorise: given the head of each request to a route that is not open, raises ApiError for one that
    must not be answered.  error_reply: the Reply to an ApiError.  Raises RockError where it cannot listen.
    """

    def __init__(
        self,
        host,
        port,
        routes,
        logger,
        kind,
        gauges=dict,
        authorise=lambda head: None,
        max_body_bytes=MAX_BODY_BYTES,
        error_reply=error_reply,
    ):
        self.router = Router(routes + self._common_routes(kind, gauges))
        self.metrics = Metrics()
        self.logger = logger
        self.stopping = threading.Event()
        self.authorise = authorise
        self.error_reply = error_reply
        self._max_body_bytes = max_body_bytes
        self._connections = {}  # socket -> whether it is between two requests
        self._changed = threading.Condition()
        self._listener = _listen(self, host, port)
        self.host, self.port = self._listener.server_address[:2]
        self.hangups = HangupWatcher()
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.5,), name="rock-accept")

    def _common_routes(self, kind, gauges):
        about = {"service": "rock-model-service", "version": __version__, "type": kind}
        kind_of_text = "text/plain; version=0.0.4; charset=utf-8"
        return [
            Route("GET", "/", lambda request: json_reply(about), is_open=True),
            Route("GET", "/health", lambda request: json_reply({"status": "healthy"}), is_open=True),
            Route("GET", "/metrics", lambda _: Reply(200, self.metrics.render(gauges()).encode(), kind_of_text)),
        ]

    def start(self) -> None:
        """Begin to answer, in threads of its own."""
        self._thread.start()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Accept no more, let the requests being answered end, close the rest.  Ends every thread it began.

        seconds: the time they have; connections still open after it are cut off.
        """
        import socket

        self.stopping.set()
        if self._thread.ident is not None:
            with contextlib.suppress(OSError):  # or its thread would notice at its next look at `shutdown` only
                self._listener.socket.shutdown(socket.SHUT_RDWR)
            self._listener.shutdown()
            self._thread.join()
        self._listener.server_close()
        self._shut_down(only_idle=True)
        if not self._wait_until_closed(seconds):
            self._shut_down(only_idle=False)
            self._wait_until_closed(1.0)
        self.hangups.stop()

    def _shut_down(self, only_idle):
        import socket

        with self._changed:
            for sock, is_idle in self._connections.items():
                if is_idle or not only_idle:
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RD if is_idle else socket.SHUT_RDWR)

    def _wait_until_closed(self, seconds):
        with self._changed:
            return self._changed.wait_for(lambda: not self._connections, seconds)

    def opened(self, sock: object) -> None:
        """Called by the listener for each connection, before its thread starts."""
        with self._changed:
            self._connections[sock] = True

    def closed(self, sock: object) -> None:
        """Called by the listener when a connection is done with."""
        with self._changed:
            self._connections.pop(sock, None)
            self._changed.notify_all()

    def set_idle(self, sock: object, is_idle: bool) -> bool:
        """Note whether a connection is between requests; False where no further request is to be read."""
        with self._changed:
            self._connections[sock] = is_idle
            return not self.stopping.is_set()

    def serve(self, sock: object, client: str) -> None:
        """Answer the requests of one connection, in its thread, until it ends."""
        connection = Connection(sock, self._max_body_bytes)
        with contextlib.suppress(ClientGone):
            while self.set_idle(sock, True) and Exchange(self, connection, client).run():
                pass


_EXHAUSTED = {
    errno.EMFILE: "raise 'ulimit -n'",
    errno.ENFILE: "the machine has too many files open",
    errno.ENOBUFS: "the machine is short of memory",
    errno.ENOMEM: "the machine is short of memory",
}


def _bear_exhaustion(service, error, complaint):
    """Wait a moment after a connection could not be accepted: it stays in the queue, and would be met again at once."""
    if error.errno in _EXHAUSTED:
        if complaint.is_due():
            message = "connections have to wait, since none can be accepted: %s; %s"
            service.logger.error(message, error.strerror, _EXHAUSTED[error.errno])
        service.stopping.wait(ACCEPT_PAUSE_SECONDS)


def _listen(service, host, port):
    """A ThreadingHTTPServer that hands each connection to `service`.  Raises RockError."""
    import socket
    import socketserver
    from http.server import ThreadingHTTPServer

    complaint = Complaint()

    class Listener(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        request_queue_size = BACKLOG

        def server_bind(self):  # http.server's own looks its host name up, which can take seconds without a network
            socketserver.TCPServer.server_bind(self)

        def get_request(self):
            try:
                sock, address = self.socket.accept()
            except OSError as error:
                _bear_exhaustion(service, error, complaint)
                raise
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock, address

        def process_request(self, request, client_address):
            service.opened(request)
            super().process_request(request, client_address)

        def finish_request(self, request, client_address):
            service.serve(request, client_address[0])

        def shutdown_request(self, request):
            super().shutdown_request(request)
            service.closed(request)

        def handle_error(self, request, client_address):
            service.logger.exception("the connection of %s failed", client_address[0])

    try:
        return Listener((host, port), None)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RockError("cannot listen on %s:%d: %s; give another --host or --port" % (host, port, reason)) from error


# ======================================================================================================================
# Local session: the turns of agents, which a trainer answers through the marker log.
#
#   A turn is one request record and, later, its answer.  A call is one HTTP request that waits for a turn's answer.
#   Usually they are one to one.  A call that ends without its answer having been sent whole (a hang-up, a timeout, a
#   stop) leaves its turn behind, and the agent's retry, told by its identical body, becomes a new call of that turn:
#
#       nobody waits, not delivered             an identical body takes the turn over
#       in flight, or delivered as a success    an identical body does so only if it says that it is a retry
#       delivered as an error                   an identical body is a new turn: the trainer tests the agent's retries
#
#   --resume rebuilds this from the two files.  A turn whose answer is not in the trajectory was not delivered; one
#   whose answer is there, was.  With one exception: if the service was killed, and no request came after that answer,
#   it may have died before the answer's last byte had left; then an identical body is taken for the retry that it most
#   likely is.  So whoever dies, agent, service or trainer: each repeats its last step, no turn is lost or doubled.
# ======================================================================================================================


class Turn:
    """A request in the log and what has become of it.  Owned by LocalSession and guarded by its lock.

    answer_offset: of its answer in the log.  calls: those that wait for it.  delivered_status: of the answer that was
    sent whole.  record_lock: guards is_recorded, and is held while the answer is written to the trajectory.  is_lost:
    the log has it no more, so that nobody can answer it.
    """

    __slots__ = (
        "index",
        "digest",
        "answer_offset",
        "calls",
        "delivered_status",
        "record_lock",
        "is_recorded",
        "is_lost",
    )

    def __init__(self, index, digest):
        self.index = index
        self.digest = digest
        self.answer_offset = None
        self.calls = []
        self.delivered_status = None
        self.record_lock = threading.Lock()
        self.is_recorded = False
        self.is_lost = False

    def is_waited_for(self) -> bool:
        """Whether one of its calls has a client that has not hung up, or may have the answer."""
        return any(call.is_leaving or not call.is_abandoned() for call in self.calls)


class Call:
    """One HTTP request's wait for the answer of its turn.

    response: the answer's record, once it is there.  wake: set whenever there is something new to see.  is_leaving:
    whether some of the answer may be with the client.  closed: set once it is known whether all of it was sent.
    """

    def __init__(self, turn: Turn, response: Record | None, is_client_gone):
        self.turn = turn
        self.response = response
        self.has_hung_up = False
        self.is_leaving = False
        self.wake = threading.Event()
        self.closed = threading.Event()
        self._is_client_gone = is_client_gone

    def hang_up(self) -> None:
        """The client is gone."""
        self.has_hung_up = True
        self.wake.set()

    def is_abandoned(self) -> bool:
        """Whether the client is gone, known already or not."""
        return self.has_hung_up or self._is_client_gone()

    def check(self) -> None:
        """Raise the ApiError of a call whose turn nobody can answer any more."""
        if self.turn.is_lost:
            raise ApiError(500, "the service's log has lost this request: ask again", code="storage_error")


class LocalSession:
    """The turns of one session: writes requests, follows the log for answers, wakes those who wait.

    log: a MarkerLog.  recorded: what the trajectory holds, when a session is resumed (`recorded_turns`).  was_killed:
    whether the service that wrote it was.  Two locks: `_append_lock` is held while a request or the end is written, and
    may take as long as another writer holds the log; `_lock` guards the turns and is held for moments only.
    """

    def __init__(self, log: MarkerLog, polling_interval, logger, recorded=None, was_killed=False):
        self._log = log
        self._interval = polling_interval
        self._logger = logger
        self._append_lock = threading.Lock()
        self._lock = threading.Lock()
        self._turns = {}  # index -> Turn, of all that may still be asked for
        self._open = {}  # digest of the request's text -> [Turn], of those not delivered yet, oldest first
        self._finished = {}  # index -> None, of delivered turns, oldest first
        self._delivered = {}  # digest -> the last of these that was delivered as a success
        self._left = {}  # index -> None, of turns that nobody waits for, and which were not delivered, oldest first
        self._last_index = 0
        self._answered = 0
        self._waiting = 0
        self._last_activity = time.monotonic()
        self._is_closed = False  # no new calls: SESSION_END is written, or read
        self._has_ended = False  # SESSION_END is read: every answer before it has been, too
        self._is_stopping = False
        self._tail = log.tail(on_replaced=self._on_replaced)
        self._missing = {}  # index -> whether its request has been found again, while a replaced log is read anew
        self._was_replaced = False  # and is being read anew
        self._complaint = Complaint()
        self._resumed = _ResumedTurns(recorded or {}, was_killed)
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="rock-log", daemon=True)

    def start(self) -> None:
        """Read what the log holds already, then follow it in a thread.  Raises StorageError."""
        with Storing("read", self._log.path):
            for record in self._tail.read():
                self._on_record(record)
        for turn, status in self._resumed.delivered_at_the_end():
            self._finish(turn, status)
        self._thread.start()

    def stop(self) -> None:
        """End every waiting call with 503, and the thread."""
        with self._lock:
            self._is_stopping = True
            self._wake_all()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def has_ended(self) -> bool:
        """Whether SESSION_END is in the log."""
        return self._has_ended

    def gauges(self) -> dict:
        """Numbers for /metrics."""
        with self._lock:
            return {
                "rock_local_turns": self._last_index,
                "rock_local_turns_answered": self._answered,
                "rock_local_calls_waiting": self._waiting,
                "rock_local_session_ended": int(self._has_ended),
            }

    def open_call(self, text: str, is_retry: bool, is_client_gone=lambda: False) -> Call:
        """Begin a call: a new turn, or one that this request takes over.  Raises ApiError 410, 503, StorageError.

        text: the request as one line of JSON.  is_retry: whether the client says that it asked this before.
        is_client_gone: () -> whether the client has hung up.
        """
        digest = _digest(escape_markers(text).encode("utf-8"))
        self._await_delivery(digest, is_retry)
        with held(self._append_lock, self._log.path):
            with self._lock:
                self.check_open(is_new=True)
                turn = self._find_turn(digest, is_retry)
                if turn:
                    return self._add_call(turn, self._read_answer(turn), is_client_gone)
                index = self._last_index + 1
            size = self._log.append("request", text, index)
            with self._lock:
                turn = self._turns.get(index) or self._add_turn(index, digest)
                self._tail.expect(size)
                # A quick trainer's answer may have been read by now.
                return self._add_call(turn, self._read_answer(turn), is_client_gone)

    def close_call(self, call: Call, delivered_status: int | None) -> None:
        """End a call.  delivered_status: of the answer that was sent whole, None where none was."""
        with self._lock:
            turn = call.turn
            turn.calls.remove(call)
            call.closed.set()
            self._waiting -= 1
            if delivered_status is not None:
                turn.delivered_status = delivered_status
            if not turn.calls:
                self._rest(turn)

    def end(self) -> None:
        """Write SESSION_END, once; it is acted on when it is read back.  Raises StorageError."""
        with held(self._append_lock, self._log.path):
            if not self._is_closed:
                self._log.append_session_end()
                self._is_closed = True
        self._wake.set()

    def check_open(self, is_new: bool = False) -> None:
        """Raise the ApiError that a call gets when it can have no answer any more; a new call, no turn."""
        if self._has_ended or (is_new and self._is_closed):
            message = "the session has ended: no further calls are answered"
            raise ApiError(410, message, code="session_ended", headers=[("x-should-retry", "false")])
        if self._is_stopping:
            raise ApiError(503, "the model service is stopping", code="service_stopping")

    def _await_delivery(self, digest, is_retry):
        """Wait until it is known what became of answers to this request that are on their way, if that matters.

        A client that has its answer and asks the same again may be here sooner than the note that it has it.
        """
        deadline = time.monotonic() + DELIVERY_SECONDS
        with self._lock:
            calls = [call for turn in self._same(digest) for call in turn.calls if call.is_leaving]
        for call in calls:
            if is_retry or call.is_abandoned():
                call.closed.wait(max(0, deadline - time.monotonic()))

    def _same(self, digest):
        """The turns that a request with this text may belong to.

        Delivered ones are looked for by retries only, and each of them is as good as the last: an agent that asks the
        same again and again must not have all of them looked at.
        """
        delivered = self._delivered.get(digest)
        return [*([delivered] if delivered else ()), *self._open.get(digest, ())]

    def _find_turn(self, digest, is_retry):
        retried = None
        for turn in self._same(digest):
            is_waited_for = turn.is_waited_for()
            if turn.delivered_status is None and not is_waited_for:
                return turn
            if is_retry and (is_waited_for or turn.delivered_status < 400):
                retried = retried if retried and retried.calls else turn
        return retried

    def _add_call(self, turn, response, is_client_gone):
        call = Call(turn, response, is_client_gone)
        turn.calls.append(call)
        self._left.pop(turn.index, None)
        self._waiting += 1
        self._wake.set()
        return call

    def _add_turn(self, index, digest):
        turn = Turn(index, digest)
        self._last_index = index
        self._turns[index] = turn
        self._open.setdefault(digest, []).append(turn)
        self._left[index] = None  # until a call waits for it
        self._last_activity = time.monotonic()
        return turn

    def _rest(self, turn):
        """The last of its calls has ended."""
        if turn.delivered_status is not None:
            self._finish(turn, turn.delivered_status)
        elif turn.index in self._turns:  # else it was lost
            self._left[turn.index] = None
            self._forget_oldest(self._left, MAX_LEFT_TURNS)

    def _finish(self, turn, status):
        turn.delivered_status = status
        self._left.pop(turn.index, None)
        self._remove_open(turn)
        if turn.index not in self._turns:
            return  # forgotten, while it was delivered once more
        self._finished[turn.index] = None
        if status < 400:
            self._delivered[turn.digest] = turn
        self._forget_oldest(self._finished, MAX_FINISHED_TURNS)

    def _forget_oldest(self, indexes, limit):
        while len(indexes) > limit:
            self._forget(next(iter(indexes)))

    def _forget(self, index):
        self._finished.pop(index, None)
        self._left.pop(index, None)
        turn = self._turns.pop(index)
        self._remove_open(turn)
        if self._delivered.get(turn.digest) is turn:
            del self._delivered[turn.digest]

    def _remove_open(self, turn):
        same = self._open.get(turn.digest, [])
        if turn in same:
            same.remove(turn)
            if not same:
                del self._open[turn.digest]

    def _read_answer(self, turn):
        """The answer's record, None where there is none yet.  Raises StorageError where the log has lost it."""
        if turn.answer_offset is None:
            return None
        record = self._log.record_at(turn.answer_offset)
        if not record or (record.kind, record.index) != ("response", turn.index):
            raise StorageError("the answer to request %d is no longer in %s" % (turn.index, self._log.path))
        return record

    def _wake_all(self):
        for turn in self._turns.values():
            for call in turn.calls:
                call.wake.set()

    def _follow(self):
        """The tailing thread."""
        while not self._is_stopping:
            try:
                for record in self._tail.read():
                    with self._lock:
                        self._on_record(record)
                if self._was_replaced:
                    self._lose_missing()
            except OSError as error:
                if self._complaint.is_due():
                    self._logger.error("cannot read %s: %s; trying again", self._log.path, error.strerror)
            except Exception:
                if self._complaint.is_due():
                    self._logger.exception("cannot follow %s; trying again", self._log.path)
            self._wake.wait(self._delay())
            self._wake.clear()

    def _delay(self):
        if not self._waiting:
            return IDLE_POLL_SECONDS
        return poll_delay(time.monotonic() - self._last_activity, self._interval)

    def _on_record(self, record):
        if record.kind == "end":
            self._has_ended = self._is_closed = True
            self._wake_all()
        elif record.index in self._missing:
            self._found_again(record)
        elif record.kind == "response":
            self._on_response(record)
        elif record.index > self._last_index:
            self._add_turn(record.index, _digest(record.text.encode("utf-8")))
            for turn, status in self._resumed.delivered_before_a_request():
                self._finish(turn, status)
            self._forget_oldest(self._left, MAX_LEFT_TURNS)

    def _on_response(self, record):
        turn = self._turns.get(record.index)
        if turn is None or turn.answer_offset is not None:
            if not self._was_replaced:  # else it is one that was read before, of a turn forgotten since
                self._logger.warning("ignored an answer to request %d, which waits for none", record.index)
            return
        self._answered += 1
        self._last_activity = time.monotonic()
        turn.answer_offset = record.offset
        for call in turn.calls:
            call.response = record
            call.wake.set()
        self._resumed.answered(turn)

    def _on_replaced(self):
        """The log is another one, or shorter: it is read anew, and each turn has to be found in it again."""
        with self._lock:
            self._was_replaced = True
            self._missing = dict.fromkeys(self._turns, False)

    def _found_again(self, record):
        """A record of a missing turn.  That is found with its request, and with its answer where it had one."""
        index, turn = record.index, self._turns.get(record.index)
        if turn is None:
            del self._missing[index]
        elif record.kind == "request" and turn.digest == _digest(record.text.encode("utf-8")):
            self._missing[index] = True
            if turn.answer_offset is None:
                del self._missing[index]
        elif record.kind == "response" and self._missing[index]:
            turn.answer_offset = record.offset
            del self._missing[index]

    def _lose_missing(self):
        """Give up the turns that a replaced log does not have: their calls end, and a retry is a new turn."""
        with self._lock:
            lost = [self._turns[index] for index in self._missing if index in self._turns]
            self._missing, self._was_replaced = {}, False
            for turn in lost:
                self._forget(turn.index)
                turn.is_lost = True
                for call in turn.calls:
                    call.wake.set()
            waiting = sum(turn.answer_offset is None for turn in lost)
        message = (
            "%s was removed, replaced or cut short while in use: %d turns are not in it any more, %d without answer"
        )
        self._logger.error(message, self._log.path, len(lost), waiting)


class _ResumedTurns:
    """Tells, while an earlier service's log is read, which of its answers were delivered."""

    def __init__(self, recorded, was_killed):
        self._recorded = recorded
        self._was_killed = was_killed
        self._unconfirmed = []

    def answered(self, turn):
        """A turn's answer was read."""
        status = self._recorded.get(turn.index)
        if status is not None:
            turn.is_recorded = True
            self._unconfirmed.append((turn, status))

    def delivered_before_a_request(self):
        """A request was read; the (turn, status) of the answers that it shows to have been delivered."""
        confirmed, self._unconfirmed = self._unconfirmed, []
        return confirmed

    def delivered_at_the_end(self):
        """All was read; the same of the answers that no request came after."""
        confirmed = [] if self._was_killed else self._unconfirmed
        self._recorded, self._unconfirmed = {}, []
        return confirmed


def _digest(text):
    from hashlib import blake2b

    return blake2b(text, digest_size=16).digest()


class AgentWatch:
    """Ends the session when the last of the watched processes has gone.  One thread, begun with the first process.

    session: has `end()` and `has_ended`, as a LocalSession.

    on_change: called with what is watched, pid -> identity, whenever that changes; what it raises reaches `watch`.
    """

    def __init__(self, session: LocalSession, logger, on_change=lambda watched: None):
        self._session = session
        self._logger = logger
        self._on_change = on_change
        self._lock = threading.Lock()
        self._watched = {}  # pid -> identity
        self._has_ended_session = False  # and has still to say that nothing is watched
        self._complaint = Complaint()
        self._stop = threading.Event()
        self._thread = None

    def watch(self, pid: int) -> bool:
        """Watch a process; whether it is alive.  One that is gone already counts as having been watched."""
        identity = process_identity(pid)
        self.resume({pid: identity})
        return identity is not None

    def resume(self, watched: dict) -> None:
        """Watch processes whose identity is known, as pid -> identity."""
        with self._lock:
            watched = {**self._watched, **watched}
            self._on_change(dict(watched))
            self._watched = watched
            if self._thread is None and self._watched:
                thread = threading.Thread(target=self._run, name="rock-watch", daemon=True)
                thread.start()
                self._thread = thread  # not before: a system that has no thread left may have one for the next process

    def route(self) -> Route:
        """The endpoint that takes `{"pid": n}`, the number of a process to watch."""
        return Route("POST", "/v1/agent/watch", self._on_request)

    def _on_request(self, request):
        pid = request.json()[1].get("pid")
        if type(pid) is not int or not 0 < pid < 2**31:
            raise ApiError(400, "pid must be a process number, got %s" % dump_json(pid), param="pid")
        if self._session.has_ended:
            raise ApiError(410, "the session has ended already: stop, and start a new one", code="session_ended")
        if pid == os.getpid():
            raise ApiError(400, "%d is the model service itself, not an agent" % pid, param="pid")
        is_alive = self.watch(pid)
        return json_reply({"status": "watching" if is_alive else "gone", "pid": pid})

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self):
        while not self._is_last_gone() and not self._stop.wait(WATCH_SECONDS):
            pass

    def _is_last_gone(self):
        """Drop the processes that are gone; end the session, and say so, when none is left."""
        with self._lock:
            for pid, identity in list(self._watched.items()):
                if not is_same_process(pid, identity):
                    self._logger.info("the watched process %d has gone", pid)
                    del self._watched[pid]
            if self._watched:
                return False
            try:
                if not self._has_ended_session:
                    self._session.end()
                    self._has_ended_session = True
                self._on_change({})
            except StorageError as error:
                if self._complaint.is_due():
                    self._logger.error("the session's end cannot be written down: %s; trying again", error)
                return False
            self._thread, self._has_ended_session = None, False
            return True


# ======================================================================================================================
# Local service: agents' calls over HTTP, each with the answer to its turn.
# ======================================================================================================================


@dataclass(frozen=True)
class Answer:
    """What a call ends with.  body: JSON text in UTF-8.  value: the same, parsed.  is_given: it is the trainer's.
    error: why it is not what the trainer wrote, if it is not."""

    status: int
    body: bytes
    value: dict
    is_given: bool
    headers: tuple = ()
    error: str | None = None


def given_answer(record: Record) -> Answer:
    """The trainer's answer.  One that is no JSON object, as only another writer can leave it, is a 502 that says so."""
    try:
        text, value = json_object(record.body.decode("utf-8"), "the trainer's answer")
    except ValueError as error:
        return bad_answer(error)
    return Answer(error_status(value) or 200, text.encode("utf-8"), value, True)


def bad_answer(error: ValueError) -> Answer:
    """What the agent gets for an answer of the trainer's that cannot be given.  It counts as given, and as an error."""
    return replace(failed_answer(ApiError(502, str(error), code="bad_answer")), is_given=True)


def failed_answer(error: ApiError) -> Answer:
    """An answer of our own, for a call that gets none."""
    body = error.body()
    return Answer(error.status, body, parse_json(body.decode("utf-8")), False, error.headers, str(error))


class LocalCall:
    """One agent's call, from request to reply."""

    def __init__(self, service: LocalService, request: Request):
        self._service = service
        self._request = request
        self._text, self._body = request.json()
        self._is_stream = bool(self._body.get("stream"))
        self._start_time, self._began = service.clock(), time.monotonic()
        retry_count = request.head.header("x-stainless-retry-count", "0")
        is_retry = bool(re.match(r"0*[1-9][0-9]*\Z", retry_count))
        self._call = service.session.open_call(self._text, is_retry, request.is_client_gone)
        self._answer = None  # what the client gets, once that is written down
        self._chunks = []  # the same as a stream
        self._is_closed = False

    @property
    def model(self) -> str | None:
        """The model asked for, where that is a text."""
        model = self._body.get("model")
        return model if isinstance(model, str) else None

    def reply(self) -> Reply:
        """Wait for the answer as long as the client can bear silence, then go on waiting in a reply that streams."""
        try:
            self._request.watch_hangup(self._call.hang_up)
            return self._prompt_reply() if self._wait() else self._patient_reply()
        except BaseException:
            self._close(False)
            raise

    def _prompt_reply(self):
        answer = self._answer
        if self._is_stream and answer.status < 400:
            return Reply(200, self._stream_body(), SSE_TYPE, SSE_HEADERS, done=self._close, note=self._note)
        return Reply(answer.status, answer.body, headers=answer.headers, done=self._close, note=self._note)

    def _patient_reply(self):
        def pieces():
            while not self._answer:
                yield SSE_HEARTBEAT if self._is_stream else JSON_HEARTBEAT
                self._wait()
            yield self._stream_body() if self._is_stream else self._answer.body

        kind = (SSE_TYPE, SSE_HEADERS) if self._is_stream else ("application/json", ())
        return Reply(200, b"", *kind, pieces=pieces(), done=self._close, note=self._note)

    def _note(self):
        return "index=%d" % self._call.turn.index

    def _stream_body(self):
        value = self._answer.value
        if self._answer.status >= 400:
            return sse_event(value if "error" in value else {"error": value})
        return b"".join([sse_event(chunk) for chunk in self._chunks] + [SSE_DONE])

    def _wait(self):
        """Wait for what the client gets and write it down; whether it came before a heartbeat was due.

        Raises ClientGone.
        """
        limit = self._service.settings.wait_limit
        deadline = self._began + limit
        silent_until = time.monotonic() + self._service.settings.heartbeat_seconds
        while not self._answer:
            now = time.monotonic()
            answer = self._outcome()
            if not answer and now >= deadline:
                answer = failed_answer(ApiError(504, "no answer came within %g s" % limit, code="timeout"))
            if answer:
                self._answer = self._written_down(answer)
                self._call.is_leaving = self._answer.is_given
            elif now >= silent_until:
                return False
            else:
                self._call.wake.wait(min(silent_until, deadline) - now)
                self._call.wake.clear()
        return True

    def _outcome(self):
        """What the call has come to by now, or None.  Raises ClientGone.

        Looking at the socket matters: bytes sent to a client that has just hung up are taken without an error.
        """
        if self._call.is_abandoned():
            raise ClientGone
        if self._call.response:
            return self._streamable(given_answer(self._call.response))
        try:
            self._call.check()
            self._service.session.check_open()
        except ApiError as error:
            return failed_answer(error)
        return None

    def _streamable(self, answer):
        """The answer, or a 502 where the agent asked for a stream and none can be made from it."""
        if self._is_stream and answer.status < 400:
            try:
                index, now = self._call.turn.index, self._start_time
                self._chunks = completion_chunks(answer.value, self._body, index, now)
            except ValueError as error:
                return bad_answer(error)
        return answer

    def _written_down(self, answer):
        """Add the call to the trajectory, before its end can be seen; the answer, or an error where that failed.

        A turn's answer is written once, by the first call that has it; the others wait until it is.
        """
        if not answer.is_given:
            self._record_unanswered(answer.status, answer.error)
            return answer
        turn = self._call.turn
        try:
            with held(turn.record_lock, self._service.trajectory.path):
                if not turn.is_recorded:
                    self._record(answer.status, self._given_text(answer), answer.error)
                    turn.is_recorded = True
        except StorageError as error:
            self._service.logger.error("an answer is not given, since it cannot be recorded: %s", error)
            return failed_answer(storage_failure())
        return answer

    def _given_text(self, answer):
        """What the trainer wrote, as JSON; as a JSON string where it is none."""
        if answer.error is None:
            return answer.body.decode("utf-8")
        text = self._call.response.body.decode("utf-8", "replace")
        return compact_json(text) if _is_json(self._call.response.body) else dump_json(text)

    def _record_unanswered(self, status, error):
        try:
            self._record(status, None, error)
        except StorageError as failure:
            self._service.logger.error("a call without an answer is not in the trajectory: %s", failure)

    def _record(self, status, response, error):
        seconds, index = time.monotonic() - self._began, self._call.turn.index
        start, stream = self._start_time, self._is_stream
        record = CallRecord(self._text, response, self.model, stream, status, error, start, seconds, index)
        self._service.trajectory.append(record.line())

    def _close(self, is_sent):
        """The reply is done, or will never be."""
        if self._is_closed:
            return
        self._is_closed = True
        answer = self._answer
        self._service.session.close_call(self._call, answer.status if answer and answer.is_given and is_sent else None)
        if not answer:
            self._record_unanswered(499, "the client hung up")


class LocalService:
    """The endpoints of the local type.

    session: a LocalSession.  trajectory: a Trajectory.  settings: ServiceSettings.  logger: as from `logging`.  about:
    what is said of it at its start.  clock: seconds since the epoch.
    """

    def __init__(self, session, trajectory, settings, logger, about="", clock=time.time):
        self.session = session
        self.about = about
        self.trajectory = trajectory
        self.settings = settings
        self.logger = logger
        self.clock = clock
        self._models = {"default": None}  # names as keys, oldest first; only ever added to

    def routes(self) -> list:
        """The route table of the service's own endpoints."""
        return [
            Route("POST", "/v1/chat/completions", self.chat_completions),
            Route("GET", "/v1/models", self.list_models),
            Route("GET", "/v1/models/{name}", self.get_model),
        ]

    def gauges(self) -> dict:
        """Numbers for /metrics."""
        return self.session.gauges()

    def start(self) -> None:
        """Follow the log.  Raises StorageError."""
        self.session.start()

    def stop(self) -> None:
        """End waiting calls with 503."""
        self.session.stop()

    def close(self) -> None:
        """Nothing is left."""

    def chat_completions(self, request: Request) -> Reply:
        """Hand the call to the trainer, and its answer back."""
        call = LocalCall(self, request)
        if call.model and len(self._models) < MAX_MODEL_NAMES:
            self._models[call.model] = None
        return call.reply()

    def list_models(self, request: Request) -> Reply:
        """`default`, ROCK's word for any model, and the models that were asked for so far."""
        return models_reply(list(self._models))

    def get_model(self, request: Request) -> Reply:
        """Any model there is a word for: the trainer answers for all of them."""
        return model_reply(request.name)


# ======================================================================================================================
# Upstreams: the client side of HTTP, for a proxy. Connections are made, kept and waited for with one eye on the client,
# whose hang-up ends every wait. The standard library's client takes no part in this: it cannot wait for two sockets, it
# reads a chunk at a time, and it hides the bytes that a proxy has to pass on.
# ======================================================================================================================


class UpstreamError(ReplyBroken):
    """The upstream did not answer as it should.

    status: what the client is told, 502, or 504 for silence.  is_stale: it closed before the first byte of an answer,
    as a connection does that was kept for too long.  is_final: another attempt would meet the same.
    """

    def __init__(self, message, status=502, is_stale=False, is_final=False):
        super().__init__(message)
        self.status = status
        self.is_stale = is_stale
        self.is_final = is_final


class ClientWatch:
    """Waits for an upstream, or for time to pass, and raises ClientGone when the client hangs up.  For one thread.

    client: its socket.  clock: in seconds.
    """

    def __init__(self, client: object, clock=time.monotonic):
        import select

        self.clock = clock
        self._client = client
        self._has_more = False
        self._poll = select.poll()
        self._poll.register(client, select.POLLIN)

    def wait(self, sock: object, event: int, deadline: float) -> bool:
        """Wait until `sock` is ready for `event`; False where the deadline, by the clock, came first."""
        descriptor = sock.fileno()
        self._poll.register(descriptor, event)
        try:
            while True:
                left = deadline - self.clock()
                if left <= 0:
                    return False
                ready = [number for number, _ in self._poll.poll(min(left, IDLE_SECONDS) * 1000)]
                if descriptor in ready:
                    return True
                if ready:
                    self._look_at_client()
        finally:
            self._poll.unregister(descriptor)

    def look(self) -> None:
        """Raise ClientGone where the client has hung up, without a wait."""
        if self._poll.poll(0):
            self._look_at_client()

    def _look_at_client(self):
        is_gone = self._has_more or _peek(self._client)
        if is_gone:
            raise ClientGone
        if is_gone is False:  # it sends its next request already; its end can still be seen, on Linux
            import select

            self._has_more = True
            self._poll.register(self._client, getattr(select, "POLLRDHUP", 0))


@dataclass(frozen=True)
class Origin:
    """Where a connection leads to."""

    scheme: str
    host: str
    port: int

    @property
    def authority(self) -> str:
        """As it stands in a Host field."""
        host = "[%s]" % self.host if ":" in self.host else self.host
        is_default = self.port == (443 if self.scheme == "https" else 80)
        return host if is_default else "%s:%d" % (host, self.port)


@dataclass(frozen=True)
class Upstream:
    """A base URL: its origin, and the path that takes the place of `/v1`."""

    origin: Origin
    path: str

    @classmethod
    def of(cls, url: str) -> Upstream:
        """The upstream of a URL that the settings have checked."""
        from urllib.parse import urlsplit

        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return cls(Origin(parts.scheme, parts.hostname, port), parts.path.rstrip("/"))


@dataclass(frozen=True)
class HTTPProxy:
    """A proxy of HTTP_PROXY or HTTPS_PROXY.  authorization: the value of its Proxy-Authorization field, or None."""

    origin: Origin
    authorization: str | None = field(default=None, repr=False)


def http_proxies(environ: dict) -> dict:
    """The proxies that the environment names, by scheme (`all` for both).  Raises UsageError."""
    if not any(name.lower().endswith("_proxy") for name in environ):
        return {}
    from urllib.request import getproxies_environment

    found = getproxies_environment()
    return {scheme: _parse_http_proxy(scheme, found[scheme]) for scheme in ("http", "https", "all") if scheme in found}


def _parse_http_proxy(scheme, url):
    from base64 import b64encode
    from urllib.parse import unquote, urlsplit

    name = "%s_PROXY" % scheme.upper()
    try:
        parts = urlsplit(url if "://" in url else "http://" + url)
        port = parts.port
    except ValueError:
        raise UsageError("%s is not a URL, as http://proxy:3128" % name) from None
    if parts.scheme != "http" or not parts.hostname:
        raise UsageError("%s must be an http URL, as http://proxy:3128; other kinds are not understood" % name)
    authorization = None
    if parts.username is not None:
        login = "%s:%s" % (unquote(parts.username), unquote(parts.password or ""))
        authorization = "Basic " + b64encode(login.encode("utf-8")).decode()
    return HTTPProxy(Origin("http", parts.hostname, port or 80), authorization)


class UpstreamConnection:
    """A socket to an upstream, not blocking.  Used by one thread at a time."""

    def __init__(self, sock: object, origin: Origin):
        self.sock = sock
        self.origin = origin
        self.idle_since = 0.0

    def send(self, data: bytes, watch: ClientWatch, silence: float) -> bool:
        """Send all of it; False where the upstream takes no more, and may have said why.  Raises UpstreamError.

        silence: for how many seconds it may take nothing.
        """
        import select

        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view[:SEND_PIECE_BYTES]) :]
            except OSError as error:
                event = _awaited(error, select.POLLOUT)
                if event is None:
                    return False
                # Some answer, and refuse, before they have read a long body.  (With TLS what comes may be no answer.)
                may_answer = isinstance(error, BlockingIOError)
                self._wait(event | (select.POLLIN if may_answer else 0), watch, watch.clock() + silence)
                if may_answer and _is_readable(self.sock):
                    return False
        return True

    def receive(self, watch: ClientWatch, deadline: float) -> bytes | None:
        """What has come; b"" where the upstream has closed, None where nothing came.  Raises UpstreamError."""
        import select

        while watch.clock() < deadline:
            try:
                return self.sock.recv(SEND_PIECE_BYTES)
            except OSError as error:
                event = _awaited(error, select.POLLIN)
                if event is None and "unexpected eof" in str(error):
                    return b""  # as Pythons newer than 3.7 say it: many servers end TLS without a word
                if event is None:
                    reason = error.strerror or error
                    raise UpstreamError("the upstream broke the connection: %s" % reason, is_stale=True) from None
                watch.wait(self.sock, event, deadline)
        return None

    def read_head(self, is_head: bool, watch: ClientWatch, deadline: float) -> tuple[ResponseHead, bytes]:
        """The next response's header, and what came behind it.  Raises UpstreamError, is_stale where nothing came."""
        buffer = bytearray()
        while True:
            end = buffer.find(b"\r\n\r\n")
            if end > MAX_HEAD_BYTES or (end < 0 and len(buffer) > MAX_HEAD_BYTES):
                raise _unreadable("its header is longer than %d bytes" % MAX_HEAD_BYTES)
            if end >= 0:
                head, buffer = _response_head_of(bytes(buffer[:end]), is_head), buffer[end + 4 :]
                if head.status >= 200:
                    return head, bytes(buffer)
                watch.look()  # there may be no end of interim responses
                continue
            if not b"HTTP/1.".startswith(bytes(buffer[:7])) or _has_lone_lf(buffer):
                raise _unreadable("what came is no HTTP/1.1 response")
            try:
                data = self.receive(watch, deadline)
            except UpstreamError as error:
                error.is_stale = error.is_stale and not buffer
                raise
            if data is None:
                raise _silent()
            if not data:
                raise UpstreamError("the upstream closed the connection without an answer", is_stale=not buffer)
            buffer += data

    def shake_hands(self, context: object, watch: ClientWatch, deadline: float) -> None:
        """Begin TLS.  Raises UpstreamError."""
        import select
        import ssl

        try:
            self.sock = context.wrap_socket(self.sock, server_hostname=self.origin.host, do_handshake_on_connect=False)
        except (OSError, ValueError) as error:
            raise UpstreamError("no TLS with %s: %s" % (self.origin.host, error)) from None
        while True:
            try:
                return self.sock.do_handshake()
            except OSError as error:
                event = _awaited(error, select.POLLIN)
                if event is None:
                    reason = getattr(error, "verify_message", None) or error.strerror or error
                    is_final = isinstance(error, ssl.CertificateError)
                    message = "no TLS with %s: %s" % (self.origin.host, reason)
                    raise UpstreamError(message, is_final=is_final) from None
                self._wait(event, watch, deadline)

    def _wait(self, event, watch, deadline):
        if not watch.wait(self.sock, event, deadline):
            raise _silent()

    def is_open(self) -> bool:
        """Whether an idle connection can be used: nothing has come, not even its end."""
        return not _is_readable(self.sock)

    def close(self) -> None:
        """End the connection.  Harmless a second time."""
        self.sock.close()


def _unreadable(why):
    return UpstreamError("the upstream's answer cannot be read: %s" % why, is_final=True)


def _silent():
    return UpstreamError("the upstream was silent for too long", 504)


def _awaited(error, event):
    """The poll event that a socket which does not block waits for; None where the error is one."""
    import select

    if isinstance(error, BlockingIOError):
        return event
    return {"SSLWantReadError": select.POLLIN, "SSLWantWriteError": select.POLLOUT}.get(type(error).__name__)


def _response_head_of(head, is_head):
    try:
        parsed = parse_response_head(head, is_head)
    except ProtocolError as error:
        raise _unreadable(error) from None
    if parsed.status == 101:
        raise _unreadable("it switches to another protocol, unasked")
    return parsed


class UpstreamResponse:
    """A response that is coming.  Its connection goes back to the pool, or is closed, when the body has ended."""

    def __init__(self, connection, head: ResponseHead, rest: bytes, watch: ClientWatch, silence: float, give_back):
        self.head = head
        self._connection = connection
        self._decoder = body_decoder(head.content_length, head.is_chunked)
        self._received = rest
        self._watch = watch
        self._silence = silence
        self._give_back = give_back
        if self._decoder.is_done:
            self.read()

    @property
    def is_bounded(self) -> bool:
        """Whether the body says where it ends."""
        return not isinstance(self._decoder, UnboundedBody)

    @property
    def is_done(self) -> bool:
        """Whether all of the body was read."""
        return self._connection is None

    def read(self, until: float = float("inf")) -> bytes | None:
        """More of the body, as it came; b"" only at its end, None where nothing came until then, by the watch's clock.

        Raises UpstreamError, ClientGone.
        """
        while self._connection:
            data, self._received = self._received, b""
            if not data and not self._decoder.is_done:
                data = self._receive(until)
                if data is None:
                    return None
            try:
                body = self._decoder.feed(data)
            except ProtocolError as error:
                raise _unreadable(error) from None
            if self._decoder.is_done:
                self._finish()
            if body:
                return body
        return b""

    def _receive(self, until):
        limit = self._watch.clock() + self._silence
        data = self._connection.receive(self._watch, min(until, limit))
        if data is None and until >= limit:
            raise _silent()
        if data == b"" and not self._decoder.end():
            raise UpstreamError("the upstream broke off in the middle of its answer")
        return data

    def _finish(self):
        connection, self._connection = self._connection, None
        if self.is_bounded and self.head.keep_alive and not self._decoder.rest:
            self._give_back(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Want no more of it.  Harmless a second time."""
        connection, self._connection = self._connection, None
        if connection:
            connection.close()


class UpstreamPool:
    """Sends requests on connections that are kept open between them.

    proxies: as from `http_proxies`.  A kept connection that turns out to be closed costs a silent reconnect.
    sent_count: requests so far, however they ended.  idle_count: connections that are kept.
    """

    def __init__(self, proxies: dict):
        self._proxies = proxies
        self._lock = threading.Lock()
        self._idle = {}  # Origin -> [UpstreamConnection], the last used last
        self.idle_count = 0
        self.sent_count = 0
        self._tls = None
        self._is_closed = False

    def send(self, upstream: Upstream, method, target, headers, body, watch: ClientWatch, timeout) -> UpstreamResponse:
        """Send a request and wait for the header of its response.  Raises UpstreamError, ClientGone.

        target: path and query.  headers: (name, value) pairs, without Host.  timeout: for each silence, in seconds.
        """
        origin = upstream.origin
        proxy = self._proxy_for(origin)
        if proxy and origin.scheme == "http":
            target = "http://%s%s" % (origin.authority, target)
            headers = headers + ([("Proxy-Authorization", proxy.authorization)] if proxy.authorization else [])
        data = request_head(method, target, [("Host", origin.authority)] + headers) + body
        connection = self._take(origin)
        if connection:
            try:
                return self._exchange(connection, data, method == "HEAD", watch, timeout)
            except UpstreamError as error:
                if not error.is_stale:
                    raise
        connection = self._connect(origin, proxy, watch, watch.clock() + timeout)
        return self._exchange(connection, data, method == "HEAD", watch, timeout)

    def _exchange(self, connection, data, is_head, watch, timeout):
        try:
            is_sent = connection.send(data, watch, timeout)
            head, rest = connection.read_head(is_head, watch, watch.clock() + timeout)
            head = head if is_sent else replace(head, keep_alive=False)
            return UpstreamResponse(connection, head, rest, watch, timeout, self._give_back)
        except BaseException:
            connection.close()
            raise

    def _take(self, origin):
        with self._lock:
            self.sent_count += 1
        while True:
            with self._lock:
                kept = self._idle.get(origin)
                if not kept:
                    return None
                connection = kept.pop()
                self.idle_count -= 1
            if connection.is_open():
                return connection
            connection.close()

    def _give_back(self, connection):
        now = time.monotonic()
        connection.idle_since = now
        with self._lock:
            self._idle.setdefault(connection.origin, []).append(connection)
            surplus = self._surplus(now)
            self.idle_count += 1 - len(surplus)
        for connection in surplus:
            connection.close()

    def _surplus(self, now):
        """Take out what has been idle for too long, and one where there are too many."""
        surplus = []
        for kept in self._idle.values():
            while kept and now - kept[0].idle_since > POOL_SECONDS:
                surplus.append(kept.pop(0))
        if self._is_closed or self.idle_count - len(surplus) >= MAX_IDLE_UPSTREAMS:
            surplus.append(next(kept for kept in self._idle.values() if kept).pop(0))
        return surplus

    def _proxy_for(self, origin):
        proxy = self._proxies.get(origin.scheme) or self._proxies.get("all")
        if proxy is None:
            return None
        from urllib.request import proxy_bypass_environment

        return None if proxy_bypass_environment("%s:%d" % (origin.host, origin.port)) else proxy

    def _connect(self, origin, proxy, watch, deadline):
        try:
            sock = _connected_socket(proxy.origin if proxy else origin, watch, deadline)
        except UpstreamError as error:
            if proxy:
                raise UpstreamError("the HTTP proxy: %s" % error, error.status) from None
            raise
        connection = UpstreamConnection(sock, origin)
        try:
            if origin.scheme == "https":
                if proxy:
                    _open_tunnel(connection, proxy, watch, deadline)
                connection.shake_hands(self._tls_context(), watch, deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    def _tls_context(self):
        try:
            import ssl
        except ImportError:
            raise UpstreamError(NO_SSL, is_final=True) from None
        with self._lock:
            if self._tls is None:
                self._tls = ssl.create_default_context()
                self._tls.set_alpn_protocols(["http/1.1"])
            return self._tls

    def close(self) -> None:
        """Close all that are idle; those in use close when they are done."""
        with self._lock:
            self._is_closed = True
            kept, self._idle = self._idle, {}
        for connection in [connection for connections in kept.values() for connection in connections]:
            connection.close()


def _open_tunnel(connection, proxy, watch, deadline):
    """Have an HTTP proxy connect us to the origin."""
    origin = connection.origin
    where = "%s:%d" % ("[%s]" % origin.host if ":" in origin.host else origin.host, origin.port)
    headers = [("Host", where)] + ([("Proxy-Authorization", proxy.authorization)] if proxy.authorization else [])
    connection.send(request_head("CONNECT", where, headers), watch, deadline - watch.clock())
    head, rest = connection.read_head(True, watch, deadline)
    if not 200 <= head.status < 300 or rest:
        is_final = head.status in (403, 407)
        raise UpstreamError("the HTTP proxy refused to connect to %s: %d" % (where, head.status), is_final=is_final)


def _connected_socket(origin, watch, deadline):
    """A socket that is connected to the origin, by the first of its addresses that answers.  Raises UpstreamError."""
    import socket

    failure = None
    for family, kind, protocol, _, address in _addresses_of(origin, watch, deadline):
        sock = None
        try:
            sock = socket.socket(family, kind, protocol)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            _connect_socket(sock, address, watch, min(deadline, watch.clock() + CONNECT_SECONDS))
            return sock
        except BaseException as error:
            if sock:
                sock.close()
            if not isinstance(error, OSError):
                raise
            failure = error
    is_late = _is_timeout(failure)
    reason = "no answer" if is_late else failure.strerror or failure
    raise UpstreamError("cannot connect to %s: %s" % (origin.authority, reason), 504 if is_late else 502)


def _addresses_of(origin, watch, deadline):
    """As from getaddrinfo.  It can take long and cannot be interrupted, so that a name is looked up in a thread."""
    import select
    import socket

    def resolve(flags=0):
        return socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM, flags=flags)

    def work():
        try:
            found.extend(resolve())
        except (OSError, UnicodeError) as error:
            failures.append(getattr(error, "strerror", None) or error)
        finally:
            sender.close()

    with contextlib.suppress(OSError, UnicodeError):
        return resolve(socket.AI_NUMERICHOST)
    found, failures = [], []
    try:
        receiver, sender = socket.socketpair()
    except OSError as error:  # no descriptor is left
        raise UpstreamError("cannot resolve %s: %s" % (origin.host, error.strerror)) from None
    with receiver:
        threading.Thread(target=work, name="rock-resolve", daemon=True).start()
        if not watch.wait(receiver, select.POLLIN, deadline):
            raise UpstreamError("cannot resolve %s: no answer" % origin.host, 504)
    if not found:
        raise UpstreamError("cannot resolve %s: %s" % (origin.host, failures[0]))
    return found


def _is_timeout(error):
    import socket

    return isinstance(error, socket.timeout)


def _connect_socket(sock, address, watch, deadline):
    import select
    import socket

    number = sock.connect_ex(address)
    if number == errno.EINPROGRESS:
        if not watch.wait(sock, select.POLLOUT, deadline):
            raise socket.timeout
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))


# ======================================================================================================================
# Forwarded calls: what a proxy understands of a request and of its answer, while both pass as they are.
# ======================================================================================================================

_KEY_HEADERS = ("authorization", "x-api-key", "api-key", "x-goog-api-key")
_SET_ANEW = frozenset(("host", "content-length", "expect", "accept-encoding", "via"))
_STREAM_TYPE = re.compile(r"text/event-stream\b", re.IGNORECASE)
_DOT_SEGMENT = re.compile(r"(?:/|%2f|%5c|\\)(?:\.|%2e){1,2}(?:[/;\\]|%2f|%5c|\Z)", re.IGNORECASE)
_FORWARDED_METHODS = ", ".join(sorted(KNOWN_METHODS))  # as an Allow field says it; others pass, too
_FORWARDS = re.compile(r"[0-9]{1,18}\Z")
_MODEL_LIST = re.compile(r"/v1/models(?:/|\Z)")


def retry_after(headers: tuple, now: float) -> float | None:
    """How many seconds an answer asks us to wait, by `retry-after-ms` or `Retry-After`; None where it does not.

    A date is meant by the server's clock, whose time the answer's own Date says: ours may have been set meanwhile.
    """
    by_name = {name.lower(): value for name, value in headers}
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        if re.match(r"[0-9]{1,12}(\.[0-9]*)?\Z", by_name.get(name, "")):
            return float(by_name[name]) / unit
    from email.utils import mktime_tz, parsedate_tz

    with contextlib.suppress(ValueError, OverflowError, TypeError):
        now = mktime_tz(parsedate_tz(by_name.get("date", "")))
    try:
        return max(0.0, mktime_tz(parsedate_tz(by_name.get("retry-after", ""))) - now)
    except (ValueError, OverflowError, TypeError):  # no date, or one of the year 99999
        return None


@dataclass(frozen=True)
class RetryPolicy:
    """Which answers are worth another attempt, and when.  delay_seconds: before the second one, doubled each time."""

    max_attempts: int
    delay_seconds: float
    status_codes: tuple

    def delay(self, attempt: int, headers: tuple, now: float, jitter: float) -> float | None:
        """Seconds to wait after a failed attempt, the first being 1; None where there is to be no other.

        headers: of the answer.  jitter: from 0 to 1; it makes the wait half to one and a half times as long, so that
        sandboxes that failed together do not come back together.  What the answer asks for is waited for as it says;
        one that asks for more than RETRY_AFTER_SECONDS is let through instead.
        """
        if attempt >= self.max_attempts:
            return None
        asked = retry_after(headers, now)
        if asked is not None:
            return asked if asked <= RETRY_AFTER_SECONDS else None
        return self.delay_seconds * 2 ** (attempt - 1) * (0.5 + jitter)


def base_url_of(settings: ServiceSettings, model: str | None) -> str:
    """Where the calls of a model go.  Raises ApiError 400 that names it."""
    if settings.proxy_base_url:
        return settings.proxy_base_url
    rules = settings.proxy_rules
    url = rules.get(model) or rules.get("default")
    if url is None:
        known = ", ".join(sorted(rules)) or "none"
        what = "no model is named" if model is None else "there is no rule for the model %s" % dump_json(model)
        message = "%s, and there is no default; proxy_rules has %s" % (what, known)
        raise ApiError(400, message, code="model_not_found", param="model")
    return url


class ForwardedRequest:
    """A client's request, as a proxy has to understand it.

    sent_body: what goes upstream.  value: that, where it is a JSON object, else None.  overridden: the names of the
    fields that `request_overrides` set.  keys: those in its header.
    """

    def __init__(self, request: Request, overrides: dict):
        self.head = request.head
        self.value = None
        self.sent_body = request.body
        self.overridden = ()
        self.keys = [value.rpartition(" ")[2] for name, value in self.head.headers if name in _KEY_HEADERS]
        self._check_path()
        self._is_json = False
        if self.head.header("content-encoding", "identity").lower() == "identity":
            self._read_json()
        if overrides and self.value is not None:
            self.sent_body = _with_overrides(self.sent_body, self.value, overrides)
            self.value = {**self.value, **overrides}
            self.overridden = tuple(overrides)

    def _check_path(self):
        if _DOT_SEGMENT.search(self.head.path):
            raise ApiError(400, "a path with '.' or '..' in it is not passed on")
        if self.head.method in ("TRACE", "CONNECT"):
            message = "%s is not passed on" % self.head.method
            raise ApiError(405, message, headers=[("Allow", _FORWARDED_METHODS)])

    def _read_json(self):
        if self.sent_body[:1] not in (b"{", b"[") and self.sent_body.lstrip()[:1] not in (b"{", b"["):
            return
        try:
            value = parse_json(self.sent_body.decode("utf-8"))
        except ValueError:
            return
        self._is_json = True
        self.value = value if isinstance(value, dict) else None

    @property
    def model(self) -> str | None:
        """The model asked for, where that is a text; also the one that a path names."""
        model = self.value.get("model") if self.value else None
        if model is None and self.head.path.startswith("/v1/models/"):
            from urllib.parse import unquote

            name = unquote(self.head.path[len("/v1/models/") :])
            return name if self.is_lookup else name.rpartition(":")[0] or name  # as in gemini-pro:generateContent
        return model if isinstance(model, str) else None

    @property
    def is_lookup(self) -> bool:
        """Whether it asks which models there are, and none of them."""
        return self.head.method in ("GET", "HEAD") and bool(_MODEL_LIST.match(self.head.path))

    @property
    def is_stream(self) -> bool:
        """Whether it asks for one."""
        return bool(self.value and self.value.get("stream"))

    @property
    def target(self) -> str:
        """The path behind `/v1`, and the query."""
        return self.head.path[len("/v1") :] + ("" if self.head.query is None else "?" + self.head.query)

    def upstream_headers(self, settings: ServiceSettings, via: str) -> list:
        """The header fields to send upstream, without Host."""
        headers = [(name, value) for name, value in end_to_end(self.head.headers) if name not in _SET_ANEW]
        if self.head.method == "OPTIONS":
            headers = _with_fewer_forwards(headers)
        if settings.upstream_api_key:
            headers = _with_key(headers, settings.upstream_api_key)
        elif settings.api_key:  # what stands there is the key to this service, and none of the upstream's business
            headers = [(name, value) for name, value in headers if name != "authorization"]
        # What is recorded has to be read: gzip is the one coding that every Python can undo.
        headers.append(("accept-encoding", "gzip" if _accepts_gzip(self.head.headers) else "identity"))
        if self.sent_body or self.head.method in ("POST", "PUT", "PATCH"):
            headers.append(("content-length", len(self.sent_body)))
        return headers + [("via", ", ".join(_values(self.head.headers, "via") + [via]))]

    def text(self, secrets: Secrets) -> tuple[str | None, dict]:
        """The body sent upstream as JSON text on one line, None for none; and what says how to read it otherwise."""
        if self._is_json:
            return secrets.hide_in_json(one_line(self.sent_body.decode("utf-8"))), {}
        text, kind = secrets.in_body(self.sent_body)
        return text, {"request_format": kind} if kind else {}


def _with_overrides(body, value, overrides):
    """A JSON object's text with fields set; what the agent wrote stays as it was, unless it has one of them."""
    if any(name in value for name in overrides):
        return dump_json({**value, **overrides}).encode("utf-8")
    return body.rstrip()[:-1] + (b"," if value else b"") + dump_json(overrides)[1:].encode("utf-8")


def _with_key(headers, key):
    """The header fields with the upstream's key wherever the agent gave its own."""
    with_key = {"authorization": "Bearer " + key}
    replaced = [(name, with_key.get(name, key) if name in _KEY_HEADERS else value) for name, value in headers]
    if not any(name in _KEY_HEADERS for name, _ in headers):
        replaced.append(("authorization", "Bearer " + key))
    return replaced


def _with_fewer_forwards(headers):
    """The header fields with Max-Forwards counted down, where it is a number."""
    return [
        (name, max(0, int(value) - 1) if name == "max-forwards" and _FORWARDS.match(value) else value)
        for name, value in headers
    ]


def _accepts_gzip(headers):
    codings = [re.sub(r"[ \t]", "", token) for token in _tokens(headers, "accept-encoding")]
    return any(re.match(r"(?:x-)?gzip(?:;(?!q=0(?:\.0*)?\Z).*)?\Z", coding) for coding in codings)


def one_line(text: str) -> str:
    """A valid JSON text on one line, otherwise as it was written."""
    return compact_json(text) if "\n" in text or "\r" in text else text


class GzipBody:
    """Undoes a body's gzip as it comes, to at most MAX_BODY_BYTES; `is_broken` where it cannot be undone further."""

    def __init__(self):
        import zlib

        self._zlib = zlib
        self._inflate = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self._left = MAX_BODY_BYTES
        self._is_between = True  # two members, or before the first
        self.is_broken = False

    def feed(self, data: bytes) -> bytes:
        """What the bytes become."""
        # In small slices: what follows a member is copied with each, and a body may be made of empty members.
        slices = [data[start : start + 4096] for start in range(0, len(data), 4096)]
        return b"".join([piece for part in slices for piece in self._inflated(part)])

    def _inflated(self, data):
        while data and not self.is_broken:
            self._is_between = False
            try:
                piece = self._inflate.decompress(data, self._left + 1)
            except self._zlib.error:
                self.is_broken = True
                return
            yield piece[: self._left]
            self._left -= len(piece)
            self.is_broken = self._left < 0
            data = self._inflate.unused_data
            if self._inflate.eof:  # several gzip members make one body
                self._inflate = self._zlib.decompressobj(16 + self._zlib.MAX_WBITS)
                self._is_between = True

    def end(self) -> None:
        """No more will come: in the middle of a member, it is broken."""
        self.is_broken = self.is_broken or not self._is_between


def _is_event_stream(head):
    return bool(_STREAM_TYPE.match(head.header("content-type", "")))


class RecordedAnswer:
    """What is written down of an answer, gathered as it passes.

    head: of the response.  is_completion: whether a stream of it holds a completion's chunks.  What is longer than
    MAX_BODY_BYTES is gathered so far, and said to be too long.
    """

    def __init__(self, head: ResponseHead, is_completion: bool):
        coding = head.header("content-encoding", "identity").lower()
        self._unzip = GzipBody() if coding in ("gzip", "x-gzip") else None
        is_readable = self._unzip is not None or coding in ("identity", "")
        self._content_type = head.header("content-type")
        self.is_stream = is_readable and _is_event_stream(head)
        self._size = 0
        self._status = head.status
        self._parser = EventParser()
        self._events = CompletionEvents() if is_completion else OtherEvents()
        self._body = bytearray()
        self._is_too_long = False
        self._coding = None if is_readable else coding

    @property
    def has_begun(self) -> bool:
        """Whether any of the body has come."""
        return self._size > 0

    @property
    def is_over(self) -> bool:
        """Whether a stream has said that it is."""
        return self.is_stream and self._events.is_over

    @property
    def is_finished(self) -> bool:
        """Whether a body that just stops has said all, as far as can be told."""
        if self._is_too_long:
            return True
        if self.is_stream:
            return self._events.is_finished
        is_json = self._coding is None and is_json_type(self._content_type or "")
        return not is_json or _is_json(self._body)

    def feed(self, data: bytes) -> None:
        """Take more of the body."""
        self._is_too_long = self._is_too_long or self._size + len(data) > MAX_BODY_BYTES
        if self._is_too_long:
            data = data[: MAX_BODY_BYTES - self._size]
        self._size += len(data)
        data = self._unzip.feed(data) if self._unzip and data else data
        if self.is_stream:
            self._add(self._parser.feed(data))
            unfinished = self._parser.unfinished()
            if unfinished and is_last_event(*unfinished):  # some clients read lines, and do not wait for the empty one
                self._add(self._parser.end())
        else:
            self._body += data

    def end(self) -> None:
        """All of the body has come."""
        if self._unzip:
            self._unzip.end()
        if self.is_stream:
            self._add(self._parser.end())

    def _add(self, events):
        for name, text in events:
            self._events.add(name, text)

    def text(self, secrets: Secrets) -> tuple[str | None, str | None, dict]:
        """The answer so far as JSON text, what went wrong with it, and further fields for the record."""
        if self.is_stream:
            value, kind = self._events.response(), self._events.kind
            text, error = (None if value is None else secrets.hide_in_json(dump_json(value))), self._events.error
        else:
            text, kind, error = self._body_text(secrets)
        more = {"response_format": kind} if kind else {}
        if kind in ("text", "base64"):
            more["content_type"] = secrets.hide(self._content_type)
        if self._coding:
            more["content_encoding"] = self._coding
        return text, secrets.hide(self._what_is_wrong() or error), more

    def _what_is_wrong(self):
        if self._unzip and self._unzip.is_broken:
            return "the answer's gzip is broken, or too long to be recorded"
        return "the answer is too long to be recorded whole" if self._is_too_long else None

    def _body_text(self, secrets):
        try:
            text = self._body.decode("utf-8")
            value = parse_json(text)
        except ValueError:
            (text, kind), value = secrets.in_body(bytes(self._body)), None
        else:
            text, kind = secrets.hide_in_json(one_line(text)), None
        if self._status < 400:
            return text, kind, None
        return text, kind, error_message(value) or "the upstream answered %d" % self._status


# ======================================================================================================================
# Proxy service: calls go on to a model's server, and are written down on the way back.
#
#   Bytes        Bodies pass as they are, in both directions; `request_overrides`, where set, rewrite a JSON request.
#   Attempts     Until the client gets its first byte, an attempt that fails may be followed by another.  So a stream is
#                held until it begins, and any other answer until it is whole, or HOLD_BYTES have come; but neither for
#                longer than `heartbeat_seconds`.
#   The record   is on disk before the client can see the end of its answer.  A call that ended early is written down
#                with what had arrived: status 499 where the client hung up, 502 or 504 where the upstream broke off.
# ======================================================================================================================


class ProxySession:
    """What a proxy has of a session: its end, which a trainer hears of as in the local type."""

    has_ended = False  # a proxy answers on

    def __init__(self, log: MarkerLog):
        self._log = log

    def end(self) -> None:
        """Write SESSION_END.  Raises StorageError."""
        self._log.append_session_end()


class ProxyCall:
    """One call, from request to reply."""

    def __init__(self, service: ProxyService, request: Request):
        self._service = service
        self._start_time, self._began = service.clock(), time.monotonic()
        self._request = ForwardedRequest(request, service.settings.request_overrides)
        self._watch = ClientWatch(request.sock)
        self._attempts = 0
        self._upstream = None  # where it goes
        self._response = None  # of the upstream, to the last attempt
        self._answer = None  # the RecordedAnswer of that, from its header on
        self._is_recorded = False

    def reply(self) -> Reply:
        """Have the upstream answer.  Raises ApiError, ClientGone, StorageError."""
        try:
            return self._reply(self._held_answer())
        except ApiError as error:
            self._record_quietly(error.status, str(error))
            raise
        except ClientGone:
            has_begun = self._answer is not None and self._answer.has_begun
            self._record_quietly(499, self._service.hangup_reason(), is_partial=has_begun)
            self._close_response()
            raise

    def _held_answer(self):
        """What came of the answer to the last attempt before it had to be passed on, as a list of pieces."""
        service, request = self._service, self._request
        upstream = self._upstream = service.upstream_of(request)
        target = upstream.path + request.target
        headers = request.upstream_headers(service.settings, service.via_of(request))
        while True:
            self._attempts += 1
            failure, held = None, []
            try:
                self._response = service.send(
                    upstream, request.head.method, target, headers, request.sent_body, self._watch
                )
                held = self._hold()
            except UpstreamError as error:
                self._forget_answer()
                failure = error
            delay = self._delay(failure)
            if delay is None:
                break
            self._forget_answer()
            service.pause(self._watch, delay)
        if failure:
            code = "upstream_timeout" if failure.status == 504 else "upstream_error"
            raise ApiError(failure.status, str(failure), code=code)
        return held

    def _forget_answer(self):
        """An attempt was in vain: nothing of what came of it is recorded."""
        self._close_response()
        self._answer = None

    def _delay(self, failure):
        """How long to wait for the next attempt; None where this one was the last."""
        service, head = self._service, None if failure else self._response.head
        if failure:
            is_worth_it = not failure.is_final
        else:  # an answer that is not whole was too long to be held, or came too slowly
            is_worth_it = head.status in service.retries.status_codes and self._response.is_done
        delay = None
        if is_worth_it:
            headers = head.headers if head else ()
            delay = service.retries.delay(self._attempts, headers, service.clock(), service.jitter())
        if is_worth_it or failure:
            what = failure or "the upstream answered %d" % head.status
            then = "it was the last" if delay is None else "the next one in %.3g s" % delay
            name = "%s %s (%r)" % (self._request.head.method, self._request.head.path, self._request.model)
            service.logger.warning("attempt %d of %s failed: %s; %s", self._attempts, name, what, then)
        return delay

    def _hold(self):
        """Read the answer as far as it is held."""
        head, response, clock = self._response.head, self._response, self._watch.clock
        is_stream = head.status < 300 and (self._request.is_stream or _is_event_stream(head))
        until, limit = clock() + self._service.settings.heartbeat_seconds, 0 if is_stream else HOLD_BYTES
        self._answer = RecordedAnswer(head, self._request.head.path.rstrip("/").endswith("/completions"))
        held, size = [], 0
        while not response.is_done and size <= limit:
            piece = response.read(until)
            if piece is None:
                break
            self._take(piece)
            held.append(piece)
            size += len(piece)
        return held

    def _take(self, piece):
        """Gather a piece of the answer.  Raises UpstreamError where its end is none."""
        self._answer.feed(piece)
        if self._response.is_done:
            self._answer.end()
            if not self._response.is_bounded and not self._answer.is_finished:
                raise UpstreamError("the upstream closed the connection before its answer was over")

    def _reply(self, held):
        response, head = self._response, self._response.head
        headers = [(name, value) for name, value in end_to_end(head.headers) if name.lower() != "content-length"]
        is_head = self._request.head.method == "HEAD"
        if is_head or head.status == 304:
            headers += self._unsent_framing(is_head)
        common = {"content_type": None, "headers": tuple(headers), "done": self._close, "note": self._note}
        if response.is_done:
            self._record(head.status)
            return Reply(head.status, None if is_head else b"".join(held), **common)
        return Reply(head.status, pieces=self._pieces(held), length=head.content_length, **common)

    def _unsent_framing(self, is_head):
        """The header fields that say how long a body would be that is not sent."""
        head = self._response.head
        length = head.header("content-length")
        if head.status == 204:
            return []
        if length is not None:
            return [("Content-Length", length)]
        is_chunked = is_head and head.header("transfer-encoding") and not self._request.head.is_http10
        return [("Transfer-Encoding", "chunked")] if is_chunked else []

    def _pieces(self, held):
        """The answer as it comes; its record is written before the piece with which the client sees its end."""
        try:
            self._record_if_over()
            yield from held
            while not self._response.is_done:
                piece = self._response.read()
                self._take(piece)
                self._record_if_over()
                yield piece
        except UpstreamError as error:
            self._record_quietly(error.status, str(error), is_partial=True)
            raise
        except StorageError as error:
            self._record_quietly(500, "the answer could not be recorded", is_partial=True)
            raise NotRecorded("it cannot be recorded: %s" % error) from None
        except Exception as error:
            if not isinstance(error, ClientGone):
                self._record_quietly(500, "an internal error", is_partial=True)
            raise

    def _record_if_over(self):
        if (self._response.is_done or self._answer.is_over) and not self._is_recorded:
            self._record(self._response.head.status)

    def _close(self, _):
        """The reply is done, or broke off."""
        self._close_response()
        self._record_quietly(499, self._service.hangup_reason(), is_partial=True)

    def _close_response(self):
        if self._response:
            self._response.close()

    def _record_quietly(self, status, error, is_partial=False):
        """Write down a call that failed, unless it is written down; try only once."""
        if self._is_recorded:
            return
        try:
            self._record(status, error, is_partial)
        except Exception as failure:
            self._service.logger.error("a call that failed is not in the trajectory: %r", failure)
            self._is_recorded = True

    def _record(self, status, error=None, is_partial=False):
        if not self._request.is_lookup:
            self._service.trajectory.append(self._call_record(status, error, is_partial).line())
        self._is_recorded = True

    def _call_record(self, status, error, is_partial):
        request, head, secrets = self._request, self._request.head, self._service.secrets_of(self._request, is_partial)
        text, more = request.text(secrets)
        response, wrong, answer_more = self._answer.text(secrets) if self._answer else (None, None, {})
        more = {"method": head.method, "path": secrets.hide(head.path), **more, **answer_more}
        more.update(upstream=self._upstream and self._upstream.origin.authority, attempts=self._attempts)
        if is_partial:
            more["partial"] = True
        if request.overridden:
            more["overridden"] = request.overridden
        seconds = time.monotonic() - self._began
        error = secrets.hide(error) or wrong
        model = secrets.hide(request.model)
        return CallRecord(text, response, model, request.is_stream, status, error, self._start_time, seconds, more=more)

    def _note(self):
        return "upstream=%s attempts=%d" % (self._upstream.origin.authority, self._attempts)


class ProxyService:
    """The endpoints of the proxy type.

    session: a ProxySession.  settings: ServiceSettings.  trajectory: a Trajectory.  proxies: as from `http_proxies`.
    logger: as from `logging`.  Tests replace clock: () -> seconds since the epoch; pause: (ClientWatch, seconds),
    which raises ClientGone, or ApiError 503 where the service stops; jitter: () -> 0 to 1.
    """

    def __init__(self, session, settings, trajectory, proxies, logger):
        import socket
        from random import random

        self.session = session
        self.about = "to %s, recording %s" % (settings.proxy_base_url or "proxy_rules", trajectory.path)
        self.settings = settings
        self.trajectory = trajectory
        self.logger = logger
        self.clock = time.time
        self.pause = self._pause
        self.jitter = random
        self.retries = RetryPolicy(settings.max_attempts, settings.retry_delay_seconds, settings.retryable_status_codes)
        self._pool = UpstreamPool(proxies)
        urls = [settings.proxy_base_url] if settings.proxy_base_url else settings.proxy_rules.values()
        self._upstreams = {url: Upstream.of(url) for url in urls}
        self._name = "rock-%s" % os.urandom(4).hex()  # in the Via field
        self._stop_receiver, self._stop_sender = socket.socketpair()
        self._is_stopping = False

    def routes(self) -> list:
        """The route table of the service's own endpoints."""
        return [Route("*", "/v1/{name}", self.forward)]

    def gauges(self) -> dict:
        """Numbers for /metrics."""
        return {
            "rock_proxy_upstream_attempts": self._pool.sent_count,
            "rock_proxy_idle_upstream_connections": self._pool.idle_count,
        }

    def start(self) -> None:
        """Nothing has to be read first."""

    def stop(self) -> None:
        """End every wait for another attempt with 503.  Calls that are being answered go on."""
        self._is_stopping = True
        self._stop_sender.close()

    def close(self) -> None:
        """Close what is left, when no call is being answered any more."""
        self._pool.close()
        self._stop_receiver.close()

    def forward(self, request: Request) -> Reply:
        """Pass a request on, and its answer back."""
        if request.head.path.rstrip("/") == "/v1/models" and request.head.method in ("GET", "HEAD"):
            try:
                base_url_of(self.settings, None)
            except ApiError:
                return models_reply(self.settings.proxy_rules)
        if request.head.method == "OPTIONS" and re.match("0+\\Z", request.head.header("max-forwards", "")):
            return Reply(204, content_type=None, headers=(("Allow", _FORWARDED_METHODS),))
        return ProxyCall(self, request).reply()

    def upstream_of(self, request: ForwardedRequest) -> Upstream:
        """Where a request goes.  Raises ApiError 400."""
        return self._upstreams[base_url_of(self.settings, request.model)]

    def via_of(self, request: ForwardedRequest) -> str:
        """What this service adds to the Via field.  Raises ApiError 508 where it stands there already."""
        if self._name in ", ".join(_values(request.head.headers, "via")):
            raise ApiError(508, "the upstream of this service is the service itself", code="loop_detected")
        return "%s %s" % ("1.0" if request.head.is_http10 else "1.1", self._name)

    def send(self, upstream, method, target, headers, body, watch) -> UpstreamResponse:
        """Send a request upstream.  Raises UpstreamError, ClientGone."""
        return self._pool.send(upstream, method, target, headers, body, watch, self.settings.wait_limit)

    def hangup_reason(self) -> str:
        """Why a client is gone."""
        return "the service stopped" if self._is_stopping else "the client hung up"

    def secrets_of(self, request: ForwardedRequest, is_partial: bool) -> Secrets:
        """What must not be written down of a call."""
        return Secrets([self.settings.upstream_api_key, self.settings.api_key] + request.keys, is_partial)

    def _pause(self, watch, seconds):
        import select

        if watch.wait(self._stop_receiver, select.POLLIN, watch.clock() + seconds):
            raise ApiError(503, "the model service is stopping", code="service_stopping")


# ======================================================================================================================
# Replay service: the answers of a trajectory once more, without an upstream.
#
#   In order     Each method and path has its answers one after the other; what is asked does not matter.
#   By request   An answer belongs to the request it was given to, told by its JSON without `stream`, `stream_options`
#                and what `request_overrides` had set.  So parallel agents get theirs, in whatever order they ask.
#   What         A whole answer is made a stream, and a stream a whole answer, where the other one was recorded.
#                Failures stay failures.  A call that was cut off is cut off again, at the same point.
# ======================================================================================================================

_NOT_COMPARED = ("stream", "stream_options")


@dataclass(frozen=True)
class RecordedCall:
    """A call of a trajectory, checked.

    line: its number.  value: the object that the line holds.  method, path, status: as recorded, or as ROCK's own
    records, which have none of them, mean.  overridden: the fields that `request_overrides` had set.
    """

    line: int
    value: dict
    method: str
    path: str
    status: int
    overridden: tuple

    @classmethod
    def of(cls, line: bytes, number: int) -> RecordedCall:
        """Read a line.  Raises ValueError that says what is wrong with it."""
        value = parse_object(line.decode("utf-8"), "the line")
        if "response" not in value or "request" not in value:
            raise ValueError("a call needs both request and response")
        method, path = value.get("method", "POST"), value.get("path", "/v1/chat/completions")
        overridden = value.get("overridden", [])
        if not isinstance(method, str) or not isinstance(path, str):
            raise ValueError("method and path must be strings")
        if not isinstance(overridden, list) or not all(isinstance(name, str) for name in overridden):
            raise ValueError("overridden must be an array of strings")
        status = recorded_status(value)
        if status < 200:
            raise ValueError("%d is not the status of an answer" % status)
        return cls(number, value, method, path.rstrip("/"), status, tuple(overridden))

    @property
    def request_key(self) -> bytes:
        """What equal requests have in common."""
        return request_key(self.value["request"], self.overridden)


def request_key(request: object, overridden: tuple) -> bytes:
    """A digest of a request's JSON value, without the fields that do not tell requests apart."""
    if isinstance(request, dict):
        request = {key: value for key, value in request.items() if key not in _NOT_COMPARED + overridden}
    return _digest(json.dumps(request, sort_keys=True).encode("utf-8"))


class Recording:
    """A trajectory file to replay from.  Only the places of its calls are kept in memory.

    path: of the file, which must not change any more.  is_by_request: how calls are found.  Raises UsageError for a
    file that cannot be replayed, naming the line.
    """

    def __init__(self, path: str, is_by_request: bool):
        self.path = path
        self._is_by_request = is_by_request
        self._lock = threading.Lock()
        self._places = {}  # (method, path[, request key]) -> [(offset, number, hash of the line)], the next one last
        self._overridden = set()
        self.models = {}  # names as keys
        self.count = 0
        try:
            self._file = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise UsageError("cannot read the replay file %s: %s" % (path, error.strerror)) from None
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _read(self):
        offset = 0
        for number, line in enumerate(self._file, 1):
            if line.strip():
                try:
                    self._add(RecordedCall.of(line, number), offset, line)
                except ValueError as error:
                    hint = (
                        "" if line.endswith(b"\n") else "; it is torn, since its writer was stopped: remove that line"
                    )
                    raise UsageError("%s, line %d: %s%s" % (self.path, number, error, hint)) from None
            offset += len(line)
        if not self.count:
            raise UsageError("the replay file %s holds no call" % self.path)
        for places in self._places.values():
            places.reverse()

    def _add(self, call, offset, line):
        key = (call.method, call.path)
        if self._is_by_request:
            key += (call.request_key,)
            self._overridden.add(call.overridden)
        self._places.setdefault(key, []).append((offset, call.line, hash(line)))
        model = call.value.get("model")
        if isinstance(model, str):
            self.models[model] = None
        self.count += 1

    def take(self, method: str, path: str, request: object) -> RecordedCall:
        """The next call to replay.  Raises ApiError 404 where there is none, or none left; StorageError.

        request: the JSON value that was asked.
        """
        path = path.rstrip("/")
        keys = [(method, path)]
        if self._is_by_request:
            keys = [(method, path, request_key(request, names)) for names in self._overridden]
        with self._lock:
            known = [self._places[key] for key in keys if key in self._places]
            left = [places for places in known if places]
            if not left:
                raise self._nothing_left(method, path, bool(known))
            places = min(left, key=lambda places: places[-1])
            call = self._call_at(*places[-1])
            places.pop()  # now that it could be read
            return call

    def _nothing_left(self, method, path, is_known):
        what = "for this request" if self._is_by_request else "of %s %s" % (method, path)
        message = "the recording has no %s call %s" % ("further" if is_known else "", what)
        return ApiError(404, message.replace("  ", " "), code="replay_exhausted" if is_known else "not_recorded")

    def _call_at(self, offset, number, line_hash):
        try:
            self._file.seek(offset)
            line = self._file.readline()
        except OSError as error:
            raise StorageError("cannot read the replay file %s: %s" % (self.path, error.strerror)) from None
        if hash(line) != line_hash:
            raise StorageError("the replay file %s has changed" % self.path)
        return RecordedCall.of(line, number)

    def left(self) -> int:
        """How many calls have not been replayed."""
        with self._lock:
            return sum(map(len, self._places.values()))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ReplayService:
    """The endpoints of the proxy type when it replays.

    session: a ProxySession.  recording: a Recording.  logger: as from `logging`.  clock: seconds since the epoch.
    """

    def __init__(self, session, recording: Recording, logger, clock=time.time):
        self.session = session
        self.about = "replaying %d calls of %s" % (recording.count, recording.path)
        self._recording = recording
        self._logger = logger
        self._clock = clock

    def routes(self) -> list:
        """The route table of the service's own endpoints."""
        return [
            Route("GET", "/v1/models", lambda request: models_reply(self._recording.models)),
            Route("*", "/v1/{name}", self.replay),
        ]

    def gauges(self) -> dict:
        """Numbers for /metrics."""
        return {"rock_replay_calls_left": self._recording.left()}

    def start(self) -> None:
        """Nothing has to be read first."""

    def stop(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """Close the recording."""
        self._recording.close()

    def replay(self, request: Request) -> Reply:
        """Answer as the recording says."""
        if request.head.path.startswith("/v1/models/") and request.head.method == "GET":
            return model_reply(request.head.path[len("/v1/models/") :])
        asked = ForwardedRequest(request, {})
        value = asked.value if asked.value is not None else parse_json(asked.text(Secrets([]))[0] or "null")
        call = self._recording.take(request.head.method, request.head.path, value)
        if request_key(value, call.overridden) != call.request_key:
            self._logger.warning("line %d of the recording was the answer to another request", call.line)
        return replace(replayed_reply(call, asked, self._clock()), note=lambda: "replay=%d" % call.line)


def replayed_reply(call: RecordedCall, asked: ForwardedRequest, now: float) -> Reply:
    """The reply that a recorded call makes.  Raises ClientGone where nothing was answered; ApiError."""
    response = call.value["response"]
    is_partial = bool(call.value.get("partial"))
    if response is None and (is_partial or call.status == 499):
        raise ClientGone
    if response is None and call.status >= 400:
        raise ApiError(call.status, str(call.value.get("error") or "recorded as failed"), code="replayed_failure")
    kind = call.value.get("response_format")
    if kind in ("text", "base64"):
        reply = _replayed_bytes(call, kind)
    elif call.status >= 400 and not is_partial:
        reply = Reply(call.status, dump_json(response).encode("utf-8"))
    elif asked.is_stream or (kind == "events" and not call.value.get("stream")):  # some paths stream unasked
        reply = Reply(200 if is_partial else call.status, _replayed_events(call, now), SSE_TYPE, SSE_HEADERS)
    else:
        reply = _replayed_whole(call)
    return replace(reply, status=200, body=b"", pieces=_cut_off(reply.body)) if is_partial else reply


def _replayed_bytes(call, kind):
    from base64 import b64decode

    coding, content_type = call.value.get("content_encoding"), call.value.get("content_type")
    try:
        text = call.value["response"]
        body = b64decode(text, validate=True) if kind == "base64" else text.encode("utf-8")
    except (ValueError, TypeError, AttributeError):
        raise ApiError(500, "the recorded response is not %s" % kind, code="bad_recording") from None
    headers = (("Content-Encoding", coding),) if isinstance(coding, str) else ()
    return Reply(call.status, body, content_type if isinstance(content_type, str) else None, headers)


def _replayed_events(call, now):
    """The body of a stream.  Raises ApiError where the recorded answer cannot be made one."""
    response = call.value["response"]
    if call.value.get("response_format") == "events":
        return b"".join(map(_replayed_event, response or ()))
    if not _is_completion(response) and not call.value.get("partial"):
        raise _not_replayable("whole, and cannot be made a stream")
    completion = {key: value for key, value in response.items() if key != "error"} if isinstance(response, dict) else {}
    error = response["error"] if isinstance(response, dict) and response.get("error") else None
    is_whole = not error and not call.value.get("partial")
    chunks = _replayed_chunks(call, completion, now, is_whole) if completion.get("choices") else []
    body = b"".join(map(sse_event, chunks))
    return body + sse_event({"error": error}) if error else body + SSE_DONE if is_whole else body


def _replayed_event(event):
    if not isinstance(event, dict):
        raise ApiError(500, "the recorded events are not objects", code="bad_recording")
    name, data = event.get("event"), event.get("data")
    text = data if isinstance(data, str) else dump_json(data)
    lines = (["event: %s" % name] if name else []) + ["data: %s" % line for line in text.split("\n")]
    return ("\n".join(lines) + "\n\n").encode("utf-8", "replace")


def _replayed_chunks(call, response, now, is_whole):
    # A stream that had its usage keeps it, whether or not this request asks for it.
    asked = call.value["request"] if isinstance(call.value["request"], dict) else {}
    request = {"model": asked.get("model", ""), "stream_options": {"include_usage": True}}
    if response.get("object") == "text_completion":
        return [response]
    try:
        return completion_chunks(response, request, 0, now, is_whole)
    except ValueError as error:
        raise ApiError(500, "the recorded response cannot be made a stream: %s" % error, code="bad_recording") from None


def _replayed_whole(call):
    """The reply to a request that asks for no stream."""
    response, status = call.value["response"], call.status
    if call.value.get("response_format") == "events":
        response = {} if call.value.get("partial") else _response_of_events(response)
    elif isinstance(response, dict) and response.get("error") and call.value.get("error"):
        response = {"error": response["error"]}  # of an event in a stream that had begun with 200
        status = error_status(response)
    return Reply(status, b"" if response is None else dump_json(response).encode("utf-8"))


def _response_of_events(events):
    """The object with which a stream of OpenAI's Responses API ends."""
    last = events[-1].get("data") if isinstance(events, list) and events and isinstance(events[-1], dict) else None
    if not isinstance(last, dict) or not isinstance(last.get("response"), dict):
        raise _not_replayable("as a stream, and cannot be made a whole answer")
    return last["response"]


def _not_replayable(how):
    return ApiError(404, "this call was recorded %s" % how, code="not_recorded")


def _is_completion(response):
    return isinstance(response, dict) and (isinstance(response.get("choices"), list) or bool(response.get("error")))


def _cut_off(body):
    yield body[:-1] if body[-1:] == b"}" else body  # what is whole as JSON would be taken for an answer
    raise ReplyBroken("as it was recorded")


# ======================================================================================================================
# Built-in tools: those of modelscope-agent that need nothing but a web service, and what they have in common.
# ======================================================================================================================


class BaseTool:
    """What modelscope-agent's tools are made from, where that package is not installed.

    cfg: of the tool, or of several by name.
    """

    name = ""
    description = ""
    parameters = ()

    def __init__(self, cfg: dict | None = None):
        own = (cfg or {}).get(self.name)
        self.cfg = own if isinstance(own, dict) else cfg or {}

    def call(self, params: str, **kwargs) -> object:
        """Answer a call.  params: JSON text."""
        raise NotImplementedError

    def _verify_args(self, params):
        """As the original's: the arguments; ValueError where a required one is missing."""
        arguments = parse_arguments(params)[1]
        for name in arguments_schema(self.parameters).get("required", ()):
            if name not in arguments:
                raise ValueError("param `%s` is required" % name)
        return arguments


class RenewInstance(BaseTool):
    """modelscope-agent's demonstration tool: it says that it renewed a machine, and does nothing."""

    name = "RenewInstance"
    description = "续费一台包年包月ECS实例"
    parameters = [
        {"name": "instance_id", "description": "ECS实例ID", "required": True, "type": "string"},
        {"name": "period", "description": "续费时长以月为单位", "required": True, "type": "string"},
    ]

    def call(self, params, **_):
        """The sentence that the original says."""
        arguments = self._verify_args(params)
        return "已完成ECS实例ID为%s的续费，续费时长%s月" % (arguments["instance_id"], arguments["period"])


class _WebTool(BaseTool):
    """A tool that asks a web service.

    Its cfg may have `base_url`, and `api_key` (or `token`), which a call's kwargs may give, too, as `key_name`.  Where
    the cfg says neither, the environment counts: `key_variable`, and `url_variable` for another base URL.  A key from
    the environment goes to a base URL from there only: it must not follow whoever may write the cfg.
    """

    base_url = key_name = key_variable = url_variable = ""

    def __init__(self, cfg=None):
        super().__init__(cfg)
        try:
            self._url = as_url(self.cfg.get("base_url") or os.environ.get(self.url_variable) or self.base_url)
        except (ValueError, UsageError):
            raise ValueError("its base_url must be a URL without a key in it, as %s" % self.base_url) from None

    def _key(self, kwargs):
        """The key for a call.  Raises ValueError where there is none."""
        given_url = self.cfg.get("base_url")
        key = kwargs.get(self.key_name) or self.cfg.get("api_key") or self.cfg.get("token")
        if not key and not given_url:
            key = os.environ.get(self.key_variable)
        if not key:
            message = "%s needs a key: give it as %s in the call's kwargs, as api_key in its tool_cfg%s"
            where = "" if given_url else ", or as %s in its environment" % self.key_variable
            raise ValueError(message % (self.name, self.key_name, where))
        try:
            return as_api_key(key)
        except ValueError as error:
            raise ValueError("the key of %s %s" % (self.name, error)) from None


def direct_opener(*handlers) -> object:
    """As urllib's build_opener, but it follows no redirect: a key that is sent would go wherever the service says."""
    from urllib.error import URLError
    from urllib.request import BaseHandler, HTTPRedirectHandler, build_opener

    class NoRedirect(HTTPRedirectHandler):
        def redirect_request(self, *_):
            return None

    class WithoutSSL(BaseHandler):
        handler_order = HTTPRedirectHandler.handler_order + 1  # after urllib's own for https, where there is one

        def https_open(self, _):
            raise URLError(NO_SSL)

    return build_opener(NoRedirect, WithoutSSL, *handlers)


def _fetch_json(url, headers=None, value=None):
    """A web service's JSON answer.  Raises RuntimeError with what it said; never the URL, which may hold a key."""
    import urllib.error
    import urllib.request
    from http.client import HTTPException

    body = None if value is None else dump_json(value).encode("utf-8")
    headers = {"Content-Type": "application/json", **(headers or {})} if body else headers or {}
    request = urllib.request.Request(url, body, headers)
    try:
        with direct_opener().open(request, timeout=TOOL_HTTP_SECONDS) as response:
            return parse_json(response.read(READ_BLOCK_BYTES).decode("utf-8"))
    except urllib.error.HTTPError as error:
        with error:
            said = error.read(READ_BLOCK_BYTES).decode("utf-8", "replace")
        raise RuntimeError("the service answered %d: %s" % (error.code, said)) from None
    except urllib.error.URLError as error:
        raise RuntimeError("the service does not answer: %s" % error.reason) from None
    except (OSError, ValueError, HTTPException) as error:
        raise RuntimeError("the service's answer cannot be read: %s" % raised(error)) from None


class AMapWeather(_WebTool):
    """The weather at a place in China, from AMap's web service."""

    name = "amap_weather"
    description = "获取对应城市的天气数据"
    parameters = [
        {
            "name": "location",
            "type": "string",
            "description": "城市/区具体名称，如`北京市海淀区`请描述为`海淀区`",
            "required": True,
        }
    ]
    base_url, url_variable = "https://restapi.amap.com", "AMAP_BASE_URL"
    key_name, key_variable = "amap_api_key", "AMAP_TOKEN"

    def call(self, params, **kwargs):
        """`<place>的天气是<weather>温度是<degrees>度。`  Raises RuntimeError with what the service said."""
        location = self._verify_args(params)["location"]
        key = self._key(kwargs)
        districts = self._ask("/v3/config/district", "districts", keywords=location, subdistrict="0", key=key)
        code = districts[0].get("adcode")
        live = self._ask("/v3/weather/weatherInfo", "lives", city=code, key=key)[0]
        return "%s的天气是%s温度是%s度。" % (location, live.get("weather"), live.get("temperature"))

    def _ask(self, path, what, **query):
        from urllib.parse import urlencode

        answer = _fetch_json("%s%s?%s" % (self._url, path, urlencode(query)))
        found = answer.get(what) if isinstance(answer, dict) else None
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            said = answer.get("info") if isinstance(answer, dict) else None
            raise RuntimeError("AMap refused: %s" % said)
        if not found:
            raise ValueError("AMap knows no such place")
        return found


class ImageGeneration(_WebTool):
    """An image from a description, by DashScope's web service.

    Its cfg may have `model`, too.
    """

    name = "image_gen"
    description = "AI绘画（图像生成）服务，输入文本描述和图像分辨率，返回根据文本信息绘制的图片URL。"
    parameters = [
        {
            "name": "text",
            "type": "string",
            "description": "详细描述了希望生成的图像具有什么内容，例如人物、环境、动作等细节描述",
            "required": True,
        },
        {
            "name": "resolution",
            "type": "string",
            "description": "格式是 数字*数字，表示希望生成的图像的分辨率大小，选项有[1024*1024, 720*1280, 1280*720]",
            "required": False,
        },
    ]
    base_url, url_variable = "https://dashscope.aliyuncs.com", "DASHSCOPE_BASE_URL"
    key_name, key_variable = "dashscope_api_key", "DASHSCOPE_API_KEY"
    sizes = ("1280*720", "720*1280", "1024*1024")

    def call(self, params, **kwargs):
        """`![IMAGEGEN](<URL>)`  Raises RuntimeError with what the service said."""
        arguments = self._verify_args(params)
        headers = {"Authorization": "Bearer " + self._key(kwargs)}
        size = arguments.get("resolution")
        task = {
            "model": str(kwargs.get("model") or self.cfg.get("model") or "wanx-v1"),
            "input": {"prompt": arguments["text"]},
            "parameters": {"n": 1, "size": size if size in self.sizes else self.sizes[0]},
        }
        url = self._url + "/api/v1/services/aigc/text2image/image-synthesis"
        output = self._output(_fetch_json(url, {**headers, "X-DashScope-Async": "enable"}, task))
        delay = 0.5
        while output.get("task_status") in ("PENDING", "RUNNING", "SUSPENDED"):  # the node ends what takes too long
            time.sleep(delay)
            delay = min(2 * delay, 4.0)
            output = self._output(_fetch_json("%s/api/v1/tasks/%s" % (self._url, self._task_id(output)), headers))
        return "![IMAGEGEN](%s)" % self._image_url(output)

    def _output(self, answer):
        output = answer.get("output") if isinstance(answer, dict) else None
        if not isinstance(output, dict):
            raise RuntimeError("DashScope answered without an output: %s" % dump_json(answer))
        return output

    def _task_id(self, output):
        task_id = str(output.get("task_id"))
        if not re.match(r"[A-Za-z0-9_-]+\Z", task_id):
            raise RuntimeError("DashScope's answer has no task_id")
        return task_id

    def _image_url(self, output):
        results = output.get("results")
        first = results[0] if isinstance(results, list) and results else None
        if output.get("task_status") != "SUCCEEDED" or not isinstance(first, dict) or not first.get("url"):
            raise RuntimeError("DashScope made no image: %s" % dump_json(output))
        return first["url"]


BUILT_IN_TOOLS = {tool.name: tool for tool in (RenewInstance, AMapWeather, ImageGeneration)}


# ======================================================================================================================
# Tools: what a tool node runs. Classes of modelscope-agent's shape and plain functions, from a file or built in.
# ======================================================================================================================


class ToolLoop:
    """The event loop of an asynchronous tool: one for all its calls, since what it keeps may belong to it."""

    def __init__(self):
        self._loop = None

    def result(self, awaitable: object) -> object:
        """What comes of it.  Raises whatever it raises."""

        async def settle():
            return await awaitable

        if self._loop is None or self._loop.is_closed():
            self._loop = self._begin()
        return self._loop.run_until_complete(settle())

    def _begin(self):
        """The loop that the tool met when it was made, where there is one: before Python 3.10, locks are tied to it."""
        import asyncio
        import warnings

        with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
            warnings.simplefilter("ignore", DeprecationWarning)  # where there is none yet
            loop = asyncio.get_event_loop()
            if not loop.is_closed() and not loop.is_running():
                return loop
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        return loop


@dataclass(frozen=True)
class Tool:
    """A tool that can be called.

    parameters: as the tool states them, a list of modelscope-agent's kind or a JSON Schema.  schema: what they mean.
    function: (params as JSON text, params as an object, kwargs) -> a value, or something to be awaited, in `loop`.
    """

    name: str
    description: str
    parameters: object
    schema: dict
    function: object
    loop: ToolLoop

    def info(self) -> dict:
        """What /tool_info says of it."""
        return {"name": self.name, "description": self.description, "parameters": self.parameters}

    def check(self, params: object) -> tuple[str, dict]:
        """The params of a call, as JSON text and as an object.  Raises ValueError that names the wrong argument."""
        text, arguments = parse_arguments(params)
        check_arguments(arguments, self.schema)
        return text, arguments

    def run(self, text: str, arguments: dict, kwargs: dict) -> object:
        """What the tool answers to checked params.  Raises whatever it raises."""
        import inspect

        value = self.function(text, arguments, kwargs)
        return self.loop.result(value) if inspect.isawaitable(value) else value


def load_tool(name: str, path: str | None, cfg: dict) -> Tool:
    """A built-in tool, or that of a Python file.  Raises UsageError that says what is wrong with it.

    A file's tool is, in this order: what it registers under the name as modelscope-agent's tools do, the class whose
    attribute `name` or whose own name that is, the function of that name.  cfg: what a class is made with.
    """
    try:
        found = _built_in(name) if path is None else _tool_in_file(path, name)
        return tool_of(found, name, cfg)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError("the tool %s: %s" % (name, _said_by(error))) from None
    except (Exception, SystemExit) as error:
        raise UsageError("the tool %s cannot be made: %s" % (name, raised(error))) from error


def _built_in(name):
    if name not in BUILT_IN_TOOLS:
        hint = did_you_mean(name, list(BUILT_IN_TOOLS))
        raise UsageError("there is no built-in tool %r%s; give --tool-file for one of your own" % (name, hint))
    return BUILT_IN_TOOLS[name]


def _tool_in_file(path, name):
    _stand_in_for_modelscope()
    earlier = _registered()
    module = _load_module(path)
    registered = _registered()
    registered = {key: registered[key] for key in registered if registered[key] is not earlier.get(key)}
    found = registered.get(name)
    if found is None:
        found = _find_tool(module, name)
    if found is None:
        raise UsageError("%s has no tool %r%s" % (path, name, did_you_mean(name, _tool_names(module, registered))))
    return found


def _load_module(path):
    """The module of a tool's file.  Its directory is searched last, or a tool called `json` would hide Python's own."""
    from importlib.util import module_from_spec, spec_from_file_location

    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise UsageError("there is no tool file %s" % path)
    spec = spec_from_file_location("rock_tool", path)
    if spec is None:
        raise UsageError("the tool file %s must end in .py" % path)
    sys.path.append(os.path.dirname(path))
    module = sys.modules["rock_tool"] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError("the tool file %s cannot be loaded: %s" % (path, raised(error))) from error
    return module


def _own(module):
    """What a tool's file itself defines, by name."""
    return {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == "rock_tool"}


def _find_tool(module, name):
    own = _own(module)
    classes = [value for value in own.values() if isinstance(value, type)]
    named = [value for value in classes if getattr(value, "name", None) == name]
    found = named[0] if named else own.get(name)
    return found if callable(found) else None


def _tool_names(module, registered):
    own = _own(module)
    names = [_name_of(value, name) for name, value in own.items() if callable(value)]
    return [name for name in [*registered, *names] if not name.startswith("_")] or ["none"]


def _name_of(found, default):
    """The name that a tool gives itself, or else the default."""
    name = getattr(found, "name", None)
    return name if isinstance(name, str) and name else default


def tool_of(found: object, name: str, cfg: dict) -> Tool:
    """A Tool from a class or a function.  cfg: what a class is made with.

    Raises UsageError, ValueError, and whatever the tool raises.
    """
    if not isinstance(found, type):
        return _tool_of_function(found)
    instance = _instance_of(found, cfg)
    description, call = getattr(instance, "description", ""), getattr(instance, "call", None)
    parameters = getattr(instance, "parameters", [])
    if not isinstance(description, str) or not callable(call):
        raise UsageError("the tool %s needs a description, which is a text, and a method call" % name)
    try:
        schema = arguments_schema(parameters)
    except ValueError as error:
        raise UsageError("the tool %s has bad parameters: %s" % (name, error)) from None
    taken = _kwargs_taken(call)
    return Tool(
        _name_of(instance, name), description, parameters, schema, lambda t, _, kw: call(t, **taken(kw)), ToolLoop()
    )


def _kwargs_taken(call):
    """What picks those of a call's kwargs that a tool's method takes: all, where it has a **."""
    import inspect

    try:
        specs = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):
        return dict
    if any(spec.kind is spec.VAR_KEYWORD for spec in specs):
        return dict
    names = {spec.name for spec in specs[1:]}
    return lambda kwargs: {name: kwargs[name] for name in kwargs if name in names}


def _instance_of(found, cfg):
    import inspect

    if any(base.__name__ == "BaseTool" for base in found.__mro__):  # which looks up its own part by its name
        name = _name_of(found, "")
        cfg = cfg if isinstance(cfg.get(name), dict) else {**cfg, name: cfg}
    try:
        takes_cfg = bool(inspect.signature(found).parameters)
    except ValueError:
        takes_cfg = True
    return found(cfg) if takes_cfg else found()


def _tool_of_function(function):
    import inspect

    name, description, parameters = function_tool(function)
    takes_more = any(spec.kind is spec.VAR_KEYWORD for spec in inspect.signature(function).parameters.values())

    def call(_, arguments, kwargs):
        return function(**{**(kwargs if takes_more else {}), **arguments})

    return Tool(name, description, parameters, arguments_schema(parameters), call, ToolLoop())


def _stand_in_for_modelscope():
    """Let `from modelscope_agent.tools.base import BaseTool, register_tool` work where there is no such package."""
    from importlib.util import find_spec
    from types import ModuleType

    registry = {}

    def register_tool(name):
        def register(cls):
            registry[name] = {"class": cls}
            return cls

        return register

    present = sys.modules.get("modelscope_agent")
    if (find_spec("modelscope_agent") if present is None else present.__spec__) is None:  # or it is our earlier one
        for name in ("modelscope_agent", "modelscope_agent.tools", "modelscope_agent.tools.base"):
            module = sys.modules[name] = ModuleType(name)
            module.__path__ = []
            module.BaseTool, module.register_tool, module.TOOL_REGISTRY = BaseTool, register_tool, registry
            holder, _, own_name = name.rpartition(".")
            if holder:
                setattr(sys.modules[holder], own_name, module)


def _registered():
    """What modelscope-agent's tools have registered, as name -> class or function.

    Its registry is read as a plain dict: the package's own imports a module for a name that it does not have.
    """
    registry = getattr(sys.modules.get("modelscope_agent.tools.base"), "TOOL_REGISTRY", None)
    entries = dict.items(registry) if isinstance(registry, dict) else ()
    return {name: entry.get("class") if isinstance(entry, dict) else entry for name, entry in entries}


# ======================================================================================================================
# Tool workers: the processes in which a tool runs, so that whatever it does (hang, exit, print, fill the memory) is the
# end of one call and of one worker.
#
#   Worker       a process of this interpreter in a group of its own that loads the tool and runs one call at a time.
#                Workers are begun as calls need them; the first idle one, by age, takes a call, so that calls which
#                follow one another meet the same instance of the tool.
#   Messages     one line each way: a number, a space and JSON.  On its standard input a call as it came, {"params",
#                "kwargs"}, the first as number 1.  On its standard output, as number 0, {"info"} or {"failed"} when it
#                has loaded the tool, then with the number of each call {"output"}, {"refused"} (bad arguments) or
#                {"raised"}.  What the tool itself reads is empty, and what it prints goes to standard error.  It can
#                write to the worker's own output all the same, and at any time, as from a thread: a worker that has
#                said something unasked, or answers with another number, is not used any more.
#   Ends         A worker whose call takes too long, whose client hangs up, or which says what it should not, is killed
#                with its group.  One whose node has died reads the end of its input, and kills its group itself; if it
#                cannot read, since some C code of the tool does not let it, it ends when its time is over.
# ======================================================================================================================

# Like RUN_BYTECODE, but as a module, whose `run_tool_worker` is then called with what follows on standard input.
_RUN_WORKER = """import marshal, os, sys
sys.path[:] = filter(None, sys.path)
__file__, __name__ = sys.argv.pop(1), "rock_ms"
sys.modules[__name__] = sys.modules["__main__"]
calls = os.fdopen(os.dup(0), "rb")
exec(marshal.loads(calls.read(int(calls.readline()))))
run_tool_worker(calls)"""


def run_tool_worker(calls: object) -> None:
    """Be a worker: load the tool that the first line of `calls` names, and answer the lines that follow."""
    from queue import Queue

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the node waits for its signals; what a tool begins must get them
    spec = parse_json(calls.readline().decode("utf-8"))
    lines, own_number = Queue(), os.getpid()

    def answer(call_number, kind, text):
        if os.getpid() != own_number:  # the tool has forked, and its child has come back here
            os._exit(0)
        answers.write(('%d {"%s":%s}\n' % (call_number, kind, text)).encode("utf-8"))
        answers.flush()

    def read():
        for line in calls:
            lines.put(line)
        os.killpg(0, signal.SIGKILL)  # the node is gone, and whatever the tool does is for nobody

    threading.Thread(target=read, daemon=True).start()
    _end_after(TOOL_LOAD_SECONDS)
    try:
        tool = load_tool(spec["tool"], spec["tool_file"], spec["tool_cfg"])
    except UsageError as error:
        answer(0, "failed", dump_json(str(error)))
        return
    answer(0, "info", dump_json(tool.info()))
    while True:
        _end_after(None)
        line = lines.get()
        _reopen_output()
        _end_after(spec["seconds"])
        call_number, _, text = line.decode("utf-8").partition(" ")
        call = parse_json(text)
        answer(int(call_number), *_outcome(tool, call.get("params"), call.get("kwargs") or {}))


def _reopen_output():
    """Where the last call has closed standard output or error, open it again, or whatever prints would fail."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(getattr(sys, name), "closed", False):
            stream = os.fdopen(number, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
            setattr(sys, name, stream)


def _end_after(seconds):
    """End this process then, whatever it does: code that keeps Python's lock keeps `read` above from running, too.

    The node ends it sooner, unless the node is gone.  None: not at all.
    """
    import faulthandler

    faulthandler.cancel_dump_traceback_later()
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds + WORKER_GRACE_SECONDS, exit=True, file=2)


def _outcome(tool, params, kwargs):
    """What a call ends with: the kind of message, and its content as JSON text."""
    try:
        text, arguments = tool.check(params)
    except ValueError as error:
        return "refused", dump_json(str(error))
    try:
        output = tool.run(text, arguments, kwargs)
    except BaseException as error:
        import traceback

        with contextlib.suppress(Exception):  # the tool may have closed standard error
            traceback.print_tb(error.__traceback__)  # where, and not what: that may hold a key
        return "raised", dump_json(raised(error))
    try:
        output_text = json.dumps(output, allow_nan=False)
    except Exception as error:
        return "raised", dump_json("it returned what JSON cannot hold: %s" % raised(error))
    if len(output_text) > MAX_TOOL_OUTPUT_BYTES:
        message = "it returned %d bytes of JSON; at most %d are passed on"
        return "raised", dump_json(message % (len(output_text), MAX_TOOL_OUTPUT_BYTES))
    return "output", output_text


class WorkerFailed(Exception):
    """A worker did not answer as it should, and cannot be used any more.  status: what the client is told."""

    def __init__(self, message, status=500):
        super().__init__(message)
        self.status = status


class ToolWorker:
    """A worker process, seen from the node.  Used by one thread at a time.

    spec: what it loads, as `run_tool_worker` reads it.  environ: its environment.  info: what the tool says of itself.
    Raises WorkerFailed where it cannot be begun, or the tool cannot be loaded, ApiError 503 where the node is to stop.
    """

    def __init__(self, spec: dict, environ: dict):
        import subprocess

        command = [*interpreter(), "-c", _RUN_WORKER, os.path.abspath(__file__)]
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        try:
            data = own_bytecode() + _line(spec)
            self._process = subprocess.Popen(command, env=environ, start_new_session=True, **streams)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise WorkerFailed("no process can be begun for the tool: %s" % reason) from None
        self._killing = threading.Lock()
        self._number = 0  # of what it is asked, and has to answer with; 0 while it loads
        for stream in (self._process.stdin, self._process.stdout):
            os.set_blocking(stream.fileno(), False)
        try:
            answer = self._ask(data, TOOL_LOAD_SECONDS)
        except WorkerFailed as error:
            raise WorkerFailed("the tool %s cannot be loaded: %s" % (spec["tool"], error)) from None
        if "info" not in answer:
            self.close()
            raise WorkerFailed(str(answer.get("failed")))
        self.info = answer["info"]

    def call(self, text: str, seconds: float) -> dict:
        """The message that a call ends with.  text: a call, as one line.  Raises WorkerFailed; then it is closed."""
        self._number += 1
        return self._ask(b"%d %s\n" % (self._number, text.encode("utf-8")), seconds)

    def _ask(self, data, seconds):
        deadline = time.monotonic() + seconds
        try:
            self._check_silence()
            self._write(data, deadline)
            return self._answer(self._read_line(deadline))
        except TimeoutError:
            self.close()
            raise WorkerFailed("it did not answer within %g s, and was stopped" % seconds, 504) from None
        except EOFError:
            raise WorkerFailed(self._end()) from None
        except InterruptedError:
            self.close()
            raise ApiError(503, "the tool node is stopping") from None
        except (OSError, ValueError) as error:
            self.close()
            raise WorkerFailed("its process cannot be understood: %s" % error) from None

    def _check_silence(self):
        """Raise ValueError where it has said what nobody asked for."""
        import select

        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        if any(event & select.POLLIN for _, event in poll.poll(0)):
            raise ValueError("it spoke before it was asked")

    def _answer(self, line):
        number, _, text = line.partition(b" ")
        if number != b"%d" % self._number:
            raise ValueError("what it says does not answer what it was asked")
        answer = parse_json(text.decode("utf-8"))
        if not isinstance(answer, dict):
            raise ValueError("its answer is not an object")
        return answer

    def _write(self, data, deadline):
        import select

        view = memoryview(data)
        while view:
            self._wait(self._process.stdin, select.POLLOUT, deadline)
            try:
                view = view[os.write(self._process.stdin.fileno(), view[:READ_BLOCK_BYTES]) :]
            except BlockingIOError:
                pass
            except BrokenPipeError:
                return  # it may have said why before it ended

    def _read_line(self, deadline):
        import select

        pieces, size = [], 0
        while not pieces or b"\n" not in pieces[-1]:
            self._wait(self._process.stdout, select.POLLIN, deadline)
            pieces.append(os.read(self._process.stdout.fileno(), READ_BLOCK_BYTES))
            size += len(pieces[-1])
            if not pieces[-1]:
                raise EOFError
            if size > 2 * MAX_TOOL_OUTPUT_BYTES:
                raise ValueError("it says too much")
        line, _, more = b"".join(pieces).partition(b"\n")
        if more:
            raise ValueError("it says more than its answer")
        return line

    def _wait(self, stream, event, deadline):
        """Wait until a pipe is ready.  A child of the tool's may hold it open, so that its end is looked for, too."""
        import select

        poll = select.poll()
        poll.register(stream, event)
        while not poll.poll(max(0.0, min(WORKER_LOOK_SECONDS, deadline - time.monotonic())) * 1000):
            if not self.is_alive() and not poll.poll(0):
                raise EOFError
            if time.monotonic() > deadline:
                raise TimeoutError
            if self._number == 0 and signal.sigpending() & STOP_SIGNALS:  # nobody waits for them before all is loaded
                raise InterruptedError

    def _end(self):
        """Close it; how it ended."""
        deadline = time.monotonic() + 1.0
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        is_alive = self.is_alive()
        self.close()
        code = self._process.returncode
        if is_alive:
            return "its process closed its output"
        return "its process ended (%s)" % ("signal %d" % -code if code < 0 else "exit code %d" % code)

    def is_alive(self) -> bool:
        """Whether it has not ended.  It is not reaped before `close`, so that its number stays its own."""
        return self._process.returncode is None and process_identity(self._process.pid) is not None

    def interrupt(self) -> None:
        """Have it killed, with all that it began and that is still in its group, also while another thread uses it."""
        with self._killing:
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """Interrupt it, and wait for its end."""
        self.interrupt()
        with self._killing:
            self._process.wait()

    def close(self) -> None:
        """Kill it, and close its pipes.  Harmless a second time."""
        self.kill()
        self._process.stdin.close()
        self._process.stdout.close()


def _line(value):
    return dump_json(value).encode("utf-8") + b"\n"


class WorkerPool:
    """The workers of a tool, begun when they are needed.

    begin: makes a worker.  size: how many there may be.
    """

    def __init__(self, begin, size: int):
        self._begin = begin
        self._size = size
        self._changed = threading.Condition()
        self._idle = {}  # number -> worker
        self._busy = {}  # number -> worker, None while it is being begun
        self._is_closed = False

    def use(self, function, seconds: float) -> object:
        """What `function` makes of a worker.  A worker with which it raises anything is not used again.

        seconds: how long to wait for an idle one.  Raises ApiError 503 where none comes.
        """
        number, worker = self._take(seconds)
        try:
            if worker is None:
                worker = self._new(number)
            result = function(worker)
        except BaseException:
            self._give_back(number, None)
            if worker:
                worker.close()
            raise
        self._give_back(number, worker)
        return result

    def _take(self, seconds):
        dead = []
        try:
            with self._changed:
                seconds = min(seconds, threading.TIMEOUT_MAX)
                self._changed.wait_for(lambda: self._is_closed or self._idle or len(self._busy) < self._size, seconds)
                dead += self._pop_dead()
                return self._choose()
        finally:
            for worker in dead:  # without the lock, since it waits for a process
                worker.close()

    def _pop_dead(self):
        numbers = [number for number, worker in self._idle.items() if not worker.is_alive()]
        return [self._idle.pop(number) for number in numbers]

    def _choose(self):
        if self._is_closed:
            raise ApiError(503, "the tool node is stopping")
        if self._idle:
            number = min(self._idle)
        elif len(self._busy) < self._size:
            number = next(number for number in range(self._size) if number not in self._busy)
        else:
            raise ApiError(503, "all %d workers of the tool are busy; try again later" % self._size)
        worker = self._busy[number] = self._idle.pop(number, None)
        return number, worker

    def _new(self, number):
        worker = self._begin()
        with self._changed:
            self._busy[number] = worker
            is_closed = self._is_closed
        if is_closed:
            worker.close()
            raise ApiError(503, "the tool node is stopping")
        return worker

    def _give_back(self, number, worker):
        with self._changed:
            del self._busy[number]
            is_closed = self._is_closed
            if worker and not is_closed:
                self._idle[number] = worker
            self._changed.notify()
        if worker and is_closed:
            worker.close()

    def stop(self) -> None:
        """Let no further call begin; those that wait get 503."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Kill all workers, also those with a call."""
        self.stop()
        with self._changed:
            idle, busy = list(self._idle.values()), list(filter(None, self._busy.values()))
            self._idle.clear()
        for worker in idle:
            worker.close()
        for worker in busy:
            worker.kill()


# ======================================================================================================================
# Tool node: one tool behind HTTP, for the manager that made it.
# ======================================================================================================================


def new_request_id() -> str:
    """As in the answers of modelscope-agent's servers."""
    import uuid

    return str(uuid.uuid4())


def envelope(output: object, message: str = "", request_id: str | None = None, **more) -> Reply:
    """A Reply of modelscope-agent's servers: `{request_id, message, output}`.  more: keys that come before these."""
    value = {**more, "request_id": request_id or new_request_id(), "message": message, "output": output}
    return json_reply(value)


def envelope_error(error: ApiError, request_id: str | None = None) -> Reply:
    """An error of these servers: `{request_id, message}`."""
    body = _line({"request_id": request_id or new_request_id(), "message": str(error)})
    return Reply(error.status, body, headers=error.headers)


def node_proof(api_key: str, nonce: str) -> str:
    """What only a node with that key can say to a client that chose the nonce, and that does not tell the key."""
    import hmac

    return hmac.new(api_key.encode("utf-8"), ("rock-tool-node " + nonce).encode("utf-8"), "sha256").hexdigest()


class _ClientsCall:
    """A call for as long as its client wants it.  Its end is one thread's business, the client's hang-up another's."""

    def __init__(self):
        self._lock = threading.Lock()
        self._worker = None  # that the call uses now; after it, another call may
        self._is_unwanted = False

    def hang_up(self) -> None:
        """Interrupt the worker that the call uses, or let it use none."""
        with self._lock:
            self._is_unwanted = True
            if self._worker:
                self._worker.interrupt()

    def run(self, worker: ToolWorker, text: str, seconds: float) -> dict | None:
        """As ToolWorker.call; None where the client was gone before.  Raises ClientGone where it goes meanwhile."""
        with self._lock:
            if self._is_unwanted:
                return None
            self._worker = worker
        try:
            return worker.call(text, seconds)
        finally:
            with self._lock:
                self._worker = None
                if self._is_unwanted:  # and the worker is dead, even where it has answered
                    raise ClientGone


class ToolNode:
    """The endpoints of a tool node.

    settings: ServiceSettings.  logger: as from `logging`.  environ: of the tool, beside its tool_env; by default ours.
    """

    def __init__(self, settings: ServiceSettings, logger, environ: dict | None = None):
        self._settings = settings
        self._logger = logger
        path = settings.tool_file and os.path.abspath(settings.tool_file)
        seconds = None if settings.wait_limit == float("inf") else settings.wait_limit
        spec = {"tool": settings.tool, "tool_file": path, "tool_cfg": settings.tool_cfg, "seconds": seconds}
        ours = {spec.metadata["env"] for spec in fields(ServiceSettings)}
        environ = os.environ if environ is None else environ
        environ = {name: value for name, value in environ.items() if name not in ours}
        self._pool = WorkerPool(lambda: ToolWorker(spec, {**environ, **settings.tool_env}), settings.tool_workers)
        self._keys = secrets_in(settings.tool_cfg) + secrets_in({"keys": list(settings.tool_env.values())})
        self._info = {}
        self.about = "tool %s, %s" % (settings.tool, path or "built in")

    def routes(self) -> list:
        """The route table of the node's own endpoints."""
        return [
            Route("GET", "/tool_info", self.tool_info),
            Route("POST", "/execute_tool", self.execute_tool),
            Route("GET", "/identity", self.identity, is_open=True, is_quiet=True),
        ]

    def gauges(self) -> dict:
        """Numbers for /metrics."""
        return {}

    def start(self) -> None:
        """Load the tool.  Raises UsageError where that fails."""
        try:
            self._info = self._pool.use(lambda worker: worker.info, TOOL_LOAD_SECONDS)
        except WorkerFailed as error:
            raise UsageError(self._for_people(str(error), {})) from None

    def stop(self) -> None:
        """End the calls that wait for a worker with 503."""
        self._pool.stop()

    def close(self) -> None:
        """End every worker."""
        self._pool.close()

    def tool_info(self, request: Request) -> Reply:
        """What the tool says of itself."""
        return envelope(self._info, request_id=_asked(request, "request_id"))

    def identity(self, request: Request) -> Reply:
        """Prove to a client that has not sent its key yet that this node knows it.  Raises ApiError 400, 404."""
        if self._settings.api_key is None:
            raise ApiError(404, "this node has no key to prove itself with")
        nonce = _asked(request, "nonce")
        if not 1 <= len(nonce) <= MAX_NONCE_CHARACTERS:
            raise ApiError(400, "give a nonce of 1 to %d characters, as ?nonce=TEXT" % MAX_NONCE_CHARACTERS)
        return envelope(node_proof(self._settings.api_key, nonce))

    def execute_tool(self, request: Request) -> Reply:
        """Call the tool.  Raises ClientGone.

        Errors: 400 for bad arguments, 500 for what the tool raised, 503 where all workers are busy, 504 for too long.
        """
        text, call = request.json()
        request_id = call.get("request_id")
        request_id = request_id if isinstance(request_id, str) else None
        try:
            _check_call(call)
            return envelope(self._run(text, call.get("kwargs") or {}, request), request_id=request_id)
        except ApiError as error:
            return envelope_error(error, request_id)

    def _run(self, text, kwargs, request):
        name, seconds = self._settings.tool, self._settings.wait_limit
        call = _ClientsCall()
        request.watch_hangup(call.hang_up)
        try:
            answer = self._pool.use(lambda worker: call.run(worker, text, seconds), seconds)
        except WorkerFailed as error:
            raise self._failure(error.status, "the tool %s failed: %s" % (name, error), kwargs) from None
        if answer is None:
            raise ClientGone
        if "refused" in answer:
            raise self._failure(400, "the tool %s refused: %s" % (name, answer["refused"]), kwargs)
        if "output" not in answer:
            raise self._failure(500, "the tool %s failed: %s" % (name, answer.get("raised")), kwargs)
        return answer["output"]

    def _failure(self, status, message, kwargs):
        message = self._for_people(message, kwargs)
        self._logger.warning("%s", message)
        return ApiError(status, message)

    def _for_people(self, message, kwargs):
        """A message without keys, and only then cut to its size: half a key would not be found."""
        return shortened(Secrets(self._keys + secrets_in(kwargs)).hide(message))


def _asked(request, name):
    """A parameter of a request's query; empty where there is none."""
    from urllib.parse import parse_qs

    return parse_qs(request.head.query or "").get(name, [""])[0]


def _check_call(call):
    """Refuse, with ApiError 400, what /execute_tool does not take."""
    known = ["params", "kwargs", "request_id"]
    for name in call:
        if name not in known:
            raise ApiError(400, "unknown field %r%s" % (name, did_you_mean(name, known)))
    kwargs = {} if call.get("kwargs") is None else call["kwargs"]
    if not isinstance(kwargs, dict):
        raise ApiError(400, "kwargs must be a JSON object, got %s" % json_type(kwargs))
    if "params" in kwargs:
        raise ApiError(400, "kwargs must not have params, which stand beside them")


# ======================================================================================================================
# Servers: a service of any type with all around it, started and stopped in the right order.
# ======================================================================================================================


class Server:
    """A service with its HTTP server.

    service: has `about` (what is said of it at its start), `routes()`, `gauges()`, and `start()` before the first call,
    `stop()` to end what waits, `close()` after the last.  settings: `type`, `host`, `port` and `max_body_bytes` count.
    more_routes, options: as HTTPService takes them.

    It listens at once and answers from `start` on.  Raises what its service's start raises, and RockError where it
    cannot listen.
    """

    def __init__(self, service, settings, logger, more_routes=(), **options):
        self.service = service
        routes = service.routes() + list(more_routes)
        options = {"gauges": service.gauges, "max_body_bytes": settings.max_body_bytes, **options}
        try:
            self.http = HTTPService(settings.host, settings.port, routes, logger, settings.type, **options)
        except BaseException:
            service.stop()
            service.close()
            raise
        try:
            self._prepare()
        except BaseException:
            self.stop()
            raise

    def _prepare(self):
        """What has to be done before the first call, once it is known that it can come."""
        self.service.start()

    @property
    def ready(self) -> dict:
        """What is said of it to whoever started it."""
        return {"about": self.service.about}

    def start(self) -> None:
        """Begin to answer."""
        self.http.start()

    def stop(self) -> None:
        """End the calls that wait for something else than their answer with 503, then every thread."""
        self.service.stop()
        self.http.stop()
        self.service.close()


def local_service(settings, paths: DataPaths, log: MarkerLog, logger, is_resumed, earlier: dict) -> LocalService:
    """The service of the local type.  Raises StorageError.

    is_resumed: go on with the files of the earlier session.  earlier: the state that its service left.
    """
    trajectory = Trajectory(paths.traj_file, logger)
    if is_resumed:
        trajectory.close_torn_line()
    recorded = recorded_turns(paths.traj_file, trajectory_start(earlier)) if is_resumed else {}
    session = LocalSession(log, settings.polling_interval_seconds, logger, recorded, was_killed="pid" in earlier)
    return LocalService(session, trajectory, settings, logger, "log %s" % paths.log_file)


def proxy_service(settings, paths: DataPaths, log: MarkerLog, logger, *_) -> ProxyService | ReplayService:
    """The service of the proxy type, forwarding or replaying.  Raises UsageError."""
    session = ProxySession(log)
    if settings.replay_file:
        return ReplayService(session, Recording(settings.replay_file, settings.replay_match == "request"), logger)
    return ProxyService(session, settings, Trajectory(paths.traj_file, logger), http_proxies(os.environ), logger)


_MODEL_SERVICES = {"local": local_service, "proxy": proxy_service}


class ModelServer(Server):
    """A model service with its HTTP server, its files and its watch over agents.

    Its service has a `session` (see AgentWatch), too.  is_resumed: go on with the files of the earlier session, which
    are set aside otherwise.  earlier: the state that its service left (see ServiceState).  on_watch: told what is
    watched.  Raises RockError where it cannot listen, StorageError where a file cannot be used, UsageError for a bad
    recording.
    """

    def __init__(
        self, settings, paths: DataPaths, logger, is_resumed=False, earlier=None, on_watch=lambda watched: None
    ):
        self._settings, self._paths, self._logger = settings, paths, logger
        self._log = MarkerLog(paths.log_file)
        self._is_resumed, self._earlier = is_resumed, earlier or {}
        service = _MODEL_SERVICES[settings.type](settings, paths, self._log, logger, is_resumed, self._earlier)
        self.session = service.session
        self._watch = AgentWatch(self.session, logger, on_watch)
        super().__init__(service, settings, logger, [self._watch.route()], authorise=bearer_check(settings.api_key))

    def _prepare(self):
        settings = self._settings
        with contextlib.ExitStack() as stack:
            if not self._is_resumed:
                keeps_trajectory = settings.traj_append_mode or settings.replay_file is not None
                stack.enter_context(self._paths.earlier_set_aside(keeps_trajectory, self._logger))
            self._log.prepare()
            self.service.start()
        if self._is_resumed and not self.session.has_ended:
            self._watch.resume(watched_by(self._earlier))

    @property
    def ready(self) -> dict:
        """As of a Server, and whether the session has ended."""
        return {**super().ready, "session_ended": self.session.has_ended}

    def stop(self) -> None:
        """As of a Server; ends the watch, too."""
        super().stop()
        self._watch.stop()


def tool_server(settings: ServiceSettings, logger) -> Server:
    """A tool node with its HTTP server."""
    authorise = bearer_check(settings.api_key)
    return Server(ToolNode(settings, logger), settings, logger, authorise=authorise, error_reply=envelope_error)


# ======================================================================================================================
# Standard streams: what people and scripts read, in UTF-8 whatever the locale, and nothing that a terminal obeys.
# ======================================================================================================================


def open_standard_streams() -> None:
    """Give the standard streams that were closed to us (`>&-`) to /dev/null, or files of ours take their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            how = {"encoding": "utf-8", "errors": "backslashreplace", "closefd": False}
            setattr(sys, name, os.fdopen(number, "w" if number else "r", **how))


def as_utf8(text: str) -> bytes:
    """Text for people in UTF-8; a file name that the locale's encoding does not know becomes what it is on disk."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace")


def say(text: str) -> None:
    """Print a line in UTF-8, whatever the locale."""
    sys.stdout.flush()
    sys.stdout.buffer.write(as_utf8(text) + b"\n")
    sys.stdout.buffer.flush()


def complain(text: str, who: str = "rock-ms") -> None:
    """Print a line on standard error, at once.  who: the program that says it."""
    sys.stderr.write("%s: %s\n" % (who, text))
    sys.stderr.flush()  # before Python 3.9 it is held back where that is no terminal


def standard_input() -> object:
    """Standard input as a file of bytes; who sits at it is told so."""
    if sys.stdin.isatty():
        complain("reading from this terminal; Ctrl-D on a line of its own ends it")
    return sys.stdin.buffer


@contextlib.contextmanager
def waiting_for(what: str):
    """Say to a person, on standard error, what the block waits for, and how long by now.

    Nothing is said of a wait below PROGRESS_SECONDS, and nothing is left of the line when it is over.
    """
    # A terminal without a name belongs to a program, as the shell of a sandbox's session, which reads what is printed.
    if not sys.stderr.isatty() or os.environ.get("TERM", "dumb") == "dumb":
        yield
        return
    over = threading.Event()
    teller = threading.Thread(target=_tell_waiting, args=("waiting for " + what, over), daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def _tell_waiting(text, over):
    began, line = time.monotonic(), ""
    with contextlib.suppress(OSError):
        while not over.wait(PROGRESS_SECONDS):
            if not _is_in_background():
                line = "%s, %d s" % (text, time.monotonic() - began)
                sys.stderr.write(line + "\r")  # what else is said begins where it began
                sys.stderr.flush()
        if line and not _is_in_background():
            sys.stderr.write(" " * len(line) + "\r")
            sys.stderr.flush()


def _is_in_background():
    """Whether another program has our terminal, as after `&`: a line of ours would stand in its text, or stop us."""
    try:
        return os.tcgetpgrp(sys.stderr.fileno()) != os.getpgrp()
    except OSError:  # it is not the terminal that controls us
        return False


_UNPRINTABLE = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"


def printable(text: str) -> str:
    """A text that a terminal shows and does not obey: control characters as escapes, line ends and tabs as they are."""
    return re.sub(_UNPRINTABLE, lambda match: match.group().encode("unicode_escape").decode(), text)


# ======================================================================================================================
# Running a service: in this process until a signal ends it, or in the background; asked, and stopped, from outside.
# ======================================================================================================================


def connect_host(host: str) -> str:
    """The address at which a server that listens on `host` is reached from this machine."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def host_and_port(host: str, port: int) -> str:
    """Where a server that listens there is reached from this machine, as it stands in a URL."""
    host = connect_host(host)
    return "%s:%d" % ("[%s]" % host if ":" in host else host, port)


def base_url(host: str, port: int) -> str:
    """What an agent on this machine is given as OPENAI_BASE_URL."""
    return "http://%s/v1" % host_and_port(host, port)


def call_service(
    host: str,
    port: int,
    method: str,
    path: str,
    value: object = None,
    api_key: str | None = None,
    title="model service",
):
    """Send one request to a running service; return its JSON.  Raises RockError with what it, or the network, said."""
    from http.client import HTTPConnection, HTTPException

    connection = HTTPConnection(connect_host(host), port, timeout=REQUEST_SECONDS)
    body = None if value is None else dump_json(value).encode("utf-8")
    headers = {"Content-Type": "application/json", **({"Authorization": "Bearer " + api_key} if api_key else {})}
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        answer = parse_json(response.read().decode("utf-8"))
        if response.status == 401:
            raise RockError("the %s asks for its API key: give it in ROCK_MODEL_SERVICE_API_KEY, or --api-key" % title)
        if response.status >= 400:
            raise RockError("the %s refused: %s" % (title, answer.get("error", answer)["message"]))
    except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RockError("no %s answers on %s:%s: %s" % (title, connect_host(host), port, reason)) from None
    finally:
        connection.close()
    return answer


@contextlib.contextmanager
def serving(state: ServiceState, settings, published: dict, open_server, logging_file: str, is_loud: bool):
    """A service that runs and whose state says so; gives what is said of it, and its logger.

    settings: has `type` and `api_key`.  published: what else its state says.  open_server: makes a Server of the state
    that the last one left, the logger, and a function that publishes changes (keyword=value).  is_loud: log to standard
    error, too.
    """
    earlier, pid = state.read(), os.getpid()
    published = {"type": settings.type, "pid": pid, "identity": process_identity(pid), **published}
    published["has_api_key"] = settings.api_key is not None

    def publish(**changes):
        state.write({**published, **changes})
        published.update(changes)

    logger = open_logger(logging_file, is_loud)
    # Until the server says otherwise; were it killed before, the session to go on with would be the earlier one.
    state.write({**{key: earlier[key] for key in SESSION_STATE if key in earlier}, **published})
    try:
        server = open_server(earlier, logger, publish)
    except BaseException:
        with contextlib.suppress(StorageError):  # what was raised says more
            state.write(earlier)
        raise
    try:
        publish(host=server.http.host, port=server.http.port)
        server.start()
        ready = server.ready
        where = (settings.type, pid, server.http.host, server.http.port, ready["about"])
        logger.info("started: %s, pid %d, %s:%d, %s", *where)
        yield {**published, **ready}, logger
    finally:
        try:
            server.stop()
        finally:
            _note_stop(state, published, logger)


def _note_stop(state, published, logger):
    try:
        state.write(stopped_state(published))
    except StorageError as error:
        logger.error("the next service will take this one for killed: %s", error)
    logger.info("stopped")


def run_service(state: ServiceState, ready_fd: int | None, service) -> int:
    """Be the service of a data directory until a signal ends it; the exit code.

    service: as from `serving`.  To `ready_fd`, where there is one, goes what is said of it, or what went wrong.
    """
    signals = {number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # in every thread, or one would die of it before sigwait
    raise_descriptor_limit()
    try:
        state.acquire()
        try:
            with service as (said, logger):
                if ready_fd is not None:
                    _tell(ready_fd, dump_json(said))
                    ready_fd = None  # which may be another file by now; our standard error is the log
                number = signal.sigwait(signals)
                logger.info("stopping: %s", signal.Signals(number).name)
        finally:
            state.release()
    except (RockError, OSError) as error:
        if ready_fd is None:
            raise
        _tell(ready_fd, str(error))
        return EXIT_FAILED
    return 0


_PROGRESS = b"\x02"  # before a line that is no answer yet


def tell_progress(ready_fd: int, text: str) -> None:
    """Say, to whoever started this service, what its start waits for."""
    with contextlib.suppress(OSError):
        os.write(ready_fd, _PROGRESS + " ".join(text.split()).encode("utf-8", "replace") + b"\n")


def _tell(ready_fd, text):
    with contextlib.suppress(OSError):  # whoever started us may be gone by now
        os.write(ready_fd, text.encode("utf-8", "replace"))
        os.close(ready_fd)


def raise_descriptor_limit() -> None:
    """Allow as many open files as this user may have: each waiting agent is one."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _stat(path):
    """What a path leads to, None where it leads to nothing."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


class LineFile:
    """The service's own log, as a file.  For one thread at a time.  Raises OSError.

    What happens to it must not disturb the service: lines that cannot be written are counted, and how many they were
    stands in their place later on.  A file that was moved away or removed is begun anew.  It is bounded (`bound_log`).
    """

    def __init__(self, path: str):
        self._path = path
        self._open()
        self._lost = 0
        self._reason = None
        self._is_torn = False

    def write(self, text: str) -> None:
        """Add a line, or some, given without the last newline."""
        if self._file.closed:
            return
        try:
            self._follow_path()
            if self._lost:
                self._put("(%d lines are missing here: %s)\n" % (self._lost, self._reason))
                self._lost = 0
            self._put(text + "\n")
        except OSError as error:
            self._lost += 1
            self._reason = error.strerror

    def close(self) -> None:
        """Write no more.  At the end of the process a thread may still have something to say."""
        self._file.close()

    def _open(self):
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        info = os.fstat(self._file.fileno())
        self._identity = info.st_dev, info.st_ino

    def _follow_path(self):
        info = _stat(self._path)
        if info and (info.st_dev, info.st_ino) == self._identity:
            if info.st_size > MAX_LOG_BYTES:
                bound_log(self._path)
            return
        old = self._file
        self._open()
        old.close()
        self._is_torn = False

    def _put(self, text):
        data = b"\n" * self._is_torn + text.encode("utf-8", "backslashreplace")
        written = self._file.write(data)
        self._is_torn = written < len(data)
        if self._is_torn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def open_logger(path: str, is_loud: bool) -> object:
    """The service's own log; with is_loud also on standard error.  Raises OSError."""
    import logging

    file = LineFile(path)

    class LogFile(logging.Handler):
        def emit(self, record):  # under the handler's lock
            file.write(self.format(record))

        def close(self):
            file.close()
            super().close()

    class Logger(logging.Logger):
        def findCaller(self, *_, **__):  # which no format of ours shows, and which takes a walk up the stack
            return "", 0, "", None

    class Formatter(logging.Formatter):
        def format(self, record):  # or a line with a lone surrogate in it would be lost, and a traceback in its place
            return as_utf8(super().format(record)).decode("utf-8", "backslashreplace")

    class Loud(logging.StreamHandler):
        def handleError(self, record):  # as on a full disk: a traceback would be no better off
            pass

    logger = Logger("rock-ms", logging.INFO)
    handlers = [LogFile()] + ([Loud()] if is_loud else [])
    for handler in handlers:
        handler.setFormatter(Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
    return logger


def passed_on(cls: type, flags: dict, data_dir: str, config_file: str | None) -> tuple[list, dict]:
    """What `start` gives to the service in the background: arguments, and secrets as environment variables by name."""
    words, secrets = ["--foreground", "--data-dir", data_dir], {}
    for spec in fields(cls):
        if flags[spec.name] is not None and spec.metadata["secret"]:
            secrets[spec.metadata["env"]] = flags[spec.name]
        elif flags[spec.name] is not None:
            words += [spec.metadata["flag"], flags[spec.name]]
    return words + (["--config-file", config_file] if config_file else []), secrets


def start_in_background(
    state: ServiceState,
    command: list,
    secrets: dict,
    logging_file: str,
    code=None,
    seconds: float | None = None,
    tell=lambda progress: None,
) -> dict:
    """Start a process of our own that is the service; what it says of itself, once it answers.

    command: to which `--ready-fd` is added.  secrets: environment variables by name that it gets beside our own.
    logging_file: where its output goes.  code: makes the bytes for its standard input.  seconds: how long it may take.
    tell: called with each line by which it says, with `tell_progress`, what it waits for.
    Raises RockError with the reason where it does not start.
    """
    if state.stays_running():
        raise RockError(state.running_message())
    process, ready = _spawn_service(state.title, command, secrets, logging_file)
    try:
        with waiting_for("the %s to start" % state.title):
            said = _first_words(process, ready, code, seconds or START_SECONDS, tell)
        if not said.startswith("{"):
            reason = said or "it ended at once; see %s" % logging_file
            raise RockError("the %s did not start: %s" % (state.title, reason))
        running = parse_json(said)
        call_service(running["host"], running["port"], "GET", "/health", title=state.title)
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        os.close(ready)
    process.returncode = 0  # it is meant to outlive us: no warning that it does
    return running


def _spawn_service(title, command, secrets, logging_file):
    """The process, and the descriptor on which it says its state, or why it has none."""
    import subprocess

    ready, ready_fd = os.pipe()
    try:
        with open(logging_file, "ab") as log:
            process = subprocess.Popen(
                command + ["--ready-fd", str(ready_fd)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=dict(os.environ, **secrets),
                pass_fds=[ready_fd],
                start_new_session=True,
            )
    except OSError as error:
        os.close(ready)
        raise RockError("cannot start the %s: %s; give another --data-dir" % (title, error)) from None
    finally:
        os.close(ready_fd)
    return process, ready


def _first_words(process, ready, code, seconds, tell):
    """What a new service says of itself, or why it says nothing."""
    try:
        hand_over(process.stdin, code() if code else b"", seconds)
    except RockError as error:
        return str(error)
    import http.client  # noqa: F401  # needed soon, and loaded while the service starts

    return _read_all(ready, seconds, tell)


def hand_over(pipe, data: bytes, seconds: float) -> None:
    """Write all of it to a new process, and close the pipe.  Raises RockError where it does not take it in time."""
    import select

    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    os.set_blocking(pipe.fileno(), False)
    with contextlib.suppress(BrokenPipeError), pipe:  # it may have ended already, and says why elsewhere
        while data:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise RockError("it did not answer within %g s" % seconds)
            data = data[os.write(pipe.fileno(), data[:READ_BLOCK_BYTES]) :]


def _read_all(descriptor, seconds, tell):
    """What is written to a pipe until its other end closes, within so many seconds, without the lines of progress."""
    import select

    said, deadline = b"", time.monotonic() + seconds
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while True:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return "it did not answer within %g s" % seconds
        piece = os.read(descriptor, 4096)
        if not piece:
            return said.decode("utf-8", "replace")
        said += piece
        while said.startswith(_PROGRESS) and b"\n" in said:
            line, _, said = said[len(_PROGRESS) :].partition(b"\n")
            tell(line.decode("utf-8", "replace"))


def stop_service(state: ServiceState, seconds: float = 2 * STOP_SECONDS) -> int:
    """End a service that runs in the background, and wait for its end; the exit code.  Raises RockError.

    seconds: how long it has before it is killed.
    """
    if not state.stays_running():
        say("no %s runs in the data directory %s" % (state.title, state.data_dir))
        return 0
    pid = state.verified_pid(PROBE_SECONDS)
    if pid is None:
        message = "the %s of %s is not a process of this machine; stop it where it runs"
        if "pid" not in state.read():
            message = "the %s of %s runs, and its state file does not say as which process; its log does: end that"
        raise RockError(message % (state.title, state.data_dir))
    with waiting_for("the %s to stop" % state.title):
        _end(state, pid, seconds)
    say("%s stopped (pid %d)" % (state.title, pid))
    return 0


def _end(state, pid, seconds):
    """End a process, and wait for its end.  Raises RockError."""
    for number, patience in ((signal.SIGTERM, seconds), (signal.SIGKILL, STOP_SECONDS)):
        identity = process_identity(pid)
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
        except PermissionError:
            message = "the %s (pid %d) belongs to another user, who can stop it"
            raise RockError(message % (state.title, pid)) from None
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if identity is None or process_identity(pid) != identity:
                return
            time.sleep(0.01)
    raise RockError("the %s (pid %d) does not end" % (state.title, pid))


# ======================================================================================================================
# Reading trajectories: what `traj` shows of each call. One line of the file is in memory at a time.
# ======================================================================================================================

TRAJ_COLUMNS = ("line", "time", "model", "status", "seconds", "tok. in", "tok. out", "what")
TRAJ_TABLE = "%5s  %-19s  %-24s  %6s  %9s  %8s  %8s  %s"  # for people
TRAJ_TABS = "\t".join(["%s"] * len(TRAJ_COLUMNS))  # for scripts


@dataclass(frozen=True)
class CallSummary:
    """One call of a trajectory in a few words.

    line: its number in the file.  time: when it began, seconds since the epoch.  seconds: until it ended.  tokens: of
    the prompt, and of the answer.  tool_calls: their names.  What the record does not have is None.
    """

    line: int
    time: float | None
    model: str | None
    method: str
    path: str
    stream: bool
    status: int
    seconds: float | None
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None
    tool_calls: list
    attempts: int | None
    partial: bool
    error: str | None

    @classmethod
    def of(cls, line: int, record: dict) -> CallSummary:
        """Of a record.  Raises ValueError where it is none."""
        if "request" not in record or "response" not in record:
            raise ValueError("a call needs both request and response")
        usage, choice = _usage_of(record["response"]), _first_choice(record["response"])
        calls = choice["message"].get("tool_calls")
        return cls(
            line=line,
            time=_number(record.get("start_time")),
            model=_text_or_none(record.get("model")),
            method=_text_or_none(record.get("method")) or "POST",
            path=_text_or_none(record.get("path")) or "/v1/chat/completions",
            stream=bool(record.get("stream")),
            status=recorded_status(record),
            seconds=_number(record.get("response_time")),
            prompt_tokens=_number(usage.get("prompt_tokens", usage.get("input_tokens"))),
            completion_tokens=_number(usage.get("completion_tokens", usage.get("output_tokens"))),
            finish_reason=_text_or_none(choice.get("finish_reason")),
            tool_calls=[_function_of(call)[0] for call in calls] if isinstance(calls, list) else [],
            attempts=_number(record.get("attempts")),
            partial=bool(record.get("partial")),
            error=_text_or_none(record.get("error")),
        )

    def row(self) -> tuple:
        """What the table says of it: a text for each of TRAJ_COLUMNS, without tabs and line ends."""
        when = "-" if self.time is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time))
        seconds = "-" if self.seconds is None else "%.3f" % self.seconds
        tokens = ["-" if count is None else "%d" % count for count in (self.prompt_tokens, self.completion_tokens)]
        row = (str(self.line), when, self.model or "-", str(self.status), seconds, *tokens, self._what())
        return tuple(printable(text).replace("\n", "\\n").replace("\t", "\\t") for text in row)

    def _what(self):
        words = [] if self.path.endswith("/chat/completions") else ["%s %s" % (self.method, self.path)]
        words += ["stream"] if self.stream else []
        words += ["cut off"] if self.partial else []
        words += ["%d attempts" % self.attempts] if (self.attempts or 1) > 1 else []
        words += ["calls " + ", ".join(self.tool_calls)] if self.tool_calls else []
        words += [self.finish_reason] if self.finish_reason not in (None, "stop", "tool_calls") else []
        return "; ".join(words + ([self.error] if self.error else []))


def _number(value):
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15 else None


def _text_or_none(value):
    return value if isinstance(value, str) else None


def _usage_of(response):
    """The token counts of an answer of any of the usual APIs; of a stream's events, put together."""
    if isinstance(response, list):
        usage = {}
        for event in response:
            data = event.get("data") if isinstance(event, dict) else None
            for part in (data, data.get("response"), data.get("message")) if isinstance(data, dict) else ():
                usage.update(_usage_of(part))
        return usage
    usage = response.get("usage") if isinstance(response, dict) else None
    return {key: value for key, value in usage.items() if value is not None} if isinstance(usage, dict) else {}


def _first_choice(response):
    """The first choice of a completion, whose message is an object; an empty one where there is none."""
    choices = response.get("choices") if isinstance(response, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    message = choice.get("message")
    return {**choice, "message": message if isinstance(message, dict) else {}}


def _function_of(call):
    """(name, arguments) of a tool call."""
    function = call.get("function") if isinstance(call, dict) else None
    function = function if isinstance(function, dict) else {}
    arguments = function.get("arguments", "")
    return str(function.get("name", "?")), arguments if isinstance(arguments, str) else dump_json(arguments)


def conversation(record: dict, earlier: list) -> list:
    """The lines that show what was said in a call.

    earlier: the messages of the call before; where this one begins with them, they are not shown again.
    """
    request, response = record["request"], record["response"]
    messages = messages_of(record)
    lines = []
    if messages:
        known = len(earlier) if earlier and messages[: len(earlier)] == earlier else 0
        lines += ["    ... as in the call before: %d" % known] if known else []
        for message in messages[known:]:
            lines += _message_lines(message)
    elif request is not None:
        lines += _said(
            "request", request if isinstance(request, str) else json.dumps(request, ensure_ascii=False, indent=2)
        )
    choices = response.get("choices") if isinstance(response, dict) else None
    answers = [_first_choice({"choices": [choice]}) for choice in choices] if isinstance(choices, list) else []
    for choice in answers:
        name = "answer" if len(answers) == 1 else "answer %s" % choice.get("index", "?")
        lines += _message_lines({**choice["message"], "role": name}, choice.get("text"))
    if not answers and response is not None:
        text = response if isinstance(response, str) else json.dumps(response, ensure_ascii=False, indent=2)
        lines += _said("answer", text)
    return lines + (_said("error", str(record["error"])) if record.get("error") else [])


def messages_of(record: dict) -> list:
    """The messages of a call's request; none where it has none."""
    messages = record["request"].get("messages") if isinstance(record["request"], dict) else None
    return messages if isinstance(messages, list) else []


def _message_lines(message, text=None):
    if not isinstance(message, dict):
        return _said("message", dump_json(message))
    lines = []
    for key in ("reasoning_content", "reasoning"):
        lines += _said("reasoning", message[key]) if isinstance(message.get(key), str) and message[key] else []
    content = _content_text(message.get("content") if text is None else text)
    calls = message.get("tool_calls")
    if content or not calls:
        lines += _said(str(message.get("role", "message")), content)
    for call in calls if isinstance(calls, list) else ():
        lines += _said("calls", "%s(%s)" % _function_of(call))
    return lines


def _content_text(content):
    if isinstance(content, str) or content is None:
        return content or ""
    parts = content if isinstance(content, list) else [content]
    return "\n".join(_part_text(part) for part in parts)


def _part_text(part):
    if not isinstance(part, dict):
        return str(part)
    return part["text"] if isinstance(part.get("text"), str) else "[%s]" % part.get("type", "?")


def _said(name, text):
    first, *others = printable(text).split("\n")
    name = printable(name).replace("\n", "\\n")
    return ["    %-10s %s" % (name + ":", first)] + ["               " + line for line in others]


# ======================================================================================================================
# Command line: one function a command. Standard output is for what was asked for, standard error for everything else.
# ======================================================================================================================


def command_start(args: argparse.Namespace) -> int:
    """Run the service, here or in the background."""
    flags = given_settings(ServiceSettings, args)
    data_dir = resolve_data_dir(args.data_dir, os.environ)
    state = ServiceState(data_dir)
    earlier = state.read() if args.resume else {}
    proxied = earlier.get("settings")
    known = {**earlier, **(proxied if isinstance(proxied, dict) else {})}
    settings = resolve_settings(ServiceSettings, flags, os.environ, args.config_file, known)
    settings.check(flags)
    if args.resume:
        _check_resumed(settings, earlier)
    state.title = _title(state.read().get("type") if state.is_running() else settings.type)
    if settings.port == 0 and args.port is None and type(earlier.get("port")) is int:
        settings = replace(settings, port=earlier["port"])  # "any free port" means the one that agents know by now
    unused = settings.unused()
    if unused:
        names, kinds = [spec.name for spec in unused], sorted({spec.metadata["only"] for spec in unused})
        message = "this is the %s type; for --type %s only: %s"
        complain(message % (settings.type, " or ".join(kinds), ", ".join(names)))
    paths = DataPaths.of(data_dir, settings)
    try:
        paths.make_directories()
    except OSError as error:
        hint = "" if os.path.isdir(data_dir) else "; " + GIVE_DATA_DIR
        raise StorageError("cannot make %s: %s%s" % (error.filename, error.strerror, hint)) from None
    if args.foreground:
        return run_service(state, args.ready_fd, _serving(settings, paths, args, state))
    return _start_in_background(settings, paths, args, flags, state)


def _check_resumed(settings, earlier):
    """Refuse to go on without the keys that the last service had, or where there is nothing to go on with."""
    if settings.type == "tool-node":
        raise UsageError("--resume goes on with a session, which a tool node has not: start it anew")
    if earlier.get("has_api_key") and settings.api_key is None:
        raise UsageError("the last service asked for an API key: give it again, in ROCK_MODEL_SERVICE_API_KEY")
    if earlier.get("has_upstream_api_key") and settings.upstream_api_key is None:
        raise UsageError("the last service had an upstream's key: give it in ROCK_MODEL_SERVICE_UPSTREAM_API_KEY")


def _serving(settings, paths, args, state):
    """The service, for `run_service`."""

    def open_server(earlier, logger, publish):
        if settings.type == "tool-node":
            return tool_server(settings, logger)
        if args.resume:
            publish(watched=earlier.get("watched", {}), traj_start=trajectory_start(earlier))
        else:
            trajectory = Trajectory(paths.traj_file, logger)
            publish(watched={}, traj_start=trajectory.size() if settings.traj_append_mode else 0)

        def on_watch(watched):
            publish(watched={str(pid): identity for pid, identity in watched.items()})

        return ModelServer(settings, paths, logger, args.resume, earlier, on_watch)

    published = {"log_file": paths.log_file, "settings": settings.to_resume()}
    published["has_upstream_api_key"] = settings.upstream_api_key is not None
    return serving(state, settings, published, open_server, paths.logging_file, is_loud=args.ready_fd is None)


def _start_in_background(settings, paths, args, flags, state):
    words, secrets = passed_on(ServiceSettings, flags, paths.data_dir, args.config_file)
    command = [*interpreter(), "-c", RUN_BYTECODE, os.path.abspath(__file__), "start", *words]
    command += ["--resume"] if args.resume else []
    seconds = TOOL_LOAD_SECONDS if settings.type == "tool-node" else START_SECONDS
    running = start_in_background(state, command, secrets, paths.logging_file, own_bytecode, seconds)
    if settings.type == "tool-node":
        where = "http://%s" % host_and_port(running["host"], running["port"])
    else:
        where = base_url(running["host"], running["port"])
    say("%s started: pid %d, %s, %s" % (state.title, running["pid"], where, running["about"]))
    if settings.api_key is None and connect_host(running["host"]) != running["host"]:
        use = "call the tool" if settings.type == "tool-node" else "use it; --host 127.0.0.1 is for this machine only"
        complain("it listens on %s without a key: anyone on the network may %s" % (running["host"], use))
    if running.get("session_ended"):
        complain("the resumed session has ended already; start without --resume to begin a new one")
    return 0


def given_settings(cls: type, args: argparse.Namespace) -> dict:
    """What the command line says of each setting; None where it says nothing."""
    return {spec.name: getattr(args, spec.name, None) for spec in fields(cls)}


def command_stop(args: argparse.Namespace) -> int:
    """End what `start` began."""
    state = ServiceState(resolve_data_dir(args.data_dir, os.environ))
    state.title = _title(state.read().get("type"))
    return stop_service(state)


def _title(kind):
    return "tool node" if kind == "tool-node" else "model service"


def command_watch_agent(args: argparse.Namespace) -> int:
    """Have the service watch a process."""
    data_dir = resolve_data_dir(args.data_dir, os.environ)
    state = ServiceState(data_dir).read()
    flags = {"host": args.host, "port": args.port, "api_key": args.api_key}
    settings = resolve_settings(ServiceSettings, flags, os.environ, None)
    if "pid" not in state and not (args.port or os.environ.get("SERVICE_PORT")):
        message = "no model service runs in the data directory %s: start it, or give --data-dir or --port"
        raise RockError(message % data_dir)
    host = args.host or state.get("host") or settings.host
    port = settings.port if args.port else state.get("port") or settings.port
    answer = call_service(host, port, "POST", "/v1/agent/watch", {"pid": args.pid}, settings.api_key)
    if answer.get("status") == "gone":
        complain("process %d has gone already, or the number is wrong; it counts as an agent that has ended" % args.pid)
    else:
        say("watching process %d" % args.pid)
    return 0


def command_anti_call_llm(args: argparse.Namespace) -> int:
    """Answer a request, and print the next one."""
    if args.index < 0:
        raise UsageError("--index counts from 0, got %d" % args.index)
    settings = resolve_settings(ServiceSettings, {}, os.environ, None)
    data_dir = resolve_data_dir(args.data_dir, os.environ)
    state = ServiceState(data_dir)
    said = state.read()
    log = MarkerLog(settings.log_file or said.get("log_file") or os.path.join(data_dir, LOG_FILE_NAME))
    text = read_response(args, log)
    if text is None:
        place = log.find(args.index)
    else:
        place = log.append_response(args.index, text)
        if place.response is None:
            complain("request %d is not answered: the session has ended" % args.index)
        elif args.response_file not in (None, "-"):
            _remove_response_file(args.response_file)
    if not state.is_running():
        complain("no model service runs in the data directory %s" % data_dir)
    elif said.get("type") in ("proxy", "tool-node"):
        complain("the service in %s answers by itself: of its requests none comes here" % data_dir)
    waiter = RequestWaiter(log, settings.polling_interval_seconds, state.liveness)
    try:
        with waiting_for("request %d; Ctrl-C ends only this wait" % (args.index + 1)):
            request = waiter.wait(args.index + 1, place, args.timeout)
        say(request)
    except NotYet as error:
        raise NotYet(("request %d is answered; " % args.index if place.response else "") + str(error)) from None
    return 0


def _remove_response_file(path):
    try:
        os.unlink(path)
    except OSError as error:  # as in a read-only directory; the turn goes on all the same
        complain("cannot remove %s: %s; its content is in the log" % (path, error.strerror))


def read_response(args: argparse.Namespace, log: MarkerLog) -> str | None:
    """The answer given to anti-call-llm as one line of JSON, or None.  Raises UsageError.

    A response file is removed once its content is in the log; when the call is then repeated, the log has it.
    """
    if args.response is None and args.response_file is None:
        return None
    if args.index == 0:
        raise UsageError("--index 0 waits for the first request and takes no response")
    if args.response is not None:
        data, source = os.fsencode(args.response), "--response"
    elif args.response_file == "-":
        data, source = standard_input().read(), "the response on standard input"
    else:
        source = args.response_file
        try:
            with open(source, "rb") as file:
                data = file.read()
        except FileNotFoundError:
            if log.find(args.index).response:
                return None
            raise UsageError("the response file %s does not exist" % source) from None
        except OSError as error:
            raise UsageError("cannot read the response file %s: %s" % (source, error.strerror)) from None
    try:
        return json_object(data.decode("utf-8-sig"), source)[0]
    except UnicodeDecodeError as error:
        raise UsageError("%s is not UTF-8 at byte %d" % (source, error.start)) from None
    except ValueError as error:
        raise UsageError("%s; give an OpenAI completion or error object" % error) from None


def command_traj(args: argparse.Namespace) -> int:
    """Show the calls of a trajectory."""
    try:
        with _opened(args.file) as file:
            is_whole = _show_calls(file, args)
            sys.stdout.buffer.flush()
    except BrokenPipeError:  # as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    return 0 if is_whole else EXIT_FAILED


def _opened(path):
    with Storing("read", path):
        return open(path, "rb") if path != "-" else contextlib.nullcontext(standard_input())


def _lines_of(file, path):
    with Storing("read", path):
        yield from file


def _show_calls(file, args):
    """Print each call; whether all lines could be read."""
    write, earlier, count, bad = sys.stdout.buffer.write, [], 0, 0
    layout = TRAJ_TABLE if args.full or sys.stdout.isatty() else TRAJ_TABS
    if not args.json:
        write((layout % TRAJ_COLUMNS).encode() + b"\n")
    for number, line in enumerate(_lines_of(file, args.file), 1):
        if not line.strip():
            continue
        try:
            record = parse_object(line.decode("utf-8"), "the line")
            summary = CallSummary.of(number, record)
        except ValueError as error:
            is_torn = not line.endswith(b"\n")
            bad += not is_torn
            if is_torn or bad <= MAX_BAD_LINES:
                complain("line %d: %s" % (number, "torn: its writer was stopped" if is_torn else error))
            continue
        count += 1
        lines = [
            json.dumps(vars(summary), separators=(",", ":")) if args.json else (layout % summary.row()).rstrip(" ")
        ]
        if args.full:
            lines += conversation(record, earlier) + [""]
            earlier = messages_of(record)
        write("\n".join(lines).encode("utf-8", "backslashreplace") + b"\n")
    if bad > MAX_BAD_LINES:
        complain("%d more lines are no calls" % (bad - MAX_BAD_LINES))
    if bad and not count:
        complain("%s is no trajectory, as %s or a recording file is" % (args.file, TRAJ_FILE_NAME))
    return not bad


# ----------------------------------------------------------------------------------------------------------------------
# The demo: what a trainer, an agent and the service do, with the very commands that a user would type.
# ----------------------------------------------------------------------------------------------------------------------

_DEMO_AGENT = r"""
import json, os, urllib.request

def ask(prompt, stream=False):
    body = {"model": "demo", "messages": [{"role": "user", "content": prompt}], "stream": stream}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60).read().decode()
    if not stream:
        return json.loads(answer)["choices"][0]["message"]["content"]
    events = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])

first = ask("What is 6 times 7?")
print("agent    got an answer: " + first, flush=True)
print("agent    got a stream:  " + ask("Is " + first + " a prime number?", stream=True), flush=True)
"""
_DEMO_ANSWERS = ("42", "No: 42 = 2 x 3 x 7.")


def command_demo(_: argparse.Namespace) -> int:
    """Show the whole loop: the service, an agent of two calls, the trainer's side, the trajectory."""
    import shutil
    import tempfile

    data_dir = tempfile.mkdtemp(prefix="rock-ms-demo-")
    try:
        demo = _Demo(data_dir)
        try:
            demo.run()
        finally:
            demo.command("stop")
    finally:
        shutil.rmtree(data_dir, ignore_errors=True)
    say(SESSION_END_MARKER)
    return 0


class _Demo:
    def __init__(self, data_dir):
        ours = {spec.metadata["env"] for spec in fields(ServiceSettings)}
        self._environ = {name: value for name, value in os.environ.items() if name not in ours}
        self._data_dir = data_dir

    def run(self):
        """The loop, narrated; ends when a request comes back as SESSION_END."""
        import subprocess

        self._run("start", "--host", "127.0.0.1", "--port", "0")
        url = "http://127.0.0.1:%d/v1" % ServiceState(self._data_dir).read()["port"]
        say("agent    starts with OPENAI_BASE_URL=%s" % url)
        agent = subprocess.Popen([*interpreter(), "-c", _DEMO_AGENT], env=dict(self._environ, OPENAI_BASE_URL=url))
        # As a shell does, it reaps the agent at once: without /proc the service cannot tell a zombie.
        threading.Thread(target=agent.wait, daemon=True).start()
        try:
            self._run("watch-agent", "--pid", str(agent.pid))
            self._train()
            if agent.wait(REQUEST_SECONDS):
                raise RockError("the demo's agent failed")
        finally:
            agent.kill()
            agent.wait()
        with open(os.path.join(self._data_dir, TRAJ_FILE_NAME), encoding="utf-8") as file:
            for line in file:
                call = parse_json(line)
                say("traj     index %(index)d, status %(status)d, stream %(stream)s, %(response_time).3f s" % call)

    def _train(self):
        request = self._run("anti-call-llm", "--index", "0")
        for index, content in enumerate(_DEMO_ANSWERS, 1):
            answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}
            request = self._run("anti-call-llm", "--index", str(index), "--response", dump_json(answer))
        if request != SESSION_END_MARKER:
            raise RockError("the demo's session did not end: %s" % request)

    def _run(self, *words):
        """Run a command and show it."""
        from shlex import quote

        printed = self.command(*words)
        say("$ rock_ms.py %s\n  %s" % (" ".join(map(quote, words)), printed))
        return printed

    def command(self, *words):
        """Run one of our commands as a user would; what it printed."""
        import subprocess

        command = [*interpreter(), os.path.abspath(__file__), *words, "--data-dir", self._data_dir]
        done = subprocess.run(command, stdout=subprocess.PIPE, env=self._environ)
        if done.returncode:
            raise RockError("the demo's command failed: %s" % " ".join(words))
        return done.stdout.decode("utf-8").strip()


# ----------------------------------------------------------------------------------------------------------------------
# The parser: flags and their help follow the settings.
# ----------------------------------------------------------------------------------------------------------------------

_EXAMPLES = {
    "traj": """examples:
  %(prog)s LLMTraj.jsonl                    one line a call, with tabs where it is piped
  %(prog)s LLMTraj.jsonl --full | less      with what was said
  %(prog)s LLMTraj.jsonl --json             for scripts

exit codes: 0 shown (a torn last line, of a service that was killed, is passed over), 1 failed, or a line is no call""",
    "start": """examples:
  %(prog)s                                  in the background, on 0.0.0.0:8080
  %(prog)s --host 127.0.0.1 --port 9000     for this machine only, elsewhere
  %(prog)s --type proxy --proxy-base-url https://host/v1        pass calls on, and record them
  %(prog)s --type proxy --replay-file R     answer from a recording
  %(prog)s --resume                         go on with the last session, where it listened
  %(prog)s --foreground                     stay here and show each request; Ctrl-C ends it
  %(prog)s --type tool-node --tool NAME --tool-file FILE        a tool of your own over HTTP

Every setting, also one without a flag, can be given in --config-file or the environment; see the README's table.""",
    "watch-agent": """examples:
  my-agent & %(prog)s --pid $!        SESSION_END is written when the agent has gone

Several processes may be watched, each by a call of its own; the session ends with the last of them.""",
    "anti-call-llm": """examples:
  %(prog)s --index 0                        wait for request 1, print it
  %(prog)s --index 1 --response '{...}'     answer request 1, wait for request 2, print it
  %(prog)s --index 1 --response-file R      the same; R is removed once it is read
  %(prog)s --index 1                        only wait for request 2
  %(prog)s --index 1 --response-file R --timeout 0     only answer request 1 (exit code 75)

It prints the request's JSON on one line, or SESSION_END.  Repeating a call is safe.
exit codes: 0 printed, 1 failed, 2 bad usage, 75 not yet (--timeout is over; the answer is taken)""",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of descriptions and examples as they are.

    Newer Pythons make one for each flag that is added, and for its width would import shutil, which takes longer than
    all of the parser.
    """

    def __init__(self, prog):
        try:
            width = int(os.environ.get("COLUMNS") or os.get_terminal_size().columns or 80)
        except (OSError, ValueError):
            width = 80
        super().__init__(prog, width=width - 2)


def command_parser(prog: str, description: str) -> tuple:
    """A parser of commands, and what `add_command` adds them to."""
    description += "\nEach command has its own --help, with examples."
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=HelpFormatter)
    parser.set_defaults(function=_show_help, parser=parser)
    parser.add_argument("--version", action="version", version="rock-model-service " + __version__)
    return parser, parser.add_subparsers(dest="command", metavar="COMMAND")


def _show_help(args):
    args.parser.print_help(sys.stderr)
    return EXIT_USAGE


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The parser of all commands."""
    description = "The ROCK model service: LLM calls, answered by a trainer or a model's server."
    parser, commands = command_parser(prog, description + "\nTry '%(prog)s demo' first.")
    _add_start(_add_command(commands, "start", command_start, "start the service in the background"))
    _add_watch(_add_command(commands, "watch-agent", command_watch_agent, "end the session when a process ends"))
    _add_anti_call(_add_command(commands, "anti-call-llm", command_anti_call_llm, "answer, and wait for the next call"))
    _add_command(commands, "stop", command_stop, "stop the service")
    _add_traj(_add_command(commands, "traj", command_traj, "show a trajectory", has_data_dir=False))
    _add_command(commands, "demo", command_demo, "show the whole loop in two seconds", has_data_dir=False)
    return parser


def add_command(commands, name: str, function, help: str, examples: dict, has_data_dir=True) -> argparse.ArgumentParser:
    """Add a command; its parser.  function: takes the arguments and returns the exit code.  examples: by command."""
    parser = commands.add_parser(
        name,
        help=help,
        description="\n\n".join(filter(None, (function.__doc__, examples.get(name)))),  # common cases first
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(function=function, parser=parser)
    if has_data_dir:
        where = "directory of log, trajectory and state (env ROCK_MODEL_SERVICE_DATA_DIR; default %s, else %s)"
        parser.add_argument("--data-dir", metavar="DIR", help=where % (DEFAULT_DATA_DIR, FALLBACK_DATA_DIR))
    return parser


def _add_command(commands, name, function, help, has_data_dir=True):
    return add_command(commands, name, function, help, _EXAMPLES, has_data_dir)


def add_settings(parser: argparse.ArgumentParser, cls: type) -> None:
    """Add the flags of a settings dataclass, and those that every `start` has; those of one type in a group."""
    parser.usage = "%(prog)s [options]"
    groups = {None: parser}
    for spec in fields(cls):
        flag, parse, only = (spec.metadata[key] for key in ("flag", "parse", "only"))
        if flag:
            if only not in groups:
                groups[only] = parser.add_argument_group("for --type " + only)
            metavar = getattr(parse, "metavar", None) or _METAVARS.get(parse) or flag.rpartition("-")[2].upper()
            groups[only].add_argument(flag, dest=spec.name, metavar=metavar, help=_setting_help(spec))
    parser.add_argument("--config-file", metavar="FILE", help="settings by name, in JSON or YAML")
    parser.add_argument("--foreground", action="store_true", help="stay in the foreground")
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)


def _add_start(parser):
    add_settings(parser, ServiceSettings)
    parser.add_argument("--resume", action="store_true", help="continue the last session instead of a new one")


_METAVARS = {as_url: "URL", _as_overrides: "JSON", as_object: "JSON", as_count: "N", _as_status_codes: "CODE,CODE"}
_METAVARS.update({as_seconds: "SECONDS", as_wait: "SECONDS"})


def _setting_help(spec):
    notes = ["env " + spec.metadata["env"]] if spec.metadata["env"] else []
    default = ",".join(str(part) for part in spec.default) if isinstance(spec.default, tuple) else spec.default
    notes += ["default %s" % default] if isinstance(default, (str, int, float)) and default != "" else []
    only, text = spec.metadata["only"], spec.metadata["help"]
    return text[len(only + ": ") if only else 0 :] + (" (%s)" % "; ".join(notes) if notes else "")


def _add_anti_call(parser):
    parser.add_argument(
        "--index", type=int, required=True, help="the request to answer, 0 for none; the next one is printed"
    )
    answer = parser.add_mutually_exclusive_group()
    answer.add_argument("--response", metavar="JSON", help="the answer to that request: a completion, or an error")
    answer.add_argument("--response-file", metavar="FILE", help="the same from a file, removed once read; -: stdin")
    parser.add_argument("--timeout", type=_timeout, metavar="SECONDS", help="how long to wait (default: no limit)")


def _add_traj(parser):
    parser.add_argument("file", metavar="FILE", help="a trajectory, as LLMTraj.jsonl; -: standard input")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--full", action="store_true", help="show what was said, too")
    how.add_argument("--json", action="store_true", help="one JSON object a call, for scripts")


def _timeout(text):
    seconds = float(text)
    if not 0 <= seconds < 1e9:
        raise ValueError
    return seconds


def _process_number(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


# argparse's messages quote these names.
_timeout.__name__ = "number of seconds"
_process_number.__name__ = "process number"


def _add_watch(parser):
    parser.add_argument("--pid", type=_process_number, required=True, help="the agent's process number")
    parser.add_argument("--host", help="where the service listens (default: as it says in the data dir)")
    parser.add_argument("--port", help="the same")
    parser.add_argument("--api-key", metavar="KEY", help="the service's token (env ROCK_MODEL_SERVICE_API_KEY)")


def main(argv: list | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 failed, 2 bad usage, 75 not yet."""
    open_standard_streams()
    words = sys.argv[1:] if argv is None else list(argv)
    prog = os.path.basename(sys.argv[0] or "rock-ms")
    if words[:1] == ["model-service"]:  # as ROCK spells it: rock model-service start
        prog, words = prog + " model-service", words[1:]
    return run_command(build_parser(prog), words)


def run_command(parser: argparse.ArgumentParser, words: list, who: str = "rock-ms") -> int:
    """Run one command of a parser; its exit code.  who: the program whose errors they are."""
    args, unknown = parser.parse_known_args(words)
    if unknown:
        flags = re.findall(r"^  (?:-., )?(--[a-z-]+)", args.parser.format_help(), re.MULTILINE)
        meant = nearest(unknown[0].partition("=")[0], flags, 0.75)
        hint = "; did you mean %s?" % meant if meant else ""
        args.parser.error("unrecognized arguments: %s%s" % (" ".join(unknown), hint))
    try:
        return args.function(args)
    except RockError as error:
        complain(str(error), who)
        return error.exit_code
    except OSError as error:  # as of an output that nobody reads any more, or of a file of another user
        complain(str(error), who)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would try to write what is left, and fail
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
