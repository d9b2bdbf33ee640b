"""CRD against published steps; its positives and negatives, memories, processes and resumes.

Run by itself by several processes: FILE, where what the memories hold is written.
"""

import json
import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dalikd.kd.backbones import NetOutput
from dalikd.kd.losses import CRD, LossContext, StepOutputs, WeightedSum, crd_draws, crd_loss, crd_places, crd_scores

REFERENCE = json.loads((Path(__file__).parents[2] / "data" / "losses_relations.json").read_text())
MEMORIES = ("student_memory", "teacher_memory")
MODES = ("exact", "relax")


def build(
    images: int = 40, student: int = 6, teacher: int = 7, labels: Tensor | None = None, seed: int = 3, **options: Any
) -> CRD:
    torch.manual_seed(seed)
    loss = CRD(**{"feat_dim": 8, "nce_k": 20, **options})
    nets = [NetOutput(torch.zeros(2, 4), (torch.zeros(2, width),)) for width in (student, teacher)]
    labels = torch.arange(images) % 4 if labels is None else labels
    loss.build(LossContext(*nets, 4, images, labels if "all_labels" in loss.needs else None))
    return loss.double()


def outputs(student: Tensor, teacher: Tensor, ids: Tensor) -> StepOutputs:
    logits = student[:, :4]
    return StepOutputs(NetOutput(logits, (student,)), NetOutput(logits, (teacher,)), ids % 4, ids, torch.zeros(()))


def steps(count: int, size: int = 8, seed: int = 6) -> list[StepOutputs]:
    """Batches in which some images come twice."""
    random = torch.Generator().manual_seed(seed)

    def rows(width: int) -> Tensor:
        return torch.randn(size, width, dtype=torch.float64, generator=random)

    return [outputs(rows(6), rows(7), torch.randint(0, 40, (size,), generator=random)) for _ in range(count)]


# ------------------------------------------------------------------------------------------------ published values


def test_three_steps_equal_the_published_ones():
    entry = REFERENCE["CRD"]
    hyper, random = entry["hyper"], np.random.RandomState(entry["seed"])
    images, dim, batch = hyper["n_data"], hyper["feat_dim"], hyper["batch"]
    loss = build(
        images, hyper["s_dim"], hyper["t_dim"], feat_dim=dim, nce_k=hyper["nce_k"], momentum=hyper["nce_m"],
        temperature=entry["effective_T_in_64"],
    )  # fmt: skip
    for name in MEMORIES:
        drawn = random.uniform(-1 / math.sqrt(dim / 3), 1 / math.sqrt(dim / 3), (images, dim))
        getattr(loss, name).copy_(torch.from_numpy(drawn))
    embeds = {"embed_s": loss.student_embed, "embed_t": loss.teacher_embed}
    parameters = {f"{name}.linear.{key}": p for name, embed in embeds.items() for key, p in embed.named_parameters()}
    for key, values in parameters.items():
        drawn = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(values.shape))
        drawn = drawn / math.sqrt(drawn.shape[1]) if drawn.ndim > 1 else 0.1 * drawn
        values.data.copy_(torch.from_numpy(drawn.astype(np.float32)))
    for wanted in entry["steps"]:
        student, teacher = (torch.from_numpy(random.randn(batch, hyper[width])) for width in ("s_dim", "t_dim"))
        ids = torch.from_numpy(random.permutation(images)[:batch])
        negatives = torch.from_numpy(random.randint(0, images, (batch, hyper["nce_k"])))
        assert ids.tolist() == wanted["idx"]
        loss.zero_grad()
        found = loss.contrast(student.requires_grad_(), teacher, ids, torch.cat((ids[:, None], negatives), 1))
        found.backward()
        assert found.item() == pytest.approx(wanted["loss"], rel=1e-9)
        assert loss.log_constants.exp().tolist() == pytest.approx([wanted["Z_v1"], wanted["Z_v2"]], rel=1e-9)
        assert student.grad is not None
        assert student.grad.norm().item() == pytest.approx(wanted["grad_norm_f_s"], rel=1e-9)
        assert student.grad.flatten()[:4].tolist() == pytest.approx(wanted["grad_f_s_first4"], rel=1e-9)
        norms = {key: values.grad.norm().item() for key, values in parameters.items()}
        assert norms == pytest.approx(wanted["param_grad_norm"], rel=1e-9)
        for name, kept in zip(MEMORIES, ("memory_v1_after", "memory_v2_after"), strict=True):
            memory = getattr(loss, name)
            assert memory.sum().item() == pytest.approx(wanted[kept]["sum"], rel=1e-9)
            assert memory[ids[0], :4].tolist() == pytest.approx(wanted[kept]["row_idx0_first4"], rel=1e-9)


def test_the_critics_loss_equals_the_published_one():
    entry = REFERENCE["CRD_ContrastLoss"]
    hyper = entry["hyper"]
    drawn = np.random.RandomState(entry["seed"]).randn(hyper["B"], hyper["K"] + 1)
    ratios = torch.from_numpy(np.exp(drawn) / hyper["n_data"] * 5).requires_grad_()
    loss = crd_loss(ratios.log(), hyper["n_data"])
    loss.backward()
    assert loss.item() == pytest.approx(entry["value64"], rel=1e-9)
    assert ratios.grad is not None
    assert ratios.grad.norm().item() == pytest.approx(entry["grad_of_sum"]["x"]["norm"], rel=1e-9)
    assert ratios.grad.flatten()[:4].tolist() == pytest.approx(entry["grad_of_sum"]["x"]["first4"], rel=1e-9)


def test_scores_are_products_over_the_temperature():
    embeddings, memory = torch.randn(3, 8, dtype=torch.float64), torch.randn(9, 8, dtype=torch.float64)
    rows = torch.randint(0, 9, (3, 5))
    found = crd_scores(embeddings.requires_grad_(), memory, rows, 0.5)
    for i in range(3):
        for k in range(5):
            expected = sum(embeddings[i, d].item() * memory[rows[i, k], d].item() for d in range(8)) / 0.5
            assert found[i, k].item() == pytest.approx(expected, rel=1e-12)


def test_extreme_scores_are_finite():
    scores = torch.tensor([[-500.0, 500.0, 500.0], [500.0, -500.0, -500.0]], requires_grad=True)
    loss = crd_loss(scores, 50_000)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    cold, given = build(temperature=0.001), steps(1)[0]  # exponentials alone would overflow, in float32
    assert cold.float()(_float32(given))["crd"].isfinite()


def _float32(given: StepOutputs) -> StepOutputs:
    return given._replace(student=given.student.map(Tensor.float), teacher=given.teacher.map(Tensor.float))


# ---------------------------------------------------------------------------------------------- positives and negatives


def _hash(bits: int) -> int:
    """splitmix64 in whole numbers of Python."""
    mask = 2**64 - 1
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
    return bits ^ (bits >> 31)


def test_draws_are_a_hash_of_seed_step_id_and_place():
    golden, mask, ids = 0x9E3779B97F4A7C15, 2**64 - 1, [0, 7, 1_281_166]
    found = crd_draws(torch.tensor(2**63 - 5), torch.tensor(123_456), torch.tensor(ids), 4)
    for row, number in zip(found.tolist(), ids, strict=True):
        key = _hash((_hash((_hash(2**63 - 5) + 123_456 * golden) & mask) + number * golden) & mask)
        assert row == [_hash(key ^ k) >> 1 for k in range(4)]
    # the published generator's first number from seed 0 is the hash of its increment
    assert _hash(golden) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize(("count", "number"), [(1, 7), (5, 7), (7, 7), (7, 1), (20, 7), (6, 5)])
def test_places_are_equally_likely_and_never_twice(count: int, number: int):
    """Over all moves around the circle every number comes equally often, whatever is taken of the stretches."""
    draws = torch.randint(0, 2**62, (1, count + 1)).repeat(number, 1)
    draws[:, -1] = torch.arange(number) + 10 * number
    found = crd_places(draws, torch.full((number, 1), number))
    assert torch.bincount(found.flatten(), minlength=number).tolist() == [count] * number
    for row in found:
        times = torch.bincount(row, minlength=number)
        assert times.min() >= count // number
        assert times.max() <= -(-count // number)


def test_places_are_one_of_each_stretch():
    numbers, count = [1_281_167, 1_279_867], 16_384
    draws = torch.randint(0, 2**62, (2, count + 1))
    for row, given, number in zip(
        crd_places(draws, torch.tensor(numbers)[:, None]), draws.tolist(), numbers, strict=True
    ):
        cuts = [k * number // count for k in range(count + 1)]
        expected = [(cuts[k] + given[k] % (cuts[k + 1] - cuts[k]) + given[-1]) % number for k in range(count)]
        assert row.tolist() == expected
        assert len(set(expected)) == count


LABELS = torch.tensor([2, 0, 1, 2, 2, 0, 3, 1, 2, 0])


def draws_of_steps(count: int, **options: Any) -> Tensor:
    """What ten images are compared with in so many steps, [count, 10, K + 1]."""
    loss, found = build(10, labels=LABELS, **options), []
    for step in range(count):
        loss.steps.fill_(step)
        found.append(loss.draw(torch.arange(10), LABELS))
    return torch.stack(found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("negatives", ["exact", "relaxed"])
def test_negatives_are_even_and_never_what_is_left_out(negatives: Any, mode: Any):
    found = draws_of_steps(1500, nce_k=4, negatives=negatives, mode=mode)[..., 1:]
    assert (found.sort().values.diff() > 0).all()
    for row in range(10):
        left_out = (LABELS[row] == LABELS) if negatives == "exact" else torch.arange(10) == row
        counts = torch.bincount(found[:, row].flatten(), minlength=10)
        assert counts[left_out].sum() == 0
        shares = counts[~left_out] / 6000 * (~left_out).sum()
        assert (shares - 1).abs().max() < 0.12  # four standard deviations of 1,500 draws of 4 of 9


def test_positives_are_the_image_or_any_of_its_class():
    ids = torch.arange(10)
    assert (draws_of_steps(20)[..., 0] == ids).all()
    found = draws_of_steps(1500, mode="relax", nce_k=1)[..., 0]
    assert torch.equal(LABELS[found], LABELS.expand(1500, 10))
    for row in range(10):
        own = LABELS[row] == LABELS
        shares = torch.bincount(found[:, row], minlength=10)[own] / 1500 * own.sum()
        assert (shares - 1).abs().max() < 0.18  # four standard deviations of 1,500 draws of 1 of 4


@pytest.mark.parametrize("mode", MODES)
def test_draws_do_not_depend_on_the_batch_but_on_step_and_seed(mode: Any):
    loss, ids = build(mode=mode), torch.tensor([3, 17, 29])
    found = loss.draw(ids, ids % 4)
    assert torch.equal(loss.draw(ids.flip(0)[:2], ids.flip(0)[:2] % 4), found.flip(0)[:2])
    assert torch.equal(build(mode=mode).draw(ids, ids % 4), found)
    assert not torch.equal(build(mode=mode, seed=4).draw(ids, ids % 4), found)
    loss(steps(1)[0])
    assert not torch.equal(loss.draw(ids, ids % 4), found)


def test_a_relaxed_positive_is_compared_and_the_image_is_remembered():
    loss, (given,) = build(mode="relax", momentum=0.0), steps(1)
    rows, before = loss.draw(given.ids, given.labels), loss.student_memory.clone()
    assert (rows[:, 0] != given.ids).any()
    plain = build(momentum=0.0)
    expected = plain.contrast(given.student.features[0], given.teacher.features[0], given.ids, rows)
    assert loss(given)["crd"].item() == expected.item()
    written = (loss.student_memory != before).any(1).nonzero().flatten()
    assert written.tolist() == given.ids.unique().tolist()


# ------------------------------------------------------------------------------------------------------- memories


def test_memories_move_towards_what_is_seen_and_are_not_trained():
    loss, (given,) = build(momentum=0.25), steps(1)
    before = {name: getattr(loss, name).clone() for name in MEMORIES}
    assert {name for name, _ in loss.named_parameters()} == {
        f"{which}_embed.{key}" for which in ("student", "teacher") for key in ("weight", "bias")
    }
    features = {"student": given.student.features[0], "teacher": given.teacher.features[0]}
    loss(given)["loss"].backward()
    ids = given.ids.tolist()
    assert len(set(ids)) < len(ids)
    for which, rows in features.items():
        memory, old = getattr(loss, f"{which}_memory"), before[f"{which}_memory"]
        torch.testing.assert_close(memory.norm(dim=1), torch.ones(40, dtype=torch.float64))
        embeddings = nn.functional.normalize(getattr(loss, f"{which}_embed")(rows), dim=1)
        for image in range(40):
            expected = old[image]
            if image in ids:  # the first of those that are equal
                expected = 0.25 * expected + 0.75 * embeddings[ids.index(image)]
            torch.testing.assert_close(memory[image], expected / expected.norm())


def test_evaluation_writes_nothing():
    loss, (given, after) = build(), steps(2)
    loss.eval()
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    first = loss(given)["crd"]
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())
    assert loss.train()(given)["crd"].item() == pytest.approx(first.item(), rel=1e-12)  # which sets the constants
    constants = loss.log_constants.clone()
    assert constants.isfinite().all()
    loss(after)
    assert torch.equal(loss.log_constants, constants)


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_goes_on_as_the_other(mode: Any):
    straight, first = build(mode=mode), build(mode=mode)
    for given in (batches := steps(4))[:2]:
        straight(given)
        first(given)
    resumed = build(seed=11, mode=mode)  # another seed: that of the draws is saved
    resumed.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    assert set(first.state_dict()) == {
        *MEMORIES, "log_constants", "steps", "seed", "student_embed.weight", "student_embed.bias",
        "teacher_embed.weight", "teacher_embed.bias",
    }  # fmt: skip
    for given in batches[2:]:
        assert torch.equal(resumed.draw(given.ids, given.labels), straight.draw(given.ids, given.labels))
        assert resumed(given)["loss"].item() == straight(given)["loss"].item()
    assert all(torch.equal(value, straight.state_dict()[key]) for key, value in resumed.state_dict().items())


def test_buffers_are_named_for_several_processes():
    loss = build()
    assert {name for name, _ in loss.named_buffers()} == set(loss.local_buffers)
    whole = WeightedSum([loss])
    assert {name for name, _ in whole.named_buffers()} == set(whole.local_buffers)
    assert whole.needs == {"features", "ids", "all_labels"}
    assert build(negatives="relaxed").needs == {"features", "ids"}
    assert build(negatives="relaxed", mode="relax").needs == {"features", "ids", "all_labels"}


# ------------------------------------------------------------------------------------------------- several processes


class _Net(nn.Module):
    """A student and its loss, as a task holds them."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.loss = build(mode=mode)
        self.student = nn.Linear(6, 6).double()

    def forward(self, given: StepOutputs) -> Tensor:
        return self.loss(outputs(self.student(given.student.features[0]), given.teacher.features[0], given.ids))["loss"]


def train(mode: str, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Four steps of SGD on this process's share of each batch; the state afterwards."""
    net = _Net(mode)
    model: Callable[[StepOutputs], Tensor] = net
    if world > 1:
        names = [f"loss.{name}" for name in net.loss.local_buffers]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, names)
        model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for given in steps(4):
        part = slice(rank * 8 // world, (rank + 1) * 8 // world)
        (own,), (other,) = given.student.features, given.teacher.features
        model(outputs(own[part], other[part], given.ids[part])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


def test_two_processes_remember_what_one_does(tmp_path: Path, start_joined: Any):
    for process in start_joined(2, tmp_path / "printed", __file__, tmp_path / "state.pt"):
        process.end()
    ones, others = torch.load(tmp_path / "state.pt")
    for mode in MODES:
        for key, value in train(mode).items():
            assert torch.equal(ones[mode][key], others[mode][key]), key
            torch.testing.assert_close(ones[mode][key], value, rtol=0, atol=1e-12, msg=key)


def test_it_compiles_into_one_graph():
    loss, plain = build(mode="relax"), build(mode="relax")
    compiled = torch.compile(loss.forward, fullgraph=True, backend="aot_eager")
    for given in steps(3):
        found = []
        for module, forward in ((loss, compiled), (plain, plain)):  # memories are written before gradients are taken
            student = given.student.features[0].clone().requires_grad_()
            term = forward(outputs(student, given.teacher.features[0], given.ids))["loss"]
            found.append((term, *torch.autograd.grad(term, (student, *module.parameters()))))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    torch.compiler.reset()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(loss.state_dict()[key], value)


def test_compiled_code_draws_the_same():
    """Hashes of 64 bits, and products of up to 2e10."""
    large, ids = build(1_281_167, nce_k=16_384, feat_dim=1, negatives="relaxed"), torch.tensor([5, 1_281_166])
    assert torch.equal(torch.compile(large.draw, fullgraph=True)(ids, ids % 4), large.draw(ids, ids % 4))
    torch.compiler.reset()


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nce_k": 0}, "nce_k is 0: give 1 or more"),
        ({"feat_dim": 0}, "feat_dim is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"momentum": 1.0}, r"momentum is 1.0: give a number in \[0, 1\)"),
        ({"negatives": "relax"}, "negatives is 'relax': give exact or relaxed"),
        ({"mode": "relaxed"}, "mode is 'relaxed': give exact or relax"),
        ({"labels": torch.ones(40, dtype=torch.int64)}, r"all 40 images have the label 1.*--loss.negatives relaxed"),
        ({"labels": torch.zeros(39, dtype=torch.int64)}, "39 labels of 40 images"),
        ({"labels": torch.zeros(39, dtype=torch.int64), "negatives": "relaxed", "mode": "relax"}, "39 labels of 40"),
        ({"images": 1, "negatives": "relaxed"}, "there are 1 images"),
        ({"student_features": [0, 0], "teacher_features": [0, 0]}, "is given 2: name one of each"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build(**options)


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, {mode: train(mode, rank, len(found)) for mode in MODES})
    if rank == 0:
        torch.save(found, sys.argv[1])
    distributed.destroy_process_group()
