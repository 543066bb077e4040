"""What the GPU tests share: cases and their results, programs under the library, the dormouse command, the GPU's memory.

For test_*.py in this folder and for scripts/demo. Needs nothing but Python; imports no CUDA itself, so that what a case
measures from outside is not its own memory. A test file is a program: it runs its cases (all, or those named as
arguments), prints a line for each, and appends them to the file of --json. It exits with 0, 1 (a case failed) or 77 (all
were skipped).
"""
import argparse
import contextlib
import ctypes
import json
import os
import pathlib
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback

HERE = pathlib.Path(__file__).resolve().parent
PROGRAMS = HERE / "programs"
REPOSITORY = HERE.parent.parent
# What scripts/gpu pack made, unless the caller says where the binaries are.
BUILD = pathlib.Path(os.environ.get("GPU_BUILD", REPOSITORY / "out" / "gpu")).resolve()

MIB = 1 << 20
GIB = 1 << 30


class Skip(Exception):
    """The case cannot run here; the text says why."""


def check(condition, message):
    """An assertion that -O does not remove and whose message says what was expected."""
    if not condition:
        raise AssertionError(message)


def check_equal(actual, expected, what):
    check(actual == expected, f"{what}: expected {expected!r}, got {actual!r}")


def gib(count):
    return f"{count / GIB:.2f} GiB"


# --- Binaries.


def built(name):
    path = BUILD / name
    if not path.exists():
        raise Skip(f"{path} is missing: scripts/gpu pack makes it")
    return path


def library():
    return built("libdormouse.so")


def wait_until(condition, what, timeout=10.0):
    """Polls until `condition()` is true; the last value is returned."""
    end = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout:.0f} s: {what}")
        time.sleep(0.05)


# --- The GPU, seen from outside the programs.


class _NvmlMemory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


_nvml = None


def _nvml_device(index=0):
    global _nvml
    if _nvml is None:
        try:
            _nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            raise Skip("no GPU: libnvidia-ml.so.1 is not here") from None
        if _nvml.nvmlInit_v2() != 0:
            _nvml = None
            raise Skip("no GPU: NVML does not start")
    device = ctypes.c_void_p()
    if _nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
        raise Skip(f"no GPU {index}")
    return device


def gpu_memory(index=0):
    """(free, total) bytes of a GPU, all its processes counted."""
    memory = _NvmlMemory()
    device = _nvml_device(index)
    result = _nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
    check(result == 0, f"nvmlDeviceGetMemoryInfo returned {result}")
    return memory.free, memory.total


def gpu_free(gpus=1):
    """Free bytes of the first GPUs together."""
    return sum(gpu_memory(index)[0] for index in range(gpus))


def gpu_count():
    _nvml_device()
    count = ctypes.c_uint()
    check(_nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0, "nvmlDeviceGetCount fails")
    return count.value


def gpu_name():
    text = ctypes.create_string_buffer(96)
    device = _nvml_device()
    return text.value.decode() if _nvml.nvmlDeviceGetName(device, text, len(text)) == 0 else "unknown GPU"


def needs_gpu():
    _nvml_device()


def needs_module(name):
    """Skips unless this Python can import the module; looks in a child, since an import here could start CUDA."""
    result = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise Skip(f"this Python has no {name}: {last}")


def needs_torch():
    needs_gpu()
    needs_module("torch")


def needs_torch_or_simulation():
    """As needs_torch(), unless run.sh of tests/torch has set up a PyTorch that runs on the simulated driver."""
    if "SIMGPU_MEMORY" not in os.environ:
        needs_torch()


_packages = tempfile.TemporaryDirectory(prefix="dormouse-packages-")


def package_path(name, version, rest):
    """PYTHONPATH with what scripts/setup --tests took out of the package's wheel in front. `rest` is what that imports of the
    remaining package, as {file: text}; what the wheel has stays.
    """
    folder = pathlib.Path(_packages.name) / f"{name}-{version}"
    if not folder.exists():
        source = BUILD / folder.name
        if not source.exists():
            raise Skip(f"{source} is missing: scripts/setup --tests fetches it, scripts/gpu pack puts it there")
        shutil.copytree(source, folder)
        for file, text in rest.items():
            path = folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text(text)
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def saver_library():
    """torch_memory_saver's own preload library for this PyTorch's CUDA."""
    find = (
        "import torch, torch_memory_saver, pathlib;"
        "print(torch.version.cuda.split('.')[0], pathlib.Path(torch_memory_saver.__file__).parent.parent)"
    )
    result = subprocess.run([sys.executable, "-c", find], capture_output=True, text=True, check=False)
    check(result.returncode == 0, f"torch_memory_saver cannot be looked at: {result.stderr}")
    major, folder = result.stdout.split(maxsplit=1)
    for name in (f"torch_memory_saver_hook_mode_preload_cu{major}", "torch_memory_saver_hook_mode_preload"):
        for path in sorted(pathlib.Path(folder.strip()).glob(name + ".*so")):
            return path
    raise Skip(f"no preload library of torch_memory_saver in {folder.strip()}")


# --- Programs.


def environment(regions=None, preload=True, lib=None, **variables):
    """The environment of a program: this process's without what concerns us, plus the library where `preload` says so."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DORMOUSE") and name not in ("LD_PRELOAD", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    }
    env["PYTHONUNBUFFERED"] = "1"
    env["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the same sums in the same order in every run
    if preload:
        env["LD_PRELOAD"] = str(lib or library())
        env["DORMOUSE_SOCKET_DIR"] = socket_dir()
        if regions is not None:
            env["DORMOUSE_REGIONS"] = regions
    env.update({name: str(value) for name, value in variables.items() if value is not None})
    return env


_socket_dir = None


def socket_dir():
    """A directory of this test's own, so that programs of other runs are not reached."""
    global _socket_dir
    if _socket_dir is None:
        _socket_dir = tempfile.TemporaryDirectory(prefix="dormouse-test-")
    return _socket_dir.name


class Program:
    """A child that answers lines on its standard output to lines on its standard input.

    Use as a context manager: at the end it is told to quit, then killed if it does not.
    """

    def __init__(self, argv, env, name="program"):
        self.name = name
        self._errors = tempfile.TemporaryFile(mode="w+")
        self._child = subprocess.Popen(
            [str(part) for part in argv],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
        )
        self.pid = self._child.pid
        self._lines = queue.Queue()
        self._history = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self._child.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def send(self, line):
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()

    def next_line(self, prefix, timeout):
        """The rest of the next line that starts with `prefix`; None if none came in time."""
        end = time.monotonic() + timeout
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return None
            if line is None:
                raise AssertionError(f"{self.name} ended (status {self._child.wait()}); it wrote:\n{self.output()}")
            self._history.append(line)
            if line.startswith(prefix):
                return line[len(prefix):].strip()

    def expect(self, prefix, timeout=120):
        line = self.next_line(prefix, timeout)
        check(line is not None, f"{self.name} did not say '{prefix}' within {timeout} s; it wrote:\n{self.output()}")
        return line

    def ask(self, line, prefix, timeout=120):
        self.send(line)
        return self.expect(prefix, timeout)

    def answer(self):
        """The next JSON object, on a line that starts with "= "."""
        return json.loads(self.expect("= "))

    def command(self, line):
        """Sends it and returns the answer, which must not be an error."""
        self.send(line)
        answer = self.answer()
        check("error" not in answer, f"'{line}': {answer.get('error')}")
        return answer

    def errors(self):
        self._errors.flush()
        position = self._errors.tell()
        self._errors.seek(0)
        text = self._errors.read()
        self._errors.seek(position)
        return text

    def output(self):
        return "\n".join(self._history[-40:]) + "\n" + self.errors()[-6000:]

    def finish(self, timeout=60):
        """Says quit and returns the exit status."""
        with contextlib.suppress(OSError):
            self.send("quit")
            self._child.stdin.close()
        return self._child.wait(timeout)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self._child.poll() is None:
            try:
                self.finish(20 if kind is None else 2)
            except subprocess.TimeoutExpired:
                self._child.send_signal(signal.SIGKILL)
                self._child.wait()
        if kind is not None:
            print(f"--- {self.name} wrote:\n{self.output()}", file=sys.stderr)


def run_program(argv, env, timeout, name="program"):
    """Runs a child to its end and returns its standard output; a failure carries what it wrote."""
    try:
        result = subprocess.run(
            [str(part) for part in argv], env=env, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired as error:
        written = (error.stderr or b"")
        written = written.decode(errors="replace") if isinstance(written, bytes) else written
        raise AssertionError(f"{name} took more than {timeout} s; it wrote:\n{written[-6000:]}") from None
    check(result.returncode == 0, f"{name} ended with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}")
    if result.stderr:
        print(f"--- {name} wrote to standard error:\n{result.stderr[-3000:]}", file=sys.stderr)
    return result.stdout


def last_json(text, name="program"):
    """The JSON object on the last line that is one."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    raise AssertionError(f"{name} printed no result; it wrote:\n{text[-3000:]}")


# --- The dormouse command.


def dormouse(*arguments, timeout=180, expect_failure=False):
    """Runs the command and returns what it printed (of a failure: what it said)."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("DORMOUSE")}
    env.pop("LD_PRELOAD", None)
    env["DORMOUSE_SOCKET_DIR"] = socket_dir()
    argv = [str(built("dormouse")), *[str(part) for part in arguments]]
    result = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    said = (result.stdout + result.stderr).strip()
    shown = " ".join(["dormouse", *argv[1:]])
    print(f"$ {shown}\n{said}", file=sys.stderr)
    if expect_failure:
        check(result.returncode != 0, f"'{shown}' was expected to fail and did not: {said}")
        return said
    check(result.returncode == 0, f"'{shown}' ended with {result.returncode}: {said}")
    return result.stdout


class _UnixConnection:
    """Just enough HTTP to ask a process about itself without depending on the command's output format."""

    def __init__(self, path):
        self.path = path

    def get(self, target):
        import http.client
        import socket

        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(30)
        connection.sock.connect(self.path)
        connection.request("GET", target)
        response = connection.getresponse()
        body = response.read().decode()
        check(response.status == 200, f"GET {target}: {response.status} {body}")
        return json.loads(body)


def status(pid):
    """The process's own GET /status."""
    return _UnixConnection(os.path.join(socket_dir(), f"{pid}.sock")).get("/status")


def tag_sum(state, tag, field):
    """A figure of a tag over all its devices and policies."""
    return sum(entry[field] for entry in state["tags"] if entry["tag"] == tag)


# --- Cases.

_cases = []
_figures = {}


def case(function):
    """Makes the function a case; its name is the behaviour."""
    _cases.append(function)
    return function


def figure(name, value):
    """Keeps a measured value with the case that is running."""
    _figures[name] = value
    print(f"    {name}: {value}")


def _run_case(function):
    _figures.clear()
    begin = time.monotonic()
    try:
        function()
        result, message = "passed", ""
    except Skip as reason:
        result, message = "skipped", str(reason)
    except Exception as error:  # noqa: BLE001  any failure is the case's result
        result, message = "failed", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    seconds = time.monotonic() - begin
    first = message.splitlines()[0] if message else ""
    print(f"{result:8}{function.__name__}  ({seconds:.1f} s)  {first}".rstrip(), flush=True)
    return {"case": function.__name__, "result": result, "seconds": round(seconds, 2), "message": message,
            "figures": dict(_figures)}


def main(suite, **options):
    """Runs the cases that the command line names. `options` are further arguments: name=default."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("cases", nargs="*", help="all if none is named")
    parser.add_argument("--list", action="store_true", help="print the cases' names")
    parser.add_argument("--json", type=pathlib.Path, help="append a line for each case to this file")
    for name, default in options.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    arguments = parser.parse_args()
    for name in options:
        settings[name] = getattr(arguments, name)
    known = {function.__name__: function for function in _cases}
    if arguments.list:
        print("\n".join(known))
        return 0
    unknown = [name for name in arguments.cases if name not in known]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(known)}")
    results = [_run_case(known[name]) for name in (arguments.cases or known)]
    if arguments.json:
        with arguments.json.open("a") as file:
            for entry in results:
                file.write(json.dumps({"suite": suite, **entry}) + "\n")
    outcomes = {entry["result"] for entry in results}
    return 1 if "failed" in outcomes else 77 if outcomes == {"skipped"} else 0


settings = {}
