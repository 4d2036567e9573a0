"""The calculator an agent can call: exact rational arithmetic over a small grammar, by parsing, never by ``eval``.

The grammar is parsed here rather than by ``ast``: Python's parser turns ``0.1`` into a binary float, refuses ``007`` and
``1,042``, and may exhaust the C stack on hostile nesting.

    sum     := product (("+" | "-") product)*
    product := unary (("*" | "/" | "//" | "%") unary)*
    unary   := ("+" | "-")* power
    power   := percent ("**" unary)?              right associative, as in Python: -2**2 is -4
    percent := atom "%"*                          a "%" in front of a number or "(" is the remainder instead
    atom    := number | "(" sum ")"
"""

import re
from decimal import Context, Decimal
from fractions import Fraction
from typing import NamedTuple

from agentrl.errors import ToolError

MAX_LENGTH = 1_000
"""Characters of an expression."""
MAX_DEPTH = 50
"""Nested parentheses and stacked exponents."""
MAX_BITS = 4_096
"""Size of any numerator or denominator on the way (about 1,200 digits); also bounds exponents."""
SIGNIFICANT_DIGITS = 12
"""Digits of a result that has no finite decimal form, or none of at most ``MAX_PLAIN_DIGITS`` digits."""
MAX_PLAIN_DIGITS = 30

_TOKEN = re.compile(
    r"""(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?)
      | (?P<operator>\*\*|//|of\b|[-+*/%^()xX×·∗⋅÷−–])
      | (?P<skip>\s+|[$€£])""",
    re.VERBOSE,
)
_SPELLINGS = {"^": "**", "x": "*", "X": "*", "×": "*", "·": "*", "∗": "*", "⋅": "*", "of": "*", "÷": "/", "−": "-", "–": "-"}
_HELP = "Use numbers with + - * / // % ** and parentheses, e.g. (3 + 4) * 5 / 2"


class _Token(NamedTuple):
    kind: str
    """``number``, ``end``, or the operator itself."""
    text: str


async def calculator(expression: str) -> str:
    """Work out an arithmetic expression exactly. Results that are not finite decimals are rounded to 12 significant digits.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, for example (3 + 4) * 5 / 2

    Returns:
        The value as a plain number.
    """
    return format_number(evaluate(expression))


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression.

    Besides plain arithmetic it reads what people write: ``1,042``, ``$5``, ``3 × 4 ÷ 2``, ``3 x 4``, ``2^10``, ``20%``, ``20% of 50``, a
    trailing ``=``. A ``%`` in front of a number or an opening parenthesis is the remainder, anywhere else it means per cent.

    Raises:
        ToolError: not an expression, division by zero, or beyond the size limits; the text says what to write instead.
    """
    if not isinstance(expression, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # what a model sends is not what it was asked for
        raise ToolError(f"the expression must be text, not {type(expression).__name__}. {_HELP}")
    if len(expression) > MAX_LENGTH:
        raise ToolError(
            f"the expression has {len(expression)} characters, the limit is {MAX_LENGTH}. Split it into several calls"
        )
    text = expression.strip().removesuffix("=").rstrip()
    if not text:
        raise ToolError(f"the expression is empty. {_HELP}")
    return _Parser(_tokens(text)).parse()


def format_number(value: Fraction) -> str:
    """Integers as integers, finite decimals in full, anything else rounded to ``SIGNIFICANT_DIGITS`` significant digits."""
    if value.denominator == 1:
        return str(value.numerator)
    places = _decimal_places(value.denominator)
    if places is not None:
        digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
        if len(digits) <= MAX_PLAIN_DIGITS:
            return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"
    context = Context(prec=SIGNIFICANT_DIGITS)
    rounded = context.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize(context)
    plain = -SIGNIFICANT_DIGITS <= rounded.adjusted() < MAX_PLAIN_DIGITS
    return f"{rounded:f}" if plain else f"{rounded:e}"


def _decimal_places(denominator: int) -> int | None:
    """Decimal places of a fraction in lowest terms, or None when it has no finite decimal form."""
    twos = (denominator & -denominator).bit_length() - 1
    rest, fives = denominator >> twos, 0
    while rest % 5 == 0:
        rest //= 5
        fives += 1
    return max(twos, fives) if rest == 1 else None


def _tokens(text: str) -> list[_Token]:
    found: list[_Token] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ToolError(f"cannot read {text[at]!r} at character {at + 1} of {_quoted(text)}. {_HELP}")
        at = match.end()
        if match.lastgroup == "number":
            found.append(_Token("number", match.group()))
        elif match.lastgroup == "operator":
            operator = _SPELLINGS.get(match.group(), match.group())
            found.append(_Token(operator, operator))
    return [*found, _Token("end", "the end")]


class _Parser:
    """Recursive descent that evaluates as it goes; ``depth`` bounds the recursion."""

    def __init__(self, tokens: list[_Token]) -> None:
        self.tokens = tokens
        self.at = 0
        self.depth = 0

    def parse(self) -> Fraction:
        value = self.sum()
        token = self.tokens[self.at]
        if token.kind != "end":
            hint = "an operator is missing before it" if token.kind in ("number", "(") else "it does not belong there"
            raise ToolError(f"unexpected {token.text!r}: {hint}. {_HELP}")
        return value

    def sum(self) -> Fraction:
        value = self.product()
        while operator := self.take("+", "-"):
            right = self.product()
            value = _bounded(value + right if operator == "+" else value - right)
        return value

    def product(self) -> Fraction:
        value = self.unary()
        while operator := self.take("*", "/", "//", "%"):
            right = self.unary()
            if operator == "*":
                value = _bounded(value * right)
            elif right == 0:
                raise ToolError("division by zero")
            elif operator == "/":
                value = _bounded(value / right)
            else:
                value = _bounded(Fraction(value // right) if operator == "//" else value % right)
        return value

    def unary(self) -> Fraction:
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        value = self.power()
        return -value if negative else value

    def power(self) -> Fraction:
        base = self.percent()
        if not self.take("**"):
            return base
        self.descend()
        exponent = self.unary()
        self.depth -= 1
        return _power(base, exponent)

    def percent(self) -> Fraction:
        value = self.atom()
        while self.tokens[self.at].kind == "%" and self.tokens[self.at + 1].kind not in ("number", "("):
            self.at += 1
            value = _bounded(value / 100)
        return value

    def atom(self) -> Fraction:
        token = self.tokens[self.at]
        if self.take("("):
            self.descend()
            value = self.sum()
            if not self.take(")"):
                raise ToolError(f"expected ')' but found {self.tokens[self.at].text!r}. Close every parenthesis")
            self.depth -= 1
            return value
        if token.kind != "number":
            raise ToolError(f"expected a number but found {token.text!r}. {_HELP}")
        self.at += 1
        return _literal(token.text)

    def take(self, *kinds: str) -> str | None:
        kind = self.tokens[self.at].kind
        if kind not in kinds:
            return None
        self.at += 1
        return kind

    def descend(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ToolError(f"more than {MAX_DEPTH} nested levels. Split the expression into several calls")


def _literal(text: str) -> Fraction:
    mantissa, _, exponent = text.replace(",", "").lower().partition("e")
    value = Fraction(mantissa if not mantissa.startswith(".") else f"0{mantissa}")
    return _bounded(_bounded(value) * _power(Fraction(10), Fraction(exponent))) if exponent else _bounded(value)


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError(f"the exponent {format_number(exponent)} is not a whole number. Only whole exponents are supported")
    if base == 0 and exponent < 0:
        raise ToolError("division by zero: 0 to a negative power")
    # At least this many bits will come out, so refuse before computing: 9**9**9 must cost nothing.
    bits = (max(abs(base.numerator).bit_length(), base.denominator.bit_length()) - 1) * abs(exponent.numerator)
    if bits > MAX_BITS:
        raise ToolError(f"the power is too large: more than {MAX_BITS} bits. Use smaller numbers")
    return _bounded(base**exponent.numerator)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise ToolError(f"the result is too large: more than {MAX_BITS} bits. Use smaller numbers")
    return value


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
