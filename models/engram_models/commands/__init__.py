"""The subcommands that this package adds to `engram`."""
