"""Runs the suites of the GPU tests one after the other, each with a time limit; scripts/gpu run calls it.

Prints the cases, a table and a last line `N passed, N failed, N skipped`. Everything that the suites wrote goes to gpu.log,
the cases with their figures to results.json, both in --out.
"""
import argparse
import collections
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import tempfile
import time

import harness

HERE = pathlib.Path(__file__).resolve().parent
BENCH = [sys.executable, str(harness.REPOSITORY / "scripts" / "bench")]

Suite = collections.namedtuple("Suite", "argv seconds default")


def test(name, *arguments):
    return [sys.executable, str(HERE / f"test_{name}.py"), *arguments]


SUITES = {
    "serve": Suite(test("serve"), 260, True),
    "segments": Suite(test("segments", "--rounds", "3000", "--seconds", "60"), 130, True),
    "torch": Suite(test("torch"), 320, True),
    "tms": Suite(test("tms"), 120, True),
    "sglang": Suite(test("sglang"), 120, True),
    "vllm": Suite(test("vllm"), 200, True),
    "engine": Suite(test("engine", "--cycles", "200", "--mib", "256", "--seconds", "60"), 90, True),
    "programs": Suite(test("programs"), 60, True),
    "frameworks": Suite(test("frameworks"), 120, True),
    "fragmentation": Suite(test("fragmentation"), 90, True),
    "alloc": Suite([*BENCH, "alloc"], 150, True),
    # The slow ones.
    "segments-long": Suite(test("segments_long", "--rounds", "10000", "--seconds", "180"), 280, False),
    "engine-long": Suite(test("engine", "--cycles", "1000", "--mib", "512", "--seconds", "280"), 590, False),
    "sleep": Suite([*BENCH, "sleep"], 590, False),
    "disk": Suite([*BENCH, "disk"], 120, False),
    "scale": Suite([*BENCH, "scale"], 590, False),
}


def machine():
    """What the figures depend on."""
    about = {"processors": len(os.sched_getaffinity(0)), "system": platform.platform(), "python": platform.python_version()}
    try:
        about["gpu"] = harness.gpu_name()
        about["gpu_bytes"] = harness.gpu_memory()[1]
    except harness.Skip as reason:
        about["gpu"] = f"none: {reason}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        about["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        about["driver"] = "unknown"
    return about


def run_suite(name, limit, log, out):
    """Runs one suite; its cases, with one more if it did not end as it should."""
    suite = SUITES[name]
    limit = min(limit, suite.seconds)
    with tempfile.NamedTemporaryFile(suffix=".json") as found:
        argv = [*suite.argv, "--json", found.name]
        if suite.argv[:2] == BENCH:
            argv += ["--out", str(out)]
        log.write(f"\n===== {name}: {' '.join(argv)}\n")
        log.flush()
        begin = time.monotonic()
        start = log.tell()
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                                 env={**os.environ, "PYTHONUNBUFFERED": "1"})
        over = []

        def end(*_):
            over.append(True)
            os.killpg(child.pid, signal.SIGKILL)

        signal.signal(signal.SIGALRM, end)
        signal.alarm(max(1, int(limit)))
        for line in child.stdout:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()
        code = child.wait()
        signal.alarm(0)
        found.seek(0)
        cases = [json.loads(line) for line in found.read().decode().splitlines()]
    seconds = time.monotonic() - begin
    for entry in cases:
        entry["suite"] = name
    if over:
        cases.append(ended_badly(name, seconds, f"not over after {limit:.0f} s"))
    elif code not in (0, 77) and not any(entry["result"] == "failed" for entry in cases):
        cases.append(ended_badly(name, seconds, f"ended with {code}"))
    if any(entry["result"] == "failed" for entry in cases):
        show_log(log.name, start)
    return cases, seconds


def ended_badly(name, seconds, message):
    print(f"failed  {name}: {message}")
    return {"suite": name, "case": name, "result": "failed", "seconds": round(seconds, 2), "message": message, "figures": {}}


def show_log(path, start):
    with open(path) as file:
        file.seek(start)
        lines = file.read().splitlines()
    print("\n".join("    | " + line[:200] for line in lines[-60:]), flush=True)


def count(cases):
    counts = collections.Counter(entry["result"] for entry in cases)
    return counts["passed"], counts["failed"], counts["skipped"]


def print_table(results, times):
    print(f"\n{'suite':16}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for name, cases in results.items():
        passed, failed, skipped = count(cases)
        print(f"{name:16}{passed:>8}{failed:>8}{skipped:>9}{times[name]:>9.0f}")
    for cases in results.values():
        for entry in cases:
            if entry["result"] != "passed":
                first = (entry["message"].splitlines() or [""])[0][:160]
                print(f"{entry['result']:8}{entry['suite']}: {entry['case']}: {first}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="all but the slow ones if none is named")
    parser.add_argument("--list", action="store_true", help="print the suites")
    parser.add_argument("--out", type=pathlib.Path, default=harness.REPOSITORY / "out" / "results")
    parser.add_argument("--seconds", type=float, default=1200, help="time limit of all together (1200)")
    arguments = parser.parse_args()
    if arguments.list:
        for name, suite in SUITES.items():
            print(f"{name:16}{'' if suite.default else '(only if named) '}at most {suite.seconds} s")
        return 0
    unknown = [name for name in arguments.suites if name not in SUITES]
    if unknown:
        parser.error(f"no suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = machine()
    print(f"{about['gpu']}, driver {about['driver']}, {about['processors']} processors", flush=True)
    end = time.monotonic() + arguments.seconds
    results, times = {}, {}
    with open(arguments.out / "gpu.log", "w") as log:
        for name in arguments.suites or [name for name, suite in SUITES.items() if suite.default]:
            left = end - time.monotonic()
            print(f"\n== {name}", flush=True)
            if left < 5:
                results[name], times[name] = [ended_badly(name, 0, "no time was left; --seconds")], 0
                continue
            results[name], times[name] = run_suite(name, left, log, arguments.out)
            with open(arguments.out / "results.json", "w") as file:
                json.dump({"machine": about, "cases": sum(results.values(), [])}, file, indent=1)
    print_table(results, times)
    passed, failed, skipped = count(sum(results.values(), []))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
