"""Random input, from fixed seeds: the marker log's readers and the HTTP server, fed with mutations of what is valid."""

import json
import random

import pytest

from rock_ms import (
    READ_BLOCK_BYTES,
    SCAN_BLOCK_BYTES,
    LogTail,
    MarkerLog,
    Place,
    ProtocolError,
    compact_json,
    dump_json,
    encode_record,
    find_place,
    parse_chunk_size,
    parse_record,
    parse_request_head,
)
from support import ask, chat, raw_request, running, talk

pytestmark = pytest.mark.load

WORDS = [b"LLM_REQUEST_START", b"LLM_REQUEST_END", b"LLM_RESPONSE_START", b"LLM_RESPONSE_END", b"SESSION_END"]
LOG_TOKENS = WORDS + [
    b"\n",
    b"\r",
    b"{",
    b"}",
    b'"',
    b"\\",
    b"\0",
    b"\xff",
    b'{"timestamp": 1, "index": 2}',
    b"9" * 5000,
]
TEXTS = [word.decode() for word in WORDS] + ["", " ", "\n\r", '"', "\\", "\u2028", "😀", "\ud800", "LLM_", "x" * 300]
seeds = pytest.mark.parametrize("seed", range(4))


def mutate(rng, data, tokens):
    """`data` with one to four random changes."""
    for _ in range(rng.randint(1, 4)):
        start, end = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        token = rng.choice(tokens)
        data = rng.choice(
            [
                data[:start],
                data[start:],
                data[:start] + data[end:],
                data[:end] + data[start:],
                data[:start] + token + data[start:],
                data[:start] + token + data[start + 1 :],
                data[:start] + bytes([rng.randrange(256)]) + data[start + 1 :],
                data + data[start:end] + token,
            ]
        )
    return data


def random_text(rng):
    """The text of a JSON object, with marker words where they can stand."""

    def value(depth):
        kind = rng.randrange(4 if depth < 3 else 2)
        if kind < 2:
            return rng.choice([None, True, 1.5, -(10**20), "".join(rng.choices(TEXTS, k=3))])
        items = [value(depth + 1) for _ in range(rng.randrange(4))]
        return items if kind == 2 else {rng.choice(TEXTS): item for item in items}

    return compact_json(dump_json({rng.choice(TEXTS): value(0) for _ in range(3)}))


def random_line(rng, index=1):
    kind = rng.choice(["request", "response"])
    return encode_record(kind, random_text(rng), index, 1)


def random_log(rng, turns, padding=0):
    """A log as a session writes it, in pieces: answers may be late or missing, and a killed writer's half lines."""
    pieces, open_turns = [], []
    for index in range(1, turns + 1):
        text = '{"n":"%s"}' % ("x" * rng.randint(0, padding)) if padding else random_text(rng)
        pieces.append(encode_record("request", text, index, 1))
        open_turns.append(index)
        if rng.random() < 0.1:
            pieces.append(random_line(rng)[: rng.randint(1, 20)] + b"\n")
        while open_turns and rng.random() < 0.6:
            turn = open_turns.pop(rng.randrange(len(open_turns)))
            pieces.append(encode_record("response", random_text(rng), turn, 1))
    return pieces + [b"SESSION_END\n"] * rng.randrange(2)


def forwards(data):
    """The records of a log, read in the plainest way."""
    records, offset = [], 0
    for line in data.split(b"\n")[:-1]:
        records.append(parse_record(line, offset))
        offset += len(line) + 1
    return [record for record in records if record]


def place_forwards(data, index):
    """What `find_place` is to find, found by reading everything from the start."""
    end = data.rfind(b"\n") + 1
    records = [parse_record(line) for line in data[:end].split(b"\n")]
    requests = {record.index: record for record in records if record and record.kind == "request"}
    responses = {record.index: record for record in records if record and record.kind == "response"}
    has_ended = any(record and record.kind == "end" for record in records)
    next_request, next_is_answered = requests.get(index + 1), index + 1 in responses
    return Place(requests.get(index), responses.get(index), next_request, next_is_answered, has_ended, end)


# The marker log -----------------------------------------------------------------------------------------------------


@seeds
def test_mutated_line_is_a_record_or_none_and_never_an_exception(seed):
    rng = random.Random(seed)
    kinds = set()
    for _ in range(3000):
        line = mutate(rng, random_line(rng)[:-1], LOG_TOKENS)
        record = parse_record(line)
        kinds.add(record and record.kind)
        if record:
            assert record.kind == "end" or record.index >= 1
            assert record.body in line
            assert not any(word.decode() in record.text for word in WORDS)
    assert kinds >= {None, "request", "response"}


@seeds
def test_random_bytes_are_no_record(seed):
    rng = random.Random(seed)
    for _ in range(2000):
        assert parse_record(rng.choice(WORDS[:4]) + bytes(rng.choices(range(256), k=rng.randint(1, 100)))) is None


@seeds
def test_whole_record_right_behind_one_torn_at_any_byte_is_read(seed):
    rng = random.Random(seed)
    for _ in range(300):
        torn, line = rng.choice([random_line(rng), b"SESSION_END\n"]), random_line(rng, 7)[:-1]
        assert parse_record(torn[: rng.randrange(len(torn))] + line) == parse_record(line)


@seeds
def test_record_written_behind_garbage_is_read_back(seed, tmp_path):
    rng = random.Random(seed)
    log = MarkerLog(str(tmp_path / "log"))
    written = []
    for index in range(1, 300):
        with open(log.path, "ab") as file:
            file.write(mutate(rng, random_line(rng), LOG_TOKENS) if rng.random() < 0.7 else b"")
        kind, text = rng.choice(["request", "response"]), random_text(rng)
        written.append((log.append(kind, text, index), kind, index, json.loads(text)))
    with open(log.path, "rb") as file:
        data = file.read()
    found = {record.offset: record for record in log.tail().read()}
    for size, kind, index, value in written:
        offset = data.rfind(b"\n", 0, size - 1) + 1
        assert found[offset] == log.record_at(offset)
        assert (found[offset].kind, found[offset].index, json.loads(found[offset].text)) == (kind, index, value)


@seeds
def test_log_read_in_pieces_has_the_same_records_as_in_one_go(seed, tmp_path):
    rng = random.Random(seed)
    pieces = random_log(rng, 40) + random_log(rng, 40, padding=READ_BLOCK_BYTES // 10)
    data = b"".join(mutate(rng, piece, LOG_TOKENS) if rng.random() < 0.2 else piece for piece in pieces)
    assert len(data) > READ_BLOCK_BYTES
    path = tmp_path / "log"
    tail, found, at = LogTail(str(path)), [], 0
    with open(str(path), "ab", buffering=0) as file:
        while at < len(data):
            size = rng.choice([1, rng.randint(2, 100), rng.randint(100, 5000), rng.randint(5000, 300000)])
            file.write(data[at : at + size])
            found += tail.read()
            at = min(at + size, len(data))
            if rng.random() < 0.1:  # as a writer does that finds no space for the rest
                at = rng.randint(data.rfind(b"\n", 0, at) + 1, at)
                file.truncate(at)
    expected = forwards(data)
    assert len(expected) > 80
    assert found == expected == list(LogTail(str(path)).read())
    middle = expected[len(expected) // 2]
    assert list(LogTail(str(path), middle.offset).read()) == expected[len(expected) // 2 :]
    assert not tail.was_replaced


def check_places(path, data, sizes, indexes):
    path.write_bytes(data)
    with open(str(path), "rb") as file:
        for size in sizes:
            for index in indexes:
                assert find_place(file.fileno(), size, index) == place_forwards(data[:size], index), (size, index)


@seeds
def test_place_found_backwards_is_the_one_found_forwards(seed, tmp_path):
    rng = random.Random(seed)
    for _ in range(25):
        turns = rng.randint(0, 6)
        data = b"".join(random_log(rng, turns))
        sizes = [len(data)] + [rng.randint(0, len(data)) for _ in range(8)]
        check_places(tmp_path / "log", data, sizes, range(turns + 3))


@seeds
def test_place_is_found_in_lines_longer_than_a_block(seed, tmp_path):
    rng = random.Random(seed)
    data = b"".join(random_log(rng, 5, padding=2 * SCAN_BLOCK_BYTES))
    sizes = [len(data), len(data) - 1, SCAN_BLOCK_BYTES, SCAN_BLOCK_BYTES + 1, rng.randint(0, len(data))]
    check_places(tmp_path / "log", data, sizes, range(7))


@seeds
def test_place_in_garbage_is_no_exception(seed, tmp_path):
    rng = random.Random(seed)
    log = MarkerLog(str(tmp_path / "log"))
    for _ in range(100):
        data = mutate(rng, b"".join(random_log(rng, 3)), LOG_TOKENS)
        (tmp_path / "log").write_bytes(data)
        for index in range(5):
            assert log.find(index).end == data.rfind(b"\n") + 1
        assert list(log.tail().read()) == forwards(data)


# HTTP ---------------------------------------------------------------------------------------------------------------

CHUNKED = b"POST /v1/agent/watch HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
REQUESTS = [
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"HEAD /v1/models/a%20b?c HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    raw_request(dump_json(chat()).encode(), b"Content-Type: application/json\r\n"),
    raw_request(dump_json(chat(stream=True)).encode(), b"X-Stainless-Retry-Count: 1\r\nExpect: 100-continue\r\n"),
    raw_request(b'{"pid":"1"}', path=b"/v1/agent/watch", head=b"Authorization: Bearer x\r\n"),
    CHUNKED + b'5;a=b\r\n{"pid\r\n2\r\n":\r\n3\r\n0} \r\n0\r\nA: b\r\n\r\n',
]
HTTP_TOKENS = [b"\r\n", b"\n", b"\r", b" ", b":", b"\0", b"\xff", b"/", b"%", b"?", b"{}", b"0", b"-1", b"9" * 400]
HTTP_TOKENS += [b"chunked", b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: y\r\n", b"x" * 70000]
HTTP_TOKENS += [b"\r\n\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"HTTP/1.0", *REQUESTS]


@seeds
def test_mutated_header_is_read_or_refused_by_a_protocol_error(seed):
    rng = random.Random(seed)
    statuses = set()
    for _ in range(3000):
        data = mutate(rng, rng.choice(REQUESTS), HTTP_TOKENS).partition(b"\r\n\r\n")[0]
        try:
            head = parse_request_head(data)
        except ProtocolError as error:
            statuses.add(error.status)
            continue
        statuses.add(200)
        names = [name for name, _ in head.headers]
        assert names.count("content-length") + names.count("transfer-encoding") <= 1
        assert names.count("host") == 1 or head.is_http10
        assert head.has_body == (head.is_chunked or (head.content_length or 0) > 0)
    assert statuses >= {200, 400, 414}


@seeds
def test_random_chunk_size_is_read_or_refused_by_a_protocol_error(seed):
    rng = random.Random(seed)
    sizes = set()
    for _ in range(3000):
        line = bytes(rng.choices(b"0aF;x- \t\xff_", k=rng.randint(0, 5)))
        try:
            sizes.add(parse_chunk_size(line))
        except ProtocolError as error:
            assert error.status == 400
            sizes.add(None)
    assert sizes >= {None, 0, 0xA, 0xFF}


@seeds
def test_server_answers_whatever_is_sent_and_goes_on(seed, tmp_path):
    rng = random.Random(seed)
    statuses = set()
    with running(tmp_path, request_timeout=0.01, max_body_bytes=50000) as service:
        for _ in range(200):
            data = mutate(rng, rng.choice(REQUESTS), HTTP_TOKENS)
            reply = talk(service.port, data, half_close=True)
            assert reply == b"" or reply.startswith(b"HTTP/1.1 "), data
            statuses.add(reply[9:12])
        assert ask(service.port, None, "GET", "/health").json() == {"status": "healthy"}
        assert not any("Traceback" in line for line in service.logged), service.logged
    assert statuses >= {b"200", b"400"}
    assert b"500" not in statuses
