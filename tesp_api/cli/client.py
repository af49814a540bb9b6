"""`tesp run|get|list|wait|logs|cancel`: a small client for any TES 1.1 server; `tesp sites` for ours alone."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

FINAL = ("COMPLETE", "EXECUTOR_ERROR", "SYSTEM_ERROR", "CANCELED", "PREEMPTED")

Url = Annotated[str, typer.Option(envvar="TES_URL", help="The server, for example http://127.0.0.1:8080.")]
TaskId = Annotated[str, typer.Argument(metavar="ID")]
HERE = "http://127.0.0.1:8080"
STREAMS = ("stdout", "stderr")
LEFT_OUT = re.compile(r"\n\[\.\.\. (\d{1,18}) bytes left out \.\.\.\]\n")
"""What stands for the middle of a long stream."""

LOOK = 0.5
"""Seconds between two looks at a task that is followed."""

PAGE = 1000
"""Tasks in one answer at most; a longer list takes several."""


def run(
    file: Annotated[Path, typer.Argument(help="A task as JSON; - for standard input.")],
    url: Url = HERE,
    wait_for_end: Annotated[bool, typer.Option("--wait", help="Wait for the end, then show states and logs.")] = False,
) -> None:
    """Post a task and print its id."""
    try:  # by hand: typer's own check for a file takes - for one
        body = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        typer.echo(f"{file}: {error.strerror}", err=True)
        raise typer.Exit(2) from None
    task_id = _call("POST", url, "/tasks", content=body)["id"]
    typer.echo(task_id)
    if wait_for_end:
        state = _wait(url, task_id)
        _show_logs(url, task_id)
        raise typer.Exit(0 if state == "COMPLETE" else 1)


def get(task_id: TaskId, url: Url = HERE, view: str = "FULL") -> None:
    """Print a task as JSON."""
    typer.echo(json.dumps(_call("GET", url, f"/tasks/{task_id}", params={"view": view}), indent=2, ensure_ascii=False))


def list_tasks(
    url: Url = HERE,
    state: Annotated[str, typer.Option(help="Only tasks in this state.")] = "",
    name_prefix: Annotated[str, typer.Option(help="Only tasks whose name begins so.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 20,
) -> None:
    """Print id, state, time and name of tasks, newest first."""
    params = {"view": "BASIC", "state": state, "name_prefix": name_prefix}
    while limit > 0:
        page = _call("GET", url, "/tasks", params={**params, "page_size": str(min(limit, PAGE))})
        for task in page["tasks"][:limit]:
            typer.echo(f"{task['id']}  {task['state']:14}  {task['creation_time'][:19]}  {task.get('name', '')}")
        limit -= len(page["tasks"])
        params["page_token"] = page.get("next_page_token") or ""
        if not params["page_token"]:
            break


def wait(task_id: TaskId, url: Url = HERE) -> None:
    """Wait for the end of a task; the exit code is 0 for COMPLETE only."""
    state = _wait(url, task_id)
    raise typer.Exit(0 if state == "COMPLETE" else 1)


def logs(
    task_id: TaskId,
    url: Url = HERE,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows, until the end.")] = False,
) -> None:
    """Print what the executors and the system said; with --follow the exit code is 0 for COMPLETE only."""
    if not follow:
        _show_logs(url, task_id)
        return
    task, printed = _full(url, task_id), _Printed()
    while True:
        printed.more_of(task)
        if task["state"] in FINAL:
            break
        time.sleep(LOOK)
        task = _full(url, task_id)
    for attempt in task.get("logs", ()):
        for index, executor in enumerate(attempt["logs"]):
            typer.echo(f"executor {index}: exit code {executor['exit_code']}", err=True)
        _show_rest(attempt)
    typer.echo(task["state"], err=True)
    raise typer.Exit(0 if task["state"] == "COMPLETE" else 1)


def cancel(task_id: TaskId, url: Url = HERE) -> None:
    """Ask for a task to be cancelled."""
    _call("POST", url, f"/tasks/{task_id}:cancel")


def sites(url: Url = HERE) -> None:
    """Print the sites of the service: how they are, what they carry, and what they offer."""
    base = url.rstrip("/").removesuffix("/v1").removesuffix("/ga4gh/tes")
    rows = [("NAME", "CARRIER", "HEALTH", "VERSION", "JOBS", "CPUS", "RAM_GB", "OFFERS", "LAST ERROR")]
    for site in _request("GET", base + "/tesp/v1/sites")["sites"]:
        load, capacity, error = site["load"], site["capacity"], site.get("last_error")
        used = (
            _of(load["jobs"], capacity.get("max_jobs")),
            _of(load["cpus"], capacity.get("cpus")),
            _of(load["ram_gb"], capacity.get("ram_gb")),
        )
        said = f"{error['time'][:19]}Z {_printable(error['message'])}" if error else ""
        version, offers = site.get("version", ""), _printable(_offers(site))
        health = site["health"] + (", draining" if site.get("draining") else "")
        rows.append((site["name"], site["carrier"], health, version, *used, offers, said))
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _offers(site: dict[str, Any]) -> str:
    """What a site has that tasks may ask for, such as `zones=eu labels=gpu:a100 batch queues=long,short`."""
    disk = site["capacity"].get("disk_gb")
    offers: dict[str, Any] = {
        "zones": site.get("zones"),
        "labels": [f"{key}:{value}" for key, value in site.get("labels", {}).items()],
        "disk_gb": [f"{disk:g}"] if disk else None,
        "preemptible": site.get("preemptible"),
        "batch": site.get("batch"),
        "queues": site.get("queues"),
    }
    return " ".join(name if each is True else f"{name}={','.join(each)}" for name, each in offers.items() if each)


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text)


def _of(used: float, limit: float | None) -> str:
    return f"{used:g}" if limit is None else f"{used:g}/{limit:g}"


def _wait(url: str, task_id: str) -> str:
    last, pause = "", 0.1
    while True:
        state: str = _call("GET", url, f"/tasks/{task_id}")["state"]
        if state != last:
            typer.echo(state, err=True)
            last = state
        if state in FINAL:
            return state
        time.sleep(pause)
        pause = min(pause * 1.2, 5.0)


class _Printed:
    """How much of each stream is printed already, in bytes: a server shows the end of what is still growing."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[int, int, str], int] = {}

    def more_of(self, task: dict[str, Any]) -> None:
        """Print what is new in a task in FULL."""
        for number, attempt in enumerate(task.get("logs", ())):
            for index, executor in enumerate(attempt["logs"]):
                for name in STREAMS:
                    self._whole((number, index, name), executor.get(name, "").replace("\ufffd", "?"))
            told = attempt.get("metadata") or {}
            for name in STREAMS:
                size, index = told.get(f"{name}_bytes", ""), told.get("executor", "")
                if size.isdecimal() and index.isdecimal():
                    self._print((number, int(index), name), told.get(f"{name}_tail", ""), int(size))

    def _whole(self, key: tuple[int, int, str], text: str) -> None:
        """A stream that has ended; a long one has a mark in place of its middle."""
        cut = LEFT_OUT.search(text)
        if cut is None or key not in self._sizes:
            self._print(key, text, len(text.encode()))
            return
        head, tail = text[: cut.start()], text[cut.end() :]
        self._print(key, head, len(head.encode()))
        self._print(key, tail, len(head.encode()) + int(cut[1]) + len(tail.encode()))

    def _print(self, key: tuple[int, int, str], text: str, size: int) -> None:
        """Print what is new when `text` is the end of the first `size` bytes."""
        data, new = text.encode(), size - self._sizes.get(key, 0)
        if new <= 0:
            return
        error = key[2] == "stderr"
        if new > len(data):
            typer.echo(f"\n[... {new - len(data)} bytes left out ...]", err=error)
        typer.echo(data[max(0, len(data) - new) :].decode("utf-8", "replace"), nl=False, err=error)
        self._sizes[key] = size


def _full(url: str, task_id: str) -> dict[str, Any]:
    task: dict[str, Any] = _call("GET", url, f"/tasks/{task_id}", params={"view": "FULL"})
    return task


def _show_logs(url: str, task_id: str) -> None:
    task = _full(url, task_id)
    for attempt in task.get("logs", ()):
        for index, executor in enumerate(attempt["logs"]):
            typer.echo(f"executor {index}: exit code {executor['exit_code']}", err=True)
            typer.echo(executor.get("stdout", ""), nl=False)
            typer.echo(executor.get("stderr", ""), nl=False, err=True)
        _show_rest(attempt)


def _show_rest(attempt: dict[str, Any]) -> None:
    for output in attempt["outputs"]:
        typer.echo(f"output {output['path']} -> {output['url']} ({output['size_bytes']} bytes)", err=True)
    for line in attempt.get("system_logs", ()):
        typer.echo(f"system: {line}", err=True)


def _call(method: str, url: str, path: str, **more: Any) -> Any:
    base = url.rstrip("/")
    if not base.endswith("/v1"):
        base += "/ga4gh/tes/v1"
    return _request(method, base + path, **more)


def _request(method: str, url: str, **more: Any) -> Any:
    try:
        answer = httpx.request(method, url, timeout=60, headers={"Content-Type": "application/json"}, **more)
    except httpx.HTTPError as error:
        typer.echo(f"{url}: {error}", err=True)
        raise typer.Exit(2) from None
    if answer.is_success:
        return answer.json()
    try:
        message = answer.json()["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text[:500]
    typer.echo(f"{answer.status_code}: {message}", err=True)
    raise typer.Exit(1)
