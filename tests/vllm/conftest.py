from collections.abc import Iterator

import pytest

from agl_trainer.model.model_folder import model_folder
from tests.vllm.serving import serve_vllm

BASE = "smollm2"


@pytest.fixture(scope="session")
def vllm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of real vLLM with SmolLM2-135M-Instruct and no adapter loaded."""
    with serve_vllm(model_folder(BASE), BASE, tmp_path_factory.mktemp("vllm") / "vllm.log") as url:
        yield url
