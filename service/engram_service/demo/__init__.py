"""`engram demo`: real digits, many sessions, a server killed half way, and not a bit that differs."""
