"""From a plan's mounts to directories and files that exist on the node."""

import os
import stat
from typing import List, NamedTuple, Optional

from . import job
from .errors import Missing, Problem, Refused
from .tree import Point, Tree, encode, reason, roots_tree


class Bound(NamedTuple):
    """A mount whose place on the node exists: `target` in the container is `real` on the node."""

    target: str
    real: str
    kind: str
    read_only: bool
    live: bool  # lies in a file root, not below JOB/tes


def prepare(mounts: List[job.Mount], base: str, roots: List[job.FileRoot]) -> List[Bound]:
    """Create what is relative below `base`, check what is absolute; parents come before what lies in them.

    A single file that we create has the time 0, so that `unwritten` can tell later whether anyone wrote it.
    """
    os.makedirs(base, 0o700, exist_ok=True)  # other users of the node must not look in; containers get the inside
    allowed: Optional[Tree] = None
    ready: List[Bound] = []
    for index, mount in enumerate(mounts):
        try:
            if mount.at.startswith("/"):
                if allowed is None:
                    allowed = roots_tree(roots, lambda root: root.mount)
                ready.append(_live(mount, allowed))
            else:
                ready.append(_create(mount, base))
        except (OSError, Problem) as error:
            raise Problem("mounts[%d] (%s): %s" % (index, mount.target, reason(error)))
    return sorted(ready, key=lambda bound: (bound.target.count("/"), bound.target))


def tree(bounds: List[Bound], node_names: bool = False, staging: bool = False) -> Tree:
    """What the container sees of the node. `node_names`: the node's own paths work as well (there is no container).
    `staging`: what is read-only for the container can be filled, unless it is a live mount."""
    points = [
        Point(bound.target, bound.real, bound.kind, not bound.read_only or (staging and not bound.live))
        for bound in bounds
    ]
    if node_names:
        points.extend(Point(bound.real, bound.real, bound.kind, not bound.read_only) for bound in bounds)
    return Tree(points, open_to_all=True)


def unwritten(facts: os.stat_result) -> bool:
    """Whether a file is still as `prepare` left it."""
    return facts.st_size == 0 and facts.st_mtime_ns == 0


def _create(mount: job.Mount, base: str) -> Bound:
    steps = mount.at.split("/")
    if not all(steps) or "." in steps or ".." in steps:
        raise Refused("%s is not a plain relative path" % mount.at)
    real = os.path.join(base, *steps)
    os.makedirs(encode(os.path.dirname(real)), 0o700, exist_ok=True)
    if mount.kind == job.DIRECTORY:
        os.makedirs(encode(real), exist_ok=True)
        os.chmod(encode(real), 0o1777 if mount.target.rstrip("/") == "/tmp" else 0o777)  # noqa: S108
    else:
        os.close(os.open(encode(real), os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o666))
        os.chmod(encode(real), 0o666)  # noqa: S103 - the container's user is not ours
        os.utime(encode(real), (0, 0))
    return Bound(mount.target, real, mount.kind, mount.read_only, False)


def _live(mount: job.Mount, allowed: Tree) -> Bound:
    """A place in a file root. It is named by its real path; a root is the operator's promise that who may write to it
    is trusted not to swap directories for links at the very moment between this look and the engine's mount."""
    facts = allowed.stat(mount.at)
    if facts is None:
        raise Missing("%s does not exist" % mount.at)
    real = os.path.realpath(mount.at)
    if allowed.stat(real) is None:
        raise Refused("%s lies outside the file roots" % mount.at)
    kind = job.DIRECTORY if stat.S_ISDIR(facts.st_mode) else mount.kind  # FILE may only mean that nobody said
    return Bound(mount.target, real, kind, mount.read_only, True)
