"""What a SLURM cluster on this machine needs: root, namespaces, and Debian's packages."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Program -> Debian package.
_PROGRAMS = {
    "ip": "iproute2",
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurmdbd": "slurmdbd",
    "sbatch": "slurm-client",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "mariadb": "mariadb-client-core",
}
_POLICY = Path("/usr/sbin/policy-rc.d")
_NAMESPACES = ("unshare", "--net", "--uts", "--pid", "--fork", "--mount", "--mount-proc")


def missing() -> str | None:
    """Why no cluster can be started here, or None. Packages that are not there are installed."""
    if os.geteuid() != 0:
        return "a SLURM cluster needs root, for its namespaces"
    if not _works(*_NAMESPACES, "hostname", "here"):
        return "a SLURM cluster needs namespaces, which this machine does not permit (CAP_SYS_ADMIN)"
    if reason := _install():
        return reason
    for kind in (("bridge",), ("veth", "peer", "name", "b")):
        if not _works("unshare", "--net", "ip", "link", "add", "name", "a", "type", *kind):
            return f"a SLURM cluster needs network devices of type {kind[0]}, which this machine does not permit"
    return None


def _install() -> str | None:
    packages = sorted({package for program, package in _PROGRAMS.items() if shutil.which(program) is None})
    if not packages:
        return None
    if shutil.which("apt-get") is None:
        return f"a SLURM cluster needs Debian's packages {' '.join(packages)}, and there is no apt-get"
    install = ("apt-get", "install", "--yes", "--no-install-recommends", *packages)
    with _no_services():
        # The lists of packages may be absent or old.
        if not _works(*install) and not (_works("apt-get", "update") and _works(*install)):
            return f"apt-get cannot install {' '.join(packages)}"
    return None


@contextmanager
def _no_services() -> Iterator[None]:
    """Packages start nothing meanwhile."""
    try:
        _POLICY.touch(0o755, exist_ok=False)
    except FileExistsError:  # this machine has a policy of its own
        yield
        return
    try:
        _POLICY.write_text("#!/bin/sh\nexit 101\n")
        yield
    finally:
        _POLICY.unlink()


def _works(*command: str) -> bool:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0
