"""Sets up eight fake devices and strict dtype promotion before JAX starts."""

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

# A shell that starts pytest with `&` makes it and its child processes ignore SIGINT.
# Tests that interrupt themselves or their children would then never end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def x64():
    """Enables float64 during one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """Enables standard dtype promotion, for parts of optax that mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield
