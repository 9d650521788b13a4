"""Never guessed: whatever our YAML reader accepts, PyYAML reads as the very same value."""

import random

import pytest
import yaml
from rock_ms import parse_yaml

SEEDS, TEXTS_PER_SEED = range(10), 600

WORDS = """host port api_key type local 8080 0 -1 +7 007 0o17 0x1F 0b1 1_000 1:30 190:20:30 1.5 -0.25 3. .5 1e3 1.0e+3
6.02e23 . .. ... - -- --- ? ! & * | > % @ ` = << ~ null Null NULL nUll true True TRUE tRUE yes Yes no off On y N .inf -.INF
.nan 2024-01-02 2024-1-2T03:04:05Z 12:30:45 http://a/b?c#d a:b :a a: a#b #a a- -a ?a !a &a *a |a >a a,b a[b a]b a{b
a}b [] {} ' " '' "" \\ \\n é 😀 $x a'b a"b 'it''s' "a\\"b" "\\x41" "\\u00e9" "\\q" "\\" 'a: b' "c # d" [a] {a:b}""".split()
PUNCTUATION = [": ", ":", " #", "#", ", ", ",", "[", "]", "{", "}", "'", '"', "-", "- ", "? ", "\\", "&", "*", "!", "|"]
PUNCTUATION += [
    ">",
    "%",
    "@",
    "`",
    " ",
    "  ",
    "\t",
    "\n",
    "\n  ",
    "\r\n",
    "\r",
    "---",
    "...",
    "\n---\n",
    "\u2028",
    "\x85",
]
PUNCTUATION += ["\ufeff", "\0", "\x7f", "\xa0", "\x0c", "0", "1", ".", "_", "e", "+", "~", "=", "<<", "<<: "]


class Author:
    """Writes random texts, most of them YAML."""

    def __init__(self, seed):
        self._random = random.Random(seed)
        self._choice, self._chance = self._random.choice, self._random.random

    def text(self):
        end = self._choice(["\n", "\n", "\n", "\r\n", "\r"])
        lines = self._block(self._choice([0, 0, 0, 2]), 0)
        if self._chance() < 0.1:
            lines.insert(0, self._choice(["---", "# about", "", "--- ", "---  # x"]))
        text = end.join(lines) + self._choice(["", end])
        for _ in range(self._choice([0, 0, 1, 1, 2, 4])):
            text = self._mutate(text)
        return text

    def _mutate(self, text):
        at = self._random.randint(0, len(text))
        cut = self._choice([0, 0, 1, 2])
        return text[:at] + self._choice([self._choice(PUNCTUATION), self._word(), ""]) + text[at + cut :]

    def _word(self):
        kind = self._chance()
        if kind < 0.6:
            return self._choice(WORDS)
        if kind < 0.8:
            return " ".join(self._choice(WORDS) for _ in range(2))
        return "".join(self._choice("01289._-+:eExa~ ") for _ in range(self._random.randint(1, 6))).strip() or "a"

    def _scalar(self):
        kind = self._chance()
        if kind < 0.7:
            return self._word()
        if kind < 0.85:
            return "'%s'" % self._word().replace("'", "''")
        return '"%s"' % self._word().replace("\\", "\\\\").replace('"', '\\"')

    def _flow(self, depth):
        kind = self._chance() if depth < 3 else 1
        between = self._choice([",", ", ", " , "])
        items = [self._flow(depth + 1) for _ in range(self._choice([0, 1, 2, 3]))] if kind < 0.5 else []
        if kind < 0.25:
            return "[%s%s]" % (between.join(items), self._choice(["", "", ",", " "]))
        if kind < 0.5:
            colon = self._choice([": ", ": ", ":", " : "])
            return "{%s}" % between.join(self._scalar() + colon + item for item in items)
        return self._scalar()

    def _inline(self):
        value = self._flow(0) if self._chance() < 0.3 else self._scalar()
        return value + (self._choice(["  # note", " #", "#"]) if self._chance() < 0.1 else "")

    def _block(self, indent, depth):
        kind = self._chance()
        if depth > 2 or kind < 0.1:
            return [" " * indent + self._inline()]
        lines = []
        for _ in range(self._choice([1, 1, 2, 3])):
            lines += self._item(indent, depth) if kind < 0.45 else self._entry(indent, depth)
            if self._chance() < 0.05:
                lines.append(self._choice(["", "# note", "   # note", "  "]))
        return lines

    def _entry(self, indent, depth):
        head = " " * indent + (self._scalar() if self._chance() < 0.5 else "k%d" % self._random.randint(0, 99))
        head += self._choice([":", ":", ":", " :"])
        if self._chance() < 0.6:
            return [head + self._choice([" ", " ", "  "]) + self._inline()]
        return [head + self._choice(["", "", " ", " # x"])] + self._block(
            indent + self._choice([0, 1, 2, 2, 4]), depth + 1
        )

    def _item(self, indent, depth):
        head = " " * indent + "-"
        if self._chance() < 0.5:
            return [head + " " + self._inline()]
        if self._chance() < 0.3:
            return [head] + self._block(indent + self._choice([1, 2]), depth + 1)
        first, *rest = self._block(indent + 2, depth + 1)
        return [head + " " + first.lstrip(" ")] + rest


def typed(value):
    """A value in which 1, 1.0 and True differ, and the order of keys counts."""
    if isinstance(value, dict):
        return [(typed(key), typed(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [list] + [typed(item) for item in value]
    return type(value), repr(value)


def outcome(read, text, refusal):
    """("value", what was read) or ("refused", why)."""
    try:
        return "value", typed(read(text))
    except refusal as error:
        return "refused", str(error)


def refused_by_pyyaml():
    # PyYAML raises ValueError for dates that do not exist and for \U escapes out of range.
    return (yaml.YAMLError, ValueError)


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_is_accepted_pyyaml_reads_as_the_same_value(seed):
    author, accepted = Author(seed), 0
    for _ in range(TEXTS_PER_SEED):
        text = author.text()
        kind, value = outcome(parse_yaml, text, ValueError)
        if kind == "refused":
            assert value.startswith("line "), (text, value)
            continue
        accepted += 1
        assert outcome(yaml.safe_load, text, refused_by_pyyaml()) == ("value", value), text
    assert accepted > TEXTS_PER_SEED / 5, "the generator writes too little that is accepted to prove anything"


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("place", ["%s", "k: %s", "%s: v", "- %s", "- %s: v", "[%s]", "[a, %s ]", "{k: %s}", "{%s: v}"])
def test_each_word_in_each_place_is_pyyaml_s_value_or_refused(word, place):
    text = place % word
    kind, value = outcome(parse_yaml, text, ValueError)
    if kind == "value":
        assert outcome(yaml.safe_load, text, refused_by_pyyaml()) == ("value", value)
