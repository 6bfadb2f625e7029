"""How the daemons log: lines for people, or JSON lines for machines."""

from __future__ import annotations

import logging
import sys

import msgspec


class JsonLines(logging.Formatter):
    """One JSON object per record: ``unix_s``, ``level``, ``logger``, ``message``."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        entry = {"unix_s": record.created, "level": record.levelname, "logger": record.name, "message": text}
        return msgspec.json.encode(entry).decode()


def set_up(*, verbose: bool, as_json: bool) -> None:
    """Logs to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    lines = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if as_json else lines)
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
