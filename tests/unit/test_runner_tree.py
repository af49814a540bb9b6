"""Confinement: a container may leave any link anywhere, and the runner is never led out."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tesp_api.runner.errors import Missing, Refused
from tesp_api.runner.job import FILE, FileRoot
from tesp_api.runner.tree import Point, Tree, roots_tree
from tests.runner_jobs import in_time

SECRET = "the node's own"


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def open_descriptors() -> int:
    return len(listing(Path("/proc/self/fd")))


class Place:
    """A tree with /in, /out, /out/deep/nested and the single file /etc/conf; beside it a secret on the node."""

    def __init__(self, base: Path) -> None:
        self.secret = base / "secret"
        self.secret.write_text(SECRET)
        (base / "outside").mkdir()
        (base / "outside" / "file").write_text(SECRET)
        self.base = base
        self.dirs = {name: base / name for name in ("in", "out", "nested")}
        for path in self.dirs.values():
            path.mkdir()
        (base / "conf").write_text("conf")
        (base / "ro").mkdir()
        self.tree = Tree(
            [
                Point("/in", str(self.dirs["in"])),
                Point("/out", str(self.dirs["out"])),
                Point("/out/deep/nested", str(self.dirs["nested"])),
                Point("/etc/conf", str(base / "conf"), FILE),
                Point("/ro", str(base / "ro"), writable=False),
            ],
            open_to_all=True,
        )

    def read(self, path: str) -> str:
        with os.fdopen(self.tree.open_read(path)) as stream:
            return stream.read()

    def write(self, path: str, text: str) -> None:
        with os.fdopen(self.tree.open_write(path), "w") as stream:
            stream.write(text)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    before = open_descriptors()
    yield Place(tmp_path)
    assert open_descriptors() == before, "descriptors were left open"


@pytest.mark.parametrize(
    "target",
    [
        "{secret}",
        "/etc/passwd",
        "/etc/shadow",
        "/proc/self/root{secret}",
        "../secret",
        "../../../../../../../../../../etc/passwd",
        "/",
        "/out/../../etc/passwd",
        "link",
        "/out/link",
        "../in/../../secret",
    ],
)
def test_links_that_lead_out_are_refused(place: Place, target: str) -> None:
    (place.dirs["out"] / "link").symlink_to(target.format(secret=place.secret))
    for action in (place.read, lambda path: place.write(path, "x"), place.tree.draft):
        with pytest.raises((Refused, Missing)):
            action("/out/link")
    assert place.secret.read_text() == SECRET


@pytest.mark.parametrize("target", ["{outside}", "../outside", "/proc/self/cwd", "/"])
def test_directories_behind_links_are_refused_too(place: Place, target: str) -> None:
    (place.dirs["out"] / "link").symlink_to(target.format(outside=place.base / "outside"))
    for path in ("/out/link/file", "/out/link/new"):
        with pytest.raises((Refused, Missing)):
            place.read(path)
        with pytest.raises((Refused, Missing)):
            place.write(path, "x")
    with pytest.raises((Refused, Missing)):
        place.tree.make_directory("/out/link/new")
    assert place.tree.names("/out/link") in ([], ["etc", "in", "out", "ro"])
    assert (place.base / "outside" / "file").read_text() == SECRET
    assert listing(place.base / "outside") == ["file"]


def test_links_inside_are_followed_as_the_container_sees_them(place: Place) -> None:
    (place.dirs["in"] / "data").write_text("data")
    out = place.dirs["out"]
    (out / "absolute").symlink_to("/in/data")
    (out / "relative").symlink_to("../in/data")
    (out / "climbing").symlink_to("../../../../in/./data")
    (out / "dir").symlink_to("/in/")
    (out / "chain").symlink_to("dir/../out/absolute")
    (out / "single").symlink_to("/etc/conf")
    (out / "mounted").symlink_to("deep/nested/x")
    (place.dirs["nested"] / "x").write_text("nested")
    for name in ("absolute", "relative", "climbing", "dir/data", "chain"):
        assert place.read("/out/" + name) == "data", name
    assert place.read("/out/single") == "conf"
    assert place.read("/out/mounted") == "nested"
    (out / "dangling").symlink_to("/in/made")
    place.write("/out/dangling", "new")
    assert (place.dirs["in"] / "made").read_text() == "new"


def test_a_nested_mount_wins_over_what_lies_below_it(place: Place) -> None:
    (place.dirs["out"] / "deep").mkdir()
    (place.dirs["out"] / "deep" / "nested").symlink_to(place.base / "outside")  # whatever the outer one holds there
    (place.dirs["nested"] / "file").write_text("right")
    assert place.read("/out/deep/nested/file") == "right"
    assert place.tree.names("/out/deep") == ["nested"]
    assert place.tree.names("/") == ["etc", "in", "out", "ro"]


def test_endless_links_end(place: Place) -> None:
    out = place.dirs["out"]
    (out / "a").symlink_to("b")
    (out / "b").symlink_to("a")
    (out / "deeper").symlink_to("deeper/x")
    for name in ("a", "deeper"):
        with pytest.raises(Refused, match="too many links"):
            place.read("/out/" + name)


def test_special_files_are_never_opened(place: Place) -> None:
    out = place.dirs["out"]
    os.mkfifo(out / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(out / "socket"))
        if os.geteuid() == 0:
            os.mknod(out / "device", 0o666 | 0o020000, os.makedev(1, 5))
        for name in listing(out):
            for action in (place.tree.open_read, place.tree.open_write, place.tree.draft):

                def refused(action: object = action, name: str = name) -> bool:
                    with pytest.raises(Refused, match="not a regular file"):
                        action("/out/" + name)  # type: ignore[operator]
                    return True

                assert in_time(refused)
        found = {entry.relative: entry.kind for entry in place.tree.walk("/out")}
    assert set(found) >= {"fifo", "socket"}
    assert {found["fifo"], found["socket"]} == {None}


def test_a_walk_takes_links_in_and_tells_of_the_rest(place: Place) -> None:
    out = place.dirs["out"]
    (place.dirs["in"] / "tree" / "empty").mkdir(parents=True)
    (place.dirs["in"] / "tree" / "leaf").write_text("x")
    (out / "tree").symlink_to("/in/tree")
    (out / "loop").symlink_to(".")
    (out / "up").symlink_to("..")
    (out / "leak").symlink_to(place.secret)
    (out / "deep").mkdir()
    found = {entry.relative: entry.kind for entry in place.tree.walk("/out")}
    assert {name: kind for name, kind in found.items() if not name.startswith("up")} == {
        "deep": "DIRECTORY",
        "deep/nested": "DIRECTORY",
        "leak": None,
        "loop": None,
        "tree": "DIRECTORY",
        "tree/empty": "DIRECTORY",
        "tree/leaf": "FILE",
    }
    assert found["up/out"] is None  # back where it began


def test_read_only_mounts_stay_so(place: Place) -> None:
    (place.base / "ro" / "file").write_text("x")
    (place.dirs["out"] / "back").symlink_to("/ro/file")
    assert place.read("/ro/file") == "x"
    for path in ("/ro/file", "/ro/new", "/ro/a/b", "/out/back"):
        with pytest.raises(Refused):
            place.write(path, "y")
    assert listing(place.base / "ro") == ["file"]


def test_what_is_made_is_open_to_every_user_of_the_container(place: Place) -> None:
    old = os.umask(0o077)
    try:
        place.write("/out/a/b/c", "x")
    finally:
        os.umask(old)
    assert (place.dirs["out"] / "a").stat().st_mode & 0o777 == 0o777
    assert (place.dirs["out"] / "a" / "b" / "c").stat().st_mode & 0o777 == 0o666


@pytest.mark.parametrize("path", ["", "in/x", "/nowhere", "/in", "/", "/in\0x", "/etc", "/etc/conf/x", "/in/../x"])
def test_paths_that_are_none(place: Place, path: str) -> None:
    with pytest.raises((Refused, Missing)):
        place.tree.open_read(path)


def test_names_that_are_no_utf8(place: Place) -> None:
    os.close(os.open(os.fsencode(place.dirs["out"]) + b"/\xff\xfe", os.O_CREAT))
    (name,) = [entry.relative for entry in place.tree.walk("/out") if entry.kind == FILE]
    os.close(place.tree.open_read("/out/" + name))


def test_drafts_replace_or_vanish(place: Place) -> None:
    (place.dirs["out"] / "file").write_text("old")
    draft = place.tree.draft("/out/file")
    os.write(draft.fd, b"new")
    assert place.read("/out/file") == "old"
    draft.commit()
    assert place.read("/out/file") == "new"
    place.tree.draft("/out/file").discard()
    assert listing(place.dirs["out"]) == ["file"]


def test_file_roots(tmp_path: Path) -> None:
    real = tmp_path / "disk"
    (real / "sub").mkdir(parents=True)
    (real / "sub" / "file").write_text("x")
    (tmp_path / "data").symlink_to(real)
    (real / "inside").symlink_to(real / "sub" / "file")  # the node's own path, below the root's real place
    (real / "outside").symlink_to("/etc/passwd")
    tree = roots_tree([FileRoot(str(tmp_path / "data"), write=False)])
    for name in ("sub/file", "inside"):
        os.close(tree.open_read(f"{tmp_path}/data/{name}"))
    with pytest.raises(Refused):
        tree.open_read(f"{tmp_path}/data/outside")
    with pytest.raises(Refused):
        tree.open_read("/etc/passwd")
    with pytest.raises(Refused):
        tree.draft(f"{tmp_path}/data/new")
