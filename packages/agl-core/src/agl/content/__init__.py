"""Content of spans: whether prompts and answers are recorded, as which JSON, and redacted how."""
