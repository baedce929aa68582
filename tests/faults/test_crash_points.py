"""A sample of the matrix: every operation, with a SIGKILL and with an error at each of its places once.

``make faults`` runs all of it. A place is passed several times; CRISERVER_FAULT_SEED says which of the times is taken,
and is printed where a test fails. Of a start-up a few points are taken, as each takes two starts.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.faults.matrix import Matrix, Result, errors_of, sample
from tests.faults.operations import archives, operations
from tests.support.fixtures import import_image
from tests.support.node import Node

SEED = int(os.environ.get("CRISERVER_FAULT_SEED", random.randrange(1 << 32)))
STARTS = 5


@pytest.fixture(scope="module")
def matrix(nothing_left: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    base, _ = archives(str(tmp_path_factory.getbasetemp()))
    node = Node()
    try:
        matrix = Matrix(node)
        node.start()
        import_image(node, base)
        matrix.begin()
        yield matrix
    finally:
        node.close()


@pytest.mark.parametrize("number", range(len(operations(""))), ids=[found.name for found in operations("")])
def test_nothing_is_lost_and_nothing_left(
    matrix: Matrix, number: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    operation = operations(f"{tmp_path_factory.getbasetemp()}/points.tar")[number]
    pick = random.Random(SEED)
    chosen = sample(matrix.points(operation), pick)
    result = Result(operation.name, len(chosen))
    for point in chosen:
        matrix.kill(operation, point, result)
        if errors := errors_of(point):
            matrix.error(operation, point, pick.choice(errors), result)
    print(f"CRISERVER_FAULT_SEED={SEED}", result)
    assert result.failures == []
    assert result.kills > len(chosen) / 2


def test_a_start_up_after_a_crash(matrix: Matrix) -> None:
    pick = random.Random(SEED)
    points = matrix.points_of_start()
    result = Result("start-up", len(points))
    for point in pick.sample(points, STARTS):
        matrix.fail_start(point, pick.choice((0, *errors_of(point))), result)
    print(f"CRISERVER_FAULT_SEED={SEED}", result)
    assert result.failures == []
    assert result.kills + result.errors > STARTS / 2
