"""Brings pretraining shards and the CORE bundle onto the machine, and says where they are.

A file appears under its name only when it is whole: it grows as `NAME.part`, is resumed there after a break, and is
checked (size, the hash where the server tells it, the parquet footer) before it is renamed. The validation shard comes
first. `HF_ENDPOINT` names a mirror of Hugging Face, `EVAL_BUNDLE_URL` one of the bundle, `HF_HUB_OFFLINE=1` forbids the
network. Task sets are not fetched here: `datasets` keeps its own cache.
"""

from __future__ import annotations

import email.utils
import fcntl
import hashlib
import os
import re
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import requests

from nanochat_jax.config import Config, DataConfig
from nanochat_jax.data.files import write_json
from nanochat_jax.data.shards import MANIFEST, Shard, manifest, shard_files
from nanochat_jax.distributed import leader_first
from nanochat_jax.errors import UserError

__all__ = ["download", "ensure_shards", "fetch", "fetch_eval_bundle", "prepare_shards", "shard_files"]

Log = Callable[[str], None]

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
WORKERS = 8
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of the body
LONGEST_WAIT = 600  # seconds
SHARD_BYTES = 110_000_000  # a rough upper estimate, to see a full disk before it is full
BUNDLE_LIMIT = 4 * 2**30  # bytes unpacked; the real one has less than one


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


def to_stderr(line: str) -> None:
    """The log for those who have none."""
    print(line, file=sys.stderr, flush=True)


def download(config: Config, log: Log = to_stderr) -> None:
    """The `download` command: the shards, and the CORE bundle where the run measures CORE. UserError on failure."""
    train, validation = prepare_shards(config.data, log)
    log(f"{len(train)} training shards and {validation.name} for validation in {validation.parent}")
    if "core" in config.eval.base or config.base.core_every:
        log(f"CORE bundle in {fetch_eval_bundle(config.data, log)}")


def prepare_shards(
    config: DataConfig, log: Log = to_stderr, recorded: Sequence[str] | None = None
) -> tuple[list[Path], Path]:
    """Training files and validation file of this run.

    Of a published set the first `num_shards` and its last. Of another folder those that the run `recorded` when it was
    started, in that order: what appeared in it since is left alone, and said.
    """
    folder = leader_first("shards", lambda: ensure_shards(config, log))
    if config.dir is None and config.source in SETS:
        shards = SETS[config.source]
        return shard_files(folder, [shards.name(i) for i in (*range(config.num_shards), shards.last)])
    if recorded and (new := sorted({path.name for path in folder.glob("*.parquet")} - set(recorded))):
        log(f"{folder}: {', '.join(new)} came after this run was started, left alone")
    return shard_files(folder, recorded)


def ensure_shards(config: DataConfig, log: Log = to_stderr) -> Path:
    """The folder of parquet files; downloads what is missing of a published set, validation shard first."""
    if config.dir is not None:
        return Path(config.dir).expanduser()
    if config.source == "embedded":
        return Path(__file__).parent.parent / "corpus"
    shards = SETS[config.source]
    if not 1 <= config.num_shards <= shards.last:
        raise UserError(
            f"--data.num-shards {config.num_shards}: {config.source} has 1 to {shards.last} training shards"
        )
    folder = Path(config.cache).expanduser() / config.source
    names = {shards.name(i) for i in range(config.num_shards)}
    if not names <= set(manifest(folder)):
        training = sorted(names.union(manifest(folder)[:-1]))
        record = {"repository": shards.repository, "training": training, "validation": shards.name(shards.last)}
        write_json(folder / MANIFEST, record)
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
    _fetch_shards(shards, missing, folder, log)
    return folder


def _fetch_shards(shards: ShardSet, indices: list[int], folder: Path, log: Log) -> None:
    stop = threading.Event()

    def fetch_one(index: int) -> Path:
        path = folder / shards.name(index)
        fetch(shards.url(index), path, check=Shard, stop=stop, log=log)
        return path

    def report(path: Path, done: int) -> None:
        log(f"{path.name}  {path.stat().st_size / 1e6:.1f} MB  {done}/{len(indices)}")

    report(fetch_one(indices[0]), 1)
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(fetch_one, index) for index in indices[1:]]
        try:
            for done, job in enumerate(as_completed(jobs), start=2):
                report(job.result(), done)
        except BaseException:
            # The first failure, or Ctrl-C, must not wait for gigabytes under way; what is there stays as .part.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def fetch_eval_bundle(config: DataConfig, log: Log = to_stderr) -> Path:
    """The folder with `core.yaml`: the one configured, or the published bundle, downloaded and unpacked once."""
    return leader_first("bundle", lambda: _eval_bundle(config, log))


def _eval_bundle(config: DataConfig, log: Log) -> Path:
    if config.eval_bundle is not None:
        folder = Path(config.eval_bundle).expanduser()
        if not (folder / "core.yaml").is_file():
            raise UserError(
                f"--data.eval-bundle {folder} has no core.yaml; unpack eval_bundle.zip there or unset the option"
            )
        return folder
    cache = Path(config.cache).expanduser()
    folder = cache / "eval_bundle"
    if folder.is_dir():
        return folder
    url = os.environ.get("EVAL_BUNDLE_URL", BUNDLE_URL)
    log(f"downloading {url}")
    archive = cache / "eval_bundle.zip"
    fetch(url, archive, log=log)
    _check_zip(archive)
    fresh = cache / f"eval_bundle.{os.getpid()}.part"
    shutil.rmtree(fresh, ignore_errors=True)
    with zipfile.ZipFile(archive) as bundle:
        bundle.extractall(fresh)
    found = next(fresh.glob("**/core.yaml"), None)
    if found is None:
        shutil.rmtree(fresh)
        raise UserError(f"{archive} has no core.yaml; delete it and see what {url} gives")
    os.replace(found.parent, folder)
    shutil.rmtree(fresh, ignore_errors=True)
    archive.unlink()
    return folder


def _check_zip(path: Path) -> None:
    """Deletes an archive that is damaged, would write outside its folder, or is far too large, and raises UserError."""
    try:
        with zipfile.ZipFile(path) as bundle:
            members = bundle.infolist()
            damaged = bundle.testzip()
        fault = damaged and f"is damaged at {damaged}"
    except zipfile.BadZipFile as error:
        members, fault = [], f"is not a zip archive ({error})"
    for member in members:
        # The upper half of external_attr is the Unix mode; 0xA000 marks a symbolic link.
        link = (member.external_attr >> 16) & 0xF000 == 0xA000
        if link or member.filename.startswith(("/", "\\")) or ".." in Path(member.filename).parts:
            fault = f"holds {member.filename!r}, which leads out of its folder"
    if sum(member.file_size for member in members) > BUNDLE_LIMIT:
        fault = f"would unpack to more than {BUNDLE_LIMIT / 2**30:.0f} GiB"
    if fault:
        path.unlink()
        raise UserError(f"{path} {fault}; it was deleted: run again, or set --data.eval-bundle")


class _Again(Exception):
    """An attempt failed in a way that may pass. `wait` is what the server asked for, seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Damaged(_Again):
    """What is there so far is of no use."""


def fetch(
    url: str,
    path: Path,
    sha256: str | None = None,
    retries: int = 5,
    *,
    backoff: float = 1.0,
    check: Callable[[Path], object] | None = None,
    stop: threading.Event | None = None,
    log: Log = to_stderr,
) -> None:
    """Downloads `url` to `path` unless it is there, going on from an earlier break.

    Network errors and the statuses 408, 429 and 5xx are tried again `retries` times, after `backoff` seconds doubled
    each time or what Retry-After asks for. A damaged file (by its size, by `sha256` or the hash that Hugging Face
    tells, or by `check` raising UserError) is thrown away and counts as a failed attempt. Raises UserError when it
    gives up, for any other status, and when `stop` is set.
    """
    if path.exists():
        return
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise UserError(f"{path} is not there and HF_HUB_OFFLINE forbids to download it; unset it or copy the file")
    stop = stop or threading.Event()
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists():  # another process had the lock, and finished
                return
            for attempt in range(retries + 1):
                try:
                    expected = _receive(url, file, stop)
                    _inspect(part, sha256 or expected, check)
                    break
                except (_Again, requests.RequestException) as error:
                    if isinstance(error, _Damaged):
                        file.truncate(0)
                    if attempt == retries:
                        raise UserError(
                            f"could not download {url} in {retries + 1} attempts: {error}; run again to go on"
                        ) from error
                    wait = min(getattr(error, "wait", None) or backoff * 2**attempt, LONGEST_WAIT)
                    log(f"{path.name}: {error}; trying again in {wait:.0f} s")
                    stop.wait(wait)
            os.fsync(file.fileno())
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; make room or set --data.cache") from error


def _receive(url: str, file: BinaryIO, stop: threading.Event) -> str | None:
    """Asks once for what `file`, open for appending, does not hold yet. Returns the whole file's sha256 where told.

    Raises _Again, _Damaged, requests.RequestException or UserError.
    """
    have = os.fstat(file.fileno()).st_size
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status, total = response.status_code, _total_size(response)
        if status in (408, 429) or status >= 500:
            raise _Again(f"status {status} {response.reason}", _retry_after(response))
        if status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise _Damaged("the server resumed at another place")
        if status == 200:
            file.truncate(0)  # the server does not resume
        elif status != 206 and not (status == 416 and have):
            raise UserError(f"{url} answers {status} {response.reason}")
        if status != 416:  # 416: nothing is left to send
            for chunk in response.iter_content(2**16):  # what a break loses at most
                if stop.is_set():
                    raise UserError(f"{url}: stopped")
                file.write(chunk)
            file.flush()
        size = os.fstat(file.fileno()).st_size
        if total is not None and size != total:
            raise (_Damaged if size > total else _Again)(f"{size} of {total} bytes came")
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


def _total_size(response: requests.Response) -> int | None:
    """Bytes of the whole file, where the server says."""
    size = response.headers.get("Content-Range", "").rpartition("/")[2]
    if not size and response.status_code == 200:
        size = response.headers.get("Content-Length", "")
    return int(size) if size.isdigit() else None


def _retry_after(response: requests.Response) -> float | None:
    """Seconds to wait: the header gives them as a number or as a date."""
    value = response.headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
