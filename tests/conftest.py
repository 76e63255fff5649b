"""One environment for all tests: eight CPU devices, no implicit rank promotion, one small tokenizer."""

import gc
import os
import shutil
import signal
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Tests compile far more than they compute: quickly, and what took longest is kept for other processes and for next time.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest

from nanochat_jax import process

# Tests started in the background have Ctrl-C ignored, and so would the programs that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_numpy_rank_promotion", "raise")
process.prune(Path(__file__).parent.parent / ".pytest_cache" / "xla", 2**30)


@pytest.fixture(autouse=True, scope="module")
def programs():
    """Compiled programs go with the file that used them: each takes maps of memory, of which Linux allows 65,530."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def compilations():
    """The functions that XLA compiles meanwhile, such as jit(decode)."""
    names = []

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def native():
    """The kernels in C++, which need a compiler."""
    from kernels import native

    if not any(map(shutil.which, native.COMPILERS)):
        pytest.skip("no C++ compiler")
    native.load()
    return native


@pytest.fixture(scope="session")
def tokenizer():
    """A small tokenizer learned from the corpus in the package."""
    from nanochat_jax.data.shards import read_texts, shard_files
    from nanochat_jax.tokenizer import Tokenizer

    files, _ = shard_files(Path(__file__).parent.parent / "nanochat_jax" / "corpus")
    return Tokenizer.train(read_texts(files[:1]), 512)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A whole run on one device, evaluated."""
    import tiny
    from stage_runs import WORK, quiet, start

    from nanochat_jax.stages import evaluate

    folder = start(tmp_path_factory.mktemp("run"), tiny.config)
    for stage, work in WORK.items():
        work(tiny.config, folder, quiet)
        evaluate.run(tiny.config, folder, stage, None, None, quiet)
    return folder
