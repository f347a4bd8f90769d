"""Passes of the model: logprobs, gradients and optimizer steps, on one device or several."""
