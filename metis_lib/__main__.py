"""``python -m metis_lib`` is the command ``metis``."""

from metis_lib.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
