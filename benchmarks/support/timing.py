"""Side-by-side timing: variants take turns, so that drift affects all of them alike.

Report medians and ratios of pairs, never a single absolute time.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def in_turn(
    variants: Mapping[str, Callable[[], Any]], repeats: int, calls: int = 1
) -> dict[str, np.ndarray]:
    """Times functions in the order A B C A B C ..., after one warm-up call of each.

    Args:
      variants: Functions without arguments that return JAX arrays to wait for.
      repeats: Number of rounds.
      calls: Number of calls per variant per round, timed together.

    Returns:
      A dictionary from variants to milliseconds per call, shape `[repeats]`.
    """
    for run in variants.values():
        jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            for _ in range(calls):
                result = run()
            jax.block_until_ready(result)
            times[name].append(1e3 * (time.perf_counter() - start) / calls)
    return {name: np.array(values) for name, values in times.items()}


def ratio(times: Mapping[str, np.ndarray], of: str, to: str) -> str:
    """Formats median and quartiles of the ratios of times in the same round."""
    low, middle, high = np.percentile(times[of] / times[to], [25, 50, 75])
    return f"{of} / {to}: {middle:.3f} (quartiles {low:.3f} to {high:.3f})"


def table(times: Mapping[str, np.ndarray]) -> str:
    """Formats median and range of each variant."""
    width = max(map(len, times))
    return "\n".join(
        f"{name:<{width}}  {np.median(t):9.3f} ms  ({t.min():.3f} to {t.max():.3f})"
        for name, t in times.items()
    )


def machine() -> str:
    """Describes versions and devices, for the heading of a report."""
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return f"jax {jax.__version__}, {devices}, {os.cpu_count()} cores"
