"""`make experiment`: what is a teacher's distribution worth to a student of a million parameters?

    python -m examples.experiment            some 45 runs, under two hours on two idle cores
    python -m examples.experiment --quick    the same machinery in minutes; its numbers mean nothing
    python -m examples.experiment --splits   how a token's bytes are best divided between exact entries and draws; a page of its own

Kill it at any moment and start it again: runs that are done are not repeated. Results are files in --results, one a run, and a page
beside them. With --results examples/experiment/results it is the README there.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the Hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a run is one thread, and there are several at once

from builder.console.terminal import quiet_libraries
from examples.experiment.prepare import Place
from examples.experiment.report import BEGIN, END, write_report
from examples.experiment.runs import FULL, QUICK, experiment
from examples.experiment.splits.frontier import FRONTIER, frontier
from examples.experiment.splits.report import write_frontier
from examples.experiment.splits.sizes import write_sizes

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, prepare, run, report."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.experiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small, to see that all works")
    parser.add_argument("--splits", action="store_true", help="the runs of splits/frontier.py")
    parser.add_argument("--work", type=Path, help="directory of datasets (about 1 GB)")
    parser.add_argument("--results", type=Path, help="directory of results (WORK/results)")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--report", action="store_true", help="only render what is there")
    options = parser.parse_args(arguments)
    work = options.work or Path("out/experiment-quick" if options.quick else "out/experiment")
    results = options.results or work / "results"
    name = "splits/README.md" if options.splits else "README.md"
    page = (HERE if results.resolve() == HERE / "results" else work) / name
    if not page.exists():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(f"# Experiment\n\n{BEGIN}\n{END}\n", encoding="utf-8")
    if options.splits:
        place = Place(work=work, num_kept=FULL.num_kept, length=FRONTIER.length)
        if not options.report:
            quiet_libraries()
            frontier(FRONTIER, place, results / "splits", workers=options.workers)
            if not (results / "splits/bytes.json").exists():
                write_sizes(place, results / "splits/bytes.json")
        write_frontier(results / "splits", page)
        print(f"next: read {page}")
        return
    if not options.report:
        quiet_libraries()
        plan = QUICK if options.quick else FULL
        place = Place(work=work, num_kept=plan.num_kept, length=plan.length)
        experiment(plan, place, results, workers=options.workers)
    write_report(results, page)
    print(f"next: read {page}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except BrokenProcessPool:
        sys.exit(
            "error: a run was killed, perhaps for want of memory; the same command resumes, and with --workers 1 it takes less"
        )
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")
