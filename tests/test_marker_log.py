"""The marker log: records as text, the file, its followers, and the trainer's side of a turn."""

import json
import os
import sys
import threading

import pytest

import rock_ms
from rock_ms import (
    LogTail,
    MarkerLog,
    NotYet,
    Place,
    RequestWaiter,
    RockError,
    StorageError,
    UsageError,
    encode_record,
    parse_record,
)
from support import Later, wait_until

HOSTILE = 'SESSION_END LLM_REQUEST_START LLM_REQUEST_END LLM_RESPONSE_START LLM_RESPONSE_END \n\r\0 \u2028 😀 \\ " {'
WORDS = [b"SESSION_END", b"LLM_REQUEST_START", b"LLM_REQUEST_END", b"LLM_RESPONSE_START", b"LLM_RESPONSE_END"]


def text(value):
    return rock_ms.compact_json(rock_ms.dump_json(value))


@pytest.fixture
def log(tmp_path):
    return MarkerLog(str(tmp_path / "log"), clock=lambda: 1.5)


def append_raw(log, data):
    with open(log.path, "ab") as file:
        file.write(data)


def contents(log):
    with open(log.path, "rb") as file:
        return file.read()


def records(log):
    return [(record.kind, record.index, record.body.decode()) for record in LogTail(log.path).read()]


# Records ------------------------------------------------------------------------------------------------------------


def test_record_has_the_bytes_that_rock_writes():
    line = encode_record("request", '{"a":1}', 7, 1234)
    assert line == b'LLM_REQUEST_START{"a":1}LLM_REQUEST_END{"timestamp": 1234, "index": 7}\n'
    line = encode_record("response", '{"b":2}', 8, 5)
    assert line == b'LLM_RESPONSE_START{"b":2}LLM_RESPONSE_END{"timestamp": 5, "index": 8}\n'


@pytest.mark.parametrize("kind", ["request", "response"])
@pytest.mark.parametrize("value", [{"m": HOSTILE}, {HOSTILE: [HOSTILE]}, {"m": "\ud800 LLM_REQUEST_END"}])
def test_record_with_marker_words_holds_none_of_them_twice_and_reads_back_equal(kind, value):
    line = encode_record(kind, text(value), 3, 1)
    body = line.split(b"_START", 1)[1].rsplit(b"LLM_", 1)[0]
    assert not any(word in body for word in WORDS)
    record = parse_record(line[:-1])
    assert (record.kind, record.index) == (kind, 3)
    assert json.loads(record.text) == value


@pytest.mark.parametrize("value", [{"m": HOSTILE}, {"m": 'LLM_REQUEST_END{"timestamp": 1, "index": 9}'}])
def test_unescaped_record_of_rocks_own_client_is_read(value):
    body = json.dumps(value, ensure_ascii=False)
    record = parse_record(('LLM_REQUEST_START%sLLM_REQUEST_END{"timestamp": 1, "index": 2}' % body).encode())
    assert record.index == 2
    assert json.loads(record.body.decode()) == value
    assert "SESSION_END" not in record.text, "what is printed is escaped, whoever wrote it"
    assert json.loads(record.text) == value


NO_RECORDS = [
    b"",
    b"SESSION_END ",
    b" SESSION_END",
    b"xSESSION_END",
    b"LLM_REQUEST_START{}",
    b"LLM_REQUEST_START{}LLM_REQUEST_END",
    b"LLM_REQUEST_START{}LLM_REQUEST_END{",
    b"LLM_REQUEST_START{}LLM_REQUEST_END[1]",
    b"LLM_REQUEST_START{}LLM_REQUEST_END{}",
    b'LLM_REQUEST_START{}LLM_REQUEST_END{"index": 0}',
    b'LLM_REQUEST_START{}LLM_REQUEST_END{"index": true}',
    b'LLM_REQUEST_START{}LLM_REQUEST_END{"index": "1"}',
    b'LLM_REQUEST_START{}LLM_RESPONSE_END{"index": 1}',
    b'xLLM_REQUEST_START{}LLM_REQUEST_END{"index": 1}',
    b'LLM_REQUEST_START{}LLM_REQUEST_END{"index": 1}x',
    b'LLM_REQUEST_START{}LLM_REQUEST_END\xff{"index": 1}',
]


@pytest.mark.parametrize("line", NO_RECORDS)
def test_line_that_is_no_record_is_passed_over(line):
    assert parse_record(line) is None


def test_whole_record_right_behind_a_torn_one_is_read():
    torn = b'LLM_RESPONSE_START{"a": "b'
    record = parse_record(torn + encode_record("response", '{"c":1}', 4, 1)[:-1])
    assert (record.index, record.body) == (4, b'{"c":1}')


@pytest.mark.parametrize("torn", ["L", "LLM_RES", "LLM_REQUEST_STAR", "SESSION_EN", "LLM_RESPONSE_START", "S"])
def test_whole_record_right_behind_a_torn_marker_is_read(torn):
    record = parse_record(torn.encode() + encode_record("response", '{"c":1}', 4, 1)[:-1])
    assert (record.index, record.body) == (4, b'{"c":1}')


@pytest.mark.parametrize(
    "original, expected",
    [
        (
            '{ "a" : 1.10 ,\n\t"b":[ 1e400, 12345678901234567890123, "x  y\\u0041 \\" " ],\r "a":2 }',
            '{"a":1.10,"b":[1e400,12345678901234567890123,"x  y\\u0041 \\" "],"a":2}',
        ),
        (r'[ "\\" , "\\\" , " , "" , "\\\\" ]', r'["\\","\\\" , ","","\\\\"]'),  # two, three and four backslashes
        (' "\u2028 \xa0" ', '"\u2028 \xa0"'),
        (" true\n", "true"),
    ],
)
def test_compacting_changes_no_token(original, expected):
    json.loads(original)
    assert rock_ms.compact_json(original) == expected


# The file -----------------------------------------------------------------------------------------------------------


def test_half_written_last_line_is_ignored_and_then_closed_off(log):
    log.append("request", '{"n":1}', 1)
    append_raw(log, b'LLM_RESPONSE_START{"half')
    assert records(log) == [("request", 1, '{"n":1}')]
    log.append("response", '{"n":1}', 1)
    assert records(log) == [("request", 1, '{"n":1}'), ("response", 1, '{"n":1}')]


@pytest.mark.parametrize("cut", range(1, 75, 7))
def test_writer_killed_at_any_byte_harms_no_later_record(log, cut):
    append_raw(log, encode_record("request", '{"n":1}', 1, 1)[:cut])
    log.append("request", '{"n":2}', 2)
    log.append_session_end()
    assert records(log)[-2:] == [("request", 2, '{"n":2}'), ("end", 0, "")]


def test_concurrent_writers_never_mix_their_lines(log):
    def write(number):
        other = MarkerLog(log.path)
        for turn in range(20):
            other.append("request", '{"n":"%s"}' % ("x" * 20000), number * 100 + turn + 1)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(index for _, index, _ in records(log)) == sorted(n * 100 + t + 1 for n in range(8) for t in range(20))


def test_full_disk_is_an_error_and_leaves_no_half_line():
    log = MarkerLog("/dev/full")
    with pytest.raises(StorageError, match="/dev/full"):
        log.append("request", "{}", 1)


def test_log_that_was_moved_away_is_begun_anew(log, tmp_path):
    log.append("request", "{}", 1)
    os.rename(log.path, str(tmp_path / "moved"))
    log.append("request", "{}", 2)
    assert records(log) == [("request", 2, "{}")]


def test_file_that_was_moved_away_while_its_lock_was_waited_for_is_not_taken(log, tmp_path):
    log.append("request", "{}", 1)
    descriptor = os.open(log.path, os.O_RDWR)
    try:
        assert log._file._info_if_locked(descriptor).st_size == os.path.getsize(log.path)
        os.rename(log.path, str(tmp_path / "moved"))
        assert log._file._info_if_locked(descriptor) is None
        log.append("request", "{}", 1)
        assert log._file._info_if_locked(descriptor) is None
    finally:
        os.close(descriptor)


def test_set_aside_keeps_every_earlier_file(tmp_path):
    path = tmp_path / "LLMService.log"
    names = []
    for content in ("one", "two", "three"):
        path.write_text(content)
        names.append(rock_ms.set_aside(str(path), 0))
    assert [open(name).read() for name in names] == ["one", "two", "three"]
    assert not path.exists()
    assert rock_ms.set_aside(str(path), 0) is None


# Following ----------------------------------------------------------------------------------------------------------


def test_tail_yields_each_record_once_and_only_when_it_is_whole(log):
    tail = log.tail()
    assert list(tail.read()) == []
    line = encode_record("request", '{"n":"%s"}' % ("x" * 3000000), 1, 1)
    for start in range(0, len(line) - 1, 1000000):
        append_raw(log, line[start : min(start + 1000000, len(line) - 1)])
        assert list(tail.read()) == []
    append_raw(log, b"\n")
    log.append("response", "{}", 1)
    assert [(record.kind, record.offset) for record in tail.read()] == [("request", 0), ("response", len(line))]
    assert list(tail.read()) == []


def test_tail_reads_a_replaced_log_from_its_start(log, tmp_path):
    tail = log.tail()
    log.append("request", "{}", 1)
    log.append("request", "{}", 2)
    assert len(list(tail.read())) == 2
    os.rename(log.path, str(tmp_path / "moved"))
    log.append("request", "{}", 1)
    assert [record.index for record in tail.read()] == [1]
    assert tail.was_replaced


def test_half_line_that_is_taken_back_is_no_replacement(log):
    log.append("request", "{}", 1)
    size = os.path.getsize(log.path)
    tail = log.tail()
    append_raw(log, b"LLM_RESP")
    assert [record.index for record in tail.read()] == [1]
    os.truncate(log.path, size)
    assert list(tail.read()) == []
    log.append("request", "{}", 2)
    assert [record.index for record in tail.read()] == [2]
    assert not tail.was_replaced


@pytest.mark.parametrize("left", [0, 5])
def test_cut_of_what_was_not_read_yet_is_noticed_where_it_is_counted_on(log, left):
    replaced = []
    tail = log.tail(on_replaced=lambda: replaced.append(True))
    log.append("request", "{}", 1)
    assert [record.index for record in tail.read()] == [1]
    tail.expect(log.append("request", "{}", 2))
    os.truncate(log.path, os.path.getsize(log.path) // 2 + left)
    assert [record.index for record in tail.read()] == [1] and replaced == [True]
    assert list(tail.read()) == [] and replaced == [True]


def test_log_that_was_emptied_and_has_grown_again_meanwhile_is_read_from_its_start(log):
    """As one that was removed: the next file often has its inode number."""
    log.append("request", "{}", 1)
    tail = log.tail()
    assert [record.index for record in tail.read()] == [1]
    os.truncate(log.path, 0)
    log.append("request", '{"longer":"than the first"}', 2)
    assert [record.index for record in tail.read()] == [2] and tail.was_replaced


def test_line_that_is_appended_while_the_file_is_looked_at_makes_it_no_shorter(log, monkeypatch):
    log.append("request", "{}", 1)
    tail, stat = log.tail(), os.stat
    assert [record.index for record in tail.read()] == [1]

    def slow_stat(path):
        monkeypatch.undo()
        info = stat(path)
        tail.expect(log.append("request", "{}", 2))
        return info

    monkeypatch.setattr(os, "stat", slow_stat)
    assert list(tail.read()) == []
    assert [record.index for record in tail.read()] == [2] and not tail.was_replaced


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_line_that_is_counted_on_and_gone_with_its_file_is_missed(log, is_made_anew):
    tail, replaced = log.tail(on_replaced=lambda: replaced.append(True)), []
    log.append("request", "{}", 1)
    assert [record.index for record in tail.read()] == [1]
    os.unlink(log.path)
    assert list(tail.read()) == [] and replaced == [True]
    tail.expect(log.append("request", '{"is":"longer"}', 2))
    os.truncate(log.path, 0)
    if is_made_anew:
        tail.expect(log.append("request", "{}", 3))
    else:
        os.unlink(log.path)
    assert [record.index for record in tail.read()] == [3] * is_made_anew and replaced == [True, True]


def test_record_at_an_offset_is_read_back(log):
    offset = log.append("request", "{}", 1)
    log.append("response", '{"r":1}', 1)
    assert log.record_at(offset).body == b'{"r":1}'
    assert log.record_at(offset + 1) is None
    assert log.record_at(10**9) is None


# The trainer's side -------------------------------------------------------------------------------------------------


def test_place_of_a_turn_is_found_from_the_end(log):
    for index in range(1, 6):
        log.append("request", '{"n":%d}' % index, index)
        if index < 5:
            log.append("response", '{"r":%d}' % index, index)
    place = log.find(3)
    assert place.request
    assert place.response.body == b'{"r":3}'
    assert place.next_request.body == b'{"n":4}'
    assert place.next_is_answered
    assert not place.has_ended
    assert place.end == os.path.getsize(log.path)
    assert log.find(0).next_request.body == b'{"n":1}'
    assert not log.find(6).request


def test_finding_the_last_turn_reads_only_the_end(log):
    body = '{"n":"%s"}' % ("x" * 100000)
    for index in range(1, 40):
        log.append("request", body, index)
    trap = _CountingFile(log.path)
    rock_ms.find_place(trap.fileno(), os.path.getsize(log.path), 39)
    read = trap.bytes_read()
    assert read <= 3 * rock_ms.SCAN_BLOCK_BYTES, "it read %d bytes of %d" % (read, os.path.getsize(log.path))


class _CountingFile:
    """Counts what this process reads, by the system's own account."""

    def __init__(self, path):
        self._file = open(path, "rb")
        self._before = self._total()

    def fileno(self):
        return self._file.fileno()

    def bytes_read(self):
        self._file.close()
        return self._total() - self._before

    @staticmethod
    def _total():
        with open("/proc/self/io") as file:
            return int(file.read().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("index, answered", [(1, []), (1, range(2, 200)), (100, range(1, 100)), (100, range(101, 200))])
def test_answering_one_of_many_that_wait_does_not_read_each_of_them(log, index, answered):
    for number in range(1, 200):
        log.append("request", "{}", number)
    for number in answered:
        log.append("response", "{}", number)
    read = []
    sys.setprofile(lambda frame, event, _: event == "call" and read.append(frame.f_code.co_name))
    try:
        place = log.append_response(index, "{}")
    finally:
        sys.setprofile(None)
    assert (place.request.index, place.next_request.index) == (index, index + 1)
    assert place.next_is_answered == (index + 1 in answered)
    assert read.count("parse_record") <= 3


def test_answer_is_written_once_however_often_it_is_given(log):
    log.append("request", "{}", 1)
    for answer in ('{"a":[1,2],"b":0}', '{"a":[1,2],"b":0}', '{"b": 0, "a": [1, 2]}'):
        log.append_response(1, rock_ms.compact_json(answer))
    assert records(log) == [("request", 1, "{}"), ("response", 1, '{"a":[1,2],"b":0}')]


@pytest.mark.parametrize("other", ['{"a":2}', '{"a":true}', '{"a":1.0}', '{"a":1,"b":0}'])
def test_another_answer_is_an_error_and_changes_nothing(log, other):
    log.append("request", "{}", 1)
    log.append_response(1, '{"a":1}')
    before = contents(log)
    with pytest.raises(RockError, match="request 1 already has another answer"):
        log.append_response(1, other)
    assert contents(log) == before


def test_answer_to_a_request_that_does_not_exist_is_an_error(log):
    with pytest.raises(UsageError, match="no request 1"):
        log.append_response(1, "{}")
    assert not os.path.exists(log.path)
    log.append("request", "{}", 1)
    with pytest.raises(UsageError, match="no request 2"):
        log.append_response(2, "{}")
    assert records(log) == [("request", 1, "{}")]


def test_answers_may_come_in_any_order(log):
    for index in (1, 2, 3):
        log.append("request", "{}", index)
    for index in (2, 3, 1):
        log.append_response(index, '{"n":%d}' % index)
    assert [log.find(index).response.body for index in (1, 2, 3)] == [b'{"n":1}', b'{"n":2}', b'{"n":3}']


def test_answer_closes_a_torn_line_that_holds_the_request(log):
    append_raw(log, encode_record("request", "{}", 1, 1)[:-1])
    log.append_response(1, '{"a":1}')
    assert records(log) == [("request", 1, "{}"), ("response", 1, '{"a":1}')]


def test_after_the_end_no_answer_is_written_and_the_end_is_heard(log):
    log.append("request", "{}", 1)
    log.append_session_end()
    place = log.append_response(1, '{"a":1}')
    assert ("response", 1, '{"a":1}') not in records(log)
    assert waiter(log).wait(2, place, 0) == "SESSION_END"


class Clock:
    """Time that passes only by sleeping; `on_sleep` happens meanwhile."""

    def __init__(self, on_sleep=lambda: None):
        self.now = 0.0
        self.sleeps = []
        self.on_sleep = on_sleep

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.sleeps.append(seconds)
        self.on_sleep()


def waiter(log, clock=None, alive=lambda: None):
    clock = clock or Clock()
    return RequestWaiter(log, 0.1, alive, clock, clock.sleep)


def test_waiting_prints_the_request_as_it_stands_in_the_log(log):
    clock = Clock(lambda: len(clock.sleeps) == 3 and log.append("request", '{"p":"SESSION_END"}', 1))
    assert waiter(log, clock).wait(1, Place(), None) == '{"p":"SESSION\\u005fEND"}'


def test_waiting_ends_with_not_yet_after_its_timeout_and_not_before(log):
    clock = Clock()
    with pytest.raises(NotYet, match="request 1 .* 2 s"):
        waiter(log, clock).wait(1, Place(), 2.0)
    assert 2.0 <= clock.now < 2.01


def test_waiting_with_timeout_zero_looks_once(log):
    clock = Clock()
    with pytest.raises(NotYet):
        waiter(log, clock).wait(1, Place(), 0)
    assert clock.sleeps == []
    log.append("request", "{}", 1)
    assert waiter(log, clock).wait(1, Place(), 0) == "{}"


def test_waiting_looks_often_at_first_and_never_less_than_every_interval(log):
    clock = Clock()
    with pytest.raises(NotYet):
        waiter(log, clock).wait(1, Place(), 60)
    assert clock.sleeps[0] == rock_ms.MIN_POLL_SECONDS
    assert max(clock.sleeps) <= 0.1
    assert clock.sleeps == sorted(clock.sleeps[:-1]) + clock.sleeps[-1:]


def test_waiting_gives_up_when_the_service_stays_away(log):
    clock = Clock()
    with pytest.raises(RockError, match="--resume"):
        waiter(log, clock, alive=lambda: False).wait(1, Place(), None)
    assert rock_ms.GONE_SECONDS < clock.now < rock_ms.GONE_SECONDS + 3


def test_waiting_for_a_service_that_was_never_there_has_no_limit(log):
    clock = Clock(lambda: clock.now > 1000 and log.append("request", "{}", 1))
    assert waiter(log, clock, alive=lambda: None).wait(1, Place(), None) == "{}"


def test_waiting_gives_up_when_the_service_was_there_and_was_stopped(log):
    clock = Clock()
    with pytest.raises(RockError, match="--resume"):
        waiter(log, clock, alive=lambda: True if clock.now < 5 else None).wait(1, Place(), None)
    assert 4 + rock_ms.GONE_SECONDS < clock.now < rock_ms.GONE_SECONDS + 8


def test_waiting_bears_a_service_that_comes_back(log):
    def on_sleep():
        if clock.now > 100:
            log.append_session_end()

    clock = Clock(on_sleep)
    answers = iter([False] * 20 + [True] + [False] * 20 + [True] * 1000)
    assert waiter(log, clock, alive=lambda: next(answers)).wait(1, Place(), None) == "SESSION_END"


def test_session_end_hides_a_request_that_was_never_answered(log):
    log.append("request", "{}", 1)
    log.append("request", "{}", 2)
    log.append_session_end()
    assert waiter(log).wait(2, log.find(1), 0) == "SESSION_END"
    assert waiter(log).wait(1, log.find(0), 0) == "SESSION_END"


def test_session_end_hides_no_request_that_was_answered(log):
    log.append("request", '{"n":1}', 1)
    log.append("response", "{}", 1)
    log.append_session_end()
    assert waiter(log).wait(1, log.find(0), 0) == '{"n":1}'
    assert waiter(log).wait(2, log.find(1), 0) == "SESSION_END"


def test_replaced_log_is_an_error_for_a_turn_in_mid_session(log, tmp_path):
    def replace():
        if clock.now > 1 and not (tmp_path / "old").exists():
            os.rename(log.path, str(tmp_path / "old"))
            log.append("request", "{}", 1)

    log.append("request", "{}", 1)
    log.append("response", "{}", 1)
    clock = Clock(replace)
    with pytest.raises(RockError, match="new session"):
        waiter(log, clock).wait(2, log.find(1), None)


def test_trainer_and_service_meet_through_the_file_alone(log):
    waiting = Later(lambda: RequestWaiter(log, 0.02, lambda: None).wait(1, Place(), None))
    assert not waiting.is_done()
    log.append("request", '{"n":1}', 1)
    wait_until(waiting.is_done)
    assert waiting.result() == '{"n":1}'
