# SPDX-License-Identifier: Apache-2.0
"""client.py: which files it reads and writes, what it prints, and that it loses nothing."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLES, run_python, sample
from PIL import Image

from client_files import RECORD, OutputFolder
from client_report import Result, plural

PERSON, CAT = SAMPLES["person"][0], SAMPLES["cat"][0]


def digests(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files in a folder that are not hidden, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def test_neither_photos_nor_files_of_others_are_overwritten(run_client, mask_server, tmp_path):
    shutil.copy(PERSON, "orig1.jpg")
    shutil.copy(CAT, "cat.jpg")
    before = digests(tmp_path)
    send = functools.partial(run_client, "--url", mask_server.http_url, "--image-paths", "orig1.jpg", "cat.jpg")
    done = send("--dump-images")
    assert (done.status, done.err) == (
        2,
        "client.py: orig1.jpg is one of the photos: set another --output-dir, or --keep-names\n",
    )
    assert send("--dump-images", "--overwrite").status == 2  # not even then
    Path("segm1.jpg").write_bytes(b"a drawing")
    done = run_client("--url", mask_server.http_url, "--image-paths", "cat.jpg", "cat.jpg", "--format", "jpeg")
    assert done.status == 2
    assert (
        "segm1.jpg exists, and this client did not write it, or it has changed since: set another --output-dir"
        in done.err
    )
    done = send("--mask", "--report", "cat.jpg")
    assert (done.status, "cat.jpg is one of the photos: set another file" in done.err) == (2, True)
    assert digests(tmp_path) == before | {"segm1.jpg": b"a drawing"}
    done = send("--format", "jpeg", "--overwrite")
    assert done.status == 0, done.err
    assert Image.open("segm1.jpg").size == Image.open("cat.jpg").size
    # An edited file no longer counts as the client's.
    Path("segm0.jpg").write_bytes(b"edited")
    assert send("--format", "jpeg").status == 2
    assert Path("segm0.jpg").read_bytes() == b"edited"


def test_a_second_run_replaces_its_files_and_does_not_take_them_for_photos(run_client, mask_server, tmp_path):
    sample("person", (90, 90)).save(tmp_path / "a.jpg")
    sample("cat", (90, 60)).save(tmp_path / "b.jpg")
    send = functools.partial(run_client, "--url", mask_server.http_url, "--dump-images", "--image-paths")
    assert send("*.jpg").status == 0
    written = digests(tmp_path)
    assert set(written) == {"a.jpg", "b.jpg", "orig0.jpg", "orig1.jpg", "segm0.jpg", "segm1.jpg"}
    for arguments in (["*.jpg"], ["."], sorted(written)):  # the last is how a shell expands *.jpg
        done = send(*arguments)
        assert done.status == 0, done.err
        assert "skipping 4 files: 4 written by this client\n" in done.err
        assert "client.py: 2 of 2 photos, 0 failed, " in done.err
        assert digests(tmp_path) == written
    # A file that is named, and not in the output folder, is sent.
    assert send("segm1.jpg", "--output-dir", "out").status == 0
    assert Image.open(tmp_path / "out" / "orig0.jpg").size == (90, 60)


def test_files_are_named_after_their_photos_and_none_has_the_name_of_another(run_client, mask_server, tmp_path):
    photos = ["north/beach.jpg", "south/beach.jpg", "north/Beach.png", "north/beach.mask.jpg", "beach-2.jpg"]
    for index, name in enumerate(photos):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        sample("cat", (60 + index, 40)).save(path)
    options = ("--url", mask_server.http_url, "--format", "png", "--mask", "--keep-names", "--output-dir", "out")
    done = run_client(*options, "--report", "report.jsonl", "--image-paths", *photos)
    assert done.status == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    files = {line["file"]: line["files"] for line in lines}
    assert files["north/beach.jpg"] == ["out/beach.png", "out/beach.mask.png"]
    assert files["south/beach.jpg"] == ["out/beach-2.png", "out/beach-2.mask.png"]
    names = [name.casefold() for written in files.values() for name in written]
    assert len({*names}) == len(names) == 10
    for index, photo in enumerate(photos):
        assert {Image.open(tmp_path / file).size for file in files[photo]} == {(60 + index, 40)}


def test_a_run_is_resumed_after_photos_were_added_and_removed(run_client, mask_server, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(3):
        sample("cat", (90 + index, 60)).save(photos / f"photo{index}.png")
    arguments = ("--format", "png", "--mask", "--output-dir", "out", "--skip-existing", "--image-paths", "photos")
    done = run_client("--url", mask_server.http_url, *arguments)
    assert (done.status, "skipping" in done.err) == (0, False)
    out = tmp_path / "out"
    written = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != RECORD}
    assert len(written) == 6
    (out / "photo1.mask.png").unlink()  # as if it had been interrupted
    (photos / "photo0.png").unlink()
    for name, width in (("added.png", 50), ("photo2.jpg", 51)):
        sample("cat", (width, 60)).save(photos / name)
    done = run_client("--url", mask_server.http_url, *arguments)
    assert done.status == 0, done.err
    assert "skipping 1 of 4 photos: the output files exist" in done.err
    again = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != RECORD}
    unchanged = {path.name for path in written if again[path] == written[path]}
    assert unchanged == {"photo0.png", "photo0.mask.png", "photo2.png", "photo2.mask.png"}
    new = {path.name for path in again.keys() - written.keys()}
    assert new == {"added.png", "added.mask.png", "photo2-2.png", "photo2-2.mask.png"}
    widths = {name: Image.open(out / f"{name}.png").width for name in ("added", "photo1", "photo2", "photo2-2")}
    assert widths == {"added": 50, "photo1": 91, "photo2": 92, "photo2-2": 51}
    # When nothing is left to do, no server is needed.
    done = run_client("--url", "http://127.0.0.1:9", *arguments)
    assert (done.status, done.out) == (0, "")
    assert done.err == "skipping 4 of 4 photos: the output files exist\n"


def test_of_two_clients_at_once_none_replaces_a_file_of_the_other(tmp_path):
    endings = {"segm": "png"}
    clients = [OutputFolder(tmp_path) for _ in range(2)]
    files = [
        client.named(Path(place, "beach.jpg"), endings)["segm"] for place, client in zip("ab", clients, strict=True)
    ]
    assert files[0] == files[1]
    clients[0].write(Path("a/beach.jpg"), files[0], b"first")
    with pytest.raises(OSError, match="exists, and this client did not write it, or it has changed since"):
        clients[1].write(Path("b/beach.jpg"), files[1], b"second")
    assert digests(tmp_path) == {"beach.png": b"first"}
    assert not [*tmp_path.glob(".*.part")]
    # The next run gives it another name.
    assert OutputFolder(tmp_path).named(Path("b/beach.jpg"), endings) == {"segm": tmp_path / "beach-2.png"}


def test_photos_whose_paths_look_the_same_through_links_do_not_share_a_name(tmp_path):
    (tmp_path / "out").mkdir()
    photos = []
    for place in "ab":
        photos.append(tmp_path / place / "photos" / "beach.jpg")
        photos[-1].parent.mkdir(parents=True)
        (tmp_path / place / "out").symlink_to(tmp_path / "out")
    for place, photo, name in zip("ab", photos, ["beach.png", "beach-2.png"], strict=True):
        output = OutputFolder(tmp_path / place / "out")
        file = output.named(photo, {"segm": "png"})["segm"]
        assert file.name == name
        output.write(photo, file, b"")
    # Each keeps its name, whichever path leads to it.
    output = OutputFolder(tmp_path / "out")
    assert [output.named(photo, {"segm": "png"})["segm"].name for photo in photos] == ["beach.png", "beach-2.png"]


def test_names_that_a_file_system_may_take_for_the_same_are_told_apart(tmp_path):
    names = ["\u00c9.jpg", "e\u0301.jpg"]  # composed, and as macOS writes it
    output = OutputFolder(tmp_path)
    assert [output.named(Path(name), {"segm": "png"})["segm"].name for name in names] == ["\u00c9.png", "e\u0301-2.png"]


def test_a_damaged_record_costs_no_later_line(tmp_path):
    (tmp_path / RECORD).write_bytes(b"[" * 100_000 + b'\n[]\n\xff\n{"photo": "a.jpg", "sha')
    OutputFolder(tmp_path).write(Path("a.jpg"), tmp_path / "a.png", b"cut out")
    assert OutputFolder(tmp_path).wrote(tmp_path / "a.png")


@pytest.mark.parametrize("line", ['{"file": "cat.jpg", "label": 3}', "[" * 100_000, "[]"])
def test_json_of_somebody_else_is_no_report(run_client, tmp_path, line):
    labels = tmp_path / "labels.jsonl"
    labels.write_text(line)
    done = run_client("--url", "http://127.0.0.1:9", "--image-paths", PERSON, "--report", labels)
    assert done.status == 2
    assert (
        "labels.jsonl exists, and this client did not write it, or it has changed since: set another file" in done.err
    )
    assert labels.read_text() == line


def test_the_last_report_stays_until_something_can_be_sent(run_client, tmp_path):
    report = tmp_path / "report.jsonl"
    report.write_text(json.dumps(Result("photo.jpg")._asdict()) + "\n")
    before = report.read_text()
    arguments = ("--image-paths", PERSON, "--report", report)
    assert run_client("--url", "http://127.0.0.1:9", "--init-timeout-s", 0, *arguments).status == 2
    assert report.read_text() == before


@pytest.mark.parametrize("kind", ["a link", "a pipe", "a folder"])
def test_a_record_that_is_not_a_file_is_neither_waited_for_nor_written(run_client, tmp_path, kind):
    other = tmp_path / "other"
    other.write_text("precious")
    record = tmp_path / RECORD
    {"a link": lambda: record.symlink_to(other), "a pipe": lambda: os.mkfifo(record), "a folder": record.mkdir}[kind]()
    done = run_client("--url", "http://127.0.0.1:9", "--image-paths", PERSON, "--mask")
    assert (done.status, done.err) == (2, f"client.py: --output-dir: cannot write {RECORD} (it is not a file)\n")
    assert other.read_text() == "precious"


@pytest.mark.parametrize("count", [1, 2])
def test_more_than_one_photo_has_a_progress_bar_on_a_terminal_alone(mask_server, tmp_path, count):
    terminal, stderr = os.openpty()
    termios.tcsetwinsize(stderr, (24, 100))
    command = [sys.executable, ROOT / "client.py", "--url", mask_server.http_url, "--image-paths", *[PERSON] * count]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr, text=True, check=True)
    os.close(stderr)
    bar = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert ("2/2 photos" in bar) == ("photos/s]" in bar) == (count == 2)
    assert bar.splitlines()[-1].startswith(f"client.py: {count} of {plural(count, 'photo')}, 0 failed, ")
    assert re.fullmatch(r"(.*orig\.jpg: 512 x 512 pixels, \d+% kept, \d+ ms\n)+", done.stdout)


def test_without_a_terminal_there_are_lines_alone(run_client, mask_server):
    done = run_client("--url", mask_server.http_url, "--image-paths", PERSON, CAT)
    assert done.status == 0
    assert len(done.out.splitlines()) == 2
    assert re.fullmatch(r"client\.py: 2 of 2 photos, 0 failed, \d+\.\d s, \d+\.\d photos/s\n", done.err)


def test_the_report_has_a_line_of_json_for_each_photo(run_client, mask_server, tmp_path):
    (tmp_path / "empty.jpg").touch()
    arguments = ("--url", mask_server.http_url, "--format", "png", "--image-paths", CAT, "empty.jpg", "missing.jpg")
    done = run_client(*arguments, "--report", "report.jsonl", "--output-dir", "out")
    assert done.status == 1
    lines = {}
    for line in (tmp_path / "report.jsonl").read_text().splitlines():
        entry = json.loads(line)
        lines[entry.pop("file")] = entry
    nothing = {"width": None, "height": None, "kept": None, "encoded_bytes": None, "milliseconds": None, "files": []}
    assert lines["empty.jpg"] == nothing | {"error": "the file is empty"}
    assert lines["missing.jpg"] == nothing | {"error": "cannot be read (No such file or directory)"}
    cat = lines[str(CAT)]
    assert (cat["width"], cat["height"], cat["files"], cat["error"]) == (451, 300, ["out/segm0.png"], None)
    assert cat["encoded_bytes"] == (tmp_path / "out" / "segm0.png").stat().st_size
    assert 0 <= cat["kept"] < 1
    assert cat["milliseconds"] > 0
    # On stdout, it replaces the lines for people. The file of the earlier run may be replaced.
    done = run_client(*arguments, "--report", "-", "--output-dir", "out")
    assert {json.loads(line)["file"] for line in done.out.splitlines()} == {str(CAT), "empty.jpg", "missing.jpg"}
    assert run_client(*arguments, "--report", "report.jsonl", "--output-dir", "out").status == 1


def test_an_unreadable_file_in_a_folder_does_not_keep_the_others_from_being_sent(run_client, mask_server, tmp_path):
    folder = tmp_path / "folder"
    (folder / "folder.jpg").mkdir(parents=True)
    (folder / "dangling.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jpg")
    for name in ("._cat.jpg", ".DS_Store", "notes.txt", "photo.heic"):
        (folder / name).touch()
    for name in ("cat.jfif", "cat.jpe"):
        shutil.copy(CAT, folder / name)
    paths = ("folder", "f*/folder.*", "missing.jpg", "*.missing", 300 * "x")
    done = run_client("--url", mask_server.http_url, "--image-paths", *paths)
    assert done.status == 1
    assert "skipping 2 files: 1 .txt, 1 .heic\n" in done.err
    for reason in (
        "folder/dangling.jpg: cannot be read (No such file or directory)",
        "folder/pipe.jpg: is not a file",
        "missing.jpg: cannot be read (No such file or directory)",
        "*.missing: matches no file",
        "xxx: cannot be read (File name too long)",
    ):
        assert f"{reason}\n" in done.err
    assert done.err.count("folder/folder.jpg: is a folder\n") == 2
    assert "client.py: 9 of 9 photos, 7 failed, " in done.err
    assert {line.split(":")[0] for line in done.out.splitlines()} == {"folder/cat.jfif", "folder/cat.jpe"}


def test_a_name_may_contain_anything_and_have_any_ending_if_it_is_given(mask_server, tmp_path):
    names = ["é\n.heic", os.fsdecode(b"\xff.jpg")]
    for name in names:
        shutil.copy(CAT, tmp_path / name)
    arguments = ("--url", mask_server.http_url, "--format", "png", "--keep-names", "--image-paths", *names)
    done = run_python(ROOT / "client.py", *arguments, cwd=tmp_path, environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert {line.split(":")[0] for line in done.stdout.splitlines()} == {r"\xe9\n.heic", r"\udcff.jpg"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "é\n.png", os.fsdecode(b"\xff.png"), RECORD}
    again = run_python(ROOT / "client.py", *arguments, "--skip-existing", cwd=tmp_path)
    assert again.stderr == "skipping 2 of 2 photos: the output files exist\n"


@pytest.mark.parametrize(
    ("command", "statuses", "said", "written"),
    [
        ("{client} --mask | head -0", "0 0", "", 3),  # files are written even without a reader
        ("{client} | head -0", "141 0", "", 0),  # the report has no reader
        ("{client} --mask > /dev/full", "1", "client.py: cannot write to stdout (No space left on device)", 3),
        ("{client} --mask >&-", "0", "", 3),
        ("ulimit -f 8; {client} --mask --dump-images", "1", "orig0.jpg (File too large)", 3),
    ],
)
def test_a_write_error_is_reported_and_costs_nothing_else(mask_server, tmp_path, command, statuses, said, written):
    run = [sys.executable, ROOT / "client.py", "--url", mask_server.http_url, "--image-paths", *[CAT] * 3]
    script = command.format(client='"$@" --concurrency 1') + "; echo ${PIPESTATUS[@]} >&2"
    done = subprocess.run(["bash", "-c", script, "-", *run], cwd=tmp_path, capture_output=True, text=True, check=False)
    *lines, last = done.stderr.splitlines()
    assert last == statuses
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not any("Exception" in line for line in lines)
    files = {path.name for path in tmp_path.iterdir()} - {RECORD}
    if "ulimit" in command:  # none of the originals fits
        assert files == set()
        assert "client.py: 3 of 3 photos, 3 failed, " in done.stderr
    else:
        assert files == {f"mask{index}.png" for index in range(written)}
