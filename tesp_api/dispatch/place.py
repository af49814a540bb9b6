"""Which site takes a task: pure functions over what the sites offer and what they carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tesp_api.sites import SiteFacts
from tesp_api.store import Load
from tesp_api.tes import TesResources


def misfit(facts: SiteFacts, resources: TesResources | None) -> str | None:
    """Why this site could never run such a task, as a sentence; None if it could."""
    if resources is None:
        return None
    if facts.cpus is not None and (resources.cpu_cores or 0) > facts.cpus:
        return f"The site {facts.name!r} has {facts.cpus:g} CPUs, resources.cpu_cores asks for {resources.cpu_cores}."
    if facts.ram_gb is not None and (resources.ram_gb or 0) > facts.ram_gb:
        return f"The site {facts.name!r} has {facts.ram_gb:g} GB, resources.ram_gb asks for {resources.ram_gb:g}."
    return None


def has_room(facts: SiteFacts, load: Load, resources: TesResources | None) -> bool:
    """Whether the site can take such a task now, on top of `load`."""
    cpus = float(resources.cpu_cores or 0) if resources else 0.0
    ram_gb = float(resources.ram_gb or 0) if resources else 0.0
    return (
        (facts.max_jobs is None or load.jobs < facts.max_jobs)
        and (facts.cpus is None or load.cpus + cpus <= facts.cpus)
        and (facts.ram_gb is None or load.ram_gb + ram_gb <= facts.ram_gb)
    )


def room(facts: SiteFacts, load: Load) -> int:
    """How many more jobs the site may hold; 1000 where there is no limit, so that a tick stays bounded."""
    return 1000 if facts.max_jobs is None else max(0, facts.max_jobs - load.jobs)


def choose(
    sites: Sequence[SiteFacts], loads: Mapping[str, Load], resources: TesResources | None
) -> tuple[SiteFacts | None, str]:
    """The least loaded site with room. (None, "") means wait; (None, reason) means that none will ever fit."""
    fitting = [facts for facts in sites if misfit(facts, resources) is None]
    if not fitting:
        return None, " ".join(misfit(facts, resources) or "" for facts in sites) or "No site is configured."
    free = [facts for facts in fitting if has_room(facts, loads.get(facts.name, Load()), resources)]
    if not free:
        return None, ""
    return min(free, key=lambda facts: (loads.get(facts.name, Load()).jobs / (facts.max_jobs or 1000), facts.name)), ""


def with_one_more(load: Load, resources: TesResources | None) -> Load:
    """`load` after one more such task."""
    cpus = float(resources.cpu_cores or 0) if resources else 0.0
    ram_gb = float(resources.ram_gb or 0) if resources else 0.0
    return replace(load, jobs=load.jobs + 1, cpus=load.cpus + cpus, ram_gb=load.ram_gb + ram_gb)
