"""A network one can measure: hosts as namespaces, links of a chosen bandwidth."""
