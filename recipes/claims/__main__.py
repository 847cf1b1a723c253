"""``python -m recipes.claims run | list | sheet | table | check``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from metis_lib.errors import MetisError
from metis_lib.evaluation import record, report
from recipes.claims import queue, table
from recipes.claims.arms import SCALES, Lab
from recipes.claims.claims import all_claims


def main() -> int:
    """Run a command; MetisErrors end it with their message."""
    parser = argparse.ArgumentParser(prog="python -m recipes.claims", description=__doc__)
    parser.add_argument("command", choices=("run", "list", "sheet", "table", "check"))
    parser.add_argument("--scale", default="ablate", choices=tuple(SCALES))
    parser.add_argument("--only", default="", help="what begins so, or what the notebook of that number needs")
    parser.add_argument("--budget", help="such as 100m; the arm at hand keeps a state")
    for name in ("system", "manifest", "home"):
        parser.add_argument(f"--{name}", type=Path)
    for name in ("tokens", "longer", "pretraining", "frames", "held_out", "items"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--testset")
    parser.add_argument("--workers", type=int, default=1, help="arms side by side, each a process")
    parser.add_argument("--out", type=Path, default=table.FOLDER, help="of the table")
    given: dict[str, Any] = vars(parser.parse_args())
    command, only, budget, workers, out = (given.pop(key) for key in ("command", "only", "budget", "workers", "out"))
    given["seeds"] = tuple(given["seeds"]) if given["seeds"] else None
    try:
        scale = given.pop("scale")
        lab, usual = Lab.of(scale, **given), Lab.of(scale)
        if given["home"] is None and lab != usual:  # names are the same, and would take the place of the usual ones
            others = {key: str(value) for key, value in vars(lab).items() if value != getattr(usual, key)}
            lab = replace(lab, home=usual.home.with_name(f"{usual.home.name}-{record.sha256_of(others)[:8]}"))
            print(f"other settings than usual: kept in {lab.home} (--home names another folder)", file=sys.stderr)
        if command == "run":
            left = queue.run(lab, budget=budget, only=only, workers=workers, say=lambda line: print(line, flush=True))
            print(f"left: {len(left)}" if left else "everything is measured")
        elif command == "table":
            rows = table.export_part(lab, out, only) if only else table.export(lab, out)
            whole = {row["id"] for row in rows} >= {claim.id for claim in all_claims(lab)}
            if whole and out.resolve() == table.FOLDER.resolve():
                report.fill_readme(record.ROOT / "docs" / "claims.md", table.markdown(rows))
            print("\n".join(f"{row['verdict']:9} {row['effect']:+.4f} {row['ci95']} {row['claim']}" for row in rows))
        elif command == "check":
            table.check(record.read_json(out / "claims.json") or [], lab)
            print("the table is whole")
        else:
            print(queue.sheet(lab, only, (lambda work: queue.done(lab, work)) if command == "list" else None))
    except MetisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
