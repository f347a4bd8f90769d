"""The default store: one SQLite file, or memory."""
