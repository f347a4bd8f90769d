"""Engines that sample rollouts: in this process, from the weights that train or a copy of them, or vLLM servers."""
