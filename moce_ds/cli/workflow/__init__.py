"""Several verbs as one: pipeline, study, transfer."""
