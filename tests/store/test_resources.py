"""The store's contract: versioned resources with leases, and metrics."""

import math
import threading
import time

import pytest

from agl.errors import StoreError
from agl.store import Resource, Store
from tests.store.spans import make_span


def test_resources_have_versions_and_the_newest_is_the_default(store: Store) -> None:
    store.put_resource(Resource("writer", 0, "adapters/writer/0"))
    store.put_resource(Resource("writer", 1, "wrong"))
    store.put_resource(Resource("writer", 1, "adapters/writer/1", {"step": 1}))
    assert store.get_resource("writer") == Resource("writer", 1, "adapters/writer/1", {"step": 1})
    assert store.get_resource("writer", 0) == Resource("writer", 0, "adapters/writer/0")
    assert store.get_resource("writer", 2) is None
    assert store.get_resource("fixer") is None


def test_of_several_who_add_a_version_one_succeeds_and_all_learn_which(store: Store) -> None:
    added: list[Resource] = []
    callers = [
        threading.Thread(target=lambda by=by: added.append(store.add_resource(Resource("claim", 3, "", {"by": by}))))
        for by in range(4)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert added == [store.get_resource("claim", 3)] * 4
    store.put_resource(Resource("claim", 3, "", {"by": "put"}))
    assert store.add_resource(Resource("claim", 3, "late")).metadata == {"by": "put"}


def test_metrics_come_back_by_name_and_step(store: Store) -> None:
    store.append_metrics("run", 2, {"reward": 0.5, "loss": math.nan})
    store.append_metrics("run", 1, {"reward": 9})
    store.append_metrics("run", 1, {"reward": 0.25})
    store.append_metrics("other", 1, {"reward": -1})
    found = store.query_metrics("run")
    assert found["reward"] == [(1, 0.25), (2, 0.5)]
    assert found["loss"][0][0] == 2 and math.isnan(found["loss"][0][1])
    assert set(found) == {"reward", "loss"}


def test_a_closed_store_says_so(store: Store) -> None:
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.append_spans([make_span(1)])
    with pytest.raises(StoreError, match="closed"):
        store.count_spans()
    store.close()


# --- Leases ----------------------------------------------------------------------------------------------------------


def put_versions(store: Store, count: int) -> None:
    for version in range(count):
        store.put_resource(Resource("writer", version, f"adapters/writer/{version}"))


def collected(store: Store, keep: int = 1, *, in_s: float = 0) -> list[int]:
    """Versions that `collect_resources` deletes as of `in_s` seconds from now."""
    found = store.collect_resources("writer", keep, now_ns=time.time_ns() + int(in_s * 1e9))
    return [resource.version for resource in found]


def test_old_versions_are_collected_and_the_newest_stay(store: Store) -> None:
    put_versions(store, 4)
    store.put_resource(Resource("other", 0, "adapters/other/0"))
    assert store.collect_resources("writer", keep=2) == [
        Resource("writer", 0, "adapters/writer/0"),
        Resource("writer", 1, "adapters/writer/1"),
    ]
    assert collected(store, keep=2) == []
    assert (store.get_resource("writer", 1), store.lease_resource("writer", "late", 60, 1)) == (None, None)
    assert store.get_resource("writer", 2) is not None
    assert store.get_resource("other") is not None


def test_leased_versions_are_not_collected(store: Store) -> None:
    put_versions(store, 4)
    assert store.lease_resource("writer", "engine-1", 60, 1) == Resource("writer", 1, "adapters/writer/1")
    store.lease_resource("writer", "engine-1", 60, 2)
    store.lease_resource("writer", "engine-2", 60, 2)
    assert collected(store) == [0]
    store.release_resource("writer", "engine-1", 1)
    store.release_resource("writer", "engine-1", 2)
    store.release_resource("writer", "engine-1", 2)
    assert collected(store) == [1]  # Another still holds 2.
    store.release_resource("writer", "engine-2", 2)
    assert collected(store) == [2]


def test_a_lease_expires_unless_it_is_renewed(store: Store) -> None:
    put_versions(store, 3)
    store.lease_resource("writer", "dead", 10, 0)
    store.lease_resource("writer", "alive", 10, 1)
    store.lease_resource("writer", "alive", 10, 1, now_ns=time.time_ns() + 10**10)
    assert collected(store, in_s=9) == []
    assert collected(store, in_s=11) == [0]
    assert collected(store, in_s=21) == [1]


def test_the_newest_version_is_leased_by_default(store: Store) -> None:
    assert store.lease_resource("writer", "engine", 60) is None
    put_versions(store, 2)
    leased = store.lease_resource("writer", "engine", 60)
    assert leased is not None and leased.version == 1
    put_versions(store, 3)
    assert collected(store) == [0]


def test_resources_are_listed_by_name_and_version(store: Store) -> None:
    assert store.query_resources() == []
    names = ("b%/x", "b_/x", "a")
    made = [Resource(name, version, f"{name}-{version}", {"n": version}) for name in names for version in (0, 1)]
    for resource in reversed(made):
        store.put_resource(resource)
    store.lease_resource("a", "worker", 60)
    assert store.query_resources() == [*made[4:], *made[:4]]
    assert store.query_resources("b%") == made[:2]
    assert store.query_resources("c") == []
