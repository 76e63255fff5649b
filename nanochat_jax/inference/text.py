"""Text from tokens as they come: whole characters only, and stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class TextStream:
    """Bytes in, text out. Held back is what may still become a character or a stop string."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; it and what follows are dropped."""
        self.dropped = 0
        """How many characters of what was fed that is, half a character being one."""

    def feed(self, data: bytes) -> str:
        """The text that is certain now."""
        return self._sent(self._decoder.decode(data), self._may_begin_stop)

    def flush(self) -> str:
        """What was held back, where nothing more comes: half a character becomes U+FFFD."""
        text = self._sent(self._decoder.decode(b"", final=True), lambda text: 0)
        self._decoder.reset()
        return text

    def _sent(self, text: str, keep: Callable[[str], int]) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        at = min((text.find(s) for s in self._stop if s in text), default=-1)
        self.stopped = at >= 0
        if self.stopped:
            self.dropped = len(text) - at + len(self._decoder.decode(b"", final=True))
        end = at if self.stopped else len(text) - keep(text)
        self._held = "" if self.stopped else text[end:]
        return text[:end]

    def _may_begin_stop(self, text: str) -> int:
        """Length of the longest end of `text` that is a proper beginning of a stop string."""
        return max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
