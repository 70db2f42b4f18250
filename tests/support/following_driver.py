"""A driver that follows a folder until its input ends: `python following_driver.py ADDRESS FOLDER STAGE`."""

import sys
from pathlib import Path

import ray

from cluster.monitoring.publisher import following
from roclip.config import ClusterConfig, Config, DataConfig

if __name__ == "__main__":
    address, folder, stage = sys.argv[1:]
    ray.init(address=address, log_to_driver=False, logging_level="error")
    with following(Config(data=DataConfig(shards="any"), cluster=ClusterConfig(address=address)), Path(folder), stage):
        print("follows", flush=True)
        sys.stdin.read()
    print("ended", flush=True)
