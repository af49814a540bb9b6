"""What is remembered of jobs is bounded."""

from __future__ import annotations

from tesp_api.sites.pulsar.lately import Lately


def test_the_last_ones_are_remembered() -> None:
    lately = Lately[int](3)
    for number in range(10_000):
        lately["often"] = number
        lately[str(number)] = number
    assert dict(lately) == {"9998": 9998, "often": 9999, "9999": 9999}
    assert lately.pop("often", None) == 9999
    assert "often" not in lately
    assert list(lately) == ["9998", "9999"]
