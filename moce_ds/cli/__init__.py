"""The `moce` command: stages, the workflows that run stages, and the processes and SLURM jobs that they start."""
