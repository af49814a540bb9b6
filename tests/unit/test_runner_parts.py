"""The runner's small pure parts: logs, patterns, listings, substitutions, image names, plans."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesp_api.runner import job
from tesp_api.runner.engines.bubblewrap import Node, arguments
from tesp_api.runner.engines.docker import split_image
from tesp_api.runner.engines.host import substitution
from tesp_api.runner.engines.registry import credentials
from tesp_api.runner.errors import Problem, Refused
from tesp_api.runner.jobdir import JobDirectory
from tesp_api.runner.logs import BoundedLog, Stream
from tesp_api.runner.mounts import Bound, prepare
from tesp_api.runner.pattern import compiled, matches
from tesp_api.runner.transfer.file import path_of
from tesp_api.runner.transfer.listing import links

GOLDEN = Path(__file__).parent / "golden"


# Logs


@given(st.lists(st.binary(max_size=60)), st.integers(0, 64))
def test_a_log_keeps_head_and_tail(blocks: list[bytes], limit: int) -> None:
    log = BoundedLog(limit)
    for block in blocks:
        log.add(block)
    data = b"".join(blocks)
    if len(data) <= limit:
        assert log.text() == data.decode("utf-8", "replace")
    else:
        head, tail = limit // 4, limit - limit // 4
        mark = f"\n[... {len(data) - limit} bytes left out ...]\n"
        kept = data[:head].decode("utf-8", "replace"), data[len(data) - tail :].decode("utf-8", "replace")
        assert log.text() == kept[0] + mark + kept[1]


def test_a_log_needs_constant_memory() -> None:
    log = BoundedLog(1000)
    block = bytes(65536)
    tracemalloc.start()
    for _ in range(1000):
        log.add(block)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 600000


@given(st.lists(st.binary(max_size=60)), st.integers(0, 64), st.integers(8, 40))
def test_a_tail_stands_for_the_bytes_at_the_end(blocks: list[bytes], kept: int, limit: int) -> None:
    stream = Stream(kept)
    for block in blocks:
        stream.write(block)
    text, size = stream.tail(limit)
    data = b"".join(blocks)
    assert 0 <= len(data) - size <= 3, "at most an unfinished character is held back"
    encoded = text.encode()
    assert len(encoded) <= limit
    there = data[size - len(encoded) : size]
    assert all(mine == its or mine == ord("?") for mine, its in zip(encoded, there, strict=True))


@given(st.text(st.characters(exclude_categories=["Cs"])), st.data())
def test_tails_of_text_join_without_a_seam(text: str, data: st.DataObject) -> None:
    """What a reader needs who prints a stream as it grows, wherever it is cut into writes."""
    written, stream = text.encode(), Stream(4 * len(text.encode()) + 64)
    cut = data.draw(st.integers(0, len(written)))
    stream.write(written[:cut])
    first, size = stream.tail(4 * len(written) + 8)
    stream.write(written[cut:])
    whole, end = stream.tail(4 * len(written) + 8)
    assert (whole, end) == (text, len(written))
    assert first + whole.encode()[size:].decode() == text


# Patterns


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("*", ["a", "a b", "ä", "a\nb"], [".a"]),
        ("*.bam", ["x.bam"], [".bam", "x.bam2", "x_bam"]),
        ("?x", ["ax", "äx", "\udcffx"], [".x", "x", "abx"]),
        ("[!a]*", ["b", "bc"], ["a", "ab", ".b"]),
        ("[a-c]", ["a", "c"], ["d", "-"]),
        ("[]x]", ["]", "x"], ["a"]),
        ("[!]x]", ["a"], ["]", "x"]),
        ("[[:digit:]_]*", ["1a", "_"], ["a"]),
        ("[z-a]", [], ["a", "z", "-"]),
        ("[a", ["[a"], ["a"]),
        (".*", [".a", "."], ["a"]),
        ("a\\*", ["a*"], ["ab"]),
        ("[a^]", ["a", "^"], ["b"]),
        ("[a-]", ["a", "-"], ["b"]),
        ("(a|b)+$", ["(a|b)+$"], ["a"]),
        ("a**b", ["ab", "axb"], ["a"]),
    ],
)
def test_patterns(pattern: str, yes: list[str], no: list[str]) -> None:
    assert [name for name in yes + no if compiled(pattern).match(name)] == yes


def test_a_pattern_matches_component_by_component() -> None:
    tree = {"/w": ["a", "b", ".h"], "/w/a": ["1.txt", "2.txt"], "/w/b": ["3.txt"], "/w/.h": ["4.txt"]}
    found = matches("/w/*/[12].txt", lambda path: tree.get(path, []))
    assert found == ["/w/a/1.txt", "/w/a/2.txt"]


# Listings

PAGE = """<html><a href="../">up</a> <a href="?C=N;O=D">Name</a> <A HREF="a%20b.txt">a b</A> <a href="sub/">sub</a>
<a href="/d/abs.txt">abs</a> <a href="/other/x">x</a> <a href="http://evil/d/x">x</a> <a href="sub/deep.txt">d</a>
<a href="%2e%2e/x">x</a> <a href="%2e%2e/">x</a> <a href="a%2fb">x</a> <a href="javascript:alert(1)">x</a>
<a href="#top">x</a> <a href="">x</a> <a href="a%20b.txt">again</a> <a href="http://h/d/same">s</a> <a>no</a>
<a href="http://[">bad</a> <a href="q.txt?x=1">q</a> <a href="nul%00">x</a>"""


def test_a_listing_gives_only_what_lies_below() -> None:
    assert links(PAGE, "http://h/d/") == [
        ("a b.txt", "http://h/d/a%20b.txt"),
        ("sub", "http://h/d/sub/"),
        ("abs.txt", "http://h/d/abs.txt"),
        ("same", "http://h/d/same"),
    ]


# file: URLs


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/a%20b/c", "/a%20b/c"),
        ("file:///a%20b", "/a b"),
        ("file://localhost/x", "/x"),
        ("file:/x", "/x"),
        ("file:///x/", "/x/"),
    ],
)
def test_file_urls(url: str, path: str) -> None:
    assert path_of(url) == path


@pytest.mark.parametrize("url", ["file://other/x", "/a/../b", "file:///a/%2e%2e/b", "file://x", "file:x"])
def test_file_urls_that_are_refused(url: str) -> None:
    with pytest.raises(Problem):
        path_of(url)


# The host engine's substitution


def test_targets_are_replaced_as_whole_paths() -> None:
    replace = substitution(
        [Bound("/in", "/J/0", job.DIRECTORY, False, False), Bound("/in/deep", "/J/1", job.DIRECTORY, False, False)]
    )
    cases = {
        "/in": "/J/0",
        "/in/x": "/J/0/x",
        "/in/deep/x": "/J/1/x",
        "/in/deeper": "/J/0/deeper",
        "/input": "/input",
        "/in.txt": "/in.txt",
        "/my/in": "/my/in",
        "--file=/in/x": "--file=/J/0/x",
        "cat</in/x>/in/y; /in": "cat</J/0/x>/J/0/y; /J/0",
        "a:/in:/in/deep": "a:/J/0:/J/1",
        "file:///in/x": "file:///in/x",
        "x/in": "x/in",
    }
    assert {text: replace(text) for text in cases} == cases


# Docker's names


@pytest.mark.parametrize(
    ("image", "name", "tag"),
    [
        ("busybox", "busybox", "latest"),
        ("docker://busybox:1", "busybox", "1"),
        ("host:5000/a/b", "host:5000/a/b", "latest"),
        ("host:5000/a/b:t", "host:5000/a/b", "t"),
        ("a@sha256:abc", "a", "sha256:abc"),
    ],
)
def test_image_names(image: str, name: str, tag: str) -> None:
    assert split_image(image) == (name, tag)


def test_registry_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import base64

    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert credentials("busybox") == {}
    auths = {"host:5000": {"auth": base64.b64encode(b"me:pass").decode()}, "https://index.docker.io/v1/": {"auth": ""}}
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    header = json.loads(base64.urlsafe_b64decode(credentials("host:5000/x/y")["X-Registry-Auth"]))
    assert header == {"username": "me", "password": "pass", "serveraddress": "host:5000"}
    assert "X-Registry-Auth" in credentials("library/busybox")
    assert credentials("other:5000/x") == {}


# Mounts


@pytest.mark.parametrize("at", ["../x", "a/../../x", "", "a//b", ".", "/etc"])
def test_mounts_stay_in_the_job(tmp_path: Path, at: str) -> None:
    with pytest.raises(Problem, match=r"mounts\[0\] \(/t\)"):
        prepare([job.Mount("/t", at)], str(tmp_path / "tes"), [job.FileRoot(str(tmp_path), mount=True)])


def test_live_mounts_need_a_root_that_allows_it(tmp_path: Path) -> None:
    (tmp_path / "root" / "data").mkdir(parents=True)
    (tmp_path / "root" / "out").symlink_to("/etc")
    roots = [job.FileRoot(str(tmp_path / "root"), mount=True)]
    (bound,) = prepare([job.Mount("/t", str(tmp_path / "root" / "data"))], str(tmp_path / "tes"), roots)
    assert bound.live
    assert bound.real == str(tmp_path / "root" / "data")
    for place, allowed in (
        (tmp_path / "root" / "out", roots),
        (tmp_path / "root" / "data", [roots[0]._replace(mount=False)]),
    ):
        with pytest.raises(Problem, match="outside"):
            prepare([job.Mount("/t", str(place))], str(tmp_path / "tes"), allowed)


def test_a_live_mount_is_what_lies_there(tmp_path: Path) -> None:
    """FILE may only mean that the client gave no type."""
    (tmp_path / "d").mkdir()
    (tmp_path / "f").touch()
    mounts = [job.Mount("/d", f"{tmp_path}/d", job.FILE), job.Mount("/f", f"{tmp_path}/f", job.FILE)]
    bounds = prepare(mounts, f"{tmp_path}/tes", [job.FileRoot(str(tmp_path), mount=True)])
    assert [bound.kind for bound in bounds] == [job.DIRECTORY, job.FILE]


def test_mounts_have_the_modes_that_containers_need(tmp_path: Path) -> None:
    plan = [job.Mount("/tmp", "tmp"), job.Mount("/a/b", "b"), job.Mount("/a", "a"), job.Mount("/f", "f", job.FILE)]
    bounds = prepare(plan, str(tmp_path / "tes"), [])
    assert [bound.target for bound in bounds] == ["/a", "/f", "/tmp", "/a/b"]
    modes = {bound.target: Path(bound.real).stat().st_mode & 0o7777 for bound in bounds}
    assert modes == {"/tmp": 0o1777, "/a": 0o777, "/a/b": 0o777, "/f": 0o666}
    assert (tmp_path / "tes").stat().st_mode & 0o777 == 0o700


# Answers


def test_answers_may_be_garbage_for_a_while(tmp_path: Path) -> None:
    directory = JobDirectory(str(tmp_path))
    answer = tmp_path / "answer.json"
    for text in (
        "",
        "{",
        "[]",
        "null",
        '{"version": 99, "cancel": true}',
        '{"cancel": "yes"}',
        '{"cancel": false}',
        "\xff",
    ):
        answer.write_text(text, "latin-1")
        assert not directory.cancel_asked(), text
    answer.write_text('{"cancel": true}')
    assert directory.cancel_asked()
    answer.unlink()
    assert directory.cancel_asked()


# Bubblewrap's arguments


class PaintedNode(Node):
    """A node from a picture: directory -> names; a value that is text is a link."""

    tree: dict[str, Any] = {
        "/": ["bin", "dev", "etc", "home", "opt", "proc", "run", "srv", "tmp", "usr", "var"],
        "/bin": "usr/bin",
        "/usr": ["bin", "share"],
        "/usr/bin": ["sh"],
        "/var": ["lib", "run", "tmp"],
        "/var/run": "/run",
        "/var/lib": ["apt", "data"],
        "/var/lib/data": [],
        "/opt": ["tool"],
        "/srv": ["staging"],
        "/srv/staging": ["j1"],
    }

    def names(self, path: str) -> list[str]:
        value = self.tree.get(path, [])
        return value if isinstance(value, list) else []

    def link(self, path: str) -> str:
        value = self.tree.get(path, [])
        return value if isinstance(value, str) else ""

    def real(self, path: str) -> str:
        return path.replace("/bin", "/usr/bin", 1) if path.startswith("/bin") else path

    def exists(self, path: str) -> bool:
        path = self.real(path)
        return path in self.tree or path.rpartition("/")[2] in self.names(path.rpartition("/")[0] or "/")

    def directory(self, path: str) -> bool:
        return path != "/usr/bin/sh" and self.exists(path)


def test_bubblewrap_arguments_are_as_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    bounds = [
        Bound("/out", "/J/0", job.DIRECTORY, False, False),
        Bound("/out/sub", "/J/1", job.DIRECTORY, True, False),
        Bound("/var/lib/new/deep", "/J/2", job.DIRECTORY, False, False),
        Bound("/var/lib/data", "/J/3", job.DIRECTORY, False, False),
        Bound("/bin/added", "/J/4", job.FILE, False, False),
        Bound("/tmp", "/J/5", job.DIRECTORY, False, False),
    ]
    made = arguments(bounds, ["/srv/staging", "/home", "/nowhere"], "/opt/work", {"A": "1"}, PaintedNode())
    lines: list[str] = []
    for word in made:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += " " + word
    golden = GOLDEN / "bubblewrap.txt"
    if os.environ.get("TESP_WRITE_GOLDEN"):
        golden.write_text("\n".join(lines) + "\n")
    assert "\n".join(lines) + "\n" == golden.read_text()


def test_bubblewrap_refuses_the_root() -> None:
    with pytest.raises(Problem):
        arguments([Bound("/", "/J", job.DIRECTORY, False, False)], [], "", {}, PaintedNode())


def test_a_refused_path_is_a_problem() -> None:
    assert issubclass(Refused, Problem)
