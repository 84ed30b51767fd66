"""Notices are warnings, and never more than that."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from grsd_callbacks import MeasurementWarning, ShellMonitor
from grsd_callbacks.notice import notice


def test_a_notice_is_a_warning_of_its_caller():
    def function():
        notice("look", RuntimeWarning)

    with pytest.warns(RuntimeWarning, match="look") as caught:
        function()
    assert caught[0].filename == __file__
    assert Path(__file__).read_text().splitlines()[caught[0].lineno - 1].strip() == "function()"


def test_where_warnings_are_errors_it_is_logged(caplog, numerical_notices):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notice("look", RuntimeWarning)
        notice("there", MeasurementWarning)
    assert [(r.name, r.getMessage()) for r in caplog.records] == [
        ("grsd_callbacks", "look"),
        ("grsd_callbacks", "there"),
    ]
    assert numerical_notices == ["look"]
    numerical_notices.clear()


def test_a_measurement_that_gives_a_notice_is_no_failed_one(numerical_notices):
    """Gradients scaled by frequency are nothing that the structured kernel knows."""
    model = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(8, 3))
    probe = torch.tensor([[0, 1], [2, 3], [4, 1], [1, 3]]), torch.ones(4, 3)
    monitor = ShellMonitor(model, "mse", probe, method="exact", on_error="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor.step(0, lr=0.1) is not None
    assert any("the structured kernel is not complete" in message for message in numerical_notices)
    numerical_notices.clear()
