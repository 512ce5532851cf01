"""The settings of `moce launch slurm`: what a job requests from SLURM, one YAML file per cluster (`configs/slurm/`)."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from moce_ds.common.config.settings import Positive, option, settings
from moce_ds.common.host.program import LOG
from moce_ds.common.host.threads import CHOSEN
from moce_ds.common.text import counted, script_fault

Number = Annotated[int, Field(strict=True)]
"""A number in a tree of a program; text that looks like one stays as typed, such as 0800."""


@settings
class SlurmProfile:
    """Settings of a job; null leaves a setting to the cluster."""

    nodes: Positive = option(1, "nodes of the job")
    min_nodes: Positive | None = option(None, "fewest nodes to resume with after a loss; null: all of them")
    gpus_per_node: Annotated[int, Field(ge=0)] = option(0, "GPUs per node; one process per GPU")
    tasks_per_node: Positive | None = option(None, "processes per node; null: one per GPU, or one")
    cpus_per_task: Positive = option(1, "CPUs per process")
    mem: str | None = option(None, "memory per node, such as 200G")
    minutes: Positive = option(1440, "time limit; a longer run is requeued and resumes")
    partition: str | None = option(None, "partition")
    account: str | None = option(None, "account")
    qos: str | None = option(None, "quality of service")
    constraint: str | None = option(None, "required node features")
    signal: Literal["USR1", "USR2"] = option("USR2", "signal before SLURM ends the job")
    signal_seconds: Positive = option(120, "seconds between that signal and the end")
    max_failures: Annotated[int, Field(ge=0)] = option(
        3, "failed starts in a row before the job ends; a start of an hour resets the count"
    )
    array_parallelism: Positive = option(16, "jobs of an array that run at the same time")
    extra: dict[str, str | bool | Number] = option({}, "further options #SBATCH --KEY=VALUE; with VALUE true: --KEY")
    setup: list[str] = option([], "shell commands to run first, such as module load cuda")
    env: dict[str, str] = option({}, "environment variables of the processes")
    container: str = option("", "container command, such as apptainer exec --nv image.sif")
    python: Path | None = option(None, "path of the job's Python; null: the one that submits")

    def __post_init__(self) -> None:
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes: {self.min_nodes} is more than nodes {self.nodes}")
        for key, text in self._texts():
            if fault := script_fault(text):
                raise ValueError(f"{key}: {text!r} {fault}; expected one line, since it goes into the job's script")
        for name in self.extra:
            if not re.fullmatch(r"[A-Za-z][\w-]*", name, re.ASCII):
                raise ValueError(f"extra: {name!r} is not an option of sbatch; expected letters, digits and dashes")
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError(f"env: {name!r} is not a name of a variable; expected letters, digits and underscores")

    def _texts(self) -> Iterator[tuple[str, str]]:
        """All texts of the profile with their keys."""
        for key in ("mem", "partition", "account", "qos", "constraint", "container", "python"):
            yield key, str(getattr(self, key) or "")
        yield from (("setup", line) for line in self.setup)
        for key in ("env", "extra"):
            for name, value in getattr(self, key).items():
                yield key, name
                yield f"{key}.{name}", str(value)

    @property
    def processes_per_node(self) -> int:
        """`tasks_per_node`, or one process per GPU."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def node_counts(self) -> range:
        """The numbers of nodes that SLURM may assign."""
        return range(self.min_nodes or self.nodes, self.nodes + 1)

    @property
    def size(self) -> str:
        """Nodes and processes per node, as text."""
        fewest = f"{self.min_nodes} to " if self.min_nodes else ""
        processes = counted(self.processes_per_node, "process", "processes")
        return f"{fewest}{counted(self.nodes, 'node')} x {processes}"

    def for_one_process(self) -> "SlurmProfile":
        """The profile for a single-process verb: one node, one process with its share of GPUs and CPUs."""
        return replace(self, nodes=1, min_nodes=None, tasks_per_node=1, gpus_per_node=min(1, self.gpus_per_node))

    def sbatch(self, after: Sequence[str]) -> dict[str, object]:
        """Parameters of submitit's executor; `after`: jobs that must have succeeded first."""
        # thread counts chosen on the submitting machine (CHOSEN) are not for the nodes
        count = {"OMP_NUM_THREADS": str(self.cpus_per_task), CHOSEN: ""}
        log_level = {LOG: os.environ[LOG]} if LOG in os.environ else {}
        environment = {**count, **log_level, "SUBMITIT_PREEMPT_SIGNAL": self.signal, **self.env}
        each = self.processes_per_node
        nodes = {"nodes": f"{self.min_nodes}-{self.nodes}"} if self.min_nodes else {}
        wanted = {
            "time": self.minutes,
            "nodes": self.nodes,
            "cpus_per_task": self.cpus_per_task,
            "gpus_per_node": self.gpus_per_node or None,
            "mem": self.mem,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "dependency": f"afterok:{':'.join(after)}" if after else None,
            "array_parallelism": self.array_parallelism,
            "stderr_to_stdout": True,
            # A failing job must still report it (moce_ds/cli/launch/slurm_job.py), whatever the set-up commands do.
            "setup": [*self.setup, *(f"export {name}={_quoted(text)}" for name, text in environment.items()), "set +e"],
            # A failing process ends all; otherwise the others wait until the time limit.
            "srun_args": ["--kill-on-bad-exit=1", f"--ntasks-per-node={each}", f"--cpus-per-task={self.cpus_per_task}"],
            "additional_parameters": {
                # With a number of tasks, sbatch would choose the fewest nodes of the range.
                "mincpus": each * self.cpus_per_task,
                "requeue": True,
                "signal": f"{self.signal}@{self.signal_seconds}",
                "kill-on-invalid-dep": "yes",  # otherwise a job whose predecessor failed waits forever
                **nodes,
                **self.extra,
            },
        }
        return {name: value for name, value in wanted.items() if value is not None}


def _quoted(text: str) -> str:
    """A text quoted for the shell, which expands `$NAME` and `${NAME}`, as in PATH=$HOME/bin:$PATH, and executes
    nothing."""
    text = re.sub(r'[\\"`]', r"\\\g<0>", text)
    return '"' + re.sub(r"\$(?![A-Za-z_]|\{[A-Za-z_]\w*\})", r"\\$", text) + '"'
