"""Images of augmentations, made as a run makes them."""

import io
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image

from dalikd.trainers.launch import start
from dalikd.trainers.options import AugmentingOptions
from dalikd.trainers.setup import open_run
from dalikd.trainers.teacher_step import Branches

__all__ = ["sample_images"]

_LARGEST_SIDE = 144  # pixels, of what is shown


def sample_images(options: AugmentingOptions, names: Sequence[str], count: int) -> dict[str, list[bytes]]:
    """The first images of the first epoch under each augmentation, as JPEG files by its name; by "original" as they are
    before. Of an augmentation that picks out of several candidates, the first candidate of each.

    Args:
        options: of a run: its data, seed and mixing options.
        names: of the augmentations; those that mix inside the nets show no images and are left out.
        count: images of each.

    Raises:
        ValueError, OSError: the data are not there, or not as they should be.
    """
    # as few images as mixing takes
    few = replace(options, device="cpu", precision="fp32", batch_size=options.mix.group, output=None, resume=None)  # type: ignore[call-overload]
    few = replace(few, data=replace(few.data, resident=False))
    setup = open_run(few, start("cpu", "fp32"), "train")
    augmenters = [one for name in names if name != "identity" and not (one := setup.augmenter(name)).mixes_hidden]
    branches = Branches(augmenters) if augmenters else None
    loader = setup.loader(branches.draw_spec if branches else setup.augmenter("identity").draw_spec)
    try:
        batch = loader.next()
    finally:
        loader.close()
    found = {"original": batch.pixels}
    if branches is not None:
        made = branches.make(batch.pixels, batch.augmented_pixels, batch.mix)
        for augmenter, branch in zip(augmenters, branches.branches, strict=True):
            found[augmenter.name] = made[branch.runs[0]].images
    return {name: [_jpeg(image) for image in images[:count]] for name, images in found.items()}


def _jpeg(image: torch.Tensor) -> bytes:
    """Pixels [3, S, S] from 0 to 255."""
    pixels = image.float().round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    picture, file = Image.fromarray(pixels), io.BytesIO()
    if picture.width > _LARGEST_SIDE:
        picture = picture.resize((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
    picture.save(file, "JPEG", quality=88)
    return file.getvalue()
