"""The verbs of the `moce` command that run one stage: one module per group."""
