"""No container at all: for machines that have nothing better, and for tests.

Nothing can be mounted, so a mount's target, wherever it stands as a whole path or the beginning of one in an argument,
in a value of the environment or in the work directory, is replaced by its place on the node. It begins at the start of
the text or after a character that is none of letters, digits, `.`, `_`, `-`, `/`; it ends at the end of the text or
before a `/` or such a character. The longest target wins. Files are not searched.
"""

import os
import re
from typing import Callable, Dict, List

from ..mounts import Bound
from ..tree import Tree, encode
from . import Engine, Run, mark


class Host(Engine):
    """See Engine. The image is ignored, and the executor can do whatever the runner's user can."""

    kind = "host"
    node_names = True

    def check(self) -> str:
        """See Engine."""
        self.setting.note("The executors ran directly on the node: images are ignored and no limits are enforced.")
        return ""

    def run(self, run: Run) -> int:
        """See Engine."""
        from .process import execute

        replace = substitution(self.setting.bounds)
        argv = [encode(replace(word)) for word in run.executor.command]
        env = _environment(run.executor.env, replace, self.setting.plan.job_id)
        return execute(self.setting, run, argv, env, self._directory(run, replace))

    def _directory(self, run: Run, replace: Callable[[str], str]) -> bytes:
        """The work directory: the one asked for, made when it lies in a mount, else JOB/tes."""
        base = os.path.join(self.setting.root, "tes")
        asked = run.executor.workdir
        if not asked:
            return encode(base)
        place = replace(asked)
        if place != asked:
            _tree(self.setting.bounds).make_directory(asked)
        elif not os.path.isdir(place):
            place = os.path.join(base, "workdir")
            os.makedirs(place, exist_ok=True)
        return encode(place)


def substitution(bounds: List[Bound]) -> Callable[[str], str]:
    """The function that puts places on the node in place of targets; see the module for the rule."""
    places = {bound.target.rstrip("/"): bound.real for bound in bounds if bound.target.rstrip("/")}
    if not places:
        return lambda text: text
    choices = "|".join(re.escape(target) for target in sorted(places, key=len, reverse=True))
    search = re.compile(r"(?<![\w./-])(?:%s)(?![\w.-])" % choices)
    return lambda text: search.sub(lambda match: places[match.group()], text)


def _environment(given: Dict[str, str], replace: Callable[[str], str], job_id: str) -> Dict[bytes, bytes]:
    env = {encode(name): encode(replace(value)) for name, value in given.items()}
    for name in ("PATH", "HOME", "TMPDIR"):
        if name in os.environ:
            env.setdefault(name.encode(), os.fsencode(os.environ[name]))
    env.update((encode(name), encode(value)) for name, value in mark(job_id).items())
    return env


def _tree(bounds: List[Bound]) -> Tree:
    from ..mounts import tree

    return tree(bounds, node_names=True)
