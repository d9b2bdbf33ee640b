import pytest

from dalikd.pipelines.data import DataConfig
from dalikd.trainers.options import DistillOptions, EvaluateOptions, MeasureOptions, TrainOptions


@pytest.mark.parametrize("options", [TrainOptions, DistillOptions, MeasureOptions, EvaluateOptions])
@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_seeds_are_whole_numbers_from_zero(options, seed):
    options(seed=0)
    options(seed=(1 << 63) - 1)
    with pytest.raises(ValueError, match=f"--seed {seed}: give a whole number from 0 to 2"):
        options(seed=seed)


@pytest.mark.parametrize("name", ["threads", "prefetch"])
def test_the_loader_needs_at_least_one(name):
    with pytest.raises(ValueError, match=f"--data.{name} 0: give at least 1"):
        TrainOptions(data=DataConfig(**{name: 0}))
