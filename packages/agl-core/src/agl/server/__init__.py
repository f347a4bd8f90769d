"""Parts that every HTTP server shares: tokens, TLS, limits, errors. `agl.server_thread` assembles the servers."""
