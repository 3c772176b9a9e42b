"""From what a run did in each step to the seconds that it would have taken.

A model of time, not a measurement: workers compute at speeds of their own, messages
take a latency and a share of a bandwidth, and a worker that exchanges waits for those
that it exchanges with. With it, algorithms that let nobody wait can be compared with
those that wait for the slowest.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

import decentral_jax as dj


class Link(NamedTuple):
    """What a message costs on one level of the network."""

    latency: float = 0.0  # seconds a collective
    bandwidth: float = math.inf  # bytes a second that a worker sends


def finish_times(
    compute: np.ndarray,
    log: Sequence[dj.CommunicationCost],
    levels: Mapping[str, int],
    links: Mapping[str, Link] | None = None,
) -> np.ndarray:
    r"""When each worker has finished each step.

    With the time :math:`s_{ti}` that worker :math:`i` computes in step :math:`t`, and
    :math:`N_t(i)` the workers whose data it needs (itself among them),

    .. math::
       c_{t+1,i} = \max_{j \in N_t(i)} (c_{tj} + s_{tj}) + l_t + b_t / B,

    once for each kind of collective of the step: a `ppermute` needs its senders, every
    other collective all workers along its axis.

    Args:
      compute: Seconds, shape `[steps, n]`.
      log: What is sent in each step, as `dj.communication_costs` counts it; repeats.
      levels: The worker axes and their sizes, the outermost first.
      links: Latency :math:`l` and bandwidth :math:`B` of each axis; of several axes at
        once, the slowest counts. What is missing costs nothing.

    Returns:
      Seconds, shape `[steps + 1, n]`, from zeros.
    """
    links = links or {}
    steps, n = compute.shape
    plans = [[_plan(c, levels, links) for c in cost.collectives] for cost in log]
    clock = np.zeros((steps + 1, n))
    for t in range(steps):
        now = clock[t] + compute[t]
        for needs, seconds in plans[t % len(plans)]:
            # `needs` holds, a row a worker, whom it waits for, padded with itself.
            now = now[needs].max(1) + seconds
        clock[t + 1] = now
    return clock


def _plan(
    collective: dj.Collective, levels: Mapping[str, int], links: Mapping[str, Link]
) -> tuple[np.ndarray, float]:
    """Whom each worker waits for, `[n, most]`, and what the exchange takes."""
    axes = collective.axis.split(",")
    of_axes = [links.get(axis, Link()) for axis in axes]
    seconds = collective.count * max(link.latency for link in of_axes)
    seconds += collective.bytes_sent / min(link.bandwidth for link in of_axes)
    numbers = np.arange(math.prod(levels.values())).reshape(tuple(levels.values()))
    taking_part = [list(levels).index(axis) for axis in axes]
    # A row a group: workers that differ only in their place along the axes.
    moved = np.moveaxis(numbers, taking_part, range(-len(axes), 0))
    groups = moved.reshape(-1, math.prod(levels[axis] for axis in axes))
    size = groups.shape[1]
    senders: list[list[int]] = [[i] for i in range(size)]
    if collective.kind == "ppermute":
        for sender, receiver in collective.pairs:
            senders[receiver].append(sender)
    else:
        senders = [list(range(size))] * size
    most = max(map(len, senders))
    padded = np.array([(s + [i] * most)[:most] for i, s in enumerate(senders)])
    needs = np.empty((numbers.size, most), int)
    needs[groups.ravel()] = groups[:, padded].reshape(-1, most)
    return needs, seconds


def slots_a_step(rates: np.ndarray, steps: int, seed: int = 0) -> np.ndarray:
    r"""Time slots that each step of a worker takes, if it must be taken.

    A worker of operating rate :math:`p_i` finishes a step in a slot with probability
    :math:`p_i`, so that a step takes a geometric number of slots. Of an algorithm in
    which nobody waits, every step takes one slot, and may be none.

    Args:
      rates: :math:`p_i`, shape `[n]`.
      steps: The number of steps.
      seed: Of the draws.

    Returns:
      Slots, shape `[steps, n]`.
    """
    rng = np.random.default_rng(seed)
    return rng.geometric(rates, (steps, len(rates))).astype(float)
