import dataclasses
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

from dalikd.pipelines.data import open_source
from dalikd.tools.bench import machine, main
from dalikd.tools.bench.machine import describe, draw_images, read_ahead

CPU = torch.device("cpu")


def test_environment_names_machine_versions_and_changes_of_the_code(monkeypatch, tmp_path):
    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    found = machine.environment(CPU)
    assert found["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert found["cores_available"] == machine.cores() >= 1
    assert found["time"].startswith(found["date"])
    assert found["commit"] == "unknown"  # outside a clone
    assert "gpus" not in found
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    clean = machine.environment(CPU)["commit"]
    assert len(clean) == 12
    (tmp_path / "new").write_text("")
    assert machine.environment(CPU)["commit"] == f"{clean} + changes"


def test_a_gpu_is_described_by_nvidia_smi_and_becomes_part_of_a_file_name(monkeypatch):
    line = "NVIDIA H200, 580.1, 143771 MiB, 700.00 W, 345 MHz, 1980 MHz, 2619 MHz, 3201 MHz\n"
    monkeypatch.setattr(machine, "_output", lambda *_: line + line)
    monkeypatch.setattr(machine, "versions", lambda _: {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    gpus = machine.environment(torch.device("cuda"))["gpus"]
    assert [(gpu["power.limit"], gpu["clocks.max.mem"]) for gpu in gpus] == [("700.00 W", "3201 MHz")] * 2
    assert machine.device_slug(torch.device("cuda", 0)) == "nvidia-h100-80gb-hbm3"
    assert machine.device_slug(CPU) == "cpu"


def test_cpu_seconds_count_children_and_settling_waits_for_them_but_not_for_ever():
    before = machine.cpu_seconds()
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint('x', flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert machine.cpu_seconds() - before >= 0.28
        started = time.monotonic()
        machine.settle(longest=0.5)
        assert time.monotonic() - started >= 0.5
        child.kill()
    machine.settle()
    assert time.monotonic() - started < 5


@pytest.fixture
def folder(tmp_path):
    """Three JPEGs of known sides in two classes, and a file that is none."""
    for name, size in {"a/1.jpg": (40, 30), "a/2.JPG": (20, 10), "b/3.jpg": (60, 50)}.items():
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "p" / name, format="JPEG")
    (tmp_path / "p" / "a" / "notes.txt").write_text("x")
    return tmp_path / "p"


def test_describes_files_by_their_headers_and_arrays(folder):
    source = open_source("imagefolder", folder, "train", split=".")
    found = describe(source)
    assert found is not None
    assert (found["number"], found["sampled"]) == (3, 3)
    assert found["width"] == {"mean": 40.0, "median": 40.0, "p95": pytest.approx(58.0)}
    assert found["height"] == {"mean": 30.0, "median": 30.0, "p95": pytest.approx(48.0)}
    assert found["encoded_bytes"]["mean"] == pytest.approx(
        np.mean([p.stat().st_size for p in folder.glob("*/*.[jJ]*")])
    )
    found = describe(dataclasses.replace(source, files=None, arrays=np.zeros((3, 8, 9, 3), np.uint8)))
    assert found is not None
    assert (found["number"], found["width"]["median"], found["height"]["median"]) == (3, 9.0, 8.0)
    assert "encoded_bytes" not in found


def test_reading_ahead_stops_at_half_of_the_memory(source, monkeypatch):
    assert read_ahead(source) == "warm; 100% of the files' bytes were read before."
    total = sum(len(source.read(row)) for row in range(len(source)))
    free = namedtuple("free", "available")(total)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    assert read_ahead(source) == "warm; 50% of the files' bytes were read before."
    arrays = dataclasses.replace(source, files=None, arrays=np.zeros((300, 8, 8, 3), np.uint8))
    assert read_ahead(arrays) == "no files."


def test_repeats_images_as_real_bytes(folder, tmp_path, refused):
    main(["images", str(folder), str(tmp_path / "more"), "--count", "7"])
    copies = sorted((tmp_path / "more").rglob("*.*"))
    names = [path.relative_to(tmp_path / "more").as_posix() for path in copies]
    assert names == [
        *(f"a/1-{i}.jpg" for i in range(3)),
        *(f"a/2-{i}.JPG" for i in range(2)),
        *(f"b/3-{i}.jpg" for i in range(2)),
    ]
    assert copies[2].read_bytes() == (folder / "a/1.jpg").read_bytes()
    assert len({path.stat().st_ino for path in [*copies, folder / "a/1.jpg"]}) == 8
    (tmp_path / "none").mkdir()
    assert "holds no images" in refused("images", tmp_path / "none", tmp_path / "x", "--count", 1)
    assert "is not empty" in refused("images", folder, tmp_path / "p", "--count", 1)


def test_drawn_images_are_decodable_and_differ(tmp_path):
    draw_images(tmp_path, count=6, width=40, height=30, classes=2)
    paths = sorted(tmp_path.rglob("*.jpg"))
    assert [path.parent.name for path in paths] == ["class0"] * 3 + ["class1"] * 3
    assert len({Image.open(path).convert("RGB").tobytes() for path in paths}) == 6
    assert {Image.open(path).size for path in paths} == {(40, 30)}


@pytest.mark.gpu
def test_environment_of_a_gpu():
    found = machine.environment(torch.device("cuda", 0))
    assert found["cuda"] == torch.version.cuda
    assert found["gpus_visible"] == torch.cuda.device_count()
