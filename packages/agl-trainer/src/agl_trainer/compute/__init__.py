"""Forward and backward passes: logprobs, gradients and optimizer steps, on one device or several."""
