"""What every scheme must do, and what only http can do wrong."""

from __future__ import annotations

import errno
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest

from tesp_api.runner import job
from tesp_api.runner.errors import Problem, Stopped
from tesp_api.runner.jobdir import JobDirectory
from tesp_api.runner.transfer import Context, Source, Transfer, file, open_transfer
from tesp_api.runner.tree import Tree, reason, roots_tree
from tesp_api.runner.watch import Watch


class Store:
    """A directory served by some scheme."""

    def __init__(self, base: Path, scheme: str) -> None:
        self.base = base
        self.place = base / "store"
        self.place.mkdir()
        self.scheme = scheme
        self.server = Server(self.place) if scheme == "http" else None
        self.watch = Watch(JobDirectory(str(base)), "j-1")
        roots = [job.FileRoot(str(self.place))]
        self.transfer: Transfer = open_transfer(self.url(""), Context(roots_tree(roots), self.watch, 0.01))

    def url(self, path: str) -> str:
        if self.server:
            return f"http://127.0.0.1:{self.server.port}/{quote(path)}"
        return f"file://{quote(str(self.place))}/{quote(path)}" if self.scheme == "file" else f"{self.place}/{path}"

    def put(self, path: str, data: bytes) -> None:
        (self.place / path).parent.mkdir(parents=True, exist_ok=True)
        (self.place / path).write_bytes(data)

    def get(self, path: str) -> bytes:
        return (self.place / path).read_bytes()

    def fetch(self, url: str) -> bytes:
        target = self.base / "target"
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        try:
            self.transfer.fetch(url, fd)
        finally:
            os.close(fd)
        return target.read_bytes()

    def send(self, url: str, data: bytes) -> int:
        source = self.base / "source"
        source.write_bytes(data)
        fd = os.open(source, os.O_RDONLY)
        try:
            return self.transfer.send(url, Source(fd, len(data)))
        finally:
            os.close(fd)

    def close(self) -> None:
        if self.server:
            self.server.shutdown()
            self.server.server_close()


class Server(ThreadingHTTPServer):
    """A real web server over a directory, which can be told to misbehave: `trouble(handler)` runs before each answer
    and returns whether it has answered itself."""

    daemon_threads = True

    def __init__(self, place: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.place = place
        self.port = self.server_address[1]
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.trouble: Callable[[Handler], bool] = lambda handler: False
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that leave are part of the tests


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def __init__(self, request: Any, client: Any, server: Server) -> None:
        super().__init__(request, client, server, directory=str(server.place))

    def log_message(self, *arguments: Any) -> None:
        pass

    def parse_request(self) -> bool:
        good = super().parse_request()
        if good:
            self.server.requests.append((self.command, self.path, dict(self.headers)))
        return good

    def do_GET(self) -> None:
        if not self.server.trouble(self):
            super().do_GET()

    def do_PUT(self) -> None:
        if self.server.trouble(self):
            return
        path = self.server.place / unquote(self.path.partition("?")[0]).lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
        answer(self, 201)

    do_POST = do_PUT


def answer(handler: BaseHTTPRequestHandler, code: int, data: bytes = b"", **headers: str) -> bool:
    handler.send_response(code)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)
    return True


@pytest.fixture(params=["http", "file", "bare"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path, request.param)
    yield made
    made.close()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path, "http")
    yield made
    made.close()


def server_of(store: Store) -> Server:
    assert store.server is not None
    return store.server


# What every scheme does


@pytest.mark.parametrize("name", ["a", "a b", "\u00fc/\u4e2d", "x%20y", "a+b&c;d'e", "q#f"])
@pytest.mark.parametrize("data", [b"", b"x", os.urandom(1_000_000)], ids=["empty", "small", "big"])
def test_there_and_back(store: Store, name: str, data: bytes) -> None:
    assert store.send(store.url("out/" + name), data) == len(data)
    assert store.get("out/" + name) == data
    assert store.fetch(store.url("out/" + name)) == data


def test_sending_replaces(store: Store) -> None:
    store.put("f", b"old and long")
    store.send(store.url("f"), b"new")
    assert store.get("f") == b"new"
    assert [path.name for path in store.place.iterdir()] == ["f"]


def test_what_is_missing_is_a_problem_that_names_it(store: Store) -> None:
    with pytest.raises(Problem, match="none"):
        store.fetch(store.url("none"))


@pytest.mark.parametrize("scheme", ["file", "bare"])
def test_a_directory_can_be_told_from_a_file(tmp_path: Path, scheme: str) -> None:
    store = Store(tmp_path, scheme)
    store.put("d/f", b"")
    told = [store.transfer.is_directory(store.url(name)) for name in ("d", "d/", "d/f", "none", "d/f/g", "")]
    assert told == [True, True, False, False, False, True]


def test_a_directory(store: Store) -> None:
    for name in ("a", "sub dir/b", "sub dir/\u00fc/c"):
        store.put("d/" + name, name.encode())
    (store.place / "d" / "empty").mkdir()
    for url in (store.url("d"), store.url("d/")):
        entries = list(store.transfer.entries(url))
        assert sorted((one.relative, one.is_directory) for one in entries) == [
            ("a", False),
            ("empty", True),
            ("sub dir", True),
            ("sub dir/b", False),
            ("sub dir/\u00fc", True),
            ("sub dir/\u00fc/c", False),
        ]
        assert {one.relative: store.fetch(one.url) for one in entries if not one.is_directory} == {
            name: name.encode() for name in ("a", "sub dir/b", "sub dir/\u00fc/c")
        }


@pytest.mark.parametrize("end", ["", "/"])
def test_joining(store: Store, end: str) -> None:
    url = store.transfer.join(store.url("d") + end, "a b/\u00fc%")
    store.send(url, b"x")
    assert store.get("d/a b/\u00fc%") == b"x"


def test_stopping(store: Store) -> None:
    store.put("f", b"x")
    store.watch.stopped.set()
    with pytest.raises(Stopped):
        store.fetch(store.url("f"))
    with pytest.raises(Stopped):
        store.send(store.url("g"), b"x")
    assert [path.name for path in store.place.iterdir()] == ["f"]


# file


@pytest.mark.parametrize("path", ["../secret", "link", "dir/secret", "sub/../../secret"])
def test_files_outside_of_the_roots(tmp_path: Path, path: str) -> None:
    store = Store(tmp_path, "file")
    (tmp_path / "secret").write_text("x")
    (store.place / "link").symlink_to(tmp_path / "secret")
    (store.place / "dir").symlink_to(tmp_path)
    for url in (
        f"{store.place}/{path}",
        f"file://{store.place}/{path}",
        f"file://{store.place}/{path.replace('.', '%2e')}",
    ):
        with pytest.raises(Problem):
            store.fetch(url)
        with pytest.raises(Problem):
            store.send(url, b"y")
    with pytest.raises(Problem):
        list(store.transfer.entries(f"{store.place}"))
    assert (tmp_path / "secret").read_text() == "x"


def test_a_copy_can_be_executed_if_the_original_can(tmp_path: Path) -> None:
    store = Store(tmp_path, "bare")
    store.put("f", b"x")
    (store.place / "f").chmod(0o755)
    store.fetch(store.url("f"))
    assert (tmp_path / "target").stat().st_mode & 0o111 == 0o111


def test_what_the_system_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same kind as before: a full disk must be known as one."""
    store = Store(tmp_path, "file")
    store.put("f", b"x")

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def denied(*arguments: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for module, name, fails, errors in (
        (Tree, "open_read", denied, ["", None, None]),
        (Tree, "draft", denied, [None, "", None]),
        (Tree, "make_directory", denied, [None, None, ""]),
        (file, "copy_sparse", full, ["copying ", "copying to ", None]),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            actions = (
                lambda: store.fetch(store.url("f")),
                lambda: store.send(store.url("f"), b"x"),
                lambda: store.transfer.make_directory(store.url("f2")),
            )
            for action, start, at in zip(actions, errors, ("f", "f", "f2"), strict=True):
                if start is None:
                    continue
                with pytest.raises(OSError, match=f"{at}: ") as caught:
                    action()
                code = errno.ENOSPC if fails is full else errno.EACCES
                assert (caught.value.errno, reason(caught.value)) == (
                    code,
                    f"{start}{store.place}/{at}: {os.strerror(code)}",
                )


def test_a_file_url_of_another_host_is_told_without_its_login(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="file://h/x names another host") as caught:
        Store(tmp_path, "file").fetch("file://me:pass@h/x")
    assert "pass" not in str(caught.value)


# http


def cut_after(count: int, times: int) -> Callable[[Handler], bool]:
    """Serve with Range, but cut the first connections after some bytes."""
    left = [times]

    def trouble(handler: Handler) -> bool:
        data = (handler.server.place / handler.path.lstrip("/")).read_bytes()
        start = 0
        found = re.match(r"bytes=(\d+)-$", handler.headers.get("Range", ""))
        if found and handler.headers.get("If-Range") == '"v1"':
            start = int(found.group(1))
        handler.send_response(206 if start else 200)
        handler.send_header("ETag", '"v1"')
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        left[0] -= 1
        handler.wfile.write(data[start : start + count] if left[0] >= 0 else data[start:])
        handler.close_connection = True
        return True

    return trouble


def test_a_cut_download_goes_on_where_it_stopped(web: Store) -> None:
    data = os.urandom(1_000_000)
    web.put("f", data)
    server_of(web).trouble = cut_after(300_000, 3)
    assert web.fetch(web.url("f")) == data
    assert [headers.get("Range") for _, _, headers in server_of(web).requests] == [
        None,
        "bytes=300000-",
        "bytes=600000-",
        "bytes=900000-",
    ]


def test_a_changed_file_is_fetched_anew(web: Store) -> None:
    def trouble(handler: Handler) -> bool:
        first = len(handler.server.requests) == 1
        data = b"old-" * 1000 if first else b"new!" * 500
        handler.send_response(200)
        handler.send_header("ETag", '"1"' if first else '"2"')
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:100] if first else data)
        handler.close_connection = True
        return True

    server_of(web).trouble = trouble
    assert web.fetch(web.url("f")) == b"new!" * 500


@pytest.mark.parametrize("lie", ["bytes 5-9/10", "bytes */10", ""])
def test_a_wrong_range_is_not_believed(web: Store, lie: str) -> None:
    def trouble(handler: Handler) -> bool:
        if "Range" in handler.headers:
            return answer(handler, 206, b"56789", Content_Range=lie)
        handler.send_response(200)
        handler.send_header("ETag", '"1"')
        handler.send_header("Content-Length", "10")
        handler.end_headers()
        handler.wfile.write(b"0123456789"[: 3 if len(handler.server.requests) == 1 else 10])
        handler.close_connection = True
        return True

    server_of(web).trouble = trouble
    assert web.fetch(web.url("f")) == b"0123456789"


@pytest.mark.parametrize("code", [500, 502, 503, 429])
def test_what_may_pass_is_tried_again(web: Store, code: int) -> None:
    web.put("f", b"x")
    server = server_of(web)
    server.trouble = lambda handler: len(server.requests) < 3 and answer(handler, code)
    assert web.fetch(web.url("f")) == b"x"
    server.requests.clear()
    assert web.send(web.url("g"), b"y" * 300_000) == 300_000
    assert web.get("g") == b"y" * 300_000


def test_but_not_for_ever(web: Store) -> None:
    server = server_of(web)
    server.trouble = lambda handler: answer(handler, 500)
    with pytest.raises(Problem, match="500"):
        web.fetch(web.url("f"))
    assert len(server.requests) == 5


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_a_refusal_is_final(web: Store, code: int) -> None:
    server = server_of(web)
    server.trouble = lambda handler: answer(handler, code)
    for action in (lambda: web.fetch(web.url("f")), lambda: web.send(web.url("f"), b"")):
        with pytest.raises(Problem, match=str(code)):
            action()
    assert len(server.requests) == 2


def test_a_dead_server_is_a_problem(tmp_path: Path) -> None:
    store = Store(tmp_path, "bare")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://u:secret@127.0.0.1:{unused.getsockname()[1]}/x"
        store.transfer = open_transfer(url, store.transfer.context)
        with pytest.raises(Problem, match="refused") as caught:
            store.fetch(url + "?q=hidden")
    assert str(caught.value) == url.replace("u:secret@", "") + ": Connection refused, 5 times"


@pytest.mark.parametrize("code", [405, 501])
@pytest.mark.parametrize("size", [0, 10, 5_000_000])
def test_no_put_means_a_form(web: Store, code: int, size: int) -> None:
    """Also when the server hangs up long before it has read the file."""
    web.server.trouble = lambda handler: handler.command == "PUT" and answer(handler, code, Connection="close")  # type: ignore[union-attr]
    data = os.urandom(size)
    web.send(web.url("up/f.bin"), data)
    body = web.get("up/f.bin")
    head, _, rest = body.partition(b"\r\n\r\n")
    assert b'name="file"; filename="f.bin"' in head
    assert rest == data + b"\r\n" + head.split(b"\r\n")[0] + b"--\r\n"


def test_logins_go_to_their_server_and_into_no_message(web: Store) -> None:
    url = web.url("f").replace("http://", "http://me:pass%20word@")
    web.put("f", b"x")
    assert web.fetch(url) == b"x"
    headers = server_of(web).requests[-1][2]
    assert headers["Authorization"] == "Basic bWU6cGFzcyB3b3Jk"
    assert web.transfer.public(url + "?X-Amz-Signature=abc") == web.url("f")
    assert web.transfer.public(url + "?a=b&c#d") == web.url("f")  # any name may be that of a secret
    for odd in ("http://me:pa/ss@h/", "http://me:pa?ss@h/", "http://me:pa#ss@h/"):
        assert web.transfer.public(odd) == "http:..."
        with pytest.raises(Problem) as caught:
            web.fetch(odd)
        assert "pa" not in str(caught.value)
    with pytest.raises(Problem) as caught:
        web.fetch(url + "none?x=abc")
    assert web.url("fnone answers").replace("%20", " ") in str(caught.value)
    assert "pass" not in str(caught.value)
    assert "abc" not in str(caught.value)


def test_where_a_redirection_leads_is_told_without_secrets(web: Store) -> None:
    server_of(web).trouble = lambda handler: answer(handler, 302, Location="s3://me:pass@h/x?sig=abc")
    with pytest.raises(Problem, match="s3://h/x") as caught:
        web.fetch(web.url("f"))
    assert "pass" not in str(caught.value)
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize("action", ["fetch", "send", "entries"])
def test_a_connection_that_breaks_is_named(web: Store, action: str) -> None:
    def trouble(handler: Handler) -> bool:
        handler.close_connection = True
        if action == "entries":
            handler.send_response(200)
            handler.send_header("Content-Length", "10")
            handler.end_headers()
        return True

    server_of(web).trouble = trouble
    url = web.url("f").replace("http://", "http://me:word@") + "?q=abc"
    actions: dict[str, Callable[[], object]] = {
        "fetch": lambda: web.fetch(url),
        "send": lambda: web.send(url, b"x"),
        "entries": lambda: list(web.transfer.entries(url)),
    }
    with pytest.raises(Problem) as caught:
        actions[action]()
    assert str(caught.value).startswith(web.url("f") + ("/: " if action == "entries" else ": "))
    assert str(caught.value).endswith(", 5 times")
    assert "abc" not in str(caught.value)
    assert "word" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "good"),
    [
        ("text/html", True),
        ("Text/HTML; charset=utf-8", True),
        ("application/xhtml+xml", True),
        ("", True),
        ("text/plain", False),
        ("application/octet-stream;x=y", False),
        ("nonsense", False),
    ],
)
def test_only_html_is_a_listing(web: Store, kind: str, good: bool) -> None:
    """What is taken for an empty directory would be data lost without a word."""
    page = b'<a href="a">a</a>'
    server_of(web).trouble = lambda handler: answer(handler, 200, page, **({"Content-Type": kind} if kind else {}))
    if good:
        assert [one.relative for one in web.transfer.entries(web.url("d") + "?t=1")] == ["a"]
        return
    with pytest.raises(Problem) as caught:
        list(web.transfer.entries(web.url("d") + "?t=1"))
    said = f"{web.url('d/')} is no directory listing (Content-Type {kind.partition(';')[0]})"
    assert str(caught.value) == said
    assert len(server_of(web).requests) == 1


def test_a_login_does_not_follow_a_redirection_to_another_server(web: Store, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Store(tmp_path / "other", "http")
    try:
        other.put("f", b"x")
        server_of(web).trouble = lambda handler: answer(handler, 302, Location=other.url("f"))
        assert web.fetch(web.url("f").replace("http://", "http://me:pass@")) == b"x"
        assert "Authorization" not in server_of(other).requests[-1][2]
    finally:
        other.close()


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "/f"])
def test_redirections_lead_only_to_http_and_end(web: Store, target: str) -> None:
    server_of(web).trouble = lambda handler: answer(handler, 302, Location=target)
    with pytest.raises(Problem):
        web.fetch(web.url("f"))


def test_an_upload_follows_a_redirection(web: Store) -> None:
    server_of(web).trouble = lambda handler: handler.path == "/a" and answer(handler, 307, Location="/b")
    web.send(web.url("a"), b"data")
    assert web.get("b") == b"data"


def test_a_listing_that_never_ends(web: Store) -> None:
    server_of(web).trouble = lambda handler: answer(handler, 200, b'<a href="x/">x</a>')
    with pytest.raises(Problem, match="deeper"):
        list(web.transfer.entries(web.url("d")))


def test_proxies_are_not_asked_for_this_machine(web: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    web.put("f", b"x")
    web.transfer = open_transfer("http:", web.transfer.context)
    assert web.fetch(web.url("f")) == b"x"
    proxy = server_of(web)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
    proxy.trouble = lambda handler: answer(handler, 200, handler.path.encode())
    web.transfer = open_transfer("http:", web.transfer.context)
    assert web.fetch("http://example.invalid/x") == b"http://example.invalid/x"
