"""Errors of training."""


class TrainingError(Exception):
    """Training cannot begin or go on: the recipe, the data, a checkpoint or the disk; the message says which and what to do."""
