"""Errors for the user: each names the object, what was expected, and what to do.

The command line prints the message of a `MoceError` without a traceback and exits with its status. Any other exception
is a defect of this program and keeps its traceback.
"""

LOST_PEER = 75
"""Exit status if another process, a disk or a network failed (EX_TEMPFAIL): rerunning the command may succeed."""

STOPPED = 76
"""Exit status of a run that was stopped before its last step: later stages must not follow."""


class MoceError(Exception):
    """Base class of all errors that a user can cause and fix."""

    status = 1
    every_process: bool = False
    """Whether every process prints this error. By default rank 0 prints an error that is the same for all."""

    @classmethod
    def named(cls, name: str) -> "type[MoceError]":
        """The error class with this name, as imported so far; MoceError if there is none."""
        found, waiting = {}, [cls]
        while waiting:
            kind = waiting.pop()
            found[kind.__name__] = kind
            waiting += kind.__subclasses__()
        return found.get(name, MoceError)


class ConfigError(MoceError):
    """A setting is unknown, has the wrong type, or contradicts another one."""


class DataError(MoceError):
    """Images, shards or features are missing, damaged, or not what was expected."""


class ArtefactError(MoceError):
    """A file or folder of an earlier stage is missing, incomplete, or belongs to something else."""


class OtherVersionError(ArtefactError):
    """An artefact has a format that another version of this program wrote: it is intact, and not for this one."""


class DamagedError(ArtefactError):
    """Files of an artefact are not what was written; the message has a line for each."""

    @property
    def faults(self) -> list[str]:
        """What is wrong with each file."""
        return str(self).splitlines()


class LostPeerError(MoceError):
    """Another process of the run died or does not respond."""

    status = LOST_PEER
    every_process = True
