import shutil

import pytest
import torch

from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import View
from dalikd.tools.bench import main
from dalikd.tools.bench.record import load
from dalikd.tools.bench.sides import BACKENDS, Job, open_side

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in BACKENDS if not name.startswith("decode")])
def test_every_side_ends_on_the_gpu(photos, name, dtype):
    if name.startswith("dalikd"):
        pytest.importorskip("nvidia.dali")
    source = open_source("imagefolder", photos, "train", split=".")
    device = torch.device("cuda", 0)
    side = open_side(name, Job(source, View(64, "random_resized_crop"), 4, device, dtype=dtype, images=100))
    (images,) = next(side.batches)
    side.batches.close()
    assert images.device.type == "cuda"
    assert images.dtype == dtype
    assert images.shape == (4, 3, 64, 64)
    assert images.float().abs().mean() < 4  # normalised, not 0 to 255


@pytest.mark.usefixtures("needs_dali")
@pytest.mark.parametrize("augmentation", ["crop_flip", "cutmixpick_teacher"])
def test_what_was_decoded_on_the_cpu_is_mixed_as_on_the_gpu(photos, augmentation):
    source = open_source("imagefolder", photos, "train", split=".")
    job = Job(source, View(64, "random_resized_crop"), 4, torch.device("cuda", 0), augmentation=augmentation)
    sides = [open_side(name, job) for name in ("dalikd", "dalikd-mixed")]
    one, two = [next(side.batches) for side in sides]
    for side in sides:
        side.batches.close()
    for ours, theirs in zip(one, two, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().mean() < 0.05


@pytest.mark.usefixtures("needs_dali")
def test_the_table_and_the_sweep_run_on_a_gpu(photos, tmp_path):
    data = ["--data.root", str(photos), "--data.train_split", ".", "--batch_size", "4", "--images", "8"]
    main(["loader", *data, "--workers", "1", "--output", str(tmp_path / "table.json")])
    record = load(tmp_path / "table.json")
    assert record is not None
    assert [row["loader"] for row in record.rows] == list(BACKENDS)
    assert bool(record.environment["gpus"]) == (shutil.which("nvidia-smi") is not None)
    main(["loader", *data, "--backends", "dalikd-mixed", "--sweep", "true", "--output", str(tmp_path / "sweep.json")])
    record = load(tmp_path / "sweep.json")
    assert record is not None
    assert {row["setting"] for row in record.rows} == {"threads", "prefetch", "hw_decoder_load"}
