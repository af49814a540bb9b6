"""Credentials for image registries, as `docker login` keeps them."""

import base64
import json
import os
from typing import Any, Dict

_HUB = "https://index.docker.io/v1/"


def credentials(image: str) -> Dict[str, str]:
    """The header to send with a pull of the image, if the user has logged in to its registry; else nothing."""
    entry = _entry(_registry(image))
    if not entry:
        return {}
    user, _, password = _decoded(str(entry.get("auth", ""))).partition(":")
    known = {
        "username": entry.get("username") or user,
        "password": entry.get("password") or password,
        "serveraddress": _registry(image),
    }
    if entry.get("identitytoken"):
        known = {"identitytoken": entry["identitytoken"], "serveraddress": _registry(image)}
    return {"X-Registry-Auth": base64.urlsafe_b64encode(json.dumps(known).encode("ascii")).decode("ascii")}


def _registry(image: str) -> str:
    first, slash, _ = image.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        return _HUB if first in ("docker.io", "index.docker.io") else first
    return _HUB


def _entry(registry: str) -> Dict[str, Any]:
    folder = os.environ.get("DOCKER_CONFIG") or os.path.join(os.path.expanduser("~"), ".docker")
    try:
        with open(os.path.join(folder, "config.json"), "rb") as stream:
            known = json.loads(stream.read().decode("utf-8")).get("auths", {})
        for name in (registry, "https://" + registry, "https://%s/v1/" % registry, "https://%s/v2/" % registry):
            if isinstance(known.get(name), dict):
                return dict(known[name])
    except (OSError, ValueError, AttributeError):
        pass
    return {}


def _decoded(auth: str) -> str:
    try:
        return base64.b64decode(auth).decode("utf-8")
    except ValueError:
        return ""
