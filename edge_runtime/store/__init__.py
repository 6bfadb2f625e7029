"""Durable storage on the device and, for blobs, on the coordinator."""
