"""The in-process engine: sampling on the weights being trained, behind an OpenAI-compatible endpoint."""
