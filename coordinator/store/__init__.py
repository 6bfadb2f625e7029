"""Durable state of the coordinator: a database and a folder of blobs."""

from __future__ import annotations

from coordinator.store.queries import StoredRun
from coordinator.store.store import HEARTBEAT_S, Store

__all__ = ["HEARTBEAT_S", "Store", "StoredRun"]
