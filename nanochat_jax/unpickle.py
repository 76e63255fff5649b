"""Reading other people's pickles without running them.

A pickle is a program that may import and call anything. Here it may only name what the caller lists; a name outside the
list is refused before anything of it is imported. Nothing else in this project unpickles files.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from nanochat_jax.errors import UserError


def unpickle(
    data: bytes, known: Mapping[str, Any], where: object, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The object pickled in `data`, where "module.name" stands for `known["module.name"]`, never for the real thing.

    `persistent` turns persistent ids into objects. Raises UserError, which names the file `where`, for any other name
    and for a damaged pickle.
    """

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            wanted = f"{module}.{name}"
            if wanted not in known:
                raise UserError(
                    f"{where} asks for {wanted}, which is not run: only plain data is taken from a pickle, so this is "
                    "no file that nanochat writes"
                )
            return known[wanted]

        def persistent_load(self, pid: Any) -> Any:
            return persistent(pid)

    try:
        return Reader(io.BytesIO(data)).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{where} is damaged or of an unknown kind ({type(error).__name__}: {error})") from None
