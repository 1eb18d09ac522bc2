"""Tests on a GPU that need nothing but torch: `python -m tests.gpu` runs them, and so does pytest."""
