"""Decoding on a CPU in C++ (native.cc): compiled once by the machine's own compiler, called by XLA through its FFI.

XLA's products of 8 to 128 columns and its attention over many short caches take longer (docs/INFERENCE.md). `--native`
asks for these; they compute in float32, on one device.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

SOURCE = Path(__file__).with_name("native.cc")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
COLUMNS = range(8, 129, 8)
"""Numbers of columns of which a product is faster than XLA's, or as fast."""
LANES = 16
"""What the width of a head is a multiple of."""
KERNELS = ("nanochat_product", "nanochat_product_int8", "nanochat_attention")


class NativeError(Exception):
    """The kernels cannot be compiled or loaded here: one line."""


@functools.cache
def load() -> frozenset[str]:
    """Compiles the kernels, unless that was done before on such a machine, and makes them known to JAX. Those that this
    processor has. Raises NativeError.
    """
    path = _compiled()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"{path} cannot be loaded: {error}") from None
    names = frozenset(name for name in KERNELS if hasattr(library, name))
    for name in names:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return names


def _compiled() -> Path:
    """The shared library, named after everything that it depends on."""
    given = os.environ.get("CXX")
    compiler = next((path for name in ([given] if given else COMPILERS) if (path := shutil.which(name))), None)
    if compiler is None:
        looked_for = f"CXX={given}" if given else ", ".join(COMPILERS)
        raise NativeError(f"no C++ compiler ({looked_for}) is found")
    try:
        processor = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("model", "flags"))
        ]
    except OSError:
        processor = []
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    depends_on = SOURCE.read_text(), version, FLAGS, jax.__version__, platform.machine(), sorted(set(processor))
    name = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanochat_jax" / "native"
    library = folder / f"{name}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:  # several processes may compile at once
            made = Path(own) / library.name
            command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", "-o", str(made), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise NativeError(f"{compiler} cannot compile {SOURCE.name}: {(said or ['it said nothing'])[0]}")
            made.replace(library)
    except OSError as error:
        raise NativeError(f"{folder}: {error.strerror}") from None
    return library


def product(
    weight_OI: jax.Array,
    x_IC: jax.Array,
    plus_OC: jax.Array | None = None,
    *,
    normed: bool = False,
    squared: bool = False,
    eps: float = 0.0,
) -> jax.Array:
    """weight @ x [O, C] float32, C in COLUMNS. `normed`: of x's columns divided by their root mean square (with eps);
    `squared`: the square of what is above 0; and plus.
    """
    plus = jnp.zeros(0, jnp.float32) if plus_OC is None else plus_OC
    out = jax.ShapeDtypeStruct((weight_OI.shape[0], x_IC.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call("nanochat_product", out)
    return call(weight_OI, x_IC, plus, normed=normed, squared=squared, eps=np.float32(eps))


def has_int8(inputs: int, columns: int) -> bool:
    """Whether `product_int8` takes [O, inputs] @ [inputs, columns] on this processor."""
    return "nanochat_product_int8" in load() and inputs % 4 == 0 and columns % LANES == 0 and columns in COLUMNS


def product_int8(weight_OI: jax.Array, x_IC: jax.Array) -> jax.Array:
    """weight @ x [O, C] int32 of int8, the exact sums."""
    out = jax.ShapeDtypeStruct((weight_OI.shape[0], x_IC.shape[1]), jnp.int32)
    return jax.ffi.ffi_call("nanochat_product_int8", out)(weight_OI, x_IC)


def attention(
    qkv_KNHB: jax.Array,
    value_KHB: jax.Array | None,
    own: dict[str, jax.Array],
    shared: dict[str, jax.Array] | None,
    tables: tuple[jax.Array, jax.Array],
    positions_B: jax.Array,
    first_B: jax.Array,
    *,
    window: int,
    qk_scale: float,
    eps: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What one query a row sees, [K, G, H, B] float32, N = G + 2, H a multiple of LANES, and the row's own keys and
    values [B, K, S, H] with the new ones. The arguments are those of decoding.over_cache; tables [B, H].
    """
    heads, both, width, rows = qkv_KNHB.shape
    none = jnp.zeros((0, heads, 0, width), jnp.float32)
    panels = [own["k"], own["v"], *((none, none) if shared is None else (shared["k"], shared["v"]))]
    out = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((heads, both - 2, width, rows), *[own["k"].shape] * 2)
    ]
    call = jax.ffi.ffi_call("nanochat_attention", out, input_output_aliases={2: 1, 3: 2})
    value = jnp.zeros(0, jnp.float32) if value_KHB is None else value_KHB
    where = positions_B.astype(jnp.int32), first_B.astype(jnp.int32)
    options = {"window": np.int64(window), "qk_scale": np.float32(qk_scale), "eps": np.float32(eps)}
    y_KGHB, keys, values = call(qkv_KNHB, value, *panels, *tables, *where, **options)
    return y_KGHB, {"k": keys, "v": values}
