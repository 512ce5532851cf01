"""Images, their features and their clusters on disk; the order in which images are read; and the loader."""
