"""Which rows make the next batch: pure, over arrays. steps/loop.py asks."""
