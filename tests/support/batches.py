"""Batches for the tests of the engine."""

import itertools
import time

import numpy as np


def target(worker, index):
    """A batch that identifies its worker and index."""
    return np.array([worker, index, worker * index], np.float32) / 8


def endless(worker, seconds=0.0):
    for index in itertools.count():
        time.sleep(seconds)
        yield target(worker, index)
