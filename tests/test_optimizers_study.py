"""The formulas of examples/compare_optimizers.py."""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian

from jaxsrn import UnboundedConv

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import compare_optimizers as study


def test_the_dual_norm_of_one_tap_is_the_nuclear_norm():
    momentum = gaussian((1, 1, 3, 4))
    nuclear = np.sum(np.linalg.svd(np.asarray(momentum[0, 0]), compute_uv=False))
    assert float(study.dual_norm(jnp.asarray(momentum), UnboundedConv())) == pytest.approx(nuclear, rel=study.GAP)


def test_the_best_rate_has_the_least_loss_and_nan_loses():
    losses = {name: [np.nan, 3.0, 1.0, 2.0] for name in study.TRIED}
    pilots = {
        f"{name}-at-{rate:g}": [{"points": [{"loss": 0.0}, {"loss": loss}]}]
        for name, rates in study.TRIED.items()
        for rate, loss in zip(rates, losses[name], strict=True)
    }
    assert study.best_rates(pilots) == {name: rates[2] for name, rates in study.TRIED.items()}


def test_shares_are_measured_while_the_rate_is_not_yet_small():
    assert study.steps_of_shares(300) == (50, 150, 250)
    assert study.steps_of_shares(study.PRESETS["fast"]["num_steps"]) == (1, 3, 5)
