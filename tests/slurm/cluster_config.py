"""The files that configure a cluster."""

import os
import stat
from pathlib import Path

from cluster_network import Network

CPUS, MEMORY_MB, GPUS = 4, 4000, 2


def write_config(folder: Path, network: Network, nodes: list[str]) -> None:
    """Write what the programs of a cluster read: `hosts`, and the configuration files in `etc/`."""
    (folder / "etc").mkdir()
    names = {"localhost": "127.0.0.1", "head": network.head} | {node: network.node(node) for node in nodes}
    (folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
    (folder / "etc/slurm.conf").write_text(_SLURM.format(folder=folder, network=network) + _nodes(network, nodes))
    for number in range(GPUS):
        os.mknod(folder / f"gpu{number}", stat.S_IFCHR, os.makedev(1, 3))  # another /dev/null
    (folder / "etc/gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    database = folder / "etc/slurmdbd.conf"
    database.touch(0o600)
    database.write_text(_SLURMDBD.format(folder=folder, network=network))


def _nodes(network: Network, nodes: list[str]) -> str:
    size = f"CPUs={CPUS} CoresPerSocket={CPUS} RealMemory={MEMORY_MB} Gres=gpu:{GPUS}"
    return "".join(f"NodeName={node} NodeAddr={network.node(node)} {size}\n" for node in nodes)


_SLURM = """\
ClusterName=lab
SlurmctldHost=head({network.head})
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its credential has expired (by default two minutes); KillWait + 2 s is the least: else
# it comes back to a node that still ends it ("Duplicate jobid"), and the node drains.
AuthInfo=socket={folder}/munge.socket,cred_expire=7
KillWait=3
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/spool/%n.pid
SlurmdLogFile={folder}/log/%n.log
MailProg=/bin/true

# Nodes share the cores of this machine, and have no cgroups.
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu

# A lost node is noticed soon, and is used again when it is back.
SlurmdTimeout=10
ReturnToService=1

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={network.head}
AccountingStoragePass={folder}/munge.socket
AccountingStorageEnforce=associations

SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_interval=2,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=200
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
# high preempts low, with the signal that a job has asked for 20 s ahead, and abrupt, with SIGTERM and KillWait.
PartitionName=DEFAULT Nodes=ALL DefaultTime=10 PriorityTier=1
PartitionName=main Default=YES PreemptMode=OFF
PartitionName=low PreemptMode=REQUEUE GraceTime=20
PartitionName=abrupt PreemptMode=REQUEUE GraceTime=0
PartitionName=high PreemptMode=OFF PriorityTier=2

"""

_SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=head
DbdAddr={network.head}
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=root
StorageLoc=accounting
CommitDelay=0
"""
