"""Content of spans (messages, tool arguments, results, errors): whether it is recorded, as JSON, and redacted."""
