"""Lets the tests import the campaign as the package `chaos`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
