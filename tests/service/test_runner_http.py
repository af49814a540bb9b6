"""What web servers, and URLs, can do to the runner: TLS, endless bodies, lying headers, hostile listings."""

from __future__ import annotations

import contextlib
import os
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tesp_api.runner import job
from tesp_api.runner.errors import Problem
from tesp_api.runner.transfer.listing import links
from tests.contract.test_transfer import Handler, Store, answer, server_of
from tests.runner_jobs import Job, executor, mounts
from tests.support import require

pytestmark = pytest.mark.service

HOST = job.Runtime("host")
Make = Callable[..., Job]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Store]:
    (tmp_path / "web").mkdir()
    made = Store(tmp_path / "web", "http")
    yield made
    made.close()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(*inputs: job.Input, **plan: Any) -> Job:
        found = [executor("cat", "/in/x")] if not plan.get("executors") else plan.pop("executors")
        return Job(tmp_path, {"executors": found, "inputs": inputs, "runtime": HOST, "mounts": mounts("/in"), **plan})

    return made


def fetch(make: Make, url: str, kind: str = job.FILE, **options: Any) -> job.Result:
    return make(job.Input("/in/x", kind, url)).run(**options)


def problem(make: Make, url: str, kind: str = job.FILE, **options: Any) -> str:
    """The one sentence of a job that could not get its input."""
    result = fetch(make, url, kind, **options)
    assert (result.state, result.started, len(result.system_logs)) == ("SYSTEM_ERROR", False, 2)
    assert result.system_logs[-1].isprintable()
    return result.system_logs[-1]


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ca.pem and, signed by it, server.pem (which holds its key as well)."""
    require(shutil.which("openssl"), "openssl is needed")
    place = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=place, check=True, capture_output=True)

    (place / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    new = ("-newkey", "rsa:2048", "-nodes")
    openssl("req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=test CA")
    openssl("req", *new, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
    openssl("x509", "-req", "-in", "server.csr", *signed, "-out", "server.crt")
    (place / "server.pem").write_bytes((place / "server.key").read_bytes() + (place / "server.crt").read_bytes())
    return place


@pytest.fixture
def secure(web: Store, authority: Path) -> Store:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.pem")
    server = server_of(web)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    return web


def test_https_with_the_nodes_authorities(secure: Store, authority: Path, make: Make) -> None:
    secure.put("f", b"safe")
    url = secure.url("f").replace("http://", "https://")
    env = {"SSL_CERT_FILE": str(authority / "ca.pem")}
    made = make(job.Input("/in/x", url=url), outputs=[job.Output("/in/x", url + "2")])
    result = made.run(env=env)
    assert (result.state, result.executors[0].stdout) == ("COMPLETE", "safe")
    assert secure.get("f2") == b"safe"


def test_https_with_an_unknown_authority(secure: Store, make: Make) -> None:
    secure.put("f", b"safe")
    url = secure.url("f").replace("http://", "https://")
    since = time.monotonic()
    said = problem(make, url)
    assert said.startswith(f"inputs[0].url: {url}: ")
    assert "certificate verify failed" in said
    assert time.monotonic() - since < 5  # it does not get better by trying again
    assert "times" not in said


def test_https_for_another_name(secure: Store, authority: Path, make: Make) -> None:
    url = secure.url("f").replace("http://127.0.0.1", "https://127.0.0.2")
    server_of(secure)  # listens on 127.0.0.1 only, so ask it there by a name that the certificate has not
    url = url.replace("127.0.0.2", "[::ffff:127.0.0.1]")
    said = problem(make, url, env={"SSL_CERT_FILE": str(authority / "ca.pem")})
    assert "certificate" in said


def test_plain_http_on_the_secure_port(secure: Store, make: Make) -> None:
    assert problem(make, secure.url("f")).startswith("inputs[0].url: ")


# Redirections


def test_redirections_are_followed(web: Store, make: Make) -> None:
    web.put("f", b"there")
    for code in (301, 302, 303, 307, 308):
        server_of(web).trouble = lambda handler, code=code: (
            handler.path == "/a" and answer(handler, code, Location=web.url("f"))
        )
        assert fetch(make, web.url("a")).executors[0].stdout == "there"


@pytest.mark.parametrize("target", ["file:///etc/passwd", "FILE:/etc/passwd", "ftp://127.0.0.1:1/x", "/a", "http://["])
@pytest.mark.parametrize("code", [302, 308])
def test_redirections_that_are_refused(web: Store, make: Make, target: str, code: int) -> None:
    server_of(web).trouble = lambda handler: answer(handler, code, Location=target)
    since = time.monotonic()
    said = problem(make, web.url("a"))
    assert said.startswith("inputs[0].url: ")
    assert "root:" not in said
    assert time.monotonic() - since < 5


@pytest.mark.parametrize("target", ["file:///tmp/x", "http://[", "/a", "ftp://127.0.0.1:1/x"])
def test_redirections_of_an_upload_that_are_refused(web: Store, make: Make, target: str) -> None:
    server_of(web).trouble = lambda handler: answer(handler, 307, Location=target)
    made = make(job.Input("/in/x", content="x"), outputs=[job.Output("/in/x", web.url("a"))])
    since = time.monotonic()
    result = made.run()
    assert result.state == "SYSTEM_ERROR"
    assert result.system_logs[-1].startswith("outputs[0].url: ")
    assert time.monotonic() - since < 5


# Bodies


def test_an_endless_body_can_be_canceled(web: Store, make: Make) -> None:
    enough, over = threading.Event(), threading.Event()

    def endless(handler: Handler) -> bool:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        block = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        try:
            for number in range(100_000):  # 6.5 GB, if nobody stops it
                handler.wfile.write(block)
                if number == 100:
                    enough.set()
                    time.sleep(0.2)
        except OSError:
            over.set()
        return True

    server_of(web).protocol_version = "HTTP/1.1"  # type: ignore[attr-defined]
    server_of(web).trouble = endless
    made = make(job.Input("/in/x", url=web.url("f"))).start()
    assert enough.wait(30)
    made.cancel()
    assert made.wait() == 0
    assert (made.result().state, made.result().started) == ("CANCELED", False)
    assert over.wait(30)


def test_an_encoded_body_is_stored_as_it_was_sent(web: Store, make: Make) -> None:
    import gzip

    data = gzip.compress(b"hello" * 100)
    server_of(web).trouble = lambda handler: answer(handler, 200, data, Content_Encoding="gzip")
    made = make(job.Input("/in/x", url=web.url("f.gz")))
    assert made.run().state == "COMPLETE"
    assert (made.root / "tes" / "m0" / "x").read_bytes() == data


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Length": "20"},
        {"Transfer-Encoding": "chunked"},
        {"Content-Range": "bytes 0-9/100", "Content-Length": "10"},
        {"Content-Range": "bytes 5-14/15", "Content-Length": "10"},
    ],
)
def test_less_than_was_promised(web: Store, headers: dict[str, str]) -> None:
    """Never taken for the whole."""

    def lie(handler: Handler) -> bool:
        handler.send_response(206 if "Content-Range" in headers else 200)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(b"a\r\n0123456789\r\n" if "Transfer-Encoding" in headers else b"0123456789")
        handler.close_connection = True
        return True

    server_of(web).trouble = lie
    with pytest.raises(Problem):
        web.fetch(web.url("f"))


# URLs


@pytest.mark.parametrize(
    "end",
    [
        "/x\r\nX-Injected: 1",
        "/x\nX-Injected: 1",
        "/x\t",
        "/\0",
        "/?q=\r\nHost: other",
    ],
)
def test_nothing_can_be_injected_by_a_url(web: Store, make: Make, end: str) -> None:
    url = web.url("").rstrip("/") + end
    assert "control character" in problem(make, url)
    result = make(job.Input("/in/x", content="x"), outputs=[job.Output("/in/x", url)]).run()
    assert result.state == "SYSTEM_ERROR"
    assert server_of(web).requests == []


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///x",
        "http:x",
        "http://a b/x",
        "http://127.0.0.1:port/x",
        "http://127.0.0.1:99999/x",
        "http://me:secret@[::1/x",
        "http://me:secret@127.0.0.1:port/x",
        "http://\r\n/x",
        "http://\ud800/x",
        "http://127.0.0.1:1/\ud800",
        "http://" + "a" * 70 + ".invalid/",
        "http://\u2100.invalid/",
    ],
)
@pytest.mark.parametrize("kind", [job.FILE, job.DIRECTORY])
def test_urls_that_are_none(make: Make, url: str, kind: str) -> None:
    since = time.monotonic()
    said = problem(make, url, kind)
    assert said.startswith("inputs[0].url: ")
    assert "secret" not in said
    assert "unexpected" not in said
    assert time.monotonic() - since < 5


# Listings


def page(*hrefs: str) -> bytes:
    return b"<ul>%s</ul>" % "".join(f'<li><a href="{href}">x</a>' for href in hrefs).encode("utf-8", "surrogateescape")


HOSTILE = [
    "../",
    "../../etc/passwd",
    "..",
    ".",
    "/",
    "//other.invalid/d/x",
    "http://other.invalid/d/x",
    "https://127.0.0.1/d/x",
    "javascript:alert(1)",
    "file:///etc/passwd",
    "mailto:x@y",
    "%2f..%2fx",
    "..%2f..%2fx",
    "%2e%2e/%2e%2e/x",
    "%2e%2e",
    "a/../../x",
    "a%00b",
    "?C=N;O=D",
    "#top",
    "http://[",
    "",
    " ",
]


def test_hostile_links_lead_nowhere(web: Store, make: Make) -> None:
    web.put("d/good", b"good")
    server_of(web).trouble = lambda handler: handler.path == "/d/" and answer(handler, 200, page(*HOSTILE, "good"))
    made = make(job.Input("/in/x", job.DIRECTORY, web.url("d")), executors=[executor("find", "/in")])
    result = made.run()
    assert result.state == "COMPLETE"
    base = made.root / "tes" / "m0"
    assert sorted(str(path.relative_to(base)) for path in base.rglob("*")) == ["x", "x/good"]


def test_names_of_any_kind(web: Store, make: Make) -> None:
    """Encoded or not, and a page in another encoding than UTF-8."""
    hrefs = ["%C3%BC", "\u4e2d", "a%20b", "a b", "%FF", "\udcfe", "x%0Ay", "c%5C..", "q%3Fr", "semi;colon", "am&amp;p"]
    wanted = [
        b"\xc3\xbc",
        "\u4e2d".encode(),
        b"a b",
        b"\xff",
        b"\xfe",
        b"x\ny",
        b"c\\..",
        b"q?r",
        b"semi;colon",
        b"am&p",
    ]

    def serve(handler: Handler) -> bool:
        return answer(handler, 200, page(*hrefs) if handler.path == "/d/" else b"x")

    server_of(web).trouble = serve
    made = make(job.Input("/in/x", job.DIRECTORY, web.url("d")), executors=[executor("true")])
    result = made.run()
    assert (result.state, result.system_logs[1:]) == ("COMPLETE", [])
    found = os.listdir(bytes(made.root / "tes" / "m0" / "x"))  # noqa: PTH208 - as bytes
    assert sorted(found) == sorted(wanted)


def test_a_very_long_name_is_named(web: Store, make: Make) -> None:
    server_of(web).trouble = lambda handler: handler.path == "/d/" and answer(handler, 200, page("a" * 5000))
    said = problem(make, web.url("d"), job.DIRECTORY)
    assert said.startswith("inputs[0].path: aaaa")
    assert said.endswith("...: File name too long")
    assert len(said) < 300


def test_a_missing_entry_is_named(web: Store, make: Make) -> None:
    server_of(web).trouble = lambda handler: handler.path == "/d/" and answer(handler, 200, page("gone"))
    said = problem(make, web.url("d"), job.DIRECTORY)
    assert said.startswith("inputs[0].url: gone: ")
    assert "404" in said


@pytest.mark.parametrize("broad", [1, 3])
def test_a_listing_that_contains_itself(web: Store, make: Make, broad: int) -> None:
    server_of(web).trouble = lambda handler: answer(handler, 200, page(*(f"{n}/" for n in range(broad))))
    assert "deeper than" in problem(make, web.url("d"), job.DIRECTORY)
    assert len(server_of(web).requests) < 200


def test_a_long_listing_is_read_in_time(web: Store) -> None:
    server_of(web).trouble = lambda handler: answer(handler, 200, page(*(f"f{n}" for n in range(100_000))))
    since = time.monotonic()
    assert len(list(web.transfer.entries(web.url("d")))) == 100_000
    assert time.monotonic() - since < 30
    server_of(web).trouble = lambda handler: answer(handler, 200, page(*(f"f{n}" for n in range(100_001))))
    with pytest.raises(Problem, match="more than 100000"):
        next(web.transfer.entries(web.url("d")))  # before anything is fetched


def test_a_listing_is_never_cut_in_silence(web: Store) -> None:
    whole = page(*(f"f{n}" for n in range(1000)))
    server_of(web).trouble = lambda handler: answer(handler, 200, whole + b" " * (16 * 1024 * 1024))
    with pytest.raises(Problem, match="longer"):
        next(web.transfer.entries(web.url("d")))
    server_of(web).trouble = lambda handler: answer(handler, 200, whole[:-100], **{"Content-Length": str(len(whole))})
    with pytest.raises(Problem, match="of the listing"):
        next(web.transfer.entries(web.url("d")))


@pytest.mark.parametrize(
    "text", ["<a ", "<a href='", "<", "</", "<!--", "<![", "&#x", "<a href=x>&amp;", "<script>", "<?"]
)
def test_pages_that_would_keep_a_parser_busy(text: str) -> None:
    since = time.monotonic()
    with contextlib.suppress(ValueError):
        links(text * (1_000_000 // len(text)), "http://host/d/")
    assert time.monotonic() - since < 10
