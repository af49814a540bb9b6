"""A tiny stand-in for the runner, for tests of sites: it keeps the runner's contract and can misbehave on request.

The plan's `task_id` holds the requests, words joined by dots: `noise` writes bytes that are no UTF-8, `garbage` leaves
documents that are none, `silent` leaves no result, `dies` ends before it has begun, `crash` ends half-way, `deaf` reads
no answers. It is one file, so it serves as the zipapp.
"""

from __future__ import annotations

import hashlib
import textwrap

from tesp_api.runner.bundle import Bundle

_SOURCE = '''
import hashlib, json, os, signal, subprocess, sys, time

NOW = "2026-01-31T12:00:00.000000Z"
if hashlib.sha256(open(sys.argv[0], "rb").read()).hexdigest() != sys.argv[2]:
    sys.exit(76)
root = os.path.dirname(os.getcwd())
metadata = os.path.join(root, "metadata")

def replace(path, text):
    temporary = "%s.%d" % (path, os.getpid())
    with open(temporary, "w") as stream:
        stream.write(text)
    os.rename(temporary, path)

with open(os.path.join(root, "inputs", "job.json")) as stream:
    plan = json.load(stream)
job_id, wishes = plan["job_id"], plan["task_id"].split(".")
if "dies" in wishes:
    sys.exit(78)
try:
    os.close(os.open(os.path.join(root, "tes-lock"), os.O_CREAT | os.O_EXCL))
except FileExistsError:
    sys.exit(79)

def progress(phase, beat):
    document = {"job_id": job_id, "phase": phase, "beat": beat, "started": NOW, "version": 1}
    replace(os.path.join(metadata, "progress.json"), "[[" if "garbage" in wishes else json.dumps(document))

def result(state, executors=()):
    if "silent" in wishes:
        return
    document = {"job_id": job_id, "state": state, "start_time": NOW, "end_time": NOW, "started": True,
                "executors": list(executors), "version": 1}
    text = "{" if "garbage" in wishes else json.dumps(document)
    replace(os.path.join(metadata, "result.json"), text)
    try:
        replace(os.path.join(root, "working", "result.json"), text)
    except OSError:
        pass

def cancelled():
    try:
        with open(os.path.join(root, "answer.json")) as stream:
            return "deaf" not in wishes and json.load(stream).get("cancel") is True
    except (OSError, ValueError):
        return False

def reaper():
    """Outlives a kill of the runner and writes its result."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.close(write)
        os.read(read, 1)
        if not os.path.exists(os.path.join(metadata, "result.json")):
            result("CANCELED")
            progress("done", 999)
        os._exit(0)
    os.close(read)
    os.wait()

if "noise" in wishes:
    os.write(1, b"\\xff\\xfe")
progress("staging", 1)
if "crash" in wishes:
    sys.exit(1)
if "silent" not in wishes:
    reaper()
ended, state = [], "CANCELED" if cancelled() else "COMPLETE"
for executor in plan["executors"]:
    if state != "COMPLETE":
        break
    progress("running", 2)
    child = subprocess.Popen(executor["command"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             stdin=subprocess.DEVNULL, start_new_session=True, cwd="/")
    beat = 2
    while True:
        try:
            out, err = child.communicate(timeout=0.02)
            break
        except subprocess.TimeoutExpired:
            beat += 1
            progress("running", beat)
            if cancelled():
                os.killpg(child.pid, signal.SIGKILL)
                state = "CANCELED"
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode
    ended.append({"exit_code": code, "start_time": NOW, "end_time": NOW,
                  "stdout": out.decode("utf-8", "replace"), "stderr": err.decode("utf-8", "replace")})
    if code and state == "COMPLETE":
        state = "EXECUTOR_ERROR"
result(state, ended)
progress("done", 1000)
'''


def bundle() -> Bundle:
    """The stand-in as what a site delivers."""
    data = textwrap.dedent(_SOURCE).encode("ascii")
    return Bundle(data, hashlib.sha256(data).hexdigest())
