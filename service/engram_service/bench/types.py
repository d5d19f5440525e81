"""What the modules of the bench share."""

from collections.abc import Callable

Progress = Callable[[str], None]
