"""Plans for what real clients send (golden files), for odd paths, and what holds for all.

`TESP_UPDATE_GOLDEN=1 pytest tests/unit/test_plan.py` writes the golden files anew; read the difference, then keep it.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesp_api.dispatch.plan import file_path, plan
from tesp_api.errors import PlanError
from tesp_api.lifecycle import Policy, assign
from tesp_api.runner import job
from tesp_api.sites import SiteFacts
from tesp_api.task import Task, put_attempt, replace
from tests.builders import NOW, make_task

GOLDEN = Path(__file__).parent / "golden"
FACTS = SiteFacts(name="here", file_roots=(job.FileRoot("/data"), job.FileRoot("/ref", write=False)))
LIVE = SiteFacts(name="here", file_roots=(job.FileRoot("/data", mount=True), job.FileRoot("/ref", False, True)))
SH = {"image": "busybox", "command": ["sh"]}


def assigned(body: Mapping[str, Any]) -> Task:
    task = replace(make_task(**{"name": None, **body}), id="0" * 26)
    change = assign(task, "here", NOW, Policy())
    assert change is not None
    assert change.attempt is not None
    return replace(task, attempts=put_attempt((), change.attempt))


def planned(facts: SiteFacts = FACTS, **body: Any) -> job.Plan:
    return plan(assigned({"executors": [SH], **body}), facts)


def mounts(made: job.Plan) -> dict[str, str]:
    """Target -> kind, with `live` for what is mounted in place."""
    return {each.target: "live " + each.at if each.at.startswith("/") else each.kind for each in made.mounts}


# What clients send (reference: clients.md)

CROMWELL = "/cromwell-executions/wf/4f2/call-t"
CROMWELL_TAGS = {"workflow_id": "4f2", "root_workflow_id": "4f2", "parent_workflow_id": None}

SHAPES: dict[str, tuple[SiteFacts, dict[str, Any]]] = {
    "snakemake": (
        FACTS,
        {
            "name": "snakejob.a.2.sh",
            "description": "make a",
            "inputs": [{"path": "/tmp/run_snakemake.sh", "type": "FILE", "content": "#!/bin/sh\nmkdir /tmp/conda\n"}],
            "outputs": [],
            "resources": {"cpu_cores": 1, "ram_gb": 1, "disk_gb": 2},
            "executors": [{"image": "IMAGE", "command": ["/bin/bash", "/tmp/run_snakemake.sh"], "workdir": "/tmp"}],
        },
    ),
    "cwl-tes": (
        FACTS,
        {
            "name": "echo.cwl",
            "description": "Echo tool",
            "inputs": [
                {"url": "file:///data/in.txt", "path": "/var/lib/cwl/stg696b/in.txt", "type": "FILE", "name": "f"},
                {"path": "/var/lib/cwl/stg130f/lit.txt", "type": "FILE", "name": "lit", "content": "literal\n"},
            ],
            "outputs": [
                {"url": "file:///data/tmpr6ck/out.txt", "path": "/NSihaC/out.txt", "type": "FILE", "name": "stdout"},
                {"url": "file:///data/tmpr6ck/err.txt", "path": "/NSihaC/err.txt", "type": "FILE", "name": "stderr"},
                {"url": "file:///data/tmpr6ck/", "path": "/NSihaC", "type": "DIRECTORY", "name": "workdir"},
            ],
            "resources": {"cpu_cores": 1, "ram_gb": 0.2684355450604714, "disk_gb": 0.2097152695784933},
            "executors": [
                {
                    "image": "busybox:latest",
                    "command": ["cat", "/var/lib/cwl/stg696b/in.txt", "/var/lib/cwl/stg130f/lit.txt"],
                    "workdir": "/NSihaC",
                    "stdout": "/NSihaC/out.txt",
                    "stderr": "/NSihaC/err.txt",
                    "env": {"MYVAR": "x y", "HOME": "/NSihaC", "TMPDIR": "/tmp"},
                }
            ],
            "tags": {"CWLDocumentId": "file:///data/echo.cwl"},
        },
    ),
    "cwl-tes-second-step": (
        FACTS,
        {
            "name": "count.cwl",
            "inputs": [
                {"url": "file:///data/tmpkc4d/sub", "path": "/tmp/tmp_pjw/stgc55a/sub", "type": "DIRECTORY"},
                {"url": "file:///data/tmpkc4d/in.txt", "path": "/tmp/tmp_pjw/stg1/in.txt", "type": "FILE"},
            ],
            "outputs": [
                {"url": "file:///data/tmpq/count", "path": "/QWerty/count", "type": "FILE"},
                {"url": "file:///data/tmpq/", "path": "/QWerty", "type": "DIRECTORY"},
            ],
            "executors": [
                {
                    "image": "busybox",
                    "command": ["wc"],
                    "workdir": "/QWerty",
                    "stdin": "/tmp/tmp_pjw/stg1/in.txt",
                    "stdout": "/QWerty/count",
                }
            ],
        },
    ),
    "toil-live": (
        LIVE,
        {
            "name": "'hello' kind-hello/instance-lneeyqty v1",
            "inputs": [{"url": "file:///data/js1", "path": "/data/js1", "type": "DIRECTORY"}],
            "resources": {"cpu_cores": 1, "ram_gb": 0.476837158203125, "preemptible": False},
            "executors": [
                {
                    "image": "IMAGE:TAG",
                    "command": ["_toil_contained_executor", "gAWVcQIA"],
                    "env": {"OMP_NUM_THREADS": "1", "TOIL_WORKDIR": "/tmp"},
                }
            ],
        },
    ),
    "nextflow": (
        FACTS,
        {
            "name": "align (1)",
            "inputs": [
                {"url": "/data/work/3a/9f0c1d/.command.sh", "path": "/work/.command.sh", "type": "FILE"},
                {"url": "/data/work/3a/9f0c1d/.command.run", "path": "/work/.command.run", "type": "FILE"},
                {"url": "/data/in/reads.fq", "path": "/work/reads.fq", "type": "FILE"},
                {"url": "/data/in/idx", "path": "/work/idx", "type": "DIRECTORY"},
                {"url": "/data/bin/tool.sh", "path": "/data/bin/tool.sh", "type": "FILE"},
            ],
            "outputs": [
                {"url": "/data/work/3a/9f0c1d/.command.out", "path": "/work/.command.out"},
                {"url": "/data/work/3a/9f0c1d/.exitcode", "path": "/work/.exitcode"},
                {"url": "/data/work/3a/9f0c1d", "path": "/work/*.bam", "path_prefix": "/work", "type": "FILE"},
                {"url": "/data/work/3a/9f0c1d/result", "path": "/work/result", "type": "DIRECTORY"},
            ],
            "resources": {"cpu_cores": 2, "ram_gb": 4.0, "backend_parameters_strict": False},
            "executors": [
                {
                    "image": "quay.io/nextflow/bash",
                    "command": [
                        "bash",
                        "-o",
                        "pipefail",
                        "-c",
                        "bash /work/.command.run 2>&1 | tee /work/.command.log",
                    ],
                    "workdir": "/work",
                }
            ],
        },
    ),
    "cromwell-granular": (
        FACTS,
        {
            "name": "wf.t",
            "inputs": [
                {"name": "wf.t.f.0", "url": "/data/a.txt", "path": f"{CROMWELL}/inputs/data/a.txt", "type": "FILE"},
                {"name": "script", "url": "/data/x/script", "path": f"{CROMWELL}/execution/script", "type": "FILE"},
            ],
            "outputs": [
                *(
                    {"url": f"/data/x/{name}", "path": f"{CROMWELL}/execution/{name}", "type": "FILE"}
                    for name in ("rc", "stdout", "stderr", "script", "result.txt", "glob-1.list")
                ),
                {"url": "/data/x/glob-1/", "path": f"{CROMWELL}/execution/glob-1/", "type": "DIRECTORY"},
            ],
            "resources": {
                "cpu_cores": 1,
                "ram_gb": 2.0,
                "disk_gb": 10.0,
                "preemptible": False,
                "backend_parameters": {"internal_path_prefix": None},
            },
            "executors": [
                {
                    "image": "ubuntu",
                    "command": ["/bin/bash", f"{CROMWELL}/execution/script"],
                    "stdout": f"{CROMWELL}/execution/stdout",
                    "stderr": f"{CROMWELL}/execution/stderr",
                }
            ],
            "tags": CROMWELL_TAGS,
        },
    ),
    "cromwell-root": (
        FACTS,
        {
            "inputs": [{"url": "/data/x/script", "path": f"{CROMWELL}/execution/script", "type": "FILE"}],
            "outputs": [{"url": "/data/x/", "path": f"{CROMWELL}/execution/", "type": "DIRECTORY"}],
            "executors": [
                {
                    "image": "ubuntu",
                    "command": ["/bin/bash", f"{CROMWELL}/execution/script"],
                    "stdout": f"{CROMWELL}/execution/stdout",
                    "stderr": f"{CROMWELL}/execution/stderr",
                }
            ],
            "tags": CROMWELL_TAGS,
        },
    ),
    "galaxy": (
        FACTS,
        {
            "name": "pulsar-x",
            "inputs": None,
            "outputs": None,
            "resources": {"cpu_cores": 1, "ram_gb": None, "backend_parameters_strict": False},
            "executors": [
                {"image": "pulsar", "command": ["sh", "-c", "submit"], "workdir": "/pulsar_staging", "stdin": None},
                {"image": "tool", "command": ["sh", "-c", "tool"], "workdir": "/pulsar_staging", "env": None},
                {"image": "pulsar", "command": ["sh", "-c", "finish"], "workdir": "/pulsar_staging"},
            ],
            "volumes": ["/pulsar_staging"],
        },
    ),
    "5s-workbench": (
        FACTS,
        {
            "name": "Hello World Task",
            "outputs": [{"url": "s3://", "path": "/outputs", "type": "DIRECTORY", "name": "Stdout"}],
            "executors": [
                {
                    "image": "alpine:latest",
                    "command": ["echo", "hello world"],
                    "workdir": "/outputs",
                    "stdout": "/outputs/stdout.txt",
                }
            ],
            "tags": {"project": "MyProj", "tres": "TRE A|TRE B"},
        },
    ),
    "5s-agent": (
        FACTS,
        {
            "id": "12",
            "state": 0,
            "name": "Hello World Task",
            "inputs": [{"url": "s3://bucket/data/a", "path": "/data/a", "content": "", "type": 0}],
            "outputs": [{"url": "s3://bucket/13", "path": "/outputs", "type": "DIRECTORY"}],
            "executors": [
                {
                    "image": "alpine:latest",
                    "command": ["--Output=/outputs/output.csv", "--Query=SELECT 1"],
                    "stdin": None,
                    "stdout": "/outputs/stdout.txt",
                    "env": {"SCHEMA": "MyProj"},
                }
            ],
            "volumes": None,
        },
    ),
    # Shapes of our own
    "image-places": (
        FACTS,
        {
            "inputs": [
                {"url": "http://x/c", "path": "/etc/app/config.yml"},
                {"url": "http://x/k", "path": "/root/.key"},
                {"url": "http://x/l", "path": "/lone/in.txt"},
            ],
            "outputs": [
                {"url": "http://x/1", "path": "/result.txt"},
                {"url": "http://x/2", "path": "/etc/report"},
                {"url": "http://x/3", "path": "/opt/x/out"},
                {"url": "http://x/4", "path": "/usr/local/share/deep/out"},
                {"url": "http://x/5", "path": "/home/user/out"},
                {"url": "http://x/6", "path": "/var/lib/tool/out"},
                {"url": "http://x/7", "path": "/var/lib/out"},
            ],
            "executors": [{**SH, "workdir": "/srv/app", "stdout": "/out.txt", "stderr": "/var/log/err.txt"}],
        },
    ),
    "overlaps": (
        FACTS,
        {
            "inputs": [
                {"url": "http://x/a", "path": "/work/same"},
                {"url": "http://x/b", "path": "/work/deep/er/in"},
                {"url": "http://x/lib", "path": "/work/lib", "type": "DIRECTORY"},
                {"content": "x", "url": "file:///etc/shadow", "path": "/work/both"},
            ],
            "outputs": [
                {"url": "http://x/same", "path": "/work/same"},
                {"url": "http://x/all", "path": "/work/", "type": "DIRECTORY"},
                {"url": "http://x/one", "path": "/work/deep/er/out"},
                {"url": "http://x/in", "path": "/work/lib/part"},
                {"url": "http://x/g", "path": "/work/deep/*/*.txt", "path_prefix": "/work/deep"},
                {"url": "http://x/h", "path": "/glob/a?/b[0-9].txt", "path_prefix": "/glob/"},
            ],
            "volumes": ["/vol/A/", "/vol", "/volume"],
            "executors": [
                {**SH, "workdir": "/work", "stdout": "/vol/A/first"},
                {**SH, "workdir": "/vol", "stdin": "/vol/A/first", "stdout": "/work/same", "ignore_error": True},
            ],
        },
    ),
    "odd-paths": (
        FACTS,
        {
            "inputs": [
                {"url": "file:///data/with%20space/%C3%A9", "path": "//in//é 1.txt"},
                {"url": "file://localhost/ref/x", "path": "/in/a,b:c=d.txt"},
                {"url": "FILE:/data/y", "path": "/in/./dot/"},
                {"url": "http://x/d/", "path": "/dir///", "type": "DIRECTORY"},
            ],
            "outputs": [
                {"url": "file:///data/out,1:2", "path": "/out,1:2/é😀"},
                {"url": "/data/a%20b", "path": "/tmp//x"},
            ],
            "volumes": ["/vol,a:ro"],
            "executors": [{**SH, "stdout": "//tmp/out", "workdir": "/in"}],
        },
    ),
    "live-mixed": (
        LIVE,
        {
            "inputs": [
                {"url": "/ref/genome", "path": "/work/genome", "type": "DIRECTORY"},
                {"url": "file:///ref/one%20file", "path": "/work/one"},
                {"url": "file:///data/tmp", "path": "/tmp/live", "type": "DIRECTORY"},
                {"url": "/data/js", "path": "/js", "type": "DIRECTORY"},
                {"url": "/data/x", "path": "/copied/x", "content": "not live"},
            ],
            "outputs": [
                {"url": "/data/r", "path": "/work/result"},
                {"url": "/data/s", "path": "/js/out.txt"},
                {"url": "/data/t", "path": "/js/sub", "type": "DIRECTORY"},
            ],
            "executors": [{**SH, "stdin": "/js/stdin", "stdout": "/js/log"}],
        },
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_golden(shape: str) -> None:
    facts, body = SHAPES[shape]
    made = plan(assigned(body), facts)
    assert job.read_plan(json.loads(json.dumps(job.to_document(made)))) == made
    file = GOLDEN / f"{shape}.json"
    document = {"task": body, "plan": job.to_document(made)}
    if os.environ.get("TESP_UPDATE_GOLDEN") == "1":
        file.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    assert json.loads(file.read_text()) == json.loads(json.dumps(document))
    hold(made, body)


def test_no_golden_file_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.glob("*.json")} == set(SHAPES)


# What holds for every plan


def below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def clean(path: str) -> str:
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def hold(made: job.Plan, body: Mapping[str, Any]) -> None:
    targets = [each.target for each in made.mounts]
    assert len(set(targets)) == len(targets), "nothing is mounted twice"
    live = {each.target for each in made.mounts if each.at.startswith("/")}
    assert len({each.at for each in made.mounts if each.target not in live}) == len(targets) - len(live)
    for at, target in enumerate(targets):
        above = [other for other in targets if other != target and below(target, other)]
        if above:
            assert target in live, f"{target} lies in {above}"
        assert all(targets.index(other) < at for other in above), "parents come first"
        assert target == clean(target)
        if made.mounts[at].kind == job.DIRECTORY and target not in live:
            assert target != "/"
            assert target.split("/")[1] not in ("etc", "usr", "bin", "lib", "lib64", "sbin", "dev", "proc", "sys")
    paths = [each.path for each in made.inputs]
    paths += [each.path for each in made.outputs if each.prefix is None]
    paths += [path for each in made.executors for path in (each.stdin, each.stdout, each.stderr) if path]
    for pattern in (each.path for each in made.outputs if each.prefix is not None):
        literal = pattern
        while set(literal) & set("*?["):
            literal = posixpath.dirname(literal)
        paths.append(literal)
    for path in paths:
        assert path == clean(path)
        found = [each for each in made.mounts if below(path, each.target)]
        outermost = [each for each in found if not any(o is not each and below(each.target, o.target) for o in found)]
        assert len(outermost) == 1, f"{path} lies in {[each.target for each in outermost]}"
        if outermost[0].kind == job.FILE:
            assert outermost[0].target == path
    for volume in body.get("volumes") or ():
        assert any(below(clean(volume), each.target) and each.kind == job.DIRECTORY for each in made.mounts)


NAMES = st.sampled_from(["a", "b", "c d", "é", "tmp", "etc", "opt", "work", "x,y:z"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
SPELLED = st.tuples(PATHS, st.sampled_from(["{}", "{}/", "/{}", "{}//", "/.{}"])).map(lambda x: x[1].format(x[0]))
KINDS = st.sampled_from(["FILE", "DIRECTORY"])
URLS = st.sampled_from(["http://x/y", "file:///data/x", "/ref/y", "s3://b/k"])
INPUTS = st.builds(lambda path, kind, url: {"path": path, "type": kind, "url": url}, SPELLED, KINDS, URLS)
OUTPUTS = st.builds(lambda path, kind: {"path": path, "type": kind, "url": "http://x/y"}, SPELLED, KINDS)
PATTERNS = st.builds(
    lambda path, sign: {"path": f"{path}/{sign}", "path_prefix": path, "url": "http://x/"},
    PATHS,
    st.sampled_from(["*", "*.txt", "a?/b", "[ab]*/x/*"]),
)
STDIO = st.none() | SPELLED
EXECUTORS = st.builds(
    lambda i, o, e, w: {**SH, "stdin": i, "stdout": o, "stderr": e, "workdir": w}, STDIO, STDIO, STDIO, STDIO
)


@settings(max_examples=200, deadline=None)
@given(
    inputs=st.lists(INPUTS, max_size=4, unique_by=lambda each: clean(each["path"])),
    outputs=st.lists(OUTPUTS | PATTERNS, max_size=4),
    executors=st.lists(EXECUTORS, min_size=1, max_size=2),
    volumes=st.lists(SPELLED, max_size=2),
    facts=st.sampled_from([FACTS, LIVE]),
)
def test_every_path_has_its_place(facts: SiteFacts, **body: Any) -> None:
    try:
        made = plan(assigned(body), facts)
    except PlanError as error:
        field = str(error).partition(":")[0].partition("[")[0]
    else:
        field = "executors"
        hold(made, body)
        assert made == plan(assigned(body), facts)
    assert field in ("inputs", "outputs", "volumes", "executors")


# One by one


def test_what_must_be_a_directory_is_one_also_inside_another() -> None:
    made = planned(
        executors=[{"image": "i", "command": ["c"], "stdout": "/work/logs/out"}],
        volumes=["/a", "/a/b"],
        outputs=[
            {"path": "/work", "url": "http://x/w", "type": "DIRECTORY"},
            {"path": "/work/sub/file", "url": "http://x/f"},
            {"path": "/work/globs/*", "path_prefix": "/work", "url": "http://x/g"},
            {"path": "/work/made-by-the-program", "url": "http://x/d", "type": "DIRECTORY"},
        ],
    )
    assert mounts(made) == {"/a": "DIRECTORY", "/work": "DIRECTORY"}
    assert made.directories == ["/a/b", "/work/globs", "/work/logs", "/work/sub"]


def test_an_input_inside_a_live_one_is_refused() -> None:
    facts = SiteFacts(name="s", file_roots=(job.FileRoot("/shared", mount=True), job.FileRoot("/data")))
    inputs = [
        {"path": "/job", "url": "/shared/store", "type": "DIRECTORY"},
        {"path": "/job/more", "url": "/data/file"},
    ]
    with pytest.raises(PlanError, match=r"inputs\[1\].path: /job/more lies in an input that is mounted live"):
        planned(facts, inputs=inputs, executors=[{"image": "i", "command": ["c"]}])


def test_a_workdir_alone_makes_no_mount() -> None:
    assert mounts(planned(executors=[{**SH, "workdir": "/app"}])) == {}


def test_what_a_task_does_not_ask_for_is_not_limited() -> None:
    made = planned()
    assert (made.cpus, made.ram_bytes) == (None, None)
    made = planned(resources={"cpu_cores": 3, "ram_gb": 0.5})
    assert (made.cpus, made.ram_bytes) == (3.0, 1 << 29)


def test_what_the_site_says_is_passed_on() -> None:
    facts = SiteFacts(name="x", runtime=job.Runtime(kind="docker", network="none"), log_bytes=2048)
    made = planned(facts)
    assert (made.runtime.network, made.log_bytes, made.job_id) == ("none", 2048, "0" * 26 + "-1")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": [{"path": "/a", "content": "x"}, {"path": "/a/b", "content": "y"}]}, "inputs[0].path: /a"),
        ({"inputs": [{"path": "/a", "content": "x"}], "volumes": ["/a"]}, "inputs[0].path: /a"),
        ({"inputs": [{"path": "/a", "content": "x"}], "volumes": ["/a/b/c"]}, "inputs[0].path: /a"),
        ({"inputs": [{"path": "/a/b", "content": "x"}], "volumes": ["/a", "/a/b/c"]}, "inputs[0].path: /a/b"),
        (
            {"inputs": [{"path": "/a", "content": "x"}], "outputs": [{"path": "/a/o", "url": "s3://b/o"}]},
            "inputs[0].path: /a",
        ),
        (
            {"outputs": [{"path": "/o", "url": "s3://b/1"}, {"path": "/o", "url": "s3://b/2", "type": "DIRECTORY"}]},
            "outputs[0].path: /o",
        ),
        ({"outputs": [{"path": "/o", "url": "s3://b/1"}], "volumes": ["/o"]}, "outputs[0].path: /o"),
        ({"executors": [{**SH, "stdout": "/v"}], "volumes": ["/v"]}, "executors: /v"),
        ({"outputs": [{"path": "/etc/x", "url": "s3://b/1", "type": "DIRECTORY"}]}, "outputs[0].path: /etc/x"),
        ({"outputs": [{"path": "/*.txt", "path_prefix": "/", "url": "s3://b/1"}]}, "outputs[0].path: /"),
        ({"inputs": [{"path": "/usr", "url": "http://x/", "type": "DIRECTORY"}]}, "inputs[0].path: /usr"),
        ({"volumes": ["/tmp", "/proc/x"]}, "volumes[1]: /proc/x"),
    ],
)
def test_what_cannot_be(body: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        planned(**body)
    assert str(caught.value).startswith(words)
    assert str(caught.value).endswith(".")


def test_a_live_file_cannot_be_a_directory_too() -> None:
    with pytest.raises(PlanError):
        planned(LIVE, inputs=[{"path": "/w", "url": "/data/f"}], volumes=["/w"])


@pytest.mark.parametrize(
    ("url", "read", "write"),
    [
        ("/data", True, True),
        ("/data/x", True, True),
        ("/data//x/", True, True),
        ("/ref/x", True, False),
        ("/data/../etc/passwd", False, False),
        ("/data/..", False, False),
        ("/data2/x", False, False),
        ("/dat", False, False),
        ("/", False, False),
        ("file:///data/x", True, True),
        ("FILE:///data/x", True, True),
        ("file:/data/x", True, True),
        ("file://localhost/data/x", True, True),
        ("file:///data/%2e%2e/etc/passwd", False, False),
        ("file:///data%2f..%2fetc", False, False),
        ("file:///%64ata/x", True, True),
        ("file:///data/a#b?c", True, True),
        ("file:///etc/passwd#/data", False, False),
        ("file:////data/x", True, True),
        ("http://[broken", True, True),
        ("s3://data/../x", True, True),
        ("gs:///data", True, True),
    ],
)
def test_files_of_the_node(url: str, read: bool, write: bool) -> None:
    """False: refused with a sentence that names the field and what is allowed."""
    for allowed, body in [
        (read, {"inputs": [{"path": "/in", "url": url}]}),
        (write, {"outputs": [{"path": "/out", "url": url}]}),
    ]:
        if allowed:
            planned(**body)
        else:
            with pytest.raises(PlanError, match=r"^(in|out)puts\[0\]\.url: .*allows files only below /data"):
                planned(**body)
            with pytest.raises(PlanError, match="none, as no file_roots are set"):
                planned(SiteFacts(name="here"), **body)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/a%20b", "/a%20b"),
        ("file:///a%20b", "/a b"),
        ("file:///a%ff", "/a\udcff"),
        ("file:///a#b?c", "/a#b?c"),
        ("file://other/a", None),
        ("file://", None),
        ("http://x/a", None),
        (" file:///a", None),
    ],
)
def test_file_path(url: str, path: str | None) -> None:
    assert file_path(url) == path


def test_content_wins_over_a_url() -> None:
    """Also over one that would be refused, or mounted live."""
    body = {"inputs": [{"path": "/a", "url": "file:///etc/shadow", "content": "x"}]}
    assert planned(**body).inputs == [job.Input(path="/a", content="x")]
    body = {"inputs": [{"path": "/a", "url": "/data/x", "content": "x"}]}
    assert planned(LIVE, **body).inputs == [job.Input(path="/a", content="x")]
    assert mounts(planned(LIVE, **body)) == {"/a": "FILE"}
    body = {"inputs": [{"path": "/a", "content": ""}]}
    assert planned(**body).inputs == [job.Input(path="/a", content="")]


def test_read_only_roots_are_mounted_read_only() -> None:
    made = planned(
        LIVE, inputs=[{"path": "/r", "url": "/ref/r"}, {"path": "/d", "url": "/data/d", "type": "DIRECTORY"}]
    )
    assert {each.target: each.read_only for each in made.mounts} == {"/r": True, "/d": False}
    assert made.inputs == []
