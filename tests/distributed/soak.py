"""`make soak KILLS=200`: kill a run at random moments, damage its newest checkpoint now and then, and let it finish.

Two processes with experts on both train on the tests' tiny images. Each kill takes the whole run or one of its
processes, or stops a process for good, or cuts off the run (its processes stop, and wake up when the next start owns
the folder), at a random time of a start, after a step, or during a save. The same command goes on, until the kills are
used up. The last line says how it went; the status is 0 when the run ends as one that was left alone, to the bit.
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import click
import torch
from launching import local, ranks_of, send
from tiny_run import TinyData, final_state, losses, tiny_settings, write_data

from moce_ds.checkpoint.format import find, step_folder, steps_of

PROCESSES, BATCH, IMAGES = 2, 16, 90
STEPS_PER_KILL = 5  # a start is let go on for so many steps at most
LASTING = STEPS_PER_KILL + 2  # steps of the whole run for each kill: it must not end before the kills are used up
TIMEOUT = 5  # run.peer_timeout, seconds
PATIENCE = 180.0
START = 8.0  # seconds of a start in which a kill may fall
TARGETS = {"run": 5, "process": 3, "cut-off run": 3, "stopped process": 1}
MOMENTS = {"starting": 3, "after a step": 3, "saving": 4}
HARMS: dict[str, Callable[[Path, random.Random], object]] = {
    "flipped": lambda path, chance: flip(path, chance),
    "cut": lambda path, chance: path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)]),
    "removed": lambda path, chance: path.unlink(),
}


class Failure(click.ClickException):
    """What must not happen has happened."""


def flip(path: Path, chance: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return when the condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise Failure(f"waited {PATIENCE:.0f} s in vain for {what}")
        time.sleep(0.01)


def last_record(run: Path) -> dict[str, Any]:
    """The newest whole line of metrics.jsonl, cheaply; of step and attempt 0 where there is none."""
    path = run / "metrics.jsonl"
    if path.exists():
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            for line in reversed(file.read().splitlines(keepends=True)):
                if line.startswith(b"{") and line.endswith(b"\n"):
                    return json.loads(line)
    return {"step": 0, "attempt": 0}


class Soak:
    """A run that is killed; `words` are its settings."""

    def __init__(self, run: Path, words: list[str], log: Path, seed: int) -> None:
        self.run, self.log, self.chance = run, log, random.Random(seed)
        self._command = [*local(PROCESSES, "--max-restarts", "100000"), "pretrain", *words]
        self._launcher: subprocess.Popen[str] | None = None
        self._cut_off: list[int] = []
        self._pending: tuple[str, int] | None = None  # what a damage must be reported with, after so many bytes of log
        self.kills, self.harms, self.detected = Counter[str](), Counter[str](), 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """A block that starts processes; none is left after it."""
        try:
            yield
        finally:
            send(signal.SIGKILL, *self._kill_launcher(), *self._cut_off)

    def start(self) -> None:
        """Give the command, unless its launcher still runs; wake up whom it takes the run from."""
        if self._launcher is None:
            before = self._attempts()
            with open(self.log, "a") as log:
                self._launcher = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT, text=True)
            if self._cut_off:
                wait_until(lambda: self._alive() and self._attempts() > before, "a start to own the run")
                send(signal.SIGCONT, *self._cut_off)

    def kill(self) -> str:
        """Start the run, wait for a moment, and kill something; returns what was killed when."""
        target, moment = self._choose(TARGETS), self._choose(MOMENTS)
        if target == "stopped process":
            moment = "after a step"  # before they have met, nobody knows whom to miss
        self.start()
        self._wait_for(moment)
        assert self._launcher is not None
        ranks = [pid for _, pid in sorted(ranks_of(self._launcher).items())]
        if not ranks:
            target = "run"
        if target == "run":
            send(signal.SIGKILL, *self._kill_launcher(), *ranks)
        elif target == "cut-off run":
            send(signal.SIGSTOP, *ranks)
            self._cut_off += ranks
            self._kill_launcher()
        else:
            send(signal.SIGKILL if target == "process" else signal.SIGSTOP, self.chance.choice(ranks))
        self.kills[target] += 1
        return f"{target}, {moment}"

    def damage(self) -> str:
        """Harm a file of the newest checkpoint while nothing runs, if it is not the only one; says what was done."""
        self.settle()
        steps = steps_of(self.run)
        if self._launcher is not None or self._pending or len(steps) < 2 or self._cut_off_live():
            return ""
        files = sorted(path for path in step_folder(self.run, steps[-1]).rglob("*") if path.is_file())
        how, path = self.chance.choice(sorted(HARMS)), self.chance.choice(files)
        HARMS[how](path, self.chance)
        self.harms[how] += 1
        self._pending = (f"{path} ", self.log.stat().st_size)
        return f"; {path.relative_to(self.run)} {how}"

    def settle(self) -> None:
        """Count the last damage as detected once the log names its file."""
        if self._pending:
            named, offset = self._pending
            with open(self.log, "rb") as log:
                log.seek(offset)
                if named in log.read().decode(errors="replace"):
                    self.detected, self._pending = self.detected + 1, None

    def finish(self) -> None:
        """Let the run come to its end."""
        self.start()
        assert self._launcher is not None
        while self._ended() is None:  # as long as it takes, if only it goes on
            wait_until(partial(self._went_on, last_record(self.run)["step"]), "another step")
        if self._launcher.returncode:
            raise Failure(f"the run ended with status {self._launcher.returncode}; {self.log} says why")
        self._launcher = None
        wait_until(lambda: not self._cut_off_live(), "the end of those that were cut off")
        self.settle()

    def _went_on(self, step: int) -> bool:
        return self._ended() is not None or last_record(self.run)["step"] != step

    def _attempts(self) -> int:
        return len(list(self.run.glob("attempts/*.json")))

    def _cut_off_live(self) -> bool:
        """Whether some of those that were cut off are still there."""
        self._cut_off = [pid for pid in self._cut_off if Path(f"/proc/{pid}").exists()]
        return bool(self._cut_off)

    def _choose(self, weights: dict[str, int]) -> str:
        return self.chance.choices(list(weights), list(weights.values()))[0]

    def _wait_for(self, moment: str) -> None:
        if moment == "starting":
            time.sleep(self.chance.uniform(0, START))
            return
        attempt, steps = last_record(self.run)["attempt"], self.chance.randint(1, STEPS_PER_KILL)
        wait_until(lambda: self._alive() and last_record(self.run)["attempt"] > attempt, "the first step of a start")
        begun = last_record(self.run)["step"]
        wait_until(lambda: self._alive() and last_record(self.run)["step"] >= begun + steps - 1, "a step")
        if moment == "saving":
            wait_until(lambda: self._alive() and any(self.run.glob("attempts/*/step-*")), "a save")
        time.sleep(self.chance.uniform(0, 0.05))

    def _alive(self) -> bool:
        if self._ended() is not None:
            raise Failure(f"the run ended with status {self._ended()}; {self.log} says why")
        return True

    def _ended(self) -> int | None:
        return self._launcher.poll() if self._launcher is not None else None

    def _kill_launcher(self) -> list[int]:
        """Kill the launcher; returns the processes that it leaves behind."""
        if self._launcher is None:
            return []
        ranks = list(ranks_of(self._launcher).values())
        self._launcher.kill()
        self._launcher.wait()
        self._launcher = None
        return ranks


def settings(data: TinyData, run: Path, kills: int) -> list[str]:
    """The words of a run that is long enough."""
    steps = LASTING * kills + 20
    few = ["run.checkpoint_every=2", "run.keep_checkpoints=3", f"run.peer_timeout={TIMEOUT}"]
    epochs = f"optim.epochs={steps * BATCH / IMAGES}"
    return tiny_settings(data.shards, run, epochs, "experts.ep_size=2", *few, clusters=data.clusters)


def identical(first: Path, second: Path) -> bool:
    """Whether two runs had the same losses and ended with the same weights and moments, to the bit."""
    states = [final_state(run) for run in (first, second)]
    same = states[0].keys() == states[1].keys() and all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    return same and losses(first) == losses(second) and not find(first).faults() and not find(second).faults()


def result(soak: Soak, same: bool) -> str:
    """The last line."""
    log = soak.log.read_text(errors="replace")
    again = (soak.run / "metrics.jsonl").read_bytes().count(b"\n") - len(losses(soak.run))
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(soak.kills.items()))
    return (
        f"soak: {soak.kills.total()} kills ({kinds}), {log.count('Resuming ')} resumes, {again} of "
        f"{len(losses(soak.run))} steps lost and computed again, {soak.detected} of {soak.harms.total()} damaged "
        f"checkpoints detected, final state {'identical' if same else 'NOT IDENTICAL'} to that of a run left alone"
    )


@click.command(context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]})
@click.option("--kills", default=200, show_default=True, type=click.IntRange(0))
@click.option("--seed", default=0, show_default=True, help="Of targets, moments and damage.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where the runs go (default: a temporary folder).")
def main(kills: int, seed: int, folder: Path | None) -> None:
    """Kill a training run at random moments; see that it ends as one that was left alone."""
    folder = folder or Path(mkdtemp(prefix="soak-"))
    click.echo(f"{folder}: data, runs and logs")
    data = write_data(folder / "data")
    alone = Soak(folder / "alone", settings(data, folder / "alone", kills), folder / "alone.log", seed)
    soak = Soak(folder / "killed", settings(data, folder / "killed", kills), folder / "killed.log", seed)
    with alone.running(), soak.running():
        alone.finish()
        click.echo(f"{len(losses(alone.run))} steps without a kill are done")
        began = time.monotonic()
        for number in range(1, kills + 1):
            told = soak.kill()
            if soak.chance.random() < 0.3:
                told += soak.damage()
            step = last_record(soak.run)["step"]
            click.echo(f"kill {number} of {kills} at step {step}, {time.monotonic() - began:.0f} s: {told}")
        soak.finish()
        same = identical(alone.run, soak.run)
    click.echo(result(soak, same))
    sys.exit(0 if same and soak.detected == soak.harms.total() else 1)


if __name__ == "__main__":
    main()
