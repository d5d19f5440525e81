"""The targets are a package of this folder's own, which tools/fuzz.py uses too."""

from __future__ import annotations

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
