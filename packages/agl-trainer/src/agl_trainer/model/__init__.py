"""The frozen base model, its LoRA adapters and its attention over packed rows."""
