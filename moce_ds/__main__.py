"""The `moce` command, and `python -m moce_ds`: signals are obeyed while the program is still being loaded."""

import gc
import signal

from moce_ds.common.host.interrupts import leave, obeyed


def main() -> None:
    """Entry point."""
    # Loading torch and DeepSpeed makes half a million objects, none of them garbage; a training step leaves 30, without
    # tensors. Python's usual collections, one for each 700 new objects, take a fifth of the time of a start.
    gc.set_threshold(50_000)
    for number in obeyed():
        signal.signal(number, leave)
    from moce_ds.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
