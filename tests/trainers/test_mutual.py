"""Mutual learning: what each net minimises, and whose weights a term moves."""

import numpy as np
import pytest
import torch

from dalikd.tools.cli import parse
from dalikd.trainers.augmentation import MixOptions
from dalikd.trainers.launch import start
from dalikd.trainers.setup import open_run
from dalikd.trainers.tasks.mutual import Mutual, MutualOptions
from dalikd.trainers.tasks.supervised import SupervisedInputs


@pytest.fixture
def nets(make_net):
    return [make_net(seed).double().eval() for seed in range(3)]


@pytest.fixture
def inputs():
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 3, 12, 12), generator=random).double()
    return SupervisedInputs(pixels, torch.tensor([0, 1, 2, 1, 0]))


def _log_softmax(logits, temperature=1.0):
    scaled = logits / temperature
    return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_each_net_learns_from_labels_and_from_the_mean_of_the_others(nets, inputs, make_loop, temperature):
    task = Mutual(nets, make_loop().task.augmenter, temperature).double()
    terms = task(inputs)
    assert list(terms) == ["loss", "ce0", "kl0", "ce1", "kl1", "ce2", "kl2", "top1"]
    logits = [net(inputs.pixels).detach().numpy() for net in nets]
    expected = {}
    for number, own in enumerate(logits):
        expected[f"ce{number}"] = -np.mean([row[label] for row, label in zip(_log_softmax(own), inputs.labels)])  # noqa: B905
        apart = []
        for other in (other for other in logits if other is not own):
            theirs, ours = _log_softmax(other, temperature), _log_softmax(own, temperature)
            apart.append(temperature**2 * (np.exp(theirs) * (theirs - ours)).sum(1).mean())
        expected[f"kl{number}"] = np.mean(apart)
    for name, value in {**expected, "loss": sum(expected.values())}.items():
        np.testing.assert_allclose(terms[name].item(), value, rtol=1e-9)


def test_a_compiler_sees_one_graph(nets, inputs, make_loop):
    task = Mutual(nets, make_loop().task.augmenter)
    torch.testing.assert_close(torch.compile(task.forward, fullgraph=True, backend="eager")(inputs), task(inputs))
    torch.compiler.reset()


def test_a_net_is_not_moved_by_what_others_take_from_it(nets, inputs, make_loop):
    terms = Mutual(nets, make_loop().task.augmenter)(inputs)
    terms["kl0"].backward()
    moved = [any(values.grad is not None for values in net.parameters()) for net in nets]
    assert moved == [True, False, False]


def test_equal_nets_have_nothing_to_tell(nets, inputs, make_loop):
    terms = Mutual([nets[0], nets[0]], make_loop().task.augmenter)(inputs)
    assert terms["kl0"] == terms["kl1"] == 0


def test_mixed_images_have_both_labels_and_one_mix_for_all(nets, make_loop):
    options = MutualOptions(batch_size=32, augmentation="mixup", mix=MixOptions(group=8))
    like = make_loop(options=options)
    task = Mutual(nets[:2], like.task.augmenter)
    fed = task.prepare(like.loader.next(), 0.0)
    fed = fed._replace(pixels=fed.pixels.double())
    own, partner = (-_log_softmax(nets[0](fed.pixels).detach().numpy())[range(32), y] for y in fed[1:3])
    lam = fed.lam.double().numpy()  # pyright: ignore[reportOptionalMemberAccess]
    np.testing.assert_allclose(task(fed)["ce0"].item(), np.mean(lam * own + (1 - lam) * partner), rtol=1e-6)


@pytest.mark.parametrize("peers", [None, ["resnet8", "small"]])
def test_each_peer_is_made_from_a_seed_of_its_own(tree, peers):
    words = ["--task", "dalikd.trainers.tasks.mutual.MutualOptions", "--model", "small", "--model_args.norm", "false"]
    words += ["--data.root", str(tree), "--data.image_size", "32", "--device", "cpu"]
    options, _ = parse("train", words if peers is None else [*words, "--peers", f"[{','.join(peers)}]"])
    nets = options.build(open_run(options, start("cpu", "fp32"))).nets
    assert list(nets) == ["net0", "net1", "net2"][: 2 if peers is None else 3]
    first, last = (nets[name].state_dict() for name in ("net0", list(nets)[-1]))
    assert ("model.norm.weight" in first, "model.norm.weight" in last) == (False, peers is not None)
    assert not torch.equal(first["model.fc.weight"], last["model.fc.weight"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: MutualOptions(temperature=0.0), "--temperature is 0.0: give a number above 0"),
        (lambda: MutualOptions(peers=[]), r"--peers \[\]: name a further net at least"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_one_net_is_too_few(nets, make_loop):
    with pytest.raises(ValueError, match="cannot learn from each other: give two or more"):
        Mutual(nets[:1], make_loop().task.augmenter)
