"""A real Slurm for tests: one node, all of it in one directory, on free ports, ended by the ids of its processes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.pulsars import DOCKER, PulsarMain, PulsarServer
from tests.support import free_port, require

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")

_CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=64
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
MessageTimeout=20
# A node with cores that the machine may not have, so that tests do not depend on it.
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=4000
PartitionName=short Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=long Nodes={host} MaxTime=INFINITE State=UP
"""


def need_slurm() -> None:
    """Skip the test where Slurm cannot be run."""
    require(all(shutil.which(each) for each in PROGRAMS), "slurm-wlm or munge is not installed")
    require(os.geteuid() == 0, "only root can run a Slurm of its own")


class Slurm:
    """slurmctld and slurmd with a munged; `host` is the node's name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.host = socket.gethostname().partition(".")[0]
        self.configuration = directory / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.configuration)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all of it, and wait until the node takes jobs."""
        for each in ("state", "spool"):
            (self.directory / each).mkdir(parents=True)
        self.directory.chmod(0o755)  # munged wants its socket to be reachable
        self.configuration.write_text(
            _CONFIGURATION.format(host=self.host, controller=free_port(), daemon=free_port(), directory=self.directory)
        )
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"key-file": key}
        for option, name in (("socket", "munge.sock"), ("pid-file", "munged.pid"), ("seed-file", "munged.seed")):
            files[option] = self.directory / name
        self._run("munged", "munged", "--foreground", "--force", *(f"--{key}={path}" for key, path in files.items()))
        self._until(lambda: (self.directory / "munge.sock").exists(), "munged")
        self.start_controller()
        self.start_daemon()

    def start_controller(self) -> None:
        """Start slurmctld."""
        self._run("slurmctld", "slurmctld", "-D", "-f", str(self.configuration))
        self._until(lambda: "UP" in self.tell("scontrol", "ping", check=False), "slurmctld")

    def start_daemon(self) -> None:
        """Start slurmd, and wait until its node takes jobs."""
        self._run("slurmd", "slurmd", "-D", "-f", str(self.configuration))
        self._until(lambda: self.tell("sinfo", "-h", "-o", "%t", check=False).split()[:1] == ["idle"], "slurmd")

    def end(self, name: str, number: int = signal.SIGKILL) -> None:
        """End one of the daemons; jobs go on."""
        process = self._processes.pop(name)
        process.send_signal(number)
        process.wait(60)

    def stop(self) -> None:
        """End everything, jobs included."""
        if "slurmctld" in self._processes:
            self.tell("scancel", "--user", "root", "--signal", "KILL", "--full", check=False)
        for name in reversed(list(self._processes)):
            self.end(name)

    def tell(self, *argv: str, check: bool = True) -> str:
        """Run one of Slurm's programs; what it says."""
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or not check, f"{argv}: {done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What Slurm knows of our job; empty if nothing."""
        for line in self.tell("scontrol", "-o", "show", "jobs").splitlines():
            facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
            if facts.get("JobName") == f"pulsar_{job_id}":
                return facts
        return {}

    def _run(self, name: str, *argv: str) -> None:
        with (self.directory / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                argv, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _until(self, look: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 60
        while not look():
            assert time.monotonic() < deadline, f"{what} did not start: {self.log()}"
            time.sleep(0.05)

    def log(self) -> str:
        """What its daemons have written."""
        return "\n".join(each.read_text("utf-8", "replace")[-4000:] for each in self.directory.glob("*.[ol]*[tg]"))


def pulsar_with(slurm: Slurm, directory: Path) -> PulsarServer:
    """A Pulsar that is configured as docs/pulsar.md says, with this Slurm behind it."""
    return PulsarServer(directory, app=_managers(directory), variables={"SLURM_CONF": str(slurm.configuration)})


def pulsar_by_amqp_with(slurm: Slurm, directory: Path, url: str) -> PulsarMain:
    """The same behind a broker: the `managers` of one file in place of those of the other."""
    directory.mkdir(parents=True)
    text = (DOCKER / "amqp" / "app.yml").read_text()
    merged = directory / "merged.yml"
    merged.write_text(text[: text.index("managers:")] + _managers(directory))
    pulsar = PulsarMain(directory, str(merged), AMQP_URL=url)
    pulsar.variables["SLURM_CONF"] = str(slurm.configuration)
    return pulsar


def _managers(directory: Path) -> str:
    app = (DOCKER / "slurm" / "app.yml").read_text()
    program = DOCKER / "slurm" / "tesp-slurm"
    return app.replace("@STAGING@", str(directory)).replace("@TESP_SLURM@", str(program))
