"""Reads the tensors of a `torch.save` file without PyTorch and without running what the file says.

Since PyTorch 1.6 such a file is a zip archive: `data.pkl`, a pickle in which a tensor is a call of
`torch._utils._rebuild_tensor_v2` on a storage named by a persistent id, and one member `data/KEY` for each storage.
Left out: what the weights of a model never are, such as integers, views that skip values, sparse or quantized tensors.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nanochat_jax.errors import UserError
from nanochat_jax.unpickle import unpickle

DTYPES = {"Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16}


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The tensors of the dict saved in `path`, by name, in the file's order.

    Raises UserError where the file is missing, damaged, in another format, or holds anything but tensors by name.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if pickled is None:
                raise UserError(f"{path} is a zip archive, but not one of torch.save: there is no data.pkl in it")

            def storage(pid: tuple) -> np.ndarray:
                _, dtype, key, *_ = pid
                # Reading a member checks its CRC.
                return np.frombuffer(archive.read(f"{pickled.removesuffix('.pkl')}/{key}"), DTYPES[dtype])

            known = {f"torch.{name}Storage": name for name in DTYPES} | {
                "collections.OrderedDict": OrderedDict,
                "torch._utils._rebuild_tensor_v2": _tensor,
                "torch._utils._rebuild_parameter": lambda data, *_: data,
            }
            loaded = unpickle(archive.read(pickled), known, path, storage)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # a wrong method or flag is the last
        raise UserError(f"{path} is no whole file of torch.save since PyTorch 1.6 ({error}): copy it again") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not the state dict of a model")
    tensors = dict(dict.items(loaded))  # its own `items` may be whatever the pickle has set
    for name, value in tensors.items():
        if not (isinstance(name, str) and isinstance(value, np.ndarray)):
            raise UserError(f"{path} is not the state dict of a model: {name!r} is a {type(value).__name__}, no tensor")
    return tensors


def _tensor(storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *_: Any) -> np.ndarray:
    if list(stride) != [math.prod(shape[i + 1 :]) for i in range(len(shape))]:
        raise ValueError(f"a tensor of shape {shape} has the strides {stride}")
    return storage[offset : offset + math.prod(shape)].reshape(shape)
