"""The APIs that clients speak. Engines are asked in OpenAI's chat completions and completions, which have token ids."""
