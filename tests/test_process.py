"""What is set before JAX is imported: flags that parse, the user's own word first, and a process that begins anew."""

import os
import subprocess
import sys

import pytest

from nanochat_jax import process


@pytest.fixture
def on_gpu(tmp_path, monkeypatch):
    (tmp_path / "version").touch()
    monkeypatch.setattr(process, "NVIDIA", tmp_path / "version")


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Sets what the kernel says of huge pages."""
    monkeypatch.setattr(process, "NVIDIA", tmp_path / "no driver")
    monkeypatch.setattr(process, "HUGE_PAGES", tmp_path / "enabled")
    return (tmp_path / "enabled").write_text


def jax_starts(flags):
    words = [sys.executable, "-c", "import jax; print(jax.devices()[0].platform)"]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(words, env=environment, capture_output=True, text=True)


def test_every_flag_is_known_to_this_version_of_xla(on_gpu):
    flags = process.environment({})["XLA_FLAGS"]
    assert flags.count("--xla_gpu_") == len(process.GPU_FLAGS)
    flags += " " + process.environment({"JAX_PLATFORMS": "cpu"})["XLA_FLAGS"]
    assert flags.count("--xla_cpu_") == len(process.CPU_FLAGS) > 0
    assert jax_starts(flags).stdout == "cpu\n"
    assert jax_starts(flags + " --xla_gpu_no_such_flag=1").returncode != 0  # the check can fail


def test_what_the_user_has_set_wins(on_gpu):
    name = next(iter(process.GPU_FLAGS))
    mine = {
        "XLA_FLAGS": f"--{name}=mine",
        "JAX_COMPILATION_CACHE_DIR": "/mine",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
    }
    added = process.environment(mine)
    assert added["XLA_FLAGS"].startswith(f"--{name}=mine --xla_") and added["XLA_FLAGS"].count(f"--{name}=") == 1
    assert added.keys().isdisjoint({"JAX_COMPILATION_CACHE_DIR", "XLA_PYTHON_CLIENT_MEM_FRACTION", "GLIBC_TUNABLES"})
    assert "XLA_FLAGS" not in process.environment({"XLA_FLAGS": "/mine"})  # a file of flags


def test_flags_are_those_of_what_is_used_and_stay_as_they_are_when_the_process_begins_anew(on_gpu):
    assert process.uses_gpu({}) and process.uses_gpu({"JAX_PLATFORMS": "cuda,cpu"})
    given = {"JAX_PLATFORMS": "cpu"}
    flags = process.environment(given)["XLA_FLAGS"]
    assert "--xla_gpu_" not in flags
    assert process.environment(given | {"XLA_FLAGS": flags})["XLA_FLAGS"] == flags


@pytest.mark.parametrize("kernel, asked", [("always [madvise] never", True), ("[always] madvise never", False)])
def test_huge_pages_are_asked_for_where_the_kernel_waits_to_be_asked(pages, kernel, asked):
    pages(kernel)
    assert ("GLIBC_TUNABLES" in process.environment({})) == asked
    assert "GLIBC_TUNABLES" not in process.environment({"GLIBC_TUNABLES": "mine"})


def test_a_write_that_finds_its_loop_closed_is_not_heard(tmp_path):
    code = (
        "import asyncio, ctypes; from nanochat_jax import process; process.set_up(); loop = asyncio.new_event_loop()\n"
        "loop.close(); give_up = ctypes.PYFUNCTYPE(None)\n"  # as from C, where nobody can catch what is raised
        "for broken in (lambda: loop.call_soon_threadsafe(print), lambda: 1 / 0): give_up(broken)()\n"
    )
    words, environment = [sys.executable, "-c", code], os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    said = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stderr
    assert "ZeroDivisionError" in said and "Event loop" not in said


def test_a_read_that_is_given_up_is_not_heard(tmp_path):
    """As orbax has it: what closes the coroutine is taken for an error of the read."""
    code = """
from nanochat_jax import process
process.set_up()
async def read(error):
    try:
        await Never()
    except BaseException as e:
        raise error from e
class Never:
    def __await__(self):
        yield
for error in (Exception("Encountered error while reading array index: (0,). See full details"), ValueError("heard")):
    read(error).send(None)
"""
    words, environment = [sys.executable, "-c", code], os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    said = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stderr
    assert "ValueError: heard" in said and "array index" not in said


def test_the_cache_loses_what_was_not_used_for_longest(tmp_path):
    for age, name in enumerate(("today", "yesterday", "last week", "last month")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    process.prune(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["today", "yesterday"]
    process.prune(tmp_path, 200)
    assert len(list(tmp_path.iterdir())) == 2
    process.prune(tmp_path / "none yet", 0)


def test_the_process_begins_anew_once_with_the_same_words(pages, tmp_path, monkeypatch):
    pages("always [madvise] never")
    begun = []
    monkeypatch.setattr(os, "environ", {"PATH": "/bin", "XDG_CACHE_HOME": str(tmp_path)})
    (cache := tmp_path / "nanochat_jax" / "xla").mkdir(parents=True)
    (cache / "large").touch()
    os.truncate(cache / "large", process.CACHE_BYTES + 1)  # takes no room on the disk
    monkeypatch.setattr(os, "execv", lambda *words: begun.append(words))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "nanochat_jax", "pretrain", "--seed", "1"])
    process.set_up()
    process.set_up()
    assert begun == [(sys.executable, [sys.executable, "-m", "nanochat_jax", "pretrain", "--seed", "1"])]
    assert os.environ["GLIBC_TUNABLES"] == process.HUGE_PAGE_TUNABLE and os.environ["PATH"] == "/bin"
    assert not any(cache.iterdir())
