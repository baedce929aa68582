"""A sample of the matrix: the daemon is killed once at each place that any operation passes.

``make faults`` runs all of it, and the errors. A place is passed several times; CRISERVER_FAULT_SEED says which of the
times is taken. Of a start-up a few points are taken, as each takes two starts. Of the calls of a plugin of the node
(NRI) two are taken.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.faults.matrix import Matrix, Result, errors_of, sample, standing
from tests.faults.operations import operations
from tests.faults.plugged import WITH_PLUGIN
from tests.support.node import Node

SEED = int(os.environ.get("CRISERVER_FAULT_SEED", "0"))
STARTS = 3
PLUGGED = 2


@pytest.fixture(scope="module")
def matrix(nothing_left: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    with standing(Node(), str(tmp_path_factory.getbasetemp())) as matrix:
        yield matrix


@pytest.fixture(scope="module")
def killed() -> set[str]:
    """The places at which an operation before has been killed."""
    return set()


def place(point: str) -> str:
    """A point without the number of the time."""
    return point.partition("#")[0]


PLAIN = [found.name for found in operations("") if not found.name.endswith(WITH_PLUGIN)]


@pytest.mark.parametrize("number", range(len(PLAIN)), ids=PLAIN)
def test_nothing_is_lost_and_nothing_left(
    matrix: Matrix, killed: set[str], number: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    operation = operations(f"{tmp_path_factory.getbasetemp()}/points.tar")[number]
    pick = random.Random(SEED)
    chosen = [point for point in sample(matrix.points(operation), pick) if place(point) not in killed]
    killed.update(map(place, chosen))
    result = Result(operation.name, len(chosen))
    for point in chosen:
        matrix.kill(operation, point, result)
    print(f"CRISERVER_FAULT_SEED={SEED}", result)
    assert result.failures == []
    # Some are those of tasks beside the call, which a busy machine does later.
    assert result.missed <= max(2, len(chosen) // 2)


def test_a_plugin_of_the_node_is_called(matrix: Matrix) -> None:
    pick = random.Random(SEED)
    found = [operation for operation in operations("") if operation.name.endswith(WITH_PLUGIN)]
    for operation in pick.sample(found, PLUGGED):
        points = [point for point in matrix.points(operation) if point.startswith("nri:")]
        result = Result(operation.name, len(points))
        matrix.kill(operation, pick.choice(points), result)
        print(f"CRISERVER_FAULT_SEED={SEED}", result)
        assert result.failures == []
        assert result.kills == 1


def test_a_start_up_after_a_crash(matrix: Matrix) -> None:
    pick = random.Random(SEED)
    points = matrix.points_of_start()
    result = Result("start-up", len(points))
    for point in pick.sample(points, STARTS):
        matrix.fail_start(point, pick.choice((0, *errors_of(point))), result)
    print(f"CRISERVER_FAULT_SEED={SEED}", result)
    assert result.failures == []
    assert result.kills + result.errors > STARTS / 2
