"""Eight fake devices, strict promotion: set before JAX starts."""

import os
import signal

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

# A shell that starts pytest with `&` ignores SIGINT: tests that interrupt themselves
# would run on without end, in this process or in those that inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def x64():
    """Float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """For parts of optax that mix dtypes themselves (Adam, MultiSteps)."""
    with jax.numpy_dtype_promotion("standard"):
        yield
