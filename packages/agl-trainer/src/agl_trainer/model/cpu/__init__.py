"""Faster sampling on CPUs."""
