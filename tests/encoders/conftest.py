"""Quick tests of encoders compile without optimising: it takes half the time. Thorough and slow ones optimise."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def unoptimised(request: pytest.FixtureRequest) -> Iterator[None]:
    quick = not any(request.node.get_closest_marker(tier) for tier in ("thorough", "slow"))
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
