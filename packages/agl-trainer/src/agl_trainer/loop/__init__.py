"""The training from start to end: session, steps, checkpoints."""
