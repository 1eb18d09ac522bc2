"""Everything that is asked of a machine with a GPU, by one command: `make gpu`, which is `__main__.py`."""
