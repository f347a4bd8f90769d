"""Bearer tokens, TLS, size limits and errors that every server shares; `agl.server_thread` starts the servers."""
