"""JSON files that are either whole or not there, and paths as people write them."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from nanochat_jax.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_json(path: Path, value: Any) -> None:
    """Writes beside `path`, then renames: a killed process never leaves half a file. Creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:  # which names no file where the disk is full
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_json(path: Path) -> Any:
    """What is in a file of JSON. OSError where it cannot be read, ValueError where it is none."""
    return json.loads(path.read_text(encoding="utf-8"))


def expanded(path: Path | str) -> Path:
    """`path` with the home folder for a leading ~ or ~NAME. UserError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: {Path(path).parts[0]} is no home folder here; write the path out") from None
