"""Metrics, progress, and evaluation results."""
