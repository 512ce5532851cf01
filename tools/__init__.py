"""Thin scripts beside the `moce` command; run them from a checkout, as `python -m tools.NAME`."""
