"""vLLM as the engine of a training: adapters are loaded over HTTP, verified, and only then made live."""
