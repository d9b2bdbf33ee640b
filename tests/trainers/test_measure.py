import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from dalikd.kd.backbones import create_model
from dalikd.kd.entropy_log import EntropyLog
from dalikd.kd.goodness import TeacherStddev
from dalikd.kd.teacher import Teacher
from dalikd.pipelines.draw_spec import View
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.trainers.augmentation import AUGMENTATIONS, Augmenter, MixOptions, augmentation_names
from dalikd.trainers.checkpoint import read_state
from dalikd.trainers.measure import Measurement, MeasureOptions, measure_all, measure_branches, results_table
from dalikd.trainers.models import TeacherConfig
from dalikd.trainers.stopping import Interrupted
from dalikd.trainers.teacher_step import Branches, TeacherStep

RESULT_FIELDS = {"augmentation", "stddev", "stderr", "interval", "entropy", "windows", "images", "window"}
#: picks of each criterion on other bases
PICKED = ["mixup+kld", "crop_flip+dissimilarity", "manifold_mixup+teacher_entropy", "masking+student_entropy"]
EVERY = [*AUGMENTATIONS, *PICKED]


def _measure(source, net, accelerator, name, batch_size, *, student=None, mode="per_sample", epochs=2, window=40):
    options = MixOptions(mode=mode, group=8)
    augmenter = Augmenter(name, options, source, View(source.image_size, "pad_crop", padding=1), seed=3)
    sampler = Sampler(len(source), batch_size, 3, drop_last=False, group=8)
    loader = Loader(source, sampler, augmenter.draw_spec, threads=1)
    options = MeasureOptions(epochs=epochs, window=window)
    report = measure_branches(Branches([augmenter]), loader, Teacher(net), accelerator, options, student)
    loader.close()
    return report["results"][0]


# ------------------------------------------------------------------------------------------------- the figures


@pytest.mark.parametrize("mode", ["per_sample", "per_batch"])
@pytest.mark.parametrize("name", EVERY)
def test_results_do_not_depend_on_the_batch_size(make_net, make_source, accelerator, name, mode):
    """108 images: the last batch is short at both sizes, and its last mix group too. Picks of both nets included."""
    source = make_source(108)
    net, student = make_net(1).double(), make_net(2).double()
    small, large = (
        _measure(source, net, accelerator, name, batch_size, student=student, mode=mode) for batch_size in (16, 64)
    )
    assert small["windows"] == 10
    assert small["images"] == 216
    for key in ("stddev", "stderr", "entropy", "per_class"):
        assert small[key] == pytest.approx(large[key], rel=0, abs=1e-12), key


def test_augmentations_differ(make_net, make_source, accelerator):
    source, net, student = make_source(64), make_net(1), make_net(2)
    found = {name: _measure(source, net, accelerator, name, 32, student=student)["entropy"] for name in EVERY}
    assert len(set(found.values())) == len(EVERY)


def test_identity_equals_the_teacher_alone(make_net, make_source, accelerator):
    source, net = make_source(96), make_net(1).double()
    found = _measure(source, net, accelerator, "identity", 32)
    view = View(source.image_size, "pad_crop", padding=1)
    loader = Loader(source, Sampler(96, 96, 3), Augmenter("identity", MixOptions(), source, view, 3).draw_spec)
    metric = TeacherStddev(3, window=40)
    with torch.no_grad():
        for _ in range(2):
            logits = net.eval()(loader.next().pixels)
            metric.update(logits, logits)
    expected = metric.compute()
    assert found["stddev"] == pytest.approx(expected.stddev, abs=1e-12)
    assert found["entropy"] == pytest.approx(expected.entropy, abs=1e-12)


class _ReadsLabels(nn.Module):
    """A teacher that is certain and right: the class is written in every pixel of the middle."""

    def forward(self, pixels):
        return 1000.0 * functional.one_hot((pixels[:, 0, 4, 4] / 20).long(), 10)


def test_a_certain_teacher_gives_the_spread_of_the_classes(make_source, accelerator):
    """Windows of 320 images, each a pair with itself: the class share p spreads by sqrt(p (1 - p) / 320)."""
    source = make_source(16_000, classes=10, side=8)
    labels = np.random.default_rng(0).permutation(source.labels)
    images = np.broadcast_to(20 * labels[:, None, None, None] + 1, (16_000, 8, 8, 3)).astype(np.uint8)
    source = replace(source, arrays=images, labels=labels)
    result = _measure(source, _ReadsLabels(), accelerator, "identity", 400, epochs=5, window=640)
    without_replacement = np.sqrt((16_000 - 320) / (16_000 - 1))
    expected = np.sqrt(0.1 * 0.9 / 320) * without_replacement
    assert result["windows"] == 250
    assert result["stddev"] == pytest.approx(expected, abs=3 * result["stderr"])
    assert result["stderr"] < 0.05 * expected
    assert result["entropy"] == 0


# ---------------------------------------------------------------------------------------------------- the heads


def _heads_pass(net, source, accelerator, names, **options):
    """Batches of 24 of 44 images, mix groups of 8 and windows of 4 originals: the last of each is short."""
    view = View(source.image_size, "pad_crop", padding=1)
    branches = Branches([Augmenter(name, MixOptions(group=8), source, view, seed=3) for name in names])
    loader = Loader(source, Sampler(44, 24, 3, drop_last=False, group=8), branches.draw_spec, threads=1)
    options = MeasureOptions(epochs=1, window=8, **options)
    report = measure_branches(branches, loader, Teacher(net), accelerator, options)
    loader.seek(0)
    found = [(batch, TeacherStep(Teacher(net), branches)(batch)) for batch in (loader.next(), loader.next())]
    loader.close()
    return report["results"], found


def test_heads_are_measured_on_all_turns(make_net_with_heads, make_source, accelerator):
    """By brute force: every image is turned, each window has the mean of its originals and augmented images."""
    net, source, names = make_net_with_heads().double(), make_source(44), ["identity", "flip", "mixup"]
    names.append("cutmixpick_teacher")
    measured, found = _heads_pass(net, source, accelerator, names, heads=True)
    plain, _ = _heads_pass(net, source, accelerator, names)

    def probabilities(images):
        """Of each head, [n, 4, 12]."""
        turned = torch.stack([torch.rot90(images, turn, (2, 3)) for turn in range(4)], dim=1).flatten(0, 1)
        return [head.softmax(dim=1).reshape(-1, 4, 12) for head in net.outputs(turned, heads=True).heads]

    for number, (result, without) in enumerate(zip(measured, plain, strict=True)):
        for key in ("stddev", "stderr", "entropy"):
            assert result[key] == pytest.approx(without.pop(key), rel=1e-11)
        assert len(result["heads"]) == 3
        with torch.no_grad():
            pairs = [
                zip(probabilities(batch.pixels), probabilities(of.branches[number].mixed.images), strict=True)
                for batch, of in found
            ]
        for head, parts in zip(result["heads"], zip(*pairs, strict=True), strict=True):
            both = torch.cat([torch.stack(part) for part in parts], dim=1)  # [2, 44, 4, 12]
            windows = both.transpose(0, 1).reshape(11, 4 * 2 * 4, 12).mean(dim=1)
            assert head["stddev"] == pytest.approx(windows.std(dim=0).mean().item(), rel=1e-10)
            assert head["entropy"] == pytest.approx(-(both * both.log()).sum(dim=3).mean().item(), rel=1e-10)
            assert head["interval"][0] < head["stddev"] < head["interval"][1]
            assert head["stderr"] > 0
    title = results_table(measured).splitlines()[0]
    assert title.endswith("| windows | T. stddev of head 1 | T. stddev of head 2 | T. stddev of head 3 |")
    assert (
        results_table(measured)
        .splitlines()[2]
        .endswith(
            " | ".join(f"{head['stddev']:.6f}" for head in min(measured, key=lambda row: row["stddev"])["heads"]) + " |"
        )
    )
    net.model.auxiliary_classifier.fc2.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the teacher's head 2 answers with NaN"):
        _heads_pass(net, source, accelerator, names, heads=True)


def test_heads_of_a_net_without_any_are_refused(make_net, make_source, accelerator):
    with pytest.raises(ValueError, match="SmallNet has no auxiliary heads: take the net NAME_aux"):
        _heads_pass(make_net(), make_source(44), accelerator, ["flip"], heads=True)


def test_measuring_heads_goes_on_where_it_was_cut_off(data, tmp_path, accelerator, monkeypatch):
    torch.save(create_model("resnet8_aux", 3).state_dict(), tmp_path / "heads.pt")
    options = MeasureOptions(
        data=replace(data, limit=30), teacher=TeacherConfig("resnet8_aux", str(tmp_path / "heads.pt")), heads=True,
        augmentation=["flip"], epochs=1, window=4, batch_size=8, mix=MixOptions(group=8), checkpoint_every=2,
    )  # fmt: skip
    whole, original, steps = measure_all(options, accelerator), Measurement.update, []
    assert whole["heads"]
    options.checkpoint = str(tmp_path / "state.pt")

    def die(self, *arguments):
        steps.append(None)
        if len(steps) == 4:
            raise KeyboardInterrupt
        original(self, *arguments)

    monkeypatch.setattr(Measurement, "update", die)
    with pytest.raises(KeyboardInterrupt):
        measure_all(options, accelerator)
    assert measure_all(options, accelerator)["results"] == whole["results"]
    assert len(steps) == 6
    with pytest.raises(ValueError, match="was saved with heads True, now it is None: measure with the same options"):
        measure_all(replace(options, heads=False), accelerator)


# -------------------------------------------------------------------------------------------------- the one pass


def _pass(data, weights, accelerator, **options):
    options = {"augmentation": ["all", *PICKED], "model": "small", "window": 32, "precision": "fp64", **options}
    teacher = TeacherConfig("small", weights)
    return measure_all(MeasureOptions(data=replace(data, limit=140), teacher=teacher, epochs=2, **options), accelerator)


def test_one_pass_finds_what_a_pass_for_each_finds(data, small_weights, accelerator):
    """In per_batch mode, with a short last batch and mix group; 48 images a call cut what one call would hold."""
    options = {"batch_size": 24, "mix": MixOptions(group=8, mode="per_batch"), "per_class": True}
    together = _pass(data, small_weights, accelerator, **options, images_per_call=48)
    assert len(together["results"]) == len(AUGMENTATIONS) + len(PICKED)
    for found in together["results"][::3]:
        (alone,) = _pass(data, small_weights, accelerator, **{**options, "augmentation": [found["augmentation"]]})[
            "results"
        ]
        assert alone.keys() == found.keys()
        assert (found["images"], found["windows"]) == (280, 2 * 280 // 32)
        for key in ("stddev", "stderr", "entropy", "per_class", "interval"):
            assert alone[key] == pytest.approx(found[key], rel=0, abs=1e-11), (found["augmentation"], key)


def test_more_and_fewer_picks_than_originals_are_measured(data, small_weights, accelerator):
    found = {}
    for keep in (3, 8, 13):
        report = _pass(
            data, small_weights, accelerator, augmentation=["cutmixpick_teacher", "cutmix"], batch_size=24,
            mix=MixOptions(group=8, n_pick=keep),
        )  # fmt: skip
        assert report["mix"]["n_pick"] == keep
        picked, plain = report["results"]
        assert picked["windows"] == plain["windows"] == 2 * 280 // 32
        found[keep] = picked["entropy"]
        assert picked["entropy"] > plain["entropy"]
    assert len(set(found.values())) == 3


def test_the_other_metrics_are_measured_beside(data, small_weights, accelerator):
    metrics = ["probability_covariance", "cross_entropy_covariance"]
    report = _pass(data, small_weights, accelerator, augmentation=["identity", "cutmix+kld"], metrics=metrics)
    for found in report["results"]:
        assert found["probability_covariance"]["blocks"] == 280 // 64
        assert found["probability_covariance"]["correlation_classes"] is not None
        assert found["cross_entropy_covariance"]["draws"] == 0  # a draw has 6400 values
        assert found["cross_entropy_covariance"]["covariance"] is None
    lines = results_table(report["results"]).splitlines()
    assert lines[0].endswith(
        "| windows | cov. of samples | corr. of samples | corr. of classes | cov. of CE | its approximation |"
    )
    assert lines[2].endswith("| - | - |")


def test_the_ranking_is_compared_pair_by_pair(data, small_weights, accelerator):
    report = _pass(data, small_weights, accelerator, augmentation=["identity", "cutmix", "mixup"], batch_size=64)
    values = {result["augmentation"]: result["stddev"] for result in report["results"]}
    assert report["separation"]["order"] == tuple(sorted(values, key=lambda name: values[name]))
    for pair in report["separation"]["pairs"]:
        assert pair["difference"] == pytest.approx(values[pair["b"]] - values[pair["a"]])
    assert report["separation"]["check"] == 1
    assert report["stopped"] is None
    one = _pass(data, small_weights, accelerator, augmentation=["identity"])
    assert one["separation"] is None


def test_measuring_stops_when_the_ranking_is_settled(data, small_weights, accelerator):
    """Windows of 4 outputs: the first check is due after 80 images."""
    clear = {
        "augmentation": ["identity", "mixup"],
        "batch_size": 8,
        "mix": MixOptions(group=8),
        "window": 4,
        "stop_confidence": 0.9,
    }
    report = _pass(data, small_weights, accelerator, **clear)
    assert report["stopped"] == {"confidence": 0.9, "settled": True, "images": 80, "windows": 40, "checks": 1}
    assert report["separation"]["separated"]
    assert all(result["images"] == 80 for result in report["results"])


def test_equals_never_settle(data, small_weights, accelerator):
    """A pool of one run and all of it kept: the same images as without picking."""
    tie = {"augmentation": ["cutmix", "cutmix+teacher_entropy"], "mix": MixOptions(n_run=1, group=8)}
    tie |= {"window": 4}
    report = _pass(data, small_weights, accelerator, **tie, batch_size=8, stop_confidence=0.5)
    assert report["stopped"] == {"confidence": 0.5, "settled": False, "images": 280, "windows": 140, "checks": 4}
    assert not report["separation"]["separated"]
    assert report["separation"]["check"] == 5


def test_a_measurement_goes_on_where_it_was_cut_off(data, small_weights, accelerator, tmp_path, monkeypatch):
    """Killed it does again what was not saved; stopped by a signal it loses nothing."""
    options = {
        "augmentation": ["cutmixpick_student", "flip", "patchmix"], "batch_size": 24, "mix": MixOptions(group=8),
        "metrics": ["probability_covariance", "cross_entropy_covariance"], "per_class": True, "entropy_log_every": 2,
    }  # fmt: skip
    whole = _pass(data, small_weights, accelerator, **options, entropy_log=str(tmp_path / "whole"))
    original, resumed = Measurement.update, {}
    for end, saved in ((KeyboardInterrupt, 6), (Interrupted, 7)):
        folder, steps = tmp_path / end.__name__, []
        resumed = {**options, "checkpoint": f"{folder}.pt", "checkpoint_every": 3, "entropy_log": str(folder)}

        def die(self, *arguments, end=end, steps=steps):
            if len(steps) == 7 and end is KeyboardInterrupt:
                raise end
            steps.append(None)
            if len(steps) == 7 and end is Interrupted:
                os.kill(os.getpid(), signal.SIGTERM)
            original(self, *arguments)

        monkeypatch.setattr(Measurement, "update", die)
        with pytest.raises(end):
            _pass(data, small_weights, accelerator, **resumed)
        assert read_state(folder.with_suffix(".pt"))["step"] == saved
        steps[:] = [None] * 8
        again = _pass(data, small_weights, accelerator, **resumed)
        assert len(steps) == 8 + 12 - saved
        assert again["results"] == whole["results"]
        assert again["separation"] == whole["separation"]
        for name in options["augmentation"]:
            first, second = (EntropyLog.load(each / f"{name}.npz").arrays() for each in (tmp_path / "whole", folder))
            assert first["steps"].tolist() == [0, 2, 4, 6, 8, 10]
            for key, values in first.items():
                np.testing.assert_array_equal(second[key], values)
            assert (folder / f"{name}.png").stat().st_size > 10_000
    assert _pass(data, small_weights, accelerator, **resumed)["results"] == whole["results"]  # finished: nothing left
    with pytest.raises(
        ValueError, match="was saved with window 32, now it is 40: measure with the same options, or name"
    ):
        _pass(data, small_weights, accelerator, **{**resumed, "window": 40})


def test_a_settled_measurement_stays_settled(data, small_weights, accelerator, tmp_path):
    clear = {
        "augmentation": ["identity", "mixup"],
        "batch_size": 8,
        "mix": MixOptions(group=8),
        "window": 4,
        "stop_confidence": 0.9,
    }
    first, again = (
        _pass(data, small_weights, accelerator, **clear, checkpoint=str(tmp_path / "state.pt")) for _ in range(2)
    )
    assert first["stopped"]["settled"]
    for key in ("results", "separation", "stopped"):
        assert again[key] == first[key]


@pytest.mark.parametrize("changed", ["view", "weights", "epochs"])
def test_another_measurement_is_not_gone_on_with(data, small_weights, make_net, accelerator, tmp_path, changed):
    options = {"augmentation": ["flip"], "checkpoint": str(tmp_path / "state.pt")}
    _pass(data, small_weights, accelerator, **options)
    if changed == "view":
        data, message = replace(data, padding=2), r"view.padding \d, now it is 2"
    elif changed == "weights":
        torch.save(make_net(7).model.state_dict(), small_weights)
        message = r"was saved with teacher \w{16}, now it is \w{16}"
    else:
        teacher = TeacherConfig("small", small_weights)
        options, message = {**options, "teacher": teacher}, "is of more than --epochs 1: give as many as it has"
        options = MeasureOptions(
            data=replace(data, limit=140), window=32, precision="fp64", model="small", epochs=1, **options
        )
        with pytest.raises(ValueError, match=message):
            measure_all(options, accelerator)
        return
    with pytest.raises(ValueError, match=message):
        _pass(data, small_weights, accelerator, **options)


def test_entropies_are_of_the_net_that_picks(data, small_weights, accelerator, tmp_path):
    """Of a fixed order of images: picks have more entropy than candidates by the net that picks, and only by it."""
    names = ["cutmixpick_teacher", "cutmixpick_student", "mixup"]
    _pass(data, small_weights, accelerator, augmentation=names, entropy_log=str(tmp_path), entropy_log_every=1)
    logs = {name: EntropyLog.load(tmp_path / f"{name}.npz").arrays() for name in names}
    for name in names[:2]:
        assert np.nanmean(logs[name]["picks"]) > np.nanmean(logs[name]["candidates"])
        assert logs[name]["sizes"].tolist() == [[64, 128, 64], [64, 128, 64], [12, 24, 12]] * 2
    assert not np.array_equal(logs[names[0]]["originals"], logs[names[1]]["originals"])
    np.testing.assert_array_equal(logs["mixup"]["originals"], logs["cutmixpick_teacher"]["originals"])
    np.testing.assert_array_equal(logs["mixup"]["picks"], logs["mixup"]["candidates"])


# -------------------------------------------------------------------------------------------------- the report


@pytest.fixture
def small_weights(make_net, tmp_path):
    torch.save(make_net(1).model.state_dict(), tmp_path / "small.pt")
    return str(tmp_path / "small.pt")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "resnet8.pt"
    torch.save(create_model("resnet8", 3).state_dict(), path)
    return str(path)


def _options(data, teacher_weights, **options):
    teacher = TeacherConfig("resnet8", teacher_weights)
    return MeasureOptions(data=data, teacher=teacher, **{"epochs": 1, "window": 32, **options})


def test_the_report_says_what_the_results_depend_on(data, weights, accelerator):
    limited = replace(data, limit=70)
    options = _options(
        limited, weights, augmentation=["cutmixpick_student", "identity"], model="resnet8", batch_size=64
    )
    report = measure_all(options, accelerator)
    assert [result["augmentation"] for result in report["results"]] == ["cutmixpick_student", "identity"]
    for result in report["results"]:
        assert set(result) == RESULT_FIELDS
        assert (result["windows"], result["window"], result["images"]) == (4, 32, 70)
        assert 0 < result["stderr"] < result["stddev"] < 0.1
        assert 0 < result["entropy"] < np.log(3)
        low, high = result["interval"]
        assert low < result["stddev"] < high
    assert (report["mode"], report["mix_group"], report["window"]) == ("per_sample", 64, 32)
    assert (report["epochs"], report["seed"], report["precision"]) == (1, 0, "fp32")
    assert (report["student"], report["student_weights"]) == ("resnet8", "fresh, from the seed")
    assert report["teacher"]["weights"] == weights
    assert (report["teacher"]["fold_bn"], report["teacher"]["folded_norms"], report["compile"]) == (True, 9, "off")
    assert (report["data"]["images"], report["processes"]) == (70, 1)
    assert {"torch", "dali", "date", "device"} <= set(report["versions"])
    assert len(report["fingerprint"]) == 20


def test_folding_changes_no_figure(data, weights, accelerator):
    options = _options(replace(data, limit=70), weights, augmentation=["cutmix"], precision="fp64")
    folded = measure_all(options, accelerator)
    options.teacher.fold_bn = False
    plain = measure_all(options, accelerator)
    assert plain["teacher"]["folded_norms"] == 0
    for key in ("stddev", "entropy"):
        assert folded["results"][0][key] == pytest.approx(plain["results"][0][key], rel=1e-10)


@pytest.mark.usefixtures("graphs_alone")
def test_compiling_changes_no_figure(data, make_net, tmp_path, accelerator):
    """70 images in batches of 64: the last one is short."""
    torch.save(make_net(1).model.state_dict(), tmp_path / "small.pt")
    options = MeasureOptions(
        data=replace(data, limit=70), teacher=TeacherConfig("small", str(tmp_path / "small.pt")), model="small",
        augmentation=["cutmixpick_student", "flip"], window=32, epochs=2, precision="fp64", per_class=True,
    )  # fmt: skip
    plain = measure_all(options, accelerator)
    options.compile = "default"
    compiled = measure_all(options, accelerator)
    assert compiled["compile"] == "default"
    for found, expected in zip(compiled["results"], plain["results"], strict=True):
        assert found["augmentation"] == expected["augmentation"]
        for key in ("stddev", "entropy", "per_class"):
            assert found[key] == pytest.approx(expected[key], rel=1e-8), key


def test_students_come_from_the_seed_or_a_file(data, weights, accelerator):
    """A fresh student is the same twice; with weights it is another, and the report names them."""
    limited = replace(data, limit=64)
    picks = {"augmentation": ["cutmixpick_student"], "model": "resnet8", "batch_size": 64}
    first, again = (measure_all(_options(limited, weights, **picks), accelerator) for _ in range(2))
    assert first["results"] == again["results"]
    given = measure_all(_options(limited, weights, weights=weights, **picks), accelerator)
    assert given["student_weights"] == weights
    assert given["results"] != first["results"]


def test_the_table_has_the_best_first():
    row = {"stderr": None, "entropy": 1.25, "windows": 1}
    results = [
        {"augmentation": "flip", "stddev": None, **row},
        {"augmentation": "mixup", "stddev": 0.02, **row},
        {"augmentation": "cutmix", "stddev": 0.0123456, **row, "stderr": 0.001},
    ]
    assert results_table(results).splitlines() == [
        "| augmentation | T. stddev | std. error | entropy | windows |",
        "|:--|--:|--:|--:|--:|",
        "| cutmix | 0.012346 | 0.001000 | 1.2500 | 1 |",
        "| mixup | 0.020000 | - | 1.2500 | 1 |",
        "| flip | too few windows | - | 1.2500 | 1 |",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": TeacherConfig()}, "no teacher given: name its architecture with --teacher.name"),
        (
            {"teacher": TeacherConfig("resnet8")},
            "the teacher resnet8 has no weights: give a file with --teacher.weights",
        ),
        ({"augmentation": ["cutmixpick_student"]}, "scored by a student: name its architecture with --model"),
        ({"augmentation": ["published"]}, "cutmixpick_student is scored by a student"),
        ({"augmentation": ["mixup+kld"]}, r"mixup\+kld is scored by a student: name its architecture with --model"),
        ({"augmentation": ["mixpu"]}, 'unknown --augmentation "mixpu": did you mean mixup?'),
        ({"window": 639}, "--window 639: give a positive even number"),
        ({"window": 0}, "--window 0: give a positive even number"),
        ({"epochs": 0}, "--epochs 0: give at least 1"),
        ({"batch_size": 100}, "not a multiple of --mix.group 64"),
        ({"mix": MixOptions(alpha=0.0)}, "--mix.alpha 0.0: give a number above 0"),
        ({"mix": MixOptions(n_run=0)}, "--mix.n_run 0: give at least 1"),
        ({"mix": MixOptions(group=0)}, "--mix.group 0: give at least 1"),
        ({"mix": MixOptions(cutout_side=0)}, "--mix.cutout_side 0: give at least 1 pixel"),
        ({"confidence": 1.0}, "--confidence 1.0: give a share between 0 and 1"),
        ({"stop_confidence": 0.0}, "--stop_confidence 0.0: give a share between 0 and 1"),
        ({"stop_confidence": 0.9}, "--stop_confidence: there is no ranking of one augmentation"),
        ({"heads": True}, "--heads true measures auxiliary heads, and resnet8 has none: take resnet8_aux with weights"),
        (
            {"heads": True, "teacher": TeacherConfig("resnet8_aux"), "augmentation": ["flip", "manifold_mixup+kld"]},
            r"--heads true: manifold_mixup\+kld mixes hidden states, not images that could be turned: leave it out of",
        ),
        ({"images_per_call": 0}, "--images_per_call 0: give at least 1"),
        ({"checkpoint_every": 0}, "--checkpoint_every 0: give at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(data, weights, accelerator, change, message):
    options = _options(data, weights, **{"augmentation": ["identity"]})
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("?", r"\?")):
        measure_all(replace(options, **change), accelerator)


def test_sets_of_augmentations_have_names():
    assert augmentation_names(["published"]) == list(AUGMENTATIONS)[:9]
    assert augmentation_names(["all"]) == list(AUGMENTATIONS)
    assert augmentation_names(["cutmix", "flip", "cutmix"]) == ["cutmix", "flip"]
