"""Judges a function by its tests, inside the sandbox: the tests run in this process, the function in another one.

A program that is judged in the process that judges it can make `==`, `assert` or `check` say what it likes, or find out
what the judge wants to see. Here two pipes are all that lies between them. Calls go one way, answers come back as plain
values; whether the tests pass is the exit status of this process, which the other one cannot reach (sandbox_filter.py).

Never imported: the text of this file and a call of judge() make a program (run_tests). Standard library only. Answers
whose types neither are built in nor derive from one fail; what a function does to its arguments is not seen.
"""

import os
import sys

SCALARS = {
    "n": lambda text: None,
    "b": lambda text: text == "1",
    "i": lambda text: int(text, 16),
    "f": float.fromhex,
    "s": lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    "y": bytes.fromhex,
}
COLLECTIONS = {"l": list, "t": tuple, "e": set, "z": frozenset}


def encode(value: object) -> str:
    """A value as words. Raises TypeError."""
    if value is None:
        return "n"
    if isinstance(value, bool):
        return f"b{value:d}"
    if isinstance(value, int):
        return f"i{value:x}"
    if isinstance(value, float):
        return f"f{value.hex()}"
    if isinstance(value, str):
        return f"s{value.encode('utf-8', 'surrogatepass').hex()}"
    if isinstance(value, bytes):
        return f"y{value.hex()}"
    if isinstance(value, dict):
        return " ".join([f"d{2 * len(value)}", *(encode(side) for pair in value.items() for side in pair)])
    for letter, kind in COLLECTIONS.items():
        if isinstance(value, kind):
            return " ".join([f"{letter}{len(value)}", *map(encode, value)])
    raise TypeError(f"{type(value).__name__} is no built-in type")


def decode(words: list[str]) -> object:
    """The value that a reversed list of words ends with, which is taken from it. Of exact built-in types only."""
    word = words.pop()
    kind, text = word[0], word[1:]
    if kind in SCALARS:
        return SCALARS[kind](text)
    items = [decode(words) for _ in range(int(text))]
    return dict(zip(items[::2], items[1::2], strict=True)) if kind == "d" else COLLECTIONS[kind](items)


def receive(line: str) -> object:
    """The value in a line. Raises EOFError where the other side has gone."""
    if not line.endswith("\n"):
        raise EOFError("the program has ended")
    return decode(line.split()[::-1])


def serve(entry_point: str) -> None:
    """Runs the program that stdin begins with, then answers calls of one of its functions."""
    calls, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the program prints is no answer
    source = receive(calls.readline())
    program = type(sys)("__main__")
    sys.modules["__main__"] = program
    exec(compile(source, "program.py", "exec"), program.__dict__)
    function = getattr(program, entry_point)
    for line in calls:
        args, kwargs = receive(line)
        try:
            answer = encode((True, function(*args, **kwargs)))
        except Exception as error:
            answer = encode((False, f"{type(error).__name__}: {error}"))
        print(answer, file=answers, flush=True)


def judge(text: str, source: str, tests: str, entry_point: str) -> None:
    """Runs `check(entry_point)` of the tests. Raises what the tests raise, RuntimeError where the function does."""
    calls, answers = os.pipe(), os.pipe()
    # A new interpreter, not a fork: nothing of the tests is in its memory.
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", f"{text}\nserve({entry_point!r})"]
    actions = [(os.POSIX_SPAWN_DUP2, calls[0], 0), (os.POSIX_SPAWN_DUP2, answers[1], 1)]
    os.posix_spawn(sys.executable, command, dict(os.environ), file_actions=actions)
    os.close(calls[0])
    os.close(answers[1])
    to_program, from_program = os.fdopen(calls[1], "w"), os.fdopen(answers[0])
    print(encode(source), file=to_program, flush=True)

    def candidate(*args: object, **kwargs: object) -> object:
        print(encode((args, kwargs)), file=to_program, flush=True)
        returned, value = receive(from_program.readline())
        if not returned:
            raise RuntimeError(value)
        return value

    names = {"__name__": "__main__"}
    exec(compile(tests, "tests.py", "exec"), names)
    names[entry_point] = candidate
    names["check"](candidate)
