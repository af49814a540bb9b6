"""Pulsar's documents and those of the node, read and written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesp_api.errors import SiteRefused
from tesp_api.runner import job
from tesp_api.runner.job import Executor, Input, Plan
from tesp_api.sites import documents
from tesp_api.sites.pulsar import messages

PLAN = Plan(
    job_id="t-1", task_id="t", executors=[Executor(image="a", command=["b"])], inputs=[Input(path="/i", content="é")]
)
NOW = "2026-01-31T12:00:00.000000Z"
RESULT = job.Result(job_id="t-1", state="COMPLETE", start_time=NOW, end_time=NOW, started=True)


def test_a_launch_stages_the_first_progress_and_the_plan() -> None:
    launch = messages.launch(PLAN, "cmd")
    assert [(each.name, each.kind) for each in launch.files] == [("progress.json", "metadata"), ("job.json", "input")]
    progress, plan = (json.loads(each.text) for each in launch.files)
    assert job.read_progress(progress) == job.Progress(job_id="t-1", phase="waiting")
    assert job.read_plan(plan) == PLAN
    assert all(each.text.isascii() for each in launch.files)


def test_the_query_and_the_message_say_the_same() -> None:
    launch = messages.launch(PLAN, "cmd")
    query, message = messages.submit_query(launch, set_up=True), messages.setup_message(launch)
    for name in ("setup_params", "remote_staging", "dynamic_file_sources"):
        assert json.loads(query[name]) == json.loads(json.dumps(message[name]))
    assert query["command_line"] == message["command_line"] == "cmd"
    assert "setup_params" not in messages.submit_query(launch, set_up=False)


def test_what_a_batch_system_must_know_travels_with_the_launch() -> None:
    plan = PLAN._replace(cpus=1.5, ram_bytes=(512 << 20) + 1, time_limit=90, queue="long")
    wanted = {"cpus": 2, "mem_mb": 513, "time_limit": 90, "queue": "long"}
    launch = messages.launch(plan, "cmd", batched=True)
    query, message = messages.submit_query(launch, set_up=True), messages.setup_message(launch)
    assert json.loads(query["params"]) == message["submit_params"] == wanted
    assert json.loads(query["env"]) == message["env"] == [{"execute": "trap : TERM"}]
    assert messages.launch(PLAN, "cmd", batched=True).submit_params == {}
    elsewhere = messages.launch(plan, "cmd")
    assert {"params", "env"}.isdisjoint(messages.submit_query(elsewhere, set_up=True))
    assert (elsewhere.submit_params, elsewhere.env) == ({}, ())


@pytest.mark.parametrize("job_id", ["", "..", "a/b", "a b", "a\n", "é", "x" * 201])
def test_ids_that_are_paths_or_worse_are_refused(job_id: str) -> None:
    with pytest.raises(SiteRefused, match="job id"):
        messages.check_id(job_id)


def test_a_final_status() -> None:
    status = messages.read_status(
        {
            "status": "complete",
            "complete": "true",
            "returncode": 7,
            "job_stderr": "why\n",
            "metadata_directory_contents": ["result.json", 3],
            "realized_dynamic_file_sources": [{"path": "x"}, {"path": "result.json", "contents": "{}"}],
        }
    )
    assert status == messages.Status("complete", 7, frozenset({"result.json"}), "{}", "why\n", left=True)


@pytest.mark.parametrize("folder", ["metadata", "working", "outputs", "job"])
def test_what_is_left_of_a_job(folder: str) -> None:
    empty = {"status": "lost", **{f"{each}_directory_contents": [] for each in ("metadata", "working", "job")}}
    for document, left in (
        ({"status": "lost"}, False),
        (empty, False),
        ({**empty, f"{folder}_directory_contents": ["a"]}, True),
    ):
        status = messages.read_status(document)
        assert status is not None
        assert status.left == left


@pytest.mark.parametrize("document", [None, [], {}, {"status": 3}, "running", 7])
def test_what_is_no_status(document: object) -> None:
    assert messages.read_status(document) is None


def test_odd_values_in_a_status_are_left_out() -> None:
    status = messages.read_status(
        {"status": "complete", "returncode": True, "metadata_directory_contents": "x", "job_stderr": None}
    )
    assert status == messages.Status("complete")


def test_a_set_up_answer() -> None:
    made = messages.read_setup({"job_id": "a", "job_directory": "/s/a", "pulsar_version": "0.16.0", "more": 1})
    assert made == messages.Setup("a", "/s/a", "0.16.0")
    assert messages.read_setup({"job_id": "a"}) is None


def test_documents_of_the_right_job_are_read() -> None:
    assert documents.result(documents.dump(RESULT), "t-1") == RESULT
    assert documents.result(documents.dump(RESULT), "t-2") is None
    progress = job.Progress(job_id="t-1", phase="running", beat=3, started=NOW)
    assert documents.progress(documents.dump(progress), "t-1") == progress
    assert documents.progress(None, "t-1") is None


@pytest.mark.parametrize(
    "change",
    [
        {"state": "RUNNING"},
        {"state": 3},
        {"executors": {}},
        {"executors": [{"exit_code": "0", "start_time": NOW, "end_time": NOW}]},
        {"executors": [{"exit_code": True, "start_time": NOW, "end_time": NOW}]},
        {"executors": [7]},
        {"executors": [{"exit_code": 10**300, "start_time": NOW, "end_time": NOW}]},
        {"outputs": [{"url": "u", "path": "p", "size_bytes": None}]},
        {"outputs": [{"url": "u", "path": "p", "size_bytes": 10**300}]},
        {"metadata": {"a": 1}},
        {"system_logs": [None]},
        {"started": "yes"},
        {"version": 2},
        {"job_id": ["t-1"]},
    ],
)
def test_a_result_of_wrong_types_is_none(change: dict[str, object]) -> None:
    document = {**json.loads(documents.dump(RESULT)), **change}
    assert documents.result(json.dumps(document).encode(), "t-1") is None


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b"[" * 100_000, b'{"job_id": ' + b"9" * 5000 + b"}", b"null"])
def test_garbage_is_no_document(data: bytes) -> None:
    assert documents.progress(data, "t-1") is None
    assert documents.result(data, "t-1") is None


def test_long_documents_are_not_even_parsed() -> None:
    padded = documents.dump(job.Progress(job_id="t-1")) + b" " * documents.PROGRESS_BYTES
    assert documents.progress(padded, "t-1") is None


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from([*job.Result._fields, *job.Progress._fields]), inner)
    ),
    max_leaves=20,
)


@given(_json)
def test_no_document_whatsoever_is_an_exception(value: object) -> None:
    data = json.dumps(value).encode()
    documents.progress(data, "t-1")
    documents.result(data, "t-1")
    messages.read_status(value)
    messages.read_setup(value)


def test_exit_codes_count_only_where_nothing_had_begun() -> None:
    waiting, begun = job.Progress(job_id="t-1"), job.Progress(job_id="t-1", phase="staging")
    assert documents.exit_code(job.EXIT_NO_RUNNER, waiting) == job.EXIT_NO_RUNNER
    assert documents.exit_code(job.EXIT_NO_RUNNER, begun) is None
    assert documents.exit_code(job.EXIT_NO_RUNNER, None) is None
    assert documents.exit_code(0, waiting) == job.EXIT_DAMAGED_RUNNER
    assert documents.exit_code(137, begun) == 137


def test_foreign_words_are_short_and_printable() -> None:
    assert documents.words("a\n\x1b[31mred\x00\n\n") == "?[31mred?"
    assert documents.words("") == ""
    assert len(documents.words("x" * 10_000)) == 300
