"""The interpreters of this machine, to run the runner with: it must work from Python 3.6 on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def version(python: str) -> str:
    """Its version as `3.11`, or "" if it does not run."""
    code = "import sys; sys.stdout.write('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=20).stdout
    except OSError:
        return ""


def _candidates() -> list[str]:
    managed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    named = [shutil.which(f"python{each}") for each in ("2.7", "2", *(f"3.{minor}" for minor in range(6, 20)))]
    return [each for each in named if each] + [str(each) for each in managed.glob("*/bin/python")]


def found() -> dict[str, str]:
    """Version -> interpreter, the one that runs the tests among them."""
    pythons = {}
    for python in _candidates():
        if number := version(python):
            pythons.setdefault(number, python)
    pythons[version(sys.executable)] = sys.executable
    return dict(sorted(pythons.items(), key=lambda item: [int(part) for part in item[0].split(".")]))
