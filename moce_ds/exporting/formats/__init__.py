"""The formats of an export: one module for each family, all of them listed in `registry`."""
