"""What finding passages costs: an index of some thousand chunks, made of two languages, asked 200 questions.

python tests/bench/bench_knowledge.py [CHUNKS] [OTHER_USERS]
"""

import os
import random
import statistics
import sys
import tempfile
import time

sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]

import rock_sdk  # noqa: E402

LATIN = [
    a + b + c + d
    for a in ("b", "d", "fl", "k", "pr")
    for b in "aeiou"
    for c in "lmnrst"
    for d in ("ow", "ter", "ing", "ed")
]
LATIN += [one + two for one in LATIN[:120] for two in LATIN[:40]]
HAN = [chr(0x4E00 + place) for place in range(3000)]


def text_of(chance, is_chinese):
    """A chunk's text, its words as unequally frequent as those of a language."""
    words, length, space = (HAN, 420, "") if is_chinese else (LATIN, 140, " ")
    weights = [1 / (place + 3) for place in range(len(words))]
    picked = chance.choices(words, weights, k=length)
    ends = ("。" if is_chinese else ".", "")
    return space.join(word + ends[place % 15 > 0] for place, word in enumerate(picked))


def question_of(chance, text):
    start = chance.randrange(len(text) - 40)
    return text[start : start + (15 if text[start] > "z" else 45)]


def fill(base, uuid_str, chunks, chance):
    texts = []
    for number in range(0, chunks, 50):
        texts.append("\n\n".join(text_of(chance, number % 100) for _ in range(50)))
        base.add(uuid_str, "%d.txt" % number, "%064x" % number, texts[-1])
    return texts


def main():
    chunks = int(sys.argv[1]) if len(sys.argv) > 1 else 5000
    others = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as directory:
        base = rock_sdk.KnowledgeBase(directory)
        began = time.perf_counter()
        texts = fill(base, "user", chunks, chance)
        adding = time.perf_counter() - began
        for number in range(others):
            fill(base, "other%d" % number, 100, chance)
        count = sum(len(rock_sdk.chunks_of(text)) for text in texts)
        searched = []
        for names in (None, ["0.txt", "50.txt"]):
            seconds = []
            for _ in range(200):
                question = question_of(chance, chance.choice(texts))
                began = time.perf_counter()
                base.search("user", question, names)
                seconds.append(time.perf_counter() - began)
            searched += [1000 * statistics.median(seconds), 1000 * sorted(seconds)[-10]]
    shown = (count, sum(map(len, texts)) / 1e6, adding, *searched)
    print("%d chunks (%.1f million characters) added in %.1f s" % shown[:3])
    print("a search takes %.1f ms (19 of 20: at most %.1f ms), in two files %.1f ms (%.1f ms)" % shown[3:])


if __name__ == "__main__":
    main()
