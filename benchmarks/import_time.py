"""How long moecast takes to import beside what it stands on, in turn, each in a new process.

    python benchmarks/import_time.py
    python benchmarks/import_time.py --also uni2ts.model.moirai_moe

Printed are medians of the rounds, of the processor time and of the time that passed.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from typing import List, Tuple

from machine import describe_machine, time_rounds

MODULES = ("gluonts.torch", "moecast.forecasters")


def import_in_new_process(module: str) -> Tuple[float, float]:
    """Seconds of processor time, and seconds until the process ended."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    passed = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return used, passed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--also", nargs="*", default=[], help="further modules")
    arguments = parser.parse_args()
    modules: List[str] = [*MODULES, *arguments.also]
    print(f"{describe_machine()}\n\n| module | processor s | s |\n|---|---|---|")
    runs = {module: lambda module=module: import_in_new_process(module) for module in modules}
    for module, results in time_rounds(runs, arguments.rounds).items():
        used, passed = (statistics.median(values) for values in zip(*results))
        print(f"| {module} | {used:.1f} | {passed:.1f} |")


if __name__ == "__main__":
    main()
