"""`engram bench`: what a server does under closed-loop load, beside plain torch and beside a plain server, in one run."""
