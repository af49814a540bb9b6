"""Errands: the orders, what is done with them on the node, and what is believed of the answer."""

from __future__ import annotations

import base64
import inspect
import json
import os
import stat
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from tesp_api.runner import jobdir, messenger
from tesp_api.runner.bundle import build, pseudo_job
from tesp_api.sites.pulsar import errand
from tesp_api.sites.pulsar.errand import Failed, Install, NoRoom, Outcome, Read, Remove, Request, Write
from tests import pythons, standin

RUNNER = standin.bundle()


PYTHONS = {version: python for version, python in pythons.found().items() if not version.startswith("2.")}


def carry_out(
    staging: Path, *requests: Request, spent: tuple[str, ...] = (), python: str = sys.executable
) -> dict[Request, Outcome]:
    """Send the requests out as Pulsar would: files staged, the command run in the job's working directory."""
    errand_id = errand.new_id()
    launch = errand.launch(errand_id, requests, spent)
    working = staging / errand_id / "working"
    working.mkdir(parents=True)
    (staging / errand_id / "inputs").mkdir()
    for each in launch.files:
        (staging / errand_id / "inputs" / each.name).write_text(each.text, "ascii")
    command = [python if each == "python3" else each for each in launch.command_line.split()]
    done = subprocess.run(command, cwd=working, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    found = errand.outcomes(errand_id, (working / "result.json").read_text("ascii"), requests)
    assert found is not None
    return dict(found)


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    job = tmp_path / "staging" / "t-1"
    (job / "metadata").mkdir(parents=True)
    (job / "metadata" / "progress.json").write_bytes(b'{"job_id": "t-1"}')
    (job / "metadata" / "result.json").write_bytes(b"x" * 1000)
    return tmp_path / "staging"


@pytest.mark.parametrize("version", PYTHONS)
def test_an_errand_reads_writes_installs_and_removes(staging: Path, version: str) -> None:
    (staging / "t-2").mkdir()
    spent = errand.new_id()
    (staging / spent / "working").mkdir(parents=True)
    read, long, missing = (
        Read("t-1", "progress.json", 100),
        Read("t-1", "result.json", 999),
        Read("t-3", "result.json", 9),
    )
    write, remove, install = Write("t-1", "answer.json", '{"cancel": true}'), Remove("t-2"), Install(RUNNER)
    found = carry_out(
        staging, read, write, install, long, remove, missing, spent=(spent, "t-1"), python=PYTHONS[version]
    )
    assert found == {read: b'{"job_id": "t-1"}', long: None, missing: None, write: None, remove: None, install: None}
    assert (staging / "t-1" / "answer.json").read_text() == '{"cancel": true}'
    assert (staging / pseudo_job(RUNNER.sha256) / "inputs" / "runner.pyz").read_bytes() == RUNNER.data
    assert not (staging / "t-2").exists()
    assert not (staging / spent).exists()
    assert (staging / "t-1").exists(), "only errands can be spent"


@pytest.mark.parametrize("job_id", ["..", ".", "", "a/b", "/etc", "t-1\n", "x" * 201, "é"])
def test_names_that_lead_elsewhere_are_refused_on_the_node_too(staging: Path, job_id: str) -> None:
    read, write, remove = Read(job_id, "result.json", 99), Write(job_id, "answer.json", "x"), Remove(job_id)
    found = carry_out(staging, read, write, remove)
    assert found[read] is None
    assert isinstance(found[write], Failed)
    assert isinstance(found[remove], Failed)
    assert (staging / "t-1").exists()
    assert staging.parent.exists()


def test_the_runner_is_no_job_and_only_our_documents_can_be_had(staging: Path) -> None:
    home = pseudo_job(RUNNER.sha256)
    carry_out(staging, Install(RUNNER))
    (staging / "t-1" / "metadata" / "secret").write_text("s")
    remove, write, read = Remove(home), Write("t-1", "inputs/job.json", "x"), Read("t-1", "secret", 9)
    found = carry_out(staging, remove, write, read)
    assert isinstance(found[remove], Failed)
    assert isinstance(found[write], Failed)
    assert found[read] is None
    assert (staging / home / "inputs" / "runner.pyz").exists()


@pytest.mark.parametrize("where", ["file", "metadata", "job"])
def test_links_are_not_followed(staging: Path, tmp_path: Path, where: str) -> None:
    outside = tmp_path / "outside"
    (outside / "metadata").mkdir(parents=True)
    (outside / "metadata" / "result.json").write_text("secret")
    if where == "job":
        (staging / "t-9").symlink_to(outside)
    elif where == "metadata":
        (staging / "t-9").mkdir()
        (staging / "t-9" / "metadata").symlink_to(outside / "metadata")
    else:
        (staging / "t-9" / "metadata").mkdir(parents=True)
        (staging / "t-9" / "metadata" / "result.json").symlink_to(outside / "metadata" / "result.json")
    read, write, remove = Read("t-9", "result.json", 99), Write("t-9", "answer.json", "x"), Remove("t-9")
    assert carry_out(staging, read)[read] is None
    if where == "job":
        assert isinstance(carry_out(staging, write)[write], Failed)
    assert carry_out(staging, remove)[remove] is None
    assert not (staging / "t-9").is_symlink()
    assert (outside / "metadata" / "result.json").read_text() == "secret"
    assert not (outside / "answer.json").exists()


def test_what_is_closed_to_its_owner_is_removed(staging: Path) -> None:
    closed = staging / "t-1" / "tes" / "a" / "b"
    closed.mkdir(parents=True)
    (closed / "file").touch()
    closed.chmod(stat.S_IRUSR)
    closed.parent.chmod(0)
    remove = Remove("t-1")
    assert carry_out(staging, remove) == {remove: None}
    assert not (staging / "t-1").exists()


def test_a_removed_job_is_marked_as_runners_mark_those_that_they_take(staging: Path) -> None:
    assert messenger.SHARD == jobdir._SHARD
    carry_out(staging, Install(RUNNER), Remove("t-1"))
    home = staging / pseudo_job(RUNNER.sha256)
    assert not jobdir.JobDirectory(str(staging / "t-1")).take_id(str(home / "inputs" / "runner.pyz"))
    assert jobdir.JobDirectory(str(staging / "t-2")).take_id(str(home / "inputs" / "runner.pyz"))


def test_old_marks_go_when_new_ones_are_made(staging: Path) -> None:
    """In the home of an earlier version of the runner, too, where no runner does that any more."""
    assert messenger.MARKED_FOR == jobdir._MARKED_FOR
    assert inspect.getsource(messenger._drop_old).replace("MARKED", "_MARKED") == inspect.getsource(jobdir._drop_old)
    old, recent = (staging / pseudo_job("a" * 64) / "ran" / name for name in ("01OLD", "01NEW"))
    for shard in (old, recent):
        shard.mkdir(parents=True)
        (shard / f"{shard.name}-1").touch()
    an_age_ago = time.time() - messenger.MARKED_FOR - 60
    os.utime(old, (an_age_ago, an_age_ago))
    carry_out(staging, Remove("t-1"))
    assert not old.exists()
    assert (recent / "01NEW-1").exists()
    assert (recent.parent / "t-1" / "t-1").exists()


SWAP = """
import os, shutil, stat, sys
from tesp_api.runner.messenger import open_up

left = 0  # steps of open_up until somebody swaps a directory for a link

def step(event, arguments):
    global left
    if left and event in ("open", "os.chmod", "os.scandir", "os.listdir", "os.walk"):
        left -= 1
        if not left:
            os.rename("job/a", "job/moved")
            os.symlink("../outside", "job/a")

def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)

sys.addaudithook(step)
os.umask(0o022)
os.makedirs("outside/b")
number, more = 0, True
while more:
    number += 1
    os.makedirs("job/a/b")
    left = number
    open_up("job")
    more, left = left == 0, 0
    assert (mode("outside"), mode("outside/b")) == (0o755, 0o755), number
    assert more or (mode("job/a"), mode("job/a/b")) == (0o700, 0o700), number
    shutil.rmtree("job")
print(number)
"""


def test_a_link_put_in_a_directorys_place_meanwhile_is_not_followed(tmp_path: Path) -> None:
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", SWAP],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 5, "steps"


def test_a_document_for_a_removed_job_makes_no_directory(staging: Path) -> None:
    """A cancel and a removal of two services may be under way at the same time."""
    carry_out(staging, Install(RUNNER), Remove("t-1"))
    late, early = Write("t-1", "answer.json", "{}"), Write("t-2", "answer.json", "{}")
    assert carry_out(staging, late, early) == {late: None, early: None}
    assert not (staging / "t-1").exists()
    assert (staging / "t-2" / "answer.json").exists()


def test_a_damaged_runner_is_replaced_and_a_good_one_left_alone(staging: Path) -> None:
    program = staging / pseudo_job(RUNNER.sha256) / "inputs" / "runner.pyz"
    carry_out(staging, Install(RUNNER))
    before = program.stat()
    carry_out(staging, Install(RUNNER))
    assert (program.stat().st_ino, program.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    program.write_bytes(RUNNER.data[:-1])
    carry_out(staging, Install(RUNNER))
    assert program.read_bytes() == RUNNER.data


def test_what_has_no_room_in_the_answer_is_to_be_asked_for_again(staging: Path) -> None:
    for number in (1, 2):
        (staging / f"t-{number}" / "metadata").mkdir(parents=True, exist_ok=True)
        (staging / f"t-{number}" / "metadata" / "result.json").write_bytes(bytes(range(256)))
    reads = [Read(name, "result.json", 999) for name in ("t-1", "t-9", "t-2")]
    orders = [[each.job_id, each.name, each.limit] for each in reads]
    told = messenger.Messenger(str(staging), room=100).run({"errand": "e", "read": orders})
    found = errand.outcomes("e", json.dumps(told), reads)
    assert found is not None
    assert [found[each] for each in reads[:2]] == [bytes(range(256)), None]
    assert isinstance(found[reads[2]], NoRoom)


def answer(errand_id: str = "e", **changes: object) -> str:
    whole = {"errand": errand_id, "read": [], "write": [], "remove": [], "install": []}
    return json.dumps({**whole, **changes})


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "[]",
        "null",
        "{",
        "[" * 100_000,
        answer("other"),
        answer(read={}),
        answer(read="xx"),
        answer(write=None),
    ],
)
def test_what_is_no_answer_is_none(text: str | None) -> None:
    requests = [Read("t-1", "result.json", 9), Write("t-1", "answer.json", "x")]
    assert errand.outcomes("e", text, requests) is None


@pytest.mark.parametrize(
    "what", [5, True, [], "", "é", "AAAA", base64.b64encode(zlib.compress(b"x" * 10)).decode()[:-4]]
)
def test_what_is_no_file_is_none(what: object) -> None:
    read = Read("t-1", "result.json", 9)
    assert errand.outcomes("e", answer(read=[what]), [read]) == {read: None}


def test_a_file_does_not_unpack_to_more_than_was_asked_for() -> None:
    read = Read("t-1", "result.json", 1000)
    bomb = base64.b64encode(zlib.compress(b"x" * 50_000_000)).decode()
    assert errand.outcomes("e", answer(read=[bomb]), [read]) == {read: None}


def test_an_errand_takes_only_so_much() -> None:
    writes = [Write(f"t-{number}", "answer.json", "x" * (3 << 20)) for number in range(5)]
    assert errand.fitting(writes) == writes[:2]
    reads = [Read(f"t-{number}", "result.json", 9) for number in range(errand.MOST + 1)]
    assert errand.fitting(reads) == reads[: errand.MOST]
    assert errand.fitting([Write("t-1", "answer.json", "x" * (20 << 20)), *reads])[1:] == []


def test_the_messenger_is_sent_alone() -> None:
    program, orders = errand.launch("tes-errand-" + "0" * 32, [Install(RUNNER)]).files
    assert program.text.isascii()
    assert orders.text.isascii()
    assert b"messenger" not in build().data
