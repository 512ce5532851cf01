"""Errors meant for the person at the terminal: they name the thing, what was expected and what to do.

The command line prints the message of a `MoceError` without a traceback and exits with its status. Anything
else that escapes is a defect of this program and keeps its traceback.
"""

LOST_PEER = 75
"""Exit status when another process, a disk or a network failed (EX_TEMPFAIL): the same command may well succeed."""

STOPPED = 76
"""Exit status of a run that stopped as asked, before its last step: what needs the whole run must not follow."""


class MoceError(Exception):
    """Base of all errors that a user can cause and mend."""

    status = 1
    every_process = False
    """Whether each process tells this, where an error is the same for all and the first process tells it for them."""


class ConfigError(MoceError):
    """A setting is unknown, of the wrong type, or impossible together with another one."""


class DataError(MoceError):
    """Images, shards or features are missing, damaged, or not what they were said to be."""


class ArtefactError(MoceError):
    """A file or folder written by an earlier stage is missing, incomplete, or belongs to something else."""


class LostPeerError(MoceError):
    """Another process of the run died or does not answer."""

    status = LOST_PEER
    every_process = True
