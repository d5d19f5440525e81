"""What a call means, one folder for each protocol, on top of any wire."""
