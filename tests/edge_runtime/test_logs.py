"""Logs of the daemons."""

from __future__ import annotations

import json
import logging

from edge_runtime.logs import JsonLines


def test_json_lines_are_for_machines():
    """One object per record, with the message filled in and the trace of an error inside."""
    record = logging.LogRecord("edge.agent", logging.WARNING, "f.py", 1, "job %s failed", ("r0-1",), None)
    entry = json.loads(JsonLines().format(record))
    assert entry["message"] == "job r0-1 failed"
    assert (entry["level"], entry["logger"], entry["unix_s"]) == ("WARNING", "edge.agent", record.created)
    record.exc_info = (ValueError, ValueError("inside"), None)
    text = JsonLines().format(record)
    assert "\n" not in text
    assert "ValueError: inside" in json.loads(text)["message"]
