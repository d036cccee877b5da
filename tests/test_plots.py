"""Pictures: they carry the numbers that NumPy computes, can be read without colours, and leave matplotlib as it is."""

import importlib
import io
import itertools
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from jaxsrn import CircularConv, Dense, UnboundedConv, plots

OP = CircularConv((64,))
IDENTITY = np.array([1.0, 0.0, 0.0])
SPECTRA = {"conv": np.array([1.0, 4.0, 2.0]), "dense": np.array([0.5, 0.25])}
RATIOS = {"plain": np.linspace(0, 10, 101), "constrained": np.linspace(0, 4, 41)}


def layer(name, rank, low=1.0, high=64.0):
    return SimpleNamespace(name=name, spectral_norm=1.0, stable_rank=rank, stable_rank_low=low, stable_rank_high=high)


PLAIN = [layer("conv1", 30.0, 7.0), layer("dense", 6.0, 1.0, 10.0)]
CONSTRAINED = [layer("conv1", 12.0, 7.0), layer("dense", 2.0, 1.0, 10.0)]
TURN = np.stack([np.cos(np.linspace(0, 1, 9)), np.sin(np.linspace(0, 1, 9)), np.zeros(9)], -1)


def gaussian(*shape):
    return np.random.default_rng(0).standard_normal(shape)


# Every picture, with the labels of its axes and the lines of its legend.
PICTURES = {
    "singular_values": (lambda ax=None: plots.singular_values(SPECTRA, ax=ax), "singular value", 2),
    "symbol_norms, curve": (
        lambda ax=None: plots.symbol_norms(gaussian(3, 2, 2), CircularConv((8,)), ax=ax),
        "largest singular value",
        2,
    ),
    "symbol_norms, plane": (
        lambda ax=None: plots.symbol_norms(gaussian(3, 3, 2, 2), UnboundedConv(), resolution=8, ax=ax),
        "axis 0 (radians",
        1,
    ),
    "stable_ranks": (lambda ax=None: plots.stable_ranks({"plain": PLAIN, "held": CONSTRAINED}, ax=ax), "", 3),
    "lipschitz_bounds": (lambda ax=None: plots.lipschitz_bounds({"a": 1.0}, {"a": 30.0}, ax=ax), "", 2),
    "lipschitz_histogram": (lambda ax=None: plots.lipschitz_histogram(RATIOS, ax=ax), "share of the pairs", 2),
    "norms_over_steps": (
        lambda ax=None: plots.norms_over_steps([0, 10], {"a": [1.0, 2.0]}, limit=3.0, ax=ax),
        "spectral norm",
        2,
    ),
    "sphere": (
        lambda ax=None: plots.sphere(OP, 24.0, paths={"a": TURN}, points={"b": IDENTITY}, ax=ax),
        "",
        4,
    ),
}
X_LABELS = {
    "singular_values": "index",
    "symbol_norms, curve": "radians per output sample",
    "symbol_norms, plane": "axis 1 (radians per output sample)",
    "stable_ranks": "stable rank",
    "lipschitz_bounds": "Lipschitz constant",
    "lipschitz_histogram": "Lipschitz constant",
    "norms_over_steps": "training step",
    "sphere": "",
}


@pytest.fixture(autouse=True)
def matplotlib_unchanged(monkeypatch):
    """No picture is shown or known to pyplot, and no setting changes."""

    def refuse(*args, **kwargs):
        raise AssertionError("show was called")

    monkeypatch.setattr(plt, "show", refuse)
    monkeypatch.setattr(Figure, "show", refuse)
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []


def labels(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def line(figure, label):
    (found,) = [line for line in figure.axes[0].lines if line.get_label() == label]
    return found


@pytest.mark.parametrize("name", PICTURES)
def test_labels_and_a_legend_beside_the_axes(name):
    draw, y_label, number = PICTURES[name]
    figure = draw()
    assert isinstance(figure, Figure)
    figure.savefig(io.BytesIO())
    ax = figure.axes[0]
    assert X_LABELS[name] in ax.get_xlabel()
    assert y_label in ax.get_ylabel()
    assert len(labels(figure)) == number
    legend = ax.get_legend().get_window_extent()
    assert not legend.overlaps(ax.get_window_extent())
    assert figure.bbox.contains(*legend.min)
    assert figure.bbox.contains(*legend.max)


@pytest.mark.parametrize("name", PICTURES)
def test_draws_on_given_axes(name):
    figure = Figure(layout="constrained")
    ax = figure.subplots(1, 2)[1]
    assert PICTURES[name][0](ax=ax) is figure
    assert ax.get_legend() is not None
    assert figure.axes[0].get_legend() is None


def test_curves_differ_without_colours():
    curves = {str(i): [1.0, 0.5] for i in range(28)}
    lines = plots.singular_values(curves).axes[0].lines
    assert len({(one.get_linestyle(), one.get_marker()) for one in lines}) == 28
    lightness = [np.dot([0.2126, 0.7152, 0.0722], to_rgb(one.get_color())) for one in lines]
    assert (np.diff(lightness) > 0).all()
    assert lightness[-1] < 0.7


def test_names_are_no_formulas_and_none_is_left_out():
    """Matplotlib leaves out names that begin with `_`, and stops at a formula that it cannot read."""
    names = ["_hidden", r"a$\nothing$", "b_$1_$2"]
    curves = {name: [2.0, 1.0] for name in names}
    records = [SimpleNamespace(name=name, stable_rank=2.0, stable_rank_low=1.0, stable_rank_high=3.0) for name in names]
    for figure in (
        plots.singular_values(curves),
        plots.norms_over_steps([0, 1], curves),
        plots.lipschitz_histogram(curves),
        plots.lipschitz_bounds(dict.fromkeys(names, 1.0), {}),
        plots.stable_ranks(records),
    ):
        figure.savefig(io.BytesIO(), format="png")
    assert len(plots.singular_values(curves).axes[0].get_legend().get_texts()) == 3


def test_singular_values():
    figure = plots.singular_values(SPECTRA)
    np.testing.assert_array_equal(line(figure, "conv").get_xydata(), [[1, 4], [2, 2], [3, 1]])
    np.testing.assert_array_equal(line(figure, "dense").get_xydata(), [[1, 0.5], [2, 0.25]])
    assert figure.axes[0].get_yscale() == "log"
    figure = plots.singular_values(SPECTRA, relative=True)
    np.testing.assert_allclose(line(figure, "conv").get_xydata(), [[1 / 3, 1], [2 / 3, 0.5], [1, 0.25]])


def test_singular_values_of_zero_and_of_rounding_errors():
    figure = plots.singular_values({"low rank": np.array([2.0, 1.0, 1e-9, 0.0]), "zero": np.zeros(3)})
    figure.savefig(io.BytesIO())
    assert figure.axes[0].get_ylim()[0] == 2e-6
    plots.singular_values({"zero": np.zeros(3)}, relative=True).savefig(io.BytesIO())


def symbol_at(kernel, frequency, dilation=1):
    """`S(w)` in float64, tap by tap."""
    taps = itertools.product(*map(range, kernel.shape[:-2]))
    return sum(kernel[tap] * np.exp(-1j * dilation * np.dot(frequency, tap)) for tap in taps)


def norm_at(kernel, frequency, stride=1, groups=1, dilation=1):
    """The norm at a frequency of the output: the input has waves that differ by whole turns a sample of the output."""
    width = kernel.shape[-1] // groups
    blocks = [kernel[..., i * width : (i + 1) * width] for i in range(groups)]
    turns = itertools.product(range(stride), repeat=len(frequency))
    waves = [(np.asarray(frequency) + 2 * np.pi * np.array(turn)) / stride for turn in turns]
    stacked = [np.concatenate([symbol_at(block, wave, dilation) for wave in waves]) for block in blocks]
    return max(np.linalg.norm(block, 2) for block in stacked) / stride ** (len(frequency) / 2)


@pytest.mark.parametrize(
    ("shape", "op", "options"),
    [
        ((3, 2, 3), CircularConv((7,)), {}),
        ((3, 2, 4), UnboundedConv(strides=2, feature_group_count=2), {"stride": 2, "groups": 2}),
    ],
)
def test_symbol_norms_on_a_line(shape, op, options):
    kernel = gaussian(*shape)
    curve = line(plots.symbol_norms(kernel, op, resolution=7), "at each frequency")
    frequencies = 2 * np.pi * np.arange(-3, 4) / 7
    np.testing.assert_allclose(curve.get_xdata(), frequencies)
    expected = [norm_at(kernel, [frequency], **options) for frequency in frequencies]
    np.testing.assert_allclose(curve.get_ydata(), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("shape", "op", "options"),
    [
        ((2, 3, 2, 3), UnboundedConv(kernel_dilation=2), {"dilation": 2}),
        ((3, 3, 2, 2), CircularConv((8, 12), strides=2), {"stride": 2}),
    ],
)
def test_symbol_norms_on_a_plane(shape, op, options):
    kernel = gaussian(*shape)
    figure = plots.symbol_norms(kernel, op, resolution=4)
    grid = (4, 6) if isinstance(op, CircularConv) else (4, 4)
    rows, columns = (2 * np.pi * np.arange(-(n // 2), n - n // 2) / n for n in grid)
    expected = [[norm_at(kernel, [row, column], **options) for column in columns] for row in rows]
    (mesh,) = figure.axes[0].collections
    np.testing.assert_allclose(mesh.get_array().reshape(grid), expected, rtol=1e-10)
    # The first axis of the kernel runs upwards, the second to the right; the mark is on a largest value.
    (mark,) = figure.axes[0].lines
    column, row = mark.get_xydata()[0]
    np.testing.assert_allclose(norm_at(kernel, [row, column], **options), np.max(expected), rtol=1e-10)
    assert f"{np.max(expected):.4g}" in mark.get_label()
    assert figure.axes[1].get_ylabel() == "largest singular value of the symbol"


def test_symbol_norms_refuses_what_has_no_symbol():
    with pytest.raises(ValueError, match="expected a CircularConv or an UnboundedConv"):
        plots.symbol_norms(np.ones((3, 2)), Dense())
    with pytest.raises(ValueError, match="expected one or two"):
        plots.symbol_norms(np.ones((2, 2, 2, 1, 1)), UnboundedConv())
    with pytest.raises(ValueError, match="resolution"):
        plots.symbol_norms(np.ones((3, 1, 1)), UnboundedConv(), resolution=1)


def test_stable_ranks():
    figure = plots.stable_ranks({"plain": SimpleNamespace(layers=PLAIN), "held": CONSTRAINED})
    ax = figure.axes[0]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["conv1", "dense"]
    np.testing.assert_array_equal(line(figure, "plain").get_xydata(), [[30, -0.125], [6, 0.875]])
    np.testing.assert_array_equal(line(figure, "held").get_xydata(), [[12, 0.125], [2, 1.125]])
    (feasible,) = ax.collections
    np.testing.assert_array_equal(feasible.get_segments(), [[[7, 0], [64, 0]], [[1, 1], [10, 1]]])
    # The first layer is on top.
    assert ax.yaxis_inverted()
    np.testing.assert_array_equal(line(plots.stable_ranks(PLAIN), "stable rank").get_xdata(), [30, 6])


def test_stable_ranks_refuses():
    with pytest.raises(ValueError, match="expected at least one"):
        plots.stable_ranks([])
    with pytest.raises(ValueError, match="expected the same"):
        plots.stable_ranks({"plain": PLAIN, "other": PLAIN[:1]})


def test_lipschitz_bounds():
    figure = plots.lipschitz_bounds({"pairs": 2.0, "net": 1.5}, {"net": 12.0})
    lower, upper = figure.axes[0].containers
    assert [bar.get_width() for bar in lower] == [2.0, 1.5]
    assert [bar.get_width() for bar in upper] == [12.0]
    centres = [bar.get_y() + bar.get_height() / 2 for bar in (*lower, *upper)]
    # What has one bound alone has its bar in the middle, and two bars do not touch.
    np.testing.assert_allclose(centres, [0.0, 0.8, 1.2])
    assert lower[0].get_height() < 0.4
    assert lower[0].get_hatch()
    assert labels(figure) == ["lower, empirical", "upper, certified"]
    assert {"2", "1.5", "12"} <= {text.get_text() for text in figure.axes[0].texts}
    for numbers in ({}, {"a": 0.0}, {"a": np.nan}, {"a": np.inf}):
        with pytest.raises(ValueError, match="expected"):
            plots.lipschitz_bounds(numbers, {})


@pytest.mark.parametrize("largest", [1.0, 3.0, 10.0, 50.0, 400.0, 1e6])
def test_labels_of_a_logarithmic_axis_do_not_run_into_each_other(largest):
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = plots.lipschitz_bounds({"a": 1.0}, {"a": largest}, ax=figure.subplots()).axes[0].xaxis
    figure.canvas.draw()
    texts = [text for text in (*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)) if text.get_text()]
    inside = [text for text in texts if 0.5 <= text.get_position()[0] <= 2 * largest]
    assert len(inside) >= 2
    boxes = sorted((text.get_window_extent() for text in inside), key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_lipschitz_histogram():
    figure = plots.lipschitz_histogram({"a": np.array([0.0, 0.1, 0.9, 4.0]), "b": np.array([2.5])}, bins=4)
    first, second = (patch.get_data() for patch in figure.axes[0].patches)
    np.testing.assert_allclose(first.edges, [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(first.edges, second.edges)
    np.testing.assert_allclose(first.values, [0.75, 0, 0, 0.25])
    np.testing.assert_allclose(second.values, [0, 0, 1, 0])
    figure = plots.lipschitz_histogram(RATIOS)
    assert labels(figure) == ["plain: 9.5", "constrained: 3.8"]
    assert figure.axes[0].get_legend().get_title().get_text() == "vertical: 95th percentile"
    assert [one.get_xdata()[0] for one in figure.axes[0].lines] == pytest.approx([9.5, 3.8])
    with pytest.raises(ValueError, match="finite"):
        plots.lipschitz_histogram({"a": np.array([1.0, np.nan])})


def test_norms_over_steps():
    figure = plots.norms_over_steps([0, 5, 10], {"conv": [1.0, 2.0, 3.0]}, limit=2.5)
    np.testing.assert_array_equal(line(figure, "conv").get_xydata(), [[0, 1], [5, 2], [10, 3]])
    assert set(line(figure, "asked for: 2.5").get_ydata()) == {2.5}
    assert labels(plots.norms_over_steps([0], {"conv": [1.0]})) == ["conv"]
    with pytest.raises(ValueError, match="one for each step"):
        plots.norms_over_steps([0, 5], {"conv": [1.0, 2.0, 3.0]})


@pytest.mark.parametrize("curves", [{}, {"a": []}, {"a": np.ones((2, 2))}])
def test_curves_are_checked(curves):
    for draw in (plots.singular_values, plots.lipschitz_histogram, lambda curves: plots.norms_over_steps([], curves)):
        with pytest.raises(ValueError, match="expected"):
            draw(curves)


def rank_of(point):
    magnitudes = np.abs(np.fft.fft(point, 64)) ** 2
    return magnitudes.sum() / magnitudes.max()


def test_names_with_an_underscore_are_in_the_legend_of_the_sphere():
    figure = plots.sphere(OP, 24.0, paths={"_path": TURN}, points={"_point": IDENTITY})
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [name for name in names if name.endswith(("_path", "_point"))] == names[-2:]


def test_sphere():
    view = plots.camera(30.0, 20.0)
    np.testing.assert_allclose(view @ view.T, np.eye(3), atol=1e-12)
    path, point = 2.0 * TURN[:, :, None, None], np.array([0.5, 0.25, 0.25])
    figure = plots.sphere(OP, 24.0, paths={"descent": path}, points={"solution": point}, view=view)
    ax = figure.axes[0]
    # The point of (1/2, 1/4, 1/4), seen from the direction of 30 and 20 degrees.
    az, el = np.radians([30, 20])
    unit = point / np.linalg.norm(point)
    right = unit @ [-np.sin(az), np.cos(az), 0]
    up = unit @ [-np.sin(el) * np.cos(az), -np.sin(el) * np.sin(az), np.cos(el)]
    np.testing.assert_allclose(line(figure, "solution").get_xydata(), [[right, up]], atol=1e-12)
    np.testing.assert_allclose(line(figure, "descent").get_xydata(), [(view @ TURN[-1])[:2]], atol=1e-12)
    # A pixel has the stable rank of its point on the half in front.
    (shades,) = ax.images
    axis = np.linspace(-1, 1, len(shades.get_array()))
    for i, j in itertools.product(range(75, 226, 30), repeat=2):
        x, y = axis[j], axis[i]
        point = np.array([x, y, np.sqrt(1 - x**2 - y**2)]) @ view
        np.testing.assert_allclose(shades.get_array()[i, j], rank_of(point), rtol=1e-5)
    # Along the solid curve the stable rank is the target.
    behind, front = ax.collections
    x, y = front.get_paths()[0].vertices[::20].T
    assert len(x) > 5
    ranks = [rank_of(point) for point in np.stack([x, y, np.sqrt(1 - x**2 - y**2)], -1) @ view]
    # The curve is interpolated between pixels.
    np.testing.assert_allclose(ranks, 24.0, rtol=5e-3)
    assert behind.get_linewidth() < front.get_linewidth()


def test_sphere_hides_what_is_behind():
    figure = plots.sphere(OP, 24.0, paths={"a": np.stack([IDENTITY, -IDENTITY])}, view=plots.camera(0.0, 0.0))
    dotted, solid = (one for one in figure.axes[0].lines if len(one.get_xdata()) == 2)
    assert (dotted.get_linestyle(), solid.get_linestyle()) == (":", "-")
    np.testing.assert_array_equal(np.isnan(dotted.get_xdata()), [True, False])
    np.testing.assert_array_equal(np.isnan(solid.get_xdata()), [False, True])


def test_sphere_refuses():
    for op in (UnboundedConv(), CircularConv((8, 8)), CircularConv((8,), strides=2)):
        with pytest.raises(ValueError, match="expected a CircularConv of one axis"):
            plots.sphere(op, 24.0)
    with pytest.raises(ValueError, match="three taps"):
        plots.sphere(OP, 24.0, points={"a": np.ones(4)})
    with pytest.raises(ValueError, match="direction"):
        plots.sphere(OP, 24.0, points={"a": np.zeros(3)})


def test_without_matplotlib_the_way_to_it_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "jaxsrn.plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="needs matplotlib; install it by pip install matplotlib"):
        importlib.import_module("jaxsrn.plots")
