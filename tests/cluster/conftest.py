"""A network of nodes for the tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.needs import network_here
from tests.cluster.nodes import Network


@pytest.fixture
def network() -> Iterator[Network]:
    """Give a network without nodes; skip, saying so, where the machine cannot be divided."""
    with network_here() as net:
        yield net
