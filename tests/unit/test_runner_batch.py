"""What the runner learns from the batch system around it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tesp_api.runner import batch


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in Slurm's place, first on PATH; it fails until it is written."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(("reason", "reached"), [("TimeLimit", True), ("None", False), ("NodeDown", False)])
def test_slurm_knows_the_reason(scontrol: Path, reason: str, reached: bool) -> None:
    scontrol.write_text(
        f'#!/bin/sh\ntest "$*" = "-o show job 7" && echo JobId=7 JobState=COMPLETING Reason={reason} x=y\n'
    )
    assert batch.limit_reached(None, 1.0) is reached
    assert batch.limit_reached(60, 1000.0) is reached


@pytest.mark.parametrize(("time_limit", "age", "reached"), [(None, 1e6, False), (60, 59, True), (60, 30, False)])
def test_without_its_answer_the_plans_limit_must_do(
    scontrol: Path, time_limit: int | None, age: float, reached: bool
) -> None:
    assert batch.limit_reached(time_limit, age) is reached


def test_outside_nobody_is_asked(scontrol: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch.inside()
    for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"):
        monkeypatch.delenv(name, raising=False)
    scontrol.write_text(f"#!/bin/sh\ntouch {scontrol}.ran\n")
    assert not batch.inside()
    assert not batch.limit_reached(None, 1.0)
    assert not scontrol.with_suffix(".ran").exists()
