import numpy as np
import pytest

from dalikd.pipelines.draw_spec import DrawSpec, MixRun, View, ViewRun
from dalikd.pipelines.sampler import Sampler

LAYOUTS = [(world, accumulation) for world in (1, 2, 4) for accumulation in (1, 2)]


def test_an_epoch_is_one_order_cut_into_steps():
    sampler = Sampler(1000, 64, seed=3)
    rows = np.concatenate([sampler[index].rows for index in range(15)])
    assert sampler.steps_per_epoch == len(rows) // 64 == 15
    assert np.array_equal(rows, sampler.order(0)[:960])
    assert np.array_equal(sampler[15].rows, sampler.order(1)[:64])
    assert not np.array_equal(sampler.order(0), sampler.order(1))


def test_a_microbatch_is_a_function_of_its_index_alone():
    straight = Sampler(1000, 64, seed=3)
    expected = {index: straight[index].rows for index in range(40)}
    jumping = Sampler(1000, 64, seed=3)
    for index in (39, 2, 16, 15, 0, 31, 14):  # back and forth between epochs
        assert np.array_equal(jumping[index].rows, expected[index])
        assert jumping[index].epoch == index // 15


def test_without_shuffling_rows_come_in_their_order_every_epoch():
    sampler = Sampler(10, 5, shuffle=False)
    assert [sampler[index].rows.tolist() for index in range(3)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]


VIEWS = tuple(map(ViewRun, ("crop_flip", "autoaugment", "trivialaugment", "randaugment")))
MIXES = (
    MixRun("derangement", alpha=0.4),
    MixRun("derangement", 1, alpha=0.4),
    MixRun("first", 2, cells=9, box=True, layers=3),
)


def _global_step(step: int, spec: DrawSpec, world: int, accumulation: int) -> dict[str, np.ndarray]:
    """Everything that a step of 256 of 1000 rows consists of, over all ranks and microbatches, in the epoch's order."""
    parts = []
    for rank in range(world):
        sampler = Sampler(1000, 256, 9, world=world, rank=rank, accumulation=accumulation, group=spec.mix_group)
        for part in range(accumulation):
            micro = sampler[step * accumulation + part]
            draws = spec.draw(micro)
            arrays = {"rows": micro.rows, **draws.views}
            for run, mix in enumerate(draws.mix):
                arrays |= {f"{name}{run}": array for name, array in vars(mix).items() if array is not None}
                arrays[f"partner{run}"] = micro.rows[mix.partner]
            parts.append((micro.start, micro.total, arrays))
    parts.sort(key=lambda part: part[0])
    assert sum(total for _, total, _ in parts) == 256 * world  # each rank knows the total of its microbatch
    return {name: np.concatenate([arrays[name] for _, _, arrays in parts]) for name in parts[0][2]}


@pytest.mark.parametrize("mode", ["per_sample", "per_batch"])
@pytest.mark.parametrize("view", [View(64, "random_resized_crop"), View(32, "pad_crop")], ids=lambda view: view.crop)
def test_a_step_is_the_same_for_every_world_and_accumulation(mode, view):
    spec = DrawSpec(view, 9, VIEWS, MIXES, mode, mix_group=32)
    for step in (0, 2, 4):  # the last one is of the second epoch
        expected = _global_step(step, spec, 1, 1)
        assert {"rows", "flip", "partner0", "lam1", "center1", "cells2", "box2", "layer2", "sign3"} < set(expected)
        assert (expected["rows"] != expected["partner0"]).all()
        for world, accumulation in LAYOUTS[1:]:
            found = _global_step(step, spec, world, accumulation)
            assert found.keys() == expected.keys()
            for name, array in expected.items():
                assert np.array_equal(found[name], array), (name, step, world, accumulation)


@pytest.mark.parametrize(
    ("size", "world", "batch", "accumulation"),
    [(1003, 4, 64, 1), (130, 4, 32, 1), (5, 4, 8, 1), (1, 4, 8, 1), (1003, 2, 64, 2), (7, 1, 100, 1), (128, 4, 32, 1)],
)
def test_validation_sees_every_row_exactly_once(size, world, batch, accumulation):
    ranks = [
        Sampler(size, batch, shuffle=False, drop_last=False, world=world, rank=rank, accumulation=accumulation)
        for rank in range(world)
    ]
    count = ranks[0].microbatches_per_epoch
    assert all(sampler.microbatches_per_epoch == count for sampler in ranks)
    for epoch in (0, 1):
        seen = []
        for index in range(epoch * count, (epoch + 1) * count):
            micros = [sampler[index] for sampler in ranks]
            for micro in micros:
                assert 1 <= len(micro.rows) <= batch // (world * accumulation)
                assert micro.valid in (len(micro.rows), 0)  # 0: a filler
                assert micro.total == sum(other.valid for other in micros)
                seen.extend(micro.rows[: micro.valid].tolist())
        assert sorted(seen) == list(range(size))


def test_fillers_stand_where_nothing_is_left():
    valid = [
        [Sampler(5, 8, shuffle=False, drop_last=False, world=4, rank=rank)[0].valid for rank in range(4)],
        [Sampler(1, 8, shuffle=False, drop_last=False, world=4, rank=rank)[0].valid for rank in range(4)],
    ]
    assert valid == [[2, 2, 1, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 101}, r"--batch_size 101 is larger than the data set \(100 images\).*at most 100"),
        ({"batch_size": 6, "world": 4}, r"--batch_size 6 cannot be divided evenly over 4 process.*multiple of 4"),
        ({"batch_size": 6, "world": 2, "accumulation": 2}, r"--accumulation 2: use a multiple of 4"),
        ({"batch_size": 0}, r"--batch_size 0: give at least 1: use at most 100$"),
        ({"batch_size": 128, "group": 32}, r"\(100 images\): no full batch; use a multiple of 32, at most 96$"),
        ({"batch_size": 128, "group": 128}, r"no full batch; use .* or --batch_size 100 with --mix.group 100$"),
        (
            {"batch_size": 50, "world": 2, "group": 64},
            r"of --mix.group 64: use .* or --batch_size 100 with --mix.group 50$",
        ),
        (
            {"batch_size": 128, "world": 128},
            r"no full batch; use fewer processes or a smaller --accumulation: a step has",
        ),
        ({"batch_size": 48, "group": 32}, r"microbatches of 48.*multiple of --mix.group 32: use a multiple of 32"),
        ({"batch_size": 64, "world": 4, "group": 32}, r"microbatches of 16.*--mix.group 32: use a multiple of 128"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as refused:
        Sampler(100, **arguments)
    assert "\n" not in str(refused.value)


def test_a_batch_larger_than_the_data_set_is_fine_where_the_last_batch_is_kept():
    assert len(Sampler(7, 100, drop_last=False)[0].rows) == 7


# ---------------------------------------------------------------------------------------------- place and repeat


def test_a_place_is_a_microbatch_without_rows():
    sampler = Sampler(100, 16, 3, drop_last=False, world=2, rank=1)
    for index in range(20):
        micro, place = sampler[index], sampler.place(index)
        assert len(place.rows) == 0
        assert (place.index, place.epoch, place.start, place.valid, place.total) == (
            micro.index, micro.epoch, micro.start, micro.valid, micro.total,
        )  # fmt: skip


def test_repeated_epochs_have_the_same_rows_and_epoch_number():
    sampler, forever = Sampler(40, 8, 3, repeat=2), Sampler(40, 8, 3)
    for index in range(5 * 5):
        epoch = index // 5
        micro = sampler[index]
        assert micro.epoch == epoch % 2
        assert micro.index == index
        assert np.array_equal(micro.rows, forever[(epoch % 2) * 5 + index % 5].rows)


def test_one_repeated_epoch_keeps_one_order():
    sampler = Sampler(40, 8, 3, repeat=1)
    assert np.array_equal(sampler[0].rows, sampler[5].rows)
    assert list(sampler._orders) == [0]
