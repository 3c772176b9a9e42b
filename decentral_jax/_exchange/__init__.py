"""How workers exchange arrays. Private: users need `dj.mix` and `dj.average` only.

`axis` has the worker axis and all collectives, `plans` turns mixing matrices into
messages, `weighing` sums what has arrived, `packing` puts small arrays into one
message, and `numbers` has dtypes and counters that agree between workers.
"""
