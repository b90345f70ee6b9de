"""The simulated deployment of `benchmarks/scale.py`: the real scheduler over a table of step times."""

from __future__ import annotations

from benchmarks.scale import Costs, Shape, Simulation, capacity

SHAPE = Shape(prompt_len=256, shared_len=128, num_shared=4, num_blocks=4)


def test_full_engines_answer_as_many_requests_as_the_arithmetic_says() -> None:
    costs = Costs(door_request=0.0, door_chunk=0.0)
    simulation = Simulation(2, costs, SHAPE, seed=0)
    # More than they can: what is answered is what they carry.
    simulation.run(3 * capacity(costs, SHAPE), 4.0)
    found = len(simulation.requests) / simulation.now
    assert 0.7 < found / (2 * capacity(costs, SHAPE)) < 1.1


def test_a_door_that_is_too_small_is_the_bottleneck() -> None:
    costs = Costs(door_request=0.05, door_chunk=0.01)
    simulation = Simulation(2, costs, SHAPE, seed=0)
    simulation.run(40.0, 3.0)
    assert simulation.door_seconds / simulation.now > 0.9
    assert len(simulation.requests) / simulation.now < 1.05 / (0.05 + 4 * 0.01)


def test_a_lost_engine_loses_no_request() -> None:
    simulation = Simulation(3, Costs(), SHAPE, seed=0)
    simulation.run(60.0, 3.0, lose_at=1.5, lose=1)
    assert simulation.num_again > 0
    assert all(request.ended_at is not None for request in simulation.requests)
    assert all(not request.work.steps for request in simulation.requests)
