"""The command line with good and bad files, in a pipe and by itself."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from cases import gaussian

import jaxsrn.__main__ as command_line
from jaxsrn.__main__ import main

ARRAYS = {
    "fc.weight": gaussian((6, 4)).astype(np.float32),
    "conv.weight": gaussian((4, 1, 3)).astype(np.float16),
    "fc.bias": gaussian((6,)),
    "ids": np.arange(4),
}
METADATA = {"format": "pt", "made by": "hand"}


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, metadata=METADATA)
    return path


def norm_and_rank(matrix):
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    return values[0], np.sum(values**2) / values[0] ** 2


def test_report_in_a_pipe_is_plain_lines(weights, tmp_path):
    outputs = [tmp_path / "report.json", tmp_path / "report.csv"]
    command = [sys.executable, "-m", "jaxsrn", "report", weights, "--json", outputs[0], "--csv", outputs[1]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == "weights.safetensors"
    assert [line.split()[0] for line in lines[3:5]] == ["conv.weight", "fc.weight"]
    assert "Skipped 1: a bias, a scale or another vector (fc.bias)." in lines
    norm, rank = norm_and_rank(ARRAYS["fc.weight"])
    layer = json.loads(outputs[0].read_text())["layers"][1]
    assert layer["spectral_norm"] == pytest.approx(norm, rel=1e-5)
    assert layer["stable_rank"] == pytest.approx(rank, rel=1e-5)
    rows = list(csv.DictReader(outputs[1].read_text().splitlines()))
    assert [row["name"] for row in rows] == ["conv.weight", "fc.weight"]


def test_normalize_and_compare(weights, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    only_dense = ["--only", "fc*"]
    assert main(["normalize", str(weights), "--fraction", "0.3", "--norm", "1.5", *only_dense, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "1 of 1 kernels changed" in text
    new = safetensors.numpy.load_file(out)
    assert list(new) == list(safetensors.numpy.load_file(weights))
    with safetensors.safe_open(out, framework="numpy") as file:
        assert file.metadata() == METADATA
    for name in ("conv.weight", "fc.bias", "ids"):
        assert new[name].dtype == ARRAYS[name].dtype
        assert new[name].tobytes() == ARRAYS[name].tobytes()
    norm, rank = norm_and_rank(new["fc.weight"])
    assert norm == pytest.approx(1.5, rel=1e-5)
    assert rank == pytest.approx(0.3 * 4, rel=1e-4)

    assert main(["compare", str(weights), str(out)]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if "weight" in line}
    assert rows["conv.weight"][-1] == "0.00%"
    distance = np.linalg.norm(new["fc.weight"] - ARRAYS["fc.weight"]) / np.linalg.norm(ARRAYS["fc.weight"])
    assert rows["fc.weight"][-1] == f"{100 * distance:.2f}%"
    assert float(rows["fc.weight"][4]) == pytest.approx(1.5 / norm_and_rank(ARRAYS["fc.weight"])[0], rel=1e-3)


def shown_in_a_terminal(*arguments, columns: int) -> str:
    """What a process writes to a terminal of so many columns, without its colours."""
    screen, terminal = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}
    command = [sys.executable, "-m", "jaxsrn", *map(str, arguments)]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    written = b""
    # The end of a terminal is an error on Linux, and nothing to read elsewhere.
    with contextlib.suppress(OSError):
        while chunk := os.read(screen, 65536):
            written += chunk
    os.close(screen)
    assert process.wait() == 0, written
    assert b"\x1b[" in written
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())


def test_a_terminal_has_bars_and_tables_of_its_width(weights, tmp_path):
    out = tmp_path / "out.safetensors"
    wide = shown_in_a_terminal("report", weights, columns=140)
    assert "2/2 layers" in wide
    header = next(line for line in wide.splitlines() if "stable rank" in line)
    assert header.split()[:4] == ["layer", "kernel", "operator", "norm"]
    assert "Left out" not in wide

    narrow = shown_in_a_terminal("report", weights, columns=60)
    assert "operator" in narrow[narrow.index("Left out, as the terminal is narrow: ") :]
    table = narrow[narrow.index("stable rank") : narrow.index("Left out")]
    assert all(len(line) <= 60 for line in table.splitlines())
    assert f"{norm_and_rank(ARRAYS['fc.weight'])[0]:.4f}" in table

    changed = shown_in_a_terminal("normalize", weights, "--fraction", "0.3", "--only", "fc*", "--out", out, columns=100)
    assert "0/1 layers" in changed
    assert "1 of 1 kernels changed" in changed
    compared = shown_in_a_terminal("compare", weights, out, columns=100)
    assert re.search(r"^ *conv\.weight .* 0\.00%", compared, flags=re.MULTILINE)


def test_a_gate_is_normalized_by_its_own_name(tmp_path, capsys):
    path, out = tmp_path / "cell.npz", tmp_path / "out.npz"
    arrays = {f"r.weight_{side}_l0": gaussian((32, 8), seed) for seed, side in enumerate(("ih", "hh"))}
    np.savez(path, **arrays)
    assert main(["normalize", str(path), "--fraction", "0.2", "--only", "r.weight_ih_l0[f]", "--out", str(out)]) == 0
    assert "1 of 1 kernels changed" in capsys.readouterr().out
    with np.load(out) as new:
        for name, old in arrays.items():
            changed = np.flatnonzero(np.any(new[name] != old, axis=1))
            np.testing.assert_array_equal(changed, np.arange(8, 16) if "ih" in name else [])
        # Weights in float64 keep their digits.
        assert np.any(new["r.weight_ih_l0"] != new["r.weight_ih_l0"].astype(np.float32))
        assert norm_and_rank(new["r.weight_ih_l0"][8:16])[1] == pytest.approx(1.6, rel=1e-10)


def test_normalize_reaches_the_lowest_that_taps_allow(weights, tmp_path, capsys):
    """A kernel of four outputs and one input has a stable rank from 1/3 to 1, and a twentieth of 1 is asked for."""
    out = tmp_path / "out.safetensors"
    assert main(["normalize", str(weights), "--fraction", "0.05", "--only", "conv*", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 kernels changed" in printed
    assert "no stable rank of 0.05 of the largest" in printed
    assert "--only leaves kernels out: conv.weight." in printed
    kernel = safetensors.numpy.load_file(out)["conv.weight"].astype(np.float64)[:, 0]
    norms = np.linalg.norm(np.fft.fft(kernel, 4096), axis=0)
    assert np.sum(kernel**2) / norms.max() ** 2 == pytest.approx(1 / 3, rel=2e-3)


def test_a_file_below_its_targets_stays_the_same(weights, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(["normalize", str(weights), "--fraction", "1", "--only", "fc*", "--out", str(out)]) == 0
    assert "0 of 1 kernels changed" in capsys.readouterr().out
    assert out.read_bytes() == weights.read_bytes()


def wrong(tmp_path):
    """`(arguments, exit code, what the message says)`."""
    bad, empty = tmp_path / "bad.npz", tmp_path / "empty.safetensors"
    vectors, kernels = tmp_path / "vectors.npz", tmp_path / "kernels.npz"
    bad.write_bytes(b"no weights")
    safetensors.numpy.save_file({}, empty)
    np.savez(vectors, bias=np.zeros(3))
    np.savez(kernels, kernel=np.ones((3, 3, 2, 2)))
    matrix, folder = tmp_path / "matrix.npz", tmp_path / "folder.npz"
    np.savez(matrix, **{"fc.weight": np.ones((3, 2))})
    folder.mkdir()
    out = ["--out", tmp_path / "out.npz"]
    return [
        (["report", tmp_path / "missing.npz"], 3, "missing.npz: there is no such file"),
        (["report", bad], 4, "bad.npz: cannot be read as an .npz file"),
        (["report", empty], 5, "no kernels found and no arrays"),
        (["report", vectors], 5, "no kernels found among 1 array: a bias"),
        (["report", tmp_path], 4, "a folder without an Orbax checkpoint"),
        (["report", vectors, "--layout", "HIWO"], 2, "invalid choice: 'HIWO'"),
        (["report", vectors, "--groups", "a"], 2, "expected NAME=N"),
        (["report", vectors, "--input-shape", "0"], 2, "input_shape: got"),
        (["normalize", vectors, "--fraction", "0.5", *out], 5, "no kernels found"),
        (["normalize", vectors, "--fraction", "1.5", *out], 2, "fraction: got 1.5"),
        (["normalize", vectors, "--fraction", "0.5", "--out", tmp_path / "out.safetensors"], 2, "ends in .npz"),
        (["report", kernels, "--input-shape", "8"], 2, "expected 2 integers"),
        (["report", kernels, "--json", tmp_path], 4, "it is a folder"),
        (["report", kernels, "--strides", "kernel=2", "--strides", "kernel=3"], 2, "--strides: got 'kernel' twice"),
        (["report", kernels, "--groups", "kernel=1", "--groups", "kernel=1"], 2, "--groups: got 'kernel' twice"),
        (["report", kernels, "--stacked", "layers"], 2, "stacked: got 'layers'"),
        (["report", kernels, "--plot", tmp_path / "plot.xyz"], 2, "a name that ends in .png"),
        (["report", kernels, "--json", tmp_path / "none" / "report.json"], 4, "there is no folder"),
        (["normalize", kernels, "--fraction", "0.5", "--out", tmp_path / "none" / "out.npz"], 4, "there is no folder"),
        (["report", kernels, "--json", kernels], 2, "got a file twice"),
        (["report", kernels, "--json", tmp_path / "a", "--csv", tmp_path / "a"], 2, "got a file twice"),
        (["report", matrix, "--strides", "fc.weight=2"], 2, "strides: got fc.weight, expected names of convolutions"),
        (["normalize", kernels, "--fraction", "0.5", "--out", folder], 4, "it is a folder"),
        (["normalize", kernels, "--fraction", "0.5", "--only", "ker*", "--only", "cnv*", *out], 5, "named cnv*."),
        (["compare", vectors, vectors], 5, "no kernels of the same name"),
    ]


def test_errors_are_one_line_and_an_exit_code(tmp_path, capsys):
    for arguments, code, message in wrong(tmp_path):
        try:
            got = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            got = exit.code
        output, error = capsys.readouterr()
        # Nothing is computed for a file that cannot be written.
        assert (got, output, error.count("\n")) == (code, "", 1), (arguments, output, error)
        assert message in error, (message, error)
    assert not (tmp_path / "out.npz").exists()


def test_nothing_is_computed_for_a_file_without_permission(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["report", str(weights), "--csv", str(tmp_path / "report.csv")]) == 4
    output, error = capsys.readouterr()
    assert output == ""
    assert "as its permissions do not allow that" in error


def test_a_missing_library_is_named(weights, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main(["report", str(weights)]) == 6
    assert "pip install safetensors" in capsys.readouterr().err


def test_groups_and_a_picture(tmp_path, capsys):
    path, picture = tmp_path / "weights.safetensors", tmp_path / "report.png"
    safetensors.numpy.save_file({"conv.weight": gaussian((4, 2, 3)).astype(np.float32)}, path)
    assert main(["report", str(path), "--groups", "conv.weight=2", "--plot", str(picture)]) == 0
    assert "feature_group_count=2" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_reader_that_stops_is_no_error(weights):
    """As `head` does after its last line: before the first line here."""
    command = [sys.executable, "-m", "jaxsrn", "report", str(weights)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("error", "code", "message"), [(KeyboardInterrupt(), 130, ""), (OSError("the disk is full"), 4, "the disk is full")]
)
def test_what_the_system_raises(error, code, message, weights, monkeypatch, capsys):
    def stop(args):
        raise error

    monkeypatch.setattr(command_line, "_report", stop)
    assert main(["report", str(weights)]) == code
    assert capsys.readouterr().err == (f"jaxsrn: {message}\n" if message else "")


def test_names_beyond_the_terminals_letters(tmp_path):
    np.savez(tmp_path / "a.npz", **{"señal.weight": np.ones((3, 3), np.float32)})
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "jaxsrn", "report", str(tmp_path / "a.npz")]
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert b"se\\xf1al.weight" in done.stdout
