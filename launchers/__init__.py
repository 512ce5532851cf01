"""Start `moce` verbs in several processes."""
