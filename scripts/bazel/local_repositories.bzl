"""Repositories that exist on this machine: rules that Debian's Bazel needs, Debian's libraries, the CUDA Toolkit.

Debian 12's Bazel (4.2.3, package bazel-bootstrap) asks for rules_cc, rules_java and remote_coverage_tools and
would fetch them. A newer upstream Bazel works with the same definitions, since they only re-export native rules.
"""

_RULES_CC_DEFS = """
cc_binary = native.cc_binary
cc_library = native.cc_library
cc_test = native.cc_test
cc_import = native.cc_import
cc_toolchain = native.cc_toolchain
cc_toolchain_suite = native.cc_toolchain_suite
objc_library = native.objc_library
"""

_COVERAGE_TOOLS = """
filegroup(name = "coverage_report_generator", visibility = ["//visibility:public"])
filegroup(name = "lcov_merger", visibility = ["//visibility:public"])
"""

def _generated_repository_impl(ctx):
    ctx.file("WORKSPACE", "")
    for path, content in ctx.attr.files.items():
        ctx.file(path, content)

_generated_repository = repository_rule(
    implementation = _generated_repository_impl,
    attrs = {"files": attr.string_dict()},
    doc = "A repository made of the given files (path to content).",
)

def _rules_java_impl(ctx):
    debian = ctx.path("/usr/share/bazel/rules/java")
    if debian.exists:
        for entry in debian.readdir():
            ctx.symlink(entry, entry.basename)
    else:
        ctx.file("WORKSPACE", "")
        ctx.file("BUILD", "")

_rules_java = repository_rule(
    implementation = _rules_java_impl,
    local = True,
    doc = "Debian's bazel-rules-java where it is installed, else empty: no target here uses Java.",
)

def local_rules():
    """Defines what Debian's Bazel would otherwise download."""
    _generated_repository(
        name = "rules_cc",
        files = {"BUILD": "", "cc/BUILD": "", "cc/defs.bzl": _RULES_CC_DEFS},
    )
    _generated_repository(
        name = "remote_coverage_tools",
        files = {"BUILD": _COVERAGE_TOOLS},
    )
    _rules_java(name = "rules_java")

_SYSTEM_BUILD = """
package(default_visibility = ["//visibility:public"])

cc_library(
    name = "headers",
    hdrs = glob(["include/**"], allow_empty = True),
    includes = ["include"],
)
{extra}
"""

def _system_library_impl(ctx):
    ctx.file("WORKSPACE", "")
    missing = []
    for header in ctx.attr.headers:
        source = ctx.path("/usr/include/" + header)
        if not source.exists:
            missing.append("/usr/include/" + header)
        else:
            ctx.symlink(source, "include/" + header)
    libraries = []
    for library in ctx.attr.libraries:
        found = None
        for folder in ctx.attr.folders:
            candidate = ctx.path(folder + "/" + library)
            if candidate.exists:
                found = candidate
                break
        if found == None:
            missing.append(library)
        else:
            ctx.symlink(found, "lib/" + library)
            libraries.append(library)
    if missing:
        fail("%s is missing: install the package %s (scripts/setup does it)" %
             (", ".join(missing), ctx.attr.package))
    ctx.file("BUILD.bazel", _SYSTEM_BUILD.format(extra = ctx.attr.extra_build))

_system_library = repository_rule(
    implementation = _system_library_impl,
    local = True,
    attrs = {
        "package": attr.string(mandatory = True, doc = "the Debian package that brings it"),
        "headers": attr.string_list(doc = "files or folders below /usr/include"),
        "libraries": attr.string_list(doc = "files below one of the folders"),
        "folders": attr.string_list(default = [
            "/usr/lib/x86_64-linux-gnu",
            "/usr/lib/aarch64-linux-gnu",
            "/usr/lib",
        ]),
        "extra_build": attr.string(doc = "further targets of the repository"),
    },
    doc = "One library of the system, checked to be there.",
)

_SPDLOG = """
cc_library(
    name = "spdlog",
    defines = ["SPDLOG_HEADER_ONLY", "SPDLOG_FMT_EXTERNAL", "FMT_HEADER_ONLY"],
    deps = [":headers"],
)
"""

_GTEST = """
cc_library(
    name = "gtest",
    srcs = ["lib/libgtest.a", "lib/libgmock.a"],
    linkopts = ["-lpthread"],
    deps = [":headers"],
)

cc_library(
    name = "gtest_main",
    srcs = ["lib/libgtest_main.a", "lib/libgtest.a", "lib/libgmock.a"],
    linkopts = ["-lpthread"],
    deps = [":headers"],
)
"""

_BENCHMARK = """
cc_library(
    name = "benchmark",
    srcs = ["lib/libbenchmark.so"],
    linkopts = ["-lpthread"],
    deps = [":headers"],
)
"""

def system_libraries():
    """Defines Debian's libraries that the project builds on."""
    _system_library(name = "spdlog", package = "libspdlog-dev libfmt-dev", headers = ["spdlog", "fmt"], extra_build = _SPDLOG)
    _system_library(name = "json", package = "nlohmann-json3-dev", headers = ["nlohmann"])
    _system_library(name = "cli11", package = "libcli11-dev", headers = ["CLI"])
    _system_library(name = "boost", package = "libboost-dev", headers = ["boost"])
    _system_library(name = "xxhash", package = "libxxhash-dev", headers = ["xxhash.h", "xxh3.h"])
    _system_library(
        name = "gtest",
        package = "libgtest-dev libgmock-dev",
        headers = ["gtest", "gmock"],
        libraries = ["libgtest.a", "libgtest_main.a", "libgmock.a"],
        extra_build = _GTEST,
    )
    _system_library(
        name = "benchmark",
        package = "libbenchmark-dev",
        headers = ["benchmark"],
        libraries = ["libbenchmark.so"],
        extra_build = _BENCHMARK,
    )

_CUDA_BUILD = """
package(default_visibility = ["//visibility:public"])

# The toolkit's headers alone: nothing here links against libcuda or libcudart.
cc_library(
    name = "headers",
    hdrs = glob(["include/**"], allow_empty = True),
    includes = ["include"],
)
"""

def _cuda_toolkit_impl(ctx):
    home = ctx.os.environ.get("CUDA_HOME", "") or "/usr/local/cuda"
    include = ctx.path(home + "/include")
    if not include.get_child("cuda.h").exists:
        fail("no CUDA Toolkit headers: %s/cuda.h is missing. Set CUDA_HOME, or run scripts/setup, which " % include +
             "takes them from the toolkit's wheels")
    ctx.symlink(include, "include")
    ctx.file("WORKSPACE", "")
    ctx.file("BUILD.bazel", _CUDA_BUILD)

cuda_toolkit = repository_rule(
    implementation = _cuda_toolkit_impl,
    local = True,
    environ = ["CUDA_HOME"],
    doc = "The CUDA Toolkit's headers from CUDA_HOME, else /usr/local/cuda.",
)
