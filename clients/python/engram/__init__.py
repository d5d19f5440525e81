"""Engram: recurrent models served as living sessions."""

from engram._version import __version__

__all__ = ["__version__"]
