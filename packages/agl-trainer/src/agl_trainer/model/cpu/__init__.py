"""Faster forward passes on a CPU."""
