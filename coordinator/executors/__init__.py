"""Where heavy work runs: in this process, in local processes, on a cluster."""
