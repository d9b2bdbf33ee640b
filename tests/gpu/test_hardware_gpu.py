import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dalikd.pipelines.data import open_source
from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.hardware import decoding_on, package_versions
from dalikd.pipelines.loader import BadFileError, Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_dali")]

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def photo_source(photos: Path) -> Source:
    return open_source("imagefolder", photos, "train", split=".")


def _images(source: Source, view: View, batch_size: int, **options: Any) -> torch.Tensor:
    """Of all rows in order, [N, S, S, 3]."""
    sampler = Sampler(len(source), batch_size, shuffle=False, drop_last=False)
    loader = Loader(source, sampler, DrawSpec(view, 7), device=CUDA, threads=2, **options)
    images = torch.cat([batch.images for batch in loader])
    loader.close()
    return images


def test_this_gpu_decodes_in_one_way(photo_source):
    found = decoding_on(photo_source, CUDA)
    print(found, package_versions())
    assert found.hw_decoder_load in (0.0, 1.0)


@pytest.mark.parametrize("decode", ["auto", "whole"])
@pytest.mark.parametrize("crop", ["random_resized_crop", "center_crop"])
@pytest.mark.parametrize("load", [0.0, None])
def test_pixels_do_not_depend_on_the_neighbours(photo_source, decode, crop, load):
    view = View(64, crop, resize=72)
    few, many = (_images(photo_source, view, size, decode=decode, hw_decoder_load=load) for size in (3, 24))
    assert torch.equal(few, many)


def test_whole_images_show_what_windows_show(photo_source):
    """To within the colors at a window's border."""
    if decoding_on(photo_source, CUDA).whole:
        pytest.skip("this nvImageCodec cannot decode windows here")
    view = View(64, "random_resized_crop")
    windows, whole = (_images(photo_source, view, 12, decode=decode).float() for decode in ("windows", "whole"))
    assert (windows - whole).abs().mean((1, 2, 3)).max() < 2


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_jpeg_that_is_cut_off_is_refused(photo_source, tmp_path, kept):
    for row in range(6):
        path = Path(photo_source.path(row))
        (tmp_path / "a").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "a" / f"{row}{path.suffix}")
    victim = next((tmp_path / "a").glob("*.jp*g"))
    content = victim.read_bytes()
    victim.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(BadFileError, match=f"{victim.name} .the JPEG is truncated"):
        _images(open_source("imagefolder", tmp_path, "train", split="."), View(64, "center_crop", resize=72), 6)
