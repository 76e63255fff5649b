"""Decoding on a CPU in C++ (native.cc): compiled once by the machine's own compiler, called by XLA through its FFI.

They read the weights of a step at memory's speed, where XLA's products of several columns do not, and take less time
between products (docs/INFERENCE.md). They compute in float32, on one device; see nanochat_jax/inference/native.py.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Hashable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.extend.random import define_prng_impl

SOURCE = Path(__file__).with_name("native.cc")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC")
LANES = 16
"""The widest vectors' lanes: what the width of a head and the number of a product's outputs are multiples of."""
KERNELS = ("product", "product_int8", "attention", "prompt_attention", "fill", "top", "threefry")


LOCK = threading.Lock()


class NativeError(Exception):
    """The kernels cannot be compiled or loaded here: one line."""


class Library(NamedTuple):
    """What the kernels are like on this processor: lanes of its vectors, and whether `product` takes int8."""

    lanes: int
    has_int8: bool


def load() -> Library:
    """Compiles the kernels, unless that was done before on such a machine, and makes them known to JAX. It is tried
    once. Raises NativeError.
    """
    with LOCK:
        found = _loaded()
    if isinstance(found, NativeError):
        raise NativeError(str(found))
    return found


@functools.cache
def _loaded() -> Library | NativeError:
    try:
        command = _command()
        path = _place(command)
        opened = (_opened(path) if path.exists() else None) or _compile(command, path)
    except NativeError as error:
        return error
    except OSError as error:
        return NativeError(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    found = {name for name in KERNELS if hasattr(opened, f"nanochat_{name}")}
    for name in found:
        symbol = f"nanochat_{name}"
        jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(getattr(opened, symbol)), platform="cpu")
    return Library(ctypes.c_int.in_dll(opened, "nanochat_lanes").value, "product_int8" in found)


def _opened(path: Path) -> ctypes.CDLL | None:
    """The library, or None where it is damaged, or is none of ours."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    return library if hasattr(library, "nanochat_lanes") else None


def _place(command: list[str]) -> Path:
    """Where the shared library is or will be, named after everything that it depends on."""
    # What the compiler makes of this processor, and of itself.
    asked = _run([*command, "-dM", "-E", "-x", "c++", os.devnull])
    if asked.returncode or not asked.stdout:
        raise NativeError(f"{command[0]} does not say what it compiles for: {_first_error(asked)}")
    depends_on = SOURCE.read_bytes(), asked.stdout, command, jaxlib.__version__, platform.machine()
    name = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # no home
        raise NativeError(f"no folder for what is compiled: {error} Set XDG_CACHE_HOME") from None
    return cache / "nanochat_jax" / "native" / f"{name}.so"


def _compile(command: list[str], path: Path) -> ctypes.CDLL:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as own:  # several processes may compile at once
        made = Path(own) / path.name
        done = _run([*command, f"-I{jax.ffi.include_dir()}", "-o", str(made), str(SOURCE)])
        # Opened by this name: by the other, a library that was found there and is none of ours would come again.
        opened = None if done.returncode else _opened(made)
        if opened is None:
            what = _first_error(done) if done.returncode else "what it makes is not the library"
            raise NativeError(f"{command[0]} cannot compile {SOURCE.name}: {what}")
        with open(made, "rb") as file:
            os.fsync(file.fileno())
        made.replace(path)
        return opened


def _first_error(done: subprocess.CompletedProcess) -> str:
    lines = done.stderr.splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "it said nothing")


def _command() -> list[str]:
    """The C++ compiler, CXX or the first that is found, with FLAGS and those of CXXFLAGS."""
    chosen, flags = (os.environ.get(name, "").strip() for name in ("CXX", "CXXFLAGS"))
    try:
        commands = [shlex.split(chosen)] if chosen else [[name] for name in COMPILERS]
        own_flags = shlex.split(flags)
    except ValueError as error:
        raise NativeError(f"CXX={chosen} CXXFLAGS={flags}: {error}") from None
    for first, *rest in commands:
        if path := shutil.which(first):
            return [path, *rest, *FLAGS, *own_flags]
    raise NativeError(f"no C++ compiler ({f'CXX={chosen}' if chosen else ', '.join(COMPILERS)}) is found")


def _run(command: list[str]) -> subprocess.CompletedProcess:
    english = os.environ | {"LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=english)


def packed(weight_OI: jax.Array) -> jax.Array:
    """A weight as `product` reads it: float32 [O / L, I, L], L the lanes of a vector; int8 [O / L, I / 4, L, 4], 128
    added, in the bits of an unsigned number.
    """
    (outputs, inputs), lanes = weight_OI.shape, load().lanes
    together = 4 if weight_OI.dtype == jnp.int8 else 1
    tiles = weight_OI.reshape(outputs // lanes, lanes, inputs // together, together).swapaxes(1, 2)
    return tiles ^ jnp.int8(-128) if together > 1 else tiles[..., 0]


def product(
    weight: jax.Array,
    x_IC: jax.Array,
    plus_OC: jax.Array | None = None,
    scales_O: jax.Array | None = None,
    lengths_P: jax.Array | None = None,
    *,
    normed: bool = False,
    squared: bool = False,
    eps: float = 0.0,
) -> jax.Array:
    """weight @ x [O, C] float32 of a `packed` weight [O, I]. `normed`: of x's columns divided by their root mean square
    (with eps); `squared`: the square of what is above 0; and plus. Of an int8 weight with scales [O] each column of x
    is rounded to 8 bits too, by its largest magnitude, and integers are summed exactly. `lengths`: the columns are
    prompts [P, C / P], of which what is beyond its length is left as it happens to be.
    """
    of_bytes = weight.dtype == jnp.int8
    name, scales = ("nanochat_product_int8", [scales_O]) if of_bytes else ("nanochat_product", [])
    out = jax.ShapeDtypeStruct((len(weight) * load().lanes, x_IC.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call(name, out)
    given = weight, *scales, x_IC, _or_empty(plus_OC), _or_empty(lengths_P, jnp.int32)
    return call(*given, normed=normed, squared=squared, eps=np.float32(eps))


def _or_empty(x: jax.Array | None, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """An array for XLA's FFI, which has no optional ones."""
    return jnp.zeros(0, dtype) if x is None else x


def top(logits_VB: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """What `jax.lax.top_k` gives of the columns: the largest logits and their tokens, [B, count] each."""
    out = [jax.ShapeDtypeStruct((logits_VB.shape[1], count), dtype) for dtype in (jnp.float32, jnp.int32)]
    values, tokens = jax.ffi.ffi_call("nanochat_top", out)(logits_VB)
    return values, tokens


def _blocks(key: jax.Array, first: jax.Array, count: int) -> jax.Array:
    out = jax.ShapeDtypeStruct((count, 2), jnp.uint32)
    return jax.ffi.ffi_call("nanochat_threefry", out, vmap_method="broadcast_all")(key, first)


@functools.cache
def random() -> Hashable:
    """What `jax.random.key` takes as `impl` for keys whose numbers are those of JAX's own threefry. XLA computes those
    in a loop that takes a tenth of a small model's decode step.
    """

    def seed(seed: jax.Array) -> jax.Array:
        return jnp.stack([jnp.uint32(0), seed.astype(jnp.uint32)])

    def split(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return _blocks(key, jnp.uint32(0), math.prod(shape)).reshape(*shape, 2)

    def random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
        if bit_width != 32:
            raise NotImplementedError(f"{bit_width} random bits; 32 are what there is")
        blocks = _blocks(key, jnp.uint32(0), math.prod(shape))
        return (blocks[:, 0] ^ blocks[:, 1]).reshape(shape)

    def fold_in(key: jax.Array, data: jax.Array) -> jax.Array:
        return _blocks(key, data.astype(jnp.uint32), 1)[0]

    return define_prng_impl(
        key_shape=(2,),
        seed=seed,
        split=split,
        random_bits=random_bits,
        fold_in=fold_in,
        name="native_threefry",
        tag="nt",
    )


def attention(
    qkv_KNHB: jax.Array,
    value_KHB: jax.Array | None,
    own: dict[str, jax.Array],
    shared: dict[str, jax.Array] | None,
    tables: tuple[jax.Array, jax.Array],
    positions_B: jax.Array,
    first_B: jax.Array,
    slots_B: jax.Array,
    computed: jax.Array,
    *,
    window: int,
    qk_scale: float,
    eps: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What one query a column sees, [K, G, H, B] float32, N = G + 2, H a multiple of LANES, and the cache's keys and
    values [R, K, S, H] with the new ones in rows slots_B. Of the columns only the first `computed` are computed. The
    other arguments are those of decoding.over_cache; tables [B, H].
    """
    heads, both, width, rows = qkv_KNHB.shape
    none = jnp.zeros((0, heads, 0, width), jnp.float32)
    panels = [own["k"], own["v"], *((none, none) if shared is None else (shared["k"], shared["v"]))]
    out = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((heads, both - 2, width, rows), *[own["k"].shape] * 2)
    ]
    call = jax.ffi.ffi_call("nanochat_attention", out, input_output_aliases={2: 1, 3: 2})
    where = (x.astype(jnp.int32) for x in (positions_B, first_B, slots_B, computed.reshape(1)))
    options = {"window": np.int64(window), "qk_scale": np.float32(qk_scale), "eps": np.float32(eps)}
    y_KGHB, keys, values = call(qkv_KNHB, _or_empty(value_KHB), *panels, *tables, *where, **options)
    return y_KGHB, {"k": keys, "v": values}


def prompt_attention(
    qkv_KNHPT: jax.Array,
    value_KHPT: jax.Array | None,
    tables: tuple[jax.Array, jax.Array],
    lengths_P: jax.Array | None = None,
    *,
    window: int,
    qk_scale: float,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Causal attention of whole prompts [K, G, H, P, T], and their keys and values [P, K, T, H]; tables [T, H]; lengths
    as in `product`.
    """
    heads, both, width, prompts, length = qkv_KNHPT.shape
    shapes = (heads, both - 2, width, prompts, length), *[(prompts, heads, length, width)] * 2
    out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    options = {"window": np.int64(window), "qk_scale": np.float32(qk_scale), "eps": np.float32(eps)}
    call = jax.ffi.ffi_call("nanochat_prompt_attention", out)
    given = qkv_KNHPT, _or_empty(value_KHPT), *(x.T for x in tables), _or_empty(lengths_P, jnp.int32)
    return call(*given, **options)


def filled(
    rings_BKSH: jax.Array, prompts_PKTH: jax.Array, lengths_P: jax.Array, source_R: jax.Array, slot_R: jax.Array
) -> jax.Array:
    """The rings, in place, with the newest keys or values of prompt source[r], up to its length, in row slot[r]; in
    none, where that is past the end.
    """
    out = jax.ShapeDtypeStruct(rings_BKSH.shape, jnp.float32)
    call = jax.ffi.ffi_call("nanochat_fill", out, input_output_aliases={0: 0})
    return call(rings_BKSH, prompts_PKTH, lengths_P, source_R, slot_R)
