"""`python -m engram`: the same as `engram`."""

import sys

from engram._cli import main

sys.exit(main())
