"""Servers that several files of these tests use, each file its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm import Slurm, need_slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster of one node."""
    need_slurm()
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
