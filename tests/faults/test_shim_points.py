"""A sample of the matrix with a shim of containerd's kind, where containerd-shim-runc-v2 is on PATH.

CRISERVER_TEST_SHIM names another one, by its path. ``E2E_RUNTIME=io.containerd.runc.v2 make faults`` runs all of it.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator

import pytest

from tests.faults.matrix import Matrix, Result, sample, standing
from tests.faults.operations import operations
from tests.support.node import Node, handler

SEED = int(os.environ.get("CRISERVER_FAULT_SEED", "0"))
SHIM = os.environ.get("CRISERVER_TEST_SHIM", "") or shutil.which("containerd-shim-runc-v2") or ""
OPERATIONS = ("StartContainer", "StopContainer", "StopPodSandbox")


@pytest.fixture(scope="module")
def matrix(nothing_left: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    if not SHIM:
        pytest.skip("containerd-shim-runc-v2 is not on PATH, and CRISERVER_TEST_SHIM names none")
    with standing(Node(handler("runc", SHIM)), str(tmp_path_factory.getbasetemp())) as matrix:
        yield matrix


def test_containers_of_the_runtimes_shim(matrix: Matrix) -> None:
    pick, kills = random.Random(SEED), 0
    for operation in (found for found in operations("") if found.name in OPERATIONS):
        point, result = pick.choice(sample(matrix.points(operation), pick)), Result(operation.name, 1)
        matrix.kill(operation, point, result)
        print(f"CRISERVER_FAULT_SEED={SEED}", result)
        assert result.failures == []
        kills += result.kills
    assert kills > len(OPERATIONS) / 2
