"""Files and folders that are seen whole: beside writers, after kills, with the right permissions, and the sentence
where they are not.
"""

import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from support.paths import ROOT

from jetkernels import files
from jetkernels.files import replacing, write_atomic
from jetkernels.reading import parse_json, reading

NAMES = ("a", "b", "c")
WAYS = ("exchange", "one by one", "inside")


def no_exchange(*names):
    raise OSError(errno.ENOSYS, "no exchange")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """How a folder that is there gets its new files: with renameat2, without it, and where the parent is out of
    reach.
    """
    if request.param == "one by one":
        monkeypatch.setattr(files, "_exchange", no_exchange)
    if request.param == "inside":
        monkeypatch.setattr(files, "_is_mount", lambda folder: True)
    return request.param


def put(folder: Path, stamp: object, names=NAMES, drop=()) -> None:
    with replacing(folder, drop) as new:
        for name in names:
            (new / name).write_text(str(stamp))


def stamps(folder: Path, names=NAMES) -> list[str]:
    with reading(folder, lambda opened: [opened.read(name).decode() for name in names]) as found:
        return found


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- folders


def test_new_files_take_the_place_of_old_ones_and_others_stay(tmp_path, way):
    folder = tmp_path / "m"
    put(folder, 1, [*NAMES, "old-1", "old-2"])
    (folder / "README").write_text("kept")
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "er" / "file").write_text("kept")
    (folder / "link").symlink_to("README")
    (folder / "nowhere").symlink_to("gone")
    shared = tmp_path / "shared"
    shared.hardlink_to(folder / "a")
    inode = (folder / "README").stat().st_ino
    put(folder, 2, [*NAMES, "old-2"], drop=("old-*",))
    assert tree(folder) == ["README", "a", "b", "c", "deep", "deep/er", "deep/er/file", "link", "nowhere", "old-2"]
    assert stamps(folder, [*NAMES, "old-2"]) == ["2"] * 4 and (folder / "deep" / "er" / "file").read_text() == "kept"
    assert (
        (folder / "README").stat().st_ino == inode
        and (folder / "link").is_symlink()
        and (folder / "link").read_text() == "kept"
    )
    assert shared.read_text() == "1" and sorted(os.listdir(tmp_path)) == ["m", "shared"]


def test_a_block_that_fails_changes_nothing(tmp_path, way):
    folder = tmp_path / "m"
    for before in ([], ["m"]):
        with pytest.raises(ZeroDivisionError), replacing(folder) as new:
            (new / "a").write_text("half")
            raise ZeroDivisionError
        assert os.listdir(tmp_path) == before
        put(folder, 1)
    assert stamps(folder) == ["1"] * 3 and tree(folder) == list(NAMES)


@pytest.mark.parametrize(
    "umask, file_mode, folder_mode", [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_permissions_follow_the_umask(tmp_path, way, umask, file_mode, folder_mode):
    def mode(path):
        return stat.S_IMODE(path.stat().st_mode)

    folder, file = tmp_path / "m", tmp_path / "report.md"
    before = os.umask(umask)
    try:
        with replacing(folder) as new:
            os.close(os.open(new / "private", os.O_CREAT, 0o600))
            (new / "sub").mkdir()
            (new / "sub" / "file").write_text("")
        write_atomic(file, b"")
        assert [mode(p) for p in (folder, folder / "sub")] == [folder_mode] * 2
        assert [mode(p) for p in (folder / "private", folder / "sub" / "file", file)] == [file_mode] * 3
        folder.chmod(0o750)
        (folder / "sub" / "file").chmod(0o604)
        put(folder, 1)
        assert mode(folder) == 0o750 and mode(folder / "a") == file_mode and mode(folder / "sub" / "file") == 0o604
    finally:
        os.umask(before)


def test_the_working_folder_is_saved_into_and_not_exchanged(tmp_path, monkeypatch):
    put(tmp_path / "m", 1)
    monkeypatch.chdir(tmp_path / "m")
    put(Path("."), 2)
    assert sorted(os.listdir()) == list(NAMES) and Path("a").read_text() == "2" == (tmp_path / "m" / "a").read_text()


def test_a_link_to_a_folder_stays_a_link(tmp_path, way):
    (tmp_path / "disk").mkdir()
    (tmp_path / "m").symlink_to("disk")
    put(tmp_path / "m", 1)
    assert (
        (tmp_path / "m").is_symlink()
        and stamps(tmp_path / "disk") == ["1"] * 3
        and sorted(os.listdir(tmp_path)) == ["disk", "m"]
    )


def test_what_cannot_be_replaced_is_named(tmp_path, way):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        put(tmp_path / "file", 1)
    for below in ("below", "far/below"):
        with pytest.raises(NotADirectoryError, match=f"^save: {tmp_path}/file is not a folder$"):
            put(tmp_path / "file" / below, 1)
    with pytest.raises(FileNotFoundError, match="must have a name, got ''"):
        put("", 1)
    (tmp_path / "m" / "a").mkdir(parents=True)
    if way != "exchange":
        with pytest.raises(IsADirectoryError, match="m/a must be a file"):
            put(tmp_path / "m", 1)
    assert sorted(os.listdir(tmp_path)) == ["file", "m"] and tree(tmp_path / "m") == ["a"]


# ---- the dead and the living


def test_only_workplaces_of_the_dead_are_removed(tmp_path, way):
    """The lock tells, not the age nor a process number; what only looks alike is somebody's."""
    folder = tmp_path / "m"
    put(folder, 1)
    dead = tmp_path / ".jetkernels-abcdefgh.saving"
    (dead / "new").mkdir(parents=True)
    (dead / "new" / "gigabytes").write_text("x")
    (dead / "lock").write_text("")
    (tmp_path / ".jetkernels-aaaaaaaa.saving").mkdir()  # killed before it had a lock
    (tmp_path / ".jetkernels-mine").mkdir()
    inside = folder / ".jetkernels-abcdefgh.saving"
    inside.mkdir()
    with files._Workplace(tmp_path) as living:
        os.utime(living.path, (0, 0))
        put(folder, 2)
        assert sorted(os.listdir(tmp_path)) == sorted([".jetkernels-mine", living.path.name, "m"])
    put(folder, 3)
    assert sorted(os.listdir(tmp_path)) == [".jetkernels-mine", "m"] and tree(folder) == list(NAMES)


def die_at(name: str):
    """A function of `files` that ends the process."""
    return f"files.{name} = lambda *arguments: os._exit(9)\n"


def run(code: str, folder: Path) -> int:
    code = (
        "import os, sys, types, errno\nfrom pathlib import Path\nfrom importlib import util\n"
        + (
            "spec = util.spec_from_file_location('files', sys.argv[1]); files = util.module_from_spec(spec)\n"
            "sys.modules['files'] = files; spec.loader.exec_module(files)\n"
        )
        + code
    )
    return subprocess.run([sys.executable, "-c", code, files.__file__, str(folder)]).returncode


SAVE = "with files.replacing(sys.argv[2], ('c',)) as new:\n    [(new / name).write_text('2') for name in 'ab']\n"
ALONE = "def none(*a): raise OSError(errno.ENOSYS, '')\nfiles._exchange = none\n"


def test_a_reader_finishes_what_a_dead_writer_began_to_put_in_place(tmp_path):
    """Killed behind the first of two files: from the record the reader, or the next writer, does the rest."""
    dies = "real = os.replace\ndef replace(*names):\n    real(*names); os._exit(9)\nos.replace = replace\n"
    put(tmp_path / "m", 1)
    assert run(ALONE + dies + SAVE, tmp_path / "m") == 9
    assert ".jetkernels-installing" in os.listdir(tmp_path / "m")
    assert (
        stamps(tmp_path / "m", "ab") == ["2", "2"]
        and tree(tmp_path / "m") == ["a", "b"]
        and os.listdir(tmp_path) == ["m"]
    )


def test_a_writer_that_dies_before_leaves_the_save_before(tmp_path):
    put(tmp_path / "m", 1)
    for dies in (die_at("_exchange"), ALONE + die_at("_move").replace("_move", "_install"), die_at("_put_in_place")):
        assert run(dies + SAVE, tmp_path / "m") == 9
        assert stamps(tmp_path / "m") == ["1"] * 3 and len(os.listdir(tmp_path)) > 1
    put(tmp_path / "m", 3)
    assert os.listdir(tmp_path) == ["m"]


# ---- permissions, seen by a normal user

# Root may do anything. These processes become a user who owns nothing but what he makes.
NOBODY = 65534
A_USER = f"if not os.geteuid():\n    os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
DENIED = 13
REFUSED = f"try:\n    {SAVE.replace(chr(10) + '    ', chr(10) + '        ')}" + (
    "except PermissionError as error:\n    assert error.filename == sys.argv[2] and error.filename2 is None, error\n"
    f"    sys.exit({DENIED})\n"
)


@pytest.fixture
def everyones():
    """A folder that every user may write, and reach: not below pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def give(path: Path, user: int) -> None:
    if not os.geteuid():
        for entry in (path, *path.rglob("*")):
            os.chown(entry, user, -1)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what belongs to another user")


@pytest.mark.parametrize("seen", ["files._writable = lambda folder: True\n", ""], ids=["at the exchange", "before"])
@pytest.mark.parametrize("owner", [NOBODY, pytest.param(0, marks=needs_root)])
def test_a_folder_that_may_not_be_written_is_named_and_nothing_is_left_behind(everyones, owner, seen):
    folder = everyones / "m"
    put(folder, 1)
    give(folder, owner)
    folder.chmod(0o555)
    for _ in range(2):
        assert run(A_USER + seen + REFUSED, folder) == DENIED
        assert os.listdir(everyones) == ["m"]
    assert stamps(folder) == ["1"] * 3 and tree(folder) == list(NAMES) and stat.S_IMODE(folder.stat().st_mode) == 0o555


def test_closed_folders_of_the_dead_are_removed(everyones):
    put(everyones / "m", 1)
    give(everyones / "m", NOBODY)
    dead = (
        f"dead = Path({str(everyones)!r}) / '.jetkernels-abcdefgh.saving'; (dead / 'new' / 'sub').mkdir(parents=True)\n"
        "for name in ('lock', 'new/gigabytes', 'new/sub/more'): (dead / name).write_text('')\n"
        "for name in ('new/sub', 'new'): (dead / name).chmod(0o555)\n"
    )
    assert run(A_USER + dead + SAVE, everyones / "m") == 0
    assert os.listdir(everyones) == ["m"] and stamps(everyones / "m", "ab") == ["2", "2"]


@pytest.mark.parametrize("alone", ["", ALONE], ids=["exchange", "one by one"])
def test_closed_folders_in_a_folder_stay_as_they_are(everyones, alone):
    folder = everyones / "m"
    put(folder, 1)
    (folder / "notes").mkdir()
    (folder / "notes" / "file").write_text("kept")
    give(folder, NOBODY)
    (folder / "notes").chmod(0o555)
    for _ in range(2):
        assert run(A_USER + alone + SAVE, folder) == 0
        assert os.listdir(everyones) == ["m"] and tree(folder) == ["a", "b", "notes", "notes/file"]
    assert stamps(folder, "ab") == ["2", "2"] and stat.S_IMODE((folder / "notes").stat().st_mode) == 0o555


@needs_root
def test_anothers_folder_in_a_folder_stays_his(everyones):
    folder = everyones / "m"
    put(folder, 1)
    give(folder, NOBODY)
    (folder / "notes").mkdir(mode=0o755)
    (folder / "notes" / "file").write_text("kept")
    before = (folder / "notes").stat()
    assert run(A_USER + SAVE, folder) == 0
    after = (folder / "notes").stat()
    assert (before.st_ino, before.st_uid) == (after.st_ino, after.st_uid) and os.listdir(everyones) == ["m"]
    assert stamps(folder, "ab") == ["2", "2"] and tree(folder) == ["a", "b", "notes", "notes/file"]


def test_what_is_mounted_in_a_folder_is_not_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_is_mount", lambda folder: folder.name == "mounted")
    put(tmp_path / "m", 1)
    (tmp_path / "m" / "mounted").mkdir()
    (tmp_path / "m" / "mounted" / "file").write_text("kept")
    before = [(tmp_path / "m" / name).stat().st_ino for name in ("mounted", "mounted/file")]
    put(tmp_path / "m", 2)
    assert [(tmp_path / "m" / name).stat().st_ino for name in ("mounted", "mounted/file")] == before
    assert stamps(tmp_path / "m") == ["2"] * 3 and os.listdir(tmp_path) == ["m"]


# ---- several at once


def test_a_writer_that_follows_on_one_that_cleans_up_is_waited_for(tmp_path, monkeypatch):
    """Between the look at a workplace that is all but removed and its removal another writer's may take its name."""
    place = tmp_path / files.INSTALLING
    place.mkdir()
    rmdir, tries = os.rmdir, []

    def overtaken(path):
        tries.append(path)
        if len(tries) == 1:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        rmdir(path)

    monkeypatch.setattr(os, "rmdir", overtaken)
    files.finish(tmp_path)
    assert len(tries) == 2 and not place.exists()


def test_readers_and_writers_at_once(tmp_path, way):
    """Writers of a set of files, of one more file of the folder, and of a report in it; readers of the set. Nothing is
    mixed or lost.
    """
    folder, wrong, reads, stop = tmp_path / "m", [], [], threading.Event()
    put(folder, 0)

    def watched(work):
        def body():
            try:
                work()
            except BaseException as error:
                wrong.append(error)

        return threading.Thread(target=body)

    def write_set(writer):
        for i in range(12):
            put(folder, 100 * writer + i)

    def write_one():
        for i in range(12):
            put(folder, i, [f"one-{i}"])

    def write_reports():
        for i in range(12):
            write_atomic(folder / f"report-{i}", b"r")

    def read():
        while not stop.is_set():
            found = set(stamps(folder))
            assert len(found) == 1, found
            reads.append(found)

    writers = [watched(lambda: write_set(1)), watched(lambda: write_set(2)), watched(write_one), watched(write_reports)]
    readers = [watched(read) for _ in range(2)]
    for thread in writers + readers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not wrong and reads, wrong
    assert tree(folder) == sorted([*NAMES, *(f"{kind}-{i}" for kind in ("one", "report") for i in range(12))])
    assert set(stamps(folder)) <= {"111", "211"} and os.listdir(tmp_path) == ["m"]


def test_a_folder_that_is_always_replaced_ends_in_a_sentence(tmp_path, monkeypatch):
    put(tmp_path / "m", 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    tried = []

    def load(opened):
        tried.append(opened.read("a"))
        put(tmp_path / "m", 2)

    with (
        pytest.raises(OSError, match="m was replaced 100 times while it was being opened"),
        reading(tmp_path / "m", load),
    ):
        pass
    assert len(tried) == 100


def test_files_of_one_save_stay_readable_when_it_is_replaced(tmp_path, way):
    put(tmp_path / "m", 1)
    with reading(tmp_path / "m", lambda opened: (opened, opened.open("a"))) as (opened, _):
        put(tmp_path / "m", 2)
        assert opened.read("a") == b"1" and Path(opened.reopenable("a")).read_text() == "1"
    assert stamps(tmp_path / "m") == ["2"] * 3


def test_without_locks_nothing_of_anothers_is_removed(tmp_path, way, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    other = tmp_path / ".jetkernels-abcdefgh.saving"
    (other / "new").mkdir(parents=True)
    put(tmp_path / "m", 1)
    put(tmp_path / "m", 2)
    write_atomic(tmp_path / "m" / "report", b"r")
    assert stamps(tmp_path / "m") == ["2"] * 3 and tree(tmp_path / "m") == [*NAMES, "report"]
    assert sorted(os.listdir(tmp_path)) == [other.name, "m"] and (other / "new").is_dir()


# ---- what is no file


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, kind in (
        ("folder", IsADirectoryError),
        ("pipe", OSError),
        ("loop", OSError),
        ("gone", FileNotFoundError),
    ):
        with pytest.raises(kind) as caught, reading(tmp_path, lambda opened: opened.read(name)):
            pass
        assert caught.value.filename == str(tmp_path / name)


def test_errors_of_the_system_name_what_was_to_be_written(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as caught, replacing(tmp_path / "m"):
        full()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "m"))
    with pytest.raises(OSError) as caught, replacing(tmp_path / "m") as new:
        open(new / "gone" / "a", "w")
    assert caught.value.filename == str(tmp_path / "m" / "gone" / "a")
    with pytest.raises(OSError, match="a sentence$"), replacing(tmp_path / "m"):
        raise OSError("a sentence")
    with monkeypatch.context() as patch:
        patch.setattr(files, "_flush", full)
        with pytest.raises(OSError) as caught:
            write_atomic(tmp_path / "report", b"r")
        assert caught.value.filename == str(tmp_path / "report")
    with monkeypatch.context() as patch:
        patch.setattr(
            files.os,
            "replace",
            lambda a, b: (_ for _ in ()).throw(PermissionError(errno.EPERM, "not permitted", str(a), None, str(b))),
        )
        with pytest.raises(PermissionError) as caught:
            write_atomic(tmp_path / "report", b"r")
        assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "report"), None)
    with monkeypatch.context() as patch:
        patch.setattr(files.tempfile, "mkdtemp", full)
        with pytest.raises(OSError) as caught:
            write_atomic(tmp_path / "report", b"r")
        assert caught.value.filename == str(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_file_is_written_whole_through_links(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_atomic(tmp_path / "link", b"new")
    assert (
        (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new" and len(os.listdir(tmp_path)) == 2
    )
    with pytest.raises(IsADirectoryError, match=f"^save: {tmp_path} is a folder, it must be a file$"):
        write_atomic(tmp_path, b"")
    with pytest.raises(NotADirectoryError, match=f"^save: {tmp_path}/real is not a folder$"):
        write_atomic(tmp_path / "real" / "below", b"")
    with pytest.raises(FileNotFoundError, match="must have a name, got ''"):
        write_atomic("", b"")
    write_atomic(tmp_path / "deep" / "er" / ("n" * 255), b"long")
    assert tree(tmp_path / "deep") == ["er", "er/" + "n" * 255]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is not JSON"),
        (b'{"a": 1', "is not JSON"),
        (b"\xef\xbb\xbf{}", "is not JSON: .*BOM"),
        (b'{"a": "\xff"}', "is not JSON: .*utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "has the key 'c' twice"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_json_that_is_no_object_is_refused(content, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_json(content, "here/config.json")
    assert str(caught.value).startswith("here/config.json")


def test_saves_survive_kills(tmp_path):
    """A few dozen; the command kills a thousand and more."""
    command = [sys.executable, "-m", "tests.campaigns.kill_saves", "--kills", "24", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["wrong"] == 0, found
    assert all(
        found[name]["killed"] >= 8 and found[name]["loads beside"] for name in ("exchange", "one by one", "file")
    ), found
