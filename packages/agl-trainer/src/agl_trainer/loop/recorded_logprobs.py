"""Which logprobs the calls of a training have, and whether its loss can use them."""

from agl.config import LogprobsMode, TrainConfig
from agl.errors import ConfigError
from agl_trainer.rollout.serving import TrainingEngine

_START = "start vLLM with --logprobs-mode processed_logprobs"


def recorded_logprobs_mode(train: TrainConfig, engine: TrainingEngine | None) -> LogprobsMode:
    """The mode of `engine`; without an engine, which is training from the store, `train.logprobs_mode`.

    Raises ConfigError if the two differ, or if a loss needs the logprobs of the distribution that the engine sampled
    from and gets others. All other losses take the policy at the beginning of the step in their place.
    """
    if engine is None:
        return train.logprobs_mode or "raw_logprobs"
    mode = engine.logprobs_mode
    if train.logprobs_mode not in (None, mode):
        raise ConfigError(f"train.logprobs_mode is {train.logprobs_mode}, but the engine records {mode}; leave it out")
    limits = {"temperature": train.temperature} if train.temperature != 1 else {}
    shaped = ", ".join(f"{name} {value:g}" for name, value in (limits | train.sampling.settings()).items())
    needs = [
        name
        for name, is_used in (
            ("asynchronous", train.asynchronous),
            ("importance_sampling_mode", train.importance_sampling_mode is not None),
            ("off_policy_mask_threshold", train.off_policy_mask_threshold is not None),
        )
        if is_used
    ]
    if mode == "raw_logprobs" and shaped and needs and train.algorithm == "grpo":
        raise ConfigError(
            f"train.{needs[0]} needs the logprobs of the distribution that calls are sampled from, with {shaped}, but "
            f"the engine records those of the model itself; {_START}"
        )
    return mode
