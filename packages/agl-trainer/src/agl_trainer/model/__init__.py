"""The frozen base model, its LoRA adapters, and attention over packed rows."""
