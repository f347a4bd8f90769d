"""The in-process engine: continuous batching on the weights that train."""
