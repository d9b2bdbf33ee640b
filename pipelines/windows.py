"""RandomResizedCrop on the CPU: DALI decodes the windows, torch resizes them.

DALI's resize takes longer than its decoder there. torch's vectorised resize of uint8 is several times as fast, and
treats borders as Pillow does (docs/log.md has the numbers). On a GPU DALI does it all.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalikd.pipelines.draw_spec import AUGMENTED_VIEWS_IN_DALI, DrawSpec, View, ViewRun
from dalikd.pipelines.resident import crop_and_flip

__all__ = ["WindowViews", "resize_windows"]


class WindowViews:
    """Makes the views of random_resized_crop out of decoded windows.

    Args:
        spec: a view of random_resized_crop, and the augmented views.
        batch_size: the largest batch.
        threads: that resize.
        build_graph: `graphs.build_graph`, for augmented views that only DALI can make.
    """

    def __init__(self, spec: DrawSpec, batch_size: int, threads: int, build_graph: Callable[..., Any]) -> None:
        assert spec.view.crop == "random_resized_crop"
        self._view, self._views = spec.view, spec.views
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="dalikd-resize")
        self._threads = threads
        in_dali = {index: run for index, run in enumerate(spec.views) if run.kind in AUGMENTED_VIEWS_IN_DALI}
        self._policies = _Policies(spec.view, in_dali, batch_size, threads, build_graph) if in_dali else None

    def __call__(self, windows: Any, draws: Mapping[str, np.ndarray]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Resize, flip, augment.

        Args:
            windows: uint8 [h, w, 3] for each image, as DALI's TensorList or any sequence of arrays; they may lie in
                memory that is used again later.
            draws: of the views, as named by `DrawSpec.draw`.

        Returns:
            images, and augmented images for each augmented view: uint8 [B, S, S, 3] each.
        """
        images = resize_windows(windows, draws["flip"], self._view, self._pool, self._threads)
        augmented = {} if self._policies is None else self._policies(images, draws)
        for index in range(len(self._views)):
            if index not in augmented:
                augmented[index] = self._moved(images, draws, index)
        return images, tuple(augmented[index] for index in range(len(self._views)))

    def close(self) -> None:
        """Free what policies hold."""
        if self._policies is not None:
            self._policies.close()

    def _moved(self, images: Tensor, draws: Mapping[str, np.ndarray], index: int) -> Tensor:
        flip = torch.from_numpy(draws[f"augmented_flip{index}"])
        if f"augmented_crop{index}" not in draws:
            return torch.where(flip[:, None, None, None] > 0, images.flip(2), images)
        crop, own = torch.from_numpy(draws[f"augmented_crop{index}"]), torch.arange(len(images))
        return crop_and_flip(images, own, crop, flip, self._view.padding, self._view.border)


def resize_windows(windows: Any, flip: np.ndarray, view: View, pool: ThreadPoolExecutor, threads: int) -> Tensor:
    """Resize windows to squares, with antialiasing, and mirror some.

    Args:
        windows: uint8 [h, w, 3] each, in what has a length and can be indexed.
        flip: 1 to mirror left and right, [B].
        view: its size and interpolation.
        pool: of threads.
        threads: how many parts the work is cut into.

    Returns:
        uint8 [B, S, S, 3].
    """
    size = (view.size, view.size)
    images = torch.empty(len(windows), *size, 3, dtype=torch.uint8)
    # what functional.interpolate calls: called directly, it writes to where the pixels are wanted
    resize_to = getattr(torch._C._nn, f"_upsample_{view.interpolation}2d_aa")  # pyright: ignore[reportAttributeAccessIssue]

    def resize(first: int) -> None:
        scratch = torch.empty(1, *size, 3, dtype=torch.uint8)
        for place in range(first, len(windows), threads):
            pixels = torch.from_numpy(np.asarray(windows[place])).permute(2, 0, 1)[None]
            square = scratch if flip[place] else images[place : place + 1]
            resize_to(pixels, size, False, None, None, out=square.permute(0, 3, 1, 2))
            if flip[place]:
                images[place] = scratch[0].flip(1)

    list(pool.map(resize, range(threads)))
    return images


class _Policies:
    """Policies applied to resized images, by one DALI pipeline that is built when first needed.

    Args:
        view: whose side the images have.
        views: the policies, by their number among the augmented views.
        batch_size: the largest batch.
        threads: DALI's.
        build_graph: makes the pipeline.
    """

    def __init__(
        self,
        view: View,
        views: Mapping[int, ViewRun],
        batch_size: int,
        threads: int,
        build_graph: Callable[..., Any],
    ) -> None:
        self._whole, self._views = View(view.size, "whole"), views
        self._batch_size, self._threads, self._build_graph = batch_size, threads, build_graph
        self._inputs: tuple[Any, ...] = ()
        self._graph: Any = None

    def __call__(self, images: Tensor, draws: Mapping[str, np.ndarray]) -> dict[int, Tensor]:
        """Augmented images, uint8 [B, S, S, 3] each, by the number of the view."""
        names = [f"{name}{index}" for index in self._views for name in ("operation", "magnitude", "sign")]
        self._inputs = (images.numpy(), *(np.ascontiguousarray(draws[name]) for name in names))
        if self._graph is None:
            self._graph = self._build_graph(
                lambda _: self._inputs,
                self._whole,
                tuple(self._views.values()),
                reader="arrays",
                batch_size=self._batch_size,
                threads=self._threads,
                device_id=None,
                prefetch=1,  # no batch is asked for before its images are there
            )
        _, *augmented = self._graph.run()
        return {
            index: torch.from_dlpack(output.as_tensor()) for index, output in zip(self._views, augmented, strict=True)
        }

    def close(self) -> None:
        """Free the pipeline."""
        self._graph = None
