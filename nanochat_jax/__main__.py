"""`python -m nanochat_jax COMMAND`; see cli.py."""

from nanochat_jax.cli import program

program()
