"""The configuration as a typed tree: one module per section of the YAML file, and `file` for the whole."""

from agl.config.canary import CanaryConfig, GuardConfig, PromoteConfig
from agl.config.collector import CollectorConfig
from agl.config.engine import EngineConfig, LaunchConfig
from agl.config.file import DEFAULT_STORE_URI, Config
from agl.config.gateway import GatewayConfig, RecordMode, TimeoutsConfig, UpstreamConfig
from agl.config.judge import JudgeConfig
from agl.config.loss import (
    AdvantageName,
    LogprobsMode,
    LossConfig,
    LossName,
    Normalization,
    PolicyLossConfig,
    RewardScale,
)
from agl.config.models import Base, ModelConfig
from agl.config.queue import Appendfsync, QueueConfig
from agl.config.ray import RayConfig
from agl.config.roles import AgentRoles, RoleConfig
from agl.config.sampling import TrafficSamplingConfig
from agl.config.server import ServerConfig
from agl.config.sft import SftConfig, SftTracesConfig, TracesConfig
from agl.config.tls import TlsConfig
from agl.config.train import SamplingConfig, TrainConfig

__all__ = [
    "DEFAULT_STORE_URI",
    "AdvantageName",
    "AgentRoles",
    "Appendfsync",
    "Base",
    "CanaryConfig",
    "CollectorConfig",
    "Config",
    "EngineConfig",
    "GatewayConfig",
    "GuardConfig",
    "JudgeConfig",
    "LaunchConfig",
    "LogprobsMode",
    "LossConfig",
    "LossName",
    "ModelConfig",
    "Normalization",
    "PolicyLossConfig",
    "PromoteConfig",
    "QueueConfig",
    "RayConfig",
    "RecordMode",
    "RewardScale",
    "RoleConfig",
    "SamplingConfig",
    "ServerConfig",
    "SftConfig",
    "SftTracesConfig",
    "TimeoutsConfig",
    "TlsConfig",
    "TracesConfig",
    "TrafficSamplingConfig",
    "TrainConfig",
    "UpstreamConfig",
]
