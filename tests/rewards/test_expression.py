"""The canonical form of expressions, and the parser."""

from __future__ import annotations

import ast
import re
from fractions import Fraction
from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_flowrl.rewards.expression import (
    LONGEST_TEXT,
    MOST_NUMBERS,
    NotAnExpression,
    number,
    parse_expression,
)

Tree = int | tuple[str, "Tree", "Tree"]
TREES: st.SearchStrategy[Tree] = st.recursive(
    st.integers(0, 6), lambda part: st.tuples(st.sampled_from("+-*/"), part, part), max_leaves=9
)


def text_of(tree: Tree) -> str:
    return str(tree) if isinstance(tree, int) else f"({text_of(tree[1])}{tree[0]}{text_of(tree[2])})"


def key_of(tree: Tree) -> str | None:
    try:
        return parse_expression(text_of(tree))[0].key
    except NotAnExpression:
        return None


def value_of(text: str) -> Fraction:
    """By Python's own parser, in exact arithmetic."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)  # type: ignore[arg-type]
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        assert isinstance(node, ast.BinOp)
        left, right = value(node.left), value(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        return left * right if isinstance(node.op, ast.Mult) else left / right

    return value(ast.parse(text, mode="eval").body)


def _rules(tree: tuple[str, Tree, Tree]) -> list[Tree]:
    """The laws under which the key stays, applied at the root."""
    operator, a, b = tree
    found: list[Tree] = []
    if operator in "+*":
        found.append((operator, b, a))
    inverse = {"+": "-", "-": "+", "*": "/", "/": "*"}[operator]
    if isinstance(b, tuple) and b[0] in (operator, inverse):
        _, c, d = b
        direct = operator in "+*"
        found.append((b[0] if direct else inverse if b[0] == operator else operator, (operator, a, c), d))
    if isinstance(a, tuple) and a[0] in "+-" and operator in "+-":
        found.append((a[0], (operator, a[1], b), a[2]))  # (x - y) + b = (x + b) - y
    if isinstance(a, tuple) and a[0] in "*/" and operator in "*/":
        found.append((a[0], (operator, a[1], b), a[2]))
    if operator in "+-" and isinstance(b, tuple) and b[0] in "*/":
        for place in (1, 2):  # a - c * (d - e) = a + c * (e - d)
            inner = b[place]
            if isinstance(inner, tuple) and inner[0] == "-":
                turned = ("-", inner[2], inner[1])
                other: Tree = (b[0], turned, b[2]) if place == 1 else (b[0], b[1], turned)
                found.append((inverse, a, other))
    return found


def rewritten(tree: Tree, random: Random) -> Tree:
    """An expression that the laws make of it."""
    if isinstance(tree, int):
        return tree
    tree = (tree[0], rewritten(tree[1], random), rewritten(tree[2], random))
    choices = _rules(tree)
    return random.choice(choices) if choices and random.random() < 0.7 else tree


@given(TREES, st.randoms(use_true_random=False))
def test_commuted_and_reassociated_forms_have_one_key(tree: Tree, random: Random) -> None:
    assume(key_of(tree) is not None)
    other = tree
    for _ in range(4):
        other = rewritten(other, random)
        assert key_of(other) == key_of(tree)


@given(TREES)
def test_a_key_has_the_value_of_its_expression(tree: Tree) -> None:
    try:
        value = value_of(text_of(tree))
    except ZeroDivisionError:
        assert key_of(tree) is None
        return
    expression, numbers = parse_expression(text_of(tree))
    assert expression.value == value == value_of(expression.key)
    assert sorted(numbers) == sorted(int(digits) for digits in re.findall("[0-9]+", expression.key))


@given(TREES, TREES)
def test_expressions_of_different_values_have_different_keys(a: Tree, b: Tree) -> None:
    keys = key_of(a), key_of(b)
    if None not in keys and value_of(text_of(a)) != value_of(text_of(b)):
        assert keys[0] != keys[1]


@given(TREES)
def test_a_key_is_its_own_key(tree: Tree) -> None:
    key = key_of(tree)
    if key is not None and not key.startswith("-"):
        assert parse_expression(key)[0].key == key


@pytest.mark.parametrize(
    "same",
    [
        ("1+2+3", "3+(2+1)", "(2+3)+1"),
        ("8-(3-2)", "2+(8-3)", "8-3+2", "8+2-3"),
        ("6/(3/2)", "2*6/3", "6/3*2", "2/(3/6)"),
        ("7-2*(1-4)", "7+(4-1)*2", "2*(4-1)+7"),
        ("(1-5)*2", "2*(1-5)"),
        ("(5-3)*(1-1)", "(3-5)*(1-1)"),
        ("4-(2-2)*3", "4+(2-2)*3"),
        ("1 × (2 \N{MINUS SIGN} 3) ÷ 4", "1*(2-3)/4", " ( ( 1*(2-3) ) )\t/\n4"),  # noqa: RUF001
        ("007", "7"),
    ],
)
def test_forms_that_are_one(same: tuple[str, ...]) -> None:
    assert len({parse_expression(text)[0].key for text in same}) == 1


@pytest.mark.parametrize(
    "different",
    [
        ("2*(3+4)", "2*3+2*4"),
        ("5*1", "5/1"),
        ("4+4", "2*4"),
        ("1-2", "2-1"),
        ("2/3", "3/2"),
        ("(1+2)*3", "1+2*3"),
        ("12+3", "1+23"),
        ("5-0", "5+0"),
    ],
)
def test_forms_that_are_not(different: tuple[str, ...]) -> None:
    assert len({parse_expression(text)[0].key for text in different}) == len(different)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("3+5*7", "3+5*7", 38),
        ("7*5+3", "3+5*7", 38),
        ("10-4-3", "10-3-4", 3),
        ("1-5", "1-5", -4),
        ("2*(1-5)", "-2*(5-1)", -8),
        ("100/10/5", "100/5/10", 2),
        ("8/(3-8/3)", "8/(3-8/3)", 24),
    ],
)
def test_precedence_and_the_key_as_text(text: str, key: str, value: int) -> None:
    expression, _ = parse_expression(text)
    assert (expression.key, expression.value) == (key, value)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "()", "1+", "+1", "-1", "1--2", "1(2)", "(1)2", "1 2", "(1", "1)", "1++2", "2**3", "2^3", "1,000",
        "1.5", "x", "1\0+2", "1/0", "1/(2-2)", "0/0", "1" * 21, "²", "\N{ARABIC-INDIC DIGIT ONE}",
        "__import__('os')", "1 if 1 else 2", "1=1",
    ],
)  # fmt: skip
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(NotAnExpression):
        parse_expression(text)


@given(st.text(alphabet="0123456789+-*/() =.x\0", max_size=40))
def test_any_text_is_an_expression_or_refused(text: str) -> None:
    try:
        expression, _ = parse_expression(text)
    except NotAnExpression:
        return
    without_leading_zeros = re.sub(r"(?<![0-9])0+(?=[0-9])", "", text.strip())
    assert expression.value == value_of(without_leading_zeros)


def test_hostile_texts_are_refused_or_read_in_no_time() -> None:
    deep = "(" * 10_000 + "1" + ")" * 10_000
    assert parse_expression(deep)[0].key == "1"
    for text in (deep[1:], deep[:-1], "(" * 3000, "9" * 10_000_000, "+".join("1" * 10_000), "1" * (LONGEST_TEXT + 1)):
        with pytest.raises(NotAnExpression):
            parse_expression(text)
    most = "+".join(["1"] * MOST_NUMBERS)
    assert parse_expression(most)[0].key == most


def test_a_leaf_is_not_negative() -> None:
    with pytest.raises(ValueError, match="-1 is negative"):
        number(-1)
