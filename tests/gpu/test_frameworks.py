"""Programs of other kinds, unmodified, under a rule for the whole process: same results, and they sleep from outside."""
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import harness
from harness import (
    MIB, PROGRAMS, Program, Skip, case, check, check_equal, dormouse, environment, figure, gib, gpu_count, gpu_free, status,
    tag_sum,
)

REGIONS = "all: process"


def result_without(argv, **variables):
    with Program(argv, environment(preload=False, **variables), "the program alone") as program:
        program.expect("ready", 180)
        return program.ask("compute", "result")


def check_program(argv, all_tagged=True, gpus=1, **variables):
    """The same result without the library, under it, and after sleeps in between. `all_tagged`: what the program holds
    (on the first `gpus` GPUs) gets the process's tag and is free while it sleeps."""
    expected = result_without(argv, **variables)
    name = " ".join(pathlib.Path(str(part)).name for part in argv[-3:])
    with Program(argv, environment(REGIONS, **variables), name) as program:
        held = int(program.expect("ready", 180))
        check_equal(program.ask("compute", "result"), expected, "result under the library")
        tagged = tag_sum(status(program.pid), "all", "allocated")
        check(tagged >= held or not all_tagged, f"the program holds {gib(held)}, {gib(tagged)} of it tagged")
        held = min(held, tagged)
        for round_ in range(2):
            before = gpu_free(gpus)
            dormouse("sleep", program.pid)
            rose = gpu_free(gpus) - before
            check(rose >= held - 64 * MIB, f"free memory rose by {gib(rose)}, the program holds {gib(held)}")
            dormouse("wake", program.pid)
            check_equal(program.ask("compute", "result"), expected, f"result after sleep {round_ + 1}")
        figure("bytes_tagged", tagged)
        check_equal(program.finish(), 0, "exit status")


def check_jax(**variables):
    harness.needs_gpu()
    harness.needs_module("jax")
    check_program([sys.executable, PROGRAMS / "jax_matrix.py", "4096"], XLA_FLAGS="--xla_gpu_deterministic_ops=true",
                  **variables)


@case
def jax_keeps_its_results():
    check_jax(XLA_PYTHON_CLIENT_MEM_FRACTION="0.05")


@case
def jax_keeps_its_results_with_a_pool_that_grows():
    check_jax(XLA_PYTHON_CLIENT_PREALLOCATE="false")


@case
def jax_keeps_its_results_without_a_pool():
    check_jax(XLA_PYTHON_CLIENT_ALLOCATOR="platform")


@case
def jax_keeps_its_results_when_what_it_maps_is_left_alone():
    check_jax(all_tagged=False, DORMOUSE_MAPPED_MEMORY="off", XLA_PYTHON_CLIENT_MEM_FRACTION="0.05")


@case
def cupy_keeps_its_results():
    harness.needs_gpu()
    harness.needs_module("cupy")
    check_program([sys.executable, PROGRAMS / "cupy_matrix.py", "4096"])


@case
def pytorch_keeps_its_results_with_everything_tagged():
    harness.needs_torch()
    check_program([sys.executable, PROGRAMS / "torch_matrix.py", "4096"],
                  PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")


@case
def pytorch_keeps_its_results_on_all_gpus():
    harness.needs_torch()
    gpus = gpu_count()
    if gpus < 2:
        raise Skip("there is one GPU only")
    check_program([sys.executable, PROGRAMS / "torch_matrix.py", "4096", str(gpus)], gpus=gpus)


@case
def copies_between_gpus_without_peer_access_arrive():
    if gpu_count() < 2:
        raise Skip("there is one GPU only")
    check_program([sys.executable, PROGRAMS / "peer_copies.py", "64"], gpus=2)


def nvcc():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        raise Skip("there is no nvcc")
    return found


@case
def a_program_of_nvcc_with_the_runtime_linked_in_keeps_its_results():
    harness.needs_gpu()
    compiler = nvcc()
    with tempfile.TemporaryDirectory() as folder:
        binary = os.path.join(folder, "stencil")
        built = subprocess.run([compiler, "-O2", "-arch=native", "-o", binary, str(PROGRAMS / "stencil.cu")],
                               capture_output=True, text=True, check=False)
        check(built.returncode == 0, f"nvcc failed: {built.stderr}")
        check_program([binary, "1024"])


if __name__ == "__main__":
    sys.exit(harness.main("frameworks"))
