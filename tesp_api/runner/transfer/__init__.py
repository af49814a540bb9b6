"""How bytes come and go: one file per scheme, all behind `Transfer`."""

import errno
import os
from typing import BinaryIO, Callable, Iterator, NamedTuple

from ..errors import Problem
from ..tree import Tree, encode
from ..watch import Watch

BLOCK = 262144
"""Bytes moved at a time."""

_MODULES = {"": "file", "file": "file", "http": "http", "https": "http"}


class Context(NamedTuple):
    """What a transfer may use: the node's file roots, and the wish to stop, which interrupts it.

    `pause` is how many seconds pass before a second try; each further pause is twice as long. `note` tells the user
    of what is odd but no problem.
    """

    roots: Tree
    watch: Watch
    pause: float = 0.5
    note: Callable[[str], None] = lambda line: None


class Entry(NamedTuple):
    """One thing in a remote directory; `relative` to it, with slashes."""

    relative: str
    url: str
    is_directory: bool


class Source(NamedTuple):
    """A file to send: read from `fd`, which may be read again from its start."""

    fd: int
    size: int
    executable: bool = False


class Transfer:
    """One scheme. Problem (or OSError) says what went wrong, Stopped that the job shall stop.

    Each names what failed; no credentials that a URL holds, and no query, ever get into a message.
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    def fetch(self, url: str, fd: int) -> None:
        """Write the file at `url` into the empty file `fd`, all of it or raise."""
        raise NotImplementedError

    def is_directory(self, url: str) -> bool:
        """Whether there is a directory at `url`, as far as the scheme can tell one from a file."""
        return False

    def entries(self, url: str) -> Iterator[Entry]:
        """All that lies below the directory at `url`, directories before what is in them."""
        raise NotImplementedError

    def send(self, url: str, source: Source) -> int:
        """Put the file at `url`, directories made as needed: the number of bytes sent."""
        raise NotImplementedError

    def make_directory(self, url: str) -> None:
        """Make an empty directory at `url`, where the scheme has such a thing."""

    def join(self, url: str, relative: str) -> str:
        """The URL of something below `url`, exactly one slash between."""
        from urllib.parse import quote_from_bytes

        base, mark, query = url.partition("?")
        return base.rstrip("/") + "/" + quote_from_bytes(encode(relative)) + mark + query

    def public(self, url: str) -> str:
        """The URL as it may be shown."""
        return url


def scheme_of(url: str) -> str:
    """The scheme in lower case; empty for a bare absolute path."""
    if url.startswith("/"):
        return ""
    scheme, colon, _ = url.partition(":")
    return scheme.lower() if colon else url


def open_transfer(url: str, context: Context) -> Transfer:
    """The transfer for a URL's scheme; Problem if there is none."""
    module = _MODULES.get(scheme_of(url))
    if module == "file":
        from .file import FileTransfer

        return FileTransfer(context)
    if module == "http":
        from .http import HttpTransfer

        return HttpTransfer(context)
    known = ", ".join(sorted(name for name in _MODULES if name))
    scheme = url.partition(":")[0] if ":" in url else "none"
    raise Problem("cannot transfer this kind of URL (scheme: %s); known are absolute paths, %s" % (scheme[:40], known))


def copy_sparse(source: int, target: int, size: int, check: Callable[[], None]) -> int:
    """Copy the first `size` bytes into an empty file: how many there were. Holes stay holes: a container can make
    one of any size for nothing."""
    at = 0
    while at < size:
        try:
            begin = min(size, os.lseek(source, at, os.SEEK_DATA))
            end = min(size, os.lseek(source, begin, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                begin = end = max(at, min(size, os.fstat(source).st_size))
            else:  # this file system knows no holes
                begin, end = at, size
        if begin > at:
            check()
            os.ftruncate(target, begin)
        at = begin + _copy(source, target, begin, end, check)
        if at < end or begin == end:
            break
    return at


def _copy(source: int, target: int, begin: int, end: int, check: Callable[[], None]) -> int:
    os.lseek(source, begin, os.SEEK_SET)
    os.lseek(target, begin, os.SEEK_SET)
    at = begin
    while at < end:
        check()
        data = os.read(source, min(BLOCK, end - at))
        if not data:
            break
        write_all(target, data)
        at += len(data)
    return at - begin


def write_all(fd: int, data: bytes) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def reader(source: Source) -> BinaryIO:
    """The source from its start, as a file that closes on its own."""
    fd = os.dup(source.fd)
    os.lseek(fd, 0, os.SEEK_SET)
    return os.fdopen(fd, "rb")
