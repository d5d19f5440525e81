"""Log lines for people or for programs. Extra fields (session, trace, model) go into `extra`; inputs and secrets never do."""

from __future__ import annotations

import logging
import sys
import time

from engram._json import json_text
from engram_service.auth.tenants import id_of, tenant_of

_FIELDS = ("method", "tenant", "token", "peer", "outcome", "session", "stream", "trace", "model", "reason", "rows")


def named(key: str) -> dict[str, str]:
    """The fields that say which session a line is about."""
    return {"tenant": tenant_of(key), "session": id_of(key)}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, and the fields that are set."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: getattr(record, name) for name in _FIELDS if getattr(record, name, "") != ""})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json_text(line, default=str)


class HumanFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        shown = " ".join(f"{name}={getattr(record, name)}" for name in _FIELDS if getattr(record, name, "") != "")
        return super().format(record) + (f"  [{shown}]" if shown else "")


def set_up(level: str, form: str) -> None:
    """Logs go to stderr, so that stdout stays free for programs."""
    human = form == "human" or (form == "auto" and sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(HumanFormatter() if human else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("engram.audit").setLevel(logging.INFO)  # whoever wants fewer lines still wants these
