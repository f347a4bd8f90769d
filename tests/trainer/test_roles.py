"""Roles that want different things of the same prompt, and hand-offs that cost reward."""

from tests.trainer.toy_team import Team, conflict, earned, routes, separate, shared


def test_adapters_of_their_own_reach_what_a_shared_one_cannot() -> None:
    apart, together = Team(separate(), seed=0), Team(shared(), seed=0)
    assert 0.4 < earned(apart) < 0.6
    for team in (apart, together):
        team.train(conflict, steps=10)
    assert earned(apart) > 0.7
    assert abs(earned(together) - 0.5) < 1e-6


def test_gamma_makes_a_planner_avoid_hand_offs() -> None:
    """Both ways always succeed, so that the discount, which keeps its natural size, is not drowned by luck."""
    patient, hasty = Team(separate(gamma=1.0), seed=0, success=1.0), Team(separate(gamma=0.5), seed=0, success=1.0)
    before = hasty.odd("planner")
    for team in (patient, hasty):
        team.train(routes, steps=15)
    assert hasty.odd("planner") < 0.6 * before
    assert patient.odd("planner") == before
