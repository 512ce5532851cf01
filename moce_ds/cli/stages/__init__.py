"""The stages of the `moce` command, one verb each: a module per group of verbs."""
