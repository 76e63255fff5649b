"""Writes files as torch.save does, without PyTorch: for the tests of their reader."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
}
BFLOAT16 = ml_dtypes.bfloat16


class TorchTensor:
    """A view of `values`: elements offset + i * stride. Tensors made of one array share its storage."""

    def __init__(self, values, shape=None, stride=None, offset=0):
        self.values = values
        self.shape = values.shape if shape is None else shape
        in_order = np.empty(values.shape, values.dtype).strides
        self.stride = tuple(step // values.itemsize for step in in_order) if stride is None else stride
        self.offset = offset

    def __reduce_ex__(self, protocol):
        storage = Storage(np.ravel(self.values), id(self.values))
        args = (storage, self.offset, self.shape, self.stride, False, OrderedDict())
        return sys.modules["torch._utils"]._rebuild_tensor_v2, args


class Storage:
    def __init__(self, values, key):
        self.values, self.key = values, key


def torch_save(path: Path, value) -> Path:
    """Writes `value`, a state dict's arrays as tensors, to `path`."""
    storages: dict[int, tuple[str, np.ndarray]] = {}
    names = {"torch": tuple(STORAGES.values()), "torch._utils": ("_rebuild_tensor_v2", "_rebuild_parameter")}
    with pytest.MonkeyPatch.context() as patch:
        for module, members in names.items():
            stand_in = types.ModuleType(module)
            for name in members:
                setattr(stand_in, name, type(name, (), {"__module__": module, "__qualname__": name}))
            patch.setitem(sys.modules, module, stand_in)

        class Pickler(pickle.Pickler):
            def persistent_id(self, thing):
                if not isinstance(thing, Storage):
                    return None
                key, _ = storages.setdefault(thing.key, (str(len(storages)), thing.values))
                kind = getattr(sys.modules["torch"], STORAGES[str(thing.values.dtype)])
                return ("storage", kind, key, "cpu", thing.values.size)

        if isinstance(value, dict):
            value = OrderedDict((k, TorchTensor(v) if isinstance(v, np.ndarray) else v) for k, v in value.items())
            value._metadata = OrderedDict({"": {"version": 1}})  # as Module.state_dict gives it
        buffer = io.BytesIO()
        Pickler(buffer, protocol=2).dump(value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{path.stem}/data.pkl", buffer.getvalue())
        archive.writestr(f"{path.stem}/byteorder", "little")
        for key, values in storages.values():
            archive.writestr(f"{path.stem}/data/{key}", values.tobytes())
        archive.writestr(f"{path.stem}/version", "3\n")
    return path
