"""`python -m vidtta.bench`, the same as `vidtta bench`."""

import sys

from .command import entry

if __name__ == "__main__":
    sys.exit(entry())
