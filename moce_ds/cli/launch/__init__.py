"""Processes on one machine, and jobs of SLURM."""
