"""How a process gets to a Ray: one of its own on loopback, or one that listens elsewhere; and the token that both ask for.

A Ray of our own tells its processes its address. Ray Train asks the state API again and again whether its controller lives;
a process that was told no address looks into the file that the last `ray start` on the machine wrote, whether that Ray
still runs or not. Each training would then take half a minute longer to end, or be taken for dead by another Ray.

Ray reads the token from RAY_AUTH_TOKEN, else from the file that RAY_AUTH_TOKEN_PATH names, else from `~/.ray/auth_token`.
It writes that last file so that everybody on the machine can read it, so it is written here before Ray does.
"""

import contextlib
import logging
import os
import random
import secrets
import socket
import tempfile
from pathlib import Path

from roclip.config.secrets import private_directory
from roclip.errors import StageError

OWNER_READS = 0o600
_PORTS = range(20_000, 32_000)
"""Below the ephemeral ports, so that the system gives it to nobody else before Ray takes it."""
_REACHED_WITHIN_S = 10.0


def start_local_ray(**options: object) -> None:
    """Start a Ray on loopback with `options` for `ray.init`; it ends with this process."""
    import ray

    port = str(_free_port())
    told = {"RAY_GCS_SERVER_PORT": port, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    before = {name: os.environ.pop(name) for name in told if name in os.environ}
    os.environ.update(told)  # its processes inherit it
    try:
        ray.init(
            address="local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            **options,  # pyright: ignore[reportArgumentType]
        )
    finally:
        for name in told:
            del os.environ[name]
        os.environ.update(before)


def reach(address: str) -> None:
    """Raises `OSError` at once where nobody listens at `HOST:PORT`; Ray itself tries for minutes. Names such as `auto` pass."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_REACHED_WITHIN_S).close()


def token_file() -> Path:
    """The file in which Ray looks for the token, unless RAY_AUTH_TOKEN is set."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named) if named else Path.home() / ".ray" / "auth_token"


def find_token() -> str:
    """The token, or an empty string."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    file = token_file()
    return file.read_text().strip() if file.is_file() else ""


def ensure_token() -> None:
    """Make sure that there is a token and that only its owner can read its file. Does nothing when token auth is off
    (`RAY_AUTH_MODE=disabled`) or the token is in the environment.

    Raises `StageError` for a file that others can read and that is not ours to change.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    file = token_file()
    if not file.exists():
        _write_token(file)
    if (mode := file.stat().st_mode & 0o777) & ~OWNER_READS:
        try:
            file.chmod(OWNER_READS)
        except PermissionError as error:
            raise StageError(
                f"{file}: expected Ray's token readable by its owner only, got mode {mode:o}, and it is not ours. "
                "Have its owner run chmod 600, or name another file with RAY_AUTH_TOKEN_PATH."
            ) from error


def _free_port() -> int:
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def _write_token(file: Path) -> None:
    """Write it whole or not at all, never readable by others; another process may be doing the same."""
    if not file.parent.exists():
        private_directory(file.parent)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # 0600
    try:
        with os.fdopen(descriptor, "w") as open_file:
            open_file.write(secrets.token_hex(32))
        Path(file).hardlink_to(temporary)
    except FileExistsError:
        pass  # theirs is as good
    finally:
        Path(temporary).unlink()
