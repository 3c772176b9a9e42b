"""Named algorithms, as short chains of transformations.

The first argument is the optimizer that each worker runs: a learning rate or schedule
for plain SGD, or any optax optimizer. The transformations in each chain document the
equations.
"""

from decentral_jax.algorithms import (
    _asynchronous,
    _compressed,
    _decentralized,
    _local_updates,
)
from decentral_jax.algorithms._asynchronous import *
from decentral_jax.algorithms._compressed import *
from decentral_jax.algorithms._decentralized import *
from decentral_jax.algorithms._local_updates import *

__all__: list[str] = []
__all__ += _asynchronous.__all__
__all__ += _compressed.__all__
__all__ += _decentralized.__all__
__all__ += _local_updates.__all__
