"""Subcommands of the SDK: `engram stream`, `engram sessions`, and `engram store`, `recall` and `forget`."""
