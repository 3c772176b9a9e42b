"""Transformations: the optax building blocks of decentralized training.

Each file holds one idea, as one or more optax transformations that one worker runs. The
state classes are public, too.
"""

from decentral_jax.transforms import (
    _accumulation,
    _amsgrad,
    _asynchronous,
    _averaging,
    _compressed_gossip,
    _error_feedback,
    _error_reset,
    _gossip,
    _grab,
    _iterate_averaging,
    _multi_level,
    _operating,
    _ordering,
    _push_sum,
    _quasi_global,
    _tracking,
)
from decentral_jax.transforms._accumulation import *
from decentral_jax.transforms._amsgrad import *
from decentral_jax.transforms._asynchronous import *
from decentral_jax.transforms._averaging import *
from decentral_jax.transforms._compressed_gossip import *
from decentral_jax.transforms._error_feedback import *
from decentral_jax.transforms._error_reset import *
from decentral_jax.transforms._gossip import *
from decentral_jax.transforms._grab import *
from decentral_jax.transforms._iterate_averaging import *
from decentral_jax.transforms._multi_level import *
from decentral_jax.transforms._operating import *
from decentral_jax.transforms._ordering import *
from decentral_jax.transforms._push_sum import *
from decentral_jax.transforms._quasi_global import *
from decentral_jax.transforms._tracking import *

__all__: list[str] = []
__all__ += _accumulation.__all__
__all__ += _amsgrad.__all__
__all__ += _asynchronous.__all__
__all__ += _averaging.__all__
__all__ += _compressed_gossip.__all__
__all__ += _error_feedback.__all__
__all__ += _error_reset.__all__
__all__ += _gossip.__all__
__all__ += _grab.__all__
__all__ += _iterate_averaging.__all__
__all__ += _multi_level.__all__
__all__ += _operating.__all__
__all__ += _ordering.__all__
__all__ += _push_sum.__all__
__all__ += _quasi_global.__all__
__all__ += _tracking.__all__
