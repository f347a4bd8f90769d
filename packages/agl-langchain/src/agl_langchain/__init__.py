"""Placeholder docstring, see owner."""
