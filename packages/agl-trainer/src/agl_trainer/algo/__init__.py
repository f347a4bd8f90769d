"""From rewards to the loss: credit, advantages, weighted rows and policy losses, without a model."""
