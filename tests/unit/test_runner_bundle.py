"""The zipapp: the same bytes every time, for every Python, and sure of itself."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tesp_api.runner import boot, bundle, job


def test_the_same_sources_make_the_same_bytes() -> None:
    first = bundle.build()
    assert bundle.build() == first
    script = "from tesp_api.runner import bundle; print(bundle.build().sha256)"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            check=True,
        )
        assert done.stdout.decode().strip() == first.sha256


def test_it_holds_sources_and_compiled_ones_but_not_what_only_the_service_needs() -> None:
    names = set(zipfile.ZipFile(io.BytesIO(bundle.build().data)).namelist())
    assert {"__main__.py", "tesp_api/__init__.py", "tesp_api/runner/main.py", "tesp_api/runner/main.pyc"} <= names
    assert "tesp_api/runner/bundle.py" not in names
    assert {name + "c" for name in names if name.endswith(".py")} == {name for name in names if name.endswith(".pyc")}


def test_the_compiled_ones_are_used_by_this_python(tmp_path: Path) -> None:
    archive = tmp_path / "runner.pyz"
    archive.write_bytes(bundle.build().data)
    script = "import sys; sys.path.insert(0, sys.argv[1]); import tesp_api.runner.main as m; print(m.__file__)"
    done = subprocess.run([sys.executable, "-IS", "-c", script, str(archive)], capture_output=True, check=True)
    assert done.stdout.decode().strip().endswith("main.pyc")


def test_the_command_holds_nothing_but_the_hash() -> None:
    sha = "a" * 64
    assert bundle.command(sha) == f"python3 -IS ../../tes-runner-{sha}/inputs/runner.pyz run {sha}"
    for wrong in ("", "a" * 63, "A" * 64, "a" * 63 + ";"):
        with pytest.raises(ValueError, match="sha256"):
            bundle.command(wrong)


def test_exit_codes_agree() -> None:
    assert (boot.OLD_PYTHON, boot.DAMAGED_RUNNER) == (job.EXIT_OLD_PYTHON, job.EXIT_DAMAGED_RUNNER)


def test_the_runner_imports_nothing_but_itself() -> None:
    here = Path(bundle.__file__).parent
    for path in here.rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]) and "tesp_api" in line:
                assert words[1].startswith("tesp_api.runner"), (path, line)
