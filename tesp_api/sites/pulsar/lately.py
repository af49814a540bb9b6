"""What is remembered of jobs for a while, because it saves a question."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, TypeVar

V = TypeVar("V")

MOST: Final = 50_000
"""Jobs; what is looked at again and again is far fewer."""


class Lately(OrderedDict[str, V]):
    """By job id, the `most` that were noted last.

    Whoever sees a job end forgets it. But that may be another process, and then nobody tells this one.
    """

    def __init__(self, most: int = MOST) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, job_id: str, value: V) -> None:
        super().__setitem__(job_id, value)
        self.move_to_end(job_id)
        if len(self) > self._most:
            self.popitem(last=False)


__all__ = ["Lately"]
