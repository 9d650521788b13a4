"""The modules are what their first page says: sections in order, and nothing that another takes the place of."""

import ast
import collections
import re

import pytest

import rock_ms
import rock_sdk

BANNER = re.compile(r"^# ={20,}\n# ([A-Z][^:.\n]*)[:.]", re.MULTILINE)
# ROCK's own Sandbox has an agent, too.
FROM_BELOW = {("Sandboxes", "RockAgent")}


@pytest.fixture(params=[rock_ms, rock_sdk], ids=lambda module: module.__name__)
def module(request):
    return request.param


def source_of(module):
    with open(module.__file__, encoding="utf-8") as file:
        return file.read()


def sections_of(source):
    """The sections' names, and which of them each top-level statement stands in: (section's number, statement)."""
    found = [(source[: match.start()].count("\n") + 1, match.group(1)) for match in BANNER.finditer(source)]
    starts = [line for line, _ in found]
    nodes = [(sum(start <= node.lineno for start in starts), node) for node in ast.parse(source).body]
    return ["", *(name for _, name in found)], nodes


def names_defined_by(node):
    if hasattr(node, "name"):
        return [node.name]
    return [name.id for target in getattr(node, "targets", ()) for name in ast.walk(target) if hasattr(name, "id")]


def names_used_in(node):
    """The names that a statement reads and does not make; annotations aside, which are never evaluated."""
    for part in ast.walk(node):
        part.annotation = part.returns = None
    names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
    made = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
    made.update(part.arg for part in ast.walk(node) if isinstance(part, ast.arg))
    return {name.id for name in names} - made


def test_contents_name_the_sections_in_order(module):
    banners = BANNER.findall(source_of(module))
    listed = [name.strip() for name in module.__doc__.rpartition("\n\n")[2].replace("\n", " ").split(" . ")]
    assert listed == banners


def test_each_section_uses_only_what_stands_above_it(module):
    sections, nodes = sections_of(source_of(module))
    homes = {}
    for number, node in nodes:
        homes.update((name, number) for name in names_defined_by(node) if name not in homes)
    used = {(number, name) for number, node in nodes for name in names_used_in(node)}
    from_below = {(sections[number], name) for number, name in used if homes.get(name, 0) > number}
    assert from_below == FROM_BELOW & from_below
    assert len(homes) > 500


def test_no_function_or_class_is_defined_twice(module):
    defined = [node.name for node in ast.parse(source_of(module)).body if hasattr(node, "name")]
    assert [name for name, count in collections.Counter(defined).items() if count > 1] == []
