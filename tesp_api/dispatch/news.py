"""What an operator should read in the log: sites that stop answering and come back."""

from __future__ import annotations

import logging

log = logging.getLogger("tesp_api.dispatch")


class SiteNews:
    """Tells once that a site does not answer, and once that it does again."""

    def __init__(self) -> None:
        self._silent: set[str] = set()

    def silent(self, site: str, reason: str) -> None:
        """It gave no usable answer."""
        if site not in self._silent:
            self._silent.add(site)
            log.warning("The site %r does not answer; its tasks wait: %s", site, reason)

    def answers(self, site: str) -> None:
        """It answered."""
        if site in self._silent:
            self._silent.discard(site)
            log.info("The site %r answers again.", site)
