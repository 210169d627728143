"""The model of time beside published figures."""

from __future__ import annotations

import pytest

from megatron_flowrl.planning.published import FIGURES, Figure


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_published_figures_are_reproduced_within_a_quarter(figure: Figure) -> None:
    assert abs(figure.error) < 0.25, f"{figure.predict():.1f} {figure.unit}, published {figure.published}"
    assert figure.source and figure.inputs


def test_some_are_predictions() -> None:
    assert sum(figure.fitted is None for figure in FIGURES) >= 4
