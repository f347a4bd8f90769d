"""`benchmarks.thousand` with twenty rollouts at once: real runners, gateway, collector and store server."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from agl.store import Attempt, AttemptState
from benchmarks import simulation
from benchmarks.thousand import Load, faults_of, held_twice, read

CALLS = 4
SMALL = ["--minutes", "0.01", "--rollouts", "20", "--calls", str(CALLS), "--delay-s", "0.5", "--runners", "2"]


def test_no_call_is_lost_when_a_gateway_and_a_collector_are_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.thousand", *SMALL, "--several"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| gateway 2 |" in done.stdout


def test_an_attempt_that_begins_while_another_runs_is_a_fault() -> None:
    ended = Attempt("r1-a1", "r1", 1, "w", AttemptState.UNRESPONSIVE, started_ns=0, heartbeat_ns=5, ended_ns=10)
    later = Attempt("r1-a2", "r1", 2, "w", AttemptState.SUCCEEDED, started_ns=10, heartbeat_ns=15, ended_ns=20)
    assert held_twice([ended, later]) == []
    assert held_twice([ended, replace(later, started_ns=9)]) == ["r1-a2 began while r1-a1 ran"]


def test_every_call_of_every_rollout_is_recorded_with_its_role_and_ids(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.thousand", *SMALL, "--figures", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAULT" not in done.stdout
    (found,) = read(figures).values()
    assert found.rollouts_in_flight >= 10
    assert {"engine", "agl serve", "runner"} <= found.cpu_ms_per_call.keys()
    simulated = simulation.simulate(simulation.this_machine(found, 20), calls=2000)
    assert simulated.rollouts_per_s > 0


def test_a_call_that_is_missing_is_a_fault() -> None:
    load = Load(rollouts=1, calls=CALLS, delay_s=1, runners=1, seconds=1)
    assert faults_of("r2", load, []) == [f"chatcmpl-{number} is recorded 0 times" for number in range(8, 12)]
