# SPDX-License-Identifier: Apache-2.0
"""The folder in which Triton runs, with its sockets: private, and with a path that Triton and PyTriton support."""

import logging
import os
import re
import tempfile
from pathlib import Path

from serving.errors import UsageError

# PyTriton does not quote the path in commands and URLs.
SAFE_PATH = re.compile(r"[\w./@+-]+", re.ASCII)

# sun_path in unix(7) has 108 bytes, the last of which is NUL.
SOCKET_PATH_BYTES = 107

LOGGER = logging.getLogger("server")


def find_folder(model_name: str = "model") -> Path:
    """Return a folder in which :func:`create_workspace` can create a workspace for Triton.

    It is ``PYTRITON_HOME`` if that is set, and otherwise in the user's cache, or ``/tmp``. Raises UsageError if Triton
    cannot run in any of them.
    """
    if not os.access("/tmp", os.W_OK | os.X_OK):
        raise UsageError("Triton needs to create files in /tmp: mount a writable folder there")
    home = os.environ.get("PYTRITON_HOME")
    for folder in [Path(os.path.realpath(home))] if home else _default_folders():
        if not (problem := _find_problem(folder, model_name)):
            return folder
        LOGGER.debug(problem)
    raise UsageError(f"{problem}: set PYTRITON_HOME to another folder{', such as /tmp/pytriton' if home else ''}")


def create_workspace(model_name: str) -> tempfile.TemporaryDirectory:
    """Create a private folder, which is removed at the end of a ``with`` block. Raises UsageError."""
    return tempfile.TemporaryDirectory(prefix="workspace_", dir=find_folder(model_name), ignore_cleanup_errors=True)


def _default_folders() -> list[Path]:
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # the user has no home
        return [Path("/tmp")]
    return [Path(os.path.realpath(cache)) / "pytriton", Path("/tmp")]


def _find_problem(folder: Path, model_name: str) -> str:
    # The longest path in the folder, with up to 1,000 instances.
    socket_path = folder / "workspace_12345678" / "triton" / f"{model_name}_0_999-server.sock"
    if not SAFE_PATH.fullmatch(str(folder)):
        return f"the path of PyTriton's folder, {str(folder)!r}, has characters that Triton does not support"
    if len(str(socket_path)) > SOCKET_PATH_BYTES:
        return f"the path of PyTriton's folder, {folder}, is too long for the sockets in it"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"PyTriton cannot create its workspace: {error}"
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return f"PyTriton's folder, {folder}, is on a file system that is mounted noexec"
    return ""
