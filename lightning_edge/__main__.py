"""``python -m lightning_edge``, the same as ``lightning-edge``."""

import sys

from lightning_edge.cli import main

if __name__ == "__main__":
    sys.exit(main())
