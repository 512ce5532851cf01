"""The `moce` command: one module per group of verbs."""
