"""`python -m grsd_callbacks`: the `grsd` command line."""

import sys

from grsd_callbacks.cli import main

if __name__ == "__main__":
    sys.exit(main())
