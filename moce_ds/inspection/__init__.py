"""All kinds of artefacts, and the folders that hold several: a study and a pipeline."""
