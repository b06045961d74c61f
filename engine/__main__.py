"""`python -m vidtta.engine` is `vidtta`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
