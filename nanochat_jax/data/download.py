"""Brings pretraining shards and the CORE bundle onto the machine, and says where they are.

A file appears under its name only when it is whole: it grows as `NAME.part`, is resumed there after a break, and is
checked (size, the hash where the server tells it, the parquet footer) before it is renamed. The validation shard comes
first. `HF_ENDPOINT` names a mirror of Hugging Face, `EVAL_BUNDLE_URL` one of the bundle, `HF_HUB_OFFLINE=1` forbids the
network. Task sets are fetched by `datasets`, see tasks/hub.py.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import requests
from werkzeug.http import parse_date

from nanochat_jax.config import DataConfig
from nanochat_jax.data.files import expanded
from nanochat_jax.data.shards import PATTERN, Shard, shard_files
from nanochat_jax.distributed import leader_first
from nanochat_jax.errors import UserError

Log = Callable[[str], None]

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
WORKERS = 8
RETRIES = 5
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of the body
LONGEST_WAIT = 600  # seconds
SHARD_BYTES = 110_000_000  # a rough upper estimate: a full disk is to be seen before it is full


@dataclass(frozen=True)
class ShardSet:
    """A published set: `shard_00000.parquet` to `shard_{last}.parquet`, the last for validation."""

    repository: str
    last: int

    def name(self, index: int) -> str:
        return f"shard_{index:05d}.parquet"

    def url(self, index: int) -> str:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
        return f"{endpoint}/datasets/{self.repository}/resolve/main/{self.name(index)}"


SETS = {
    "fineweb-edu": ShardSet("karpathy/fineweb-edu-100b-shuffle", 1822),
    "climbmix": ShardSet("karpathy/climbmix-400b-shuffle", 6542),
}


def prepare_shards(config: DataConfig, log: Log, recorded: Sequence[str] | None = None) -> tuple[list[Path], Path]:
    """Training files and validation file of this run.

    Of a published set the first `num_shards` and its last. Of another folder those that the run `recorded` when it was
    started, in that order: what appeared in it since is left alone, and said.
    """
    folder = leader_first("shards", lambda: ensure_shards(config, log))
    if config.dir is None and config.source in SETS:
        shards = SETS[config.source]
        return shard_files(folder, [shards.name(i) for i in (*range(config.num_shards), shards.last)])
    if recorded and (new := sorted({path.name for path in folder.glob(PATTERN)} - set(recorded))):
        log(f"{folder}: {', '.join(new)} came after this run was started, left alone")
    return shard_files(folder, recorded)


def ensure_shards(config: DataConfig, log: Log) -> Path:
    """The folder of parquet files; downloads what is missing of a published set, validation shard first."""
    if config.dir is not None:
        return expanded(config.dir)
    if config.source == "embedded":
        return Path(__file__).parent.parent / "corpus"
    shards = SETS[config.source]
    if not 1 <= config.num_shards <= shards.last:
        raise UserError(
            f"--data.num-shards {config.num_shards}: {config.source} has 1 to {shards.last} training shards"
        )
    folder = expanded(config.cache) / config.source
    folder.mkdir(parents=True, exist_ok=True)
    missing = [i for i in (shards.last, *range(config.num_shards)) if not (folder / shards.name(i)).exists()]
    if not missing:
        return folder
    free, need = shutil.disk_usage(folder).free, len(missing) * SHARD_BYTES
    if free < need:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, {len(missing)} shards need {need / 1e9:.1f}; "
            "make room, lower --data.num-shards or set --data.cache"
        )
    log(f"downloading {len(missing)} shards of {shards.repository} to {folder}")

    def fetch_one(index: int) -> Path:
        path = folder / shards.name(index)
        fetch(shards.url(index), path, log, check=Shard)
        return path

    fetch_one(missing[0])
    with ThreadPoolExecutor(WORKERS) as pool:
        for done, path in enumerate(pool.map(fetch_one, missing), start=1):
            log(f"{path.name}  {path.stat().st_size / 1e6:.1f} MB  {done}/{len(missing)}")
    return folder


def fetch_eval_bundle(config: DataConfig, log: Log) -> Path:
    """The folder with `core.yaml`: the one configured, or the published bundle, downloaded and unpacked once."""
    return leader_first("bundle", lambda: _eval_bundle(config, log))


def _eval_bundle(config: DataConfig, log: Log) -> Path:
    if config.eval_bundle is not None:
        folder = expanded(config.eval_bundle)
        if not (folder / "core.yaml").is_file():
            raise UserError(
                f"--data.eval-bundle {folder} has no core.yaml; unpack eval_bundle.zip there or unset the option"
            )
        return folder
    cache = expanded(config.cache)
    folder = cache / "eval_bundle"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    handle = os.open(cache, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # other runs on this machine want it too
        if not folder.is_dir():
            _unpack_bundle(cache, folder, log)
    finally:
        os.close(handle)
    return folder


def _unpack_bundle(cache: Path, folder: Path, log: Log) -> None:
    url = os.environ.get("EVAL_BUNDLE_URL", BUNDLE_URL)
    log(f"downloading {url}")
    archive = cache / "eval_bundle.zip"
    try:
        fetch(url, archive, log)
    except UserError as error:
        raise UserError(f"{error}; or unpack the bundle somewhere and set --data.eval-bundle") from error
    with tempfile.TemporaryDirectory(dir=cache) as fresh:
        try:
            with zipfile.ZipFile(archive) as bundle:
                bundle.extractall(f"{fresh}/bundle")  # checks every file, and lets none lead out of the folder
            os.replace(next(Path(fresh).glob("**/core.yaml")).parent, folder)
        except (zipfile.BadZipFile, zlib.error, StopIteration):
            archive.unlink()
            raise UserError(
                f"{archive} is damaged, or holds no core.yaml; it was deleted: see what {url} gives and run again, or "
                "set --data.eval-bundle"
            ) from None
    archive.unlink()


class _Damaged(requests.RequestException):
    """What is there so far is of no use."""


def fetch(
    url: str, path: Path, log: Log, *, backoff: float = 1.0, check: Callable[[Path], object] | None = None
) -> None:
    """Downloads `url` to `path` unless it is there, going on from an earlier break.

    Network errors and the statuses 408, 429 and 5xx are tried again RETRIES times, after `backoff` seconds doubled
    each time or what Retry-After asks for. A damaged file (by its size, by the hash that Hugging Face tells, or by
    `check` raising UserError) is thrown away and counts as a failed attempt. Raises UserError when it gives up, and
    for any other status.
    """
    if path.exists():
        return
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise UserError(f"{path} is not there and HF_HUB_OFFLINE forbids to download it; unset it or copy the file")
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists():  # another process had the lock, and finished
                return
            for attempt in range(RETRIES + 1):
                try:
                    sha256 = _receive(url, file)
                    _inspect(part, sha256, check)
                    break
                except requests.RequestException as error:
                    if isinstance(error, _Damaged):
                        file.truncate(0)
                    if isinstance(error, ValueError) and not isinstance(error, requests.exceptions.InvalidProxyURL):
                        raise UserError(f"{url} is no address to download from: {error}") from error
                    if attempt == RETRIES:
                        raise UserError(
                            f"could not download {url} in {RETRIES + 1} attempts: {error}; run again to go on"
                        ) from error
                    wait = min(max(0.0, _retry_after(error.response) or backoff * 2**attempt), LONGEST_WAIT)
                    log(f"{path.name}: {error}; trying again in {wait:.0f} s")
                    time.sleep(wait)
            os.fsync(file.fileno())
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; make room or set --data.cache") from error


def _receive(url: str, file: BinaryIO) -> str | None:
    """Asks once for what `file`, open for appending, does not hold yet. Returns the whole file's sha256 where told.

    Raises requests.RequestException or UserError.
    """
    have = os.fstat(file.fileno()).st_size
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise requests.RequestException(f"status {status} {response.reason}", response=response)
        if status not in (200, 206) and not (status == 416 and have):
            raise UserError(f"{url} answers {status} {response.reason}")
        place, _, total = response.headers.get("Content-Range", "").partition("/")
        if status == 206 and not place.startswith(f"bytes {have}-"):
            raise _Damaged("the server resumed at another place")
        if status == 200:
            file.truncate(0)  # the server does not resume
        if status != 416:  # 416: nothing is left to send
            for chunk in response.iter_content(2**16):  # what a break loses at most
                file.write(chunk)
            file.flush()
        size = os.fstat(file.fileno()).st_size
        if total.isdigit() and size != int(total):  # a body that is too short has raised already
            raise _Damaged(f"{size} of {total} bytes are there")
        tags = [answer.headers.get("X-Linked-ETag", "").strip('"') for answer in [*response.history, response]]
    return next((tag for tag in tags if re.fullmatch(r"[0-9a-f]{64}", tag)), None)


def _inspect(part: Path, sha256: str | None, check: Callable[[Path], object] | None) -> None:
    if sha256 is not None:
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise _Damaged(f"its sha256 is {found[:12]}..., not {sha256[:12]}...")
    if check is not None:
        try:
            check(part)
        except UserError as error:
            raise _Damaged(str(error)) from error


def _retry_after(response: requests.Response | None) -> float | None:
    """Seconds to wait, where the server asks for it: the header gives them as a number or as a date."""
    value = "" if response is None else response.headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    date = parse_date(value)
    return date and date.timestamp() - time.time()
