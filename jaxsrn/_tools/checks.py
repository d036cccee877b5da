"""Checks of the arguments of public functions, and the precision in which they compute."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

__all__ = [
    "Kernel",
    "check_choice",
    "check_transformation",
    "computed_form",
    "computing_in",
    "ensure",
    "ensure_same_on_devices",
    "errors_named",
    "float_dtype",
    "if_injected",
    "int_tuple",
    "is_integer",
    "is_static_number",
    "kernel_array",
    "kernel_shape_of",
    "positive_scalar",
    "real_floating",
    "static_int",
    "static_share",
]

# Users pass any floating array; `kernel_array` checks what a type cannot say.
Kernel = Shaped[Array | np.ndarray, "..."]


def ensure(condition: bool, message: str) -> None:
    """Raises `ValueError(message)` unless the (static) condition holds."""
    if not condition:
        raise ValueError(message)


@contextlib.contextmanager
def errors_named(name: str, advice: str = ""):
    """Puts a name, such as a layer's, before the message of a `ValueError` that is raised inside, and advice after."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}{advice}") from error


def int_tuple(value, length: int | None, name: str) -> tuple[int, ...]:
    """`value` as a tuple of positive ints of the given length; an int stands for all axes."""
    values = (value,) * (length or 1) if np.ndim(value) == 0 else tuple(value)
    counted = {None: "one to three integers", 1: "an integer"}.get(length, f"an integer or {length} integers")
    ensure(
        all(map(is_integer, values))
        and (len(values) == length if length else 1 <= len(values) <= 3)
        and all(v >= 1 for v in values),
        f"{name}: got {value!r}, expected {counted} >= 1{'' if length == 1 else ', one per spatial axis'}.",
    )
    return tuple(int(v) for v in values)


def is_integer(value) -> bool:
    """Whether a value is a static integer; `True` and `False` are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def static_int(value, name: str, minimum: int = 1) -> int:
    """`value` as an int; raises `ValueError` unless it is an integer of at least `minimum`."""
    ensure(
        is_integer(value) and value >= minimum,
        f"{name}: got {value!r}, expected a static integer >= {minimum}{if_injected(value, name)}.",
    )
    return int(value)


def static_share(value, name: str) -> float:
    """`value` as a float; raises `ValueError` unless it is a number in (0, 1] that is known while tracing."""
    is_share = is_static_number(value) and 0 < float(value) <= 1
    ensure(is_share, f"{name}: got {value!r}, expected a static number in (0, 1]{if_injected(value, name)}.")
    return float(value)


def if_injected(value, name: str) -> str:
    """What helps where a static option became an array."""
    is_array = isinstance(value, jax.Array)
    return f"; make it static, with optax.inject_hyperparams name {name!r} in static_args" if is_array else ""


def is_static_number(value) -> bool:
    """Whether a value is one real number that is known while tracing; `True` and `False` are none."""
    if isinstance(value, (np.ndarray, jax.Array)):
        is_real = jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
        return value.ndim == 0 and is_real and not isinstance(value, jax.core.Tracer)
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def kernel_array(kernel, op) -> jax.Array:
    """The kernel as an array; raises `ValueError` unless it is real, floating and of a shape that `op` takes."""
    _check_operator(op)
    ensure(
        hasattr(kernel, "shape") or np.ndim(kernel) > 0 or is_static_number(kernel),
        f"kernel: got {_briefly(kernel)}, expected an array; of a layer of Flax it is layer.kernel[...].",
    )
    ensure(
        not isinstance(kernel, jax.ShapeDtypeStruct),
        "kernel: got a jax.ShapeDtypeStruct, which has no numbers; jax.eval_shape takes it.",
    )
    kernel = jnp.asarray(kernel)
    ensure_same_on_devices(kernel, "kernel")
    _ensure_compiler_shards(kernel)
    # The last two axes are the channels; the map acts on rows of real parts, followed by imaginary ones.
    real_floating(
        kernel.dtype,
        "kernel",
        "take the real map on both parts, jnp.block([[kernel.real, kernel.imag], [-kernel.imag, kernel.real]]), which "
        "has the same norm, every singular value twice, and so twice the stable rank (group by group where there are "
        "groups)",
    )
    op._check_kernel_shape(kernel.shape)
    return kernel


def kernel_shape_of(kernel_shape, op) -> tuple[int, ...]:
    """The shape of a kernel as a tuple; raises `ValueError` unless it is one that `op` takes."""
    _check_operator(op)
    ensure(
        isinstance(kernel_shape, (tuple, list)) and all(map(is_integer, kernel_shape)),
        f"kernel_shape: got {_briefly(kernel_shape)}, expected a tuple of integers; that of an array is kernel.shape.",
    )
    op._check_kernel_shape(kernel_shape)
    return tuple(kernel_shape)


def _check_operator(op) -> None:
    # `Operator` is defined in a module that imports this one, so that a method of it identifies it.
    ensure(
        hasattr(op, "_check_kernel_shape") and not isinstance(op, type),
        f"op: got {_briefly(op)}, expected an operator, such as Dense() or CircularConv((32, 32)).",
    )


def check_choice(value, name: str, choices: tuple[str, ...]) -> None:
    """Raises `ValueError` unless a value is one of the names."""
    ensure(value in choices, f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}.")


def check_transformation(value, name: str) -> None:
    """Raises `ValueError` unless a value is a transformation of optax."""
    ensure(
        callable(getattr(value, "init", None)) and callable(getattr(value, "update", None)),
        f"{name}: got {_briefly(value)}, expected an optax.GradientTransformation such as optax.sgd(0.1).",
    )


def _briefly(value) -> str:
    """A value for an error message: arrays and models by their type, for they fill pages."""
    written = repr(value)
    return written if len(written) <= 80 and "\n" not in written else f"an object of type {type(value).__name__}"


def computed_form(kernel, op) -> tuple[jax.Array, Any]:
    """`kernel_array`, and the operator, in the form in which they are computed: matrices have two axes."""
    kernel = kernel_array(kernel, op)
    return op._flattened(kernel)


def ensure_same_on_devices(tree, name: str) -> None:
    """Raises `ValueError` where an array of a tree differs over the devices of a `jax.shard_map` that checks that.

    There, JAX sums over the devices what goes back to a constant, such as the unknown of an adjoint. Results would be
    sums over all devices.
    """
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    # A version of JAX that calls it otherwise must not stop all functions; the tests see that it is found.
    types = [getattr(jax.typeof(array), "mat", None) for array in arrays]
    axes = frozenset().union(*(getattr(kind, "varying", ()) for kind in types))
    ensure(
        not axes,
        f"{name}: got an array that varies over the mesh axes {sorted(axes)}, expected jax.shard_map(..., "
        "check_vma=False) around functions of jaxsrn.",
    )


def _ensure_compiler_shards(kernel: jax.Array) -> None:
    """Raises `ValueError` where a kernel is sharded over explicit axes, as those of `jax.make_mesh` are by default.

    JAX has rules for such axes for few of the operations that a norm takes.
    """
    sharding = getattr(jax.typeof(kernel), "sharding", None)
    explicit = set(getattr(getattr(sharding, "mesh", None), "explicit_axes", ()))
    sharded = sorted(explicit.intersection(jax.tree.leaves(tuple(getattr(sharding, "spec", ())))))
    ensure(
        not sharded,
        f"kernel: sharded over the explicit mesh axes {sharded}, expected axes that the compiler shards, of "
        "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * n), or jax.sharding.reshard(kernel, jax.P()).",
    )


def real_floating(dtype, name: str, if_complex: str = "take its real part") -> None:
    """Raises `ValueError` where the dtype is not real floating, with this advice where it is complex."""
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    advice = if_complex if is_complex else "cast it with .astype(jnp.float32)"
    ensure(
        jnp.issubdtype(dtype, jnp.floating),
        f"{name}: got dtype {dtype}, expected a real floating-point array; {advice}.",
    )


def float_dtype(*dtypes) -> jnp.dtype:
    """The dtype of the computation: float32, or wider where one of the inputs is."""
    return max(jnp.dtype(jnp.float32), *map(jnp.dtype, dtypes), key=lambda dtype: jnp.finfo(dtype).bits)


def computing_in(dtype):
    """A context in which JAX takes arrays of a dtype as they are: without it float64 becomes float32."""
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()


def positive_scalar(value, name: str, dtype, *, or_zero: bool = False) -> jax.Array:
    """`value` as a scalar of `dtype`; a concrete one must be finite and positive (with `or_zero`: not negative)."""
    ensure(not callable(value), f"{name}: got a function, expected a number; optax.inject_hyperparams takes schedules.")
    kind = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    ensure(
        jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.floating),
        f"{name}: got {_briefly(value)}, expected a real number.",
    )
    ensure(jnp.ndim(value) == 0, f"{name}: got shape {jnp.shape(value)}, expected a scalar; use jax.vmap over several.")
    if not isinstance(value, jax.core.Tracer):
        # NumPy compares it, since a comparison of JAX arrays gives a tracer while anything is traced. The value is
        # rounded to `dtype` first, as the computation will see it.
        number = np.asarray(np.asarray(value).astype(dtype), dtype=float)
        ensure(
            bool(np.isfinite(number) and (number > 0 or (or_zero and number == 0))),
            f"{name}: got {value}, expected a positive finite number{' or 0' if or_zero else ''}.",
        )
    value = jnp.asarray(value)
    ensure_same_on_devices(value, name)
    return value.astype(dtype)
