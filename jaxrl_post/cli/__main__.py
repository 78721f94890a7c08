"""``python -m jaxrl_post.cli``: the command where no script is on the path."""

import sys

from jaxrl_post.cli import main, processes

sys.exit(processes.leave(main()))
