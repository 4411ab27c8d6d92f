"""Record golden loss curves again and print how they differ from the old ones.

python tests/functional_tests/record_goldens.py [CASE ...] [--dry-run]
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import golden  # noqa: E402


def describe(old: golden.Curves, new: golden.Curves) -> str:
    """The largest relative difference of each metric, and where it is."""
    parts = []
    for name, curve in new.items():
        common = [step for step in curve if step in old.get(name, {})]
        if not common:
            parts.append(f"{name}: new")
            continue
        worst = max(common, key=lambda step: golden.difference(curve[step], old[name][step]))
        change = golden.difference(curve[worst], old[name][worst])
        parts.append(f"{name}: {change:.1e} at step {worst}" if change else f"{name}: identical")
    return ", ".join(parts)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", help="names of test cases (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="compare only, write nothing")
    args = parser.parse_args()
    unknown = set(args.cases) - set(golden.case_names())
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}. See tests/functional_tests.")
    for name in args.cases or golden.case_names():
        case = golden.load_case(name)
        with tempfile.TemporaryDirectory() as folder:
            curves = golden.run_case(case, Path(folder))
        old = golden.read_golden(case.golden_file) if case.golden_file.exists() else {}
        print(f"{name}: {describe(old, curves)}", flush=True)
        if not args.dry_run:
            case.golden_file.write_text(
                json.dumps(golden.as_golden(curves, case.env_vars), indent=2) + "\n"
            )


if __name__ == "__main__":
    main()
