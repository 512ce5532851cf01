"""`moce doctor`: whether this machine and installation can run moce_ds, and what to fix."""
