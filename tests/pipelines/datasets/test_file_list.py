import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dalikd.pipelines.datasets import file_list as manifest
from dalikd.pipelines.datasets.file_list import (
    FileList,
    cache_folder,
    count_of,
    list_folder,
    manifest_folder,
    open_tree,
    scan,
)

LONG_AGO = 1_000_000_000  # s; folders older than the clock's grain may be remembered


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DALIKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_tree(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    age(folder)
    return folder


def age(folder: Path) -> None:
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        os.utime(path, (LONG_AGO, LONG_AGO))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree", ["cat/b.jpg", "cat/a.jpg", "cat/sub/c.png", "dog/x.JPEG", "dog/y.webp"])


def paths(tree: manifest.Tree) -> list[str]:
    return [tree.files.path(row) for row in range(len(tree.files))]


def forbid_scanning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("scanned again")

    monkeypatch.setattr(manifest, "scan", fail)


def open_small(folder: Path) -> manifest.Tree:
    return open_tree(folder, list_folder(folder).folders, remember_above=3)


class TestFileList:
    files = FileList.from_paths(["/r/a.jpg", "/r/käse.png", "/r/c/d.bmp"], "/r")

    def test_paths_come_back(self) -> None:
        assert len(self.files) == 3
        assert [self.files.path(row) for row in range(3)] == ["/r/a.jpg", "/r/käse.png", "/r/c/d.bmp"]

    def test_encoded_gives_views_in_the_order_asked_for(self) -> None:
        views = self.files.encoded(np.array([2, 0, 2]))
        assert [view.tobytes() for view in views] == [b"/r/c/d.bmp", b"/r/a.jpg", b"/r/c/d.bmp"]
        assert all(view.dtype == np.uint8 and np.shares_memory(view, self.files.buffer) for view in views)

    def test_name_that_is_not_utf8(self) -> None:
        assert os.fsencode(FileList.from_paths([b"/r/\xff.jpg"]).path(0)) == b"/r/\xff.jpg"

    def test_take_in_any_order_across_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(manifest, "_CHUNK_ROWS", 2)
        taken = self.files.take([2, 1, 2, 0, 0])
        assert [taken.path(row) for row in range(5)] == [self.files.path(row) for row in (2, 1, 2, 0, 0)]
        assert len(self.files.take([])) == 0

    def test_rows_out_of_range(self) -> None:
        with pytest.raises(IndexError):
            self.files.encoded([3])
        with pytest.raises(AssertionError):
            self.files.encoded([-1])

    @pytest.mark.parametrize("root", ["", "/", "/r", "/r/"])
    def test_relative_chunks_leave_the_root_out(self, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(manifest, "_CHUNK_ROWS", 2)
        names = ["/r/a.jpg", "/r/käse.png", "/r/c/d.bmp"]
        lengths, *parts = FileList.from_paths(names, root).relative_chunks()
        relative = [name.removeprefix(root).removeprefix("/" if root else "").encode() for name in names]
        assert b"".join(part.tobytes() for part in parts) == b"".join(relative)
        assert lengths.tolist() == [len(name) for name in relative]


class TestScan:
    def test_order_labels_and_what_is_an_image(self, tmp_path: Path) -> None:
        names = ["b/2.jpg", "b/10.PNG", "b/z/1.tif", "b/a/1.TIFF", "a/q.ppm", "a/p.bmp", "a/o.WebP", "a/n.jpeg"]
        left_out = ["a/notes.txt", "b/z/B.TXT", "a/jpg", "a/n.jpeg.bak", "stray.jpg", "b/1.gif"]
        passed_over = ["a/._n.jpeg", "a/.hidden/n.jpeg", ".git/x.jpg", "readme.txt", "a/Thumbs.db", "a/desktop.ini"]
        passed_over += ["a/@eaDir/n.jpeg", "__MACOSX/a/n.jpeg", "$RECYCLE.BIN/n.jpeg", "lost+found/n.jpeg"]
        folder = make_tree(tmp_path / "tree", names + left_out + passed_over)
        assert list_folder(folder).folders == ["a", "b"]
        tree = scan(folder, ("a", "b"))
        expected = ["a/n.jpeg", "a/o.WebP", "a/p.bmp", "a/q.ppm", "b/10.PNG", "b/2.jpg", "b/a/1.TIFF", "b/z/1.tif"]
        assert paths(tree) == [str(folder / name) for name in expected]
        assert tree.labels.tolist() == [0] * 4 + [1] * 4
        assert tree.labels.dtype == np.int64
        assert set(tree.directories) == {".", "a", "b", "b/a", "b/z"}
        assert (
            count_of(tree.left_out)
            == "2 .txt, 1 .bak, 1 .gif, 1 image(s) beside the class folders, 1 without an ending"
        )

    def test_empty_class_is_named(self, tree: Path) -> None:
        (tree / "bird").mkdir()
        (tree / "bird" / "readme.md").touch()
        message = r"tree/bird has no image \(\.jpg .*; it has 1 \.md: add some or remove the folder"
        with pytest.raises(ValueError, match=message):
            scan(tree, list_folder(tree).folders)

    def test_links_are_followed(self, tree: Path, tmp_path: Path) -> None:
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "cat").symlink_to(tree / "cat")
        assert paths(scan(tmp_path / "links", ("cat",)))[0] == str(tmp_path / "links/cat/a.jpg")

    def test_link_in_a_circle(self, tree: Path) -> None:
        (tree / "dog" / "again").symlink_to(tree / "dog")
        with pytest.raises(ValueError, match="dog/again links back to a folder above it"):
            scan(tree, ("dog",))

    @pytest.mark.parametrize("name", ["dog/gone", "gone"])
    def test_link_to_nothing(self, tree: Path, name: str) -> None:
        (tree / name).symlink_to(tree / "nowhere")
        with pytest.raises(FileNotFoundError, match=rf"tree/{name} is a link to nothing \(No such file"):
            scan(tree, ("dog",))
        (tree / name).unlink()
        (tree / name).symlink_to(tree / name)
        with pytest.raises(FileNotFoundError, match=rf"tree/{name} is a link to nothing \(Too many levels"):
            scan(tree, ("dog",))

    def test_what_is_no_file_but_is_named_like_an_image_is_listed_without_a_size(self, tree: Path) -> None:
        os.mkfifo(tree / "dog" / "pipe.jpg")
        (tree / "dog" / "folder.jpg").mkdir()
        (tree / "dog" / "folder.jpg" / "in_it.jpg").touch()
        (tree / "dog" / "device.jpg").symlink_to("/dev/zero")
        (tree / "dog" / "gone.jpg").symlink_to(tree / "nowhere")
        (tree / "dog" / "circle.jpg").symlink_to(tree / "dog" / "circle.jpg")
        (tree / "dog" / "link.jpg").symlink_to(tree / "cat" / "a.jpg")
        files = scan(tree, ("dog",)).files
        sizes = {Path(files.path(row)).stem: size for row, size in enumerate(files.measure().tolist())}
        assert sizes == dict.fromkeys(("pipe", "folder", "device", "gone", "circle"), -1) | dict.fromkeys("xy", 0) | {
            "link": 0
        }
        assert files.sides().tolist() == [[0, 0]] * len(files)  # and none of them is waited for

    def test_a_class_folder_that_is_named_like_an_image(self, tree: Path) -> None:
        (tree / "dog.jpg").mkdir()
        with pytest.raises(ValueError, match=r"tree/dog\.jpg is a folder, but its name ends as an image's: rename"):
            scan(tree, ("dog",))


class TestOpenTree:
    def test_second_start_reads_the_manifest(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = open_small(tree)
        forbid_scanning(monkeypatch)
        second = open_small(tree)
        assert paths(second) == paths(first)
        assert second.labels.tolist() == first.labels.tolist()
        assert second.directories == first.directories
        assert not second.files.buffer.flags.writeable  # it is mapped
        assert type(second.files.buffer) is np.ndarray

    def test_small_trees_are_not_remembered(self, tree: Path) -> None:
        open_tree(tree, list_folder(tree).folders, remember_above=5)
        assert not manifest_folder(tree).exists()
        open_tree(tree, list_folder(tree).folders)
        assert not manifest_folder(tree).exists()

    def test_fresh_folders_are_not_remembered(self, tree: Path) -> None:
        (tree / "dog" / "new.jpg").touch()
        assert len(open_small(tree).files) == 6
        assert not manifest_folder(tree).exists()

    @pytest.mark.parametrize("times_tell", [True, False])
    @pytest.mark.parametrize(
        ("change", "count"),
        [
            (lambda tree: (tree / "dog" / "z.jpg").touch(), 6),
            (lambda tree: (tree / "cat" / "sub" / "z.jpg").touch(), 6),
            (lambda tree: (tree / "dog" / "x.JPEG").unlink(), 4),
            (lambda tree: (tree / "cat" / "sub").rename(tree / "dog" / "sub"), 5),
            (lambda tree: make_tree(tree, ["bird/a.jpg"]), 6),
            (lambda tree: (tree / "dog").rename(tree / "hound"), 5),
        ],
        ids=["added", "added below", "removed", "folder moved", "class added", "class renamed"],
    )
    def test_a_change_is_seen(
        self, tree: Path, change, count: int, times_tell: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not times_tell:  # as on mounted object stores
            monkeypatch.setattr(manifest, "_times", lambda _: (0, 0))
        before = open_small(tree)
        change(tree)
        after = open_small(tree)
        assert len(after.files) == count
        assert paths(after) == paths(scan(tree, list_folder(tree).folders))
        assert paths(after) != paths(before)

    def test_a_file_replaced_under_its_name_is_seen_by_time_or_size(
        self, tree: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert open_small(tree).files.measure().tolist() == [0] * 5
        (tree / "dog/x.JPEG").write_bytes(b"1")  # in place: the folder stays as it was
        assert open_small(tree).files.measure().tolist() == [0, 0, 0, 1, 0]
        (tree / "new").write_bytes(b"22")
        (tree / "new").rename(tree / "dog/x.JPEG")
        age(tree)
        monkeypatch.setattr(manifest, "_has_same_sizes", lambda _: True)
        assert open_small(tree).files.measure().tolist() == [0, 0, 0, 2, 0]  # ctime: no tool sets it back

    def test_what_was_left_out_is_remembered_too(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_tree(tree, ["dog/a.gif"])
        opened = [open_small(tree)]
        forbid_scanning(monkeypatch)
        opened.append(open_small(tree))
        assert [tree.left_out for tree in opened] == [{".gif": 1}] * 2
        assert [tree.files.kept_in for tree in opened] == [str(manifest_folder(tree))] * 2

    def test_a_new_manifest_replaces_the_old(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        mapped = open_small(tree)
        mapped = open_small(tree)
        before = paths(mapped)
        make_tree(tree, ["dog/z.jpg"])
        os.utime(tree / "dog", (LONG_AGO + 1, LONG_AGO + 1))
        assert len(open_small(tree).files) == 6
        assert paths(mapped) == before  # its files are gone, the mapping is not
        assert len(list(manifest_folder(tree).iterdir())) == 5
        forbid_scanning(monkeypatch)
        assert len(open_small(tree).files) == 6

    def test_a_part_has_a_manifest_of_its_own(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = open_small(tree)
        parts = [open_tree(tree, [name], part=True, remember_above=1) for name in ("cat", "dog")]
        places = {manifest_folder(tree), manifest_folder(tree, ["cat"]), manifest_folder(tree, ["dog"])}
        assert len({path for path in places if (path / "manifest.json").is_file()}) == 3
        forbid_scanning(monkeypatch)
        again = [open_tree(tree, [name], part=True, remember_above=1) for name in ("cat", "dog")]
        assert [paths(tree) for tree in again] == [paths(tree) for tree in parts]
        assert sorted(paths(again[0]) + paths(again[1])) == sorted(paths(open_small(tree))) == sorted(paths(whole))

    @pytest.mark.parametrize("name", ["paths", "offsets", "labels", "sizes"])
    @pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove"])
    def test_damaged_array(self, tree: Path, name: str, damage: str) -> None:
        expected = paths(open_small(tree))
        (path,) = manifest_folder(tree).glob(f"{name}-*.npy")
        content = path.read_bytes()
        if damage == "remove":
            path.unlink()
        else:
            flipped = content[:-1] + bytes([content[-1] ^ 1])
            path.write_bytes({"flip": flipped, "cut": content[:-3], "empty": b""}[damage])
        with pytest.warns(UserWarning, match=f"the list of {tree} in .* is damaged .*; scanning again"):
            assert paths(open_small(tree)) == expected
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it has been repaired
            assert paths(open_small(tree)) == expected

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 1}', "\xff"])
    def test_damaged_json(self, tree: Path, content: str) -> None:
        expected = paths(open_small(tree))
        (manifest_folder(tree) / "manifest.json").write_text(content, encoding="latin1")
        with pytest.warns(UserWarning, match="is damaged"):
            assert paths(open_small(tree)) == expected

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("paths", lambda array: array.tobytes().replace(b"tree/", b"etc//", 1)),
            ("paths", lambda array: array[:-8].tobytes() + b"x/../y.j"),
            ("paths", lambda array: array[:-1].tobytes() + b"\0"),
            ("offsets", lambda array: array[[0, 2, 1, *range(3, len(array))]]),
            ("offsets", lambda array: array + 1),
            ("labels", lambda array: array - 1),
            ("labels", lambda array: array + 2),
            ("labels", lambda array: array[:-1]),
            ("sizes", lambda array: -1 - array),
            ("sizes", lambda array: array.astype(np.float64)),
        ],
    )
    def test_a_list_that_scan_did_not_make_is_not_used(self, tree: Path, name: str, change: Any) -> None:
        """With its right checksum."""
        expected = paths(open_small(tree))
        place = manifest_folder(tree) / "manifest.json"
        note = json.loads(place.read_text())
        arrays = {each: np.load(place.parent / f"{each}-{note['checksum']}.npy") for each in manifest._ARRAYS}
        made = change(arrays[name])
        arrays[name] = np.frombuffer(made, np.uint8) if isinstance(made, bytes) else made
        note["checksum"] = manifest._checksum(arrays.values())
        for each, array in arrays.items():
            np.save(place.parent / f"{each}-{note['checksum']}.npy", array)
        place.write_text(json.dumps(note))
        with pytest.warns(UserWarning, match="is damaged"):
            assert paths(open_small(tree)) == expected

    def test_folders_of_another_form(self, tree: Path) -> None:
        expected = paths(open_small(tree))
        place = manifest_folder(tree) / "manifest.json"
        note = json.loads(place.read_text())
        note["directories"] = {name: state[:2] for name, state in note["directories"].items()}
        place.write_text(json.dumps(note))
        with pytest.warns(UserWarning, match="is damaged"):
            assert paths(open_small(tree)) == expected

    @pytest.mark.parametrize(("key", "value"), [("version", 0), ("folder", "/elsewhere")])
    def test_foreign_manifest_is_not_used(self, tree: Path, key: str, value: object) -> None:
        open_small(tree)
        path = manifest_folder(tree) / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        assert len(open_small(tree).files) == 5
        assert json.loads(path.read_text())[key] != value

    def test_cache_that_cannot_be_written(self, tree: Path, cache: Path) -> None:
        cache.write_text("a file is in the way")
        with pytest.warns(UserWarning, match="could not be kept"):
            assert len(open_small(tree).files) == 5

    def test_several_processes_at_once(self, tmp_path: Path) -> None:
        names = [f"class{label}/{number:03d}.jpg" for label in range(10) for number in range(200)]
        folder = make_tree(tmp_path / "many", names)
        program = (
            "import sys, pathlib\n"
            "from dalikd.pipelines.datasets.file_list import list_folder, open_tree\n"
            "folder = pathlib.Path(sys.argv[1])\n"
            "sys.stdin.readline()\n"  # all start at the same moment
            "for _ in range(10):\n"
            "    tree = open_tree(folder, list_folder(folder).folders, remember_above=10)\n"
            "    assert len(tree.files) == 2000 and tree.files.path(1999).endswith('class9/199.jpg')\n"
        )
        command = [sys.executable, "-W", "error", "-c", program, str(folder)]
        workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(b"go\n")
            worker.stdin.flush()
        for worker in workers:
            _, errors = worker.communicate(timeout=60)
            assert worker.returncode == 0, errors.decode()
        assert sorted(path.suffix for path in manifest_folder(folder).iterdir()) == [".json", *[".npy"] * 4]


class TestCacheFolder:
    def test_environment(self, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert cache_folder() == cache
        monkeypatch.delenv("DALIKD_CACHE")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert cache_folder() == tmp_path / ".cache" / "dalikd"


# --------------------------------------------------------------------------------------------- sides of the images


def test_sides_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {"cat/a.png": (5, 7), "cat/b.png": (300, 20), "dog/c.png": (1, 1), "dog/d.png": (0, 0)}
    tree = make_tree(tmp_path / "tree", list(sides))
    for name, (height, width) in sides.items():
        if height:
            Image.new("L", (width, height)).save(tree / name)
    age(tree)
    files = open_small(tree).files
    assert files.kept_in
    assert files.sides().tolist() == [list(pair) for pair in sides.values()]
    assert files.sides().dtype == np.int32
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_sides_in_file", None)
        assert open_small(tree).files.sides().tolist() == files.sides().tolist()
    Image.new("L", (50, 40)).save(tree / "dog/d.png")  # another size in bytes
    age(tree)
    assert open_small(tree).files.sides().tolist()[-1] == [40, 50]


def test_sides_of_a_list_that_is_not_kept(tmp_path: Path) -> None:
    Image.new("L", (50, 40)).save(tmp_path / "a.png")
    paths = [tmp_path / "a.png", tmp_path / "none.png", tmp_path]  # only the first can be read
    assert FileList.from_paths([str(path) for path in paths]).sides().tolist() == [[40, 50], [0, 0], [0, 0]]
