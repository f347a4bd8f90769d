"""The training loop: session, phases, steps, evaluations and checkpoints."""
