"""Measurements on an emulated network: namespaces as hosts, limited bandwidth."""
