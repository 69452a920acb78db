"""What touches the disk: whole or not at all, checked before, cached in one place."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glip_deploy import files
from glip_deploy.errors import OutputError
from glip_deploy.files import (
    atomic_file,
    cache_folder,
    check_file,
    check_folder,
    check_outputs,
    deliver_folder,
    not_written,
    temporary_sibling,
    unreadable,
    write_atomically,
)


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "results.json"
    write_atomically(file, "old")
    write_atomically(file, b"new", sync=True)
    assert file.read_bytes() == b"new" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("failure", [OSError("disk"), KeyboardInterrupt()])
def test_after_a_failure_the_old_file_stays_and_nothing_else(tmp_path, failure):
    file = tmp_path / "results.json"
    file.write_text("old")
    with pytest.raises(type(failure)), atomic_file(file) as partial:
        partial.write_text("half of the n")
        raise failure
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_the_temporary_name_keeps_the_suffix_and_the_folder(tmp_path):
    with atomic_file(tmp_path / "picture.png") as partial:
        assert partial.suffix == ".png" and partial.parent == tmp_path and partial.name.startswith(".picture.png.")


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_others_may_read_what_they_could_read_before(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_atomically(tmp_path / "atomic", "x")
    assert stat.S_IMODE((tmp_path / "atomic").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_long_name_is_no_obstacle(tmp_path):
    file = tmp_path / ("n" * 240 + ".json")
    write_atomically(file, "x")
    assert file.read_text() == "x"


def test_a_sibling_folder_goes_away_with_the_folders_made_for_it(tmp_path):
    target = tmp_path / "a" / "b" / "bundle"
    with pytest.raises(ValueError, match="stop"), temporary_sibling(target) as folder:
        (folder / "file").write_text("x")
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []
    with temporary_sibling(target) as folder:
        (folder / "file").write_text("x")
        folder.rename(target)
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]


def test_outputs_are_checked_without_being_touched(tmp_path):
    (tmp_path / "file").write_text("x")
    check_file(tmp_path / "new.json")
    check_folder(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for check, path, words in (
        (check_file, tmp_path, "is a folder; name a file in it"),
        (check_file, tmp_path / "none" / "x.json", "does not exist; make it first"),
        (check_folder, tmp_path / "file" / "x", "is a file; choose another name"),
    ):
        with pytest.raises(OutputError, match=words):
            check(path)


def test_an_output_is_no_input_and_no_other_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("read", "other"):
        Path(name).write_text("x")
    os.link("read", "linked")
    inputs = {Path("read"): "the source itself", Path("absent"): "the prompt file"}
    check_outputs(inputs, [Path("other"), Path("new"), tmp_path / "newer"])
    for name in ("read", "./read", str(tmp_path / "read"), "linked"):
        with pytest.raises(OutputError, match="is the source itself and would be overwritten; choose another name"):
            check_outputs(inputs, [Path("new"), Path(name)])
    with pytest.raises(OutputError, match="is the prompt file and"):
        check_outputs(inputs, [tmp_path / "absent"])
    for first, second in (("other", tmp_path / "other"), ("new", "./new"), ("new", tmp_path / "new")):
        with pytest.raises(OutputError, match="is named twice; give each output a name of its own"):
            check_outputs({}, [Path(first), Path(second)])
    check_outputs({}, [Path(os.devnull), Path(os.devnull)])


@pytest.mark.parametrize("check", [check_file, check_folder])
def test_a_name_the_system_refuses_is_one_line(tmp_path, monkeypatch, check):
    for path in (tmp_path / ("n" * 300), tmp_path / ("n" * 300) / "x.json"):
        with pytest.raises(OutputError, match="cannot be written") as caught:
            check(path)
        assert "\n" not in str(caught.value)

    def unreadable(self, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", unreadable)
    with pytest.raises(OutputError, match=r"cannot be written \(Permission denied\)"):
        check(tmp_path / "x.json")


@pytest.mark.skipif(os.name != "posix", reason="devices have other names on Windows")
def test_a_device_is_written_to_and_never_replaced(tmp_path):
    link = tmp_path / "results.json"
    link.symlink_to("/dev/null")
    write_atomically(link, "x")
    assert link.is_symlink() and [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_full_disk_is_named():
    import errno

    assert "no space left" in str(not_written(Path("x"), OSError(errno.ENOSPC, "No space left on device")))
    assert "(strange)" in str(not_written(Path("x"), OSError(errno.EIO, "strange")))


@pytest.mark.skipif(sys.platform != "linux", reason="platformdirs decides by the platform it runs on")
def test_the_cache_folder(monkeypatch, tmp_path):
    for name in ("GLIP_DEPLOY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "glip-deploy"
    assert cache_folder("plugin") == tmp_path / ".cache" / "glip-deploy" / "plugin"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "glip-deploy"
    monkeypatch.setenv("GLIP_DEPLOY_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"
    assert not (tmp_path / "own").exists()


def test_no_home_is_no_folder(monkeypatch):
    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("GLIP_DEPLOY_CACHE", "~/own")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert cache_folder() is None


def make_folder(target, text, overwrite=True):
    with temporary_sibling(target) as folder:
        (folder / "file").write_text(text)
        deliver_folder(folder, target, overwrite=overwrite)


def test_a_folder_is_delivered_whole_in_place_of_another(tmp_path):
    target = tmp_path / "made" / "bundle"
    make_folder(target, "first")
    (target / "stale").touch()
    make_folder(target, "second")
    assert [path.name for path in target.parent.iterdir()] == ["bundle"]
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [("file", "second")]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    for ours, plain in ((target, tmp_path / "new"), (target / "file", tmp_path / "new" / "file")):
        assert ours.stat().st_mode == plain.stat().st_mode


def test_a_folder_is_not_replaced_unasked(tmp_path):
    target = tmp_path / "bundle"
    make_folder(target, "first", overwrite=False)
    with pytest.raises(OSError, match=r"not empty|exists"):
        make_folder(target, "second", overwrite=False)
    assert (target / "file").read_text() == "first" and list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets two paths change places in one step")
def test_there_is_a_whole_folder_at_the_target_at_any_moment(tmp_path, monkeypatch):
    target = tmp_path / "bundle"
    make_folder(target, "first")
    monkeypatch.setattr(Path, "rename", lambda self, other: pytest.fail("two renames leave a moment without a folder"))
    make_folder(target, "second")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (target / "file").read_text() == "second"


KILLED = """
import os, signal, sys
from pathlib import Path
from glip_deploy.files import temporary_sibling
with temporary_sibling(Path(sys.argv[1])) as folder:
    (folder / "weights").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no lock that shows which process is alive")
def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path):
    target = tmp_path / "bundle"
    subprocess.run([sys.executable, "-c", KILLED, target], check=False)
    (left,) = tmp_path.iterdir()
    others = [tmp_path / name for name in (".bundle-settings", ".bundle2-abc.part", ".bundle-file.part")]
    for other in others[:2]:
        other.mkdir()
    others[2].write_text("a file")
    make_folder(target, "first")
    assert left.exists()  # so young that its process may be about to lock it
    for path in (left, *others):
        os.utime(path, (0, 0))
    with temporary_sibling(target) as alive:
        os.utime(alive, (0, 0))
        assert not left.exists()
        make_folder(target, "second")  # at the same time
        assert alive.is_dir()
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])


def test_what_cannot_be_read_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert unreadable(tmp_path / "file") is None
    assert unreadable(tmp_path) == "is a folder"
    assert unreadable(tmp_path / "none") == unreadable(tmp_path / "file" / "x") == "does not exist"
    with monkeypatch.context() as patched:  # tests may run as root, who may read everything
        patched.setattr(os, "access", lambda path, mode: False)
        assert unreadable(tmp_path / "file") == "cannot be read (permission denied)"
    assert "too long" in unreadable(tmp_path / ("x" * 300)) and unreadable(Path("a\0b")).startswith("cannot be read")


def test_a_folder_that_cannot_be_delivered_leaves_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)  # as on a disk that cannot
    target = tmp_path / "bundle"
    make_folder(target, "first")
    rename = Path.rename

    def refuse(self, other):
        if (self / "file").is_file() and (self / "file").read_text() == "second" and self != target:
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(KeyboardInterrupt):
        make_folder(target, "second")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (target / "file").read_text() == "first"


def test_an_array_that_is_cut_short_is_a_full_disk(tmp_path):
    """What numpy says of it has no error number."""
    message = str(not_written(tmp_path / "a", OSError("9216 requested and 0 written")))
    assert message == f"{tmp_path / 'a'} cannot be written: no space left; free some, or write elsewhere"


def test_a_cache_loses_what_is_unused_for_longest_and_what_was_abandoned(tmp_path):
    for age, name in enumerate(("new.x", "old.x", "oldest.x", ".making.x", ".abandoned.x")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (time.time() - age * 1000,) * 2)
    files.evict_unused([*tmp_path.iterdir(), tmp_path / "gone meanwhile.x"], 250)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".making.x", "new.x", "old.x"]
