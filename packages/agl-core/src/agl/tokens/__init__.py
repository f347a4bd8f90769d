"""Token ids and logprobs: packed into bytes, captured from responses, compared with the next prompt."""
