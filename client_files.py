# SPDX-License-Identifier: Apache-2.0
"""The client's files: finds the photos to send, names the output files, and decides which files may be replaced.

A hidden file in the output folder records each output file: its name, its photo and its SHA-256. An output file counts
as the client's while its SHA-256 matches, and a photo's files have the same names in each run.
"""

import contextlib
import errno
import functools
import glob
import hashlib
import json
import os
import secrets
import stat
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import IO, NamedTuple

from client_report import plural, say
from connection import ClientError

PHOTO_EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp"}
RECORD = ".segmentation.jsonl"


class PhotoFile(NamedTuple):
    """A file to send. ``problem`` says why it cannot be sent, and is empty if it can."""

    path: Path
    problem: str = ""


def find_photos(patterns: Sequence[str], output_dir: Path | None = None) -> list[PhotoFile]:
    """Return the photos that the arguments of ``--image-paths`` match, in a stable order.

    Files that the client wrote are skipped, unless they are named. Those in ``output_dir``, where this run writes, are
    always skipped, because a shell names all files that match a pattern.
    """
    photos: list[PhotoFile] = []
    skipped: Counter[str] = Counter()
    output_folder = functools.cache(OutputFolder)
    real_output_dir = os.path.realpath(output_dir) if output_dir else None

    def is_own(file: Path) -> bool:
        is_own = output_folder(file.parent).wrote(file)
        skipped["written by this client"] += is_own
        return is_own

    for pattern in patterns:
        path = Path(pattern)
        try:
            if path.is_dir():
                files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
                found = [file for file in files if file.suffix.lower() in PHOTO_EXTENSIONS]
                extensions = [file.suffix.lower() for file in files if file.is_file()]
                skipped.update(kind or "without an extension" for kind in extensions if kind not in PHOTO_EXTENSIONS)
                nothing = f"contains no photos ({', '.join(sorted(PHOTO_EXTENSIONS))})"
            elif os.path.lexists(path) or not glob.has_magic(pattern):
                if os.path.realpath(path.parent) != real_output_dir or not is_own(path):
                    photos.append(PhotoFile(path, problem_of(path)))
                continue
            else:
                files = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207 - Path.glob takes no absolute pattern
                found = [file for file in files if file.suffix.lower() in PHOTO_EXTENSIONS or not file.is_dir()]
                nothing = "matches no file"
        except OSError as error:
            photos.append(PhotoFile(path, f"cannot be read ({error.strerror})"))
            continue
        if not found:
            photos.append(PhotoFile(path, nothing))
        photos += [PhotoFile(file, problem_of(file)) for file in found if not is_own(file)]
    skipped = +skipped
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
        say(f"skipping {plural(skipped.total(), 'file')}: {kinds}")
    return photos


def problem_of(file: Path) -> str:
    """Return why a file cannot be sent, or an empty string."""
    try:
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a pipe might wait forever
            return "is a folder" if stat.S_ISDIR(mode) else "is not a file"
        file.open("rb").close()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


class OutputFolder:
    """A folder for the client's files, which is created if necessary. Thread-safe."""

    def __init__(self, folder: Path, photos: Iterable[Path] = (), overwrite: bool = False):
        """``photos`` are never overwritten; ``overwrite`` allows all other files to be replaced."""
        self.folder = folder
        self._overwrite = overwrite
        self._photos = {identity for photo in photos if (identity := _identity(photo))}
        self._lock = threading.Lock()
        self._written: set[tuple[str, str]] = set()  # names of files and their SHA-256
        self._owners: dict[str, str] = {}  # the photo of each caseless name; some file systems ignore case
        with contextlib.suppress(OSError), self._open_record(errors="replace") as record:  # if there is one
            for line in record:
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # a damaged line
                    entry = json.loads(line)
                    self._written.add((entry["file"], entry["sha256"]))
                    self._owners[_caseless(str(entry["file"]))] = entry["photo"]

    def create(self) -> None:
        """Create the folder unless it exists. Raises ClientError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), self.folder)
            self._open_record("a").close()
        except OSError as error:
            raise ClientError(f"--output-dir: cannot write {error.filename} ({error.strerror})") from error

    def wrote(self, file: Path) -> bool:
        """Return whether the client wrote this file of the folder, and the file is unchanged."""
        if _caseless(file.name) not in self._owners:
            return False
        try:
            with file.open("rb") as content:
                return (file.name, hashlib.file_digest(content, "sha256").hexdigest()) in self._written
        except OSError:
            return False

    def numbered(self, index: int, extensions: Mapping[str, str]) -> dict[str, Path]:
        """Return the files of a photo by kind, such as ``segm0.png``. ``extensions`` has the extension of each kind."""
        return {kind: self.folder / f"{kind}{index}.{extension}" for kind, extension in extensions.items()}

    def named(self, photo: Path, extensions: Mapping[str, str]) -> dict[str, Path]:
        """Return the files of a photo by kind, named after it: ``beach.png``, or ``beach-2.png`` if that is taken."""
        owner = self._relative(photo)
        for number in count(1):
            stem = photo.stem if number == 1 else f"{photo.stem}-{number}"
            names = {
                kind: f"{stem}.{extension}" if kind == "segm" else f"{stem}.{kind}.{extension}"
                for kind, extension in extensions.items()
            }
            files = {kind: self.folder / name for kind, name in names.items()}
            if all(self._is_available(file, owner) for file in files.values()):
                self._owners |= {_caseless(name): owner for name in names.values()}
                return files
        raise AssertionError

    def _is_available(self, file: Path, owner: str) -> bool:
        if _identity(file) in self._photos:
            return False
        known = self._owners.get(_caseless(file.name))
        return known == owner if known is not None else self._overwrite or not os.path.lexists(file)

    def _relative(self, photo: Path) -> str:
        # Resolve the folders first: ".." in a path does not lead back through a symbolic link.
        return os.path.relpath(Path(os.path.realpath(photo.parent), photo.name), os.path.realpath(self.folder))

    def obstacle(self, file: Path) -> str:
        """Return why a file must not be written, or an empty string."""
        if not os.path.lexists(file):
            return ""
        if _identity(file) in self._photos:
            return f"{file} is one of the photos"
        if file.is_dir():
            return f"{file} is a folder"
        if self._overwrite or self.wrote(file):
            return ""
        return f"{file} exists, and this client did not write it, or it has changed since"

    def write(self, photo: Path, file: Path, content: bytes) -> None:
        """Write and record a file about a photo. An interruption leaves either the complete file or none.

        Raises OSError, also if another program has written the file since :meth:`obstacle` was called.
        """
        sha256 = hashlib.sha256(content).hexdigest()
        entry = {"photo": self._relative(photo), "sha256": sha256, "file": file.name}
        unfinished = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
        with self._lock:
            try:
                unfinished.write_bytes(content)
                if obstacle := self.obstacle(file):  # such as a file of another client
                    raise FileExistsError(errno.EEXIST, obstacle)
                self._record(entry)  # first, or an interruption could leave a file without a record
                unfinished.replace(file)
            except OSError as error:
                unfinished.unlink(missing_ok=True)
                raise OSError(error.errno, f"cannot write {file} ({error.strerror})") from error
            self._written.add((file.name, sha256))

    def _record(self, entry: Mapping[str, str]) -> None:
        with self._open_record("a") as record:
            record.write("\n" + json.dumps(entry))  # on a separate line, even if the last one is incomplete

    def _open_record(self, *arguments: object, **options: object) -> IO:
        path = self.folder / RECORD
        # A link may point to another user's file, and opening a pipe might wait forever.
        if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, "it is not a file", path)
        return path.open(*arguments, **options)

    def stop(self) -> None:
        """Wait for the file that is being written, and block all further ones. Call it before the process exits."""
        self._lock.acquire()


def _caseless(name: str) -> str:
    """Return a key that is equal for two names if a file system, such as that of macOS, may treat them as the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _identity(path: Path) -> tuple[int, int] | None:
    """Return the device and inode of a file, which are the same for all of its paths."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
