import math

import pytest

from dalikd.trainers.loop import learning_rate_factor
from dalikd.trainers.options import ScheduleConfig

STEPS = 10  # an epoch


def _factors(config: ScheduleConfig, epochs: int) -> list[float]:
    return [learning_rate_factor(config, step, STEPS, epochs * STEPS) for step in range(epochs * STEPS)]


def test_multistep_decays_at_the_first_step_of_each_milestone():
    factors = _factors(ScheduleConfig(milestones=[2, 3.5], gamma=0.1), 5)
    assert factors[:20] == [1.0] * 20
    assert factors[20:35] == pytest.approx([0.1] * 15)
    assert factors[35:] == pytest.approx([0.01] * 15)


def test_multistep_without_milestones_is_constant():
    assert set(_factors(ScheduleConfig(milestones=[]), 2)) == {1.0}


def test_cosine_goes_from_one_to_final():
    factors = _factors(ScheduleConfig("cosine", final=0.2), 4)
    assert factors[0] == 1.0
    assert factors[20] == pytest.approx(0.6)  # half way
    assert factors[10] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert factors == sorted(factors, reverse=True)
    assert learning_rate_factor(ScheduleConfig("cosine", final=0.2), 40, STEPS, 40) == pytest.approx(0.2)


def test_constant_stays():
    assert set(_factors(ScheduleConfig("constant"), 3)) == {1.0}


@pytest.mark.parametrize("name", ["multistep", "cosine", "constant"])
def test_warmup_rises_linearly_and_reaches_the_base_rate(name):
    factors = _factors(ScheduleConfig(name, milestones=[3], warmup_epochs=0.5), 4)
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0


def test_cosine_starts_after_the_warmup():
    factors = _factors(ScheduleConfig("cosine", warmup_epochs=1), 3)
    assert factors[10] == 1.0
    assert factors[20] == pytest.approx(0.5)  # half of what is left
