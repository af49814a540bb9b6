"""backend_parameters: what is known, what is dropped, what is refused."""

from __future__ import annotations

import pytest

from tesp_api.errors import InvalidRequest
from tesp_api.parameters import LONGEST, Offer, Offers, Wishes, accept, known, read_wishes, seconds
from tests.builders import make_spec

PLAIN: Offers = {"a": Offer(), "b": Offer()}
MIXED: Offers = {"a": Offer(), "hpc": Offer(True, ("long", "short")), "any": Offer(True)}
LISTED: Offers = {"a": Offer(), "hpc": Offer(True, ("long", "short"))}


def refused(offers: Offers, **parameters: str) -> str:
    with pytest.raises(InvalidRequest) as caught:
        accept(make_spec(resources={"backend_parameters": parameters}), offers)
    assert [each.field for each in caught.value.details] == [
        f"resources.backend_parameters.{key}" for key in parameters
    ]
    return str(caught.value)


@pytest.mark.parametrize(("offers", "keys"), [({}, ()), (PLAIN, ("site",)), (MIXED, ("queue", "time_limit", "site"))])
def test_only_what_some_site_honours_is_known(offers: Offers, keys: tuple[str, ...]) -> None:
    assert known(offers) == keys


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("3600", 3600),
        ("00:00:01", 1),
        ("1:00:00", 3600),
        ("100:30:05", 361805),
        (str(LONGEST), LONGEST),
        *((bad, None) for bad in ("", "0", "-1", "1.5", "1h", "00:00:00", "1:60:00", "1:2:3", "1:00", "9" * 30, "٣")),
        (str(LONGEST + 1), None),
        ("99999:00:00", None),
    ],
)
def test_time_limits(text: str, expected: int | None) -> None:
    assert seconds(text) == expected


def test_what_is_known_is_kept_and_read() -> None:
    given = {"Site": " hpc ", "TIME_LIMIT": "1:00:00", "queue": "long"}
    spec, lines = accept(make_spec(resources={"backend_parameters": given}), MIXED)
    assert lines == []
    assert read_wishes(spec.resources) == Wishes("hpc", 3600, "long")
    assert read_wishes(None) == Wishes()
    assert not Wishes("a").batch


def test_what_no_site_honours_is_dropped_with_a_line() -> None:
    spec, lines = accept(make_spec(resources={"backend_parameters": {"time_limit": "60", "site": "a"}}), PLAIN)
    assert read_wishes(spec.resources) == Wishes("a")
    assert len(lines) == 1
    assert "time_limit" in lines[0]


def test_what_the_chosen_site_does_not_honour_is_dropped_or_refused() -> None:
    given = {"time_limit": "60", "site": "a"}
    spec, lines = accept(make_spec(resources={"backend_parameters": given}), MIXED)
    assert (read_wishes(spec.resources), len(lines)) == (Wishes("a"), 1)
    with pytest.raises(InvalidRequest, match="time_limit"):
        accept(make_spec(resources={"backend_parameters": given, "backend_parameters_strict": True}), MIXED)


@pytest.mark.parametrize("queue", ["", "-p", "a b", "a;b", "a\nb", "x" * 65, "$(x)", "é", "a/b"])
def test_odd_queues_are_refused(queue: str) -> None:
    assert "queue" in refused(MIXED, queue=queue)


@pytest.mark.parametrize("offers", [PLAIN, MIXED])
@pytest.mark.parametrize("given", [{"time_limit": "blah"}, {"Queue": "-p"}, {"site": "x"}])
def test_nonsense_is_refused_whether_or_not_a_site_honours_it(offers: Offers, given: dict[str, str]) -> None:
    refused(offers, **given)


def test_nonsense_is_refused_at_a_site_that_would_not_read_it() -> None:
    spec = make_spec(resources={"backend_parameters": {"site": "a", "time_limit": "blah"}})
    with pytest.raises(InvalidRequest, match="time_limit must be"):
        accept(spec, MIXED)


@pytest.mark.parametrize("offers", [PLAIN, MIXED])
@pytest.mark.parametrize(("key", "value"), [("site", "a"), ("queue", "long"), ("time_limit", "60")])
def test_a_key_that_is_there_twice_is_refused(offers: Offers, key: str, value: str) -> None:
    spec = make_spec(resources={"backend_parameters": {key: value, key.title(): value}})
    with pytest.raises(InvalidRequest, match=rf"backend_parameters\.{key.title()} is there twice.* {key} is") as caught:
        accept(spec, offers)
    assert len(caught.value.details) == 1


def test_keys_that_nobody_knows_are_dropped_however_they_are_written() -> None:
    spec, lines = accept(make_spec(resources={"backend_parameters": {"x": "1", "X": "2"}}), PLAIN)
    assert (read_wishes(spec.resources), len(lines)) == (Wishes(), 2)


def test_values_that_make_no_sense_are_refused() -> None:
    assert "site" in refused(MIXED, Site="x")
    assert "HH:MM:SS" in refused(MIXED, time_limit="soon")
    assert "queue" in refused(LISTED, queue="other")
    spec = make_spec(resources={"backend_parameters": {"site": "hpc", "queue": "other"}})
    with pytest.raises(InvalidRequest, match=r"backend_parameters\.queue must be a queue that a site has"):
        accept(spec, MIXED)
