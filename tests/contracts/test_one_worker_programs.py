"""Ordinary one-worker programs give the same numbers in every layout.

The programs and the tolerance are in one_worker_programs.py. All programs of a layout
compile as one. If this fails, each program runs alone, so that the message names the
programs at fault.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

import decentral_jax as dj
from decentral_jax import launch
from tests.support import one_worker_programs as programs
from tests.support.one_worker_programs import PROGRAMS, N

HUBS = {"hub": 4, "worker": 2}
# name -> workers' shape, number of devices
LAYOUTS = {
    "one worker per device": (N, 8),
    "four workers per device": (N, 2),
    "one device": (N, 1),
    "two axes, one worker per device": (HUBS, 8),
    "two axes, folded outer axis": (HUBS, 2),
}

# These programs stand for users' code, which runs under JAX's default promotion.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@functools.cache
def data_and_expected():
    data = programs.dataset()
    return data, programs.expected(data)


def run(workers, data, names):
    """Results of the programs, with one leading worker axis."""

    def step(data):
        return programs.run_all(data, workers.axis_name, names)

    sizes = workers.shape
    split = jax.tree.map(lambda x: x.reshape(*sizes, *x.shape[1:]), data)
    results = programs.compiled(workers.spmd(step), workers.shard(split))
    return jax.tree.map(lambda x: x.reshape(N, *x.shape[len(sizes) :]), results)


def faults(run, data, expected):
    """Returns one line per program that fails or differs."""
    try:
        return programs.differences(run(data, list(PROGRAMS)), expected)
    except Exception:
        reports = []
    for name in PROGRAMS:
        try:
            reports += programs.differences(run(data, [name]), {name: expected[name]})
        except Exception as error:
            reports.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
    return reports or ["every program passes alone, but all of them fail together"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_vmap(layout):
    shape, num_devices = LAYOUTS[layout]
    workers = dj.Workers(shape, devices=jax.devices()[:num_devices])
    data, expected = data_and_expected()
    reports = faults(functools.partial(run, workers), data, expected)
    assert not reports, f"{layout}:\n" + "\n".join(reports)


def test_equals_vmap_on_two_processes(capfd, monkeypatch):
    support = Path(__file__).parent.parent / "support"
    monkeypatch.setenv("PYTHONPATH", str(support.parent.parent))
    monkeypatch.delenv("JAX_NUMPY_DTYPE_PROMOTION", raising=False)
    command = [sys.executable, str(support / "one_worker_programs.py")]
    ended = launch.run(command, processes=2, devices=2)
    out, error = capfd.readouterr()
    assert ended == 0, error[-3000:]
    assert out.count("equal on 2 processes") == 2


# Under a `shard_map` of the user's own


def by_hand(step, check_vma):
    """Maps `step` with `jax.shard_map`, one worker per device."""
    mesh = Mesh(np.array(jax.devices()[:N]), ("workers",), axis_types=(AxisType.Auto,))

    def one_device(data):
        result = step(jax.tree.map(lambda x: x[0], data))
        return jax.tree.map(lambda x: jnp.asarray(x)[None], result)

    spec = PartitionSpec("workers")
    return jax.jit(
        jax.shard_map(
            one_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
        )
    )


def steps_of(make):
    """Training steps without a scan, which `shard_map(check_vma=True)` accepts."""

    def run(data):
        tx = make("workers")
        params = {"w": data["rows"][0], "b": data["scalar"]}
        state = tx.init(params)

        def loss(params):
            error = data["rows"] @ params["w"] + params["b"] - data["x"][:4]
            return jnp.mean(error**2)

        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return params

    return run


def communicated(communicate):
    """A value, and the gradient with respect to the worker's own array."""

    def run(data):
        def loss(x):
            return jnp.sum(communicate(x, "workers") ** 2)

        return communicate(data["x"], "workers"), jax.grad(loss)(data["x"])

    return run


CHECKED = {
    f"mix {name}": communicated(programs._mix(topology))
    for name, topology in programs.TOPOLOGIES.items()
}
CHECKED["average"] = communicated(lambda x, axis: dj.average(x, axis_name=axis))
CHECKED |= {name: steps_of(make) for name, make in programs.OPTIMIZERS.items()}


@pytest.mark.parametrize("check_vma", [False, True])
def test_library_under_own_shard_map(check_vma):
    def step(data):
        return {name: run(data) for name, run in CHECKED.items()}

    data, _ = data_and_expected()
    expected = programs.compiled(jax.jit(jax.vmap(step, axis_name="workers")), data)
    found = programs.compiled(by_hand(step, check_vma), data)
    reports = programs.differences(found, expected)
    assert not reports, "\n".join(reports)
