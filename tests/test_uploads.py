"""Uploads: forms as clients send them, in whatever pieces; what is refused; and that no file is left of what is."""

import errno
import hashlib
import os
import random

import pytest

import rock_sdk
from rock_ms import ApiError, ProtocolError, StorageError

TYPE = "multipart/form-data; boundary=B"
FILE = b'Content-Disposition: form-data; name="files"; filename="a.txt"'
FIELD = b'Content-Disposition: form-data; name="uuid_str"'


def form(*parts, boundary=b"B"):
    """The body of a form.  parts: (header lines in one, content)."""
    heads = [b"--%s\r\n%s\r\n\r\n%s\r\n" % (boundary, head, content) for head, content in parts]
    return b"".join(heads) + b"--%s--\r\n" % boundary


def read(body, directory, content_type=TYPE, max_file_bytes=1000, max_files=3, pieces=None):
    """(fields, {file name: content}) of a form; nothing of it is left."""
    pieces = [body] if pieces is None else pieces
    with rock_sdk.read_upload(content_type, iter(pieces), str(directory), max_file_bytes, max_files) as upload:
        found = {}
        for file in upload.files:
            assert os.path.dirname(file.path) == str(directory)
            with open(file.path, "rb") as stored:
                found[file.name] = stored.read()
            digest = hashlib.sha256(found[file.name]).hexdigest()
            assert (file.size, file.digest) == (len(found[file.name]), digest)
        assert len(os.listdir(str(directory))) == len(upload.files)
    assert os.listdir(str(directory)) == []
    return upload.fields, found


def refusal(body, directory, **options):
    """(status, message) that a form is refused with; nothing of it is left."""
    with pytest.raises(ApiError) as error:
        read(body, directory, **options)
    assert os.listdir(str(directory)) == []
    return error.value.status, str(error.value)


# What clients send --------------------------------------------------------------------------------------------------

CURL = b"""--------------------------d74496d66958873e\r
Content-Disposition: form-data; name="uuid_str"\r
\r
zh\xc3\xa9\r
--------------------------d74496d66958873e\r
Content-Disposition: form-data; name="files"; filename="q\\"uote.md"\r
Content-Type: application/octet-stream\r
\r
# one\r
--------------------------d74496d66958873e--\r
"""
FIREFOX = b"""-----------------------------9051914041544843365972754266\r
Content-Disposition: form-data; name="files"; filename="100%25 %22\xe6\x96\x87\xe6\xa1\xa3%22.txt"\r
Content-Type: text/plain\r
\r
\r
-----------------------------9051914041544843365972754266--\r
"""
OLD_REQUESTS = b"""--1a2b\r
Content-Disposition: form-data; name="files"; filename*=utf-8''%E6%96%87%E6%A1%A3.txt\r
\r
x\r
--1a2b\r
Content-Disposition: form-data; name="files"; filename=plain.txt\r
\r
y\r
--1a2b--\r
"""
FORMS = {
    "curl": (CURL, "------------------------d74496d66958873e", {"uuid_str": "zhé"}, {'q"uote.md': b"# one"}),
    "firefox": (FIREFOX, "---------------------------9051914041544843365972754266", {}, {'100%25 "文档".txt': b""}),
    "old requests": (OLD_REQUESTS, "1a2b", {}, {"文档.txt": b"x", "plain.txt": b"y"}),
    "no parts": (b"--B--", "B", {}, {}),
    "preamble and epilogue": (b"hi\r\n--\r\n" + form((FIELD, b"u")) + b"\r\n--B\r\nbye", "B", {"uuid_str": "u"}, {}),
    "padding": (b"--B \t\r\n" + FIELD + b"\r\n\r\nu\r\n--B-- ", "B", {"uuid_str": "u"}, {}),
    "any case": (form((FIELD.swapcase(), b"u")), "B", {"UUID_STR": "u"}, {}),
    "other fields": (form((b"Content-Type: text/plain\r\n" + FIELD + b"\r\nX-Y: z", b"u")), "B", {"uuid_str": "u"}, {}),
    "near boundaries": (
        form((FILE, b"\r\n--\r\n--A\r\r\n-B--\r\n\r\n--b\n--B")),
        "B",
        {},
        {"a.txt": b"\r\n--\r\n--A\r\r\n-B--\r\n\r\n--b\n--B"},
    ),
    "boundary of RFC 2046": (form((FILE, b"x"), boundary=b"a '()+_,-./:=?b"), "a '()+_,-./:=?b", {}, {"a.txt": b"x"}),
}


@pytest.mark.parametrize("body, boundary, fields, files", FORMS.values(), ids=list(FORMS))
def test_form_is_read_in_whatever_pieces_it_comes(tmp_path, body, boundary, fields, files):
    content_type = 'Multipart/Form-Data; charset=utf-8; boundary="%s"' % boundary
    splits = [[body], [body[at : at + 1] for at in range(len(body))]]
    splits += [[body[:at], b"", body[at:]] for at in range(1, len(body), 1 + len(body) // 100)]
    for pieces in splits:
        assert read(body, tmp_path, content_type, pieces=pieces) == (fields, files)


def test_any_bytes_come_back_as_they_were(tmp_path):
    chance = random.Random(5)
    for _ in range(100):
        content = b"".join(chance.choice([b"\r", b"\n", b"-", b"--", b"A", b"\0", b"\r\n--"]) for _ in range(200))
        body, size = form((FILE, content)), chance.randrange(1, 9)
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        assert read(body, tmp_path, pieces=pieces) == ({}, {"a.txt": content})


def test_form_is_read_to_its_end_so_that_its_connection_can_be_used_again(tmp_path):
    pieces = iter([form((FILE, b"x")), b"bye" * 100, b"bye"])
    assert read(b"", tmp_path, pieces=pieces) == ({}, {"a.txt": b"x"})
    assert next(pieces, None) is None


def test_file_that_was_moved_away_stays(tmp_path):
    directory, kept = tmp_path / "uploads", tmp_path / "kept"
    directory.mkdir()
    with rock_sdk.read_upload(TYPE, [form((FILE, b"x"), (FILE, b"y"))], str(directory), 1, 2) as upload:
        os.rename(upload.files[0].path, str(kept))
    assert (kept.read_bytes(), os.listdir(str(directory))) == (b"x", [])


# What is refused ----------------------------------------------------------------------------------------------------

CONTENT_TYPES = {
    "none": (None, 415, "missing"),
    "json": ("application/json", 415, "application/json"),
    "mixed": ("multipart/mixed; boundary=B", 415, "multipart/mixed"),
    "no boundary": ("multipart/form-data", 400, "boundary"),
    "empty boundary": ('multipart/form-data; boundary=""', 400, "1 to 70"),
    "long boundary": ("multipart/form-data; boundary=" + "B" * 71, 400, "1 to 70"),
    "space at its end": ('multipart/form-data; boundary="B "', 400, "1 to 70"),
    "other characters": ('multipart/form-data; boundary="B\xe9"', 400, "1 to 70"),
    "two boundaries": ("multipart/form-data; boundary=B; boundary=C", 400, "boundary is given twice"),
    "malformed": ('multipart/form-data; boundary="B', 400, "is not '; name=value'"),
}


@pytest.mark.parametrize("content_type, status, words", CONTENT_TYPES.values(), ids=list(CONTENT_TYPES))
def test_other_content_type_is_refused_before_anything_is_read(tmp_path, content_type, status, words):
    got, message = refusal(b"", tmp_path, content_type=content_type, pieces=(1 / 0 for _ in range(1)))
    assert got == status and words in message


def named(name):
    return form((b'Content-Disposition: form-data; name="f"; filename="%s"' % name, b"x"))


DISPOSITION = b"Content-Disposition: form-data; "
MALFORMED = {
    "nothing": (b"", "the form: it ends before its last boundary"),
    "no boundary": (b"x" * 500, "the form: it ends"),
    "cut in its header": (form((FILE, b"x"))[:20], "part 1 of the form: it ends"),
    "cut in a file": (form((FIELD, b"u"), (FILE, b"x" * 500))[:400], "part 2 of the form: it ends"),
    "cut in its last boundary": (form((FILE, b"x"))[:-3], "part 1 of the form: behind the boundary"),
    "longer boundary": (form((FILE, b"x\r\n--Bx\r\ny")), "part 1 of the form: behind the boundary"),
    "longer last boundary": (form((FILE, b"x\r\n--B--x\r\ny")), "part 1 of the form: behind the boundary"),
    "no header": (b"--B\r\n\r\nx\r\n--B--", "its Content-Disposition is missing"),
    "no disposition": (form((b"Content-Type: text/plain", b"x")), "its Content-Disposition is missing"),
    "two dispositions": (form((FILE + b"\r\n" + FIELD, b"x")), "Content-Disposition is given twice"),
    "attachment": (form((b'Content-Disposition: attachment; name="f"', b"x")), "is attachment, and should be"),
    "no name": (form((DISPOSITION + b'filename="a"', b"x")), "it has no name"),
    "empty name": (form((DISPOSITION + b'name=""', b"x")), "it has no name"),
    "two names": (form((DISPOSITION + b"name=a; NAME=b", b"x")), "is given twice"),
    "open quote": (form((DISPOSITION + b'name="a', b"x")), "is not '; name=value'"),
    "folded": (form((FILE + b"\r\n more", b"x")), "' more' is not 'Name: value'"),
    "lone line feed": (form((FILE + b"\nX: y", b"x")), "is not 'Name: value'"),
    "no colon": (form((FILE + b"\r\nmore", b"x")), "'more' is not 'Name: value'"),
    "header not UTF-8": (named(b"\xff"), "its header is not UTF-8"),
    "field not UTF-8": (form((FIELD, b"a\xff")), "part 1 of the form: it is not UTF-8 at byte 1"),
    "field twice": (form((FIELD, b"a"), (FIELD, b"b")), "part 2 of the form: there is a field 'uuid_str' already"),
    "base64": (form((FILE + b"\r\nContent-Transfer-Encoding: base64", b"eA==")), "Encoding is base64"),
    "other charset": (form((DISPOSITION + b"name=f; filename*=latin1''a", b"x")), "is not UTF-8''TEXT"),
    "bad escape": (form((DISPOSITION + b"name=f; filename*=utf-8''a%2", b"x")), "is not UTF-8''TEXT"),
    "escapes not UTF-8": (form((DISPOSITION + b"name=f; filename*=utf-8''%ff", b"x")), "is not UTF-8''TEXT"),
    "escaped path": (form((DISPOSITION + b"name=f; filename*=utf-8''..%2Fa", b"x")), "'../a' is a path"),
    "escaped NUL": (form((DISPOSITION + b"name=f; filename*=utf-8''a%00", b"x")), "has a control character"),
    "plain name beside a path": (form((FILE + b"; filename*=utf-8''a%2Fb", b"x")), "'a/b' is a path"),
    "name is a path": (named(b"../../etc/passwd"), "is a path"),
    "name is absolute": (named(b"/etc/passwd"), "is a path"),
    "name of Windows": (named(b"C:\\a.txt"), "is a path"),
    "name is a dot": (named(b"."), "begins with a dot"),
    "name is two dots": (named(b".."), "begins with a dot"),
    "name is hidden": (named(b".profile"), "begins with a dot"),
    "name is empty": (named(b""), "a file has no name"),
    "name is a space": (named(b" "), "a file has no name"),
    "name with line feed": (named(b"a%0ab"), "has a control character"),
    "name with tab": (named(b"a\tb"), "has a control character"),
    "name with NUL": (named(b"a\0b"), "is not 'Name: value'"),
    "name with C1": (named("a\x85b".encode()), "is not 'Name: value'"),
    "long name": (named("文".encode() * 67), "is longer than 200 bytes"),
}


@pytest.mark.parametrize("body, words", MALFORMED.values(), ids=list(MALFORMED))
def test_malformed_form_is_refused_with_the_place_and_leaves_no_file(tmp_path, body, words):
    status, message = refusal(body, tmp_path)
    assert status == 400 and words in message
    assert (400, message) == refusal(body, tmp_path, pieces=[body[at : at + 1] for at in range(len(body))])


def test_longest_name_is_taken(tmp_path):
    assert read(named("文".encode() * 66 + b"ab"), tmp_path) == ({}, {"文" * 66 + "ab": b"x"})


def endless(beginning, piece=b"x" * 100):
    """A body whose reader must stop by itself."""
    yield beginning
    for _ in range(10_000):
        yield piece
    raise AssertionError("what is too much was read on")


TOO_MUCH = {
    "a file": (b"--B\r\n" + FILE + b"\r\n\r\n", "the file 'a.txt' is larger than 1000 bytes"),
    "a field": (b"--B\r\n" + FIELD + b"\r\n\r\n", "a field is longer than 65536 bytes"),
    "a header": (b"--B\r\n" + FILE, "its header is longer than 8192 bytes"),
    "files": (form(*[(FILE, b"x")] * 4)[:-7], "part 4 of the form: only 3 files are taken"),
    "fields": (form(*[(b"%sname=f%d" % (DISPOSITION, number), b"") for number in range(101)]), "only 100 fields"),
}


@pytest.mark.parametrize("beginning, words", TOO_MUCH.values(), ids=list(TOO_MUCH))
def test_too_much_is_refused_at_once(tmp_path, beginning, words):
    status, message = refusal(b"", tmp_path, pieces=endless(beginning))
    assert status == 413 and words in message


def test_largest_file_and_field_are_taken(tmp_path):
    fields, files = read(form((FIELD, b"u" * 65536), (FILE, b"x" * 1000)), tmp_path)
    assert [len(value) for value in (fields["uuid_str"], files["a.txt"])] == [65536, 1000]


@pytest.mark.parametrize("error", [ProtocolError(400, "cut off"), KeyboardInterrupt()])
def test_body_that_breaks_off_leaves_no_file(tmp_path, error):
    def pieces():
        yield form((FILE, b"x"))[:-7]
        yield b"\r\n--B\r\n" + FILE + b"\r\n\r\n" + b"y" * 500
        assert len(os.listdir(str(tmp_path))) == 2
        raise error

    with pytest.raises(type(error)):
        read(b"", tmp_path, pieces=pieces())
    assert os.listdir(str(tmp_path)) == []


def test_full_disk_is_a_storage_error_that_leaves_no_file(tmp_path, monkeypatch):
    class FullDisk:
        def __init__(self, descriptor, _):
            os.close(descriptor)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(rock_sdk, "open", FullDisk, raising=False)
    with pytest.raises(StorageError, match="No space left on device"):
        read(form((FILE, b"x")), tmp_path)
    assert os.listdir(str(tmp_path)) == []


def test_missing_directory_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="No such file or directory"):
        rock_sdk.read_upload(TYPE, [form((FILE, b"x"))], str(tmp_path / "none"), 1, 1)
