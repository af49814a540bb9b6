"""http and https: streaming downloads that resume, uploads by PUT (or POST, where PUT is unknown), listings."""

import base64
import functools
import http.client
import os
import random
import re
import socket
import urllib.error
import urllib.parse
import urllib.request
from typing import IO, Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, TypeVar

from ..errors import Missing, Problem
from ..tree import encode, show
from . import BLOCK, Context, Entry, Source, Transfer, reader, write_all

TRIES = 5

_TIMEOUT = 60.0
_DEPTH = 32
_ENTRIES = 100000
_LISTING = 16 * 1024 * 1024
_REDIRECTS = 5
_HTML = ("text/html", "application/xhtml+xml")

_CONTROL = re.compile("[\\x00-\\x1f\\x7f]")
_LOGIN = re.compile("//[^/\\s]*@")
_QUERY = re.compile("[?][^\\s'\"]*")

T = TypeVar("T")


class _Again(Exception):
    """Failed in a way that may pass; `str()` says how."""


class _Validator(NamedTuple):
    """What tells whether a file is still the same: the header to send with a Range."""

    value: str


class HttpTransfer(Transfer):
    """See Transfer. Connection errors, 429 and 5xx are tried again, with growing pauses; other answers are final."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._opener = _opener()

    def fetch(self, url: str, fd: int) -> None:
        """See Transfer. A broken download goes on where it stopped, if the server says that the file is the same."""
        validator: List[str] = []
        self._retry(lambda: self._fetch_once(url, fd, validator))

    def entries(self, url: str) -> Iterator[Entry]:
        """See Transfer. Read from HTML listings; only links strictly below the URL are followed."""
        from .listing import links

        self._usable(url)
        count = 0
        empty: List[str] = []
        todo: List[Tuple[str, str, int]] = [("", _as_directory(url), 0)]
        while todo:
            relative, folder, depth = todo.pop()
            if relative:
                yield Entry(relative, folder, True)
            if depth > _DEPTH:
                raise Problem("%s: deeper than %d directories" % (self.public(folder), _DEPTH))
            page, final = self._retry(functools.partial(self._page, folder))
            try:
                listed = links(page, final)
            except ValueError as error:
                raise Problem("%s cannot be read as a listing: %s" % (self.public(folder), error))
            if not listed:
                empty.append(self.public(folder))
            count += len(listed)
            if count > _ENTRIES:
                raise Problem("%s lists more than %d entries" % (self.public(url), _ENTRIES))
            for name, target in listed:
                path = relative + "/" + name if relative else name
                target = _with_login(target, url)
                if urllib.parse.urlsplit(target).path.endswith("/"):
                    todo.append((path, target, depth + 1))
                else:
                    yield Entry(path, target, False)
        if empty:  # an empty directory, or a page that is no listing: who knows
            more = " (nor do %d other directories)" % (len(empty) - 1) if len(empty) > 1 else ""
            self.context.note("%s lists no files%s" % (show(empty[0]), more))

    def send(self, url: str, source: Source) -> int:
        """See Transfer."""
        try:
            self._retry(lambda: self._put(url, source))
        except _NoPut:
            self._retry(lambda: self._post(url, source))
        return source.size

    def public(self, url: str) -> str:
        """See Transfer: without user, password and query. No list of names would hold all that are secret."""
        try:
            split = urllib.parse.urlsplit(url)
        except ValueError:
            return _hidden(url)
        if not _has_port(split) and "@" in url.replace(split.netloc, "", 1):  # a password with a slash in it
            return _hidden(url)
        return split._replace(netloc=split.netloc.rpartition("@")[2], query="", fragment="").geturl()

    def _again(self, url: str, said: str) -> _Again:
        return _Again("%s: %s" % (show(self.public(url)), said))

    def _usable(self, url: str) -> Tuple[str, str]:
        """See `_split_login`; Problem if it cannot be."""
        try:
            return _split_login(url)
        except ValueError as error:
            raise Problem("%s is not a usable URL: %s" % (show(self.public(url)), error))

    def _fetch_once(self, url: str, fd: int, validator: List[str]) -> None:
        have = os.lseek(fd, 0, os.SEEK_END)
        headers = {"Accept-Encoding": "identity"}
        if have and validator:
            headers.update({"Range": "bytes=%d-" % have, "If-Range": validator[0]})
        try:
            answer = self._open(url, headers=headers)
        except _BadRange:
            os.ftruncate(fd, 0)
            raise self._again(url, "the server could not resume")
        with answer:
            if answer.getcode() != 206 or _range_start(answer.headers) != have:
                if answer.getcode() == 206:
                    validator.clear()
                    os.ftruncate(fd, 0)
                    raise self._again(url, "the server resumed at the wrong place")
                os.ftruncate(fd, 0)
            validator[:] = _validator(answer.headers)
            self._receive(url, answer, fd)

    def _receive(self, url: str, answer: Any, fd: int) -> None:
        expected = _length(answer.headers)
        count = 0
        while True:
            self.context.watch.check()
            try:
                data = answer.read(BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise self._again(url, _said(error))
            if not data:
                break
            try:
                write_all(fd, data)
            except OSError as error:
                raise OSError(error.errno, "storing %s: %s" % (show(self.public(url)), _said(error)))
            count += len(data)
        if expected is not None and count != expected:
            raise self._again(url, "%d of %d bytes came" % (count, expected))
        whole = _range_size(answer.headers) if answer.getcode() == 206 else None
        have = os.lseek(fd, 0, os.SEEK_END)
        if whole is not None and have != whole:  # a part that nobody asked for, or less than was asked for
            raise self._again(url, "%d of %d bytes came" % (have, whole))

    def _page(self, url: str) -> Tuple[str, str]:
        headers = {"Accept": "text/html", "Accept-Encoding": "identity"}
        with self._open(url, headers=headers) as answer:
            kind = answer.headers.get("Content-Type") or ""
            if kind and kind.partition(";")[0].strip().lower() not in _HTML:
                kind = show(kind.partition(";")[0].strip()[:80])
                raise Problem("%s is no directory listing (Content-Type %s)" % (show(self.public(url)), kind))
            data = b""
            while len(data) <= _LISTING:
                self.context.watch.check()
                try:
                    block = answer.read(BLOCK)
                except (OSError, http.client.HTTPException) as error:
                    raise self._again(url, _said(error))
                if not block:
                    break
                data += block
            else:  # half a listing would be half an input, without a word
                raise Problem("%s is longer than %d bytes" % (self.public(url), _LISTING))
            expected = _length(answer.headers)
            if expected is not None and len(data) != expected:
                raise self._again(url, "%d of %d bytes of the listing came" % (len(data), expected))
            final = answer.geturl()
        return data.decode("utf-8", "surrogateescape"), _as_directory(final)

    def _put(self, url: str, source: Source) -> None:
        with reader(source) as body:
            self._upload("PUT", url, _Body([body], source.size), "application/octet-stream")

    def _post(self, url: str, source: Source) -> None:
        """The multipart form that the first TESP-API sent: a field named `file`."""
        boundary = os.urandom(16).hex()
        name = urllib.parse.urlsplit(url).path.rstrip("/").rpartition("/")[2] or "file"
        head = '--%s\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n' % (boundary, name)
        head += "Content-Type: application/octet-stream\r\n\r\n"
        tail = "\r\n--%s--\r\n" % boundary
        with reader(source) as body:
            whole = [head.encode("utf-8"), body, tail.encode("ascii")]
            size = source.size + len(head.encode("utf-8")) + len(tail)
            self._upload("POST", url, _Body(whole, size), "multipart/form-data; boundary=" + boundary)

    def _upload(self, method: str, url: str, body: "_Body", kind: str) -> None:
        body.check = self.context.watch.check
        for _ in range(_REDIRECTS):
            body.rewind()
            try:
                self._open(url, method, body, {"Content-Type": kind, "Content-Length": str(body.size)}).close()
                return
            except _Moved as moved:
                url = moved.target
        raise Problem("%s: too many redirections" % show(self.public(url)))

    def _open(self, url: str, method: str = "GET", body: Any = None, headers: Optional[Dict[str, str]] = None) -> Any:
        """The answer, if it is a good one; _Again if another try may help, else Problem."""
        bare, login = self._usable(url)
        request = urllib.request.Request(bare, data=body, headers=headers or {}, method=method)
        if login:
            request.add_unredirected_header("Authorization", login)
        try:
            return self._opener.open(request, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            with error:
                self._refused(url, method, error)
        except (ValueError, http.client.InvalidURL) as error:
            raise Problem("%s is not a usable URL: %s" % (show(self.public(url)), error))
        except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            self.context.watch.check()
            if isinstance(cause, str) or "CERTIFICATE_VERIFY_FAILED" in str(cause):  # it will not get better
                raise Problem("%s: %s" % (self.public(url), cause))
            raise self._again(url, _said(cause if isinstance(cause, BaseException) else error))

    def _refused(self, url: str, method: str, error: urllib.error.HTTPError) -> None:
        why = _clean(" ".join(str(error.reason).split()))  # urllib's own are several lines, and name where it leads
        said = "%s answers %d %s" % (self.public(url), error.code, ascii(why).strip("'\""))
        if error.code == 416:
            raise _BadRange(said)
        if method == "PUT" and error.code in (405, 501):
            raise _NoPut(said)
        if method != "GET" and error.code in (307, 308) and error.headers.get("Location"):
            try:
                target = urllib.parse.urljoin(_split_login(url)[0], error.headers["Location"])
                usable = urllib.parse.urlsplit(target).scheme in ("http", "https")
            except ValueError:
                usable = False
            if not usable:
                raise Problem("%s, and leads to no http URL" % said)
            raise _Moved(_with_login(target, url))
        if error.code == 429 or error.code >= 500:
            raise _Again(said)
        raise Missing(said) if error.code in (404, 410) else Problem(said)

    def _retry(self, attempt: Callable[[], T]) -> T:
        pause = self.context.pause
        for left in range(TRIES - 1, -1, -1):
            self.context.watch.check()
            try:
                return attempt()
            except _Again as error:
                if not left:
                    raise Problem("%s, %d times" % (error, TRIES))
            self.context.watch.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - only spreads the load
            pause *= 2
        raise AssertionError("unreachable")


class _NoPut(Problem):
    """The server knows no PUT."""


class _BadRange(Problem):
    """The server has no such range."""


class _Moved(Exception):
    """An upload shall go to `target`."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.target = target


class _Body:
    """Bytes and files one after the other, read as one file; checks for the wish to stop as it is read."""

    def __init__(self, pieces: List[Any], size: int) -> None:
        self.size = size
        self.check: Callable[[], None] = lambda: None
        self._pieces = pieces
        self._at = 0
        self._left = size

    def rewind(self) -> None:
        self._at = 0
        self._left = self.size
        for piece in self._pieces:
            if not isinstance(piece, bytes):
                piece.seek(0)

    def read(self, _: int = -1) -> bytes:
        self.check()
        while self._at < len(self._pieces):
            piece = self._pieces[self._at]
            data = piece if isinstance(piece, bytes) else piece.read(BLOCK)
            if isinstance(piece, bytes) or not data:
                self._at += 1
            data = data[: self._left]  # a file that grows meanwhile must not break the promise of its length
            self._left -= len(data)
            if data:
                return bytes(data)
        return b""


class _Lenient:
    """A server may refuse an upload before it has read it all: what it answered counts, not the broken pipe."""

    def send(self, data: Any) -> None:
        try:
            super().send(data)  # type: ignore[misc, unused-ignore]
        except (BrokenPipeError, ConnectionResetError):
            pass


class _Connection(_Lenient, http.client.HTTPConnection):
    pass


class _Handler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Connection, request)  # type: ignore[arg-type, unused-ignore]


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Only to http and https, the login only to the same server."""

    def redirect_request(
        self, request: urllib.request.Request, stream: IO[bytes], code: int, message: str, headers: Any, target: str
    ) -> Optional[urllib.request.Request]:
        if request.get_method() not in ("GET", "HEAD"):
            return None
        new = super().redirect_request(request, stream, 302 if code == 308 else code, message, headers, target)
        login = request.unredirected_hdrs.get("Authorization")
        if new is not None and login and _origin(new.full_url) == _origin(request.full_url):
            new.add_unredirected_header("Authorization", login)
        return new

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


def _opener() -> urllib.request.OpenerDirector:
    """urllib's, without what opens files and ftp, so that no redirection can lead there."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        _Proxies(),
        _Handler(),
        _https_handler(),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        if handler is not None:
            opener.add_handler(handler)
    return opener


def _https_handler() -> Optional[urllib.request.BaseHandler]:
    if not hasattr(urllib.request, "HTTPSHandler"):
        return None  # a Python without ssl

    class _SecureConnection(_Lenient, http.client.HTTPSConnection):
        pass

    class _SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            return self.do_open(_SecureConnection, request)  # type: ignore[arg-type, unused-ignore]

    return _SecureHandler()


class _Proxies(urllib.request.ProxyHandler):
    """The environment's proxies, but never for this machine itself."""

    def proxy_open(self, request: Any, proxy: str, kind: str) -> Any:
        host = urllib.parse.urlsplit("//" + (request.host or "")).hostname or ""
        if host == "localhost" or host == "::1" or host.startswith("127."):
            return None
        return super().proxy_open(request, proxy, kind)  # type: ignore[misc, unused-ignore]


def _split_login(url: str) -> Tuple[str, str]:
    """The URL as it can be sent, and its user and password as a Basic header value. ValueError if it cannot be."""
    if _CONTROL.search(url):  # new Pythons would leave some of them out, old ones would send them
        raise ValueError("it holds a control character")
    split = urllib.parse.urlsplit(url)
    login, at, host = split.netloc.rpartition("@")
    if not split.hostname or " " in host:
        raise ValueError("it names no host")
    if not _has_port(split):  # Python's own words would hold what may be half a password
        raise ValueError("its port is not a number from 1 to 65535")
    path = urllib.parse.quote(encode(split.path), safe="/%:;=@!$&'()*+,~-._") or "/"
    query = urllib.parse.quote(encode(split.query), safe="/%:;=@!$&'()*+,~-._?")
    bare = split._replace(netloc=host, path=path, query=query, fragment="").geturl()
    if not at:
        return bare, ""
    user, _, password = login.partition(":")
    pair = urllib.parse.unquote(user) + ":" + urllib.parse.unquote(password)
    return bare, "Basic " + base64.b64encode(pair.encode("utf-8")).decode("ascii")


def _has_port(split: urllib.parse.SplitResult) -> bool:
    """Whether there is a port that can be used, or none at all."""
    try:
        return split.port != 0
    except ValueError:
        return False


def _hidden(url: str) -> str:
    """What can be shown of a URL if nobody knows where in it a password stands."""
    return url.partition(":")[0] + ":..."


def _with_login(target: str, url: str) -> str:
    """A URL on the same server with the login of another."""
    login, at, host = urllib.parse.urlsplit(url).netloc.rpartition("@")
    split = urllib.parse.urlsplit(target)
    if not at or (split.scheme, split.netloc) != (urllib.parse.urlsplit(url).scheme, host):
        return target
    return split._replace(netloc=login + "@" + host).geturl()


def _origin(url: str) -> Tuple[str, str]:
    split = urllib.parse.urlsplit(url)
    return split.scheme, split.netloc


def _as_directory(url: str) -> str:
    split = urllib.parse.urlsplit(url)
    return split._replace(path=split.path.rstrip("/") + "/").geturl()


def _validator(headers: Any) -> List[str]:
    etag = headers.get("ETag", "")
    if etag.startswith('"'):  # a weak one does not promise the same bytes
        return [etag]
    return [headers["Last-Modified"]] if headers.get("Last-Modified") else []


def _length(headers: Any) -> Optional[int]:
    length = headers.get("Content-Length")
    return int(length) if length is not None and length.isdigit() else None


def _range_size(headers: Any) -> Optional[int]:
    """The size of the whole file that an answer is a part of."""
    size = (headers.get("Content-Range") or "").rpartition("/")[2].strip()
    return int(size) if size.isdigit() else None


def _range_start(headers: Any) -> int:
    unit, _, rest = (headers.get("Content-Range") or "").partition(" ")
    start = rest.partition("-")[0].strip()
    return int(start) if unit == "bytes" and start.isdigit() else -1


def _said(error: BaseException) -> str:
    if isinstance(error, socket.timeout):
        return "no answer within %d s" % _TIMEOUT
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _clean(str(error)) or type(error).__name__


def _clean(text: str) -> str:
    """What others say of a URL, without user, password and query."""
    return _QUERY.sub("", _LOGIN.sub("//", text))
