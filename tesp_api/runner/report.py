"""Reports to the service over HTTP, and its wishes as answers. Whatever fails here never disturbs the job.

Two threads: one tells what is new, at once; the other keeps one question open, which the service answers as soon as it
wants something of us. Files in the job's directory say the same, so nothing is lost when nobody hears this.
"""

import json
import socket
import threading
import time
from typing import Any, Callable, Optional, Tuple

from . import job
from .wire import Exchange

QUIET = 0.5
"""Seconds before the first question: a short job need not ask."""

_TIMEOUT = 10.0
_LONGEST_PAUSE = 30.0
_ANSWER_BYTES = 65536
_LAST_WORD = 5.0  # seconds for the last report, when the service could be reached before
_LAST_TRY = 1.0  # the same, when it could not


class Reporter:
    """Keeps the service informed. `heard` gets each answer, in a thread of ours."""

    def __init__(self, to: job.ReportTo, heard: Callable[[job.Answer], None]) -> None:
        self._to = to
        self._heard = heard
        self._changed = threading.Condition()
        self._report: Optional[job.Report] = None
        self._unsent = False
        self._over = threading.Event()
        self._told = threading.Event()
        self._failures = 0

    def show(self, progress: job.Progress) -> None:
        """The job's progress as it is now; told soon if there is more news in it than that the job lives."""
        with self._changed:
            before = self._report
            if before is not None and before.result is not None:
                return
            self._report = job.Report(progress)
            if before is None or _news(before.progress) != _news(progress):
                self._unsent = True
                self._changed.notify_all()
        if before is None:
            for work in (self._tell, self._ask):
                threading.Thread(target=work, name="report", daemon=True).start()

    def finish(self, progress: job.Progress, result: job.Result) -> None:
        """Tell the end. Returns when that is done or does not succeed within a few seconds."""
        if self._report is None:
            return
        last = job.Report(progress, result)
        if len(_dump(last)) > job.REPORT_BYTES:
            last = job.Report(progress)  # the service fetches it
        with self._changed:
            self._report, self._unsent = last, True
            self._over.set()
            self._changed.notify_all()
        self._told.wait(_LAST_TRY if self._failures else _LAST_WORD)

    def _tell(self) -> None:
        line = Line(self._to)
        while True:
            with self._changed:
                while not self._unsent:
                    self._changed.wait()
                self._unsent = False
                report, last = self._report, self._over.is_set()
            assert report is not None
            try:
                self._hear(line.ask(report, _TIMEOUT))
                self._failures = 0
            except (OSError, ValueError):
                self._failures += 1
                if not last:
                    with self._changed:
                        self._unsent = True
                    self._over.wait(_pause(self._failures))
            if last:
                self._told.set()
                return

    def _ask(self) -> None:
        line = Line(self._to)
        pause, failures = QUIET, 0
        while not self._over.wait(pause):
            report = self._report
            assert report is not None
            asked = time.monotonic()
            try:
                answer = line.ask(report._replace(hold=job.HOLD), job.HOLD + _TIMEOUT)
                self._hear(answer)
            except (OSError, ValueError):
                failures += 1
                pause = _pause(failures)
                continue
            if answer.cancel:
                return
            failures = 0
            pause = max(0.0, QUIET - (time.monotonic() - asked), min(float(answer.pause), _LONGEST_PAUSE))

    def _hear(self, answer: job.Answer) -> None:
        if not self._over.is_set():
            self._heard(answer)


class Line:
    """A connection to the service, made anew when it breaks."""

    def __init__(self, to: job.ReportTo) -> None:
        self._secure, self._address, self._host, self._path = parse(to.url)
        self._headers = {"Authorization": "Bearer " + to.token}
        self._exchange: Optional[Exchange] = None

    def ask(self, report: job.Report, timeout: float) -> job.Answer:
        """Send a report; the answer. OSError or ValueError if there is none that can be used."""
        if self._exchange is not None:
            try:
                return self._ask(report, timeout)
            except OSError:
                pass  # the service closes what is idle; a report may come twice
        self._exchange = self._connect()
        return self._ask(report, timeout)

    def _ask(self, report: job.Report, timeout: float) -> job.Answer:
        exchange, self._exchange = self._exchange, None
        assert exchange is not None
        keep = False
        try:
            exchange.socket.settimeout(timeout)
            exchange.send("POST", self._path, job.to_document(report), self._headers)
            status = exchange.receive()
            length = exchange.headers.get("content-length", "")
            if status != 200 or not length.isdigit() or int(length) > _ANSWER_BYTES:
                raise ValueError("no answer, but status %d" % status)
            answer = job.read_answer(json.loads(exchange.text()))
            keep = exchange.headers.get("connection", "").lower() != "close"
        finally:
            if keep:
                self._exchange = exchange
            else:
                exchange.close()
        if not isinstance(answer.cancel, bool) or not isinstance(answer.pause, (int, float)):
            raise ValueError("a strange answer")
        return answer

    def _connect(self) -> Exchange:
        connected = socket.create_connection(self._address, _TIMEOUT)
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._secure:
                connected = _secured(connected, self._address[0])
        except BaseException:
            connected.close()
            raise
        return Exchange(connected, self._host)


def parse(url: str) -> Tuple[bool, Tuple[str, int], str, str]:
    """Of `http[s]://host[:port]/path`: whether it is https, the address, the Host header, the path."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    name, colon, port = host.rpartition(":")
    if not colon or not port.isdigit():
        name, port = host, "443" if scheme == "https" else "80"
    return scheme == "https", (name.strip("[]"), int(port)), host, "/" + path


def _secured(connected: socket.socket, name: str) -> Any:
    import ssl

    return ssl.create_default_context().wrap_socket(connected, server_hostname=name)


def _pause(failures: int) -> float:
    return float(min(0.5 * 2 ** min(failures, 8), _LONGEST_PAUSE))


def _news(progress: job.Progress) -> Any:
    return progress._replace(beat=0)


def _dump(report: job.Report) -> bytes:
    return json.dumps(job.to_document(report)).encode("ascii")
