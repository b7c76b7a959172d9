"""What the tests on nodes need of a machine, and the one place that skips where it lacks it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.cluster.machines import leftovers
from tests.cluster.nodes import CannotBuild, Network


@contextmanager
def needing_this_machine() -> Iterator[None]:
    """Skip, saying so, where the machine cannot be divided into nodes, or a service not be made."""
    try:
        yield
    except CannotBuild as reason:
        # namespaces take root and iproute2, MLflow's store Debian's PostgreSQL, and moto, no
        # dependency of ours, the package index at test time: without them there is no second node
        # and no service to test anything on
        pytest.skip(str(reason))


@contextmanager
def network_here() -> Iterator[Network]:
    """Give a network without nodes, which leaves nothing; skip where the machine cannot."""
    with ExitStack() as stack:
        with needing_this_machine():
            net = stack.enter_context(Network())
        yield net
    assert not leftovers(net.token)
