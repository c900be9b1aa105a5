"""How a request ends when it is not done."""

from __future__ import annotations

from isthmus._native import CONTROL_TEXT_MAX


class Refuse(Exception):
    """The answer to a request is `refused`."""

    def __init__(self, refusal: str, text: str, rule: int = 0) -> None:
        super().__init__(text)
        self.refusal = refusal
        self.text = text
        self.rule = rule


class Fault(Exception):
    """The program broke the protocol; its attachment ends."""


def shown(text: str) -> str:
    """A stranger's text, quoted and short."""
    return repr(text if len(text) <= 70 else text[:67] + "...")


def bounded(text: str) -> str:
    """A text that fits its field."""
    data = text.encode("utf-8", "replace")
    return text if len(data) <= CONTROL_TEXT_MAX else data[:CONTROL_TEXT_MAX].decode("utf-8", "ignore")
