"""Projects: each has a store of its own in every backend, and one id in two projects is two rollouts."""

from collections.abc import Iterator
from contextlib import closing

import pytest

from agl.errors import StoreError, UnknownIdError
from agl.secret_url import SecretUrl
from agl.server.auth import BearerTokens, Grant
from agl.server_thread import ServerThread
from agl.store import AttemptState, Resource, Rollout, RolloutState, Store, open_store, opened_projects, sqlite_path
from agl.store.project import database_name, split_project, uri_of_project
from tests.store.backends import BACKENDS, NewUri
from tests.store.conftest import parametrise
from tests.store.spans import answered, asked, make_span, numbers

NAMES = ("default", "blue")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "of_projects" in metafunc.fixturenames:
        parametrise(metafunc, list(BACKENDS))


@pytest.fixture
def of_projects(new_uri: NewUri) -> Iterator[list[Store]]:
    """An empty store of each of NAMES in one place; through the API each with a token of its project."""
    uri = new_uri()
    if uri.startswith("http"):
        grants = {f"token-{name}": Grant(project=name) for name in NAMES}
        with (
            closing(open_store("memory://")) as store,
            ServerThread(store, port=0, otlp_http_port=0, tokens=BearerTokens(grants)) as server,
        ):
            stores = [open_store(server.base_url.replace("://", f"://{token}@")) for token in grants]
            yield stores
            for each in stores:
                each.close()
        return
    with closing(open_store(uri)) as store, opened_projects(store, NAMES) as stores:
        yield [stores[name] for name in NAMES]


def test_what_is_of_one_project_no_other_can_find_change_join_or_delete(of_projects: list[Store]) -> None:
    for number, store in enumerate(of_projects):
        store.enqueue_rollouts([Rollout("r", number, group_id="g")])
        store.append_spans([make_span(2), make_span(1, rollout="r", start_ns=number)])
        store.put_resource(Resource("planner", 0, f"adapter of {number}"))
        store.append_metrics("run", 1, {"loss": number})
    for number, store in enumerate(of_projects):
        found = store.get_rollout("r")
        assert found is not None and found.input == number and store.query_rollouts("g") == [found]
        assert [(span.name, span.start_ns) for span in store.query_spans("r")] == [("span 2", 0), ("span 1", number)]
        assert (store.count_spans(), store.rollout_ids(), store.last_rollout_id()) == (2, ["r"], "r")
        resource = store.get_resource("planner")
        assert resource is not None and resource.uri == f"adapter of {number}"
        assert store.query_metrics("run") == {"loss": [(1, number)]}

    first, second = of_projects
    assert first.lease_rollout("worker") is not None
    with pytest.raises(UnknownIdError):
        second.heartbeat(["r-a1"])
    assert second.end_overdue_attempts() == [] and second.query_attempts("r") == []
    first.finish_attempt("r-a1", AttemptState.SUCCEEDED)
    first.enqueue_rollouts([Rollout("more", None)])
    assert second.get_rollout("more") is None
    with pytest.raises(UnknownIdError):
        second.cancel_rollouts(["more"])
    second.append_spans([asked(3, "a", rollout="r")])
    first.append_spans([answered(4, "a")])
    assert [numbers(store.query_spans("r")) for store in of_projects] == [[1, 2], [1, 2, 3]]
    first.collect_resources("planner", keep=0)
    assert first.gc(max_bytes=0).rollouts == 1
    assert second.count_rollouts()[RolloutState.QUEUED] == 1 and numbers(second.query_spans("r")) == [1, 2, 3]
    assert second.get_resource("planner") is not None


def test_the_project_in_a_uri_is_read_shown_and_checked() -> None:
    server = "postgresql://u:secret@h/d?sslmode=require&project=blue"
    assert split_project(server) == ("postgresql://***@h/d?***", "blue")
    assert split_project(server)[0].secret == "postgresql://u:secret@h/d?sslmode=require"
    assert str(SecretUrl(server)) == "postgresql://***@h/d?***&project=blue"
    assert uri_of_project(server, "red").secret == "postgresql://u:secret@h/d?sslmode=require&project=red"
    assert uri_of_project(uri_of_project("memory://", "red"), "blue") == "memory://?project=blue"
    assert split_project("sqlite:///a?b.db") == ("sqlite:///a?b.db", "default")
    path = sqlite_path("sqlite:////tmp/runs/agl.db?project=blue")
    assert path is not None and (path.parent.name, path.name[:9], path.suffix) == ("runs", "agl.blue_", ".db")
    for bad in ("memory://?project=../up", "memory://?project=", "memory://?project=a&project=b"):
        with pytest.raises(StoreError, match="expected one project"):
            open_store(bad)
    with pytest.raises(StoreError, match="whose token decides the project"):
        open_store("http://127.0.0.1:1?project=blue")


def test_no_two_projects_have_one_database() -> None:
    alike = ["blue", "Blue", "team-a", "team_a", "team.a", "x" * 64, "x" * 63 + "y", "default"]
    names = {database_name("agl", project).lower() for project in alike}
    assert len(names) == len(alike) and max(map(len, names)) <= len("agl") + 24
    assert database_name("agl", "default") == "agl"
