"""Training on the device: the backend seam and the job that uses it."""
