"""A batch system around the runner: it may end the whole job, and only it knows why."""

import os
from typing import Optional

_PATIENCE = 5.0  # seconds for its answer; the job is about to be killed


def inside() -> bool:
    """Whether a batch system has started us. Its signals go to all processes of the job, executors among them."""
    return any(os.environ.get(name) for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"))


def limit_reached(time_limit: Optional[int], age: float) -> bool:
    """Whether the batch system stops us because our time is over; `age` is how long we have run, in seconds.

    Where it does not answer, the time limit of the plan must do: a batch system is never early, but counts from a
    moment before our start.
    """
    reason = _slurm_reason()
    if reason:
        return reason in ("TimeLimit", "JobDeadline", "DeadLine")
    return time_limit is not None and age > 0.9 * time_limit


def _slurm_reason() -> str:
    """Slurm's reason for what it does to this job, or nothing."""
    import subprocess

    number = os.environ.get("SLURM_JOB_ID", "")
    if not number.isdigit():
        return ""
    try:
        done = subprocess.run(
            ["scontrol", "-o", "show", "job", number],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    words = done.stdout.decode("utf-8", "replace").split()
    return next((word[len("Reason=") :] for word in words if word.startswith("Reason=")), "")
