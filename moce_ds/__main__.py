"""The `moce` command, and `python -m moce_ds`: signals are obeyed while the program is still being loaded."""

import signal

from moce_ds.common.host.interrupts import leave, obeyed


def main() -> None:
    """Entry point."""
    for number in obeyed():
        signal.signal(number, leave)
    from moce_ds.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
