"""The APIs that clients speak. Engines get chat completions and completions only: these return token ids."""
