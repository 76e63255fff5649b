"""HumanEval (arXiv 2107.03374): Python functions from docstrings, judged by tests. Set: openai/openai_humaneval.

The programs run in the sandbox only, each in another process than its tests: it sees the arguments of calls, never the
tests, and a program that leaves early with status 0 has not passed.
"""

from __future__ import annotations

import re
from functools import partial

from nanochat_jax.config import DataConfig
from nanochat_jax.inference.sandbox import require_isolation, run_tests
from nanochat_jax.tasks.hub import load_rows
from nanochat_jax.tasks.task import Task, dialogue

COLUMNS = ("prompt", "canonical_solution", "test", "entry_point")
# A fence begins or ends its line when it closes a block: within one, it is text in a program.
FENCED = re.compile(r"```([^\n`]*)\n(.*?)(?:^[ \t]*```|```[ \t\r]*$)", re.DOTALL | re.MULTILINE)
PYTHON = ("", "python", "python3", "py")


def load(data: DataConfig, unsafe_sandbox: bool) -> Task:
    """The 164 problems. Raises UserError where programs cannot be isolated, before anything is generated."""
    if not unsafe_sandbox:
        require_isolation()
    rows = load_rows(data, "openai/openai_humaneval", "openai_humaneval", "test", COLUMNS)
    return Task("humaneval", "generative", rows, conversation, partial(passes, unsafe_sandbox=unsafe_sandbox))


def conversation(row: dict) -> dict:
    """The prompt is the beginning of the program, the reference answer is the whole of it."""
    solution = row["prompt"] + row["canonical_solution"]
    return dialogue(row["prompt"], solution, entry_point=row["entry_point"], test=row["test"])


def passes(conversation: dict, completion: str, unsafe_sandbox: bool) -> bool:
    """Whether the program's function passes the tests."""
    prompt = conversation["messages"][0]["content"]
    source = f"{imports(prompt)}\n\n{code(completion)}"
    # The tests may use functions that stand in the prompt before the one that is asked for.
    tests = f"{prompt}\n\n{conversation['test']}"
    return run_tests(source, tests, conversation["entry_point"], unsafe=unsafe_sandbox).ok


def imports(prompt: str) -> str:
    """The import lines of a prompt, which the completion may leave out."""
    return "\n".join(line for line in prompt.splitlines() if re.match(r"(import|from)\s", line))


def code(completion: str) -> str:
    """The last fenced block of a completion that is Python or says no language, or all of it."""
    blocks = [text for language, text in FENCED.findall(completion) if language.strip().lower() in PYTHON]
    return (blocks or [completion])[-1].strip()
