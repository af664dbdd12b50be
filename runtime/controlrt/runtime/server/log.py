"""The server's log: JSON, one object a line, on stderr. Prompts and pictures are never in it."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

LOGGER = logging.getLogger("controlrt.server")


class JSONFormatter(logging.Formatter):
    """A record as JSON; ``extra={"fields": {...}}`` adds to it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def configure_log() -> None:
    """Sends the server's records, and what uvicorn warns of, to stderr as JSON."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    for name, level in (("controlrt", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level)


def log(event: str, level: int = logging.INFO, *, error: BaseException | None = None, **fields: Any) -> None:
    """Writes one line."""
    LOGGER.log(level, event, exc_info=error, extra={"fields": fields})
