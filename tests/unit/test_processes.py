"""Processes: what cannot be told is not taken for a death."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tesp_api.sites.processes import Process
from tests.support import no_more_descriptors


def test_a_process_that_cannot_be_looked_at_is_not_gone(tmp_path: Path) -> None:
    note = tmp_path / "note"
    with subprocess.Popen(["sleep", "60"]) as child:
        process = Process.of(child.pid)
        assert process is not None
        process.note(note)
        looks: list[Callable[[], object]] = [
            lambda: process.alive,
            lambda: Process.of(child.pid),
            lambda: Process.noted(note),
            lambda: process.signal(signal.SIGKILL),
            process.kill_tree,
        ]
        with no_more_descriptors():
            assert not process.gone
            for look in looks:
                with pytest.raises(OSError, match="Too many open files"):
                    look()
        assert child.poll() is None
        assert Process.noted(note) == process
        process.kill_tree()
    assert process.gone
    assert not process.alive
    assert Process.noted(note) is None
    process.signal(signal.SIGKILL)
    process.kill_tree()


def test_no_note_is_no_process(tmp_path: Path) -> None:
    (tmp_path / "garbage").write_text("{")
    assert Process.noted(tmp_path / "garbage") is None
    assert Process.noted(tmp_path / "missing") is None
