import pytest
import torch

from dalikd.trainers.average import MovingAverage


def _train_a_little(net, step):
    torch.manual_seed(step)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
        net.train()(torch.randint(0, 256, (4, 3, 12, 12)).double())


def test_average_follows_its_formula(make_net):
    net = make_net().double()
    average, expected = MovingAverage(net, 0.9), {}
    for step in range(5):
        _train_a_little(net, step)
        average.update(net)
        for key, value in net.state_dict().items():
            first = step == 0 or not value.is_floating_point()
            expected[key] = value.clone() if first else 0.9 * expected[key] + 0.1 * value
    found = average.module.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-13, atol=1e-13)
    assert found["model.norm.num_batches_tracked"] == 5


def test_average_is_frozen_and_apart_from_the_net(make_net):
    net = make_net()
    average = MovingAverage(net, 0.5)
    assert not any(parameter.requires_grad for parameter in average.module.parameters())
    assert not any(module.training for module in average.module.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    average.update(net)
    kept = average.module.model.fc.weight.clone()
    _train_a_little(net, 0)
    assert torch.equal(average.module.model.fc.weight, kept)


@pytest.mark.parametrize("saved_after", [0, 1, 3])
def test_average_resumes_exactly(make_net, saved_after):
    def run(stop_at):
        net, steps = make_net(), 5
        average = MovingAverage(net, 0.9)
        for step in range(steps):
            if step == stop_at:
                state = average.state_dict()
                average = MovingAverage(make_net(7), 0.9)
                average.load_state_dict(state)
            _train_a_little(net.double(), step)
            net.float()
            average.update(net)
        return average.module.state_dict()

    whole, resumed = run(None), run(saved_after)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_update_does_not_wait_for_the_device(make_net, no_sync):
    net = make_net()
    average = MovingAverage(net, 0.9)
    with no_sync():
        average.update(net)
        average.update(net)
