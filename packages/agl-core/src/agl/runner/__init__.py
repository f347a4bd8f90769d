"""Runs agents for rollouts, in a training's own process or in `agl runner`. It needs neither torch nor agl-trainer."""
