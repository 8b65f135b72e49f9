"""Stub device libraries, with which a wheel's GPU plugin loads on a machine that has no GPU.

MindSpore's parallel front end refuses the CPU as its target. The x86-64 wheels for Linux carry a GPU plugin too, which
loads if the CUDA libraries that it names can be found. A graph that is only compiled never runs them, so that functions
without content are enough. They are generated from the plugin's own list of undefined symbols.
"""

import collections
import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess

import mindspore as ms

from mindpet.errors import DryRunError
from mindpet.utils.files import exchange, remove_left, staging

# A symbol that does not name its library is looked for by prefix; the first that fits decides.
LIBRARY_OF_PREFIX = {
    "cufft": "libcufft.so.10",
    "curand": "libcurand.so.10",
    "cudnn": "libcudnn.so.8",
    "cublas": "libcublas.so.11",
    "cusolver": "libcusolver.so.11",
    "cusparse": "libcusparse.so.11",
    "nvrtc": "libnvrtc.so.11.2",
    "cuda": "libcudart.so.11.0",
    "__cuda": "libcudart.so.11.0",
    "cu": "libcuda.so.1",
}
# What the plugin must get an answer from while it starts. Every other function returns 0, which means success.
ANSWERS = r"""
#include <stdlib.h>
#include <string.h>
#define HANDLE { *handle = malloc(8); return 0; }
#define ANSWER __attribute__((weak)) int
ANSWER cudaGetDeviceCount(int *count) { *count = 8; return 0; }
ANSWER cudaMalloc(void **memory, size_t size) { *memory = malloc(size); return 0; }
ANSWER cudaFree(void *memory) { free(memory); return 0; }
ANSWER cudaHostAlloc(void **memory, size_t size, unsigned flags) { *memory = malloc(size); return 0; }
ANSWER cudaFreeHost(void *memory) { free(memory); return 0; }
ANSWER cudaMemcpy(void *to, const void *from, size_t size, int kind) { memcpy(to, from, size); return 0; }
ANSWER cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream)
  { memcpy(to, from, size); return 0; }
ANSWER cudaMemset(void *memory, int value, size_t size) { memset(memory, value, size); return 0; }
ANSWER cudaMemsetAsync(void *memory, int value, size_t size, void *stream) { memset(memory, value, size); return 0; }
ANSWER cudaMemGetInfo(size_t *unused, size_t *all) { *unused = *all = (size_t)1 << 32; return 0; }
ANSWER cudaStreamCreate(void **handle) HANDLE
ANSWER cudaStreamCreateWithFlags(void **handle, unsigned flags) HANDLE
ANSWER cudaStreamCreateWithPriority(void **handle, unsigned flags, int priority) HANDLE
ANSWER cudaEventCreate(void **handle) HANDLE
ANSWER cudaEventCreateWithFlags(void **handle, unsigned flags) HANDLE
ANSWER cudaEventElapsedTime(float *ms, void *start, void *end) { *ms = 0; return 0; }
ANSWER cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 0; return 0; }
ANSWER cudnnCreate(void **handle) HANDLE
ANSWER cublasCreate_v2(void **handle) HANDLE
ANSWER cusolverDnCreate(void **handle) HANDLE
ANSWER cusparseCreate(void **handle) HANDLE
/* cudaDeviceProp of CUDA 11: name at 0, totalGlobalMem at 288, major and minor at 360. */
ANSWER cudaGetDeviceProperties(void *properties, int device) {
  memset(properties, 0, 700);
  strcpy(properties, "stub");
  *(size_t *)((char *)properties + 288) = (size_t)1 << 32;
  *(int *)((char *)properties + 360) = 8;
  return 0;
}
#define TEXT __attribute__((weak)) const char *
TEXT cudaGetErrorString(int error) { return "stub"; }
TEXT cudaGetErrorName(int error) { return "stub"; }
TEXT cudnnGetErrorString(int error) { return "stub"; }
"""
ANSWERED = set(re.findall(r"^(?:ANSWER|TEXT) (\w+)\(", ANSWERS, re.MULTILINE))
DIGESTS = "digests.json"  # of all files of a stub folder
CUDA_RT, CUDA_DRIVER = "libcudart.so.11.0", "libcuda.so.1"


def stub_folder() -> pathlib.Path:
    """The folder of the stub libraries for the installed MindSpore, built where it is missing or damaged (in a second).

    It lies in `$XDG_CACHE_HOME/mindpet`, by default `~/.cache/mindpet`.

    Raises:
        DryRunError: not Linux on x86-64, a wheel without the GPU plugin, no `gcc` or `nm`, or they fail; the folder
            cannot be written.
    """
    plugin = _find_plugin()
    cache = _cache()
    stamp = f"{plugin}{plugin.stat().st_size}{plugin.stat().st_mtime_ns}{ANSWERS}{LIBRARY_OF_PREFIX}"
    folder = cache / f"stubs-{ms.__version__}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    remove_left(folder)
    if _is_whole(folder):
        return folder
    missing = [tool for tool in ("gcc", "nm") if shutil.which(tool) is None]
    if missing:
        raise DryRunError(f"dry_run: the stub libraries are built with gcc and nm; not found: {missing}.")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with staging(folder) as staged:
            built = staged / "built"
            built.mkdir()
            _build(plugin, built)
            (built / DIGESTS).write_text(json.dumps(_digests(built)))
            _put(built, folder)
    except OSError as error:
        raise DryRunError(
            f"dry_run: cannot build the stub libraries in {cache}; set XDG_CACHE_HOME to another folder: {error}"
        ) from error
    except subprocess.CalledProcessError as error:
        raise DryRunError(f"dry_run: {error.cmd[0]} failed for a stub library:\n{error.stderr}") from error
    return folder


def _cache():
    """Where what can be built again is kept."""
    try:
        parent = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    except RuntimeError as error:  # no HOME, and a user that the system does not know
        raise DryRunError(
            "dry_run: there is no home folder to build the stub libraries in; set XDG_CACHE_HOME to a folder."
        ) from error
    return parent.absolute() / "mindpet"


def _is_whole(folder):
    """Whether every file is as it was built."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / DIGESTS).read_text()) == _digests(folder)
    return False


def _digests(folder):
    """File -> digest of its content and of whether it can be run, without the list of them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS)
    return {
        str(path.relative_to(folder)): hashlib.sha256(bytes([os.access(path, os.X_OK)]) + path.read_bytes()).hexdigest()
        for path in files
    }


def _put(built, folder):
    """Give a whole folder its name, at which other processes may look at any moment, or put the same there."""
    with contextlib.suppress(OSError):
        built.rename(folder)  # nothing is there
        return
    if _is_whole(folder) or exchange(built, folder):  # another process was faster; or what is damaged goes
        return
    folder.rename(built.with_name("damaged"))
    built.rename(folder)


def _find_plugin():
    """The newest GPU plugin of the installed MindSpore."""
    where = f"{platform.system()} on {platform.machine()}"
    if where != "Linux on x86_64":
        raise DryRunError(f"dry_run: without CANN it needs Linux on x86_64, but this is {where}.")
    folder = pathlib.Path(importlib.util.find_spec("mindspore").origin).parent / "lib/plugin"
    plugins = sorted(folder.glob("libmindspore_gpu.so.11.*"))
    if not plugins:
        raise DryRunError(f"dry_run: MindSpore {ms.__version__} has no GPU plugin in {folder}.")
    return plugins[-1]


def _build(plugin, folder):
    version = plugin.name.split(".so.")[1]
    clients = [plugin, *plugin.parent.glob("gpu*/libcuda_ops*")]
    clients += plugin.parent.glob(f"gpu{version}/libnvidia_collective.so")
    for name in ("lib64", "bin"):
        (folder / name).mkdir()
    for library, symbols in _needed(clients).items():
        source = folder / f"{library}.c"
        silent = "".join(f"int {symbol}(void) {{ return 0; }}\n" for symbol in sorted(symbols - ANSWERED))
        source.write_text(ANSWERS + silent)
        command = ["gcc", "-shared", "-fPIC", "-w", "-o", folder / "lib64" / library, source, f"-Wl,-soname,{library}"]
        if library != CUDA_DRIVER:  # symbols of all others carry the library's name as their version
            versions = folder / f"{library}.map"
            versions.write_text(
                f"{library} {{ global: {' '.join(f'{name};' for name in sorted(symbols))} local: *; }};"
            )
            command.append(f"-Wl,--version-script={versions}")
        subprocess.run(command, check=True, capture_output=True, text=True)
    # MindSpore compares the versions that these files tell.
    shutil.copy(folder / "lib64" / CUDA_RT, folder / f"lib64/libcudart.so.{version}.55")
    (folder / "version.txt").write_text(f"CUDA Version {version}.0\n")
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {version}, V{version}.55"\n')
    nvcc.chmod(0o755)


def _needed(clients):
    """Library -> the symbols that the clients want from it."""
    needed = collections.defaultdict(set)
    for client in clients:
        listing = subprocess.run(["nm", "-D", "--undefined-only", client], check=True, capture_output=True, text=True)
        for line in listing.stdout.splitlines():
            symbol, _, library = line.split()[-1].partition("@")
            library = library.lstrip("@")
            if not library:
                fits = (known for prefix, known in LIBRARY_OF_PREFIX.items() if symbol.startswith(prefix))
                library = next(fits, "")
            if library.startswith(("libcu", "libnv")):
                needed[library].add(symbol)
    return needed
