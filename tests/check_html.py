"""Checks a page of HTML: tags closed in order, nothing loaded from outside."""

import html.parser
import re


class Balanced(html.parser.HTMLParser):
    """Collects addresses and checks that tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "iframe")
        assert tag != "script" or not attributes
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in ("meta", "img", "br", "input", "source"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag == "line"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(text: str) -> None:
    """Well formed, and needs nothing from outside."""
    page = Balanced()
    page.feed(text)
    assert page.open == []
    assert page.addresses
    inside = ("data:image/jpeg;base64,", "data:image/png;base64,", "#")
    beside = ("quarantine.jsonl", "findings.jsonl")
    assert all(address.startswith(inside) or address in beside for address in page.addresses)
    assert "url(" not in text
    assert "@import" not in text


def undated(text: str) -> str:
    """A report without its day and command."""
    return re.sub(r"<p>\d{4}-.*?</p>", "", text, flags=re.DOTALL)
