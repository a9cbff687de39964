"""``python -m nbhelpers.pipeline``, which ``./run_all.sh`` calls."""

import sys

from nbhelpers.pipeline.command import main

if __name__ == "__main__":
    sys.exit(main())
