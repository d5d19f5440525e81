"""What the server says of itself: metrics, logs, whether it is ready."""
