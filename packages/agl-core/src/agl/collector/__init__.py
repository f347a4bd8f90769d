"""The OTLP collector: one path from request bodies to committed spans, and its two transports, HTTP and gRPC."""

from agl.collector.grpc import GrpcReceiver
from agl.collector.http import HttpReceiver
from agl.collector.receiver import Receiver, RejectedRequest

__all__ = ["GrpcReceiver", "HttpReceiver", "Receiver", "RejectedRequest"]
