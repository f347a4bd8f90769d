"""Two effects of roles: separate adapters when rewards conflict, and gamma when hand-offs cost nothing otherwise.

.venv/bin/python -m benchmarks.roles 0 1 2

Trains the team of `tests.trainer.toy_team` with 64 rollouts per step. Prints Markdown with a row for each seed.
"""

import agl_trainer  # noqa: F401  # before torch, which reads how long an idle thread spins

# isort: split
import argparse

from tests.trainer.toy_team import Team, conflict, earned, routes, separate, shared

STEPS = 40
GAMMAS = (1.0, 0.9, 0.85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=int, nargs="+")
    arguments = parser.parse_args()
    ways = [f"three hand-offs, gamma {gamma}" for gamma in GAMMAS]
    print(f"| seed | reward before | separate adapters | one adapter | {' | '.join(ways)} |")
    print(f"|---:|{'---:|' * (3 + len(ways))}")
    for seed in arguments.seeds:
        print(_row(seed), flush=True)


def _row(seed: int) -> str:
    before = earned(Team(separate(), seed))
    rewards = [_trained(Team(roles, seed)) for roles in (separate(), shared())]
    chosen = [_routed(Team(separate(gamma), seed)) for gamma in GAMMAS]
    return f"| {seed} | {' | '.join(f'{value:.3f}' for value in (before, *rewards, *chosen))} |"


def _trained(team: Team) -> float:
    team.train(conflict, STEPS)
    return earned(team)


def _routed(team: Team) -> float:
    """Probability that the trained planner chooses the route with three hand-offs."""
    team.train(routes, STEPS)
    return team.odd("planner")


if __name__ == "__main__":
    main()
