"""Reads the tensors of a `torch.save` file without PyTorch and without running what the file says.

Since PyTorch 1.6 such a file is a zip archive of uncompressed members: `data.pkl`, a pickle in which a tensor is a call
of `torch._utils._rebuild_tensor_v2` on a storage named by a persistent id, and one member `data/KEY` for each storage.
Tensors are read from their storage when asked for, so that one at a time is in memory. Left out: the older formats,
sparse and quantized tensors, other byte orders.
"""

from __future__ import annotations

import math
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nanochat_jax.errors import UserError
from nanochat_jax.unpickle import unpickle

STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
UNREADABLE = (zipfile.BadZipFile, OSError, EOFError, RuntimeError)  # RuntimeError: encrypted


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its shape, and `read()` for its values, a new array each time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __setstate__(self, state: object) -> None:
        """Pickles could otherwise replace the fields of a tensor they have made."""
        raise ValueError("a tensor is given a state")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of the dict saved in `path`, by name, in the file's order.

    Raises UserError where the file is missing, damaged, in another format, or holds anything but tensors by name.
    """
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(_no_archive(path))
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path} is a zip archive, but not one of torch.save: there is no data.pkl in it")
            if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
                raise UserError(f"{path} is a compressed zip archive; torch.save does not compress: use the original")
            prefix = pickles[0].removesuffix("data.pkl")
            order = archive.read(f"{prefix}byteorder") if f"{prefix}byteorder" in members else b"little"
            if order != b"little":
                raise UserError(f"{path} has byte order {order.decode(errors='replace')!r}; only little is read")
            pickled = archive.read(pickles[0])
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None

    def storage(pid: tuple) -> tuple[str, np.dtype]:
        kind, dtype, key, _, size = pid
        if kind != "storage" or dtype not in STORAGES:
            raise ValueError(f"persistent id of kind {kind!r}, {dtype!r}")
        member, dtype = f"{prefix}data/{key}", np.dtype(STORAGES[dtype])
        if member not in members or members[member].file_size != size * dtype.itemsize:
            raise ValueError(f"{member} does not hold {size} values of {dtype}")
        return member, dtype

    def tensor(source: tuple[str, np.dtype], offset: int, shape: tuple, stride: tuple, *_: Any) -> Tensor:
        member, dtype = source
        if any(type(n) is not int or n < 0 for n in (offset, *shape, *stride)):
            raise ValueError(f"a tensor of shape {shape}, strides {stride} and offset {offset}")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if math.prod(shape) == 0 or last >= members[member].file_size // dtype.itemsize:
            raise ValueError(f"a tensor of shape {shape}, strides {stride} and offset {offset} is not inside {member}")

        def read() -> np.ndarray:
            values = np.frombuffer(_member(path, member), dtype)[offset:]
            steps = tuple(step * dtype.itemsize for step in stride)
            return np.lib.stride_tricks.as_strided(values, shape, steps, writeable=False).copy()

        return Tensor(tuple(shape), dtype, read)

    known = {f"torch.{name}": name for name in STORAGES} | {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
    }
    loaded = unpickle(pickled, known, path, storage)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not the state dict of a model")
    for name, value in dict.items(loaded):
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise UserError(f"{path} is not the state dict of a model: {name!r} is a {type(value).__name__}, no tensor")
    return dict(dict.items(loaded))


def _member(path: Path, member: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)  # checks the CRC
    except UNREADABLE as error:
        raise UserError(f"{path} is damaged ({error}): copy it again") from None


def _no_archive(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(2)
    if start == b"PK":
        return f"{path} is cut off: the directory at the end of the archive is missing; copy it again"
    if start[:1] == b"\x80":
        return f"{path} is in the format of PyTorch before 1.6; load it in PyTorch and torch.save it again"
    return f"{path} is not a file of torch.save"
