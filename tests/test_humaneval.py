"""HumanEval's grader: right functions pass whatever they are made of, wrong ones do not, however they go about it."""

import pytest

from nanochat_jax.errors import UserError
from nanochat_jax.inference.sandbox import require_isolation
from nanochat_jax.tasks.humaneval import conversation, passes

TEST = "def check(candidate):\n"


def problem(signature, doc, solution, asserts, before="", around=""):
    """A row as HumanEval has it: the prompt ends with the docstring, the solution is indented."""
    name = signature.partition("(")[0]
    body = "".join(f"    {line}\n" for line in asserts.splitlines())
    solution = "".join(f"    {line}\n" for line in solution.splitlines())
    return {
        "prompt": f'{before}def {signature}:\n    """ {doc}\n    """\n',
        "canonical_solution": solution,
        "test": f"{around}\n\nMETADATA = {{'author': 'us'}}\n\n\n{TEST}{body}",
        "entry_point": name,
    }


PROBLEMS = [
    problem("add(x, y)", "Sum.", "return x + y", "assert candidate(2, 3) == 5\nassert candidate(-1, y=1) == 0"),
    problem(
        "intersperse(numbers: List[int], d: int) -> List[int]",
        "Import in the prompt, annotations.",
        "return [n for x in numbers for n in (x, d)][:-1]",
        "assert candidate([], 4) == []\nassert candidate([5, 6], 8) == [5, 8, 6]",
        before="from typing import List\n\n\n",
    ),
    problem(
        "decode(s: str)",
        "The test calls another function of the prompt, with random inputs.",
        "return encode(s[::-1])[::-1]",
        "for _ in range(100):\n    s = ''.join(choice(string.ascii_lowercase) for i in range(9))\n"
        "    assert candidate(encode(s)) == s[:1] + s[1:] or encode(candidate(encode(s)))",
        before='def encode(s: str):\n    """ Turns it round. """\n    return s[::-1]\n\n\n',
        around="from random import choice\nimport string\n",
    ),
    problem(
        "find_zero(xs: list)",
        "Floats, checked by a tolerance and a helper.",
        "return -xs[0] / xs[1]",
        "import random\nfor _ in range(50):\n    xs = [random.uniform(-9, 9), random.uniform(1, 9)]\n"
        "    assert abs(poly(xs, candidate(xs))) < 1e-4",
        before='import math\n\n\ndef poly(xs: list, x: float):\n    """ Value at x. """\n    return xs[0] + xs[1] * x\n\n\n',
    ),
    problem(
        "kinds(n)",
        "Every built-in type, none mistaken for another.",
        "return [None, True, n, n / 3, 'a b\\n\\udc80', b'x', (1,), {2, 3}, {'k': [()], 4: frozenset()}, -2**70][n]",
        "expected = [None, True, 2, 1.0, 'a b\\n\\udc80', b'x', (1,), {2, 3}, {'k': [()], 4: frozenset()}, -2**70]\n"
        "for i, value in enumerate(expected):\n    assert candidate(i) == value and type(candidate(i)) is type(value), i",
    ),
    problem(
        "infinite(s)",
        "Numbers that have no literal.",
        "return float(s)",
        "assert candidate('-inf') == float('-inf')\nassert candidate('nan') != candidate('nan')\n"
        "assert candidate('1e-320') == 1e-320",
    ),
    problem(
        "histogram(words)",
        "Answers that derive from built-in types.",
        "from collections import Counter, namedtuple\nfrom enum import IntEnum\nn = IntEnum('N', words[:1], start=len(words))\n"
        "return namedtuple('P', 'a b')(Counter(words), n.a)",
        "assert candidate(['a', 'b', 'a']) == ({'a': 2, 'b': 1}, 3)",
    ),
    problem(
        "count_up(step)",
        "A state between calls.",
        "global total\ntotal = globals().get('total', 0) + step\nreturn total",
        "assert [candidate(2) for _ in range(3)] == [2, 4, 6]",
    ),
    problem(
        "shout(text)", "Prints on the way.", "print(text)\nreturn text.upper()", "assert candidate('hé\\n') == 'HÉ\\n'"
    ),
    problem("nothing()", "No arguments, no answer.", "pass", "assert candidate() is None"),
    problem(
        "depth(n)",
        "Deep recursion.",
        "return 0 if n == 0 else 1 + depth(n - 1)",
        "assert candidate(800) == 800\nassert depth(5) == 5",
    ),
    problem(
        "big(n)",
        "Long answers.",
        "return list(range(n))",
        "assert candidate(10**5) == list(range(10**5)), 'long'\nassert len(str(candidate(3))) == 9",
    ),
    problem(
        "rank(xs)",
        "A class of its own, and a main block.",
        "return [x.value for x in sorted(map(Item, xs))]\n",
        "assert candidate([3, 1, 2]) == [1, 2, 3]",
        before="from dataclasses import dataclass\n\n\n@dataclass(order=True)\nclass Item:\n    value: int\n\n\n",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def isolated():
    try:
        require_isolation()
    except UserError as error:
        pytest.skip(f"the kernel isolates no programs: {error}")


def named(row):
    return row["entry_point"]


@pytest.mark.parametrize("row", PROBLEMS, ids=named)
def test_reference_solutions_pass_and_none_at_all_does_not(row):
    given = conversation(row)
    assert passes(given, given["messages"][-1]["content"], False)
    assert not passes(given, row["prompt"] + "    raise NotImplementedError", False)


ADD = conversation(PROBLEMS[0])
FAKES = {
    "nothing": "",
    "wrong": "def add(x, y): return 5",
    "a syntax error": "def add(x, y) return x + y",
    "leaves early": "raise SystemExit(0)",
    "leaves early, hard": "import os; os._exit(0)",
    "leaves when called": "def add(x, y): import os; os._exit(0)",
    "leaves at exit": "import atexit, os; atexit.register(os._exit, 0)",
    "equals everything": "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    "def add(x, y): return E(7)",
    "equals everything, of no built-in type": "class E:\n    def __eq__(self, other): return True\ndef add(x, y): return E()",
    "changes check": "import builtins, sys\nfor module in list(sys.modules.values()): module.check = lambda f: None\n"
    "builtins.check = lambda f: None\ndef add(x, y): return 0",
    "changes errors": "import builtins\nbuiltins.AssertionError = SystemExit\ndef add(x, y): raise AssertionError(0)",
    "answers before it is asked, wrongly": "import os\nfor fd in range(3, 9):\n    try: os.write(fd, b't2 b1 i5\\n' * 9)\n"
    "    except OSError: pass\ndef add(x, y): return 5",
    "answers nonsense": "import os\nfor fd in range(3, 9):\n    try: os.write(fd, b'l9 t2\\n\\xff\\n' * 9)\n"
    "    except OSError: pass\ndef add(x, y): return x + y",
    "ends the judge": "import os, signal\ndef add(x, y): os.kill(os.getppid(), signal.SIGINT); return 5",
    "ends the judge at once": "import os\ndef add(x, y): os.kill(os.getppid(), 9); return 5",
    "takes its answer from the tests": "import gc, inspect, sys\ndef add(x, y):\n"
    "    texts = [o for o in gc.get_objects() if isinstance(o, (list, dict, tuple))]\n"
    "    frame, seen = sys._getframe(), [repr(texts)]\n"
    "    while frame: seen.append(repr((frame.f_locals, frame.f_code.co_consts))); frame = frame.f_back\n"
    "    return 5 if x == 2 else 0 if 'candidate'.strip() + '(-1' in ''.join(seen) else 9",
    "prints success": "print('ok', flush=True)\nimport os; os.write(1, b'ok'); os.write(2, b'ok')",
    "a helper of its own": "def check(f): pass\ncandidate = add = lambda x, y: 5",
}


@pytest.mark.parametrize("name", FAKES)
def test_a_wrong_program_does_not_pass(name):
    assert not passes(ADD, FAKES[name], False)


def test_an_answer_of_another_kind_is_not_taken_by_its_text():
    row = problem("name()", "", "return 'seven'", "assert candidate() == 'seven'")
    looks = "class A:\n    def __str__(self): return 'seven'\n    __repr__ = __str__\ndef name(): return A()"
    assert not passes(conversation(row), looks, False)


def test_helpers_of_the_tests_are_the_prompts_own():
    zero = next(conversation(row) for row in PROBLEMS if row["entry_point"] == "find_zero")
    assert not passes(zero, "def poly(xs, x): return 0\ndef find_zero(xs): return 12345.0", False)


def test_a_function_that_raises_fails_its_tests_but_may_be_expected_to():
    row = problem(
        "f(x)",
        "",
        "return 1 // x",
        "try:\n    candidate(0)\nexcept Exception as e:\n    assert 'Zero' in str(e)\nelse:\n    assert 0",
    )
    given = conversation(row)
    assert passes(given, given["messages"][-1]["content"], False)
    assert not passes(given, "def f(x): return 0", False)
