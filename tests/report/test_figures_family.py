"""The figures of a family of models."""

from __future__ import annotations

import pytest

from flextron_mcore.report.collect import collect
from flextron_mcore.report.figures_family import losses
from tests.report import synthetic


def pictures(run, **options) -> list:
    synthetic.write(run / "family", synthetic.family(**options))
    return losses(collect(run).families[0])


def test_loss_against_parameters_and_latency(tmp_path):
    parameters, latency = pictures(tmp_path)
    assert (parameters.name, latency.name) == ("family_loss_parameters", "family_loss_latency")
    assert "against latency (ms), by budget: 0.6: 3.400 at 12, 0.7: 3.300 at 14" in latency.alt
    assert "parameters (millions)" in parameters.alt


@pytest.mark.parametrize(("options", "names"), [({"latency": False}, ["family_loss_parameters"]), ({"losses": False}, [])])
def test_what_is_not_known_is_not_drawn(tmp_path, options, names):
    assert [picture.name for picture in pictures(tmp_path, **options)] == names


def test_a_diverged_network_is_left_out(tmp_path):
    metrics = synthetic.family()
    metrics["networks"][0]["loss"] = float("nan")
    synthetic.write(tmp_path / "family", metrics)
    assert "0.9" not in losses(collect(tmp_path).families[0])[1].alt
