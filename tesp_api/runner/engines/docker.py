"""Docker, by the HTTP interface of its Engine: no shell, no quoting, no client program to install."""

import os
import threading
import time
from typing import Any, Dict, List, Optional, Tuple

from .. import job
from ..errors import CommandError, EngineError, EngineLost, Stopped
from ..tree import reason
from . import Engine, Run, Setting
from .wire import Connection, call, words

_STANDARD = "unix:///var/run/docker.sock"
_GRACE = 1  # seconds from the polite stop to the kill: a shell as process 1 never hears the polite one
_LEAST_MEMORY = 6 * 1024 * 1024  # Docker refuses less
_LOST = 60.0  # seconds that a lost engine has to come back
_SILENT = 15.0  # seconds between two looks at a container of which the engine says nothing
_KILLED = (137, 143, 255)  # what the containers of an engine that went down end with
_LATE = (0.0, 0.1, 0.3, 0.6)  # pauses: a busy engine hears of the end before it hears that memory was the reason
_LABEL = "tesp.job"
_NO_IMAGE_ENGINE = (
    "No Docker engine answers at %s (%s): install or start Docker, or set container.runtime to bubblewrap or host."
)


def host_of(setting: str) -> str:
    """Where the engine listens."""
    return setting or os.environ.get("DOCKER_HOST") or _STANDARD


class Docker(Engine):
    """See Engine. Containers are named `tesp-<job id>-<executor>` and labelled with their job."""

    kind = "docker"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._host = host_of(setting.plan.runtime.docker_host)
        self._image = ""  # the last one that ran
        self._removals: List[threading.Thread] = []
        self._trouble = ""

    def check(self) -> str:
        """See Engine."""
        status, answer = self._call("GET", "/version")
        if status != 200 or not isinstance(answer, dict):
            raise EngineError("Docker at %s answers %s: %s" % (self._host, status, words(answer)))
        return str(answer.get("Version", ""))

    def run(self, run: Run) -> int:
        """See Engine."""
        name = "tesp-%s-%d" % (self.setting.plan.job_id, run.number)
        self._image = image_name(run.executor.image)
        body = container(self.setting, run.executor, run.number, run.stdin is not None)
        self._create(name, body, run)
        try:
            return _Execution(self, name, run).carry_out()
        finally:
            self._remove_later(name)

    def close(self) -> None:
        """See Engine. Removals run beside the rest of the work; here they are waited for."""
        for thread in self._removals:
            thread.join()
        self._removals = []
        if self._trouble:
            said = "A container could not be removed yet: %s" % self._trouble
            self._trouble = ""
            self.setting.tell({"sweep": True})
            if self.setting.watch.stopped.is_set():
                raise EngineLost(said)  # CANCELED would promise that it is gone
            self.setting.note(said)

    def adopt(self) -> None:
        """See Engine. Root's files can only be given away by root: a last short container does it."""
        self._take_over()
        super().adopt()

    def _take_over(self) -> None:
        user, group = os.geteuid(), os.getegid()
        mounts = [bound for bound in self.setting.bounds if not bound.read_only and not bound.live]
        foreign = [bound for bound in mounts if _has_foreign(bound.real, user)]
        if user == 0 or not foreign or not self._image:
            return
        name = "tesp-%s-owner" % self.setting.plan.job_id
        places = ["/tesp/%d" % index for index in range(len(foreign))]
        body = {
            "Image": self._image,
            "Entrypoint": ["chown"],
            "Cmd": ["-R", "-h", "%d:%d" % (user, group), *places],
            "User": "0:0",
            "Labels": _labels(self.setting.plan, "owner"),
            "HostConfig": {
                "LogConfig": {"Type": "none"},
                "NetworkMode": "none",
                "Mounts": [_mount(place, bound.real, False) for place, bound in zip(places, foreign)],  # noqa: B905
            },
        }
        try:
            status, answer = self._call("POST", "/containers/create?name=" + name, body)
            if status == 201:
                status, answer = self._call("POST", "/containers/%s/start" % name)
                if status == 204:
                    status, answer = self._call("POST", "/containers/%s/wait" % name)
        finally:
            self._remove_later(name)
        if any(_has_foreign(bound.real, user) for bound in foreign):
            self.setting.note("Files of other users are left in the job's directory: %s" % words(answer))

    # What _Execution needs

    def connect(self) -> Connection:
        """A new connection."""
        try:
            return Connection(self._host)
        except OSError as error:
            raise EngineLost(_NO_IMAGE_ENGINE % (self._host, reason(error)))

    def call(self, method: str, path: str, body: Any = None) -> Tuple[int, Any]:
        """One request; EngineError when there is no answer."""
        return self._call(method, path, body)

    def _call(
        self, method: str, path: str, body: Any = None, headers: Optional[Dict[str, str]] = None
    ) -> Tuple[int, Any]:
        try:
            return call(self._host, method, path, body, headers)
        except (OSError, ValueError) as error:
            if isinstance(error, ConnectionError) and not isinstance(error, ConnectionRefusedError):
                raise EngineLost("Docker at %s went away in the middle of a request: %s" % (self._host, reason(error)))
            raise EngineLost(_NO_IMAGE_ENGINE % (self._host, reason(error)))

    def _create(self, name: str, body: Dict[str, Any], run: Run) -> None:
        """Create the container; only the answer tells what has to be done first, so that usually nothing is."""
        where = "executors[%d]" % run.number
        pulled = clamped = False
        while True:
            self.setting.watch.check()
            try:
                status, answer = self._call("POST", "/containers/create?name=" + name, body)
            except EngineError as error:
                if not isinstance(error.__context__, (ConnectionRefusedError, FileNotFoundError, PermissionError)):
                    self._remove_later(name, unsure=True)  # it may have come to be, or be about to
                raise
            if status == 201:
                for warning in answer.get("Warnings") or []:
                    self.setting.note("Docker warns: %s" % warning)
                return
            said = words(answer)
            if status == 404 and not pulled:
                pulled = True
                self._pull(where, run.executor.image)
            elif status == 400 and "CPUs" in said and not clamped:
                clamped = True
                self._clamp(body)
            elif status == 409:
                raise EngineError("%s: a container named %s exists already." % (where, name))
            elif status == 404:
                raise EngineError("%s.image: Docker has no image %r: %s" % (where, run.executor.image, said))
            else:
                if "bind source path does not exist" in said:
                    said += " (Docker must see the job directory under the same path as the runner)"
                raise EngineError("%s: Docker refuses the container: %s" % (where, said))

    def _clamp(self, body: Dict[str, Any]) -> None:
        cpus = int(self._call("GET", "/info")[1]["NCPU"])
        asked = body["HostConfig"]["NanoCpus"] / 1e9
        body["HostConfig"]["NanoCpus"] = cpus * 1000000000
        self.setting.note("resources.cpu_cores: %g asked for, this node has %d; limited to these." % (asked, cpus))

    def _pull(self, where: str, image: str) -> None:
        """Fetch an image; transient failures are tried again."""
        if self.setting.plan.runtime.pull == "never":
            raise EngineError("%s.image: %r is not on this node, and pulling is switched off." % (where, image))
        for pause in (1, 3, None):
            problem = self._pull_once(image)
            if not problem:
                return
            if pause is None or not _transient(problem):
                if "no basic auth credentials" in problem or "unauthorized" in problem:
                    problem += " (the user that runs the jobs on this node needs a docker login)"
                raise EngineError("%s.image: %r cannot be pulled: %s" % (where, image, problem))
            self.setting.watch.sleep(pause)

    def _pull_once(self, image: str) -> str:
        import json
        from urllib.parse import quote

        from .registry import credentials

        name, tag = split_image(image)
        path = "/images/create?fromImage=%s&tag=%s" % (quote(name, safe=""), quote(tag, safe=""))
        with self.connect() as connection, self.setting.watch.on_stop(connection.close):
            try:
                connection.send("POST", path, None, credentials(name))
                if connection.receive() != 200:
                    text = connection.text()
                    return words(json.loads(text)) if text.startswith("{") else text
                for line in connection.lines():
                    entry = json.loads(line) if line.strip() else {}
                    if "error" in entry:
                        return str(entry["error"])
            except (OSError, ValueError) as error:
                self.setting.watch.check()
                return reason(error)
        return ""

    def _remove_later(self, name: str, unsure: bool = False) -> None:
        """Remove a container while other work goes on; `close` waits for it. `unsure`: it may yet come to be."""
        thread = threading.Thread(target=self._remove, args=(name, unsure), daemon=True)
        self._removals.append(thread)
        thread.start()

    def _remove(self, name: str, unsure: bool) -> None:
        for pause in (0.2, 1.0, 5.0, None):
            trouble = ""
            try:
                status, answer = self._call("DELETE", "/containers/%s?v=1&force=1" % name)
                if status == 204 or (status == 404 and not unsure):
                    return
                if status != 404:
                    trouble = words(answer)
            except EngineError as error:
                trouble = str(error)
            if pause is not None:
                time.sleep(pause)
        self._trouble = trouble or self._trouble


class _Execution:
    """One container from attach to its exit code."""

    def __init__(self, engine: Docker, name: str, run: Run) -> None:
        self._engine = engine
        self._watch = engine.setting.watch
        self._path = "/containers/" + name
        self._run = run
        self._ended = threading.Event()
        self._blocks = 0  # of its output
        self._forgotten = False

    def carry_out(self) -> int:
        try:
            with self._engine.connect() as attached, self._engine.connect() as waiting:
                self._attach(attached)
                # Asked before the start, the question can have only one answer, and a broken line is noticed for sure.
                waiting.send("POST", self._path + "/wait?condition=next-exit")
                with self._watch.on_stop(self._stop):
                    self._run.begin()
                    lost = self._start()
                    code = self._recover(lost) if lost else self._follow(attached, waiting)
        except OSError as error:
            raise EngineLost("executors[%d]: the connection to Docker broke: %s" % (self._run.number, reason(error)))
        finally:
            self._ended.set()
        self._watch.check(code)
        return code

    def _attach(self, connection: Connection) -> None:
        query = "/attach?stream=1&stdout=1&stderr=1&stdin=%d" % (self._run.stdin is not None)
        connection.send("POST", self._path + query, None, {"Connection": "Upgrade", "Upgrade": "tcp"})
        if connection.receive() not in (101, 200):
            raise EngineError("executors[%d]: Docker gives no streams: %s" % (self._run.number, connection.text()))

    def _start(self) -> Optional[EngineError]:
        """Start the container; an error that is returned means a lost answer: it may run, or not."""
        self._watch.check()
        try:
            status, answer = self._engine.call("POST", self._path + "/start")
        except EngineError as error:
            return error
        if status in (204, 304):
            return None
        said = words(answer)
        if 'exec: "' in said or "exec format error" in said:
            found = "not found" not in said and "no such file" not in said
            raise CommandError(said, 126 if found else 127)
        field = ".workdir" if "cwd" in said or "chdir" in said else ""
        raise EngineError("executors[%d]%s: Docker cannot start the container: %s" % (self._run.number, field, said))

    def _follow(self, attached: Connection, waiting: Connection) -> int:
        if self._run.stdin is not None:
            threading.Thread(target=self._feed, args=(attached, self._run.stdin), daemon=True).start()
        threading.Thread(target=self._look_after, args=(attached, waiting), daemon=True).start()
        lost: Optional[BaseException] = None
        code = -1
        try:
            for stream, block in attached.blocks():
                self._blocks += 1
                (self._run.stderr if stream == 2 else self._run.stdout).write(block)
            import json

            if waiting.receive() != 200:
                raise ConnectionError(waiting.text())
            code = int(json.loads(waiting.text())["StatusCode"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            lost = ConnectionError("it has not told of the end") if self._forgotten else error
        if lost is not None:
            return self._recover(lost)
        if code != 0:
            self._explain(code)
        return code

    def _look_after(self, attached: Connection, waiting: Connection) -> None:
        """An engine under load may forget to tell of an end. Hang up if two looks find it, with no output between."""
        before: Optional[int] = None
        while not self._ended.wait(_SILENT):
            now_read = self._blocks
            try:
                status, answer = self._engine.call("GET", self._path + "/json")
                is_over = status == 200 and answer["State"]["Status"] in ("exited", "dead")
            except (EngineError, KeyError, TypeError):
                is_over = False
            if is_over and before == now_read == self._blocks:
                self._forgotten = True
                attached.close()
                waiting.close()
                return
            before = now_read if is_over else None

    def _feed(self, connection: Connection, stdin: int) -> None:
        import socket

        try:
            for block in iter(lambda: os.read(stdin, 65536), b""):
                connection.socket.sendall(block)
            connection.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the container ended without reading it all

    def _explain(self, code: int) -> None:
        """Say so if the container came to its memory limit."""
        limit = self._engine.setting.plan.ram_bytes
        if any(self._out_of_memory(pause) for pause in (_LATE if limit and code == 137 else (0.0,))):
            asked = " of %g GB" % (limit / 1e9) if limit else ""
            self._engine.setting.note(
                "executors[%d]: a process was killed at the memory limit%s; ask for more resources.ram_gb."
                % (self._run.number, asked)
            )

    def _out_of_memory(self, pause: float) -> bool:
        time.sleep(pause)
        try:
            status, answer = self._engine.call("GET", self._path + "/json")
        except EngineError:
            return False  # the exit code is known; an engine that goes away just now must not make it forgotten
        return bool(status == 200 and answer.get("State", {}).get("OOMKilled"))

    def _recover(self, error: BaseException) -> int:
        """The engine went away while the container ran: what became of it, once the engine is back."""
        where = "executors[%d]: Docker went away while it ran (%s)" % (self._run.number, reason(error))
        state = self._state_after_loss(where)
        if state.get("Status") != "exited":
            raise EngineLost("%s; the container is %s since." % (where, state.get("Status")))
        code = int(state.get("ExitCode", -1))
        files = self._run.stdout.fd is not None or self._run.stderr.fd is not None
        if code < 0 or code in _KILLED or (code == 0 and files) or not self._undisturbed():
            raise EngineLost("%s; it ended with code %d since, maybe not by itself or without output." % (where, code))
        self._engine.setting.note("%s; its later output is lost." % where)
        return code

    def _undisturbed(self) -> bool:
        """Whether the engine itself has lived on, and nobody told the container to stop: an engine that starts again
        stops its old containers, and a program may well answer that with any exit code, even 0."""
        import json
        from urllib.parse import quote

        filters = quote(json.dumps({"container": [self._path.rpartition("/")[2]], "event": ["start", "kill"]}))
        try:
            path = "/events?since=1&until=%d&filters=%s" % (time.time() + 1, filters)
            status, answer = self._engine.call("GET", path)  # of the engine's memory, which it loses at its end
            known = [answer] if isinstance(answer, dict) else [json.loads(line) for line in (answer or "").splitlines()]
            events = [entry.get("Action") for entry in known]
            if status != 200 or "kill" in events:
                return False
            if "start" in events:
                return True
            status, answer = self._engine.call("GET", "/info")
            return status == 200 and answer.get("LiveRestoreEnabled") is True
        except (EngineError, ValueError, AttributeError):
            return False

    def _state_after_loss(self, where: str) -> Dict[str, Any]:
        deadline = time.monotonic() + _LOST
        while True:
            self._watch.check()
            try:
                status, answer = self._engine.call("GET", self._path + "/json")
                if status == 404:
                    raise Stopped()
                if status == 200 and not answer["State"].get("Running"):
                    return dict(answer["State"])
                if status == 200:
                    deadline = time.monotonic() + _LOST  # it lives on, and may take its time
            except EngineError:
                pass
            except Stopped:
                self._watch.check()
                raise EngineLost("%s; the container is gone." % where)
            if time.monotonic() > deadline:
                raise EngineLost("%s and did not come back." % where)
            self._ended.wait(0.5)

    def _stop(self) -> None:
        """Stop the container; again and again, because it may be just about to start."""
        request = "/stop?t=%d" % _GRACE
        while not self._ended.is_set():
            try:
                self._engine.call("POST", self._path + request)
            except EngineError:
                pass
            self._ended.wait(0.1)


def container(setting: Setting, executor: job.Executor, index: int, stdin: bool) -> Dict[str, Any]:
    """The container as the Engine's create call takes it. The image's entrypoint, user and environment stay."""
    plan = setting.plan
    limits: Dict[str, Any] = {
        "LogConfig": {"Type": "none"},  # we read the streams ourselves; endless output must not fill the engine's disk
        "Mounts": [_mount(bound.target, bound.real, bound.read_only) for bound in setting.bounds],
    }
    if plan.ram_bytes:
        limits["Memory"] = limits["MemorySwap"] = max(_LEAST_MEMORY, int(plan.ram_bytes))
    if plan.cpus:
        limits["NanoCpus"] = max(10000000, int(plan.cpus * 1e9))
    if plan.runtime.network:
        limits["NetworkMode"] = plan.runtime.network
    body: Dict[str, Any] = {
        "Image": image_name(executor.image),
        "Cmd": list(executor.command),
        "Env": ["%s=%s" % item for item in sorted(executor.env.items())],
        "AttachStdin": stdin,
        "AttachStdout": True,
        "AttachStderr": True,
        "OpenStdin": stdin,
        "StdinOnce": stdin,
        "Tty": False,
        "Labels": _labels(plan, str(index)),
        "HostConfig": limits,
    }
    if executor.workdir:
        body["WorkingDir"] = executor.workdir
    return body


def sweep(docker_host: str, job_id: str, patience: float) -> str:
    """Remove all containers of a job, whoever started them; what went wrong, or nothing. For the reaper."""
    import json
    from urllib.parse import quote

    host = host_of(docker_host)
    filters = quote(json.dumps({"label": ["%s=%s" % (_LABEL, job_id)]}))
    deadline = time.monotonic() + patience
    while True:
        try:
            status, answer = call(host, "GET", "/containers/json?all=1&filters=" + filters)
            if status == 200:
                for entry in answer:
                    call(host, "DELETE", "/containers/%s?v=1&force=1" % entry["Id"])
                return ""
            problem = words(answer)
        except (OSError, ValueError, EngineError) as error:
            problem = reason(error)
        if time.monotonic() > deadline:
            return problem
        time.sleep(0.5)


def image_name(image: str) -> str:
    """The image's name as Docker takes it."""
    return image[len("docker://") :] if image.startswith("docker://") else image


def split_image(image: str) -> Tuple[str, str]:
    """An image's name, and its tag or digest: the pull call wants them apart, and fetches all tags without one."""
    image = image_name(image)
    name, at, digest = image.partition("@")
    if at:
        return name, digest
    head, colon, tag = image.rpartition(":")
    return (head, tag) if colon and "/" not in tag else (image, "latest")


def _mount(target: str, source: str, read_only: bool) -> Dict[str, Any]:
    return {"Type": "bind", "Source": source, "Target": target, "ReadOnly": read_only}


def _labels(plan: job.Plan, executor: str) -> Dict[str, str]:
    return {_LABEL: plan.job_id, "tesp.task": plan.task_id, "tesp.executor": executor}


def _transient(problem: str) -> bool:
    signs = ("timeout", "timed out", "connection reset", "EOF", "toomanyrequests", "TLS handshake", "unavailable")
    return any(sign in problem for sign in signs)


def _has_foreign(path: str, user: int) -> bool:
    """Whether something below the path belongs to another user. Links are not followed."""
    if user == 0:
        return False
    if os.lstat(path).st_uid != user:
        return True
    unreadable: List[OSError] = []
    for folder, folders, names in os.walk(path, onerror=unreadable.append):
        if any(os.lstat(os.path.join(folder, name)).st_uid != user for name in folders + names):
            return True
    return bool(unreadable)
