"""Byte-level BPE: trained with rustbpe, applied with tiktoken, stored as JSON; and conversations as token ids.

The vocabulary is the learned merges in order of rank, then the special tokens. A special token's name in somebody's
text is ordinary text; only this module and its callers place the real ones. Those that people name for themselves,
such as <|think|>, stand where the assistant's text has their name. Left out: normalisation and unknown tokens, which a
byte-level vocabulary does not need.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import regex
import rustbpe
import tiktoken

from nanochat_jax.data.files import read_json, write_json
from nanochat_jax.data.turns import check_turns
from nanochat_jax.errors import UserError

SPECIALS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
# GPT-4's pattern, but numbers in groups of one or two digits: a small vocabulary has no room for every number to 999.
SPLIT_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)
BLANKS = 100_000
"""Characters of white space in a row after which a text is cut: tiktoken's stack ends at about ten times as many, and
rustbpe's.
"""
FILE_NAME = "tokenizer.json"
FORMAT = 1

# What a conversation is made of before encoding: a special token's id or a text, and whether the loss counts it.
Piece = tuple[int | str, int]


class Tokenizer:
    """A fixed vocabulary. All methods are safe to call from several threads."""

    def __init__(
        self, ranks: Sequence[bytes], pattern: str = SPLIT_PATTERN, specials: Sequence[str] = SPECIALS
    ) -> None:
        """`ranks` are the byte strings of the ordinary tokens in order of their ids."""
        self.ranks = tuple(ranks)
        self.pattern = pattern
        self.specials = {name: len(self.ranks) + i for i, name in enumerate(specials)}
        self._encoding = tiktoken.Encoding(
            name="nanochat_jax",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.ranks)},
            special_tokens=self.specials,
        )
        self.vocab_size = len(self.ranks) + len(self.specials)
        self.own_specials = tuple(name for name in specials if name not in SPECIALS)
        """Special tokens that people have named: the assistant's text has them by name, others' never."""
        self._own_name = re.compile(f"({'|'.join(map(re.escape, self.own_specials))})")
        self.marker_ids = frozenset(i for name, i in self.specials.items() if name in SPECIALS)
        """The special tokens that conversations are made of, and that are no part of anybody's text."""
        self.bos_id = self.special_id("<|bos|>")
        self.token_bytes = np.array([len(token) for token in self.ranks] + [0] * len(self.specials), dtype=np.int32)
        """int32 [vocab_size]: how many bytes of text a token stands for, 0 for special tokens."""
        self.token_bytes.setflags(write=False)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, pattern: str | None = None, specials: Sequence[str] = ()
    ) -> Tokenizer:
        """Learns the merges. `vocab_size` counts the 256 bytes and the special tokens too; no `pattern`: SPLIT_PATTERN.

        `specials`, see `check_specials`, come after the usual ones. Raises UserError where `vocab_size` is too small to
        hold all these, or too large for the text to fill.
        """
        pattern = SPLIT_PATTERN if pattern is None else pattern
        specials = (*SPECIALS, *specials)
        smallest = 256 + len(specials)
        if vocab_size < smallest:
            raise UserError(
                f"--tokenizer.vocab-size {vocab_size} is below {smallest}: 256 bytes and {len(specials)} special tokens"
            )
        trainer = rustbpe.Tokenizer()
        pieces = (piece for text in texts for piece in _cut(text))
        trainer.train_from_iterator(pieces, vocab_size - len(specials), pattern=pattern)
        ranks = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])]
        reached = len(ranks) + len(specials)
        if reached != vocab_size:
            raise UserError(
                f"--tokenizer.vocab-size {vocab_size} is more than this text can give: its merges end at {reached}; "
                "lower the size or give more text"
            )
        return cls(ranks, pattern, specials)

    @classmethod
    def load(cls, directory: Path | str) -> Tokenizer:
        """Reads what `save` wrote. Raises UserError where the file is missing or damaged."""
        path = Path(directory) / FILE_NAME
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}; the tokenizer stage makes it")
        try:
            stored = read_json(path)
            version, pattern, specials = stored["format"], stored["pattern"], stored["specials"]
            ranks = [base64.b64decode(token, validate=True) for token in stored["ranks"]]
            intact = stored["fingerprint"] == _fingerprint(ranks, pattern, specials)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a tokenizer file ({error!r}); train the tokenizer again") from error
        if version != FORMAT or not intact:
            raise UserError(f"{path} is damaged or of format {version}, not {FORMAT}; train the tokenizer again")
        return cls(ranks, pattern, specials)

    def save(self, directory: Path | str) -> None:
        """Writes `tokenizer.json`, whole or not at all."""
        stored = {
            "format": FORMAT,
            "pattern": self.pattern,
            "specials": list(self.specials),
            "ranks": [base64.b64encode(token).decode("ascii") for token in self.ranks],
            "token_bytes": self.token_bytes.tolist(),
            "fingerprint": self.fingerprint(),
        }
        write_json(Path(directory) / FILE_NAME, stored)

    def fingerprint(self) -> str:
        """A hex digest that two tokenizers share only if they encode alike."""
        return _fingerprint(self.ranks, self.pattern, list(self.specials))

    def special_id(self, name: str) -> int:
        """The id of a special token such as `<|assistant_end|>`."""
        return self.specials[name]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, special tokens in it taken as ordinary text."""
        if len(text) <= BLANKS:
            return self._encoding.encode_ordinary(text)
        return [token for piece in _cut(text) for token in self._encoding.encode_ordinary(piece)]

    def encode_batch(self, texts: list[str], num_threads: int | None = None) -> list[list[int]]:
        """`encode` of each text, over threads; unset: one for each CPU core, at most 16."""
        workers = num_threads or min(os.cpu_count() or 1, 16)
        # A job is several texts: a job for each, as tiktoken's own batch has it, costs more than encoding a short one.
        size = math.ceil(len(texts) / (4 * workers)) or 1
        parts = [texts[i : i + size] for i in range(0, len(texts), size)]
        if workers == 1 or len(parts) < 2:
            return self._encode_all(texts)
        with ThreadPoolExecutor(workers) as pool:
            return [ids for part in pool.map(self._encode_all, parts) for ids in part]

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`: special tokens by name, bytes that are no UTF-8 as U+FFFD."""
        return self._encoding.decode(ids, errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of `ids`, as they are; for streaming, where a character may be split between tokens."""
        return self._encoding.decode_bytes(ids)

    def render(self, conversation: dict) -> tuple[list[int], list[int]]:
        """Ids of a conversation and, for each, 1 if the assistant is to learn to write it.

        Learned are the assistant's text, its python with both markers and its assistant_end; not what others write,
        nor the outputs of its tools. Raises UserError where the turns are out of order.
        """
        return self.render_batch([conversation], num_threads=1)[0]

    def render_batch(
        self, conversations: Sequence[dict], num_threads: int | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """`render` of each conversation; all their texts are encoded together, over threads."""
        all_pieces = [self._pieces(turns(conversation)) for conversation in conversations]
        texts = [piece for pieces in all_pieces for piece, _ in pieces if isinstance(piece, str)]
        encoded = iter(self.encode_batch(texts, num_threads))
        rendered = []
        for pieces in all_pieces:
            ids: list[int] = []
            mask: list[int] = []
            for piece, learned in pieces:
                tokens = next(encoded) if isinstance(piece, str) else [piece]
                ids += tokens
                mask += [learned] * len(tokens)
            rendered.append((ids, mask))
        return rendered

    def render_for_completion(self, conversation: dict) -> list[int]:
        """Ids up to and including the assistant_start of an answer; a last message of the assistant is left out."""
        messages = turns(conversation)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        ids, _ = self.render({"messages": messages})
        return [*ids, self.special_id("<|assistant_start|>")]

    def _pieces(self, messages: list[dict]) -> list[Piece]:
        special = self.special_id
        pieces: list[Piece] = [(self.bos_id, 0)]
        for message in messages:
            content = message["content"]
            if message["role"] == "user":
                pieces += [(special("<|user_start|>"), 0), (content, 0), (special("<|user_end|>"), 0)]
                continue
            pieces.append((special("<|assistant_start|>"), 0))
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    pieces += [(piece, 1) for piece in self._with_specials(part["text"])]
                elif part["type"] == "python":
                    pieces += [(special("<|python_start|>"), 1), (part["text"], 1), (special("<|python_end|>"), 1)]
                else:
                    pieces += [(special("<|output_start|>"), 0), (part["text"], 0), (special("<|output_end|>"), 0)]
            pieces.append((special("<|assistant_end|>"), 1))
        return pieces

    def _with_specials(self, text: str) -> Iterator[int | str]:
        """The assistant's `text`, with the ids of special tokens of people's own in place of their names."""
        for piece in self._own_name.split(text) if self.own_specials else [text]:
            yield self.specials[piece] if piece in self.own_specials else piece


def turns(conversation: dict) -> list[dict]:
    """The messages with a leading system message joined to the first of the user. UserError as `check_turns`."""
    messages = conversation["messages"]
    check_turns(messages, "conversation")
    system = [message["content"] for message in messages[:1] if message["role"] == "system"]
    if len(messages) == len(system):
        raise UserError("a conversation needs at least one message of the user")
    first, *rest = messages[len(system) :]
    return [{"role": "user", "content": "\n\n".join([*system, first["content"]])}, *rest]


def check_specials(names: Sequence[str]) -> None:
    """UserError unless these can be the names of further special tokens: <|word|>, each once, none of SPECIALS."""
    for name in names:
        if not (re.fullmatch(r"<\|[^<|>\s]+\|>", name) and name.isprintable()):
            raise UserError(f"--tokenizer.specials {name!r:.40}: a name must look like <|think|>, without blanks")
        if name in SPECIALS or names.count(name) > 1:
            raise UserError(f"--tokenizer.specials {name!r:.40} is there already: choose another name")


def check_pattern(pattern: str, texts: Iterable[str]) -> None:
    """UserError where `pattern` is no regular expression, or some character of `texts`, or any other, is in none of its
    matches: it would be lost.
    """
    try:
        compiled = regex.compile(pattern)
        tokenizer = Tokenizer([bytes([byte]) for byte in range(256)], pattern)  # by another engine, of fewer words
    except (regex.error, ValueError) as error:
        raise UserError(f"--tokenizer.pattern {pattern!r} is no regular expression: {error}") from None
    every = "".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    for text in (*texts, every):
        at = 0
        for match in compiled.finditer(text):
            if match.start() != at or match.end() == at:
                break
            at = match.end()
        if at < len(text) or tokenizer.decode(tokenizer.encode(text)) != text:
            lost = text[at : at + 12] or "some character"
            raise UserError(
                f"--tokenizer.pattern {pattern!r} leaves out {lost!r}, which would be lost: "
                r"let it match every character, for example with |\s+|. at its end"
            )


def _cut(text: str) -> list[str]:
    """`text` in pieces, cut where more than BLANKS characters of white space follow each other."""
    if len(text) <= BLANKS:
        return [text]
    # Each run is found whole: looking for BLANKS in a row at every place of a shorter one takes seconds, and the GIL.
    runs = [run.span() for run in re.finditer(r"\s\s+", text)]
    cuts = [at for start, end in runs if end - start >= BLANKS for at in range(start, end + 1, BLANKS)]
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


def _fingerprint(ranks: Sequence[bytes], pattern: str, specials: list[str]) -> str:
    digest = hashlib.sha256(json.dumps([pattern, specials]).encode())
    for token in ranks:
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()
