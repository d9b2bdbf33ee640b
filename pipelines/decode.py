"""Decodes a split once, through DALI, and keeps the images on the device."""

from dataclasses import replace

import torch

from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.resident import Resident
from dalikd.pipelines.sampler import Sampler
from dalikd.pipelines.sources import Source

__all__ = ["can_be_resident", "decode_source"]

_BATCH = 512


def can_be_resident(view: View) -> bool:
    """Whether every batch of a view starts from the same square of each image."""
    return view.crop in ("pad_crop", "square") or (view.crop == "center_crop" and view.resize == view.size)


def decode_source(source: Source, view: View, *, device: torch.device, **options) -> Resident:
    """Decode every image to the square that a view starts from.

    Args:
        source: the images.
        view: pad_crop, or center_crop without resizing.
        device: where the images are kept.
        options: of the Loader: threads, prefetch, bad_files and others.

    Raises:
        ValueError: a view that cuts another window each time, or images that do not fit into the device's memory.
        BadFileError: a image cannot be decoded, and they are not to be replaced.
    """
    if not can_be_resident(view):
        raise ValueError(
            "--data.resident true keeps squares of one size, but this view cuts another window of the whole image "
            "each time: set --data.crop pad_crop, or leave it out"
        )
    square = view if view.crop == "center_crop" else replace(view, crop="square")
    resident = Resident.empty(len(source), view.size, device)
    sampler = Sampler(len(source), min(_BATCH, len(source)), shuffle=False, drop_last=False)
    loader = Loader(source, sampler, DrawSpec(square), device=device, **options)
    for batch in loader:
        resident.put(batch.ids, batch.images)  # by row: containers have an order of their own
    loader.close()
    for row, other in loader.replaced.items():
        resident.pixels[row] = resident.pixels[other]
    resident.replaced.update(loader.replaced)
    return resident
