"""Training rows: chats to token ids, rows packed as a prefix tree, rows cut into passes."""
