"""The calculator and string tools that a model may call: a small evaluator over `ast`, never `eval`.

Numbers, + - * / // %, parentheses, signs, `'text'.count('t')` and `len('text')`. There is no power, no name and no
other call, so the work and the size of a result are bounded by the length of the expression. Safe from any thread.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from typing import Any

MAX_LENGTH = 300
"""Characters of an expression."""
MAX_DEPTH = 40
"""Operations and brackets within each other."""
MAX_RESULT = 40
"""Characters of a result."""

# What an expression may be spelled with, looked at before Python's parser sees anything.
LEXICON = re.compile(r"""(?:[\d\s.+\-*/%()]|(?<=[\d.])[eE](?=[-+\d])|'[^'\\\n]*'|"[^"\\\n]*"|\.count\b|\blen\b)+""")

# Texts, and the commas outside them.
TEXT_OR_COMMA = re.compile(r"""('[^']*'|"[^"]*")|,""")

BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos}


class Refused(Exception):
    """The expression is outside the language above."""


def evaluate_tool(expression: str) -> str | None:
    """The result as Python prints it, or None where the expression is refused or fails. 1,200 is 1200."""
    if len(expression) > MAX_LENGTH:
        return None
    text = TEXT_OR_COMMA.sub(r"\1", expression).strip()
    if not LEXICON.fullmatch(text):
        return None
    try:
        value = typed(evaluate(ast.parse(text, mode="eval").body, 0), int | float)
    except (Refused, SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    result = str(value)
    return result if len(result) <= MAX_RESULT and math.isfinite(value) else None


def evaluate(node: ast.expr, depth: int) -> int | float | str:
    """The value of one node of the tree. Raises Refused."""
    if depth > MAX_DEPTH:
        raise Refused
    match node:
        case ast.Constant(value=int() | float() | str() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            return UNARY[type(op)](typed(evaluate(operand, depth + 1), int | float))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return BINARY[type(op)](*(typed(evaluate(side, depth + 1), int | float) for side in (left, right)))
        case ast.Call(func=ast.Attribute(value=owner, attr="count"), args=[argument], keywords=[]):
            return typed(evaluate(owner, depth + 1), str).count(typed(evaluate(argument, depth + 1), str))
        case ast.Call(func=ast.Name(id="len"), args=[argument], keywords=[]):
            return len(typed(evaluate(argument, depth + 1), str))
    raise Refused


def typed(value: Any, kind: type) -> Any:
    """The value, if it is of this kind: `%` and `*` mean other things for strings."""
    if not isinstance(value, kind):
        raise Refused
    return value
