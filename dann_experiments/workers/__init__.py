"""The worker pool of comparisons, sweeps and predictions: processes on this machine, or tasks of a Ray cluster."""
