import pytest

from roclip.config import TrainConfig
from roclip.training.learning_rate import learning_rate


def test_learning_rate_warms_up_and_falls_to_zero():
    config = TrainConfig(epochs=4, lr=1e-3, warmup_epochs=1)
    rates = [learning_rate(config, progress / 10) for progress in range(1, 41)]
    assert rates[9] == pytest.approx(config.lr)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
