"""`python -m engram` is `engram`."""

import sys

from engram._cli import main

if __name__ == "__main__":
    sys.exit(main())
