"""The errors of the runner.

Problem            the job cannot be carried out; `str()` is one clear sentence for system_logs
├── Refused        a path leads somewhere it may not
├── Missing        there is nothing at a path or URL
│   └── Gone           not even the mount or file root that it would lie in
└── EngineError    the container engine failed
    ├── EngineLost     it does not answer, or went away; on a healthy node the same job may well succeed
    └── CommandError   the container could not be started because of the executor's own command
Stopped            someone asked the job to stop; not a problem, and never logged as one
"""

from typing import Optional


class Problem(Exception):
    """One clear sentence, or the part of it after the field's name."""


class Refused(Problem):
    """A path leads to where it may not, or to what may not be opened."""


class Missing(Problem):
    """There is nothing at that place."""


class Gone(Missing):
    """The directory of a mount or file root is not on the node."""


class EngineError(Problem):
    """The engine that runs the containers failed; the executor's program is not to blame."""


class EngineLost(EngineError):
    """The engine does not answer, or went away in the middle; the job is not to blame."""


class CommandError(EngineError):
    """The executor's command cannot be executed; `exit_code` is the one that a shell would give."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(Exception):
    """The job is asked to stop: leave what you are doing. `exit_code`: how the executor ended, if one had begun."""

    def __init__(self, exit_code: Optional[int] = None) -> None:
        super().__init__()
        self.exit_code = exit_code
