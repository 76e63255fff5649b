"""`python -m nanochat_jax COMMAND`; see cli.py."""

import sys

from nanochat_jax import process

if __name__ == "__main__":
    process.set_up()
    from nanochat_jax import cli

    process.leave(cli.main(sys.argv[1:]))
