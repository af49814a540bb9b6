"""Becomes `__main__.py` of the zipapp: checks the interpreter and the zipapp itself before anything else is imported.

This file alone must be valid Python 2.7, because `python3` may be anything that an old node offers.
"""

import os
import sys

OLD_PYTHON = 77  # job.EXIT_OLD_PYTHON; job.py cannot be imported yet (a test compares them)
DAMAGED_RUNNER = 76  # job.EXIT_DAMAGED_RUNNER


def digest(path):  # type: (str) -> str
    """The sha256 of a file in hex. `hashlib` would load OpenSSL, which costs more than all the rest of the start."""
    try:
        from _sha2 import sha256  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        try:
            from _sha256 import sha256  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            from hashlib import sha256
    with open(path, "rb") as stream:
        return str(sha256(stream.read()).hexdigest())


def boot(argv):  # type: (list[str]) -> int
    """Carry out `runner.pyz run <sha256>` in the current directory JOB/working; the exit code."""
    if sys.version_info < (3, 6):
        sys.stderr.write("This python is too old for the runner; it needs 3.6 or newer.\n")
        return OLD_PYTHON
    archive = os.path.abspath(sys.path[0])
    if len(argv) != 3 or argv[1] != "run" or digest(archive) != argv[2]:
        sys.stderr.write("The runner's zipapp is not the one that was sent.\n")
        return DAMAGED_RUNNER
    sys.path[0] = archive  # what is imported later must not depend on the current directory
    from tesp_api.runner.main import main

    return main()


if __name__ == "__main__":
    sys.exit(boot(sys.argv))
