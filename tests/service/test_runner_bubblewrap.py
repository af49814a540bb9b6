"""The runner with the real bubblewrap."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tesp_api.runner import job
from tesp_api.runner.engines import marked
from tests.runner_jobs import Job, executor, mounts, sh, until
from tests.support import require

pytestmark = pytest.mark.service

Make = Callable[..., Job]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    found = shutil.which("bwrap")
    probe = [str(found), "--ro-bind", "/", "/", "--unshare-all", "true"]
    require(found and subprocess.run(probe, capture_output=True).returncode == 0, "bubblewrap is needed")

    def made(*executors: job.Executor, **plan: Any) -> Job:
        (tmp_path / "data").mkdir(exist_ok=True)
        roots = [job.FileRoot(str(tmp_path / "data"))]
        hide = plan.pop("hide", [])
        runtime = job.Runtime("bubblewrap", hide=hide)
        return Job(tmp_path, {"executors": list(executors), "file_roots": roots, "runtime": runtime, **plan})

    return made


def test_happy_path(make: Make, tmp_path: Path) -> None:
    made = make(
        sh(
            "cat; echo $GREETING >&2; mkdir made; cp in.txt made/a",
            stdin="/work/in.txt",
            env={"GREETING": "a 'b' $C \u00fc"},
            workdir="/work",
        ),
        sh(
            "cat /work/made/a; pwd; cat /one; touch /tmp/x",
            workdir="/new/dir",
            stdout="/work/logs/out",
            stderr="/work/logs/err",
        ),
        inputs=[job.Input("/work/in.txt", content="inp\u00fct\n"), job.Input("/one", content="1\n")],
        outputs=[job.Output("/work", f"{tmp_path}/data/w", job.DIRECTORY)],
        mounts=[*mounts("/work", "/tmp"), job.Mount("/one", "one", job.FILE)],
    )
    result = made.run()
    assert (result.state, len(result.system_logs)) == ("COMPLETE", 1)
    assert [(one.exit_code, one.stdout, one.stderr) for one in result.executors] == [
        (0, "inp\u00fct\n", "a 'b' $C \u00fc\n"),
        (0, "inp\u00fct\n/new/dir\n1\n", ""),
    ]
    assert (tmp_path / "data" / "w" / "logs" / "out").read_text() == "inp\u00fct\n/new/dir\n1\n"
    assert (made.root / "tes" / "m1" / "x").exists()


def test_arguments_arrive_byte_for_byte(make: Make) -> None:
    words = ["a b", "", "'", '"', "$HOME", "`id`", "a\nb", "\u00fc\u4e2d", "; touch /x", "\\", "*", "--x", ""]
    made = make(executor("sh", "-c", 'for word; do printf "%s|" "$word"; done', "sh", *words))
    assert made.run().executors[0].stdout == "".join(word + "|" for word in words)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("sh", "-c", "exit 7"), 7),
        (("sh", "-c", "exit 1"), 1),
        (("sh", "-c", "kill -9 $$"), 137),
        (("no-such-program",), 127),
        (("/etc/passwd",), 126),
    ],
)
def test_exit_codes(make: Make, command: tuple[str, ...], code: int) -> None:
    result = make(executor(*command), sh("exit 0")).run()
    assert (result.state, [one.exit_code for one in result.executors]) == ("EXECUTOR_ERROR", [code])


@pytest.mark.parametrize(
    "target", ["/var/lib/tesp-new/x", "/opt/out", "/usr/bin/tesp-new", "/bin/tesp-new", "/etc/tesp", "/mnt"]
)
def test_targets_anywhere(make: Make, target: str) -> None:
    made = make(sh(f"echo x > {target}/x; ls /etc/passwd"), mounts=mounts(target))
    result = made.run()
    assert (result.state, result.executors[0].stdout) == ("COMPLETE", "/etc/passwd\n"), result
    assert (made.root / "tes" / "m0" / "x").exists()
    assert target == "/mnt" or not Path(target).exists()


def test_the_node_is_out_of_reach(make: Make, tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "secret").write_text("x")
    outside = Path("/var/lib")
    script = f"touch {outside}/x /usr/x /etc/x /x; ls -A /run {hidden} {tmp_path}/staging; echo $SECRET"
    made = make(sh(script), hide=[str(hidden)])
    result = made.run(env={"SECRET": "secret"})
    assert "secret" not in result.executors[0].stdout
    assert made.id not in result.executors[0].stdout
    for folder in (outside, Path("/usr"), Path("/etc")):
        assert not (folder / "x").exists()
    for capability in made_capabilities(make):
        assert int(capability, 16) == 0


def made_capabilities(make: Make) -> list[str]:
    result = make(sh("grep -E 'Cap(Prm|Eff|Bnd)' /proc/self/status | cut -f2")).run()
    found = result.executors[0].stdout.split()
    assert len(found) == 3
    return found[:2]


def test_the_executors_variables_stay_out_of_bwrap_itself(make: Make, tmp_path: Path) -> None:
    """LD_PRELOAD would run the task's code before the sandbox stands."""
    made = make(sh("cat /proc/self/environ", env={"LD_PRELOAD": "/nowhere/evil.so", "A": "b"}))
    made.start()
    assert made.wait() == 0
    assert "A=b" in made.result().executors[0].stdout


def test_cancel_and_kill(make: Make) -> None:
    script = "trap '' TERM; while :; do sleep 1; done"
    made = make(sh(script)).start()
    made.wait_for_phase("running")
    until(lambda: marked(made.id))
    made.cancel()
    assert made.wait() == 0
    assert made.result().state == "CANCELED"
    until(lambda: not marked(made.id))
    made = make(sh(script)).start()
    until(lambda: marked(made.id))
    os.kill(made.process.pid, 9)  # type: ignore[union-attr]
    made.wait()
    until(made.has_result)
    assert marked(made.id) == []
    assert made.result().state == "SYSTEM_ERROR"
