from pathlib import Path

import pytest
import torch

from dalikd.pipelines.backends import DaliBackend
from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import DrawSpec, View, ViewRun
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.shards.write import WriteOptions, write_shards

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_dali")]

SPEC = DrawSpec(View(32, "random_resized_crop"), 7, (ViewRun("crop_flip"),))


@pytest.mark.parametrize("kind", ["webdataset", "tfrecord"])
def test_the_mixed_decoder_gives_the_same_pixels_from_containers(small_images: Path, tmp_path: Path, monkeypatch, kind):
    """The same rows with the same draws as from files, without the host waiting for the device."""
    files = open_source("imagefolder", small_images, "train", split=".")
    write_shards(files, tmp_path / "train", WriteOptions(kind, shard_images=70))
    shards = open_source(kind, tmp_path, "train")
    loader = Loader(shards, Sampler(300, 60, seed=7), SPEC, device="cuda", threads=2)
    loader.next()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [loader.next() for _ in range(8)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert {batch.images.device.type for batch in batches} == {"cuda"}
    plans = [loader._backend.plan(position, batch.ids.cpu().numpy()) for position, batch in enumerate(batches, start=1)]
    backend = Loader(files, Sampler(300, 60, seed=7), SPEC, device="cuda", threads=2)._backend
    assert type(backend) is DaliBackend
    for position, (batch, plan) in enumerate(zip(batches, plans, strict=True), start=1):
        backend.close()
        monkeypatch.setattr(backend, "plan", lambda _, plan=plan: plan)
        expected = backend.fetch(position)
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.augmented[0], expected.augmented[0])
        assert batch.labels.tolist() == files.labels[plan.rows].tolist()
