"""Ray's token, without which nobody may talk to a cluster: where it lies, and that only its owner can read it.

Ray takes it from RAY_AUTH_TOKEN, else from the file that RAY_AUTH_TOKEN_PATH names, else from `~/.ray/auth_token`. It
writes that last file so that everybody on the machine can read it, so it is written here before Ray does.
"""

import os
import secrets
import tempfile
from pathlib import Path

from roclip.config.secrets import private_directory
from roclip.errors import StageError

OWNER_READS = 0o600


def token_file() -> Path:
    """Where Ray looks for the token, unless RAY_AUTH_TOKEN is set."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named) if named else Path.home() / ".ray" / "auth_token"


def find_token() -> str:
    """The token, or an empty text where there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    file = token_file()
    return file.read_text().strip() if file.is_file() else ""


def ensure_token() -> None:
    """See to it that there is a token and that its file is for its owner only. Nothing when token auth was switched off
    (`RAY_AUTH_MODE=disabled`) or the token is in the environment.

    Raises `StageError` for a file that others can read and that is not ours to change.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    file = token_file()
    if not file.exists():
        _write(file)
    if (mode := file.stat().st_mode & 0o777) & ~OWNER_READS:
        try:
            file.chmod(OWNER_READS)
        except PermissionError as error:
            raise StageError(
                f"{file}: expected Ray's token readable by its owner only, got mode {mode:o}, and it is not ours. "
                "Have its owner run chmod 600, or name another file with RAY_AUTH_TOKEN_PATH."
            ) from error


def _write(file: Path) -> None:
    """Whole or not at all, and never for others to read; another process may do the same."""
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
