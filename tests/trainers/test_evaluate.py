from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from dalikd.pipelines.draw_spec import DrawSpec, View
from dalikd.pipelines.loader import Loader
from dalikd.pipelines.sampler import Sampler
from dalikd.trainers import evaluate as evaluate_module
from dalikd.trainers.evaluate import evaluate, replaced_files


def _loader(source, batch_size):
    sampler = Sampler(len(source), batch_size, shuffle=False, drop_last=False)
    return Loader(source, sampler, DrawSpec(View(source.image_size, "center_crop", resize=source.image_size)))


@pytest.mark.parametrize("classes", [3, 8])
@pytest.mark.parametrize("batch_size", [101, 40, 7])
def test_equals_a_plain_loop(make_net, make_source, accelerator, classes, batch_size):
    source, model = make_source(101, classes), make_net(num_classes=classes)
    images, labels = torch.from_numpy(source.arrays).permute(0, 3, 1, 2), torch.from_numpy(source.labels)
    with torch.no_grad():
        logits = torch.cat([model.eval()(images[row : row + 1]) for row in range(101)])
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)  # how many classes are liked better

    found = evaluate({"net": model}, _loader(source, batch_size), accelerator)["net"]
    assert set(found) == {"loss", "top1", "top5", "images", "replaced"}
    assert (found["images"], found["replaced"]) == (101, 0)
    assert found["loss"] == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["top1"] == (ranks == 0).sum().item() / 101
    assert found["top5"] == (ranks < 5).sum().item() / 101


@pytest.mark.parametrize("training", [False, True])
def test_the_net_is_left_as_it_was(make_net, make_source, accelerator, training):
    model = make_net(dropout=0.5).train(training)
    model.model.norm.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    loader = _loader(make_source(20), 8)
    first, second = (evaluate({"net": model}, loader, accelerator)["net"] for _ in range(2))
    assert first == second  # no dropout, and a loader can be used again
    modes = {module.training for module in model.modules() if module is not model.model.norm}
    assert (modes, model.model.norm.training) == ({training}, False)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_several_nets_and_figures_of_ones_own(make_net, make_source, accelerator):
    loader, nets = _loader(make_source(20), 8), {"one": make_net(0), "other": make_net(1)}

    def count(net, batch):
        ones = torch.ones(len(batch), dtype=torch.float64)
        return {"images": ones.sum(), "labels": batch.labels.sum().double(), "logits": net(batch.pixels).sum().double()}

    found = evaluate(nets, loader, accelerator, count)
    assert found["one"]["labels"] == found["other"]["labels"] == loader.source.labels.mean()
    assert found["one"]["logits"] != found["other"]["logits"]
    assert list(found["one"]) == ["labels", "logits", "images", "replaced"]
    alone = evaluate({"other": nets["other"]}, loader, accelerator)
    assert evaluate(nets, loader, accelerator)["other"] == alone["other"]


def test_what_other_processes_have_replaced_is_known_to_all(make_source, monkeypatch):
    loader = _loader(make_source(6), 3)
    loader.replace([2])
    asked: list[list[int]] = []
    monkeypatch.setattr(evaluate_module, "gather_object", lambda rows: asked.append(rows) or [*rows, 3, 5])
    accelerator: Any = SimpleNamespace(num_processes=2)
    found = replaced_files((loader,), accelerator)
    assert asked == [[], [2]]  # files that were damaged, and rows that were replaced
    assert list(map(loader.replaced.get, (2, 3, 5))) == [4, 4, 0]
    assert found == {loader.source.path(row): loader.source.path(other) for row, other in ((2, 4), (3, 4), (5, 0))}
    assert loader.state_dict()["replaced"] == loader.replaced
