"""Texts in which other software marks images and clips: `<|image_pad|>`, `[IMG]`, `<video>`, ... here plain text."""

import re
from collections.abc import Iterable

from navil_jax.data.prompt import PLACEHOLDER

_THING = r"(?:images?|imgs?|pictures?|pics?|photos?|videos?|audios?|vision)"
_WORDS = r"here|place-?holders?|plh|pad|soft|token|start|end|begin|patch|new_?line|content|context|feature|\d++"
_MORE = rf"(?:[ _:-]*(?:{_WORDS}))*+"
_BEFORE = r"(?:(?:start|end|begin)_of_|fake_token_around_|global-|unk_)?"
_ANY = re.compile(
    rf"<img>[^<>\n]+</img>"  # Qwen-VL: a file or an address between them
    rf"|<\|?/?{_BEFORE}{_THING}{_MORE} ?/?\|?>"
    r"|<\|media_\w+\|>|<__media__>|<im_(?:start|end|patch)>"
    r"|^[ \t]*< +image +>|< +image +>[ \t]*$|&lt;image&gt;"
    r"|\[/?IMG(?:[ _-]\w+)?\]|\[IMAGE(?:[ _-]\w+)?\]|\[img-\d+\]",
    re.IGNORECASE | re.MULTILINE,
)
_NAME = r"[^\s)<>\"']{1,1000}\.(?:jpe?g|png|webp|gif|bmp|tiff?|avif|svg)"
_EMBEDDED = re.compile(
    rf"!\[[^\]\n]{{0,200}}\]\({_NAME}\)|<img\s[^<>]{{0,200}}?src=[\"']?{_NAME}[^<>]{{0,200}}>", re.IGNORECASE
)
_OF_TEXT = {"<img>", "</img>", "<picture>", "</picture>", "</video>", "</audio>"}  # tags of HTML
_BBCODE = re.compile(r"\[/?(?:img|image)[^-\d]*\]")  # lower case: a forum's tag


def placeholders(texts: Iterable[str]) -> list[str]:
    """The marks of images or clips in texts, in order, all but `<image>`.

    Example: ["<image><|image_pad|>Which, <video>?"] -> ["<|image_pad|>", "<video>"]
    """
    return [
        mark
        for text in texts
        for mark in _ANY.findall(text)
        if mark not in _OF_TEXT and mark != PLACEHOLDER and not _BBCODE.fullmatch(mark)
    ]


def embedded(questions: Iterable[str]) -> list[str]:
    """Images that questions show by Markdown or HTML; an answer may well write such text.

    Example: ["![](a.jpg) Which?", "<img src='b.png'>"] -> ["![](a.jpg)", "<img src='b.png'>"]
    """
    return [mark for text in questions for mark in _EMBEDDED.findall(text)]
