"""`engram demo`: stories told on a private server over real gRPC, each with promises that it holds itself to."""
