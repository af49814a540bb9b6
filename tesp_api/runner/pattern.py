"""Output patterns: POSIX 2.13, one path component at a time."""

import re
from typing import Callable, List, Pattern

_CLASSES = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "blank": " \\t",
    "cntrl": "\\x00-\\x1f\\x7f",
    "digit": "0-9",
    "graph": "\\x21-\\x7e",
    "lower": "a-z",
    "print": "\\x20-\\x7e",
    "punct": "!-/:-@\\[-`{-~",
    "space": "\\s",
    "upper": "A-Z",
    "xdigit": "0-9A-Fa-f",
}


def is_pattern(component: str) -> bool:
    """Whether a component holds anything but itself."""
    return any(sign in component for sign in "*?[\\")


def compiled(component: str) -> "Pattern[str]":
    """A regular expression for whole names: a leading dot matches only a dot that is written out."""
    parts: List[str] = []
    if component[:1] in ("*", "?", "["):
        parts.append(r"(?!\.)")
    at = 0
    while at < len(component):
        sign = component[at]
        at += 1
        if sign == "*":
            if parts[-1:] != [".*"]:
                parts.append(".*")
        elif sign == "?":
            parts.append(".")
        elif sign == "[":
            end = _bracket_end(component, at)
            if end < 0:
                parts.append(r"\[")
            else:
                parts.append(_bracket(component[at:end]))
                at = end + 1
        else:
            if sign == "\\" and at < len(component):
                sign = component[at]
                at += 1
            parts.append(re.escape(sign))
    return re.compile("(?s)" + "".join(parts) + r"\Z")


def _bracket_end(text: str, at: int) -> int:
    """Where the bracket expression that begins at `at` closes, or -1: then `[` is just itself."""
    if text[at : at + 1] in ("!", "^"):
        at += 1
    if text[at : at + 1] == "]":
        at += 1
    while at < len(text) and text[at] != "]":
        if text[at : at + 2] == "[:" and ":]" in text[at + 2 :]:
            at = text.index(":]", at + 2) + 1
        at += 1
    return at if at < len(text) else -1


def _bracket(inner: str) -> str:
    negated = inner[:1] in ("!", "^")
    if negated:
        inner = inner[1:]
    parts: List[str] = []
    at = 0
    while at < len(inner):
        if inner[at : at + 2] == "[:" and ":]" in inner[at + 2 :]:
            end = inner.index(":]", at + 2)
            parts.append(_CLASSES.get(inner[at + 2 : end], ""))
            at = end + 2
        elif inner[at + 1 : at + 2] == "-" and at + 2 < len(inner):
            if inner[at] <= inner[at + 2]:  # a range that runs backwards holds nothing
                parts.append("%s-%s" % (re.escape(inner[at]), re.escape(inner[at + 2])))
            at += 3
        else:
            parts.append(re.escape(inner[at]))
            at += 1
    chosen = "".join(parts)
    if not chosen:
        return "." if negated else "(?!)"
    return "[%s%s]" % ("^" if negated else "", chosen)


def matches(pattern: str, names: Callable[[str], List[str]]) -> List[str]:
    """All paths that match an absolute pattern, sorted. `names` lists a directory, empty when there is none."""
    found = [""]
    for component in [part for part in pattern.split("/") if part]:
        if is_pattern(component):
            wanted = compiled(component)
            found = [base + "/" + name for base in found for name in names(base or "/") if wanted.match(name)]
        else:
            found = [base + "/" + component for base in found]
    return sorted(found)
