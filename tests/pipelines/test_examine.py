import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dalikd.pipelines import examine as examining
from dalikd.pipelines.content import facts_of
from dalikd.pipelines.data import open_source
from dalikd.pipelines.datasets import file_list
from dalikd.pipelines.datasets.file_list import NEVER, FileRecord
from dalikd.pipelines.doctor import Child, known_bad_files
from dalikd.pipelines.examine import examine
from dalikd.pipelines.loader import BadFileError, Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DALIKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(examining, "_HERE", 1000)  # few images: no processes, which take seconds to start


@pytest.fixture
def source(small_images: Path, tmp_path: Path) -> Source:
    """300 images, to be spoiled."""
    shutil.copytree(small_images, tmp_path / "data")
    return open_source("imagefolder", tmp_path / "data", "train", split=".")


def _spoil(source: Source, row: int) -> Path:
    path = Path(source.path(row))
    path.write_bytes(path.read_bytes()[:300])
    return path


def test_processes_find_what_this_process_finds(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil(source, 7)
    Path(source.path(9)).write_bytes(b"")
    monkeypatch.setattr(examining, "_HERE", 256)
    one = examine(source, processes=2, hashing=True)  # more than are looked at in this process
    shutil.rmtree(source.record_folder)
    monkeypatch.setattr(examining, "_HERE", 1000)
    other = examine(source, hashing=True)
    assert (one.known, other.known) == (0, 0)
    assert one.record.names == other.record.names
    for name in set(file_list.ENTRY.names or ()) - {"fault", "mode", "format"}:
        assert np.array_equal(one.record.entries[name], other.record.entries[name]), name
    for found in (one, other):
        words = [found.record.words[place] for place in found.record.entries["fault"]]
        assert {row: word for row, word in enumerate(words) if word} == {
            7: "the JPEG is truncated",
            9: "the file is empty",
        }
    assert one.spent.keys() == other.spent.keys() == {"reading", "headers", "decoding"}


def test_what_was_found_before_an_interruption_is_kept(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "_LEAST_IMAGES", 50)
    monkeypatch.setattr(examining, "_PART_IMAGES", 50)
    look_at, calls = examining.look_at, []

    def interrupted(part, decoder):
        calls.append(part)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return look_at(part, decoder)

    monkeypatch.setattr(examining, "look_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        examine(source)
    assert examine(source).known == 100


# of a process that looks at nothing, but dies of what it is named for
_STUB = """
import os, signal
from dalikd.pipelines import examine
def stub(part, decoder):
    for path in part.paths:
        for number in (signal.SIGSEGV, signal.SIGKILL):
            if number.name.encode() in path:
                os.kill(os.getpid(), number)
    return [examine.Look((1, 2), examine.Facts("JPEG", 3, 4, "RGB"), "", b"") for _ in part.paths], {}
examine.look_at = stub
examine.serve()
"""


def _add(source: Source, name: str) -> Source:
    shutil.copy(source.path(0), Path(source.path(0)).with_name(f"{name}.jpg"))
    assert source.files is not None
    return open_source("imagefolder", source.files.root, "train", split=".")


def test_an_image_that_ends_the_process_is_named(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _add(source, "SIGSEGV")
    monkeypatch.setattr(examining, "_CODE", _STUB)
    monkeypatch.setattr(examining, "_HERE", 0)
    monkeypatch.setattr(examining, "_LEAST_IMAGES", 8)
    monkeypatch.setattr(examining, "_PART_IMAGES", 8)
    found = examine(source, processes=2).record
    faults = {
        found.names[row]: found.words[found.entries["fault"][row]] for row in np.flatnonzero(found.entries["fault"])
    }
    assert faults == {b"ant/SIGSEGV.jpg": "this image ends the process that decodes it (SIGSEGV)"}
    assert [Path(bad.path).name for bad in known_bad_files(source)] == ["SIGSEGV.jpg"]
    assert np.count_nonzero(found.entries["width"] == 4) == 300


def test_a_process_that_is_killed_blames_no_image(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _add(source, "SIGKILL")
    monkeypatch.setattr(examining, "_CODE", _STUB)
    monkeypatch.setattr(examining, "_HERE", 0)
    monkeypatch.setattr(examining, "_PART_IMAGES", 50)
    with pytest.raises(OSError, match=r"killed \(SIGKILL\), as where memory is short: give fewer --processes"):
        examine(source, processes=1)
    assert known_bad_files(source) == []


def test_processes_share_a_small_set_and_are_used_again(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "_CODE", _STUB)
    monkeypatch.setattr(examining, "_HERE", 0)
    crew: list[Child] = []
    examine(source, crew, processes=2)
    before = list(crew)
    assert len(before) == 2
    for row in range(300):
        os.utime(source.path(row))
    assert examine(source, crew, processes=2).known == 0
    assert len(crew) == 2
    assert crew == before


def test_some_classes_do_not_wipe_out_what_is_known_of_others(source: Source, tmp_path: Path) -> None:
    examine(source)
    (tmp_path / "list").write_text("ant\nbee\n")
    assert source.files is not None
    part = open_source("imagefolder", source.files.root, "train", split=".", classes=tmp_path / "list")
    os.utime(part.path(0), ns=(5, 5))
    assert examine(part).known == 199
    Path(source.path(299)).unlink()
    os.utime(part.path(0), ns=(6, 6))
    assert examine(part).known == 199
    assert len(FileRecord.read(source.record_folder).names) == 299


def test_a_record_that_cannot_be_kept_is_a_warning(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileRecord, "write", full)
    with pytest.warns(UserWarning, match="what was found of . could not be kept in .*No space left"):
        assert len(examine(source).record.entries) == 300


def test_a_damaged_record_is_made_again(source: Source) -> None:
    examine(source)
    (path,) = source.record_folder.glob("examined*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged .*: all files are looked at again"):
        assert examine(source).known == 0
    assert examine(source).known == 300


def test_other_decoders_look_again_and_sides_stay(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    _spoil(source, 7)
    examine(source)
    assert len(known_bad_files(source)) == 1
    monkeypatch.setattr(file_list, "package_versions", lambda: {"dali": "9.9.9"})
    assert known_bad_files(source) == []
    assert (FileRecord.read(source.record_folder).entries["mtime_ns"] == NEVER).all()
    assert (FileRecord.read(source.record_folder).entries["height"] == 32).all()


def test_a_run_takes_sides_from_it(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    examine(source)
    assert source.files is not None
    with Path(source.path(3)).open("ab") as file:
        file.write(b"longer")
    looked = []
    sides_in_file = file_list._sides_in_file
    monkeypatch.setattr(file_list, "_sides_in_file", lambda path: looked.append(path) or sides_in_file(path))
    found = open_source("imagefolder", source.files.root, "train", split=".").files
    assert found is not None
    assert (found.sides() == 32).all()
    assert [os.fsdecode(path) for path in looked] == [source.path(3)]


def test_bad_files_that_are_known_are_replaced_before_they_are_met(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [_spoil(source, row) for row in (7, 8)]
    spec_of, sampler = _spec(), Sampler(300, 30, shuffle=False)
    late = Loader(source, sampler, spec_of, bad_files="replace")
    expected = [batch.images.clone() for batch in late]
    assert late.replaced == {7: 9, 8: 9}
    examine(source)
    with pytest.raises(BadFileError, match=f"dalikd doctor could not decode {bad[0]} .*, {bad[1]}"):
        Loader(source, sampler, spec_of)
    capsys.readouterr()
    early = Loader(source, sampler, spec_of, bad_files="replace")
    assert early.replaced == late.replaced
    assert early.damaged == late.damaged
    assert capsys.readouterr().out.count("\n") == 1
    assert all((batch.images == images).all() for batch, images in zip(early, expected, strict=True))
    shutil.copy(source.path(0), bad[0])
    assert [item.row for item in known_bad_files(source)] == [8]
    bad[1].unlink()
    assert known_bad_files(source) == []


def _spec():
    from dalikd.pipelines.draw_spec import DrawSpec, View

    return DrawSpec(View(32, "center_crop", resize=32))


@pytest.mark.parametrize(
    ("mode", "suffix", "expected"),
    [
        *(("RGB", "jpg", "RGB"), ("L", "jpg", "grey"), ("CMYK", "jpg", "CMYK")),
        *(("RGBA", "png", "RGB with alpha"), ("LA", "png", "grey with alpha"), ("P", "png", "palette")),
        *(
            ("1", "png", "grey"),
            ("I;16", "png", "grey, 16 bit"),
            ("RGB", "webp", "RGB"),
            ("RGBA", "webp", "RGB with alpha"),
        ),
        *(("RGB", "bmp", "RGB"), ("L", "tif", "grey"), ("I;16", "tif", "grey, 16 bit"), ("RGB", "ppm", "RGB")),
        *(("RGB", "jp2", "RGB"), ("P", "bmp", "palette")),
    ],
)
def test_facts_of_a_header(tmp_path: Path, mode: str, suffix: str, expected: str) -> None:
    image = Image.new("RGBA", (7, 5), (9, 99, 199, 50))
    if mode != "RGBA":
        image = Image.new(mode, (7, 5)) if mode in ("I;16", "LA") else image.convert("RGB").convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    encoded = (tmp_path / f"x.{suffix}").read_bytes()
    facts = facts_of(encoded)
    assert facts[1:] == (5, 7, expected, 1)
    for length in range(0, len(encoded), 3):
        facts_of(encoded[:length])  # raises nothing


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 8])
def test_orientation_of_a_header(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (7, 5)).save(tmp_path / f"x.{suffix}", exif=exif)
    assert facts_of((tmp_path / f"x.{suffix}").read_bytes()).orientation == orientation
