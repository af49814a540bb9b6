"""Directory listings as web servers write them: the links that lie strictly below."""

from html.parser import HTMLParser
from typing import Any, Dict, List, Optional, Tuple
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

from ..tree import decode

_SPACE = str.maketrans("", "", "\t\r\n")  # browsers leave them out of a link, and new Pythons do


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: List[str] = []

    def handle_starttag(self, tag: str, attrs: List[Tuple[str, Optional[str]]]) -> None:
        if tag == "a":
            self.found.extend(value for name, value in attrs if name == "href" and value)

    def error(self, message: str) -> Any:  # abstract in Python 3.6 - 3.9
        raise ValueError(message)


def links(page: str, url: str) -> List[Tuple[str, str]]:
    """(name, URL) of what the page at `url` (with a trailing slash) lists, each once; a directory's URL ends in `/`.

    ValueError if it is no HTML. Sort links (a query alone), the parent, other servers, deeper paths and names with a
    slash in them do not count.
    """
    parser = _Links()
    try:
        parser.feed(page)
    except AssertionError as error:  # html.parser's answer to what it takes for its own mistake
        raise ValueError(str(error))
    base = urlsplit(url)
    found: Dict[Tuple[str, str], None] = {}
    for href in parser.found:
        href = href.strip().translate(_SPACE)
        try:
            target = urlsplit(urljoin(url, href))
        except ValueError:
            continue
        if (target.scheme, target.netloc) != (base.scheme, base.netloc) or target.query:
            continue
        if not target.path.startswith(base.path) or not href or href[0] in "?#":
            continue
        rest = target.path[len(base.path) :]
        raw = unquote_to_bytes((rest[:-1] if rest.endswith("/") else rest).encode("utf-8", "surrogateescape"))
        if raw in (b"", b".", b"..") or b"/" in raw or b"\0" in raw:
            continue
        found[decode(raw), target._replace(fragment="").geturl()] = None
    return list(found)
