"""Whether messages, tool arguments and results go on spans."""

import os

CAPTURE_CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
"""Environment variable of the OpenTelemetry GenAI conventions: `true` or `false`, or which signal carries content."""

_NOT_ON_SPANS = {"false", "0", "no", "off", "no_content", "event_only"}


def content_is_captured(switch: bool | None = None) -> bool:
    """`switch` where it is given, else what the environment variable says.

    Without either content is captured: training reads the messages. The OpenTelemetry default is the opposite.
    """
    if switch is not None:
        return switch
    return os.environ.get(CAPTURE_CONTENT, "").strip().lower() not in _NOT_ON_SPANS
