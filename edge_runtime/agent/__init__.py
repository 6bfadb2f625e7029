"""The device agent: a small daemon that starts a worker process for every training job."""
