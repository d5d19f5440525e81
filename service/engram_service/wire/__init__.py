"""What turns the bytes of connections into rows of steps, and back: natively, or through grpc.aio. base.py says what a wire is."""
