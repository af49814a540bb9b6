"""The service's own log on stderr: plain lines, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
import time


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document, ensure_ascii=False)


class OneLine(logging.Filter):
    """A start that fails for a reason of ours is told in one line; the web server would print the whole traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = str(record.msg)
        if text.startswith("Traceback"):
            kind, _, reason = text.rstrip().rpartition("\n")[2].partition(": ")
            if kind.startswith("tesp_api.errors."):
                record.msg, record.args = f"tesp-api cannot start: {reason}", None
        return True


def configure(level: str, *, as_json: bool) -> None:
    """Send everything of `level` and above to stderr. httpx is quieted: its lines would hold Pulsar's token."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if as_json else plain)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("uvicorn.error").addFilter(OneLine())
