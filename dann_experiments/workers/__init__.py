"""One pool of workers for comparisons and sweeps: processes of this machine, or tasks of a Ray cluster."""
