"""Metrics, the progress line, and evaluation results."""
