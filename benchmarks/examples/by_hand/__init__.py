"""The examples' training, written by hand with `jax.shard_map` and collectives."""
