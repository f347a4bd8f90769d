"""The simulation of many machines, compared with queues whose rates are known."""

import pytest

from benchmarks.simulation import DELAY, Network, Station, bound, simulate

MACHINE_REPAIR = Network(2, 1, [Station(DELAY, 2, 1.0), Station("repair", 1, 1.0)])
"""Two machines that run for 1 s and are repaired in 1 s, one at a time.

By mean value analysis: with one machine the repair takes 1 s, at a rate of 1/2, so half a machine is there. With two it
takes 1 * (1 + 1/2) = 1.5 s, so that the rate is 2 / (1 + 1.5) = 0.8, which is also the share of time that it works.
"""
SHARED = Network(50, 2, [Station("a", 4, 0.1, on_cores=True), Station("b", 1, 0.3, on_cores=True)], cores=1)
"""More than enough rollouts for one core, of which each needs 2 * (0.1 + 0.3) s."""
TRAINED = Network(50, 2, [Station(DELAY, 50, 0.1)], at_end=[Station("trainer", 1, 0.5)])


@pytest.mark.parametrize(
    ("network", "rate", "bottleneck"),
    [(MACHINE_REPAIR, 0.8, "rollouts in flight"), (SHARED, 1.25, "cores"), (TRAINED, 2.0, "trainer")],
)
def test_a_network_has_the_rate_of_the_theory(network: Network, rate: float, bottleneck: str) -> None:
    outcome = simulate(network, calls=20_000)
    assert outcome.rollouts_per_s == pytest.approx(rate, rel=0.05)
    assert outcome.bottleneck == bottleneck
    assert bound(network) >= rate


def test_the_repair_works_for_four_fifths_of_the_time() -> None:
    assert simulate(MACHINE_REPAIR, calls=20_000).busy["repair"] == pytest.approx(0.8, rel=0.05)
