"""Tokens -> pieces of text, each as soon as later tokens cannot change it."""

import re
from collections.abc import Iterable, Iterator, Sequence

from navil_jax.data.prompt import END, response_text
from navil_jax.data.tokenizers import Tokenizer

# The released decoding joins at most that many characters anew when more text comes (the length of "<|im_end|>").
UNSETTLED = len(END)


class TextStream:
    """Pieces that join to `response_text` of all tokens, or to what stands before the first stop string in it.

    Incomplete UTF-8, blanks that punctuation may draw in, the start of what may be a marker, and that of what may be a
    stop string are held back.

    Example: push "a", "b", " ", ".", first byte of "é", second byte -> "a", "b", "", "", "", ""; end -> " .é"
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._shown, self._text = 0, ""
        self.stopped = False  # whether a stop string has come; nothing follows it

    def push(self, token: int) -> str:
        """The text that one more token settles; often empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        self._text = text = response_text(self._tokenizer, self._ids)
        if "<" in self._tokenizer.decode(self._ids, skip_special=True)[-UNSETTLED:]:
            return ""
        tail = max(0, len(text) - UNSETTLED)
        unsettled = re.search(r"[\s\ufffd]", text[tail:])
        return self._show(tail + unsettled.start() if unsettled else len(text), last=False)

    def end(self) -> str:
        """The text that is left when no token follows."""
        return "" if self.stopped else self._show(len(self._text), last=True)

    def _show(self, settled: int, last: bool) -> str:
        found = [at for stop in self._stops if (at := self._text.find(stop, self._shown, settled)) >= 0]
        if found:
            self.stopped = True
            settled = min(found)
        elif not last:
            settled -= max((_held(self._text[self._shown : settled], stop) for stop in self._stops), default=0)
        piece = self._text[self._shown : settled]
        self._shown = max(settled, self._shown)
        return piece


def _held(text: str, stop: str) -> int:
    """Characters at the end of a text with which the stop string may begin."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if stop.startswith(text[-size:])), 0)


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The pieces of all tokens of an answer; see `TextStream`.

    Example: tokens of "a", "b", " ", ".", first byte of "é", second byte -> "ab", ".", "é"
    """
    stream = TextStream(tokenizer)
    for token in tokens:
        if piece := stream.push(token):
            yield piece
    if piece := stream.end():
        yield piece
