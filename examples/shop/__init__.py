"""A small web shop with the classic pitfalls of asynchronous services, and their cures."""
