"""Simulates the wall-clock time of a run from its compute times and its messages.

The times are a model, not a measurement. Each worker computes at its own speed, each
message takes a latency plus its size divided by a bandwidth, and each worker waits for
the workers that it receives data from. The model makes it possible to compare
algorithms without synchronization with algorithms that wait for the slowest worker.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

import decentral_jax as dj


class Link(NamedTuple):
    """Latency and bandwidth of one level of the network."""

    latency: float = 0.0  # seconds per collective
    bandwidth: float = math.inf  # bytes sent per second per worker


def finish_times(
    compute: np.ndarray,
    log: Sequence[dj.CommunicationCost],
    levels: Mapping[str, int],
    links: Mapping[str, Link] | None = None,
) -> np.ndarray:
    r"""Computes when each worker finishes each step.

    Let :math:`s_{ti}` be the compute time of worker :math:`i` in step :math:`t`, and
    :math:`N_t(i)` the set of workers whose data it needs, including itself. Then

    .. math::
       c_{t+1,i} = \max_{j \in N_t(i)} (c_{tj} + s_{tj}) + l_t + b_t / B,

    where :math:`l_t` is the latency, :math:`b_t` the number of bytes, and :math:`B` the
    bandwidth. If a step has several collectives, the maximum, latency, and transfer
    time apply to each of them in turn. A worker waits for its senders in a `ppermute`,
    and for all workers along the axis in every other collective.

    Args:
      compute: Compute time in seconds, shape `[steps, n]`.
      log: Communication in each step, as returned by `dj.communication_costs`. If it is
        shorter than the run, it repeats.
      levels: Names and sizes of the worker axes, outermost first.
      links: Latency and bandwidth of each axis. Exchanges on an axis without a link
        take no time. A collective over several axes takes the highest latency and the
        lowest bandwidth.

    Returns:
      Times in seconds, shape `[steps + 1, n]`; the first row is zero.
    """
    links = links or {}
    steps, n = compute.shape
    plans = [[_plan(c, levels, links) for c in cost.collectives] for cost in log]
    clock = np.zeros((steps + 1, n))
    for t in range(steps):
        now = clock[t] + compute[t]
        for needs, seconds in plans[t % len(plans)]:
            # Row i of `needs` lists the workers that worker i waits for, including
            # itself, which also pads the row.
            now = now[needs].max(1) + seconds
        clock[t + 1] = now
    return clock


def _plan(
    collective: dj.Collective, levels: Mapping[str, int], links: Mapping[str, Link]
) -> tuple[np.ndarray, float]:
    """Returns which workers each worker waits for, and the seconds of a collective.

    The workers are an array `[n, width]`. Rows are padded with the worker itself.
    """
    # Duration of the collective.
    axes = collective.axis.split(",")
    of_axes = [links.get(axis, Link()) for axis in axes]
    seconds = collective.count * max(link.latency for link in of_axes)
    seconds += collective.bytes_sent / min(link.bandwidth for link in of_axes)
    # One row per group of workers that differ only in their positions along the axes of
    # the collective.
    numbers = np.arange(math.prod(levels.values())).reshape(tuple(levels.values()))
    positions = [list(levels).index(axis) for axis in axes]
    moved = np.moveaxis(numbers, positions, range(-len(axes), 0))
    groups = moved.reshape(-1, math.prod(levels[axis] for axis in axes))
    # Senders of each member of a group, by position in the group.
    size = groups.shape[1]
    senders: list[list[int]] = [[i] for i in range(size)]
    if collective.kind == "ppermute":
        for sender, receiver in collective.pairs:
            senders[receiver].append(sender)
    else:
        senders = [list(range(size))] * size
    # Pad the lists to equal width, and convert positions to workers in every group.
    width = max(map(len, senders))
    padded = np.array([(s + [i] * width)[:width] for i, s in enumerate(senders)])
    needs = np.empty((numbers.size, width), int)
    needs[groups.ravel()] = groups[:, padded].reshape(-1, width)
    return needs, seconds


def slots_a_step(rates: np.ndarray, steps: int, seed: int = 0) -> np.ndarray:
    r"""Draws the number of time slots per step, if workers must take every step.

    In each time slot, a worker with operating rate :math:`p_i` finishes its step with
    probability :math:`p_i`, so that the number of slots per step has a geometric
    distribution. (If workers may skip steps, every step takes one slot instead.)

    Args:
      rates: Operating rates :math:`p_i`, shape `[n]`.
      steps: Number of steps.
      seed: Seed for the random draws.

    Returns:
      Numbers of slots, shape `[steps, n]`.
    """
    rng = np.random.default_rng(seed)
    return rng.geometric(rates, (steps, len(rates))).astype(float)
