"""The oracle check and the repair of a run. The only room that moves TRUSTED (`job.py`)."""
