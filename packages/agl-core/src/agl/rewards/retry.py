"""How a server that scores is asked again."""

import urllib3


def retry_policy(retries: int) -> urllib3.Retry:
    """After a connection error, 429 or 5xx, up to `retries` times, after 0, 0.5, 1, 2, ... seconds.

    Whatever the server asks for: rollouts, or the step of a training, wait as long.
    """
    return urllib3.Retry(
        retries,
        redirect=False,
        allowed_methods=None,
        status_forcelist=(429, 500, 502, 503, 504),
        backoff_factor=0.25,
        raise_on_status=False,
        respect_retry_after_header=False,
    )
