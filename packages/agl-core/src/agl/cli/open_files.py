"""The number of files, which includes connections, that a command may open."""

import resource


def raise_file_limit() -> None:
    """Raise it to the maximum: each stream needs two connections, and the limit of shells is often 1,024 files."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
