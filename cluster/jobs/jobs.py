"""Runs as Ray Jobs on a cluster: submit one, find it again, follow, stop.

Talks to the job server of the cluster's dashboard, with Ray's token. A job contains no secrets: Ray shows its entry point,
metadata and environment to everybody who has the token.
"""

import asyncio
import contextlib
import dataclasses
import datetime
import ipaddress
import logging
import os
import re
import shlex
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.dashboard.utils import get_address_for_submission_client
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.jobs.log import MAX_BACKOFF_S, Log
from cluster.jobs.runtime_env import for_cluster, identity_digest, pack
from cluster.ray.connect import find_token
from cluster.ray.session import commit
from roclip.config import Config, run_directory
from roclip.errors import ConfigError, StageError

ENTRYPOINT = "exec python -m cluster.cli run {config}"
STOP_WAIT_S = 120
"""Time that a run has after `stop` to end cleanly before Ray kills it."""
INTERRUPTED = 130
START_TIMEOUT_S = 120.0
TIMEOUT_S = 30.0
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_VERBOSE_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_CONNECTION_ERRORS = (OSError, RuntimeError, aiohttp.ClientError)


@dataclasses.dataclass(frozen=True)
class Job:
    """One of our jobs, as the cluster reports it."""

    id: str
    status: JobStatus
    message: str
    exit_code: int | None
    """The run's own exit code, if it ended by itself."""
    started: datetime.datetime | None
    ended: datetime.datetime | None
    metadata: dict[str, str]

    @property
    def is_alive(self) -> bool:
        return not self.status.is_terminal()

    @property
    def code(self) -> int:
        """The exit code for following it: the run's own, 130 if it was stopped, 7 if it was lost."""
        if self.status is JobStatus.SUCCEEDED:
            return 0
        if self.status is JobStatus.STOPPED:
            return INTERRUPTED
        if self.exit_code is None:
            return StageError.exit_code
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code


class _Client(JobSubmissionClient):
    """Ray's client with a timeout, so that no request waits for ever in a network that drops packets."""

    def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **{"timeout": TIMEOUT_S, **kwargs})


class Jobs:
    """The jobs of one cluster.

    Args:
        address: Of the dashboard (`http://head:8265`), or what `ray.init` accepts on a node of the cluster. Empty takes
            RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

    Raises:
        ConfigError: no address; the token is missing or wrong; or the cluster does not ask for one.
        StageError: nothing answers.
    """

    def __init__(self, address: str = ""):
        address = address or next(filter(None, map(os.environ.get, ADDRESS_VARIABLES)), "")
        if not address:
            raise ConfigError(
                "--address: expected the cluster's dashboard, such as http://head:8265, got none. Name it, or set "
                "RAY_API_SERVER_ADDRESS."
            )
        for name in _VERBOSE_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._translated_errors(address), _without_address_variables():
            self.address = get_address_for_submission_client(address).rstrip("/")
            require_token_auth(self.address)
            token = find_token()
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            self._client = _Client(self.address, headers=headers)

    def submit(self, config: Config, *, run_id: str = "") -> tuple[Job, bool]:
        """Submit a run. Returns the job, and whether it is new: a running job with the same run directory is returned instead.

        Args:
            run_id: Name of the run directory, in `runs`; else the config's, or the one that an earlier job of the same
                config had, or a dated one.
        """
        jobs = self.all()
        config = self.resolve(config, run_id, jobs)
        run = Path(config.run_dir)
        if running := [job for job in jobs if job.is_alive and job.metadata["run_dir"] == str(run)]:
            return running[0], False
        request = self._request(config)
        run_id = request["metadata"]["run_id"]
        job_id = f"{run_id}.{1 + sum(job.metadata['run_id'] == run_id for job in jobs)}"
        with tempfile.TemporaryDirectory(prefix="roclip-job-") as folder, self._translated_errors(self.address):
            pack(config, Path(folder))
            request["runtime_env"]["working_dir"] = folder
            self._send(submission_id=job_id, **request)  # Ray refuses the second of two simultaneous jobs with one id
        return self.get(job_id), True

    def _send(self, **request: Any) -> None:
        """Submit, with retries while a head that has just started cannot start jobs yet."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self._client.submit_job(**request)
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline_s:
                    raise
                time.sleep(1.0)
            else:
                return

    def resolve(self, config: Config, run_id: str, jobs: list[Job]) -> Config:
        """The config as the cluster will have it, with its run directory."""
        config = for_cluster(config)
        if run_id:
            return dataclasses.replace(config, run_dir=str(Path(config.runs) / run_id))
        run = run_directory(config)
        if not config.run_dir and not (run / "config.yaml").exists():
            same = identity_digest(config)
            run = next((Path(job.metadata["run_dir"]) for job in jobs if job.metadata["identity"] == same), run)
        return dataclasses.replace(config, run_dir=str(run))

    def _request(self, config: Config) -> dict[str, Any]:
        run_id = re.sub(r"[^\w.-]", "-", Path(config.run_dir).name)
        return {
            "entrypoint": ENTRYPOINT.format(config=shlex.quote(Path(config.source).name)),
            "runtime_env": {
                "env_vars": {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
            },
            "metadata": {
                "job_name": run_id,
                "config": Path(config.source).name,
                "run_id": run_id,
                "run_dir": config.run_dir,
                "identity": identity_digest(config),
                "commit": commit(),
            },
        }

    def all(self) -> list[Job]:
        """The jobs that `submit` sent, newest first."""
        with self._translated_errors(self.address):
            jobs = [_job(details) for details in self._client.list_jobs() if _is_ours(details)]
        return sorted(jobs, key=lambda job: (job.is_alive, job.started.timestamp() if job.started else 0), reverse=True)

    def get(self, job_id: str) -> Job:
        """One job by its id. Raises `ConfigError` if it does not exist."""
        with self._translated_errors(self.address, job_id):
            return _job(self._client.get_job_info(job_id))

    def find(self, name: str) -> Job:
        """A job by its id, or the newest of a run by its id or directory; without a name, the newest of all."""
        for job in self.all():
            names = (job.id, job.metadata["run_id"], job.metadata["run_dir"])
            if not name or name in names or str(Path(name).absolute()) == job.metadata["run_dir"]:
                return job
        raise ConfigError(f"{name or 'JOB'}: expected a job or a run of {self.address}, got none. See `roclip runs`.")

    def log(self, job: Job) -> str:
        """A job's complete log so far."""
        with self._translated_errors(self.address, job.id):
            return self._client.get_job_logs(job.id)

    def follow(self, job: Job, show: Callable[[str], None], on_notice: Callable[[str], None]) -> Job:
        """Show each line of a job's log once until it has ended, through lost connections. Returns the job as it ended.

        Args:
            job: The job.
            show: Called with each line.
            on_notice: Called with messages about the connection.
        """
        return asyncio.run(self._follow(job, Log(show), on_notice))

    async def _follow(self, job: Job, log: Log, on_notice: Callable[[str], None]) -> Job:
        wait_s = 0.0
        while True:
            before_chars = log.seen_chars
            tail: Any = self._client.tail_job_logs(job.id)
            try:
                async with contextlib.aclosing(tail):
                    await log.read(tail)
                now = await asyncio.to_thread(self.get, job.id)
                if not now.is_alive:
                    log.end(await asyncio.to_thread(self.log, job))
                    return now
                wait_s = 0.0
            except (*_CONNECTION_ERRORS, StageError) as error:
                if log.seen_chars > before_chars:
                    wait_s = 0.0
                if not wait_s:
                    on_notice(f"the connection to {self.address} is lost ({type(error).__name__}); the job goes on")
                wait_s = min(MAX_BACKOFF_S, 2 * wait_s or 1.0)
                await asyncio.sleep(wait_s)

    def stop(self, job: Job) -> Job:
        """Ask a run to stop as Ctrl-C would, and wait until it has. Returns the job as it ended.

        Raises `StageError` if it has not ended in time.
        """
        with self._translated_errors(self.address, job.id):
            self._client.stop_job(job.id)
        deadline_s = time.monotonic() + STOP_WAIT_S + TIMEOUT_S
        while (now := self.get(job.id)).is_alive:
            if time.monotonic() > deadline_s:
                raise StageError(f"{job.id}: was asked to stop {STOP_WAIT_S} s ago and still runs. Stop it again.")
            time.sleep(0.5)
        return now

    @contextlib.contextmanager
    def _translated_errors(self, address: str, job_id: str = "") -> Iterator[None]:
        """Translate the exceptions of Ray's client into ours."""
        try:
            yield
        except AuthenticationError as error:
            raise ConfigError(
                f"{address}: expected the cluster's token, got {'another' if find_token() else 'none'}. Put it into a file "
                "that only you can read and name that with RAY_AUTH_TOKEN_PATH (else ~/.ray/auth_token is taken)."
            ) from error
        except (OSError, RuntimeError) as error:
            if job_id and "404" in str(error):
                raise ConfigError(f"{job_id}: expected a job of {address}, got none. See `roclip runs`.") from error
            raise StageError(
                f"{address}: expected an answer of Ray's job server, got {_first_line(error)} Is the head up, and does "
                "this machine reach its dashboard (ssh -L 8265:127.0.0.1:8265 HEAD)?"
            ) from error


def require_token_auth(address: str) -> None:
    """Raises `ConfigError` for a dashboard that other machines can reach and that answers without a token."""
    if is_loopback(urlsplit(address).hostname or ""):
        return
    response = requests.get(f"{address}/api/version", timeout=TIMEOUT_S, allow_redirects=False, auth=_no_netrc_auth)
    if response.ok:
        raise ConfigError(
            f"{address}: expected a dashboard that asks for a token, got one that answers everybody, so everybody who "
            "reaches it can run code on the cluster. Start the head with RAY_AUTH_MODE=token, or bind its dashboard to "
            "loopback (--dashboard-host 127.0.0.1) and reach it by ssh -L 8265:127.0.0.1:8265 HEAD."
        )


def is_loopback(host: str) -> bool:
    """Whether a name or address belongs to this machine only."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


def _no_netrc_auth(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """An auth handler that keeps `requests` from using credentials of `~/.netrc`."""
    return request


@contextlib.contextmanager
def _without_address_variables() -> Iterator[None]:
    """Hide the address variables, which Ray's client prefers over an explicit address."""
    taken = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)


def _is_ours(details: JobDetails) -> bool:
    return bool(details.submission_id) and {"run_id", "run_dir", "identity"} <= set(details.metadata or {})


def _job(details: JobDetails) -> Job:
    return Job(
        id=str(details.submission_id),
        status=JobStatus(details.status),
        message=details.message or "",
        exit_code=details.driver_exit_code,
        started=_local_time(details.start_time),
        ended=_local_time(details.end_time),
        metadata=details.metadata or {},
    )


def _local_time(unix_ms: int | None) -> datetime.datetime | None:
    return datetime.datetime.fromtimestamp(unix_ms / 1000) if unix_ms else None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0].rstrip('.')}."
