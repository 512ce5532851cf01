"""The `moce` command: one module for each group of verbs."""
