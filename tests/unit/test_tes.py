"""Requests: every rule with its field and words, every leniency, and the bodies that real clients send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tesp_api import tes
from tesp_api.errors import InvalidRequest
from tesp_api.task import new_task
from tests.builders import document, make_spec

EXAMPLES = Path(__file__).parents[2] / "examples"


def executor(**fields: Any) -> dict[str, Any]:
    return {"image": "busybox", "command": ["true"], **fields}


def refused(body: bytes | dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        tes.read_task(body if isinstance(body, bytes) else json.dumps(body).encode())
    return caught.value


def echo(**fields: Any) -> dict[str, Any]:
    """What is kept and given back of a task with these fields."""
    return json.loads(new_task(make_spec(**fields)).document)


# --- rules ---------------------------------------------------------------------------------------------------------

RULES = [
    # fields of the task, field at fault, words in the message
    ({"executors": None}, "executors", "is required"),
    ({"executors": []}, "executors", "at least one executor"),
    ({"executors": {}}, "executors", "must be a list, not an object"),
    ({"executors": [1]}, "executors[0]", "must be an object"),
    ({"executors": [executor(), {"command": ["x"]}]}, "executors[1].image", "is required"),
    ({"executors": [executor(image="")]}, "executors[0].image", "must not be empty"),
    ({"executors": [executor(image="a b")]}, "executors[0].image", "spaces or control"),
    ({"executors": [executor(image="a\nb")]}, "executors[0].image", "spaces or control"),
    ({"executors": [executor(image="a\u00a0b")]}, "executors[0].image", "spaces or control"),
    ({"executors": [executor(image="--privileged")]}, "executors[0].image", "must not start with '-'"),
    ({"executors": [executor(image="busybox;touch${IFS}/x")]}, "executors[0].image", "must not contain $ ; { }"),
    ({"executors": [executor(image="`x`")]}, "executors[0].image", "must not contain `"),
    ({"executors": [executor(image="a" * 1025)]}, "executors[0].image", "longer than 1024"),
    ({"executors": [executor(image=5)]}, "executors[0].image", "must be a string, not a number"),
    ({"executors": [executor(command=[])]}, "executors[0].command", "at least one word"),
    ({"executors": [executor(command="echo hi")]}, "executors[0].command", "must be a list, not a string"),
    ({"executors": [executor(command=["a", None])]}, "executors[0].command[1]", "must be a string, not null"),
    ({"executors": [executor(command=["a", 1])]}, "executors[0].command[1]", "must be a string, not a number"),
    ({"executors": [executor(command=["a\0b"])]}, "executors[0].command[0]", "NUL"),
    ({"executors": [executor(workdir="rel")]}, "executors[0].workdir", "absolute path, but is 'rel'"),
    ({"executors": [executor(stdin="rel")]}, "executors[0].stdin", "absolute path"),
    ({"executors": [executor(stdout="../up")]}, "executors[0].stdout", "absolute path"),
    ({"executors": [executor(stderr="/a/../b")]}, "executors[0].stderr", "must not contain '..'"),
    ({"executors": [executor(stdout="/")]}, "executors[0].stdout", "root directory"),
    ({"executors": [executor(stdout="//")]}, "executors[0].stdout", "root directory"),
    ({"executors": [executor(env={"": "x"})]}, "executors[0].env", "not empty and have no '='"),
    ({"executors": [executor(env={"A=B": "x"})]}, "executors[0].env", "have no '=', but has 'A=B'"),
    ({"executors": [executor(env={"A": 1})]}, "executors[0].env.A", "must be a string, not a number"),
    ({"executors": [executor(env={"A": "a\0"})]}, "executors[0].env.A", "NUL"),
    ({"executors": [executor(env={"A\0": "a"})]}, "executors[0].env", "NUL"),
    ({"executors": [executor(env=["A=B"])]}, "executors[0].env", "must be an object, not a list"),
    ({"executors": [executor(ignore_error="maybe")]}, "executors[0].ignore_error", "true or false"),
    ({"executors": [executor()] * 1001}, "executors", "more than 1000 items"),
    ({"name": 5}, "name", "must be a string, not a number"),
    ({"name": "a\0b"}, "name", "NUL"),
    ({"description": ["x"]}, "description", "must be a string, not a list"),
    ({"tags": {"a": {}}}, "tags.a", "must be a string, not an object"),
    ({"tags": []}, "tags", "must be an object"),
    ({"tags": {str(n): "" for n in range(1001)}}, "tags", "more than 1000 items"),
    ({"volumes": ["vol"]}, "volumes[0]", "absolute path"),
    ({"volumes": ["/v", "/"]}, "volumes[1]", "root directory"),
    ({"volumes": ["/./"]}, "volumes[0]", "root directory"),
    ({"volumes": [""]}, "volumes[0]", "must not be empty"),
    ({"volumes": [None]}, "volumes[0]", "must be a string, not null"),
    ({"volumes": "/v"}, "volumes", "must be a list"),
    ({"inputs": [None]}, "inputs[0]", "must be an object, not null"),
    ({"inputs": [{"url": "x"}]}, "inputs[0].path", "is required"),
    ({"inputs": [{"path": "/a"}]}, "inputs[0].url", "is required, unless there is content"),
    ({"inputs": [{"path": "/a", "url": ""}]}, "inputs[0].url", "is required"),
    ({"inputs": [{"path": "a", "url": "x"}]}, "inputs[0].path", "absolute path"),
    ({"inputs": [{"path": "/a/..", "url": "x"}]}, "inputs[0].path", "must not contain '..'"),
    ({"inputs": [{"path": "/", "url": "x"}]}, "inputs[0].path", "root directory"),
    ({"inputs": [{"path": "/" + "a" * 4095, "url": "x"}]}, "inputs[0].path", "longer than 4095"),
    ({"inputs": [{"path": "/a", "url": "x"}, {"path": "/a", "url": "y"}]}, "inputs[1].path", "inputs[0].path"),
    ({"inputs": [{"path": "/a/b", "url": "x"}, {"path": "/a//./b/", "url": "y"}]}, "inputs[1].path", "differ"),
    ({"inputs": [{"path": "/a", "url": "x", "type": "LINK"}]}, "inputs[0].type", "one of FILE, DIRECTORY"),
    ({"inputs": [{"path": "/a", "type": "DIRECTORY", "content": "x"}]}, "inputs[0].content", "DIRECTORY"),
    ({"inputs": [{"path": "/a", "content": "a\0"}]}, "inputs[0].content", "NUL"),
    ({"inputs": [{"path": "/a", "content": "é" * (5 << 20)}]}, "inputs[0].content", "larger than 8388608 bytes"),
    ({"inputs": [{"path": "/a", "url": "x" * 70000}]}, "inputs[0].url", "longer than 65536"),
    ({"outputs": [{"path": "/a"}]}, "outputs[0].url", "is required"),
    ({"outputs": [{"path": "/a", "url": ""}]}, "outputs[0].url", "must not be empty"),
    ({"outputs": [{"url": "x"}]}, "outputs[0].path", "is required"),
    ({"outputs": [{"path": "a", "url": "x"}]}, "outputs[0].path", "absolute path"),
    ({"outputs": [{"path": "/", "url": "x"}]}, "outputs[0].path", "root directory"),
    ({"outputs": [{"path": "/a/*", "url": "x"}]}, "outputs[0].path_prefix", "is required"),
    ({"outputs": [{"path": "/a/b?", "url": "x"}]}, "outputs[0].path_prefix", "is required"),
    ({"outputs": [{"path": "/a/[b", "url": "x"}]}, "outputs[0].path_prefix", "is required"),
    ({"outputs": [{"path": "/a/*", "url": "x", "path_prefix": "a"}]}, "outputs[0].path_prefix", "absolute path"),
    ({"outputs": [{"path": "/a/*", "url": "x", "path_prefix": "/b"}]}, "outputs[0].path_prefix", "beginning of"),
    ({"outputs": [{"path": "/*/b", "url": "x", "path_prefix": "/*"}]}, "outputs[0].path_prefix", "must not contain"),
    ({"resources": []}, "resources", "must be an object"),
    ({"resources": {"cpu_cores": -1}}, "resources.cpu_cores", "must be 0 or more"),
    ({"resources": {"cpu_cores": "many"}}, "resources.cpu_cores", "whole number"),
    ({"resources": {"cpu_cores": 1e300}}, "resources.cpu_cores", "2147483647 or less"),
    ({"resources": {"cpu_cores": 2**31}}, "resources.cpu_cores", "must be 2147483647 or less"),
    ({"resources": {"ram_gb": -0.5}}, "resources.ram_gb", "must be 0 or more"),
    ({"resources": {"disk_gb": []}}, "resources.disk_gb", "must be a number, not a list"),
    ({"resources": {"zones": [1]}}, "resources.zones[0]", "must be a string"),
    ({"resources": {"backend_parameters": {"a": 1}}}, "resources.backend_parameters.a", "must be a string"),
]


@pytest.mark.parametrize(("fields", "field", "words"), RULES, ids=[f"{row[1]}-{row[2]}" for row in RULES])
def test_rule(fields: dict[str, Any], field: str, words: str) -> None:
    error = refused(document(**fields))
    assert error.details[0].field == field
    assert words in error.details[0].message
    assert str(error).startswith(f"{field} ")
    assert str(error).endswith(".")
    assert len(str(error)) < 500


BODIES = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"\xff", "not valid JSON"),
    (b"[]", "must be a JSON object"),
    (b'"x"', "must be a JSON object"),
    (b"null", "must be a JSON object"),
    (b'{"executors": NaN}', "not valid JSON"),
    (b'{"name": "\\ud800"}', "not valid JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"a":' * 100_000, "not valid JSON"),
    (b'{"resources": {"ram_gb": 1e999}, "executors": [{"image": "a", "command": ["b"]}]}', "must be a finite number"),
]


@pytest.mark.parametrize(("body", "words"), BODIES, ids=range(len(BODIES)))
def test_no_task_at_all(body: bytes, words: str) -> None:
    assert words in str(refused(body))


def test_all_faults_are_named() -> None:
    error = refused({"inputs": [{"path": "a"}], "executors": [{"image": "", "command": []}]})
    assert [detail.field for detail in error.details] == [
        "inputs[0].path",
        "inputs[0].url",
        "executors[0].image",
        "executors[0].command",
    ]
    assert str(error).endswith("(3 more faults).")


def test_a_thousand_faults_are_not() -> None:
    error = refused(document(volumes=["x"] * 1000))
    assert len(error.details) == tes.MAX_FAULTS


def test_contents_together_are_limited() -> None:
    error = refused(document(inputs=[{"path": f"/{n}", "content": "x" * (6 << 20)} for n in range(3)]))
    assert "16777216 bytes of content together" in str(error)


def test_the_rest_of_a_task_is_limited() -> None:
    assert "larger than 8388608 bytes" in str(refused(document(description="x" * (9 << 20))))
    make_spec(inputs=[{"path": "/a", "content": "x" * (8 << 20)}, {"path": "/b", "content": "y" * (7 << 20)}])


# --- leniency ------------------------------------------------------------------------------------------------------

FILE = {"type": "FILE"}
LENIENT = [
    # fields as sent, fields as kept
    ({"name": "", "description": ""}, {"name": "", "description": ""}),
    ({"inputs": None, "outputs": None, "resources": None, "volumes": None, "tags": None}, {}),
    ({"inputs": [], "outputs": [], "volumes": [], "tags": {}, "resources": {}}, None),
    ({"id": "12", "state": 0, "logs": None, "creation_time": 17}, {}),
    ({"id": 5, "state": "NONSENSE", "logs": "x", "creation_time": []}, {}),
    ({"vendor": {"x": 1}}, {}),
    ({"tags": {"a": "b", "c": None}}, {"tags": {"a": "b"}}),
    ({"tags": {"a.b": "", "$x": "ü"}}, None),
    ({"resources": {"cpu_cores": 1.5}}, {"resources": {"cpu_cores": 2}}),
    ({"resources": {"cpu_cores": 1.0, "ram_gb": 4, "disk_gb": 0}}, None),
    ({"resources": {"ram_gb": 0.2684355450604714, "disk_gb": 0.2097152695784933}}, None),
    ({"resources": {"zones": "x"}}, {"resources": {"zones": ["x"]}}),
    ({"resources": {"backend_parameters": {"a": None}}}, {"resources": {"backend_parameters": {}}}),
    (
        {"resources": {"backend_parameters": None, "preemptible": None, "backend_parameters_strict": False}},
     {"resources": {"backend_parameters_strict": False}}),
    ({"inputs": [{"url": "s3://", "path": "/a"}]}, {"inputs": [{"url": "s3://", "path": "/a", **FILE}]}),
    ({"inputs": [{"url": "/abs/path", "path": "/a", "type": None}]},
     {"inputs": [{"url": "/abs/path", "path": "/a", **FILE}]}),
    ({"inputs": [{"url": "x", "path": "/a", "type": 0}]}, {"inputs": [{"url": "x", "path": "/a", **FILE}]}),
    ({"inputs": [{"url": "x", "path": "/a", "type": ""}]}, {"inputs": [{"url": "x", "path": "/a", **FILE}]}),
    ({"inputs": [{"url": "x", "path": "/a", "type": "directory"}]},
     {"inputs": [{"url": "x", "path": "/a", "type": "DIRECTORY"}]}),
    ({"inputs": [{"url": "x", "path": "/a", "content": ""}]}, {"inputs": [{"url": "x", "path": "/a", **FILE}]}),
    ({"inputs": [{"url": "x", "path": "/a", "content": "y"}]}, {"inputs": [{"url": "x", "path": "/a", **FILE}]}),
    ({"inputs": [{"path": "/a", "content": "y", "streamable": True}]},
     {"inputs": [{"path": "/a", "streamable": True, **FILE}]}),
    ({"outputs": [{"url": "ftp://u:p@h/x y%20z", "path": "/a"}]},
     {"outputs": [{"url": "ftp://u:p@h/x y%20z", "path": "/a", **FILE}]}),
    ({"outputs": [{"url": "d", "path": "/work/*.bam", "path_prefix": "/work", **FILE}]}, None),
    ({"outputs": [{"url": "d", "path": "/work/x", "path_prefix": "not used", **FILE}]}, None),
    ({"inputs": [{"url": "x", "path": "/a", **FILE}], "outputs": [{"url": "x", "path": "/a", **FILE}]}, None),
    ({"outputs": [{"url": "x", "path": "/a", **FILE}, {"url": "y", "path": "/a", **FILE}]}, None),
    ({"volumes": ["/v/", "/v"]}, None),
    ({"executors": [executor(command=["--flag", "", "a\nb", "$(x)", "./a/"], workdir="/", env={"A": "\n", "b c": ""})]},
     None),
    ({"executors": [executor(stdin=None, stdout=None, env={"A": None}, ignore_error=None, workdir="")]},
     {"executors": [executor(env={}, workdir="")]}),
    ({"executors": [executor(stdout="/a..b/...c/x", workdir="/.hidden")]}, None),
]  # fmt: skip


@pytest.mark.parametrize(("sent", "kept"), LENIENT, ids=range(len(LENIENT)))
def test_leniency(sent: dict[str, Any], kept: dict[str, Any] | None) -> None:
    assert echo(**sent) == document(**(sent if kept is None else kept))


@pytest.mark.parametrize(
    "image",
    [
        "busybox",
        "quay.io/x/y",
        "host:5000/x:tag",
        "docker://alpine:3",
        "a@sha256:" + "0" * 64,
        "/images/x.sif",
        "library/ü",
    ],
)
def test_image_forms(image: str) -> None:
    assert make_spec(executors=[executor(image=image)]).executors[0].image == image


def test_content_moves_out_and_the_rest_can_be_read_again() -> None:
    task = new_task(make_spec(inputs=[{"path": "/a", "content": "x"}, {"path": "/b", "content": ""}]))
    assert task.bodies is not None
    assert task.bodies.contents == {0: "x", 1: ""}
    assert [item.path for item in task.spec.inputs or ()] == ["/a", "/b"]


def test_a_mebibyte_of_content_is_welcome() -> None:
    text = "é" * (1 << 19)
    assert (make_spec(inputs=[{"path": "/a", "content": text}]).inputs or [])[0].content == text


def test_byte_order_mark_and_escapes() -> None:
    body = b'\xef\xbb\xbf{"name": "\\u003e\\\\u0000", "executors": [{"image": "a", "command": ["b"]}]}'
    assert tes.read_task(body).name == ">\\u0000"


def test_an_answer_of_a_server_can_be_read() -> None:
    answer = {
        "id": "1",
        "state": "COMPLETE",
        "executors": [executor()],
        "logs": [
            {"logs": [{"exit_code": 0}], "outputs": [{"url": "u", "path": "/p", "size_bytes": "9007199254740993"}]}
        ],
    }
    task = tes.TesTask.model_validate(answer)
    assert task.state is tes.TesState.COMPLETE
    assert task.logs is not None
    assert task.logs[0].outputs[0].size_bytes == 9007199254740993
    assert task.model_dump(mode="json", exclude_none=True) == answer


def test_models_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_spec().name = "x"  # type: ignore[misc]


def test_every_field_is_described() -> None:
    for value in vars(tes).values():
        if isinstance(value, type) and issubclass(value, tes.Model):
            assert value.__doc__
            for name, field in value.model_fields.items():
                inner = field.annotation
                plain = isinstance(inner, type) and issubclass(inner, tes.Model)
                assert field.description or plain or name in ("state", "resources"), (value, name)


# --- backend parameters --------------------------------------------------------------------------------------------


def test_unsupported_backend_parameters_are_dropped() -> None:
    spec = make_spec(resources={"backend_parameters": {"VmSize": "a", "Queue": "b"}})
    kept, lines = tes.drop_unsupported(spec, ["vmsize"])
    assert kept.resources is not None
    assert kept.resources.backend_parameters == {"VmSize": "a"}
    assert lines == ["Backend parameter 'Queue' is not supported by this service and was dropped."]


def test_none_left() -> None:
    spec = make_spec(resources={"cpu_cores": 1, "backend_parameters": {"a": "b"}})
    kept, lines = tes.drop_unsupported(spec, ())
    assert kept.resources == tes.TesResources(cpu_cores=1)
    assert len(lines) == 1


def test_strict_backend_parameters() -> None:
    spec = make_spec(resources={"backend_parameters": {"VmSize": "a", "Queue": "b"}, "backend_parameters_strict": True})
    with pytest.raises(InvalidRequest) as caught:
        tes.drop_unsupported(spec, ["vmsize"])
    assert caught.value.details[0].field == "resources.backend_parameters.Queue"
    assert "supported: vmsize" in str(caught.value)
    assert tes.drop_unsupported(spec, ["VMSIZE", "queue"]) == (spec, [])


@pytest.mark.parametrize("parameters", [None, {}])
def test_nothing_to_drop(parameters: dict[str, str] | None) -> None:
    spec = make_spec(resources={"backend_parameters": parameters, "backend_parameters_strict": True})
    assert tes.drop_unsupported(spec, ()) == (spec, [])


# --- what clients send ---------------------------------------------------------------------------------------------

NEXTFLOW = {
    "name": "align (1)",
    "inputs": [
        {"url": "/data/work/3a/9f0c1d/.command.sh", "path": "/work/.command.sh", "type": "FILE"},
        {"url": "/data/in/idx", "path": "/work/idx", "type": "DIRECTORY"},
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
            "command": ["bash", "-o", "pipefail", "-c", "bash /work/.command.run 2>&1 | tee /work/.command.log"],
            "workdir": "/work",
        }
    ],
}
SCRIPT = "/cromwell-executions/wf/1/call-t/execution/script"
CLIENTS = {
    "py-tes": {
        "name": "hello",
        "description": "d",
        "inputs": [
            {"path": "/in/a.txt", "type": "FILE", "content": "abc\n"},
            {"url": "/etc/hostname", "path": "/in/h", "type": "FILE"},
        ],
        "outputs": [{"url": "file:///data/out.txt", "path": "/out/o.txt", "type": "FILE"}],
        "resources": {"cpu_cores": 1, "ram_gb": 0.5, "zones": ["a"]},
        "executors": [
            {
                "image": "busybox",
                "command": ["sh", "-c", "…"],
                "workdir": "/",
                "stdout": "/out/o.txt",
                "env": {"A": "b"},
            }
        ],
        "volumes": ["/vol"],
        "tags": {"WORKFLOW_ID": "1"},
    },
    "snakemake": {
        "name": "snakejob.a.2.sh",
        "description": "make a",
        "inputs": [{"path": "/tmp/run_snakemake.sh", "type": "FILE", "content": "#!/bin/sh\n# {…}\n" + "x" * 131072}],
        "outputs": [],
        "resources": {"cpu_cores": 1, "ram_gb": 1, "disk_gb": 2},
        "executors": [{"image": "I", "command": ["/bin/bash", "/tmp/run_snakemake.sh"], "workdir": "/tmp"}],
    },
    "cwl-tes": {
        "name": "echo.cwl",
        "description": "Echo tool",
        "inputs": [
            {
                "url": "file:///data/in.txt",
                "path": "/var/lib/cwl/stg696b/in.txt",
                "type": "FILE",
                "name": "f",
                "description": "cwl_input:f",
            },
            {"path": "/var/lib/cwl/stg130f/lit.txt", "type": "FILE", "name": "lit", "content": "literal\n"},
            {"url": "file:///data/tmpkc4d/sub", "path": "/tmp/tmp_pjw/stgc55a/sub", "type": "DIRECTORY"},
        ],
        "outputs": [
            {"url": "file:///data/tmpr6ck/out.txt", "path": "/NSihaC/out.txt", "type": "FILE", "name": "stdout"},
            {"url": "file:///data/tmpr6ck/", "path": "/NSihaC", "type": "DIRECTORY", "name": "workdir"},
        ],
        "resources": {"cpu_cores": 1, "ram_gb": 0.2684355450604714, "disk_gb": 0.2097152695784933},
        "executors": [
            {
                "image": "busybox:latest",
                "command": ["cat", "/var/lib/cwl/stg696b/in.txt"],
                "workdir": "/NSihaC",
                "stdout": "/NSihaC/out.txt",
                "stderr": "/NSihaC/err.txt",
                "env": {"MYVAR": "x y", "HOME": "/NSihaC", "TMPDIR": "/tmp"},
            }
        ],
        "tags": {"CWLDocumentId": "file:///data/echo.cwl"},
    },
    "toil": {
        "name": "'hello' kind-hello/instance-lneeyqty v1",
        "inputs": [{"url": "file:///data/js1", "path": "/data/js1", "type": "DIRECTORY"}],
        "resources": {
            "cpu_cores": 1,
            "ram_gb": 0.476837158203125,
            "disk_gb": 0.09313225746154785,
            "preemptible": False,
        },
        "executors": [
            {
                "image": "IMAGE:TAG",
                "command": ["_toil_contained_executor", "gAWVcQIA…"],
                "env": {"OMP_NUM_THREADS": "1", "TOIL_WORKDIR": "/tmp"},
            }
        ],
    },
    "nextflow": NEXTFLOW,
    "cromwell": {
        "name": "wf.t",
        "inputs": [
            {
                "name": "wf.t.f.0",
                "description": "wf.t.f",
                "url": "https://h/x?s=a%2F",
                "path": "/c/in",
                "type": "FILE",
            },
            {"name": "script", "url": "/data" + SCRIPT, "path": SCRIPT, "type": "FILE"},
        ],
        "outputs": [
            {"name": "rc", "url": "/data/rc", "path": "/c/rc", "type": "FILE"},
            {"name": "script", "url": "/data" + SCRIPT, "path": SCRIPT, "type": "FILE"},
            {"name": "glob", "url": "/data/glob-1/", "path": "/c/glob-1/", "type": "DIRECTORY"},
        ],
        "resources": {
            "cpu_cores": 1,
            "ram_gb": 2.0,
            "disk_gb": 10.0,
            "preemptible": False,
            "backend_parameters": {"internal_path_prefix": None},
        },
        "executors": [
            {"image": "ubuntu", "command": ["/bin/bash", SCRIPT], "stdout": "/c/stdout", "stderr": "/c/stderr"}
        ],
        "tags": {"workflow_id": "1", "root_workflow_id": "1", "parent_workflow_id": None},
    },
    "galaxy": {
        "id": None,
        "state": None,
        "name": "pulsar-x",
        "description": None,
        "inputs": None,
        "outputs": None,
        "resources": {
            "cpu_cores": 1,
            "preemptible": None,
            "ram_gb": None,
            "disk_gb": None,
            "zones": None,
            "backend_parameters": None,
            "backend_parameters_strict": False,
        },
        "executors": [
            {
                "image": "i",
                "command": ["sh", "-c", "…"],
                "workdir": "/pulsar_staging",
                "stdin": None,
                "stdout": None,
                "stderr": None,
                "env": None,
            }
        ]
        * 3,
        "volumes": ["/pulsar_staging"],
        "tags": None,
        "logs": None,
        "creation_time": None,
    },
    "workbench": {
        "name": "Hello World Task",
        "description": "Hello World",
        "outputs": [{"url": "s3://", "path": "/outputs", "type": "DIRECTORY", "name": "Stdout", "description": "r"}],
        "executors": [
            {
                "image": "alpine:latest",
                "command": ["--Output=/outputs/output.csv", "--Query=SELECT 1"],
                "workdir": "/outputs",
                "stdout": "/outputs/stdout.txt",
                "env": {},
            }
        ],
        "volumes": [],
        "tags": {"project": "MyProj", "tres": "TRE A|TRE B"},
        "creation_time": "2026-01-01T19:37:35.110479+00:00",
    },
    "agent": {
        "id": "12",
        "state": 0,
        "name": "Hello World Task",
        "description": "Hello World",
        "inputs": [{"url": "s3://b/data/x", "path": "/data/x", "content": "", "type": 0, "name": None}],
        "outputs": [{"name": "Stdout", "url": "s3://<bucket>/13", "path": "/outputs", "type": "DIRECTORY"}],
        "resources": None,
        "executors": [
            {
                "image": "alpine:latest",
                "command": ["echo", "hello world"],
                "workdir": "/outputs",
                "stdin": None,
                "stdout": "/outputs/stdout.txt",
                "stderr": None,
                "env": {"SCHEMA": "MyProj", "CATALOG": "postgresql"},
            }
        ],
        "volumes": None,
        "tags": {"project": "MyProj", "tres": "TRE A|TRE B"},
        "logs": None,
        "creation_time": "2026-01-01",
    },
}


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("client", CLIENTS)
def test_client(client: str) -> None:
    sent = CLIENTS[client]
    task = tes.read_task(json.dumps(sent).encode())
    kept = task.model_dump(mode="json", exclude_none=True)
    expected = {key: item for key, item in without_nulls(sent).items() if key not in tes.READ_ONLY}
    for item in (*expected.get("inputs", ()), *expected.get("outputs", ())):
        item["type"] = item.get("type") or "FILE"
        if item.get("content") == "":
            del item["content"]
    assert kept == expected
    new_task(task)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.name)
def test_example(path: Path) -> None:
    spec = tes.read_task(path.read_bytes())
    assert spec.name


def test_there_are_examples() -> None:
    assert len(list(EXAMPLES.glob("*.json"))) >= 7


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({"outputs": [{"path": "/outputs", "url": "s3://b/13", "type": 0}], "stdout": "/outputs/o.txt"}, ["DIRECTORY"]),
        ({"outputs": [{"path": "/o/", "url": "s3://b/13"}]}, ["DIRECTORY"]),
        ({"outputs": [{"path": "/o", "url": "s3://b/13/", "type": None}]}, ["DIRECTORY"]),
        ({"outputs": [{"path": "/o", "url": "s3://"}]}, ["FILE"]),
        ({"outputs": [{"path": "/o/*", "path_prefix": "/o", "url": "s3://b/"}]}, ["FILE"]),
        ({"outputs": [{"path": "/o", "url": "s3://b/", "type": "FILE"}]}, ["FILE"]),
        ({"outputs": [{"path": "/a", "url": "s3://b"}, {"path": "/a/b", "url": "s3://c"}]}, ["DIRECTORY", "FILE"]),
    ],
)
def test_a_type_that_is_not_given_is_read_from_the_paths(fields: dict[str, Any], kinds: list[str]) -> None:
    stdout = {"stdout": fields["stdout"]} if "stdout" in fields else {}
    spec = make_spec(outputs=fields["outputs"], executors=[executor(**stdout)])
    assert [output.type for output in spec.outputs or ()] == kinds


def test_a_slip_of_the_pen_in_gigabytes_is_refused() -> None:
    assert "resources.ram_gb" in str(refused({"resources": {"ram_gb": 1e300}, "executors": [executor()]}))
