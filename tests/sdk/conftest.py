"""Lets the tests of the SDK import the fake peer that stands beside them."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
