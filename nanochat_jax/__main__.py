"""`python -m nanochat_jax COMMAND`; see cli.py."""

import signal
import sys

from nanochat_jax import process

if __name__ == "__main__":
    process.set_up()
    from nanochat_jax import cli

    status = cli.main(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python ends, one more Ctrl-C would be a traceback
    sys.exit(status)
