"""A long run: its memory stays what it was, however often graphs are built anew, images replaced, states saved."""

import json
import signal

import pytest

from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalisation
from dalikd.trainers.checkpoint import save_weights

pytestmark = pytest.mark.faults

_SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
import psutil
from dalikd.tools.distill import main
from dalikd.trainers.loop import Loop

seconds, pause, output, *words = sys.argv[1:]
started = rebuilt = 0.0
follow, memory, sizes = Loop.follow, psutil.Process(), []

def watch(loop, bar):
    global started, rebuilt
    follow(loop, bar)
    now = time.monotonic()
    started, rebuilt = started or now, rebuilt or now
    sizes.append((now - started, loop.progress.step, memory.memory_info().rss))
    if now - rebuilt > float(pause):
        rebuilt = now
        loop.loader.seek(loop.loader.position)
        loop.save()
    if now - started > float(seconds):
        Path(output).write_text(json.dumps(sizes))
        os.kill(os.getpid(), signal.SIGTERM)

Loop.follow = watch
main(words)
"""


def test_memory_is_flat(small_images, tmp_path, start_forked, full):
    """At the end within 5 % of what it was after a sixth of the time; in the short form after a half."""
    script, sizes = tmp_path / "soak.py", tmp_path / "sizes.json"
    script.write_text(_SCRIPT)
    seconds, pause, settled = (1800, 3, 1 / 6) if full else (16, 0.5, 1 / 2)
    teacher = tmp_path / "teacher.safetensors"
    save_weights(teacher, create_model("resnet8", 3), Normalisation((0.5,) * 3, (0.5,) * 3))
    (small_images / "ant" / "bad.jpg").write_bytes(b"no image")
    try:
        options = {
            "data.name": "imagefolder", "data.root": small_images, "data.val_split": ".", "data.train_split": ".",
            "data.image_size": 32, "data.crop": "random_resized_crop", "data.bad_files": "replace", "data.threads": 1,
            "teacher.name": "resnet8", "teacher.weights": teacher, "model": "resnet8", "batch_size": 64,
            "augmentation": "cutmixpick_teacher", "epochs": 100000, "log_every": 5, "device": "cpu",
            "output": tmp_path / "run",
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        run = start_forked(tmp_path / "streams", script, seconds, pause, sizes, *words)
        code = run.wait(seconds + 300)
    finally:
        (small_images / "ant" / "bad.jpg").unlink()
    assert code == 128 + signal.SIGTERM, (code, run.out, run.err)
    found = json.loads(sizes.read_text())
    early = [rss for second, _, rss in found if second < settled * seconds][-5:]
    late = [rss for *_, rss in found][-5:]
    assert sorted(late)[2] < 1.05 * sorted(early)[2], f"{sorted(early)[2]:,} bytes became {sorted(late)[2]:,}"
    print(f"{found[-1][1]} steps; {sorted(early)[2] / 2**20:.0f} MiB, at the end {sorted(late)[2] / 2**20:.0f} MiB")
