"""The worker pool of comparisons and sweeps: processes on this machine, or tasks of a Ray cluster."""
