"""Atomic file writes, checksums, locks and drafts."""
