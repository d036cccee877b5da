"""A few drawn geometries of every kind through every property; `python -m tests.properties` draws many more."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from properties import check_norms, check_projection, check_srnc, check_unbounded, drawn_layers, geometry_of

# A drawn shape compiles its programs; shrinking it would compile many more. What fails is named by the message.
few = settings(
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
NUMBERS = st.integers(0, 2**16)


@pytest.mark.parametrize("kind", ["dense", "circular", "padded"])
def test_norms_and_bounds(kind):
    @settings(few, max_examples=3)
    @given(drawn_layers((kind,)), NUMBERS)
    def drawn(layer, number):
        check_norms(geometry_of(layer), 20, number)

    drawn()


@settings(few, max_examples=2)
@given(drawn_layers(("circular", "padded")), NUMBERS)
def test_without_edges(layer, number):
    check_unbounded(geometry_of(layer), 20, number)


@settings(few, max_examples=2)
@given(drawn_layers(("circular", "padded")), NUMBERS)
def test_normalization(layer, number):
    check_srnc(geometry_of(layer), 2, number)


@settings(few, max_examples=2)
@given(drawn_layers(("circular", "padded")), NUMBERS)
def test_projection(layer, number):
    check_projection(geometry_of(layer), 4, number)
