"""Several nodes on this machine, for the tests that lose, drain or slow one down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.cluster.nodes import CannotBuild, Network
from tests.cluster.services import S3


@pytest.fixture
def network() -> Iterator[Network]:
    """Give a network without nodes; skip, saying so, where the machine cannot be divided."""
    with ExitStack() as stack:
        try:
            net = stack.enter_context(Network())
        except CannotBuild as reason:
            # namespaces take root and iproute2: nothing that a package index has, and without them
            # there is no second node to lose
            pytest.skip(str(reason))
        yield net


@pytest.fixture
def s3(network: Network) -> Iterator[S3]:
    """Give an S3 server on the network; skip, saying so, where its packages cannot be installed."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(network.s3())
        except CannotBuild as reason:
            # moto needs the package index at test time: it is no dependency of ours
            pytest.skip(str(reason))
        yield server
