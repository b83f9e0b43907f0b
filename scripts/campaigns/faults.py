"""Plant faults in the core, one at a time, and count those that the tests catch.

    python -m scripts.campaigns faults [CHECKOUT] [--tests "tests/test_a.py tests/test_b.py"]

A fault changes one operator, comparison or number in a function of `CORE`, which is found by its
name wherever it stands, so that two checkouts can be compared. The package is changed in a copy of
the checkout. Prints a line a fault; what was not caught is named at the end.
"""

import argparse
import ast
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

CORE = {
    "signed_cam": "ops explain", "joined": "detail ops", "sharpen": "ops cam detail",
    "coefficients": "transfer", "rival_coefficients": "transfer", "margin_cotangent": "targets",
    "centred_cotangent": "targets", "through_norm": "targets", "whitening": "targets",
    "head_cotangent": "targets", "equal_area_share": "metrics", "combine": "encoding",
    "norms": "encoding", "fit_pca": "encoding", "mean_difference": "triplets",
    "rank_of": "metrics", "active": "triplets", "sums": "triplets",
    "pooled_gradcam_plus_plus": "weights", "gradcam_plus_plus": "weights",
    "pixel_auc": "metrics", "energy_share": "metrics", "average_precision": "metrics",
    "box_iou": "metrics", "iou_at": "metrics", "rank_drop": "metrics",
    "removal_masks": "metrics", "curve_area": "metrics", "leaves_top": "metrics",
    "match_evidence": "match", "kinship": "match", "fit_logistic": "match", "fall": "trust",
    "normalize": "ops cam detail methods_laws", "correlation": "trust", "leave_out": "trust",
    "box_mask": "metrics",
    "near_share": "numbers", "label_codes": "build features triplets", "quantize_coarse": "index",
}  # fmt: skip
"""Functions of the core; what the names of the test modules that look at each hold."""
OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Lt: ast.GtE,
    ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.MatMult: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And, ast.NotEq: ast.Eq,
}  # fmt: skip


def changes(function: ast.AST) -> Iterator[str]:
    """Change a function in one place after another; yield what was done, and change it back."""
    body = function.body if isinstance(function, ast.FunctionDef) else []
    for statement in body:
        refuses = any(isinstance(node, ast.Raise) for node in ast.walk(statement))
        for node in ast.walk(statement) if not refuses else ():
            if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
                before = node.op
                node.op = OPERATORS[type(before)]()  # type: ignore[assignment]
                yield f"{type(before).__name__} -> {type(node.op).__name__}, line {node.lineno}"
                node.op = before
            elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
                first = node.ops[0]
                node.ops[0] = OPERATORS[type(first)]()  # type: ignore[call-overload]
                yield f"{type(first).__name__} turned, line {node.lineno}"
                node.ops[0] = first
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
                sign, node.op = node.op, ast.UAdd()
                yield f"a minus sign dropped, line {node.lineno}"
                node.op = sign


def planted(package: Path, name: str) -> tuple[Path, str, str] | None:
    """Return a file, its text with the first fault in a function, and what was done."""
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                for what in changes(node):
                    return file, ast.unparse(tree), f"{file.name}: {name}, {what}"
    return None


def caught(checkout: Path, words: str, chosen: list[str]) -> bool:
    """Return whether the tests of a checkout fail."""
    files = chosen or [
        str(file.relative_to(checkout))
        for word in words.split()
        for file in sorted((checkout / "tests").glob(f"test_*{word}*.py"))
    ]
    command = [sys.executable, "-m", "pytest", "-qx", "-pno:warnings", *dict.fromkeys(files)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": "."}
    done = subprocess.run(command, cwd=checkout, capture_output=True, env=environment)
    return done.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--tests", default="", help="test files to run in place of those named")
    options = parser.parse_args()
    missed, count = [], 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        for part in ("embedcam", "tests", "scripts", "examples", "index", "docs"):
            shutil.copytree(options.checkout / part, copy / part)
        for file in ("pyproject.toml", "README.md"):
            shutil.copy(options.checkout / file, copy / file)
        for name, words in CORE.items():
            fault = planted(copy / "embedcam", name)
            if fault is None:
                print(f"{name}: there is no such function, or nothing in it to change")
                continue
            file, text, what = fault
            whole = file.read_text(encoding="utf-8")
            began = time.perf_counter()
            file.write_text(text, encoding="utf-8")
            noticed = caught(copy, words, options.tests.split())
            file.write_text(whole, encoding="utf-8")
            count += 1
            missed += [] if noticed else [what]
            seconds = time.perf_counter() - began
            print(f"{'caught' if noticed else 'MISSED'}  {what} ({seconds:.0f} s)", flush=True)
    print(f"{count - len(missed)} of {count} faults were caught")
    return 0


if __name__ == "__main__":
    sys.exit(main())
