"""The first stage: learn the vocabulary from the training shards, store it, and measure how well it compresses.

    python -m nanochat_jax tokenizer --workdir runs/tiny_cpu

Writes tokenizer/{tokenizer.json, eval.json, done.json}. The validation shard is not learned from, only measured on.
GPT-2's and GPT-4's tokenizers stand beside ours where tiktoken has their files; runs that download shards fetch them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import tiktoken

from nanochat_jax.config import Config, TokenizerConfig
from nanochat_jax.data.download import SETS, fetch, prepare_shards
from nanochat_jax.data.files import write_json
from nanochat_jax.data.shards import read_texts
from nanochat_jax.distributed import barrier, is_leader
from nanochat_jax.errors import UserError
from nanochat_jax.stages.session import Log, is_done
from nanochat_jax.tokenizer import Tokenizer, check_pattern, check_specials

VALIDATION_CHARS = 1_000_000
BLOBS = "https://openaipublic.blob.core.windows.net"
# tiktoken's name of each tokenizer to compare with, and the files it is made from.
OTHERS = {
    "gpt2": ("gpt2", (f"{BLOBS}/gpt-2/encodings/main/vocab.bpe", f"{BLOBS}/gpt-2/encodings/main/encoder.json")),
    "gpt4": ("cl100k_base", (f"{BLOBS}/encodings/cl100k_base.tiktoken",)),
}


def run(config: Config, workdir: Path, log: Log) -> None:
    """Trains the tokenizer of a run; nothing to do where that is complete. Of several processes the leader does it."""
    if is_done(workdir, "tokenizer", log):
        return
    check_specials(config.tokenizer.specials)
    train_files, validation_file = prepare_shards(config.data, log)
    if is_leader():
        if config.data.dir is None and config.data.source in SETS:
            fetch_others(log)
        learn(config.tokenizer, workdir / "tokenizer", train_files, validation_file, log)
    barrier("tokenizer")


def learn(
    settings: TokenizerConfig, folder: Path, train_files: Sequence[Path], validation_file: Path, log: Log
) -> None:
    """Trains and measures a tokenizer and writes it to `folder`, done.json last."""
    start = time.perf_counter()
    if not any(read_texts([validation_file])):
        raise UserError(f"{validation_file}, the last shard and so the one to validate on, holds no text: add another")
    if settings.pattern is not None:
        check_pattern(settings.pattern, [validation_text(validation_file), *sample_texts().values()])
    texts = CutTexts(read_texts(train_files), settings.doc_cap, settings.max_chars)
    log(f"tokenizer: learning {settings.vocab_size:,} tokens from up to {settings.max_chars:,} characters")
    tokenizer = Tokenizer.train(texts, settings.vocab_size, settings.pattern, settings.specials)
    tokenizer.save(folder)
    log(f"tokenizer: {texts.characters:,} characters of {texts.documents:,} documents")
    write_json(folder / "eval.json", evaluate(tokenizer, validation_file, log))
    done = {
        "stage": "tokenizer",
        "vocab_size": tokenizer.vocab_size,
        "documents": texts.documents,
        "characters": texts.characters,
        "fingerprint": tokenizer.fingerprint(),
        "seconds": time.perf_counter() - start,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(folder / "done.json", done)


class CutTexts:
    """Documents cut at `doc_cap` characters, until `max_chars` are given; counts what it gave."""

    def __init__(self, texts: Iterable[str], doc_cap: int, max_chars: int) -> None:
        self._texts, self._doc_cap, self._max_chars = texts, doc_cap, max_chars
        self.documents = self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            text = text[: min(self._doc_cap, self._max_chars - self.characters)]
            self.documents += 1
            self.characters += len(text)
            yield text
            if self.characters >= self._max_chars:
                return


def evaluate(tokenizer: Tokenizer, validation_file: Path, log: Log) -> dict:
    """Bytes of UTF-8 per token, more is better: {"bytes_per_token": {kind of text: {tokenizer: value}}, ...}."""
    encoders, sizes, absent = {"ours": tokenizer.encode}, {"ours": tokenizer.vocab_size}, []
    for name, (encoding_name, urls) in OTHERS.items():
        try:
            if not all(_place(url).is_file() for url in urls):
                raise FileNotFoundError
            encoding = tiktoken.get_encoding(encoding_name)
            encoders[name], sizes[name] = encoding.encode_ordinary, encoding.n_vocab
        except (OSError, ValueError):  # a damaged file is one that tiktoken asks the network for
            absent.append(name)
    figures: dict = {"vocab_size": sizes}
    if absent:
        figures["not_compared"] = f"{', '.join(absent)}: tiktoken does not have them on this machine"
        log(f"tokenizer: not compared with {figures['not_compared']}")
    table = {}
    for kind, text in (sample_texts() | {"validation shard": validation_text(validation_file)}).items():
        table[kind] = {name: len(text.encode()) / len(encode(text)) for name, encode in encoders.items()}
        log(f"tokenizer: {kind}: " + ", ".join(f"{name} {value:.2f}" for name, value in table[kind].items()))
    return figures | {"bytes_per_token": table}


def sample_texts() -> dict[str, str]:
    """Kind of text -> a short one."""
    return tomllib.loads(Path(__file__).with_name("sample_texts.toml").read_text(encoding="utf-8"))


def validation_text(file: Path) -> str:
    """The first VALIDATION_CHARS characters of a shard."""
    return "\n".join(CutTexts(read_texts([file]), VALIDATION_CHARS, VALIDATION_CHARS))


def fetch_others(log: Log) -> None:
    """The files of the tokenizers to compare with, to where tiktoken keeps them. What fails is said: a run goes on."""
    try:
        for _, urls in OTHERS.values():
            for url in urls:
                fetch(url, _place(url), log)
    except UserError as error:
        log(f"tokenizer: {error}")


def _place(url: str) -> Path:
    """Where tiktoken keeps this file."""
    default = Path(tempfile.gettempdir()) / "data-gym-cache"
    cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR") or default)
    return cache / hashlib.sha1(url.encode()).hexdigest()
