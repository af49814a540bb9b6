"""What the two sides of the relay share: the API that a Pulsar calls, and the carrier that writes to that Pulsar."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

DEFAULT_MANAGER: Final = "_default_"


@dataclass(frozen=True)
class Manager:
    """One Pulsar manager at the relay: its topics, in Pulsar's words, and its boxes in the mailbox.

    `site` is the name of the site that it is to us; `prefix` is Pulsar's relay_topic_prefix.
    """

    site: str
    prefix: str = ""
    name: str = ""
    setup: str = field(init=False)
    kill: str = field(init=False)
    status: str = field(init=False)
    update: str = field(init=False)
    capabilities: str = field(init=False)

    def __post_init__(self) -> None:
        for topic, base in (
            ("setup", "job_setup"),
            ("kill", "job_kill"),
            ("status", "job_status_request"),
            ("update", "job_status_update"),
            ("capabilities", "pulsar_capabilities"),
        ):
            name = "" if self.name == DEFAULT_MANAGER else self.name
            object.__setattr__(self, topic, "_".join(each for each in (self.prefix, base, name) if each))

    @property
    def reads(self) -> frozenset[str]:
        """The topics that Pulsar asks for, always together."""
        return frozenset((self.setup, self.kill, self.status))

    @property
    def outbox(self) -> str:
        """Holds what Pulsar is to read: one box for all its topics, so that their order is kept."""
        return f"relay {self.site} out"

    @property
    def inbox(self) -> str:
        """Holds the status updates that Pulsar has written."""
        return f"relay {self.site} in"

    @property
    def about(self) -> str:
        """Holds what Pulsar says of itself when it starts."""
        return f"relay {self.site} about"


def write_letter(topic: str, payload: str) -> str:
    """A letter for the outbox; `payload` is JSON."""
    return f"{topic}\n{payload}"


def read_letter(text: str) -> tuple[str, str]:
    """The topic and the payload of a letter from the outbox."""
    topic, _, payload = text.partition("\n")
    return topic, payload


__all__ = ["DEFAULT_MANAGER", "Manager", "read_letter", "write_letter"]
