"""Units of work for test processes that run side by side: pytest-xdist gives each unit to one process, in one piece."""

import re

from xdist.scheduler import LoadScopeScheduling

from tests.store.backends import BACKENDS

LONGEST = (
    "tests/store/test_cassandra.py",
    "tests/flows/test_training.py",
    "cassandra",
    "tests/gateway/test_clients.py",
    "tests/deploy/test_images.py",
    "tests/flows/test_ray.py",
    "tests/foreign/test_trajectories.py",
    "tests/flows/test_demo.py",
    "tests/flows/test_docs.py",
    "tests/langchain/test_oldest.py",
    "tests/trainer/test_pretend_accelerator.py",
    "tests/core/cli/test_cli.py",
    "tests/trainer/compute/test_devices.py",
    "tests/trainer/engine/test_vllm_engine.py",
    "tests/autogen/test_oldest.py",
    "tests/queue/test_faults.py",
    "tests/store/test_faults.py",
    "tests/trainer/model/test_model_folder.py",
    "tests/flows/test_interrupt.py",
    "tests/trainer/model/test_compiled.py",
    "tests/flows/test_correctness.py",
    "tests/core/test_imports_alone.py",
)
"""Units that take longest. Processes begin with them, so that all end at about the same time."""

_PLACES = {unit: place for place, unit in enumerate(LONGEST)}
_BACKENDS = {backend.name for backend in BACKENDS}


def unit_of(nodeid: str) -> str:
    """The unit of a test: its file or, for a test of the store's contract, its backend, whose server is shared."""
    file, _, test = nodeid.partition("::")
    backends = _BACKENDS.intersection(re.split(r"[\[\]-]", test)) if file.startswith("tests/store/") else ()
    return next(iter(backends), file)


def place_of(nodeid: str) -> int:
    """Sort key that puts the longest units first."""
    return _PLACES.get(unit_of(nodeid), len(_PLACES))


class UnitScheduling(LoadScopeScheduling):
    """Gives each process the next unit when it is done with its units."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)
