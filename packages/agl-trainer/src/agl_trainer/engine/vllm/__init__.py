"""vLLM as the engine of a training: adapters are pushed to it over HTTP, proved, and only then made live."""
