"""The store's contract: versioned resources with leases, and metrics."""

import hashlib
import math
import threading
import time
from pathlib import Path

import pytest

from agl.errors import DamageError, FolderError, InputError, StoreError, UnknownIdError
from agl.store import Resource, Store
from agl.store.files import content_digest, digest_of, fetch, publish
from agl.store.protocol import MAX_PART_BYTES
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


# --- Files -----------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make_folder(folder: Path, **files: bytes) -> Path:
    for name, data in files.items():
        path = folder / name.replace("_in_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def test_folders_travel_in_parts_and_end_with_their_version(store: Store, tmp_path: Path) -> None:
    large = bytes(range(256)) * (MAX_PART_BYTES // 256) + b"rest"
    folder = make_folder(tmp_path / "a", large=large, empty=b"", deep_in_config=b"{}")
    publish(store, "writer", 3, folder, {"step": 3})
    found = store.get_resource("writer")
    assert found is not None and found.metadata["step"] == 3
    assert [len(parts) for _, parts in sorted(found.metadata["files"].items())] == [1, 0, 2]
    make_folder(tmp_path / "b", old=b"of an earlier fetch")
    fetch(store, found, tmp_path / "b")
    assert tree(tmp_path / "b") == tree(folder)
    newer = publish(store, "writer", 4, make_folder(tmp_path / "c", deep_in_config=b"{}"))
    assert content_digest(newer) != content_digest(found)
    store.collect_resources("writer")
    part = digest_of(b"{}")
    assert store.get_resource_part("writer", 3, part) is None and store.get_resource_part("writer", 4, part) == b"{}"
    with pytest.raises(StoreError, match=r"part \w+ of deep/config of writer@3 in .* is missing: its version was"):
        fetch(store, found, tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_parts_that_are_not_what_they_should_be_are_refused(store: Store) -> None:
    store.put_resource(Resource("writer", 1, ""))
    for version, digest, data, error, expected in (
        (1, digest_of(b"x"), b"y", InputError, r"a part of writer@1 is not of the digest '2d71"),
        (1, "../x", b"x", InputError, "is not of the digest"),
        (1, digest_of(bytes(MAX_PART_BYTES + 1)), bytes(MAX_PART_BYTES + 1), InputError, "has 1048577 bytes, at most"),
        (2, digest_of(b"x"), b"x", UnknownIdError, "no version 2 of the resource 'writer'"),
    ):
        with pytest.raises(error, match=expected):
            store.put_resource_part("writer", version, digest, data)
    for _ in range(2):
        store.put_resource_part("writer", 1, digest_of(b"x"), b"x")
    assert store.get_resource_part("writer", 1, digest_of(b"x")) == b"x"


def test_a_damaged_part_and_a_full_disk_leave_no_folder(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = publish(store, "writer", 1, make_folder(tmp_path / "a", first=b"1", second=b"2"))
    target = tmp_path / "folders" / "b"
    (tmp_path / "file").write_bytes(b"")
    for name, folder, error, expected in (
        ("../outside", target, StoreError, r"writer@1 has the file '\.\./outside', which is not in its folder"),
        ("first", tmp_path / "file" / "b", FolderError, r"cannot write the files of writer@1 to .*: File exists"),
    ):
        moved = Resource("writer", 1, "", {"files": {name: [digest_of(b"1")]}})
        with pytest.raises(error, match=expected):
            fetch(store, moved, folder)
    with monkeypatch.context() as damaged:
        damaged.setattr(type(store), "get_resource_part", lambda *_: b"1")
        with pytest.raises(DamageError, match=r"of second of writer@1 .* is damaged: its SHA-256 is 6b86"):
            fetch(store, resource, target)
    assert [*target.parent.iterdir()] == []
