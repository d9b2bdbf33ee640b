"""Filling, verifying, and distilling from what was filled."""

import os
import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dalikd.kd.backbones import create_model
from dalikd.kd.goodness import TeacherStddev
from dalikd.kd.teacher import Teacher
from dalikd.pipelines.data import DataConfig
from dalikd.trainers.augmentation import MixOptions
from dalikd.trainers.loop import Loop
from dalikd.trainers.models import TeacherConfig
from dalikd.trainers.run import run
from dalikd.trainers.setup import open_run
from dalikd.trainers.stopping import Interrupted
from dalikd.trainers.tasks.distill import DistillOptions
from dalikd.trainers.teacher_cache import fill as filling
from dalikd.trainers.teacher_cache.fill import CacheOptions, Comparison, fill_cache, verify_cache
from dalikd.trainers.teacher_cache.layout import TeacherCache
from dalikd.trainers.tracking import RunFolder

PICKS = "cutmixpick_teacher"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of two teachers, with running statistics that are not those of a fresh net."""
    folder = tmp_path_factory.mktemp("weights")
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = create_model("small", 3)
        model.get_buffer("norm.running_mean").uniform_(0, 0.3)
        model.get_buffer("norm.running_var").uniform_(0.2, 1)
        model.get_parameter("fc.weight").data.mul_(4)
        torch.save(model.state_dict(), folder / f"{seed}.pt")
    return folder


@pytest.fixture(autouse=True)
def memory(monkeypatch, make_source):
    """90 images in memory stand for the data options; 41 to validate on."""
    monkeypatch.setattr("dalikd.trainers.setup.open_split", lambda *_: make_source(90))
    monkeypatch.setattr("dalikd.trainers.setup.open_sources", lambda *_: (make_source(90), make_source(41, seed=1)))
    return DataConfig(threads=1)


@pytest.fixture
def fill(memory, weights, accelerator, tmp_path):
    """Fills a cache of 90 images: 96 or 88 rows do not divide them, so that batches and groups end short."""

    def call(name="cache", **options):
        options = _options(memory, weights, **{"output": str(tmp_path / name), **options})
        return fill_cache(options, accelerator, {})

    return call


@pytest.fixture
def verify(memory, weights, accelerator):
    def call(cache, **options):
        return verify_cache(
            _options(memory, weights, verify=str(cache.folder), **{"share": 1.0, **options}), accelerator
        )

    return call


def _options(memory, weights, **options):
    teacher = TeacherConfig("small", str(weights / "0.pt"))
    options = {
        "batch_size": 32,
        "mix": MixOptions(group=8),
        "epochs": 2,
        "augmentation": PICKS,
        "teacher": teacher,
        **options,
    }
    return CacheOptions(data=memory, **options)


def _opened(options, accelerator):
    setup = open_run(options, accelerator)
    task = options.build(setup)
    return task, task.loader(setup), setup.val_loader()


def _distil(memory, weights, accelerator, folder, cache, **options):
    """All steps by the teacher, or by a cache alone: each step's terms, the student, the metrics."""
    teacher = TeacherConfig("small", str(weights / "0.pt")) if cache is None else TeacherConfig(cache=str(cache.folder))
    options = DistillOptions(
        data=memory, model="small", teacher=teacher, mix=MixOptions(group=8),
        **{"batch_size": 32, "epochs": 2, "augmentation": PICKS, **options},
    )  # fmt: skip
    task, opened, val_loader = _opened(options, accelerator)
    task.goodness = TeacherStddev(3, window=20)
    loop = Loop(task, opened, val_loader, options, accelerator, RunFolder(folder, True), {})
    terms = []
    for _ in range(loop.total_steps):
        loop.step()
        terms.append(loop.meter.means())
        loop.meter.reset()
    opened.close()
    return terms, task.student.model.state_dict(), task.metrics()


def _columns(cache):
    return {(epoch, name): rows for epoch in range(2) for name, rows in cache.read(epoch, np.arange(90)).items()}


# ------------------------------------------------------------------------------------------------ distillation


@pytest.mark.parametrize("augmentation", ["identity", "autoaugment", "cutmix", PICKS])
def test_the_cache_trains_as_the_teacher_does(fill, memory, weights, accelerator, tmp_path, augmentation):
    """To the last bit on the CPU, where the teacher saw the same batches."""
    cache = fill(augmentation=augmentation)
    common = memory, weights, accelerator, tmp_path / "run"
    by_teacher = _distil(*common, None, augmentation=augmentation)
    by_cache = _distil(*common, cache, augmentation=augmentation)
    assert len(by_cache[0]) == 4
    assert by_cache[0] == by_teacher[0]
    assert by_cache[1].keys() == by_teacher[1].keys()
    assert all(torch.equal(value, by_teacher[1][key]) for key, value in by_cache[1].items())
    assert by_cache[2] == by_teacher[2]
    assert by_cache[2]["windows"] == 12
    assert all(by_cache[2].values())


@pytest.mark.parametrize("sizes", [(16, 32), (88, 24)])
def test_batch_sizes_of_cache_and_run_may_differ(fill, memory, weights, accelerator, tmp_path, sizes):
    cache = fill(batch_size=sizes[0])
    common = memory, weights, accelerator, tmp_path / "run"
    by_teacher = _distil(*common, None, batch_size=sizes[1])
    by_cache = _distil(*common, cache, batch_size=sizes[1])
    for ours, theirs in zip(by_cache[0], by_teacher[0], strict=True):
        assert ours == pytest.approx(theirs, rel=0, abs=1e-5)


def test_after_the_last_epoch_the_first_comes_again(fill, memory, accelerator, tmp_path):
    """Epochs 2 and 3 hold the images of 0 and 1; the student has changed meanwhile."""
    fill()
    teacher = TeacherConfig(cache=str(tmp_path / "cache"))
    options = DistillOptions(
        data=memory, model="small", teacher=teacher, batch_size=32, mix=MixOptions(group=8), augmentation=PICKS,
        epochs=3,
    )  # fmt: skip
    task, opened, _ = _opened(options, accelerator)
    fed = [task.prepare(opened.next(), 0.0) for _ in range(6)]
    assert task.teacher.describe(2)["summary"] == "teacher cache: 2 epochs"
    assert task.teacher.describe(3)["summary"] == "teacher cache: 2 epochs, repeated"
    for first, again in zip(fed[:2], fed[4:], strict=True):
        pairs = zip([*first.teacher[:1], *first[5:10]], [*again.teacher[:1], *again[5:10]], strict=True)
        assert torch.equal(first.pixels, again.pixels)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert not torch.equal(fed[0][0], fed[2][0])
    opened.close()


def test_a_run_says_what_it_was_taught_by(fill, memory, accelerator, tmp_path, capsys):
    cache = fill(storage="topk", k=2)
    capsys.readouterr()
    options = DistillOptions(
        data=memory, model="small", teacher=TeacherConfig(cache=str(cache.folder)), batch_size=32,
        mix=MixOptions(group=8), augmentation=PICKS, epochs=3, output=str(tmp_path / "run"),
    )  # fmt: skip
    results = run(options, accelerator, "distill", {})
    said = "teacher cache: 2 epochs, repeated; top 2 of 3 logits, T. stddev and entropy are of what they restore"
    assert capsys.readouterr().out == said + "\n"
    found = results["teacher_cache"]
    assert (found["summary"], found["folder"], found["storage"]) == (said, str(cache.folder), "topk")
    assert found["teacher.weights"] == cache.layout.fingerprint["teacher.weights"]


def test_no_teacher_is_built(fill, memory, weights, accelerator, tmp_path, monkeypatch):
    cache = fill()

    def built(*_):
        raise AssertionError("a teacher was built")

    for module in ("models", "teacher_cache.read", "setup"):
        name = "open_teacher" if module == "setup" else "build_teacher"
        monkeypatch.setattr(f"dalikd.trainers.{module}.{name}", built)
    _distil(memory, weights, accelerator, tmp_path / "run", cache)
    with pytest.raises(AssertionError, match="a teacher was built"):
        _distil(memory, weights, accelerator, tmp_path / "run", None)


def test_reading_does_not_wait_for_the_device(fill, memory, accelerator, no_sync):
    for name, options in (("floats", {}), ("best", {"storage": "topk", "k": 2})):
        cache = fill(name, **options)
        options = DistillOptions(
            data=memory, model="small", teacher=TeacherConfig(cache=str(cache.folder)),
            batch_size=32, mix=MixOptions(group=8), augmentation=PICKS,
        )  # fmt: skip
        task, opened, _ = _opened(options, accelerator)
        task.prepare(opened.next(), 0.0)  # looks for NaN
        batch = opened.next()
        with no_sync():
            task.prepare(batch, 0.0)
        opened.close()


@pytest.mark.parametrize(("storage", "k", "tolerance"), [("float16", 0, 2e-3), ("topk", 3, 2e-3), ("topk", 2, 0.2)])
def test_smaller_storage_trains_nearly_as_the_teacher_does(
    fill, memory, weights, accelerator, tmp_path, storage, k, tolerance
):
    """Losses of the first epoch. One class of three left out is the same as kept, but for the temperature."""
    cache = fill(storage=storage, k=k)
    common = memory, weights, accelerator, tmp_path / "run"
    by_teacher, by_cache = _distil(*common, None)[0], _distil(*common, cache)[0]
    assert by_cache[0]["loss"] != by_teacher[0]["loss"]
    for ours, theirs in zip(by_cache[:2], by_teacher[:2], strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance)


# -------------------------------------------------------------------------------------------------- filling


@pytest.mark.parametrize("end", [KeyboardInterrupt, Interrupted])
def test_a_stopped_fill_goes_on_where_it_stopped(fill, monkeypatch, end):
    """The second call looks at what is missing only; the result is that of one call, to the last bit."""
    whole, put, calls = _columns(fill("whole")), filling._Writer.put, []

    def counting(writer, *arguments):
        calls.append(arguments[0])
        if len(calls) == 5 and end is KeyboardInterrupt:
            raise end
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        put(writer, *arguments)

    monkeypatch.setattr(filling._Writer, "put", counting)
    with pytest.raises(end):
        fill("stopped")
    assert calls == [0, 0, 0, 1, 1]  # three batches an epoch
    calls[:] = [1] * 10
    stopped = fill("stopped")
    # killed, that of the last but one was still waiting; a signal loses nothing
    assert calls[10:] == ([1, 1, 1] if end is KeyboardInterrupt else [1])
    calls.clear()
    fill("stopped")
    assert calls == []
    found = _columns(stopped)
    assert found.keys() == whole.keys()
    assert all(np.array_equal(rows, whole[key]) for key, rows in found.items())


def test_a_gap_is_filled(fill, monkeypatch):
    """Rows of the middle batch of an epoch, lost by hand."""
    cache, put, calls = fill(), filling._Writer.put, []
    before = _columns(cache)
    path = cache.folder / "epoch-0001" / "filled.npy"
    order = open_order(cache)
    filled = np.load(path)
    filled[order[40]] = 0
    np.save(path, filled)
    monkeypatch.setattr(
        filling._Writer, "put", lambda writer, *arguments: (calls.append(arguments[:2]), put(writer, *arguments))
    )
    again = fill()
    assert [(epoch, rows.tolist()) for epoch, rows in calls] == [(1, order[32:64].tolist())]
    assert all(np.array_equal(rows, before[key]) for key, rows in _columns(again).items())


def open_order(cache):
    from dalikd.pipelines.draws import permutation

    return permutation(cache.layout.fingerprint["seed"], 1, cache.layout.rows)


def test_every_row_holds_what_the_teacher_gives_for_it(fill, memory, weights, accelerator):
    """The batches of a run by the teacher, by their ids; the short end too."""
    cache = fill(batch_size=16)
    options = _options(memory, weights, batch_size=90, mix=MixOptions(group=8))
    work = filling._open_work(options, accelerator)
    sampler = filling.Sampler(90, 96, 0, drop_last=False, group=8)
    loader, ask = work.setup.loader(work.augmenter.draw_spec, sampler), work.teacher_step()
    for epoch in range(2):
        batch = loader.next()
        given, found = ask(batch), cache.read(epoch, batch.ids.numpy())
        (branch,) = given.branches
        np.testing.assert_allclose(found["logits"], given.originals.logits, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["augmented"], branch.logits, rtol=0, atol=1e-5)
        assert branch.picks is not None
        assert np.array_equal(found["picks"], filling.to_group_picks(branch.picks.numpy(), 90, 8))
    loader.close()


def test_the_announcement_counts_the_bytes(fill, capsys):
    fill()
    text = capsys.readouterr().out
    needed = 2 * 90 * (3 * 4 + 3 * 4 + 2 + 1)
    said = f"cache: 2 epoch(s) of 90 images, float32: {needed / 2**20:.2f} MiB, {needed / 2**21:.2f} MiB an epoch; "
    assert said in text
    assert f"{needed / 2**20:.2f} MiB to be made" in text
    fill(epochs=3)
    assert f"{needed / 2**21:.2f} MiB to be made" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_fill_what_one_does(data, tmp_path, start_joined):
    """90 images in batches of 48 for two: the second has nothing of the last one."""
    weights = tmp_path / "resnet8.pt"
    torch.manual_seed(0)
    torch.save(create_model("resnet8", 3).state_dict(), weights)
    options = [
        *("--data.root", data.root, "--data.image_size", 32, "--data.threads", 1, "--data.limit", 90),
        *("--device", "cpu", "--batch_size", 80, "--mix.group", 8, "--epochs", 2, "--augmentation", PICKS),
        *("--teacher.name", "resnet8", "--teacher.weights", weights),
    ]
    caches = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        joined = start_joined(processes, tmp_path / f"printed{processes}", "cache", *options, "--output", output)
        printed = [process.end() for process in joined]
        assert f"; {processes} process(es)" in printed[0]
        caches.append(TeacherCache(output))
    one, two = caches
    two.check_filled()
    assert one.layout == two.layout
    ours, theirs = _columns(one), _columns(two)
    for key, rows in ours.items():
        np.testing.assert_allclose(theirs[key], rows, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- verifying


@pytest.mark.parametrize("augmentation", ["identity", "flip", PICKS])
def test_a_whole_cache_agrees_with_its_teacher(fill, verify, augmentation):
    found = verify(fill(augmentation=augmentation), augmentation=augmentation)
    assert found.passes
    assert (found.rows, found.picks, found.tolerance) == (180, 0, 1e-3)
    assert found.logits[0] < 1e-5
    assert found.probabilities[1] < 1e-6


@pytest.mark.parametrize(("storage", "tolerance"), [("float16", 0.05), ("topk", 1e-3)])
def test_smaller_storage_agrees_too(fill, verify, storage, tolerance):
    found = verify(fill(storage=storage, k=2), storage=storage, k=2)
    assert found.passes
    assert (found.rows, found.picks, found.tolerance) == (180, 0, tolerance)


def test_a_share_is_asked_for_in_the_batches_that_the_cache_was_made_in(fill, verify, monkeypatch):
    """A quarter of six batches of 16 or 10 images an epoch are two, whatever batch size is named now."""
    cache, asked, call = fill(batch_size=16), [], Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, pixels: asked.append(len(pixels)) or call(self, pixels))
    assert verify(cache, batch_size=64, share=0.25).rows in (64, 58, 52)
    assert 3 * 16 in asked
    assert 3 * 64 not in asked


@pytest.mark.parametrize(
    ("precision", "storage", "tolerance", "picks"),
    [
        ("tf32", "float32", 1e-2, 0.01),
        ("tf32", "float16", 5e-2, 0.01),
        ("bf16", "float16", 1e-1, 0.05),
        ("bf16", "topk", 1e-2, 0.05),
    ],
)
def test_the_tolerance_follows_the_precision(fill, verify, precision, storage, tolerance, picks):
    options = {"precision": precision, "storage": storage, "k": 2, "augmentation": "identity"}
    found = verify(fill(**options), **options)
    assert (found.tolerance, found.most_picks) == (tolerance, picks)
    assert found.passes


@pytest.mark.parametrize(
    ("column", "change"),
    [("logits", 0.5), ("augmented", -0.5), ("logits", np.nan), ("picks", None)],
)
def test_one_changed_value_is_found(fill, verify, column, change):
    cache = fill()
    path = cache.folder / "epoch-0001" / f"{column}.npy"
    rows = np.load(path)
    rows[17] = (rows[17] + 5) % 16 if change is None else rows[17] + np.eye(3)[1] * change
    np.save(path, rows)
    with pytest.raises(ValueError, match=f"{path} is not what dalikd cache has written"):
        verify(cache)
    path.with_name("checksums.json").unlink()  # as of a cache that an earlier version has made
    found = verify(cache)
    assert not found.passes
    if change is None:
        assert found.picks == 1
        assert found.logits[0] > 1e-3
    elif np.isnan(change):
        assert np.isnan(found.logits[0])
    else:
        assert found.logits[0] == pytest.approx(0.5, abs=1e-5)
        assert found.logits[1] == pytest.approx(0.5 / (2 * 180 * 3), rel=1e-3)
        assert verify(cache, tolerance=0.6).passes


def test_picks_outside_of_the_pool_are_damage(fill, verify):
    cache = fill()
    path = cache.folder / "epoch-0000" / "picks.npy"
    rows = np.load(path)
    rows[3] = 16
    np.save(path, rows)
    path.with_name("checksums.json").unlink()
    with pytest.raises(ValueError, match=r"picks.npy holds a number outside of 0..15: make the cache anew"):
        verify(cache)


def test_the_comparison_by_hand():
    found = Comparison(0.5, "float32")
    found.add(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.25]]))
    found.add(torch.zeros(1, 2), torch.zeros(1, 2))
    first, second = 1 / (1 + np.exp(-1)) - 0.5, 0.5 - 1 / (1 + np.exp(0.25))
    assert found.logits == pytest.approx((1.0, 1.25 / 6))
    assert found.probabilities == pytest.approx((first, 2 * (first + second) / 6))
    assert not found.passes
    assert replace(found, storage="topk").passes
    assert not replace(found, storage="topk", rows=99, picks=1).passes
    assert replace(found, storage="topk", rows=100, picks=1).passes


def test_a_cache_is_verified_with_its_own_options(fill, verify, weights):
    cache = fill()
    other = TeacherConfig("small", str(weights / "1.pt"))
    with pytest.raises(ValueError, match=r"teacher.weights: cache has \w{16}, this run has \w{16}. Set the options"):
        verify(cache, teacher=other)
    with pytest.raises(ValueError, match=r"mix.group: cache has 8, this run has 16"):
        verify(cache, mix=MixOptions(group=16))


# -------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": None}, "no folder given: name one"),
        ({"teacher": TeacherConfig(cache="x")}, "--teacher.cache is read by dalikd distill"),
        ({"teacher": TeacherConfig()}, "no teacher given: name its architecture with --teacher.name"),
        ({"precision": "fp64"}, "--precision fp64: a teacher cache holds float32 at most"),
        ({"epochs": 0}, "--epochs 0: give at least 1"),
        ({"share": 0.0}, "--share 0.0: give a share"),
        ({"share": 1.5}, "--share 1.5: give a share"),
        ({"tolerance": -1.0}, "--tolerance -1.0: give 0 or more"),
        ({"storage": "topk", "k": 4}, "--k 4: the data have 3 classes; give 1 to 3"),
        ({"storage": "topk", "k": 0}, "--k 0: the data have 3 classes"),
        ({"augmentation": "cutmixpick_student"}, "picked by the student, which changes while it learns"),
        (
            {"augmentation": "cutmixpick_teacher", "mix": MixOptions(group=8, n_pick=4)},
            "--mix.n_pick 4: a teacher cache holds one augmented image",
        ),
        ({"batch_size": 100}, "not a multiple of --mix.group 8"),
    ],
)
def test_what_cannot_be_cached_is_refused(fill, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        fill(**change)
    assert not (tmp_path / "cache" / "cache.json").exists()


def test_one_machine_fills(fill, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="1 processes, 3 of them here: fill a cache on one machine"):
        fill()


def test_containers_are_refused():
    source: Any = SimpleNamespace(name="tinted", files=None, arrays=None, records=object())
    augmenter: Any = SimpleNamespace(criterion=None)
    with pytest.raises(ValueError, match="is read in the containers' order"):
        filling.check_cacheable(source, augmenter)


def test_the_config_lies_beside_the_cache(memory, weights, accelerator, tmp_path):
    fill_cache(_options(memory, weights, output=str(tmp_path / "cache")), accelerator, {"seed": 8})
    assert yaml.safe_load((tmp_path / "cache" / "config.yaml").read_text()) == {"seed": 8}
