"""Content-addressable memories of sessions: their logs, what servers keep of them at hand, and what can be asked of them."""
