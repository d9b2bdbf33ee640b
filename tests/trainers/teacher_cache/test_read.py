"""What a cache depends on, and what is refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dalikd.kd.backbones import create_model
from dalikd.pipelines import hardware
from dalikd.pipelines.data import DataConfig, as_used
from dalikd.pipelines.datasets.file_list import FileList
from dalikd.pipelines.draw_spec import View
from dalikd.trainers.augmentation import MixOptions
from dalikd.trainers.models import TeacherConfig
from dalikd.trainers.setup import Setup
from dalikd.trainers.teacher_cache.layout import CacheLayout, TeacherCache, pack_logits
from dalikd.trainers.teacher_cache.read import logits_of, open_cached, run_fingerprint, teacher_fingerprint

CPU = torch.device("cpu")
VIEW = View(12, "pad_crop", padding=1)


def _setup(options, source, view=VIEW, device=CPU) -> Setup:
    accelerator: Any = SimpleNamespace(device=device, print=lambda *_, **__: None, num_processes=1, process_index=0)
    setup = Setup(options, accelerator, source, source)
    setup.__dict__["view"] = view
    return setup


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(create_model("small", 3).state_dict(), folder / f"{seed}.pt")
    return folder


@pytest.fixture
def config(weights):
    return TeacherConfig("small", str(weights / "0.pt"))


@pytest.fixture
def made(distill_options, make_source, config, tmp_path):
    """A cache of noise that was made for the default run of `refused`."""
    options, source = distill_options(augmentation="cutmix"), make_source()
    setup = _setup(options, source)
    run = run_fingerprint(options, setup, setup.augmenter("cutmix"))
    fingerprint = {**run, **teacher_fingerprint(config, source)}
    cache = TeacherCache.create(tmp_path / "cache", CacheLayout(96, 3, 2, fingerprint=fingerprint))
    for epoch in range(2):
        cache.write(epoch, np.arange(96), dict.fromkeys(("logits", "augmented"), np.ones((96, 3), np.float32)))
    return cache


@pytest.fixture
def opened(made, distill_options, make_source):
    """Opens the cache for a run: by default the one it was made for."""

    def call(*, teacher=None, source=None, view=VIEW, device=CPU, **options):
        teacher = replace(teacher or TeacherConfig(), cache=str(made.folder))
        options = distill_options(**{"augmentation": "cutmix", **options}, teacher=teacher)
        setup = _setup(options, source or make_source(), view, device)
        return open_cached(options, options.teacher, setup, setup.augmenter(options.augmentation))

    return call


def test_what_does_not_matter_may_differ(opened):
    """Batch size, epochs, the loss, and whatever else the student learns with."""
    assert opened().cache.layout.epochs == 2
    assert opened(batch_size=64, epochs=9, accumulation=2, joint_forward=True, ema=0.9, compile="default") is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 5}, "seed: cache has 0, this run has 5"),
        ({"augmentation": "mixup"}, "augmentation: cache has cutmix, this run has mixup"),
        ({"mix": MixOptions(mode="per_batch", group=8)}, "mix.mode: cache has per_sample, this run has per_batch"),
        ({"mix": MixOptions(group=16)}, "mix.group: cache has 8, this run has 16"),
        ({"mix": MixOptions(alpha=0.5, group=8)}, "mix.alpha: cache has 1.0, this run has 0.5"),
        ({"mix": MixOptions(cutout_side=4, group=8)}, "mix.cutout_side: cache has None, this run has 4"),
        ({"mix": MixOptions(n_run=3, group=8)}, "mix.n_run: cache has 2, this run has 3"),
        ({"mix": MixOptions(lam_max={0: 0.5}, group=8)}, r"mix.lam_max: cache has {}, this run has {'0': 0.5}"),
        (
            {"mix": MixOptions(randaugment_magnitude=5, group=8)},
            "mix.randaugment_magnitude: cache has 9, this run has 5",
        ),
        ({"precision": "bf16"}, "precision: cache has fp32, this run has bf16"),
        ({"view": replace(VIEW, padding=2)}, r"view.padding: cache has 1, this run has 2"),
        ({"view": replace(VIEW, scale=(0.5, 1.0))}, r"view.scale: cache has \[0.08, 1.0\], this run has \[0.5, 1.0\]"),
        ({"device": torch.device("cuda")}, "decoder: cache has cpu, this run has mixed"),
        (
            {"seed": 5, "precision": "bf16"},
            "seed: cache has 0, this run has 5; precision: cache has fp32, this run has bf16",
        ),
        ({"mix": MixOptions(group=8, alpha=0.5)}, "mix.alpha: cache has 1.0, this run has 0.5"),
        ({"augmentation": "cutmixpick_student"}, "picked by the student"),
    ],
)
def test_another_run_is_refused(opened, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        opened(**options)
    assert "\n" not in str(raised.value)
    if "student" not in message:
        assert str(raised.value).endswith(". Set the options to those of the cache, or make another with dalikd cache")


def test_other_data_are_refused(opened, make_source):
    with pytest.raises(ValueError, match=r"data.images: cache has 96, this run has 48; data.fingerprint: cache has "):
        opened(source=make_source(96).limit(48))
    with pytest.raises(ValueError, match=r"data.images: cache has 96, this run has 48; data.fingerprint: cache has "):
        opened(source=make_source(96).share(0.5))
    with pytest.raises(ValueError, match=r"run: data.fingerprint: cache has \w{16}, this run has \w{16}\. Set"):
        opened(source=make_source(seed=3))


def test_a_teacher_that_is_named_must_be_the_same(opened, config, weights):
    assert opened(teacher=config) is not None
    assert opened(teacher=replace(config, name=None)) is not None
    assert opened(teacher=replace(config, weights=None)) is not None
    for other, message in (
        (
            replace(config, weights=str(weights / "1.pt")),
            r"run: teacher.weights: cache has \w{16}, this run has \w{16}\.",
        ),
        (replace(config, fold_bn=False), r"teacher.fold_bn: cache has True, this run has False"),
        (TeacherConfig("resnet8"), r"teacher.name: cache has small, this run has resnet8"),
        (TeacherConfig(args={"norm": True}), r"teacher.args: cache has {}, this run has {'norm': True}"),
        (TeacherConfig(mean=[0.4, 0.5, 0.5]), r"teacher.mean: cache has \[0.5, .*\], this run has \[0.4, 0.5, 0.5\]"),
        (TeacherConfig(sha256="0" * 64), "--teacher.sha256 is the checksum of a weights file: give --teacher.weights"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(teacher=other)


def test_the_teachers_statistics_count(config, make_source):
    ours, theirs = (teacher_fingerprint(config, make_source()) for _ in range(2))
    assert ours == theirs
    assert ours["teacher.mean"] == [0.5, 0.5, 0.5]
    darker = replace(make_source(), mean=(0.4, 0.5, 0.5))
    assert teacher_fingerprint(config, darker) == {**ours, "teacher.mean": [0.4, 0.5, 0.5]}
    given = replace(config, mean=[0.4, 0.5, 0.5], std=[0.5, 0.5, 0.5])
    assert teacher_fingerprint(given, make_source()) == {**ours, "teacher.mean": [0.4, 0.5, 0.5]}


def test_an_unfinished_cache_is_refused(opened, made):
    path = made.folder / "epoch-0001" / "filled.npy"
    filled = np.load(path)
    filled[[3, 90]] = 0
    np.save(path, filled)
    with pytest.raises(ValueError, match="is not finished: epoch 1 of 2 has 94 of 96 rows; call the same dalikd cache"):
        opened()


def test_a_folder_that_is_no_cache_is_refused(distill_options, make_source, tmp_path):
    options = distill_options(teacher=TeacherConfig(cache=str(tmp_path)))
    setup = _setup(options, make_source())
    with pytest.raises(FileNotFoundError, match=f"{Path(tmp_path)} is no teacher cache"):
        open_cached(options, options.teacher, setup, setup.augmenter("identity"))


def test_picks_out_of_a_cache_have_no_entropies_to_log(made, distill_options, make_source):
    teacher, source = TeacherConfig(cache=str(made.folder)), make_source()
    options = distill_options(augmentation="cutmixpick_teacher", entropy_log_every=5, teacher=teacher)
    with pytest.raises(ValueError, match="a teacher cache holds no outputs on candidates that were not picked; distil"):
        options.build(_setup(options, source))
    options = distill_options(augmentation="cutmix", entropy_log_every=5, teacher=teacher, model="small")
    assert options.build(_setup(options, source)).entropy_log is not None


def test_outputs_are_found_by_their_names():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    columns = {f"logits{part}": tensor for part, tensor in pack_logits(logits, "topk", 6).items()}
    columns |= {f"augmented{part}": tensor for part, tensor in pack_logits(-logits, "topk", 6).items()}
    torch.testing.assert_close(logits_of("logits", columns, 6).softmax(1), logits.softmax(1), rtol=0, atol=1e-3)
    torch.testing.assert_close(logits_of("augmented", columns, 6).softmax(1), (-logits).softmax(1), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("engine", "load"), [(True, 1.0), (False, 0.0)])
@pytest.mark.parametrize("windows", [True, False])
def test_on_a_gpu_the_fingerprint_holds_how_it_decodes(
    monkeypatch, distill_options, make_source, engine, load, windows
):
    monkeypatch.setattr(hardware, "check_libraries", lambda: None)
    monkeypatch.setattr(hardware, "_has_jpeg_engine", lambda _: engine)
    monkeypatch.setattr(hardware, "_decodes_windows", lambda *_: windows)
    source = make_source()
    files = replace(source, arrays=None, files=FileList.from_paths([__file__] * len(source), Path(__file__).parent))
    setup = _setup(distill_options(), files, device=torch.device("cuda", 0))
    found = run_fingerprint(setup.options, setup, setup.augmenter("identity"))
    assert (found["data.hw_decoder_load"], found["data.decode"]) == (load, "windows" if windows else "whole")
    own = as_used(DataConfig(hw_decoder_load=0), files, torch.device("cuda", 0))
    assert (own["hw_decoder_load"], own["decode"]) == (0.0, "windows" if windows else "whole")
