"""README and docs: the commands they give parse, the options they name exist, the files they point to are there."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

import run_speedrun
from nanochat_jax import cli
from nanochat_jax.config import Config

ROOT = Path(cli.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "experiments").glob("*.py"))]
COMMAND = re.compile(r"python (?:-m nanochat_jax ([a-z]+)|(run_speedrun)\.py)\b((?:\\\n|[^\n`#&;\[|])*)")


COMMANDS_AT_LEAST = {"README.md": 9, "NUMERICS.md": 4, "SCALING.md": 3, "STAGES.md": 3, "RESEARCH.md": 9}


def options_of(name):
    return run_speedrun.SpeedrunOptions if name == "run_speedrun" else cli.COMMANDS[name][0]


@pytest.fixture(scope="module")
def known():
    """All options of all commands."""
    found = set()
    for kind in {run_speedrun.SpeedrunOptions, *(kind for kind, _, _ in cli.COMMANDS.values())}:
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as printed:
            cli.parse(kind, Config(), [cli.HELP_ALL], "prog", "")
        found |= set(re.findall(r"--[a-z][\w.-]*", printed.getvalue()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_parse(page):
    commands = COMMAND.findall(page.read_text())
    assert len(commands) >= COMMANDS_AT_LEAST.get(page.name, 0)
    for command, speedrun, rest in commands:
        words = shlex.split(re.sub(r"\$\w+", "1", rest.replace("\\\n", " ")))  # a loop's variables are numbers
        if {"OPTIONS", "PART"}.isdisjoint(words):
            cli.parse(options_of(command or speedrun), Config(), words, "prog", "")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_values_that_can_be_set_exist(page, known):
    """Such as --model.depth; what has no dot may be an option of another program."""
    assert set(re.findall(r"--[a-z]+\.[a-z](?:[\w-]*\w)?", page.read_text())) - known == set()


@pytest.mark.parametrize("page", [path for path in PAGES if path.suffix == ".md"], ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_house_is_as_drawn():
    house = re.search(r"## The house\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    lines = re.findall(r"^(  )?(\S+(?:  \S+\.py)*)", house, re.MULTILINE)
    paths = [(ROOT / "nanochat_jax" if inner else ROOT) / name for inner, names in lines for name in names.split()]
    assert len(paths) > 30 and [str(path) for path in paths if not path.exists()] == []
