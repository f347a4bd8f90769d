"""Which base models are taken, and what a refusal says."""

from pathlib import Path

import pytest
from transformers import Gemma2Config, MistralConfig, Qwen2Config

from agl.errors import ConfigError
from agl_trainer.models import check_supported, model_folder


def test_a_missing_model_is_named_with_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*smollm2.*config.json"):
        model_folder(str(tmp_path / "nowhere"))


def test_a_sliding_window_is_refused_where_rows_are_longer_than_it() -> None:
    check_supported(MistralConfig(sliding_window=4096), 2048)
    with pytest.raises(ConfigError, match=r"mistral.*sliding_window=1024"):
        check_supported(MistralConfig(sliding_window=1024), 2048)


def test_a_window_that_is_switched_off_is_no_window() -> None:
    check_supported(Qwen2Config(sliding_window=16, use_sliding_window=False), 2048)


def test_capped_logits_are_refused() -> None:
    with pytest.raises(ConfigError, match="attn_logit_softcapping"):
        check_supported(Gemma2Config(), 2048)
