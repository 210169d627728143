"""Arithmetic expressions: exact values, a canonical form, and a parser that takes any text without harm.

Two expressions have the same canonical form where commutativity and associativity of + and * make one of the other,
with a - b read as a + (-b) and a / b as a * (1 / b), and signs multiplied out of and into sums and products:

    1+2+3 = 3+(2+1)     8-(3-2) = 2+(8-3)     6/(3/2) = 2*6/3     7-2*(1-4) = 7+(4-1)*2

What needs more than that stays different: 2*(3+4) and 2*3+2*4, 5*1 and 5/1, 4+4 and 2*4. Equal forms have equal
values. The form is built from the leaves up: a chain of + and - is one sum of signed terms, a chain of * and / one
product of factors and divisors, both sorted; a sum is kept so that its value is not negative, and the sign that this
takes goes to what it stands in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from fractions import Fraction
from typing import NamedTuple

LONGEST_TEXT = 100_000
"""Characters; a longer text is no expression."""

MOST_NUMBERS = 64
"""Numbers in an expression; a text with more is none."""

_DIGITS = 20
_TOKEN = re.compile(rf"\s*(?:([0-9]{{1,{_DIGITS}}})|([-+*/()]))")
_SIGNS = str.maketrans({"\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-"})


class NotAnExpression(ValueError):
    """The text is no expression, or divides by zero; the argument says where."""


class _Kind(Enum):
    NUMBER = 0
    SUM = 1
    PRODUCT = 2


class _Body(NamedTuple):
    kind: _Kind
    parts: tuple[tuple[int, _Body], ...]  # sum: (1 or -1, term), product: (1 or -1 as exponent, factor); sorted
    size: Fraction  # the value, never negative
    text: str
    symmetric: bool  # 3-3, and what has it as a factor, is its own negative, and so has no sign


class Expression(NamedTuple):
    """A canonical form: `sign` times `body`."""

    sign: int
    body: _Body

    @property
    def value(self) -> Fraction:
        """The exact value."""
        return self.sign * self.body.size

    @property
    def key(self) -> str:
        """The canonical form as text, the same for equal forms only."""
        if self.sign > 0:
            return self.body.text
        if self.body.kind is _Kind.SUM:
            return _sum_text(_flipped(self.body.parts))
        return f"-{self.body.text}"


def number(value: int) -> Expression:
    """A leaf. Raises ValueError for a negative number."""
    if value < 0:
        raise ValueError(f"{value} is negative")
    return Expression(1, _Body(_Kind.NUMBER, (), Fraction(value), str(value), False))


def add(a: Expression, b: Expression) -> Expression:
    """a + b."""
    parts = _sorted([*_terms(a), *_terms(b)])
    value = sum((sign * body.size for sign, body in parts), Fraction(0))
    flipped = _flipped(parts)
    if value < 0 or (value == 0 and _rank(flipped) < _rank(parts)):
        return Expression(-1, _Body(_Kind.SUM, flipped, -value, _sum_text(flipped), False))
    return Expression(1, _Body(_Kind.SUM, parts, value, _sum_text(parts), flipped == parts))


def subtract(a: Expression, b: Expression) -> Expression:
    """a - b."""
    return add(a, b if b.body.symmetric else Expression(-b.sign, b.body))


def multiply(a: Expression, b: Expression) -> Expression:
    """a * b."""
    return _product(a, b, _factors(b.body), a.body.size * b.body.size)


def divide(a: Expression, b: Expression) -> Expression:
    """a / b. Raises ZeroDivisionError."""
    inverse = [(-power, factor) for power, factor in _factors(b.body)]
    return _product(a, b, inverse, a.body.size / b.body.size)


OPERATIONS: Mapping[str, Callable[[Expression, Expression], Expression]] = {
    "+": add,
    "-": subtract,
    "*": multiply,
    "/": divide,
}


def parse_expression(text: str) -> tuple[Expression, list[int]]:
    """The canonical form, and the numbers in the order in which they stand.

    Numbers are written in the digits 0-9, at most 20 of them; + - * /, or the
    multiplication, division and minus signs of Unicode, stand between two operands: there is no unary minus. Nothing is
    evaluated but these, and no nesting is too deep. Raises NotAnExpression.
    """
    if len(text) > LONGEST_TEXT:
        raise NotAnExpression(f"{len(text)} characters, and at most {LONGEST_TEXT} are read")
    tokens = _tokens(text.translate(_SIGNS).rstrip())
    numbers = [int(token) for token in tokens if token.isdigit()]
    if len(numbers) > MOST_NUMBERS:
        raise NotAnExpression(f"{len(numbers)} numbers, and at most {MOST_NUMBERS} are read")
    try:
        return _evaluated(tokens), numbers
    except ZeroDivisionError:
        raise NotAnExpression("it divides by zero") from None


def _tokens(text: str) -> list[str]:
    tokens, place = [], 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise NotAnExpression(f"character {place + 1} does not belong there")
        tokens.append(match[1] or match[2])
        place = match.end()
    return tokens


def _evaluated(tokens: list[str]) -> Expression:
    """Dijkstra's two stacks: no recursion."""
    operands: list[Expression] = []
    operators: list[str] = []

    def apply() -> None:
        right = operands.pop()
        operands.append(OPERATIONS[operators.pop()](operands.pop(), right))

    operand_next = True
    for token in tokens:
        if operand_next != (token.isdigit() or token == "("):
            raise NotAnExpression(f"{token!r} does not belong there")
        if token == "(":
            operators.append(token)
        elif token.isdigit():
            operands.append(number(int(token)))
            operand_next = False
        elif token == ")":
            while operators and operators[-1] != "(":
                apply()
            if not operators:
                raise NotAnExpression("a parenthesis too many is closed")
            operators.pop()
        else:
            while operators and _precedence(operators[-1]) >= _precedence(token):
                apply()
            operators.append(token)
            operand_next = True
    if operand_next:
        raise NotAnExpression("a number is missing at the end")
    while operators:
        if operators[-1] == "(":
            raise NotAnExpression("a parenthesis is not closed")
        apply()
    return operands[0]


def _precedence(operator: str) -> int:
    return {"(": 0, "+": 1, "-": 1}.get(operator, 2)


def _product(a: Expression, b: Expression, factors: Iterable[tuple[int, _Body]], size: Fraction) -> Expression:
    parts = _sorted([*_factors(a.body), *factors])
    symmetric = a.body.symmetric or b.body.symmetric
    body = _Body(_Kind.PRODUCT, parts, size, _product_text(parts), symmetric)
    return Expression(1 if symmetric else a.sign * b.sign, body)


def _terms(one: Expression) -> tuple[tuple[int, _Body], ...]:
    if one.body.kind is not _Kind.SUM:
        return ((one.sign, one.body),)
    return one.body.parts if one.sign > 0 else _flipped(one.body.parts)


def _factors(body: _Body) -> tuple[tuple[int, _Body], ...]:
    return body.parts if body.kind is _Kind.PRODUCT else ((1, body),)


def _flipped(parts: tuple[tuple[int, _Body], ...]) -> tuple[tuple[int, _Body], ...]:
    return _sorted([(sign if body.symmetric else -sign, body) for sign, body in parts])


def _sorted(parts: list[tuple[int, _Body]]) -> tuple[tuple[int, _Body], ...]:
    return tuple(sorted(parts, key=lambda part: (-part[0], len(part[1].text), part[1].text)))


def _rank(parts: tuple[tuple[int, _Body], ...]) -> tuple[bool, str]:
    """Which of a sum of value zero and its negative is kept: one with a positive term, then by the text."""
    return parts[0][0] < 0, _sum_text(parts)


def _sum_text(parts: tuple[tuple[int, _Body], ...]) -> str:
    return "".join(f"{'+' if sign > 0 else '-'}{body.text}" for sign, body in parts).removeprefix("+")


def _product_text(parts: tuple[tuple[int, _Body], ...]) -> str:
    texts = ((power, f"({body.text})" if body.kind is _Kind.SUM else body.text) for power, body in parts)
    return "".join(f"{'*' if power > 0 else '/'}{text}" for power, text in texts).removeprefix("*")
