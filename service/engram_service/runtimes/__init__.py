"""What advances a batch: an arena with the states of resident sessions, and the model's step. A new runtime is one module here."""
