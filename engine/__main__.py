"""`python -m vidtta.engine` is `vidtta`."""

from .cli import entry

if __name__ == "__main__":
    entry()
