"""Durable state of the coordinator: a database and a folder of blobs."""

from __future__ import annotations

from coordinator.store.store import Store, StoredRun

__all__ = ["Store", "StoredRun"]
