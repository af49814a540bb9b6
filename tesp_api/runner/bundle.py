"""The runner as one file: a zipapp, and the command line that starts it. Used by the service, not by the runner."""

import hashlib
import importlib.util
import io
import os
import zipfile
from typing import Any, Dict, Iterator, NamedTuple, Tuple, cast

FILE_NAME = "runner.pyz"
"""The zipapp's name inside the pseudo job's inputs directory."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip file can say
_HERE = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = "tesp_api/runner"
_NOT_SHIPPED = {"boot.py", "bundle.py", "messenger.py"}
_UNCHECKED_HASH = 1  # PEP 552: a .pyc tied to its source by hash, which the importer trusts without a look


class Bundle(NamedTuple):
    """A built zipapp; `sha256` in hex names it everywhere."""

    data: bytes
    sha256: str


def pseudo_job(sha256: str) -> str:
    """The id of the pseudo job that holds the zipapp on a site."""
    return "tes-runner-" + sha256


def command(sha256: str) -> str:
    """The whole command line of a job whose directory is a sibling of the pseudo job's. No user text is ever in it."""
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise ValueError("not a sha256 in hex: %r" % sha256)
    return "python3 -IS ../../%s/inputs/%s run %s" % (pseudo_job(sha256), FILE_NAME, sha256)


def build() -> Bundle:
    """The zipapp: the same bytes from the same sources and Python version.

    It holds sources, for any Python, and beside them what this Python compiles of them, so that the same version on the
    node need not compile.
    """
    files: Dict[str, bytes] = {"tesp_api/__init__.py": b""}
    for name, data in _sources():
        files["%s/%s" % (_PACKAGE, name)] = data
    with open(os.path.join(_HERE, "boot.py"), "rb") as stream:
        files["__main__.py"] = stream.read()
    for name in list(files):
        files[name + "c"] = _compiled(name, files[name])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # stored: inflating would cost at each start
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.external_attr = 0o644 << 16
            entry.create_system = 3
            archive.writestr(entry, files[name])
    data = buffer.getvalue()
    return Bundle(data, hashlib.sha256(data).hexdigest())


def _sources() -> Iterator[Tuple[str, bytes]]:
    for folder, folders, names in os.walk(_HERE):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            relative = os.path.relpath(os.path.join(folder, name), _HERE).replace(os.sep, "/")
            if name.endswith(".py") and relative not in _NOT_SHIPPED:
                with open(os.path.join(folder, name), "rb") as stream:
                    yield relative, stream.read()


def _compiled(name: str, source: bytes) -> bytes:
    import marshal

    code = compile(source, name, "exec", dont_inherit=True, optimize=0)
    source_hash = cast(Any, importlib.util).source_hash  # since 3.7
    head = importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH.to_bytes(4, "little") + source_hash(source)
    return bytes(head + marshal.dumps(code, 2))  # version 2: without reference flags, which vary from run to run
