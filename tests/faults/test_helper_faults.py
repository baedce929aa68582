"""A sample of the matrix of helpers: in each operation one of its helper processes is harmed at one of its points.

``make faults`` tries all of them. CRISERVER_FAULT_SEED chooses.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.faults.helper_matrix import HelperMatrix, helper_node
from tests.faults.matrix import Result
from tests.faults.more_operations import more_operations
from tests.faults.operations import archives, operations

SEED = int(os.environ.get("CRISERVER_FAULT_SEED", "0"))
# A point of a task beside the call is not reached each time. Another one is taken then, so many at most.
TRIES = 5
# The others have no helper that is not among those of these.
SAMPLED = (
    "RunPodSandbox",
    "CreateContainer",
    "StartContainer",
    "StopContainer",
    "StopPodSandbox",
    "ImportImage",
    "ExecSync",
    "UpdateContainerResources",
    "VerifyImages",
    "RunPodSandbox, user namespace",
    "CheckpointContainer",
)


@pytest.fixture(scope="module")
def matrix(nothing_left: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HelperMatrix]:
    base, _ = archives(str(tmp_path_factory.getbasetemp()))
    node = helper_node()
    matrix = HelperMatrix(node)
    try:
        node.start()
        matrix.begin(base)
        yield matrix
    finally:
        matrix.close()
        node.close()


@pytest.mark.parametrize("name", SAMPLED)
def test_a_helper_that_fails_delays_nobody_and_leaves_nothing(
    matrix: HelperMatrix, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    archive = f"{tmp_path_factory.getbasetemp()}/points.tar"
    possible = {found.name: found for found in (*operations(archive), *more_operations(archive, ""))}
    if name not in possible:
        pytest.skip("this takes a criu for this kernel, or the runc of CRISERVER_TEST_RUNC")
    faults = matrix.faults(possible[name])
    result = Result(name, len(faults))
    for point, fault in random.Random(f"{SEED} {name}").sample(faults, min(TRIES, len(faults))):
        matrix.harm(possible[name], point, fault, result)
        print(f"CRISERVER_FAULT_SEED={SEED}", fault, "at", point)
        assert result.failures == []
        if result.by_fault[fault]:
            return
    raise AssertionError(f"{TRIES} points were not reached again")
