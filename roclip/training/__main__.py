"""`torchrun -m roclip.training CONFIG [KEY=VALUE …]`: train every arm of a config without Ray."""

import os
import sys

import torch

from roclip import distributed
from roclip.config import dump_config, environment_defaults, load_config, run_directory
from roclip.config.secrets import private_directory
from roclip.errors import RoclipError
from roclip.storage import write_atomic
from roclip.training.loop import train


def main(arguments: list[str]) -> int:
    """Train every arm on the shards of the run; returns the exit code."""
    environment_defaults()
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    try:
        config = load_config(arguments[0], arguments[1:])
        if "RANK" in os.environ:
            distributed.start(config.train.collective_timeout_s)
        run = distributed.broadcast_object(run_directory(config) if distributed.rank() == 0 else None)
        if distributed.rank() == 0:
            private_directory(run)
            write_atomic(run / "config.yaml", dump_config(config))
        for arm in config.arms:
            final = train(config, arm, run)
            if distributed.rank() == 0:
                print(f"{arm}: {final}")
    except RoclipError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
