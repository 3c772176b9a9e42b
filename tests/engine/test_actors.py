"""The engine with Ray: failing processes, killed processes, and a two-node cluster.

All traffic stays on loopback. `DECENTRAL_JAX_KILLS=20` kills a process in twenty runs.
"""

import collections
import functools
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from decentral_jax import engine

# Ray forks processes, and JAX warns about forks.
pytestmark = pytest.mark.filterwarnings("ignore")

KILLS = int(os.environ.get("DECENTRAL_JAX_KILLS", "2"))
RATE = 0.125
GRADIENTS = 300


@pytest.fixture(autouse=True, scope="module")
def ray():
    """Ray, set up to send functions of this module to other processes."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="needs Ray: pip install decentral_jax[ray]")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield ray
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def no_cluster(ray):
    """The engine starts Ray: these tests run before those of the cluster."""
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def cluster(ray):
    """A cluster of two nodes on 127.0.0.1, each with its own processes."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "node_ip_address": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:
        # Ray would replace the loopback address with that of a network interface.
        patch.setattr(
            "ray._private.services.get_node_ip_address", lambda *_: "127.0.0.1"
        )
        cluster = Cluster(
            initialize_head=True,
            connect=True,
            head_node_args=node | {"include_dashboard": False},
        )
        try:
            cluster.add_node(**node)
            cluster.wait_for_nodes(timeout=60)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def target(worker, index):
    return np.array([worker, index, worker * index], np.float32) / 8


def gradient(x, batch):
    return x - batch


start = functools.partial(
    engine.run,
    params=np.zeros(3, np.float32),
    optimizer=optax.sgd(RATE),
    gradient=gradient,
)


def assert_replayed(result):
    """Replaying the trace and the batch indices gives the parameters."""
    iterates = [np.zeros(3, np.float32)]
    for k, (worker, index) in enumerate(
        zip(result.trace.workers, result.batch_indices, strict=True)
    ):
        stale = iterates[k - result.trace.staleness[k]]
        iterates.append(iterates[-1] - RATE * (stale - target(worker, index)))
    np.testing.assert_allclose(result.params, iterates[-1], rtol=1e-5)


class Targets:
    """Batches that continue after an error; one process exits."""

    def __init__(self, worker, died):
        self.worker, self.died = worker, died
        self.draws, self.index = 0, -1

    def __iter__(self):
        return self

    def __next__(self):
        time.sleep(0.02)
        self.draws += 1
        if (self.worker, self.draws) == (2, 4) and not self.died.exists():
            self.died.touch()
            os._exit(1)
        if (self.worker, self.draws) == (1, 4):
            raise OSError("no disk")
        self.index += 1
        return target(self.worker, self.index)


def test_failures(tmp_path):
    """One worker raises, one process exits, and the third continues.

    The run can be replayed. Without a cluster, the engine starts Ray.
    """
    result = start(
        batches=lambda worker: Targets(worker, tmp_path / "died"),
        num_gradients=60,
        num_workers=3,
        max_staleness=4,
        actors={"num_cpus": 0.5},
    )
    assert_replayed(result)
    assert sorted(worker for worker, _ in result.replaced) == [1, 2]
    assert result.trace.staleness.max() <= 4


@pytest.mark.usefixtures("no_cluster")
def test_a_generator_that_raises(tmp_path):
    """The engine recreates the generator in its process: no batch is lost."""

    def batches(worker):
        for index in range(10):
            if (worker, index) == (1, 3) and not (tmp_path / "raised").exists():
                (tmp_path / "raised").touch()
                raise OSError("no disk")
            yield target(worker, index)

    result = start(
        batches=batches, num_gradients=20, num_workers=2, actors={"num_cpus": 0.5}
    )
    assert [worker for worker, _ in result.replaced] == [1]
    np.testing.assert_array_equal(np.bincount(result.trace.workers), [10, 10])
    assert_replayed(result)


@pytest.mark.usefixtures("no_cluster")
def test_model_state_and_a_resume(tmp_path):
    """Model states with keys and metrics travel; skipped batches are not used again."""

    def loss(x, state, batch):
        state = {
            "mean": 0.5 * state["mean"] + 0.5 * batch,
            "key": jax.random.split(state["key"])[0],
        }
        return jnp.sum((x - batch) ** 2) / 2, (state, {"first": batch[0]})

    def interrupt(progress):
        if progress.applied == 25:
            raise KeyboardInterrupt

    run = functools.partial(
        start,
        gradient=jax.value_and_grad(loss, has_aux=True),
        batches=lambda worker: map(
            functools.partial(target, worker), itertools.count()
        ),
        num_gradients=40,
        num_workers=2,
        has_aux=True,
        model_state={"mean": np.ones(3, np.float32), "key": jax.random.key(0)},
        actors={"num_cpus": 0.5},
        checkpoints=tmp_path,
        checkpoint_every=10,
    )
    with pytest.raises(KeyboardInterrupt):
        run(on_progress=interrupt)
    result = run()
    assert_replayed(result)
    means = [np.ones(3, np.float32)]
    ticks = zip(
        result.trace.workers, result.trace.staleness, result.batch_indices, strict=True
    )
    for k, (worker, delay, index) in enumerate(ticks):
        batch = target(worker, index)
        new = 0.5 * means[k - delay] + 0.5 * batch
        means.append(0.5 * means[-1] + 0.5 * new)
        assert result.metrics["first"][k] == batch[0]
    np.testing.assert_allclose(result.model_state["mean"], means[-1], rtol=1e-5)
    assert result.model_state["key"] != jax.random.key(0)
    for worker in range(2):
        used = result.batch_indices[result.trace.workers == worker]
        np.testing.assert_array_equal(used, np.arange(len(used)))


def listening(pid):
    """Addresses on which a process and its descendants accept TCP connections."""
    ps = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True)
    parents = dict(map(int, line.split()) for line in ps.stdout.splitlines())
    family = {pid}
    while more := {p for p, parent in parents.items() if parent in family} - family:
        family |= more
    ss = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True)
    return {
        line.split()[3]: line.split()[-1]
        for line in ss.stdout.splitlines()
        if family & {int(p) for p in re.findall(r"pid=(\d+)", line)}
    }


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.skipif(not shutil.which("ss"), reason="needs ss of iproute2")
def test_loopback_only_and_an_interrupt():
    """Ray listens on loopback only, and Ctrl-C does not wait for a busy actor."""

    def batches(worker):
        for index in itertools.count():
            if (worker, index) == (1, 2):
                time.sleep(300)
            yield target(worker, index)

    found, began = {}, []

    def on_progress(progress):
        if progress.applied == 10:
            found.update(listening(os.getpid()))
            began.append(time.monotonic())
            timer = threading.Timer(
                0.5, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)
            )
            timer.start()

    with pytest.raises(KeyboardInterrupt):
        start(
            batches=batches,
            num_gradients=10**8,
            num_workers=2,
            actors={"num_cpus": 0.1},
            on_progress=on_progress,
        )
    assert time.monotonic() - began[0] < 10  # Ray's own shutdown included
    addresses = [address.rsplit(":", 1)[0] for address in found]
    assert {"gcs_server", "raylet"} <= {
        name for user in found.values() for name in re.findall(r'"([^"]+)"', user)
    }
    assert set(addresses) <= {"127.0.0.1", "[::ffff:127.0.0.1]", "[::1]"}, found


@pytest.mark.usefixtures("no_cluster")
def test_ray_elsewhere_is_stopped(ray, monkeypatch):
    """If Ray starts on another address, the engine shuts it down."""
    monkeypatch.setattr(
        "ray._private.services.resolve_ip_for_localhost", lambda _: "127.0.0.2"
    )
    with pytest.raises(RuntimeError, match=r"started on 127.0.0.2 instead"):
        start(batches=target, num_gradients=9, num_workers=1, actors={})
    assert not ray.is_initialized()


@pytest.mark.usefixtures("no_cluster")
def test_ray_is_stopped_after_bad_options(ray):
    with pytest.raises(ValueError, match="no_such_option"):
        start(
            batches=target,
            num_gradients=9,
            num_workers=1,
            actors={"no_such_option": 1},
        )
    assert not ray.is_initialized()


def test_two_nodes(ray, cluster, tmp_path):
    def batches(worker):
        node = ray.get_runtime_context().get_node_id()
        (tmp_path / str(worker)).write_text(node)
        for index in itertools.count():
            yield target(worker, index)

    result = start(
        batches=batches,
        num_gradients=40,
        num_workers=4,
        max_staleness=3,
        actors={"num_cpus": 1, "scheduling_strategy": "SPREAD"},
    )
    assert_replayed(result)
    np.testing.assert_array_equal(np.bincount(result.trace.workers), [10] * 4)
    nodes = collections.Counter(file.read_text() for file in tmp_path.iterdir())
    assert sorted(nodes.values()) == [2, 2]
    assert set(nodes) == {node["NodeID"] for node in ray.nodes()}


@pytest.mark.usefixtures("cluster")
def test_busy_actors_are_ended(tmp_path):
    """The engine ends them, although the cluster keeps running."""

    def batches(worker):
        (tmp_path / str(worker)).write_text(str(os.getpid()))
        for index in itertools.count():
            if (worker, index) == (1, 2):
                (tmp_path / "busy").touch()
                time.sleep(300)
            time.sleep(0.05)
            yield target(worker, index)

    start(batches=batches, num_gradients=60, num_workers=2, actors={"num_cpus": 0.5})
    assert (tmp_path / "busy").exists()
    deadline = time.monotonic() + 20
    pids = [int((tmp_path / str(worker)).read_text()) for worker in range(2)]
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.1)


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_process(cluster, tmp_path, seed, caplog):
    """`kill -9` at a random time. Each gradient adds to one entry, exactly once."""
    rng = np.random.default_rng(seed)
    victim, wait = rng.integers(2), rng.uniform(0, 1)

    def batches(worker):
        (tmp_path / str(worker)).write_text(str(os.getpid()))
        for index in range(GRADIENTS):
            time.sleep(0.005)
            batch = np.zeros(2 * GRADIENTS, np.float32)
            batch[worker * GRADIENTS + index] = 1
            yield batch

    def kill():
        deadline = time.monotonic() + 60
        file = tmp_path / str(victim)
        while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(wait)
        os.kill(int(file.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    result = engine.run(
        lambda x, batch: batch,
        np.zeros(2 * GRADIENTS, np.float32),
        batches,
        optax.sgd(1.0),
        GRADIENTS,
        num_workers=2,
        actors={"num_cpus": 1},
    )
    killer.join()
    assert [worker for worker, _ in result.replaced] == [victim]
    assert f"worker {victim} failed" in caplog.text
    expected = np.zeros(2 * GRADIENTS)
    expected[result.trace.workers * GRADIENTS + result.batch_indices] = -1
    assert expected.sum() == -GRADIENTS
    np.testing.assert_array_equal(result.params, expected)
