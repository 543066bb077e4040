"""A thousand cycles of sleep and wake on the engine alone, every byte compared with a copy that the host keeps."""
import subprocess
import sys
import tempfile

import harness
from harness import Skip, built, case, check, check_equal, environment, figure, last_json


def run(*arguments):
    argv = [str(built("engine_cycles")), *arguments]
    result = subprocess.run(argv, env=environment(preload=False), capture_output=True, text=True, check=False)
    if result.returncode == 77:
        raise Skip(result.stderr.strip())
    check(result.stdout.startswith("{"), f"engine_cycles ended with {result.returncode}: {result.stderr}")
    seen = last_json(result.stdout)
    for name, value in seen.items():
        figure(name, value)
    check_equal(seen["differing"], 0, "blocks that differ")
    check_equal(seen["cycles"], seen["asked"], "cycles within the time limit")
    check_equal(result.returncode, 0, "exit status")


def limits():
    settings = harness.settings
    return ["--mib", str(settings["mib"]), "--seconds", str(settings["seconds"])]


@case
def nothing_differs_after_many_cycles_with_random_writes():
    run("--cycles", str(harness.settings["cycles"]), *limits())


@case
def nothing_differs_with_a_tag_on_disk():
    with tempfile.TemporaryDirectory(prefix="dormouse-disk-") as folder:
        run("--cycles", str(max(1, harness.settings["cycles"] // 20)), "--disk", folder, "--seed", "2", *limits())


if __name__ == "__main__":
    sys.exit(harness.main("engine", cycles=1000, mib=512, seconds=200.0))
