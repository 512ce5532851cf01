"""Errors meant for the person at the terminal: they name the thing, what was expected and what to do.

The command line prints the message of a `MoceError` without a traceback and exits with status 1. Anything
else that escapes is a defect of this program and keeps its traceback.
"""


class MoceError(Exception):
    """Base of all errors that a user can cause and mend."""


class ConfigError(MoceError):
    """A setting is unknown, of the wrong type, or impossible together with another one."""


class DataError(MoceError):
    """Images, shards or features are missing, damaged, or not what they were said to be."""


class ArtefactError(MoceError):
    """A file or folder written by an earlier stage is missing, incomplete, or belongs to something else."""
