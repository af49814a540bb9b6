"""Inputs before the first executor, outputs after the last."""

import errno
import os
import stat
from typing import TYPE_CHECKING, Callable, Dict, List, NamedTuple, Optional

from . import job
from .errors import Missing, Problem, Refused
from .mounts import Bound, unwritten
from .tree import Tree, encode, reason, roots_tree, show
from .watch import Watch

if TYPE_CHECKING:  # loading the transfers takes longer than running a container that needs none
    from .transfer import Transfer


_SHOWN = 200  # characters of a name in a message


class _Upload(NamedTuple):
    path: str
    url: str


class Staging:
    """Moves what the plan names between URLs and what the containers see. `note` adds a line to the system logs."""

    def __init__(
        self,
        plan: job.Plan,
        bounds: List[Bound],
        inner: Tree,
        tree: Tree,
        watch: Watch,
        note: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._inner = inner  # for inputs: read-only mounts have to be filled, too
        self._tree = tree
        self._watch = watch
        self._note = note
        self._single = {bound.target.rstrip("/") for bound in bounds if bound.kind == job.FILE and not bound.live}
        self._files = {bound.target.rstrip("/") for bound in bounds if bound.kind == job.FILE}
        self._where = ""  # the field that a transfer's notes are about
        self._transfers: "Dict[str, Transfer]" = {}
        self.sent: List[job.OutputFile] = []

    def fetch_all(self) -> None:
        """Make the directories of the plan, and put every input in its place; Problem names what cannot be had."""
        for path in self._plan.directories:
            try:
                self._inner.make_directory(path)
            except (OSError, Problem) as error:
                raise Problem("%s: %s" % (path, reason(error)))
        for index, item in enumerate(self._plan.inputs):
            self._watch.check()
            self._where = "inputs[%d]" % index
            try:
                self._fetch(item)
            except (OSError, Problem) as error:
                raise Problem("%s%s: %s" % (self._where, _part(error, item.url), reason(error)))

    def send_all(self, succeeded: bool) -> List[str]:
        """Send every output that there is; what went wrong, a sentence each. `sent` holds what was sent, also after
        an exception. Without success, what is missing is no problem."""
        problems: List[str] = []
        for index, item in enumerate(self._plan.outputs):
            self._watch.check()
            where = self._where = "outputs[%d]" % index
            try:
                self._send(where, item)
            except Missing as error:
                if succeeded:
                    problems.append("%s.path: %s" % (where, reason(error)))
            except (OSError, Problem) as error:
                problems.append("%s%s: %s" % (where, error.part if isinstance(error, _At) else "", reason(error)))
        return problems

    def _fetch(self, item: job.Input) -> None:
        if item.content is not None:
            self._write(item.path, item.content.encode("utf-8", "surrogatepass"))
        elif not item.url:
            raise Problem("neither url nor content is given")
        elif item.kind == job.DIRECTORY or self._is_directory_after_all(item.path, item.url):
            self._fetch_directory(item.path, item.url)
        else:
            self._fetch_file(self._transfer(item.url), item.path, item.url)

    def _is_directory_after_all(self, path: str, url: str) -> bool:
        """Whether there is a directory at the URL of an input that the plan takes for a file, as it takes all whose
        type nobody gave."""
        transfer = self._transfer(url)
        if not transfer.is_directory(url):
            return False
        if path.rstrip("/") in self._files:
            said = "%s is a directory, but %s is mounted as a single file; give the input the type DIRECTORY"
            raise Problem(said % (show(transfer.public(url)), show(path)))
        self._note("%s: %s is a directory, and taken as one" % (self._where, show(transfer.public(url))))
        return True

    def _write(self, path: str, data: bytes) -> None:
        from .transfer import write_all

        fd = self._opened(path)
        try:
            write_all(fd, data)
            os.utime(fd)  # an empty input is not a file that nobody wrote
        finally:
            os.close(fd)

    def _fetch_file(self, transfer: "Transfer", path: str, url: str) -> None:
        fd = self._opened(path)
        try:
            transfer.fetch(url, fd)
            os.utime(fd)  # an empty input is not a file that nobody wrote
        except (OSError, Problem) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                os.ftruncate(fd, 0)  # the result needs room as well
            raise _At(".url", error)
        finally:
            os.close(fd)

    def _fetch_directory(self, path: str, url: str) -> None:
        transfer = self._transfer(url)
        base = path.rstrip("/")
        self._inner.make_directory(base)
        for entry in transfer.entries(url):
            self._watch.check()
            try:
                if entry.is_directory:
                    self._inner.make_directory(base + "/" + entry.relative)
                else:
                    self._fetch_file(transfer, base + "/" + entry.relative, entry.url)
            except (OSError, Problem) as error:
                name = show(entry.relative)
                if len(name) > _SHOWN:
                    name = name[:_SHOWN] + "..."
                raise _At(error.part if isinstance(error, _At) else ".path", Problem("%s: %s" % (name, reason(error))))

    def _opened(self, path: str) -> int:
        try:
            return self._inner.open_write(path)
        except (OSError, Problem) as error:
            raise _At(".path", error)

    def _send(self, where: str, item: job.Output) -> None:
        transfer = self._transfer(item.url)
        if item.prefix is not None:
            for path in self._matches(item.path):
                self._send_match(where, transfer, item, path)
        elif item.kind == job.DIRECTORY:
            self._send_directory(where, transfer, item.path, item.url)
        else:
            facts = self._tree.stat(item.path)
            if facts is not None and stat.S_ISDIR(facts.st_mode):
                self._note("%s: %s is a directory, and sent as one" % (where, show(item.path)))
                self._send_directory(where, transfer, item.path, item.url)
            else:
                self._send_file(transfer, _Upload(item.path, item.url))

    def _matches(self, pattern: str) -> List[str]:
        from .pattern import matches

        return matches(pattern, self._tree.names)

    def _send_match(self, where: str, transfer: "Transfer", item: job.Output, path: str) -> None:
        url = transfer.join(item.url, _without(path, item.prefix or ""))
        try:
            facts = self._tree.stat(path)
        except Refused as error:
            self._note("%s: left out: %s" % (where, error))
            return
        if facts is None:
            return
        if stat.S_ISDIR(facts.st_mode):
            self._send_directory(where, transfer, path, url)
        elif stat.S_ISREG(facts.st_mode):
            self._send_file(transfer, _Upload(path, url))
        else:
            self._note("%s: left out: %s is not a regular file" % (where, show(path)))

    def _send_directory(self, where: str, transfer: "Transfer", path: str, url: str) -> None:
        facts = self._tree.stat(path)
        if facts is None:
            raise Missing("%s does not exist" % show(path))
        if not stat.S_ISDIR(facts.st_mode):
            raise Refused("%s is a file, not a directory" % show(path))
        _make_directory(transfer, url)
        for found in self._tree.walk(path):
            self._watch.check()
            target = transfer.join(url, found.relative)
            if found.kind == job.FILE:
                self._send_file(transfer, _Upload(found.path, target))
            elif found.kind == job.DIRECTORY:
                _make_directory(transfer, target)
            else:
                self._note("%s: left out: %s: %s" % (where, show(found.path), found.problem))

    def _send_file(self, transfer: "Transfer", upload: _Upload) -> None:
        from .transfer import Source

        fd = self._tree.open_read(upload.path)
        try:
            facts = os.fstat(fd)
            if upload.path.rstrip("/") in self._single and unwritten(facts):
                raise Missing("%s does not exist" % show(upload.path))
            try:
                size = transfer.send(upload.url, Source(fd, facts.st_size, bool(facts.st_mode & 0o111)))
            except (OSError, Problem) as error:
                raise _At(".url", error)
        finally:
            os.close(fd)
        self.sent.append(job.OutputFile(_text(transfer.public(upload.url)), _text(upload.path), size))

    def _note_of_url(self, line: str) -> None:
        self._note("%s.url: %s" % (self._where, line))

    def _transfer(self, url: str) -> "Transfer":
        from .transfer import Context, open_transfer, scheme_of

        scheme = scheme_of(url)
        if scheme not in self._transfers:
            context = Context(roots_tree(self._plan.file_roots), self._watch, note=self._note_of_url)
            try:
                self._transfers[scheme] = open_transfer(url, context)
            except Problem as error:
                raise _At(".url", error)
        return self._transfers[scheme]


class _At(Problem):
    """A problem together with the part of the field that it is about."""

    def __init__(self, part: str, error: BaseException) -> None:
        super().__init__(reason(error))
        self.part = part


def _make_directory(transfer: "Transfer", url: str) -> None:
    try:
        transfer.make_directory(url)
    except (OSError, Problem) as error:  # also Missing: it is not the output that is missing
        raise _At(".url", error)


def _part(error: BaseException, url: Optional[str]) -> str:
    if isinstance(error, _At):
        return error.part
    return ".url" if url else ""


def _without(path: str, prefix: str) -> str:
    """A match without the prefix, as a relative path."""
    if path.startswith(prefix):
        return path[len(prefix) :].lstrip("/")
    raise Refused("%s does not begin with path_prefix %s" % (show(path), show(prefix)))


def _text(path: str) -> str:
    """Without the lone surrogates that stand for bytes which are no UTF-8: results are read by others."""
    return encode(path).decode("utf-8", "replace")
