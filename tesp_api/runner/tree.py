"""Paths as a container sees them, opened safely from outside of it.

A container can leave any link anywhere (`/out/x -> /etc/shadow`). Inside, that means the container's `/etc/shadow`; the
runner must never be led to the node's. So a `Tree` walks a path one component at a time, opening each directory
relative to the one before without following links, and follows the links itself: an absolute one starts again at the
root *of the tree*, and what is not below one of the tree's points leads outside and is refused. No step can be raced,
because what was looked at is never looked up by its whole name again.

The same class serves the node's file roots, where the tree's paths are the node's own.
"""

import os
import stat as modes
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

from . import job
from .errors import Gone, Missing, Problem, Refused

_LINKS = 40  # as many as Linux follows
_DEPTH = 500  # each level of a path takes a descriptor while it is walked, of usually 1024
_ENTRIES = 1000000
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NONBLOCK = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Parts = Tuple[bytes, ...]


class Point(NamedTuple):
    """A place where the tree touches the node: `path` in the tree is `real` on the node, itself free of links.

    `what` is what messages call it.
    """

    path: str
    real: str
    kind: str = job.DIRECTORY
    writable: bool = True
    what: str = "mount"


class Found(NamedTuple):
    """Something met on a walk: `relative` to its start; `kind` FILE or DIRECTORY, or None with a `problem`."""

    relative: str
    path: str
    kind: Optional[str]
    problem: str = ""


class _Level(NamedTuple):
    name: bytes
    fd: Optional[int]  # None: exists only as the way to some point
    point: Optional[Point]


class _Spot:
    """Where a path ends, links resolved: `name` in the directory `fd`, or a point, or (both None) only a way to one."""

    def __init__(self, at: Parts, fd: Optional[int], name: bytes, point: Optional[Point], root: bool = False) -> None:
        self.at = at  # the path without links
        self.fd = fd
        self.name = name
        self.point = point  # the one that the spot lies in
        self.root = root  # whether the spot is the point itself

    def open(self, flags: int, mode: int = 0) -> int:
        if self.root and self.point is not None:
            return os.open(encode(self.point.real), flags, mode)
        return os.open(self.name, flags, mode, dir_fd=self.fd)

    def stat(self) -> os.stat_result:
        if self.root and self.point is not None:
            return os.stat(encode(self.point.real), follow_symlinks=False)
        return os.stat(self.name, dir_fd=self.fd, follow_symlinks=False)

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def encode(text: str) -> bytes:
    """A path as the kernel takes it, whatever the locale (Python 3.6 takes ASCII for the C locale)."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise Refused("%r is not valid Unicode" % text)
    if b"\0" in data:
        raise Refused("%r holds a NUL character" % text)
    return data


def decode(data: bytes) -> str:
    """The inverse of `encode`."""
    return data.decode("utf-8", "surrogateescape")


def names(fd: int) -> List[bytes]:
    """The names in an open directory, sorted."""
    return sorted(os.fsencode(name) for name in os.listdir(fd))


def parts(path: str) -> List[bytes]:
    """The components of an absolute path, `.` and empty ones left out."""
    if not path.startswith("/"):
        raise Refused("%s is not an absolute path" % path)
    return [part for part in encode(path).split(b"/") if part not in (b"", b".")]


class Tree:
    """See the module. Paths are absolute and of the tree; all errors are Problem or OSError.

    `open_to_all` gives what is created here the modes that let any container user write to it.
    """

    def __init__(self, points: List[Point], open_to_all: bool = False) -> None:
        self._points: Dict[Parts, Point] = {}
        self._above: Set[Parts] = set()
        self._open_to_all = open_to_all
        for point in points:
            at = tuple(parts(point.path))
            self._points[at] = point
            self._above.update(at[:length] for length in range(len(at)))

    def stat(self, path: str) -> Optional[os.stat_result]:
        """What lies at the path, links followed; None if nothing does. Gone if its point is not there."""
        try:
            spot = self._locate(path)
        except Gone:
            raise
        except Missing:
            return None
        try:
            return spot.stat() if spot.fd is not None or spot.root else None
        except FileNotFoundError:
            return None
        finally:
            spot.close()

    def open_read(self, path: str) -> int:
        """A descriptor to read the regular file at the path. Anything else is refused without being opened."""
        spot = self._locate(path)
        try:
            if spot.fd is None and not spot.root:
                raise Refused("%s is a directory" % show(path))
            facts = spot.stat()  # before the open: to open a device may already do something
            _only_regular(path, facts)
            fd = spot.open(os.O_RDONLY | _NONBLOCK)
        except FileNotFoundError:
            raise Missing("%s does not exist" % show(path))
        finally:
            spot.close()
        return _checked(path, fd)

    def open_write(self, path: str) -> int:
        """A descriptor to append to the file at the path, emptied or created, its directories made as needed."""
        spot = self._locate(path, make=True)
        try:
            _only_writable(path, spot)
            if spot.fd is None and not spot.root:
                raise Refused("%s is a directory" % show(path))
            try:
                _only_regular(path, spot.stat())
                fd = _checked(path, spot.open(os.O_WRONLY | os.O_APPEND | _NONBLOCK))
                os.ftruncate(fd, 0)
                return fd
            except FileNotFoundError:
                pass
            except PermissionError:
                if spot.root:
                    raise
                os.unlink(spot.name, dir_fd=spot.fd)  # another user's file in our directory, left by a container
            fd = spot.open(os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | _NONBLOCK, 0o666)
            if self._open_to_all:
                os.fchmod(fd, 0o666)
            return fd
        finally:
            spot.close()

    def draft(self, path: str, executable: bool = False) -> "Draft":
        """A new file that takes the path's place only when it is complete; directories are made as needed."""
        spot = self._locate(path, make=True)
        try:
            _only_writable(path, spot)
            if spot.fd is None or spot.root or spot.name == b".":
                raise Refused("%s is a directory" % show(path))
            try:
                _only_regular(path, spot.stat())
            except FileNotFoundError:
                pass
        except BaseException:
            spot.close()
            raise
        return Draft(spot, 0o777 if executable else 0o666)

    def make_directory(self, path: str) -> None:
        """Make the directory and its parents, unless they exist."""
        spot = self._locate(path or "/", make=True, make_last=True)
        try:
            if spot.root and spot.point is not None and spot.point.kind == job.DIRECTORY:
                os.close(_enter(spot.point))  # nothing else would notice before there is a file to put there
        finally:
            spot.close()

    def names(self, path: str) -> List[str]:
        """The names in a directory, sorted; none if there is no such directory or it lies outside."""
        try:
            return [decode(name) for name in self._list(path)]
        except (Missing, Refused, NotADirectoryError, FileNotFoundError):
            return []

    def walk(self, path: str) -> Iterator[Found]:
        """All below a directory, parents first, each file and directory, with the problem of what cannot be taken.

        Links count as what they lead to; one that leads out, to itself, or to a special file is a problem.
        """
        todo: List[Tuple[str, str, Tuple[Tuple[int, int], ...]]] = [("", path, ())]
        count = 0
        while todo:
            relative, at, above = todo.pop()
            count += 1
            if count > _ENTRIES:
                raise Problem("%s holds more than %d entries" % (show(path), _ENTRIES))
            found, identity = self._classify(relative, at, above)
            if relative or found.kind is None:
                yield found
            if found.kind != job.DIRECTORY:
                continue
            try:
                below = self._list(at)
            except (OSError, Problem) as error:
                yield Found(relative, at, None, reason(error))
                continue
            for name in reversed([decode(name) for name in below]):
                todo.append(("%s/%s" % (relative, name) if relative else name, at + "/" + name, above + identity))

    def _classify(
        self, relative: str, at: str, above: Tuple[Tuple[int, int], ...]
    ) -> Tuple[Found, Tuple[Tuple[int, int], ...]]:
        try:
            spot = self._locate(at)
            try:
                if spot.fd is None and not spot.root:
                    return Found(relative, at, job.DIRECTORY), ()
                facts = spot.stat()
            finally:
                spot.close()
        except (OSError, Problem) as error:
            return Found(relative, at, None, reason(error)), ()
        if modes.S_ISREG(facts.st_mode):
            return Found(relative, at, job.FILE), ()
        if not modes.S_ISDIR(facts.st_mode):
            return Found(relative, at, None, "is neither a file nor a directory"), ()
        identity = (facts.st_dev, facts.st_ino)
        if identity in above:
            return Found(relative, at, None, "leads back to a directory above it"), ()
        if len(above) >= _DEPTH:  # what lies there is wanted: to leave it out would be to lose it
            raise Problem("%s... lies more than %d directories deep" % (show(at[:80]), _DEPTH))
        return Found(relative, at, job.DIRECTORY), (identity,)

    def _list(self, path: str) -> List[bytes]:
        spot = self._locate(path + "/.")
        here = spot.at
        nested = {at[len(here)] for at in self._points if len(at) > len(here) and at[: len(here)] == here}
        try:
            if spot.fd is None and not spot.root:
                return sorted(nested)
            fd = spot.open(_DIRECTORY)
        finally:
            spot.close()
        try:
            return sorted(nested.union(names(fd)))
        finally:
            os.close(fd)

    def _locate(self, path: str, make: bool = False, make_last: bool = False) -> _Spot:
        """Walk the path; the last component may be missing, those before it only with `make`, which makes them."""
        stack = [_Level(b"", None, None)]
        todo = list(reversed(parts(path)))
        links = 0
        try:
            root = self._points.get(())
            if root is not None:
                if not todo:
                    return _Spot((), None, b"", root, root=True)
                stack[0] = _Level(b"", _enter(root), root)
            while todo:
                name = todo.pop()
                if name == b"..":
                    if len(stack) > 1:
                        _drop(stack, len(stack) - 1)
                    continue
                here = (*[level.name for level in stack[1:]], name)
                point = self._points.get(here)
                if point is not None:
                    if not todo:
                        return _Spot(here, None, name, point, root=True)
                    if point.kind == job.FILE:
                        raise Missing("%s does not exist: it leads through a file" % show(path))
                    stack.append(_Level(name, _enter(point), point))
                    continue
                top = stack[-1]
                if top.fd is None:
                    if here not in self._above:
                        raise Refused("%s leads outside the mounted directories" % show(path))
                    stack.append(_Level(name, None, None))
                    continue
                try:
                    facts = os.stat(name, dir_fd=top.fd, follow_symlinks=False)
                except FileNotFoundError:
                    if here in self._above:
                        stack.append(_Level(name, None, None))
                        continue
                    if not todo and not make_last:
                        return _Spot(here, os.dup(top.fd), name, top.point)
                    if not make:
                        raise Missing("%s does not exist" % show(path))
                    facts = self._make(path, top, name)
                if modes.S_ISLNK(facts.st_mode):
                    links += 1
                    if links > _LINKS:
                        raise Refused("%s leads through too many links" % show(path))
                    target = os.readlink(name, dir_fd=top.fd)
                    if target.startswith(b"/"):
                        _drop(stack, 1)
                    todo.extend(reversed([part for part in target.split(b"/") if part not in (b"", b".")]))
                    continue
                if not todo and not make_last:
                    return _Spot(here, os.dup(top.fd), name, top.point)
                if not modes.S_ISDIR(facts.st_mode):
                    if make_last:
                        raise Refused("%s is in the way: not a directory" % show(path))
                    raise Missing("%s does not exist: it leads through a file" % show(path))
                stack.append(_Level(name, os.open(name, _DIRECTORY, dir_fd=top.fd), top.point))
            top = stack[-1]
            here = tuple(level.name for level in stack[1:])
            return _Spot(here, None if top.fd is None else os.dup(top.fd), b".", top.point)
        finally:
            _drop(stack, 0)

    def _make(self, path: str, top: _Level, name: bytes) -> os.stat_result:
        if top.point is not None and not top.point.writable:
            raise Refused("%s lies in a read-only mount" % show(path))
        assert top.fd is not None  # for mypy
        try:
            os.mkdir(name, 0o777, dir_fd=top.fd)
        except FileExistsError:
            pass
        facts = os.stat(name, dir_fd=top.fd, follow_symlinks=False)
        if self._open_to_all and modes.S_ISDIR(facts.st_mode):
            fd = os.open(name, _DIRECTORY, dir_fd=top.fd)
            try:
                os.fchmod(fd, 0o777)
            finally:
                os.close(fd)
        return facts


class Draft:
    """A file on its way: write to `fd`, then `commit`, or `discard` it."""

    def __init__(self, spot: _Spot, mode: int) -> None:
        self._spot = spot
        self._name = b".tesp-%d-%s" % (os.getpid(), os.urandom(6).hex().encode())
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self.fd = os.open(self._name, flags, mode, dir_fd=spot.fd)
        except BaseException:
            spot.close()
            raise

    def commit(self) -> None:
        """Give the file its name, in place of what had it."""
        os.rename(self._name, self._spot.name, src_dir_fd=self._spot.fd, dst_dir_fd=self._spot.fd)
        self._close()

    def discard(self) -> None:
        """Leave nothing."""
        try:
            os.unlink(self._name, dir_fd=self._spot.fd)
        finally:
            self._close()

    def _close(self) -> None:
        os.close(self.fd)
        self._spot.close()


def show(path: str) -> str:
    """A path as it may stand in a message."""
    return path if path.isprintable() else ascii(path)


def reason(error: BaseException) -> str:
    """What an error says, in as few words as possible."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def roots_tree(roots: List[job.FileRoot], keep: Callable[[job.FileRoot], bool] = lambda root: True) -> Tree:
    """The tree of the node's file roots, each under its given and its real path."""
    points: List[Point] = []
    for root in roots:
        if not keep(root):
            continue
        real = os.path.realpath(root.path)
        points.append(Point(root.path, real, job.DIRECTORY, root.write, "file root"))
        if real != os.path.normpath(root.path):
            points.append(Point(real, real, job.DIRECTORY, root.write, "file root"))
    return Tree(points)


def _enter(point: Point) -> int:
    """A descriptor of the point's own directory."""
    try:
        return os.open(encode(point.real), _DIRECTORY)
    except FileNotFoundError:
        raise Gone("the %s %s does not exist on the node" % (point.what, show(point.path)))
    except NotADirectoryError:
        raise Gone("the %s %s is not a directory on the node" % (point.what, show(point.path)))


def _drop(stack: List[_Level], keep: int) -> None:
    while len(stack) > keep:
        fd = stack.pop().fd
        if fd is not None:
            os.close(fd)


def _only_writable(path: str, spot: _Spot) -> None:
    if spot.point is not None and not spot.point.writable:
        raise Refused("%s may not be written to" % show(path))


def _only_regular(path: str, facts: os.stat_result) -> None:
    if modes.S_ISDIR(facts.st_mode):
        raise Refused("%s is a directory" % show(path))
    if not modes.S_ISREG(facts.st_mode):
        raise Refused("%s is not a regular file" % show(path))


def _checked(path: str, fd: int) -> int:
    try:
        _only_regular(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd
