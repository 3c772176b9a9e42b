"""`docs/examples/asynchronous_ray.py` by hand: Ray actors and `ray.wait`."""

import os

# Ray listens on loopback only, and does not report its use.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import functools
import threading
import time
from typing import Any

import jax
import numpy as np
import optax
import ray

from benchmarks.examples import load
from decentral_jax import engine

example = load("asynchronous_ray")

SHARED = ("MLP", "load_digits", "batches", "loss_fn", "create", "test_accuracy")

ROUND = 60  # gradients per step that the benchmark measures

optimizer = optax.adam(example.RATE)


def gradient_of(graphdef):
    """Returns the gradient function of parameters and a batch."""
    return jax.grad(functools.partial(example.loss_fn, graphdef=graphdef))


class Worker:
    """A process that computes gradients."""

    def __init__(self, index):
        graphdef, params = example.create()
        self.gradient = jax.jit(gradient_of(graphdef))
        self.batches = example.batches(index)
        # Compile, and draw the first batch, before the clock starts.
        self.batch = next(self.batches)
        jax.block_until_ready(self.gradient(params, self.batch))

    def ready(self):
        """Returns when the worker has started."""

    def compute(self, params):
        """Returns the gradient of the next batch."""
        batch = next(self.batches) if self.batch is None else self.batch
        self.batch = None
        return jax.device_get(self.gradient(params, batch))


@jax.jit
def apply(params, opt_state, grads):
    """Takes a step with the mean of several gradients."""
    grads = jax.tree.map(lambda *g: sum(g) / len(g), *grads)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def start_workers():
    """Starts Ray and the workers."""
    if not ray.is_initialized():
        ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1")
    actor: Any = ray.remote(Worker).options(num_cpus=0.1)
    workers = [actor.remote(index) for index in range(example.NUM_WORKERS)]
    ray.get([worker.ready.remote() for worker in workers], timeout=300)
    return workers


def asynchronous(workers):
    """Applies gradients as they arrive, and yields the parameters after each step."""
    _, params = example.create()
    opt_state = optimizer.init(params)
    pending = {worker.compute.remote(params): worker for worker in workers}
    while True:
        done, _ = ray.wait(list(pending))
        worker = pending.pop(done[0])
        params, opt_state = apply(params, opt_state, [ray.get(done[0])])
        pending[worker.compute.remote(jax.device_get(params))] = worker
        yield params


def synchronous(workers):
    """Applies means of one gradient per worker, and yields the parameters."""
    _, params = example.create()
    opt_state = optimizer.init(params)
    while True:
        sent = ray.put(jax.device_get(params))
        grads = ray.get([worker.compute.remote(sent) for worker in workers])
        params, opt_state = apply(params, opt_state, grads)
        yield params


def train(method, gradients_per_step):
    """Trains, prints the results, and returns the test accuracy and the seconds."""
    workers = start_workers()
    runs, applied, start = method(workers), 0, time.perf_counter()
    while applied < example.GRADIENTS:
        params = next(runs)
        applied += gradients_per_step
        rate = applied / (time.perf_counter() - start)
        if applied % 60 == 0:
            print(f"  {applied} gradients, {rate:.1f} per second")
    seconds = time.perf_counter() - start
    for worker in workers:
        ray.kill(worker)
    accuracy = example.test_accuracy(params, example.create()[0])
    print(
        f"{method.__name__}: {seconds:.1f} s, {applied / seconds:.0f} gradients per "
        f"second, test accuracy {accuracy:.3f}"
    )
    return accuracy, seconds


def main() -> float:
    """Trains in both ways, and returns the accuracy of the asynchronous run."""
    accuracy, seconds = train(asynchronous, 1)
    _, synchronous_seconds = train(synchronous, example.NUM_WORKERS)
    ratio = synchronous_seconds / seconds
    print(f"synchronous training takes {ratio:.1f} times as long")
    return accuracy


def single_worker() -> float:
    """Trains one worker with as many gradients of the same batch size, none stale."""
    without_waiting()
    graphdef, params = example.create()
    worker, opt_state = Worker(0), optimizer.init(params)
    for _ in range(example.GRADIENTS):
        params, opt_state = apply(params, opt_state, [worker.compute(params)])
    return example.test_accuracy(params, graphdef)


def steps():
    """Compares the programs, and returns functions that apply 60 gradients each.

    The workers don't sleep, so that the times show the programs' own overhead. Arrivals
    are random, so the comparison replays those of a run of the example by hand.
    """
    without_waiting()
    compare(num_gradients=30)
    theirs = asynchronous(start_workers())

    def their_round():
        for _ in range(ROUND):
            params = next(theirs)
        jax.block_until_ready(params)

    return our_rounds(), their_round


def without_waiting():
    """Makes the workers compute without sleeping."""
    vars(example)["SECONDS"] = (0.0,) * example.NUM_WORKERS


def compare(num_gradients):
    """Checks that the example and this program compute the same from equal arrivals."""
    graphdef, params = example.create()
    run = engine.run(
        gradient_of(graphdef),
        params,
        example.batches,
        optimizer,
        num_gradients,
        num_workers=example.NUM_WORKERS,
    )
    workers = [Worker(index) for index in range(example.NUM_WORKERS)]
    received = [params] * example.NUM_WORKERS
    opt_state = optimizer.init(params)
    assert run.trace is not None
    for index in run.trace.workers:
        grads = workers[index].compute(received[index])
        params, opt_state = apply(params, opt_state, [grads])
        received[index] = params
    for ours, theirs in zip(*map(jax.tree.leaves, (run.params, params)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def our_rounds():
    """Returns a function that makes a run of the engine apply 60 more gradients."""
    graphdef, params = example.create()
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    def on_progress(progress):
        if progress.applied % ROUND == 0:
            done.release()
            go.acquire()  # the master waits

    def wait():
        if not done.acquire(timeout=300):
            raise TimeoutError("The engine did not apply 60 gradients within 300 s.")

    def run():
        engine.run(
            gradient_of(graphdef),
            params,
            example.batches,
            optimizer,
            num_gradients=10**9,
            num_workers=example.NUM_WORKERS,
            actors={"num_cpus": 0.1},
            timeout=300,
            on_progress=on_progress,
        )

    threading.Thread(target=run, daemon=True).start()
    wait()

    def our_round():
        go.release()
        wait()

    return our_round
