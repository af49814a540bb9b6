"""Which site takes a task."""

from __future__ import annotations

from typing import Any

import pytest

from tesp_api.dispatch.place import choose, misfit, need_of, share
from tesp_api.parameters import lane
from tesp_api.sites import SiteFacts
from tesp_api.store import Load
from tests.builders import make_spec


def task(parameters: dict[str, str] | None = None, tags: dict[str, str] | None = None, **resources: Any) -> Any:
    if parameters:
        resources["backend_parameters"] = parameters
    return need_of(make_spec(resources=resources or None, tags=tags))


LABELLED = SiteFacts(name="s", labels={"gpu": "a100"})
BATCH = SiteFacts(name="s", batch=True, queues=("long", "short"))


@pytest.mark.parametrize(
    ("facts", "fits", "asked"),
    [
        (SiteFacts(name="s"), True, task()),
        (SiteFacts(name="s", cpus=4), True, task(cpu_cores=4)),
        (SiteFacts(name="s", cpus=4), False, task(cpu_cores=5)),
        (SiteFacts(name="s", ram_gb=4), False, task(ram_gb=4.1)),
        (SiteFacts(name="s", disk_gb=4), True, task(disk_gb=4)),
        (SiteFacts(name="s", disk_gb=4), False, task(disk_gb=5)),
        (SiteFacts(name="s", zones=frozenset({"a", "b"})), True, task(zones=["b", "c"])),
        (SiteFacts(name="s", zones=frozenset({"a"})), False, task(zones=["c"])),
        (SiteFacts(name="s", zones=frozenset({"a"})), True, task()),
        (SiteFacts(name="s"), False, task(zones=["c"])),
        (LABELLED, True, task(tags={"tesp.site.label.gpu": "a100", "other": "x"})),
        (LABELLED, True, task(tags={"TESP.site.label.GPU": "a100"})),
        (LABELLED, False, task(tags={"tesp.site.label.gpu": "h100"})),
        (LABELLED, False, task(tags={"tesp.site.label.gpu": "a100", "tesp.site.label.ssd": "yes"})),
        (SiteFacts(name="s", preemptible=True), False, task()),
        (SiteFacts(name="s", preemptible=True), False, task(preemptible=False)),
        (SiteFacts(name="s", preemptible=True), True, task(preemptible=True)),
        (SiteFacts(name="s"), True, task(preemptible=True)),
        (SiteFacts(name="s"), True, task({"site": "s"})),
        (SiteFacts(name="s"), False, task({"Site": "t"})),
        (BATCH, True, task({"time_limit": "60", "queue": "long"})),
        (BATCH, False, task({"queue": "other"})),
        (SiteFacts(name="s", batch=True), True, task({"queue": "any"})),
        (SiteFacts(name="s"), False, task({"time_limit": "60"})),
    ],
)
def test_who_fits(facts: SiteFacts, fits: bool, asked: Any) -> None:
    reason = misfit(facts, asked)
    assert (reason is None) is fits, reason


def test_zones_mean_nothing_where_no_site_states_any() -> None:
    sites = [SiteFacts(name="a"), SiteFacts(name="b")]
    assert choose(sites, {}, task(zones=["eu"])).site is sites[0]
    sites.append(SiteFacts(name="c", zones=frozenset({"eu"})))
    assert choose(sites, {}, task(zones=["eu"])).site is sites[2]
    assert choose(sites, {}, task(zones=["us"])).reason == (
        "No site can run this task: 'a' is in none of resources.zones; 'b' is in none of resources.zones; "
        "'c' is in none of resources.zones."
    )


def test_the_site_that_was_asked_for_says_why() -> None:
    sites = [SiteFacts(name="a", cpus=2), SiteFacts(name="b")]
    reason = choose(sites, {}, task({"site": "a"}, cpu_cores=3)).reason
    assert reason == "No site can run this task: 'a' has 2 CPUs, resources.cpu_cores asks for 3."
    assert "'gone'" in choose(sites, {}, task({"site": "gone"})).reason
    assert choose([], {}, task()).reason == "No site is configured."


def test_the_least_loaded_by_what_is_scarcest() -> None:
    small, large = SiteFacts(name="small", cpus=4), SiteFacts(name="large", max_jobs=100, cpus=64)
    loads = {"small": Load(1, 1, 0), "large": Load(10, 10, 0)}
    assert (share(small, loads["small"]), share(large, loads["large"])) == (0.25, 10 / 64)
    assert choose([small, large], loads, task()).site is large
    assert choose([small, large], {**loads, "large": Load(60, 10, 0)}, task()).site is small


def test_full_and_down_are_told_apart() -> None:
    sites = [SiteFacts(name="a", max_jobs=1), SiteFacts(name="b"), SiteFacts(name="c", cpus=1)]
    choice = choose(sites, {"a": Load(1, 0, 0)}, task(cpu_cores=2), lambda site: site != "b")
    assert (choice.site, choice.reason, choice.full, choice.down) == (None, "", ("a",), ("b",))


def test_a_site_that_is_drained_gets_nothing_more() -> None:
    draining = SiteFacts(name="a", draining=True)
    assert choose([draining, SiteFacts(name="b")], {"b": Load(99, 0, 0)}, task()).site == SiteFacts(name="b")
    choice = choose([draining, SiteFacts(name="b")], {}, task({"site": "a"}))
    assert (choice.site, choice.reason, choice.full, choice.down, choice.draining) == (None, "", (), (), ("a",))


def test_a_busy_site_is_not_full() -> None:
    sites = [SiteFacts(name="a"), SiteFacts(name="b", max_jobs=1)]
    choice = choose(sites, {"b": Load(1, 0, 0)}, task(), busy={"a"})
    assert (choice.site, choice.busy, choice.full, choice.down) == (None, True, ("b",), ())
    assert choose(sites, {}, task(), busy={"a"}).site is sites[1]
    assert not choose(sites, {"b": Load(1, 0, 0)}, task({"site": "b"}), busy={"a", "b"}).busy


def test_lanes() -> None:
    """Tasks of one lane wait for the same sites."""

    def of(tags: dict[str, str] | None = None, parameters: dict[str, str] | None = None, **resources: Any) -> str:
        if parameters:
            resources["backend_parameters"] = parameters
        return lane(make_spec(resources=resources or None, tags=tags))

    assert of() == of(cpu_cores=0) == of(tags={"a": "b"}) == "0 0"
    assert of(cpu_cores=3, ram_gb=5.5) == of(cpu_cores=4, ram_gb=8) == "4 8"
    assert of(ram_gb=0.5) == "0 1"
    different = [
        of(),
        of(cpu_cores=5),
        of(disk_gb=1),
        of(zones=["a"]),
        of(zones=["a", "b"]),
        of(preemptible=True),
        of(tags={"tesp.site.label.a": "b"}),
        of(parameters={"site": "a"}),
        of(parameters={"site": "b"}),
        of(parameters={"time_limit": "60"}),
        of(parameters={"queue": "long"}),
    ]
    assert len(set(different)) == len(different)
    assert of(zones=["a", "b"]) == of(zones=["b", "a", "b"])
    assert len(of(zones=["x" * 1000], ram_gb=1e9)) < 64
