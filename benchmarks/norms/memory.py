"""Part `memory`: by how much does a process grow while it computes one norm?"""

from __future__ import annotations

import functools

import jax
import torch
from _processes import in_process
from _report import table
from batch import CLEAR_REFS, forget_peak, megabytes, peak
from tqdm import tqdm

import jaxsrn
from norms.cases import gaussian
from norms.in_jax import jax_call, two_liner
from norms.parts import NORMS, Effort, Part
from norms.peers import DEVICE, torch_two_liner

# PyTorch compiles nothing and has no plan.
MEMORY_METHODS = {"spectral_norm": jaxsrn.spectral_norm, "two-liner (JAX)": two_liner, "two-liner (PyTorch)": None}


def memory_of_run(method: str, n: int, c: int) -> dict[str, float | None]:
    """Bytes by which this process grows at the peak of one run, after compilation, and those that XLA plans."""
    case = gaussian(n, c, 3)
    planned = None
    if MEMORY_METHODS[method] is None:
        call = functools.partial(torch_two_liner, torch.tensor(case.kernel, device=DEVICE), case.op.input_shape)
        # The first call loads PyTorch's libraries, whose memory is not the norm's.
        torch_two_liner(torch.ones((1, 1, 2, 2)), (1, 1))
    else:
        call = jax_call(MEMORY_METHODS[method], case.kernel, case.op)
        planned = call.func.memory_analysis().temp_size_in_bytes
    forget_peak()
    before = peak()
    jax.block_until_ready(call())
    return {"growth": peak() - before, "planned": planned}


def memory(effort: Effort) -> Part:
    """The part: a row is a method, measured in a process of its own; a tenth of the leanest peer is allowed."""
    if not CLEAR_REFS.exists() or jax.default_backend() != "cpu":
        return Part([("Memory", "Not measured: memory of the host, on Linux only.")], [], {})
    n, c = (16, 8) if effort.fast else (224, 64)
    found = {
        m: in_process(NORMS, "--memory", m, str(n), str(c)) for m in tqdm(MEMORY_METHODS, desc="memory", leave=False)
    }
    rows = []
    for name, run in found.items():
        planned = "" if run["planned"] is None else megabytes(run["planned"])
        rows.append([name, megabytes(run["growth"]), planned])
    text = (
        f"One spectral norm at ({n}, {c}, 3), each in a process of its own: growth of the resident memory (VmHWM) at\n"
        "the peak of the run, after compilation and with the kernel in place; beside it what XLA plans for temporaries."
    )
    header = ("method", "growth at the peak", "XLA's temporaries")
    text = f"{text}\n\n{table(header, rows)}"
    if effort.fast:
        return Part([("Memory", text)], [], {})
    least = min(run["growth"] for name, run in found.items() if name != "spectral_norm")
    share = found["spectral_norm"]["growth"] / least
    check = f"memory at ({n}, {c}, 3): {share:.1%} of the leanest two-liner's, under 10%"
    return Part([("Memory", text)], [(share < 0.1, check)], {})
