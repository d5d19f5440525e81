"""What the manager and the data processes ask of each other: one socket for each data process."""
