"""The modules are what their first page says: sections in order, and nothing that another takes the place of."""

import ast
import collections
import re

import pytest

import rock_ms
import rock_sdk


@pytest.fixture(params=[rock_ms, rock_sdk], ids=lambda module: module.__name__)
def module(request):
    return request.param


def source_of(module):
    with open(module.__file__, encoding="utf-8") as file:
        return file.read()


def test_contents_name_the_sections_in_order(module):
    banners = re.findall(r"^# ={20,}\n# ([A-Z][^:.\n]*)[:.]", source_of(module), re.MULTILINE)
    listed = [name.strip() for name in module.__doc__.rpartition("\n\n")[2].replace("\n", " ").split(" . ")]
    assert listed == banners


def test_no_function_or_class_is_defined_twice(module):
    defined = [node.name for node in ast.parse(source_of(module)).body if hasattr(node, "name")]
    assert [name for name, count in collections.Counter(defined).items() if count > 1] == []
