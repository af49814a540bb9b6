"""Every test starts from a clean environment: no settings of the developer's leak in."""

from __future__ import annotations

import os

for _name in [name for name in os.environ if name.startswith(("TESP_", "TES_", "CONTAINER_TYPE", "FASTAPI_PROFILE"))]:
    if _name not in ("TESP_REQUIRE_SERVICES", "TES_OPENAPI", "TESP_UPDATE_GOLDEN") and "TESP_CHAOS" not in _name:
        del os.environ[_name]
