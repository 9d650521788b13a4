"""Documents and knowledge: what text is read from files, and which passages of it a question finds."""

import contextlib
import hashlib
import io
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import zipfile

import pytest

import rock_ms
import rock_sdk
from support import SCRIPT, TIMEOUT, clean_environ

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def read(tmp_path, name, data):
    path = tmp_path / "upload"
    path.write_bytes(data)
    return rock_sdk.document_text(str(path), name)


def refusal(tmp_path, name, data):
    with pytest.raises(rock_sdk.DocumentError) as caught:
        read(tmp_path, name, data)
    assert str(caught.value).startswith(name + ": ")
    assert str(tmp_path) not in str(caught.value)
    return str(caught.value)


def docx(body="", document=None, compression=zipfile.ZIP_DEFLATED, member="word/document.xml"):
    """A DOCX file."""
    if document is None:
        document = '<?xml version="1.0"?><w:document xmlns:w="%s"><w:body>%s</w:body></w:document>' % (WORD, body)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr(member, document)
    return file.getvalue()


def paragraph(text, style=None):
    properties = '<w:pPr><w:pStyle w:val="%s"/></w:pPr>' % style if style else ""
    return "<w:p>%s<w:r><w:t>%s</w:t></w:r></w:p>" % (properties, text)


TABLE = "<w:tbl><w:tr><w:tc>%s</w:tc><w:tc>%s</w:tc></w:tr></w:tbl>" % (paragraph("town"), paragraph("杭州"))

HTML = b"""<!DOCTYPE html><title>T</title><style>p{}</style><h2>Head</h2><p>One&nbsp;&amp; <b>two</b>
 three<br>four</p><script>if (a<b) {'</p>'}</script><!-- <p>no</p> --><ul><li>five<li>six</ul>7 < 8<pre>a
  b</pre>"""

READ = {
    "text": ("a.txt", "héllo 你好\r\nx".encode(), "héllo 你好\nx"),
    "ending in capitals": ("A.TXT", b"x", "x"),
    "utf-8 with its mark": ("a.md", b"\xef\xbb\xbf# x", "# x"),
    "utf-16": ("a.log", "你好".encode("utf-16"), "你好"),
    "utf-16 big-endian": ("a.rst", b"\xfe\xff" + "你好".encode("utf-16-be"), "你好"),
    "gb18030": ("a.txt", "你好，世界".encode("gb18030"), "你好，世界"),
    "escape sequences": ("a.log", b"\x1b[31m" + b"red" * 99, "[31m" + "red" * 99),
    "html": (
        "a.html",
        HTML,
        "# T\n\n## Head\n\nOne\xa0& two three\nfour\n\n- five\n- six\n\n7 < 8\n\na\n  b",
    ),
    "html table": ("a.htm", b"<table><tr><td>a<td>b</tr><tr><td>c</td></tr></table>", "| a | b\n | c"),
    "html left open": ("a.html", b"seen<script>never", "seen"),
    "html comment left open": ("a.html", b"seen<!-- never <p>", "seen"),
    "html with absurd references": ("a.html", b"a&#" + b"9" * 5000 + b";b&#x41;", "a\ufffdbA"),
    "csv": (
        "a.csv",
        b'name,price\nball,"1,5"\npen,2,more\n',
        "name\nprice\n\nname: ball\nprice: 1,5\n\nname: pen\nprice: 2\nmore",
    ),
    "csv by semicolons": ("a.csv", b"a;b\n1,5;2", "a\nb\n\na: 1,5\nb: 2"),
    "tsv": ("a.tsv", b"a,x\tb\n1\t2", "a,x\nb\n\na,x: 1\nb: 2"),
    "json": ("a.json", b'{"a": {"b": [1.10, true, null]}, "c": "d"}', "a.b[0]: 1.10\na.b[1]: true\na.b[2]: null\nc: d"),
    "json list": ("a.json", '[{"问": "几"}, "x\\u0001\\ud800y"]'.encode(), "问: 几\n\nx?y"),
    "json with a long key": ("a.json", b'{"' + b"k" * 300 + b'": {"a": 1}}', "k" * 198 + ".a: 1"),
    "jsonl": ("a.jsonl", b'{"a": 1}\n\n{"a": 2}\n', "a: 1\n\na: 2"),
    "docx": (
        "a.docx",
        docx(paragraph("Top", "Heading1") + paragraph("One &amp; 二") + TABLE + paragraph("end")),
        "# Top\n\nOne & 二\n\ntown | 杭州 | \n\nend",
    ),
    "docx signs": (
        "a.docx",
        docx("<w:p><w:t>-</w:t><w:tab w:pos='9'/><w:t>a</w:t><w:tab/><w:t>b</w:t><w:br/><w:t>c</w:t></w:p>"),
        "-a\tb\nc",
    ),
    "docx left out": (
        "a.docx",
        docx(paragraph("a") + "<w:p><w:delText>gone</w:delText><Fallback><w:t>again</w:t></Fallback></w:p>"),
        "a",
    ),
}


@pytest.mark.parametrize("name, data, text", READ.values(), ids=list(READ))
def test_document_is_read(tmp_path, name, data, text):
    assert read(tmp_path, name, data).strip() == text


DTD = '<!DOCTYPE x [<!ENTITY a "%s"><!ENTITY b "&a;&a;">]><x>&b;</x>' % ("a" * 100)

REFUSED = {
    "unknown kind": ("a.exe", b"x", "known are .csv, .docx, .htm, .html, .json, .jsonl, .log, .markdown, .md, .pdf"),
    "no ending": ("README", b"x", "cannot be read"),
    "empty": ("a.txt", b" \n", "no text"),
    "binary": ("a.txt", b"\x7fELF\x00\x01", "binary"),
    "control characters": ("a.txt", b"\x01\x02\x03\x04abc", "binary"),
    "no encoding": ("a.txt", b"caf\xe9 noir", "no text in UTF-8"),
    "cut utf-16": ("a.txt", b"\xff\xfea", "no text in UTF-8"),
    "json": ("a.json", b"{", "no JSON"),
    "json of many parts": ("a.json", b"[%s1]" % (b"1," * rock_sdk.MAX_JSON_PARTS), "more than 2000000 values"),
    "deep json": ("a.json", b"[" * 100000, "no JSON"),
    "jsonl": ("a.jsonl", b"1\n{\n", "no JSON: line 2"),
    "csv": ("a.csv", b"a\n" + b"x" * 200000, "line 2: field larger"),
    "docx that is no zip": ("a.docx", b"hello", "no readable DOCX file: File is not a zip file"),
    "docx without a document": ("a.docx", docx("x", member="other.xml"), "no readable DOCX"),
    "docx that is no xml": ("a.docx", docx(document="<w:document>"), "no readable DOCX"),
    "docx cut off": ("a.docx", docx(paragraph("x" * 500))[:-60], "no readable DOCX"),
    "docx with a dtd": ("a.docx", docx(document=DTD), "document type definition"),
    "docx with a dtd in utf-16": ("a.docx", docx(document=DTD.encode("utf-16")), "document type definition"),
    "docx packed otherwise": ("a.docx", docx("x", compression=zipfile.ZIP_BZIP2), "packed in a way"),
    "docx damaged": (
        "a.docx",
        docx(paragraph("x" * 500)).replace(b"\x00\x00word", b"\x01\x00word"),
        "no readable DOCX",
    ),
}


@pytest.mark.parametrize("name, data, said", REFUSED.values(), ids=list(REFUSED))
def test_document_is_refused_by_name_and_reason(tmp_path, name, data, said):
    assert said in refusal(tmp_path, name, data)


def test_encrypted_docx_is_refused(tmp_path):
    data = docx(paragraph("x")).replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00")
    assert "encrypted" in refusal(tmp_path, "a.docx", data)


def test_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(rock_sdk, "MAX_DOCX_BYTES", 100000)
    bomb = docx(paragraph(" " * 10_000_000))
    assert len(bomb) < 20000
    assert "unpacks to more than 100000 bytes" in refusal(tmp_path, "a.docx", bomb)


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.csv", b"%s,b\n" % (b"h" * 5000) + b"1,2\n" * 5000),
        ("a.txt", b"x" * 100001),
    ],
    ids=["csv", "txt"],
)
def test_text_is_bounded_whatever_a_small_file_becomes(tmp_path, monkeypatch, name, data):
    monkeypatch.setattr(rock_sdk, "MAX_TEXT_CHARACTERS", 100000)
    assert "characters of text" in refusal(tmp_path, name, data)


def test_large_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rock_sdk, "MAX_TEXT_FILE_BYTES", 10)
    assert "larger than 10 bytes" in refusal(tmp_path, "a.html", b"<p>" + b" " * 10)


def test_file_that_cannot_be_opened_is_our_failure(tmp_path):
    with pytest.raises(rock_ms.StorageError, match="No such file"):
        rock_sdk.document_text(str(tmp_path / "none"), "a.txt")


# ---- PDF, by programs that stand in for the real ones


@pytest.fixture
def pypdf(tmp_path, monkeypatch):
    """Makes a package of that name, in front of any other."""
    (tmp_path / "packages").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    return (tmp_path / "packages" / "pypdf.py").write_text


PAGES = """
class PdfReader:
    def __init__(self, path):
        assert open(path, "rb").read(5) == b"%%PDF-"
        self.pages = [self, self]

    def extract_text(self):
        %s
"""

PDF = b"%PDF-1.4 and so on"


def test_pdf_is_read_by_pypdf(tmp_path, pypdf):
    pypdf(PAGES % 'return "page \\u9875 \\ud800"')
    assert read(tmp_path, "a.PDF", PDF) == "page 页 ?\n\n" * 2


def test_pdf_is_read_by_pdftotext_where_there_is_no_pypdf(tmp_path, pypdf, monkeypatch):
    pypdf("raise ImportError")
    program = tmp_path / "pdftotext"
    program.write_text('#!/bin/sh\necho "$1 $2 $3 $4 $6"; cat "$5"; printf "\\fnext"')
    program.chmod(0o700)
    monkeypatch.setenv("PATH", "%s:/usr/bin:/bin" % tmp_path)
    assert read(tmp_path, "a.pdf", PDF) == "-q -enc UTF-8 -- -\n%s\n\nnext" % PDF.decode()


def test_pdf_without_a_reader_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs pypdf (pip install pypdf), or pdftotext" in refusal(tmp_path, "a.pdf", PDF)


@pytest.mark.load
@pytest.mark.parametrize(
    "body, said",
    [
        ("raise ValueError", "damaged or encrypted"),
        ("bytearray(2 << 30); return 'x'", "too much memory"),
        ("import time; time.sleep(60)", "takes longer than 1 s"),
        ("import os; [os.write(1, bytes(9999)) for _ in iter(int, 1)]", "more than 100000 bytes"),
    ],
    ids=["raises", "takes all memory", "never ends", "writes for ever"],
)
def test_pdf_that_its_reader_fails_at_is_refused(tmp_path, pypdf, monkeypatch, body, said):
    monkeypatch.setattr(rock_sdk, "MAX_TEXT_FILE_BYTES", 100000)
    if "sleep" in body:
        monkeypatch.setattr(rock_sdk, "PDF_SECONDS", 1)
    pypdf(PAGES % body)
    assert said in refusal(tmp_path, "a.pdf", PDF)


def test_pdf_that_is_none_is_given_to_no_reader(tmp_path, pypdf):
    pypdf(PAGES % 'return "read"')
    assert "no PDF file" in refusal(tmp_path, "a.pdf", b"hello")


# ---- Chunks and terms


def test_short_text_is_one_chunk():
    assert rock_sdk.chunks_of("one\n\ntwo\n") == ["one\n\ntwo"]
    assert rock_sdk.chunks_of(" \n ") == []


@pytest.mark.parametrize(
    "sentence, most",
    [("The same sentence again, number %d. ", 1000), ("这是第%d句话，内容都差不多。", 500)],
    ids=["en", "zh"],
)
def test_long_paragraph_is_cut_at_sentences_with_one_repeated(sentence, most):
    text = "".join(sentence % number for number in range(200))
    chunks = rock_sdk.chunks_of(text)
    assert all(most * 0.8 < len(chunk) < most * 1.2 for chunk in chunks[:-1])
    for before, after in zip(chunks, chunks[1:]):
        first = after[: after.index(sentence.strip()[-1]) + 1]
        assert before.endswith(first)
    assert all((sentence % number).strip() in "\n".join(chunks) for number in range(200))


def test_paragraph_that_fits_is_not_cut():
    paragraphs = ["%d %s." % (number, "word " * 60) for number in range(9)]
    chunks = rock_sdk.chunks_of("\n\n".join(paragraphs))
    assert [chunk.split("\n\n") for chunk in chunks] == [paragraphs[place : place + 3] for place in (0, 3, 6)]


def test_text_without_any_end_is_cut_where_it_must_be():
    assert [len(chunk) for chunk in rock_sdk.chunks_of("x" * 2500)] == [1000, 1000, 500]
    assert [len(chunk) for chunk in rock_sdk.chunks_of("字" * 1200)] == [500, 500, 200]


def test_chunk_begins_with_the_headings_above_it():
    text = "intro X\n# A\n## B\nb X\n## C X\n## D\nd X\n# E #\ne X\n\nF\n===\nf X\n# G X"
    expected = ["intro X", "A > B\nb X", "A > C X", "A > D\nd X", "E\ne X", "F\nf X", "G X"]
    long = "x" * (rock_sdk.MIN_CHUNK_WIDTH - 10)
    assert rock_sdk.chunks_of(text.replace("X", long)) == [chunk.replace("X", long) for chunk in expected]
    chunks = rock_sdk.chunks_of("# %s\n%s" % ("h" * 900, "word " * 500))
    assert all(chunk.startswith("h" * 200 + "\n") and len(chunk) <= 1000 for chunk in chunks)
    assert len(chunks) == 4


def test_small_sections_are_put_together():
    assert rock_sdk.chunks_of("# A\na\n# B\nb") == ["A\na\n\nB\nb"]
    assert len(rock_sdk.chunks_of("# x = 1\n" * 1000)) < 50


@pytest.mark.load
@pytest.mark.parametrize(
    "text",
    ["\n" * 300000, ". " * 300000, "# x\n" * 50000, "=\n" * 300000, "'\"." * 100000, "x=\n===" * 9999],
    ids=range(6),
)
def test_odd_text_loses_nothing_and_takes_no_undue_time(text):
    chunks = rock_sdk.chunks_of(text)
    assert set(text) - set("\n #=") <= set("".join(chunks))
    assert all(0 < len(chunk) <= 1000 for chunk in chunks)


TERMS = {
    "Hello, WORLD 42": ["hello", "world", "42"],
    "uuid_str ＡＢＣ": ["uuid", "str", "abc"],
    "version 3.7.16.": ["version", "3.7.16"],
    "高德天气API申请": ["高德", "德天", "天气", "api", "申请"],
    "猫 and 第3章": ["猫", "and", "第", "3", "章"],
    "Straße über мир": ["strasse", "über", "мир"],
    "カメラ 한국어": ["カメ", "メラ", "한국", "국어"],
    '" OR * NEAR( \x00 \ud800 -': ["or", "near"],
}


@pytest.mark.parametrize("text", list(TERMS))
def test_terms(text):
    assert rock_sdk.terms_of(text) == TERMS[text]


def test_question_leaves_out_what_any_question_has():
    assert rock_sdk.query_terms("How do I renew the license, the LICENSE?") == ["renew", "license"]
    assert rock_sdk.query_terms("请问高德的天气怎么申请") == ["高德", "天气", "申请"]
    assert rock_sdk.query_terms("what is this") == ["what", "is", "this"]
    assert rock_sdk.query_terms("什么") == ["什么"]
    words = ["w%d" % number for number in range(100000)]
    half = rock_sdk.MAX_QUERY_TERMS // 2
    assert rock_sdk.query_terms(" ".join(words)) == words[:half] + words[-half:]


# ---- Retrieval: 200 questions over 100 documents.  Each document is one of ten things seen from one of five sides, so
# that nine others have its sentences and four its thing; each also mentions another thing.

THINGS = [
    ("coffee machine", "咖啡机"),
    ("bicycle", "自行车"),
    ("washing machine", "洗衣机"),
    ("violin", "小提琴"),
    ("tent", "帐篷"),
    ("laptop", "笔记本电脑"),
    ("lawn mower", "割草机"),
    ("camera", "照相机"),
    ("fridge", "电冰箱"),
    ("fish tank", "鱼缸"),
]

SIDES = [  # (a document of a thing, two questions for it), in two languages
    (
        "# Cleaning the {0}\nWipe the {0} with a soft cloth every week. Twice a year, remove stains with vinegar.",
        "How often should {0}s be wiped?",
        "removing a stain from my {0}",
        "# {0}的清洁\n每周用软布擦拭{0}。每年两次用白醋去除顽固污渍。",
        "怎么清洁{0}？",
        "{0}上有污渍，用什么去除？",
    ),
    (
        "# Guarantee\nYour {0} is guaranteed for three years from the day of purchase. Keep the receipt of the {0}.",
        "How long does the guarantee of a {0} last?",
        "I lost the receipts, can my {0} still be guaranteed?",
        "# 质量保证\n{0}自购买之日起保修三年。请妥善保管{0}的发票。",
        "{0}的保修期是多长时间？",
        "发票丢了，{0}还能保修吗",
    ),
    (
        "# Storing the {0} in winter\nBefore the first frost, carry the {0} to a dry cellar and cover it loosely.",
        "Where do I store {0}s when winter comes?",
        "covering a {0} in the cellar",
        "# {0}的冬季存放\n第一次霜冻之前，请将{0}搬到干燥的地下室，并盖上罩子。",
        "冬天应该把{0}放在哪里存放？",
        "{0}能搬到地下室吗？",
    ),
    (
        "# Spare parts of the {0}\nSpare parts of the {0} are ordered by telephone and delivered free.",
        "ordering spare parts for the {0}",
        "When will parts of my {0} be delivered?",
        "# 配件订购（{0}）\n{0}的配件可以通过电话订购，十天内送货，免收运费。",
        "如何订购{0}的配件？",
        "{0}配件的运费是多少",
    ),
    (
        "# Complaints about noise\nIf the {0} rattles or squeaks, tighten its screws; a louder {0} has to be repaired.",
        "My {0} is squeaking, what can I do?",
        "noisy {0}: which screw do I tighten?",
        "# 噪音问题\n如果{0}发出异响，请拧紧螺丝；响声更大时，{0}需要送去维修。",
        "我的{0}有异响怎么办？",
        "{0}噪音大，要拧紧哪些螺丝？",
    ),
]


def corpus():
    """(name, text, its two questions) of each document."""
    for place, things in enumerate(THINGS):
        others = THINGS[place - 3]
        for number, side in enumerate(SIDES):
            for language in (0, 1):
                text, *questions = [words.format(things[language]) for words in side[3 * language : 3 * language + 3]]
                text += ("\n\nSee also what we say of the %s.", "\n\n另见关于%s的说明。")[language] % others[language]
                yield "%s-%d.md" % (things[language], number), text, questions


def test_right_file_comes_first_for_nearly_all_questions(base):
    documents = list(corpus())
    for name, text, _ in documents:
        put(base, "u", name, text)
    asked = [(name, question) for name, _, questions in documents for question in questions]
    assert (len(documents), len(asked)) == (100, 200)
    missed = [(name, question) for name, question in asked if found(base, question, limit=1) != [name]]
    assert len(missed) <= 10, missed  # twice as good as it has to be


# ---- The knowledge base


@pytest.fixture
def base(tmp_path):
    return rock_sdk.KnowledgeBase(str(tmp_path / "knowledge"))


def put(base, uuid_str, name, text):
    base.add(uuid_str, name, hashlib.sha256(text.encode("utf-8", "replace")).hexdigest(), text)


def found(base, query, uuid_str="u", **options):
    return [passage.file for passage in base.search(uuid_str, query, **options)]


def stored(base):
    """How many passages each file of the base has."""
    counts = []
    for name in sorted(os.listdir(base._path)):
        with contextlib.closing(sqlite3.connect(os.path.join(base._path, name))) as database:
            counts += database.execute("SELECT count(*) FROM passages").fetchone()
    return counts


def test_nobody_has_anything_at_first_and_asking_leaves_nothing(base):
    assert base.names("u") == base.search("u", "x") == []
    assert base.digest_of("u", "x") is None
    assert os.listdir(base._path) == []


def test_passage_says_where_it_is_from(base):
    put(base, "u", "a.txt", "# Pets\nCats sleep all day.")
    put(base, "u", "b.txt", "Dogs bark.")
    (passage,) = base.search("u", "sleeping cat")
    assert (passage.file, passage.text) == ("a.txt", "Pets\nCats sleep all day.")
    assert passage.score > 0
    assert base.names("u") == ["a.txt", "b.txt"]


def test_best_comes_first_and_no_more_than_wanted(base):
    for number in range(9):
        put(base, "u", "%d.txt" % number, "tea " + "water " * number + "cup" * (number == 5))
    passages = base.search("u", "tea cup", limit=3)
    assert len(passages) == 3
    assert passages[0].file == "5.txt"
    assert [passage.score for passage in passages] == sorted((passage.score for passage in passages), reverse=True)


def test_only_the_files_asked_for_are_searched(base):
    for name in ("a", "b", "c"):
        put(base, "u", name, "tea " + name)
    assert sorted(found(base, "tea")) == ["a", "b", "c"]
    assert sorted(found(base, "tea", names=["a", "c", "none", "\ud800"])) == ["a", "c"]
    assert found(base, "tea", names=[]) == found(base, "tea", names=["none"]) == []


def test_users_files_never_mix(base):
    put(base, "u", "a.txt", "tea is mine")
    put(base, "v", "a.txt", "tea is yours, and coffee")
    put(base, "../u", "b.txt", "tea of a path")
    assert [passage.text for passage in base.search("u", "tea coffee")] == ["tea is mine"]
    assert base.names("v") == ["a.txt"]
    assert found(base, "tea", "U") == found(base, "tea", "../v") == []
    assert len(os.listdir(base._path)) == 3
    assert os.listdir(os.path.dirname(base._path)) == ["knowledge"]


def test_ranking_does_not_depend_on_other_users(base):
    for name, text in (("a", "tea cup"), ("b", "coffee cup")):
        put(base, "u", name, text)
    before = base.search("u", "tea coffee cup")
    for number in range(20):
        put(base, "v", str(number), "tea %d" % number)
    assert base.search("u", "tea coffee cup") == before


def test_new_content_replaces_the_old_of_its_name(base):
    put(base, "u", "a", "tea\n\n" + "x " * 2000)
    put(base, "u", "b", "milk")
    first = base.digest_of("u", "a")
    put(base, "u", "a", "coffee")
    assert base.digest_of("u", "a") != first
    assert found(base, "tea") == []
    assert found(base, "coffee") == ["a"]
    assert stored(base) == [2]


def test_equal_contents_are_stored_once_and_found_by_each_name(base):
    for name in ("b", "a", "a"):
        put(base, "u", name, "tea")
    assert stored(base) == [1]
    assert found(base, "tea") == ["a"]
    assert found(base, "tea", names=["b"]) == ["b"]
    put(base, "u", "a", "coffee")
    assert found(base, "tea") == ["b"]
    put(base, "u", "b", "coffee")
    assert found(base, "tea") == []
    assert stored(base) == [1]


HOSTILE = [
    '"',
    '" OR terms : "a',
    "a*",
    "NEAR(a b)",
    "a AND",
    "digest : x",
    "-a",
    "^a",
    "{a",
    "\x00a",
    "\ud800 a",
    "';--",
    "(" * 999,
    "",
    "*",
]


@pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
def test_question_is_data(base, query):
    put(base, "u", "a", "apple")
    assert found(base, query + " apple") == ["a"]
    assert found(base, query) == []


def test_text_and_names_are_data(base):
    text = 'a"b NUL:\0 end'
    put(base, "u'; DROP TABLE names; \ud800", "n'\"; x", text)
    (passage,) = base.search("u'; DROP TABLE names; \ud800", "nul")
    assert (passage.file, passage.text) == ("n'\"; x", text)


def test_single_character_finds_the_words_that_begin_with_it(base):
    put(base, "u", "a", "猫咪很可爱")
    assert found(base, "猫") == ["a"]


def test_many_write_and_read_at_once(base):
    failures = []

    def work(number):
        try:
            for count in range(5):
                put(base, "u%d" % (number % 2), "%d-%d" % (number, count), "tea %d %d" % (number, count))
                assert found(base, "tea", "u%d" % (number % 2))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert failures == []
    assert stored(base) == [15, 15]


WRITER = """
import rock_sdk
base = rock_sdk.KnowledgeBase("knowledge")
base.add("u", "first", "1", "tea")
def chunks():
    for number in range(1000):
        yield "coffee %d" % number
    print("now", flush=True)
    while True:
        pass
rock_sdk.chunks_of = lambda text: chunks()
base.add("u", "second", "2", "")
"""


def test_what_was_added_survives_a_killed_writer_and_nothing_of_what_was_not(base, tmp_path):
    environ = clean_environ(PYTHONPATH=os.path.dirname(SCRIPT))
    command = [sys.executable, "-c", WRITER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ, cwd=str(tmp_path)) as writer:
        assert writer.stdout.readline() == b"now\n"
        assert found(base, "tea coffee") == ["first"]  # while another writes
        writer.send_signal(signal.SIGKILL)
    assert found(base, "tea coffee") == base.names("u") == ["first"]
    put(base, "u", "second", "coffee")
    assert found(base, "coffee") == ["second"]


def test_search_sees_one_state_while_another_replaces_what_it_finds(base, monkeypatch):
    put(base, "u", "a", "tea")
    contents_of = rock_sdk._contents

    def then_replaced(*words, **options):
        contents = contents_of(*words, **options)
        monkeypatch.undo()
        put(base, "u", "a", "coffee")
        return contents

    monkeypatch.setattr(rock_sdk, "_contents", then_replaced)
    assert found(base, "tea coffee") == ["a"]
    assert found(base, "tea") == []


def test_only_this_user_can_read_it(base):
    put(base, "u", "a", "tea")
    (name,) = os.listdir(base._path)
    assert stat.S_IMODE(os.stat(os.path.join(base._path, name)).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(base._path).st_mode) == 0o700


def test_what_cannot_be_used_is_named(base, tmp_path):
    put(base, "u", "a", "tea")
    (name,) = os.listdir(base._path)
    with open(os.path.join(base._path, name), "w") as file:
        file.write("no database\n" * 1000)
    for call in (lambda: base.search("u", "tea"), lambda: base.names("u"), lambda: put(base, "u", "b", "x")):
        with pytest.raises(rock_ms.StorageError, match="%s: .*not a database" % name):
            call()
    (tmp_path / "file").write_text("")
    with pytest.raises(rock_ms.StorageError, match="file: "):
        rock_sdk.KnowledgeBase(str(tmp_path / "file"))


def test_python_without_text_search_is_said(tmp_path, monkeypatch):
    class Bare(sqlite3.Connection):
        def execute(self, statement, *values):
            return super().execute(statement.replace("fts5", "fts99"), *values)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *words, **options: connect(*words, factory=Bare, **options))
    with pytest.raises(rock_ms.StorageError, match="cannot search texts: no such module"):
        rock_sdk.KnowledgeBase(str(tmp_path / "x"))
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    with pytest.raises(rock_ms.StorageError, match="needs SQLite"):
        rock_sdk.KnowledgeBase(str(tmp_path / "x"))


def test_retrieved_text_is_named_by_file_and_cut():
    passages = [rock_sdk.Passage("a.txt", "one", 2.0), rock_sdk.Passage("b.txt", "two", 1.0)]
    assert rock_sdk.retrieved_text(passages, 100) == "[a.txt]\none\n\n[b.txt]\ntwo"
    assert rock_sdk.retrieved_text(passages, 12) == "[a.txt]\n ..."
    assert rock_sdk.retrieved_text([], 100) == rock_sdk.retrieved_text(passages, 0) == ""
    assert all(len(rock_sdk.retrieved_text(passages, limit)) <= limit for limit in range(30))
