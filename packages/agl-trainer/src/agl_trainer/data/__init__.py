"""Training rows: chat messages to token ids, SFT examples, the prefix tree, and the split of rows into passes."""
