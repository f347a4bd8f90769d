"""Rewards to loss: credit, advantages, weighted rows and policy losses, as functions without a model."""
