"""Local data of a device: where it is, what is held out, and whether it fits the model."""

from edge_runtime.data.base import Dataset, Snapshot, open_dataset
from edge_runtime.data.config import DatasetConfig

__all__ = ["Dataset", "DatasetConfig", "Snapshot", "open_dataset"]
