"""Which site takes a task: pure functions over what the sites offer and what they carry."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tesp_api.parameters import Wishes, labels, read_wishes
from tesp_api.sites import SiteFacts
from tesp_api.store import Load
from tesp_api.tes import TesTask


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a task asks of a site. `zones` empty: any will do."""

    cpus: float = 0.0
    ram_gb: float = 0.0
    disk_gb: float = 0.0
    zones: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)
    preemptible: bool = False
    wishes: Wishes = field(default_factory=Wishes)


@dataclass(frozen=True)
class Choice:
    """A site; or why none will ever do, as a sentence; or those that would do but are full, take no jobs now, or shall
    get no more. `busy`: some would have room, but have enough to take in at this moment."""

    site: SiteFacts | None = None
    reason: str = ""
    full: tuple[str, ...] = ()
    down: tuple[str, ...] = ()
    draining: tuple[str, ...] = ()
    busy: bool = False


def need_of(spec: TesTask) -> Need:
    """What the task asks for."""
    resources = spec.resources
    if resources is None:
        return Need(labels=labels(spec))
    return Need(
        cpus=float(resources.cpu_cores or 0),
        ram_gb=float(resources.ram_gb or 0),
        disk_gb=float(resources.disk_gb or 0),
        zones=frozenset(resources.zones or ()),
        labels=labels(spec),
        preemptible=bool(resources.preemptible),
        wishes=read_wishes(resources),
    )


def misfit(facts: SiteFacts, need: Need, *, zoned: bool = True) -> str | None:
    """Why this site could never run such a task, as the rest of a sentence about it; None if it could.

    `zoned`: some site states zones. If none does, zones mean nothing here, and what a task says of them either.
    """
    wishes = need.wishes
    if wishes.site is not None and facts.name != wishes.site:
        return f"is not the one that resources.backend_parameters asks for ({wishes.site!r})"
    if facts.cpus is not None and need.cpus > facts.cpus:
        return f"has {facts.cpus:g} CPUs, resources.cpu_cores asks for {need.cpus:g}"
    if facts.ram_gb is not None and need.ram_gb > facts.ram_gb:
        return f"has {facts.ram_gb:g} GB, resources.ram_gb asks for {need.ram_gb:g}"
    if facts.disk_gb is not None and need.disk_gb > facts.disk_gb:
        return f"gives a task {facts.disk_gb:g} GB of disk, resources.disk_gb asks for {need.disk_gb:g}"
    if zoned and need.zones and not need.zones & facts.zones:
        return "is in none of resources.zones"
    for key, value in need.labels.items():
        if facts.labels.get(key) != value:
            return f"lacks the label {key[:64]!r} with the value {value[:64]!r}"
    if facts.preemptible and not need.preemptible:
        return "may take jobs off at any time, which resources.preemptible does not allow"
    if wishes.batch and not facts.batch:
        return "has no batch system, which time_limit and queue in resources.backend_parameters need"
    if wishes.queue is not None and facts.queues and wishes.queue not in facts.queues:
        return f"has no queue {wishes.queue!r}"
    return None


def has_room(facts: SiteFacts, load: Load, need: Need) -> bool:
    """Whether the site can take such a task now, on top of `load`."""
    return (
        (facts.max_jobs is None or load.jobs < facts.max_jobs)
        and (facts.cpus is None or load.cpus + need.cpus <= facts.cpus)
        and (facts.ram_gb is None or load.ram_gb + need.ram_gb <= facts.ram_gb)
    )


def room(facts: SiteFacts, load: Load) -> int:
    """How many more jobs the site may hold; 1000 where there is no limit, so that a tick stays bounded."""
    return 1000 if facts.max_jobs is None else max(0, facts.max_jobs - load.jobs)


def choose(
    sites: Sequence[SiteFacts],
    loads: Mapping[str, Load],
    need: Need,
    takes: Callable[[str], bool] = lambda site: True,
    busy: Collection[str] = (),
) -> Choice:
    """The least loaded of the sites that fit, have room, take jobs and are not `busy`."""
    zoned = any(facts.zones for facts in sites)
    misfits = {facts.name: misfit(facts, need, zoned=zoned) for facts in sites}
    fitting = [facts for facts in sites if misfits[facts.name] is None]
    if not fitting:
        return Choice(reason=_sentence(misfits, need))
    open_to_us = [facts for facts in fitting if not facts.draining]
    up = [facts for facts in open_to_us if takes(facts.name)]
    roomy = [facts for facts in up if has_room(facts, loads.get(facts.name, Load()), need)]
    if free := [facts for facts in roomy if facts.name not in busy]:
        return Choice(min(free, key=lambda facts: (share(facts, loads.get(facts.name, Load())), facts.name)))
    return Choice(
        full=tuple(facts.name for facts in up if facts not in roomy),
        down=tuple(facts.name for facts in open_to_us if facts not in up),
        draining=tuple(facts.name for facts in fitting if facts.draining),
        busy=bool(roomy),
    )


def _sentence(misfits: Mapping[str, str | None], need: Need) -> str:
    wished = need.wishes.site
    if wished is not None:  # what keeps the others from it is of no interest
        misfits = {name: reason for name, reason in misfits.items() if name == wished}
        if not misfits:
            return f"No site has the name {wished[:64]!r}, for which resources.backend_parameters asks."
    if not misfits:
        return "No site is configured."
    return "No site can run this task: " + "; ".join(f"{name!r} {reason}" for name, reason in misfits.items()) + "."


def share(facts: SiteFacts, load: Load) -> float:
    """How much of the site is taken: of what it has least left of, so that sites of any size can be compared."""
    return max(
        load.jobs / (facts.max_jobs or 1000),
        load.cpus / facts.cpus if facts.cpus else 0.0,
        load.ram_gb / facts.ram_gb if facts.ram_gb else 0.0,
    )


def with_one_more(load: Load, need: Need) -> Load:
    """`load` after one more such task."""
    return replace(load, jobs=load.jobs + 1, cpus=load.cpus + need.cpus, ram_gb=load.ram_gb + need.ram_gb)
