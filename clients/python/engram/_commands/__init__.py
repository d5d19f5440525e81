"""Subcommands of the SDK: `engram stream` and `engram sessions`."""
