"""What a task asks of a site: the keys of `resources.backend_parameters` that we know, and its lane.

`site`: the name of the site to run at. `time_limit`: seconds or HH:MM:SS. `queue`: the queue (partition) of a batch
system. Case does not matter in keys. What is read here was written by strangers and reaches command lines of batch
systems, so a value is either of the exact form or refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from tesp_api.errors import Detail
from tesp_api.tes import TesResources, TesTask, drop_unsupported, refusal

SITE: Final = "site"
TIME_LIMIT: Final = "time_limit"
QUEUE_KEY: Final = "queue"

QUEUE: Final = "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$"
"""What the name of a queue looks like: nothing that could be taken for an option or for more than a name."""

LABEL: Final = "tesp.site.label."
"""Tags with this beginning ask for a site with that label."""

LONGEST: Final = 10 * 365 * 86400
"""Seconds that a time limit may have."""


@dataclass(frozen=True)
class Wishes:
    """What a task says of where and how to run. None: nothing."""

    site: str | None = None
    time_limit: int | None = None
    queue: str | None = None

    @property
    def batch(self) -> bool:
        """Whether only a batch system can fulfil it."""
        return self.time_limit is not None or self.queue is not None


@dataclass(frozen=True)
class Offer:
    """What of that a site honours: with `batch` a time limit and a queue, one of `queues` where there are any."""

    batch: bool = False
    queues: tuple[str, ...] = ()


_NO_WISHES: Final = Wishes()

Offers = Mapping[str, Offer]
"""The offers of all sites, by name."""


def known(offers: Offers) -> tuple[str, ...]:
    """The keys that some site honours."""
    batch = (QUEUE_KEY, TIME_LIMIT) if any(offer.batch for offer in offers.values()) else ()
    return (*batch, SITE) if offers else ()


def read_wishes(resources: TesResources | None) -> Wishes:
    """What a stored task asks for; a value that makes no sense counts as none."""
    given = _given(resources)
    if not given:
        return _NO_WISHES
    queue = given.get(QUEUE_KEY)
    return Wishes(
        site=given.get(SITE) or None,
        time_limit=seconds(given[TIME_LIMIT]) if TIME_LIMIT in given else None,
        queue=queue if queue is not None and _is_queue(queue) else None,
    )


def labels(spec: TesTask) -> dict[str, str]:
    """The labels that a site must have; their keys in lower case, as those of the settings are."""
    tags = spec.tags or {}
    return {key[len(LABEL) :].lower(): value for key, value in tags.items() if key.lower().startswith(LABEL)}


def lane(spec: TesTask) -> str:
    """Tasks of one lane find room at the same sites: the same wishes, and about the same size.

    A dispatcher that finds no room for one task passes over the others of its lane, and sees those behind them.
    """
    resources, asked = spec.resources, labels(spec)
    if resources is None and not asked:
        return "0 0"
    cpus = size_class(resources.cpu_cores) if resources else 0
    ram = size_class(resources.ram_gb) if resources else 0
    wishes = read_wishes(resources)
    special = [
        [wishes.site, wishes.batch, wishes.queue, sorted(asked.items())],
        _kind(resources) if resources else [],
    ]
    return f"{cpus} {ram}" if special == _NOTHING_SPECIAL else f"{cpus} {ram} {_digest(json.dumps(special))}"


_NOTHING_SPECIAL: Final[list[list[object]]] = [[None, False, None, []], [0, [], False]]


def _kind(resources: TesResources) -> list[object]:
    return [size_class(resources.disk_gb), sorted(set(resources.zones or ())), bool(resources.preemptible)]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def size_class(amount: float | None) -> int:
    """The least power of two that is not less; 0 for nothing."""
    return 1 << (math.ceil(amount) - 1).bit_length() if amount else 0


def seconds(text: str) -> int | None:
    """A time limit in seconds; None if it is no such text."""
    if re.fullmatch(r"[0-9]{1,10}", text):
        found = int(text)
    elif clock := re.fullmatch(r"([0-9]{1,5}):([0-5][0-9]):([0-5][0-9])", text):
        hours, minutes, rest = map(int, clock.groups())
        found = 3600 * hours + 60 * minutes + rest
    else:
        return None
    return found if 0 < found <= LONGEST else None


def accept(spec: TesTask, offers: Offers) -> tuple[TesTask, list[str]]:
    """The task without the parameters that no site it may go to honours, and a line for each one dropped.

    InvalidRequest for a value that makes no sense, whether or not a site would honour it, for a key that is there
    twice, and, if the task says `backend_parameters_strict`, instead of a drop.
    """
    given = _given(spec.resources)
    if not given:
        return spec, []
    site = given.get(SITE, "")
    eligible = {site: offers[site]} if site in offers else offers
    faults = _faults(spec.resources, offers, eligible)
    if faults:
        raise refusal(faults)
    return drop_unsupported(spec, known(eligible))


def _faults(resources: TesResources | None, offers: Offers, eligible: Offers) -> list[Detail]:
    found, seen = [], dict[str, str]()
    for key, value in (resources.backend_parameters or {} if resources else {}).items():
        name = key.lower()
        if name not in (SITE, TIME_LIMIT, QUEUE_KEY):
            continue
        first = seen.setdefault(name, key)
        fault = _fault(name, str(value).strip(), offers, eligible)
        if first != key:  # only one of them would be read
            fault = f"is there twice, as case does not matter: {first} is the same key"
        if fault:
            found.append(Detail(f"resources.backend_parameters.{key}", fault))
    return found


def _fault(name: str, text: str, offers: Offers, eligible: Offers) -> str | None:
    """What is wrong with the value of a known key, as the rest of a sentence."""
    if name == SITE and offers and text not in offers:
        return f"must be the name of a site (one of {', '.join(sorted(offers))})"
    if name == TIME_LIMIT and seconds(text) is None:
        return "must be a whole number of seconds, at least 1, or HH:MM:SS"
    if name == QUEUE_KEY and not _is_queue(text):
        return "must be the name of a queue: at most 64 of A-Z a-z 0-9 _ . -"
    if name == QUEUE_KEY and QUEUE_KEY in known(eligible) and not _has_queue(eligible.values(), text):
        return "must be a queue that a site has"
    return None


def _has_queue(offers: Collection[Offer], queue: str) -> bool:
    return any(offer.batch and (not offer.queues or queue in offer.queues) for offer in offers)


def _is_queue(text: str) -> bool:
    return re.fullmatch(QUEUE, text) is not None and not text.endswith("\n")


def _given(resources: TesResources | None) -> dict[str, str]:
    pairs = (resources.backend_parameters or {}) if resources else {}
    return {key.lower(): str(value).strip() for key, value in pairs.items()}


__all__ = [
    "LABEL",
    "QUEUE",
    "Offer",
    "Offers",
    "Wishes",
    "accept",
    "known",
    "labels",
    "lane",
    "read_wishes",
    "seconds",
    "size_class",
]
