"""Several nodes on this machine, for the tests that lose, drain or slow one down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.cluster.needs import needing_this_machine, network_here
from tests.cluster.nodes import Network
from tests.cluster.services import S3


@pytest.fixture
def network() -> Iterator[Network]:
    """Give a network without nodes; skip, saying so, where the machine cannot be divided."""
    with network_here() as net:
        yield net


@pytest.fixture
def s3(network: Network) -> Iterator[S3]:
    """Give an S3 server on the network; skip, saying so, where its packages cannot be installed."""
    with ExitStack() as stack:
        with needing_this_machine():
            server = stack.enter_context(network.s3())
        yield server
