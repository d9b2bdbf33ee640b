"""Manifold mixup against forwards written out by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dalikd.kd.backbones import create_model
from dalikd.kd.backbones.layers import Normalized
from dalikd.kd.manifold import LAYERS, check_mixable, hidden_mixing, manifold_mixup, mixed_forward
from dalikd.kd.mixing import HiddenMix, Mixed, mixup
from dalikd.kd.picking import CRITERIA, PoolOutputs, pick_rows
from dalikd.kd.teacher import Branch, Teacher, teacher_pass
from dalikd.pipelines.draw_spec import MixDraws

NETS = ["resnet20", "resnet20_option_a", "wrn_16_2", "vgg8", "timm:resnet18"]
CLASSES = 7
BATCH = 6


def make_net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, CLASSES).double()


def make_draws(layer: Tensor | None = None, seed: int = 0) -> MixDraws:
    generator = torch.Generator().manual_seed(seed)
    partner = torch.randperm(BATCH, generator=generator)
    layer = torch.arange(BATCH) % LAYERS if layer is None else layer
    lam, center = torch.rand(BATCH, generator=generator), torch.rand(BATCH, 2, generator=generator)
    return MixDraws(partner, lam, center, layer=layer.int())


def make_pixels(side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (BATCH, 3, side, side), dtype=torch.uint8, generator=generator)


def pieces(net: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """A net by hand, cut after its first stage and its second."""
    name = type(net).__name__
    if name == "VGG":
        return [
            lambda x: net.block1(net.block0(x)),
            net.block2,
            lambda x: net.classifier(net.block4(net.block3(x)).mean((2, 3))),
        ]
    if name == "WideResNet":
        return [
            lambda x: net.block1(net.conv1(x)),
            net.block2,
            lambda x: net.fc(functional.relu(net.bn1(net.block3(x))).mean((2, 3))),
        ]
    head = net.linear if hasattr(net, "linear") else net.fc
    if hasattr(net, "maxpool"):  # timm's
        return [
            lambda x: net.layer1(net.maxpool(functional.relu(net.bn1(net.conv1(x))))),
            net.layer2,
            lambda x: head(net.layer4(net.layer3(x)).mean((2, 3))),
        ]
    return [
        lambda x: net.layer1(functional.relu(net.bn1(net.conv1(x)))),
        net.layer2,
        lambda x: head(net.layer3(x).mean((2, 3))),
    ]


def by_hand(net: nn.Module, images: Tensor, draws: MixDraws) -> Tensor:
    """Row by row, in eval mode: both images go through so many stages, are mixed, and go on."""
    rows = []
    for row in range(len(images)):
        own, partner = images[row : row + 1], images[draws.partner[row]][None]
        lam, layer = draws.lam[row].double(), int(draws.layer[row])
        stages = pieces(net)
        for stage in stages[:layer]:
            own, partner = stage(own), stage(partner)
        states = lam * own + (1 - lam) * partner
        for stage in stages[layer:]:
            states = stage(states)
        rows.append(states)
    return torch.cat(rows)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("joint", [True, False])
@torch.no_grad()
def test_every_image_is_mixed_at_its_own_layer(name: str, joint: bool):
    net = make_net(name).eval()
    images, draws = make_pixels(64 if "timm" in name else 32).double() / 255, make_draws()
    mixed = manifold_mixup(images, draws)
    assert mixed.hidden is not None
    (logits, *_), augmented = mixed_forward(net, images, mixed.images, mixed.hidden, joint=joint)
    torch.testing.assert_close(logits, net(images), rtol=0, atol=1e-10)
    torch.testing.assert_close(augmented, by_hand(net, images, draws), rtol=0, atol=1e-10)
    assert (augmented - mixed_forward(net, images, images, mixed.hidden, joint=joint)[1])[0].abs().max() > 1e-6


@pytest.mark.parametrize("joint", [True, False])
@torch.no_grad()
def test_layer_0_is_mixup_of_the_images(joint: bool):
    net, images, draws = make_net("resnet20").eval(), make_pixels().double(), make_draws(torch.zeros(BATCH))
    mixed = manifold_mixup(images, draws)
    assert torch.equal(mixed.images, mixup(images, draws).images)
    augmented = mixed_forward(net, images, mixed.images, mixed.hidden, joint=joint)[1]
    torch.testing.assert_close(augmented, net(mixup(images, draws).images), rtol=0, atol=1e-10)


def test_only_images_of_layer_0_are_mixed_outside_of_the_net():
    images, draws = make_pixels(), make_draws()
    mixed = manifold_mixup(images, draws)
    assert mixed.images.dtype == torch.float32
    assert torch.equal(mixed.images[0::3], mixup(images, draws).images[0::3])
    for rest in (1, 2):
        assert torch.equal(mixed.images[rest::3], images[rest::3].float())
    assert torch.equal(mixed.partner, draws.partner)
    assert torch.equal(mixed.lam, draws.lam)
    assert torch.equal(mixed.layer, draws.layer)


@pytest.mark.parametrize("joint", [True, False])
def test_one_layer_for_all_is_the_method_as_published(joint: bool):
    """In training mode: a batch goes through two stages, is mixed with itself shuffled, and goes on."""
    net, images, draws = make_net("wrn_16_2"), make_pixels().double() / 255, make_draws(torch.full((BATCH,), 2))
    stages, lam = pieces(net), draws.lam.double()[:, None, None, None]
    hidden = manifold_mixup(images, draws).hidden
    (logits, *_), augmented = mixed_forward(net, images, images, hidden, joint=joint)
    if joint:  # batch norms see both
        states = stages[1](stages[0](torch.cat((images, images))))
        states = torch.cat((states[:BATCH], lam * states[BATCH:] + (1 - lam) * states[:BATCH][draws.partner]))
        expected = stages[2](states).split(BATCH)
    else:
        states = stages[1](stages[0](images))
        expected = net(images), stages[2](lam * states + (1 - lam) * states[draws.partner])
    torch.testing.assert_close((logits, augmented), tuple(expected), rtol=0, atol=1e-10)
    for found in (logits, augmented):  # a gradient flows through both, to the first layer
        assert torch.autograd.grad(found.sum(), net.conv1.weight, retain_graph=True)[0].abs().max() > 0


@torch.no_grad()
def test_pixels_and_picks():
    """Through `Normalized`, with more images than originals and partners that were not picked."""
    net = Normalized(make_net("resnet20").eval(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).double()
    pixels, draws = make_pixels(), make_draws()
    mixed = manifold_mixup(pixels.double(), draws)
    every = mixed_forward(net, pixels, mixed.images, mixed.hidden, joint=True)[1]
    rows = torch.tensor([1, 5, 2, 1, 1, 4, 0, 5])
    picked = mixed.take(rows)
    found = mixed_forward(net, pixels, picked.images, picked.hidden, joint=False)[1]
    torch.testing.assert_close(found, every[rows], rtol=0, atol=1e-10)


def test_nothing_is_left_behind():
    net, images, draws = make_net("vgg8").eval(), make_pixels().double(), make_draws()
    expected, hidden = net(images), manifold_mixup(images, draws).hidden
    for joint in (True, False):
        mixed_forward(net, images, images, hidden, joint=joint)
    with pytest.raises(RuntimeError, match="lost"), hidden_mixing(net, hidden):
        raise RuntimeError("lost")
    assert not any(module._forward_hooks for module in net.modules())
    assert torch.equal(net(images), expected)
    with hidden_mixing(net, None):
        assert torch.equal(net(images), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_rows_that_are_not_mixed_stay_exactly(dtype: torch.dtype):
    net = make_net("resnet20").eval().to(dtype)
    images = (make_pixels() / 255).to(dtype)
    hidden = HiddenMix(torch.arange(BATCH).flip(0), torch.full((BATCH,), 0.5), torch.zeros(BATCH).int())
    (logits, *_), augmented = mixed_forward(net, images, images, hidden, joint=True)
    assert augmented.dtype == dtype
    assert torch.equal(logits, augmented)


# ------------------------------------------------------------------------------------------------------ the pass


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    net = make_net("resnet20")
    net.train()(torch.randn(16, 3, 32, 32, dtype=torch.float64))  # running statistics unlike those of the start
    return Teacher(Normalized(net, (0.5,) * 3, (0.25,) * 3).double(), fold_bn=True)


def runs_of(pixels: Tensor, runs: int = 1) -> tuple[list[Mixed], list[MixDraws]]:
    draws = [make_draws((torch.arange(BATCH) + run) % LAYERS, seed=run) for run in range(runs)]
    return [manifold_mixup(pixels.double(), of_run) for of_run in draws], draws


def test_the_target_is_the_teachers_own_mixture(teacher: Teacher):
    pixels = make_pixels()
    runs, (draws,) = runs_of(pixels)
    assert teacher.folded == 21
    found = teacher_pass(teacher, pixels, runs, [Branch((0,))])
    (branch,) = found.branches
    net, normalized = teacher.model.model, teacher.model.normalize(pixels)
    torch.testing.assert_close(found.originals.logits, teacher(pixels), rtol=0, atol=1e-10)
    torch.testing.assert_close(branch.logits, by_hand(net, normalized, draws), rtol=0, atol=1e-10)
    assert branch.mixed.hidden is not None
    for part, drawn in zip(branch.mixed.hidden, (draws.partner, draws.lam, draws.layer), strict=True):
        assert torch.equal(part, drawn)


@pytest.mark.parametrize("name", ["teacher_entropy", "student_entropy", "kld"])
@torch.no_grad()
def test_candidates_that_are_mixed_inside_compete(teacher: Teacher, name: str):
    pixels, net = make_pixels(), make_net("wrn_16_2").eval()
    student = Normalized(net, (0.4,) * 3, (0.3,) * 3).double()
    runs, draws = runs_of(pixels, runs=2)

    def score(images: Tensor, hidden: HiddenMix) -> Tensor:
        with hidden_mixing(student, hidden):
            return student(images)

    branches = [Branch((0, 1), CRITERIA[name], n_pick=3)]
    (branch,) = teacher_pass(teacher, pixels, runs, branches, group=4, student=score).branches
    by_teacher, by_student = (
        torch.cat([by_hand(model.model, model.normalize(pixels), of_run) for of_run in draws])
        for model in (teacher.model, student)
    )
    scores = CRITERIA[name].score(PoolOutputs(by_teacher, by_student, None), 4)
    picks = pick_rows(scores.reshape(2, BATCH), 4, 3)
    assert torch.equal(branch.picks, picks)
    torch.testing.assert_close(branch.logits, by_teacher[picks], rtol=0, atol=1e-10)
    assert torch.equal(branch.mixed.layer, Mixed.join(runs).layer[picks])


# ---------------------------------------------------------------------------------------------------- what is refused


def test_nets_without_stages_are_refused():
    check_mixable(Normalized(make_net("resnet20"), (0.5,) * 3, (0.5,) * 3), "resnet20")
    with pytest.raises(ValueError, match=r"--compile default cannot take manifold_mixup.*resnet20: use --compile off"):
        check_mixable(make_net("resnet20"), "resnet20", "default")
    with pytest.raises(ValueError, match=r"my net names fewer than 3 stages, manifold_mixup mixes after the first 2"):
        check_mixable(nn.Linear(3, 3), "my net")


def test_draws_without_layers_are_refused():
    images = make_pixels()
    with pytest.raises(ValueError, match=r"layers have shape None for 6 images: give layer \[B\]"):
        manifold_mixup(images, make_draws()._replace(layer=None))
    with pytest.raises(ValueError, match=r"layers have shape \(5,\)"):
        manifold_mixup(images, make_draws(torch.zeros(5)))
