"""The OTLP collector: one path from bytes to committed spans, and its transports, HTTP and gRPC."""

from agl.collector.grpc import GrpcReceiver
from agl.collector.http import HttpReceiver
from agl.collector.receiver import Receiver, Refusal

__all__ = ["GrpcReceiver", "HttpReceiver", "Receiver", "Refusal"]
