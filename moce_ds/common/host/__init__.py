"""The process and its machine: signals, threads, faults of the machine."""
