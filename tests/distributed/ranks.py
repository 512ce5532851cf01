"""`python ranks.py ROLE [RESTARTS]`: three ranks of which one goes wrong, in place of a verb; no training.

Roles: "defect", rank 2 ends with an unexpected error; "fault", with one that it explains but that nobody else has;
"disk", with one of its disk, "disk, agreed" in a block that all leave together;
"interrupted", with a KeyboardInterrupt; "sleep", all sleep and handle no signals, as while they start.
"""

import errno
import os
import sys
import time

from moce_ds.common.errors import STOPPED, DataError, MoceError


def rank_main(role: str) -> int:
    """What one rank does; returns its exit status, as the command line would."""
    if role == "sleep":
        time.sleep(600)
    from moce_ds.common.host.machine import machine_fault
    from moce_ds.distributed.runtime import started  # here, since it takes seconds that a sleeper need not wait for

    disk = OSError(errno.EIO, os.strerror(errno.EIO), "shards/0.tar")
    try:
        with started(peer_timeout=60) as runtime:
            runtime.set_status("step 7")
            runtime.barrier()  # all have found each other: on a busy machine gloo complains of one that leaves before
            if role == "disk, agreed":
                with runtime.raise_on_all_ranks():
                    if runtime.rank == 2:
                        raise disk
            if runtime.rank == 2:
                raise {
                    "defect": RuntimeError("this is a defect"),
                    "disk": disk,
                    "fault": DataError("the disk is not there"),
                    "interrupted": KeyboardInterrupt(),
                }[role]
            runtime.barrier()
    except MoceError as error:
        return error.status
    except OSError as error:
        fault = machine_fault(error)
        assert fault
        return fault.status
    except KeyboardInterrupt:
        return STOPPED
    return 0


if __name__ == "__main__":
    if "RANK" in os.environ:
        sys.exit(rank_main(sys.argv[1]))
    from moce_ds.cli.launch.local import run_processes

    sys.exit(run_processes([sys.executable, *sys.argv], nproc=3, max_restarts=int(sys.argv[2])))
