"""Files that are written as a whole or not at all, with checksums, locks and drafts."""
