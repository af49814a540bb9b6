"""`file:` URLs and bare absolute paths: only what lies beneath the plan's file roots."""

import os
import stat
from contextlib import contextmanager
from typing import Iterator

from .. import job
from ..errors import Missing, Problem, Refused
from ..tree import Draft, decode, reason, show
from . import Entry, Source, Transfer, copy_sparse


class FileTransfer(Transfer):
    """See Transfer."""

    def fetch(self, url: str, fd: int) -> None:
        """See Transfer. The copy can be executed if the original can."""
        path = path_of(url)
        with _named(show(path)):
            source = self.context.roots.open_read(path)
        try:
            facts = os.fstat(source)
            with _named("copying %s" % show(path)):
                count = copy_sparse(source, fd, facts.st_size, self.context.watch.check)
            if count < facts.st_size:
                raise Problem("%s became shorter while it was copied" % show(path))
            mode = facts.st_mode
            if mode & 0o111:
                os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | (mode & 0o111))
        finally:
            os.close(source)

    def is_directory(self, url: str) -> bool:
        """See Transfer."""
        path = path_of(url)
        with _named(show(path)):
            facts = self.context.roots.stat(path)
        return facts is not None and stat.S_ISDIR(facts.st_mode)

    def entries(self, url: str) -> Iterator[Entry]:
        """See Transfer. Links count as what they lead to; one that leads out of the roots is an error."""
        path = path_of(url)
        with _named(show(path)):
            facts = self.context.roots.stat(path)
        if facts is None:
            raise Missing("%s does not exist" % show(path))
        if not stat.S_ISDIR(facts.st_mode):
            raise Refused("%s is not a directory" % show(path))
        for found in self.context.roots.walk(path):
            self.context.watch.check()
            if found.kind is None:
                raise Refused("%s: %s" % (show(found.path), found.problem))
            yield Entry(found.relative, found.path, found.kind == job.DIRECTORY)

    def send(self, url: str, source: Source) -> int:
        """See Transfer. The file appears under its name only when it is complete."""
        path = path_of(url)
        if path.endswith("/"):
            raise Refused("%s names a directory" % show(path))
        with _named(show(path)):
            draft = self.context.roots.draft(path, source.executable)
        try:
            with _named("copying to %s" % show(path)):
                count = self._copy(source, draft)
            with _named(show(path)):
                draft.commit()
        except BaseException:
            draft.discard()
            raise
        return count

    def _copy(self, source: Source, draft: Draft) -> int:
        return copy_sparse(source.fd, draft.fd, source.size, self.context.watch.check)

    def make_directory(self, url: str) -> None:
        """See Transfer."""
        path = path_of(url)
        with _named(show(path)):
            self.context.roots.make_directory(path)

    def join(self, url: str, relative: str) -> str:
        """See Transfer. A bare path is no URL: nothing in it is encoded."""
        if url.startswith("/"):
            return url.rstrip("/") + "/" + relative
        from urllib.parse import quote_from_bytes

        from ..tree import encode

        return url.rstrip("/") + "/" + quote_from_bytes(encode(relative))


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Give the system's errors, which say only what went wrong, the name of what they are about."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, "%s: %s" % (what, reason(error)))  # still of the same kind


def path_of(url: str) -> str:
    """The path on the node that a `file:` URL or a bare path names."""
    path = url
    if not url.startswith("/"):
        from urllib.parse import unquote_to_bytes

        rest = url[len("file:") :]
        if rest.startswith("//"):
            host, slash, rest = rest[2:].partition("/")
            if host.lower() not in ("", "localhost", "127.0.0.1"):
                raise Refused("file://%s%s names another host" % (host.rpartition("@")[2], slash + rest))
            rest = slash + rest
        path = decode(unquote_to_bytes(rest))
    if not path.startswith("/"):
        raise Problem("%s is not an absolute path" % url)
    if ".." in path.split("/"):
        raise Refused("%s holds .." % url)
    return path
