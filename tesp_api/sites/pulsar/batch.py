"""What a site with a batch system is told of a job beside the plan; pure, the same for all carriers.

Pulsar hands `submit_params` to its job manager; its `queued_cli` ignores them, so that docker/pulsar/slurm/tesp-slurm
reads them from the job's directory and makes options of sbatch.
"""

from __future__ import annotations

import math
from typing import Final

from tesp_api.runner.job import Plan

ENV: Final = ({"execute": "trap : TERM"},)
"""Lines for the head of Pulsar's job script. At a time limit or a cancel the batch system sends SIGTERM to all of a
job's processes, and kills all as soon as the script ends: it must live until the runner has ended everything."""


def submit_params(plan: Plan) -> dict[str, object]:
    """What the job needs, as far as known: `cpus` (whole cores), `mem_mb` (MiB), `time_limit` (seconds), `queue`."""
    wanted: dict[str, object] = {}
    if plan.cpus:
        wanted["cpus"] = max(1, math.ceil(plan.cpus))
    if plan.ram_bytes:
        wanted["mem_mb"] = max(1, math.ceil(plan.ram_bytes / (1 << 20)))
    if plan.time_limit:
        wanted["time_limit"] = plan.time_limit
    if plan.queue:
        wanted["queue"] = plan.queue
    return wanted
