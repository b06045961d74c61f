"""The runner of the kernels' bench: its checks at small shapes, and what it does when something fails."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vidtta.bench import kernels as bench
from vidtta.bench.kernel_cases import REAL, SMALL, Case, all_cases
from vidtta.bench.timing import Ceilings

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="small shapes are for the interpreter")


@on_cpu
def test_every_operation_passes_at_small_shapes():
    rows = bench.check_all()
    assert not [row for row in rows if "error" in row]
    assert {row["op"] for row in rows} >= {case.op for case in all_cases(REAL)} - {"upsample_pad frames"}


def rows_of(case: Case) -> list[dict[str, Any]]:
    return list(bench.run_case(case, torch.device("cpu"), torch.float16, None, None, False))


def case_of(op: str) -> Case:
    return next(case for case in all_cases(SMALL) if case.op == op)


@on_cpu
def test_a_wrong_kernel_gets_an_error_and_no_time():
    case = case_of("norm_modulate")
    impls = {
        "wrong": lambda *t: case.reference(*t) * 1.1,
        "unwritten": lambda *t: torch.empty_like(t[0]) + 0 * case.reference(*t),
        "narrow": lambda *t: case.reference(*t)[..., 1:],
        "raises": lambda *t: 1 // 0,
        **case.impls,
    }
    rows = {row["impl"]: row for row in rows_of(dataclasses.replace(case, impls=impls))}
    assert "allowed" in rows["wrong"]["error"] and "inf" in rows["unwritten"]["error"]
    assert "should be" in rows["narrow"]["error"] and "ZeroDivisionError" in rows["raises"]["error"]
    assert "error" not in rows["triton"] and "error" not in rows["eager"]


@on_cpu
def test_a_result_without_columns_is_no_error():
    """As a norm's projection of rank 0 is; in bench's operations that the interpreter leaves out."""
    case = case_of("norm_modulate")

    def with_nothing(function):
        return lambda *t: (function(*t), t[0].detach()[..., :0])

    impls = {
        "triton": with_nothing(case.impls["triton"]),
        "more": lambda *t: (case.reference(*t), t[0].detach()[..., :1]),
    }
    found = dataclasses.replace(case, reference=with_nothing(case.reference), impls=impls, trained=())
    rows = {row["impl"]: row for row in rows_of(found)}
    assert "error" not in rows["eager"] | rows["triton"], (rows["eager"], rows["triton"])
    assert "should be" in rows["more"]["error"]


@on_cpu
def test_a_wrong_gradient_is_found():
    case = case_of("norm_modulate")
    rows = rows_of(
        dataclasses.replace(case, impls={"wrong": lambda x, *t: case.reference(x * 1.0, *t) + (x - x.detach())})
    )
    assert "error" in rows[-1]


def test_shares_are_of_the_ceilings():
    assert Ceilings(2e12, 4e14).shares(1.0, 10**9, 10**11) == pytest.approx((0.5, 0.25))


def test_after_a_lost_context_the_other_cases_still_run(tmp_path: Path):
    """A stand-in for the other process: `first` takes the context down, `second` kills the process, the rest work."""
    program = tmp_path / "program.py"
    program.write_text(
        "import json, sys\n"
        "path = sys.argv[sys.argv.index('--child') + 1]\n"
        "done = sys.argv[sys.argv.index('--done') + 1:] if '--done' in sys.argv else []\n"
        "def write(record):\n"
        "    with open(path, 'a') as file: file.write(json.dumps(record) + '\\n')\n"
        "write({'environment': {'n': len(done)}, 'ceilings': {}})\n"
        "for key in ('first', 'second', 'third'):\n"
        "    if key in done: continue\n"
        "    write({'started': key})\n"
        "    if key == 'second': sys.exit(9)\n"
        "    row = {'op': key, 'shape': '', 'impl': 'triton'}\n"
        "    if key == 'first': row['error'] = 'illegal address'\n"
        "    write({'row': row})\n"
        "    if key == 'first': sys.exit(3)\n"
        "write({'skipped': 'fourth'})\n"
    )
    arguments = argparse.Namespace(seconds=100, vary=False, commit=None, only=None)
    result = bench.run_all(arguments, [sys.executable, str(program)])
    assert [(row["op"], row.get("error")) for row in result["rows"]] == [
        ("first", "illegal address"),
        ("second", "the process ended with status 9"),
        ("third", None),
    ]
    assert result["skipped"] == ["fourth"] and len(result["ceilings"]) == 3


def test_every_case_is_named_once_and_declares_its_work():
    cases = all_cases(REAL)
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        assert case.forward[0] > 0 and (not case.trained or case.backward[0] > 0), case.key
