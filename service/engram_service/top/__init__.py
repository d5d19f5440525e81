"""`engram top`: what servers do, from two looks at their /metrics."""
