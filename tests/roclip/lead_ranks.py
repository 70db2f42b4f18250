"""A rank that leads for longer than a collective may take; run by test_distributed.py on two ranks."""

import json
import sys
import time
from pathlib import Path

from roclip import distributed
from roclip.errors import DataError

TIMEOUT_S, WORK_S = 4.0, 6.0


def long_work() -> str:
    time.sleep(WORK_S)
    return f"done by rank {distributed.rank()}"


def bad_work() -> None:
    raise DataError("nothing came")


if __name__ == "__main__":
    distributed.start(TIMEOUT_S)
    said = [distributed.lead(long_work, heartbeat_s=0.5)]
    try:
        distributed.lead(bad_work)
    except DataError as error:
        said.append(str(error))
    Path(sys.argv[1], f"rank{distributed.rank()}.json").write_text(json.dumps(said))
