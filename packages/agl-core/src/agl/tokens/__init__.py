"""Token ids and logprobs: packed into bytes, captured from answers, compared with the next prompt."""
