"""An empty store of every backend."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from agl.store import Store, open_store
from tests.store.backends import BACKENDS, Backend, NewUri


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shared_uri" in metafunc.fixturenames:
        parametrise(metafunc, [backend for backend in BACKENDS if backend.is_shared])
    elif "old" in metafunc.fixturenames:
        parametrise(metafunc, [backend for backend in BACKENDS if backend.past])
    elif "traffic" in metafunc.fixturenames:  # Where traffic is sampled: by the process that opens the database.
        parametrise(metafunc, [backend for backend in BACKENDS if backend.name != "http"])
    elif "store" in metafunc.fixturenames:
        parametrise(metafunc, list(BACKENDS))


def parametrise(metafunc: pytest.Metafunc, backends: list[Backend]) -> None:
    metafunc.parametrize(
        "new_uri", backends, indirect=True, ids=[backend.name for backend in backends], scope="session"
    )


@pytest.fixture(scope="session")
def new_uri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NewUri]:
    """Makes URIs of stores of one backend, whose server runs for all its tests."""
    backend: Backend = request.param
    with backend.start(tmp_path_factory.mktemp(backend.name)) as new_uri:
        yield new_uri


@pytest.fixture
def store(new_uri: NewUri) -> Iterator[Store]:
    with closing(open_store(new_uri())) as store:
        yield store


@pytest.fixture
def old(request: pytest.FixtureRequest) -> str:
    """Name of the backend in `old_stores.PAST`."""
    backend: Backend = request.node.callspec.params["new_uri"]
    return backend.past


@pytest.fixture
def shared_uri(new_uri: NewUri) -> str:
    """URI of an empty store that may be opened several times."""
    return new_uri()
