"""Makes libraries that stand in for those that a CUDA build of PyTorch links and its allocator does not
need (cuBLAS, cuDNN, NCCL, ...), so that it loads without them: every function that PyTorch's libraries
ask for is there and returns 1, which each of these interfaces reads as a failure; kernels are launched
and do nothing. NVML, which the allocator of 2.14 and later asks whether the GPU is part of a fabric and
loads itself, starts and knows neither a device nor a process (2.11 raises where it cannot list them).

    make_stubs.py TORCH_LIB_DIR SIMULATED_DIR OUT_DIR

SIMULATED_DIR has the libcudart and libcuda to run on; functions that they lack get a stand-in too.
"""

import collections
import pathlib
import re
import subprocess
import sys

ROOTS = ("libtorch_python.so", "libtorch_cuda_linalg.so", "libcaffe2_nvrtc.so")


def dynamic_symbols(library):
    """(name, version or None, defined) of each global symbol."""
    output = subprocess.run(
        ["readelf", "-W", "--dyn-syms", library], check=True, capture_output=True, text=True
    ).stdout
    for line in output.splitlines():
        fields = line.split()
        if len(fields) < 8 or fields[4] == "LOCAL" or not fields[0].rstrip(":").isdigit():
            continue
        name, _, version = fields[7].partition("@")
        yield name, version.lstrip("@") or None, fields[6] != "UND", fields[4] == "WEAK"


def needed(library):
    output = subprocess.run(
        ["readelf", "-d", library], check=True, capture_output=True, text=True
    ).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", output)


def version_files(library):
    """Version name to the soname that has to define it."""
    output = subprocess.run(
        ["readelf", "-W", "-V", library], check=True, capture_output=True, text=True
    ).stdout
    files, current = {}, None
    for line in output.splitlines():
        if match := re.search(r"File: (\S+)", line):
            current = match[1]
        elif (match := re.search(r"Name: (\S+)\s+Flags", line)) and current:
            files[match[1]] = current
    return files


def system_library(name):
    return re.match(r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux.*|libgomp)\.so", name)


def definition(function):
    if function == "nvmlDeviceGetComputeRunningProcesses":
        return f"long {function}(void *device, unsigned *count) {{ *count = 0; return 0; }}"
    works = "LaunchKernel" in function or function in ("__cudaGetKernel", "nvmlInit_v2")
    # What leaves the handle as it was, null, has found none.
    works = works or function.startswith("nvmlDeviceGetHandle")
    return f"long {function}(void) {{ return {0 if works else 1}; }}"


def nvml_functions(library):
    """They are looked up by name, so that the names are all there is of them."""
    return {name.decode() for name in re.findall(rb"\0(nvml[A-Z]\w+)(?=\0)", library.read_bytes())}


def write_stub(soname, symbols, out):
    """symbols: version or None, to names."""
    source, script = [], []
    for names in symbols.values():
        source += [definition(name) for name in sorted(names)]
    for version, names in sorted(symbols.items(), key=lambda item: item[0] or ""):
        if version is not None:
            script.append(f"{version} {{ global: {'; '.join(sorted(names)) + ';' if names else ''} }};")
    path = out / soname
    (out / "stub.c").write_text("\n".join(source) + "\n")
    (out / "stub.lds").write_text("\n".join(script) + "\n")
    command = ["gcc", "-shared", "-fPIC", "-fno-builtin", "-w", f"-Wl,-soname,{soname}"]
    if script:
        command.append(f"-Wl,--version-script,{out / 'stub.lds'}")
    subprocess.run(command + ["-o", path, out / "stub.c"], check=True)


def main():
    torch, simulated, out = (pathlib.Path(argument) for argument in sys.argv[1:4])
    out.mkdir(parents=True, exist_ok=True)
    libraries, queue = {}, list(ROOTS)
    stubs = collections.defaultdict(lambda: collections.defaultdict(set))
    while queue:
        name = queue.pop()
        path = next((d / name for d in (torch, simulated) if (d / name).exists()), None)
        if name in libraries or system_library(name):
            continue
        if path is None:
            stubs[name]  # even if nothing is asked of it
            continue
        libraries[name] = path
        queue += needed(path)
    defined = {name for path in libraries.values() for name, _, here, _ in dynamic_symbols(path) if here}
    for path in libraries.values():
        files = version_files(path)
        for name, version, is_defined, weak in dynamic_symbols(path):
            if is_defined or name in defined or weak:
                continue
            file = files.get(version)
            if version is None:
                stubs["libnccl.so.2"][None].add(name)
            elif not system_library(file):
                # What the simulated runtime lacks: any library may define it, under its version.
                stubs[file if file in stubs else "libnccl.so.2"][version].add(name)
    stubs["libnvidia-ml.so.1"][None] = nvml_functions(libraries["libc10_cuda.so"])
    for soname, symbols in stubs.items():
        write_stub(soname, symbols, out)
        print(soname, sum(len(names) for names in symbols.values()))


if __name__ == "__main__":
    main()
