"""A result that is too long is shortened, and says so; what matters most is told whole."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from tesp_api.runner import job
from tesp_api.runner.fit import fitted
from tesp_api.sites import documents

LIMIT = 8000
"""Bytes; a thousandth of what is usual."""

TEXTS = st.text(st.sampled_from("ab\n\x01\u00fc\u4e2d\U0001f600"), max_size=50)
LONG_TEXTS = st.builds(lambda text, times: text * times, TEXTS, st.integers(0, 1000))
EXECUTORS = st.builds(
    job.ExecutorResult, st.integers(0, 255), st.just("s"), st.just("e"), stdout=LONG_TEXTS, stderr=LONG_TEXTS
)
FILES = st.builds(
    lambda name, count: [job.OutputFile(f"/data/{name}{at}", f"/out/{name}{at}", at) for at in range(count)],
    TEXTS,
    st.integers(0, 500),
)
LINES = st.builds(lambda line, count: [line] * count, TEXTS, st.integers(0, 1000))


def made(**fields: object) -> job.Result:
    return job.Result("j-1", "EXECUTOR_ERROR", "s", "e", started=True, metadata={"a": "b"}, **fields)  # type: ignore[arg-type]


def size(result: job.Result) -> int:
    return len(json.dumps(job.to_document(result)))


@given(executors=st.lists(EXECUTORS, max_size=4), outputs=FILES, lines=LINES)
def test_any_result_fits(executors: list[job.ExecutorResult], outputs: list[job.OutputFile], lines: list[str]) -> None:
    whole = made(executors=executors, outputs=outputs, system_logs=lines)
    result = fitted(whole, LIMIT)
    if size(whole) <= LIMIT:
        assert result == whole
        return
    assert size(result) <= LIMIT
    assert [each._replace(stdout="", stderr="") for each in result.executors] == [
        each._replace(stdout="", stderr="") for each in executors
    ]
    assert result.outputs == outputs[: len(result.outputs)]
    assert f"a result may take at most {LIMIT} bytes" in result.system_logs[-1]
    assert result._replace(executors=[], outputs=[], system_logs=[]) == made()
    assert documents.result(documents.dump(result), "j-1") == result


def test_long_streams_are_cut_and_the_short_ones_and_the_files_stay_whole() -> None:
    outputs = [job.OutputFile(f"/data/{at}", f"/out/{at}", at) for at in range(20)]
    executors = [
        job.ExecutorResult(0, "s", "e", stdout="short", stderr="x" * 4000 + "the end"),
        job.ExecutorResult(7, "s", "e", stdout="\x01" * 4000, stderr="why"),
    ]
    result = fitted(made(executors=executors, outputs=outputs, system_logs=["odd"]), LIMIT)
    first, second = result.executors
    assert (first.stdout, second.exit_code, second.stderr) == ("short", 7, "why")
    assert first.stderr.startswith("xxx")
    assert first.stderr.endswith("the end")
    assert "bytes left out" in first.stderr
    assert result.outputs == outputs
    assert result.system_logs == [
        "odd",
        "executors: of each stdout and stderr only 500 bytes are kept: a result may take at most 8000 bytes.",
    ]


def test_of_too_many_files_the_first_are_listed_as_long_as_there_is_room() -> None:
    outputs = [job.OutputFile(f"/data/{at}", f"/out/{at}", at) for at in range(1000)]
    result = fitted(made(executors=[job.ExecutorResult(0, "s", "e", "out", "err")], outputs=outputs), LIMIT)
    count = len(result.outputs)
    assert 0 < count < 1000
    assert LIMIT - 100 < size(result) <= LIMIT
    assert result.executors[0].stdout == "out"
    assert result.system_logs == [
        f"outputs: {1000 - count} of the 1000 files that were sent are not listed: "
        "a result may take at most 8000 bytes."
    ]
