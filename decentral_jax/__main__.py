"""`python -m decentral_jax` prints the version and names the commands."""

import decentral_jax

print(f"decentral_jax {decentral_jax.__version__}")
print("To start several processes: python -m decentral_jax.launch --help")
print("In a checkout, experiments: python -m experiments --help")
