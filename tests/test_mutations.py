"""The list of planted mistakes is up to date; `python -m tests.mutations` plants them, here one of them is."""

import ast
from pathlib import Path

import pytest

from .mutations import MUTATIONS, mutated, notices, source_of

ENGINE = Path(__file__).parent / "engine"


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_mutation_can_be_planted_and_its_test_exists(name):
    mutation = MUTATIONS[name]
    plain = source_of(mutation).read_text(encoding="utf-8")
    assert ast.dump(ast.parse(mutated(mutation))) != ast.dump(ast.parse(plain))
    tests = (ENGINE / mutation.test).read_text(encoding="utf-8")
    named = [node.name for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.FunctionDef)]
    assert any(mutation.by.partition(" and ")[0] in test for test in named)


def test_a_planted_mistake_is_noticed():
    noticed, line = notices("less is better forgotten")
    assert noticed and "test_less_is_better_for_lpips" in line
