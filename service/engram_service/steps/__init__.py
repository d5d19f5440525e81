"""The path of a step on the event loop: loop.py first, which calls the others in the order in which a step meets them."""
