"""`python -m moce_ds` is the `moce` command."""

from moce_ds.cli import main

if __name__ == "__main__":
    main()
