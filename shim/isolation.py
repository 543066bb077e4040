"""Keeps PyTorch's cached blocks of different regions apart.

Runs inside the program, compiled into the library (isolation.cc), with no module of its own. The
calling thread tells of each region: begin(tag), begin(None) for one whose memory is none of ours,
end(). While it is inside a tag, its allocations come from a torch.cuda.MemPool of that tag; a tag has
one pool a device for the life of the process, and further ones only while several threads are inside
the tag at once, because PyTorch does not let two threads record into one.

PyTorch serves a thread from the pool that it entered first, so that of nested regions at most one
pool is entered: the innermost's. torch is only ever looked up in sys.modules, never imported.
"""

import _thread
import os
import sys
import time


class _State:
    """What one thread is inside of."""

    def __init__(self):
        self.wanted = []  # tags of the regions, outermost first; None where it is none of ours
        self.tag = None  # whose pools are entered
        self.entered = []  # (key, pool, context manager)
        self.captures = 0  # CUDA graphs that the thread is capturing


_lock = _thread.allocate_lock()  # protects _free
_free = {}  # (tag, device): pools that no thread is in
_kept = []  # what must never be destroyed: PyTorch's objects do not survive its shutdown
_states = {}  # by thread
_process = os.getpid()
_waiting = False  # for torch to be imported or CUDA to be initialised
_graphs_wrapped = False
_made_room = float("-inf")  # when

# Giving cached memory back costs a millisecond or so, and what is cached is soon wanted again.
_ROOM_INTERVAL = 1.0  # seconds
_ROOM_SHARE = 8  # cached memory matters from an eighth of the free memory on
_ROOM_LEAST = 64 << 20  # bytes


def begin(tag):
    _forget_parent()
    state = _states.setdefault(_thread.get_ident(), _State())
    state.wanted.append(tag)
    _settle(state)


def end():
    _forget_parent()
    ident = _thread.get_ident()
    state = _states.get(ident)
    if state is None:  # began before a fork
        return
    state.wanted.pop()
    try:
        _settle(state)
    finally:
        if not state.wanted and not state.entered:
            _states.pop(ident, None)


def thread_ended():
    state = _states.pop(_thread.get_ident(), None)
    if state is not None:
        _leave(state)


def _forget_parent():
    """After a fork CUDA is the parent's: nothing that was entered can be left."""
    global _process
    if _process != os.getpid():
        _kept.append(dict(_states))
        _states.clear()
        _process = os.getpid()


def _settle(state, initialising=False):
    """Enters and leaves pools until the thread is in those of its innermost region."""
    tag = state.wanted[-1] if state.wanted else None
    if tag == state.tag or state.captures:
        return
    _leave(state)
    if tag is None:
        return
    cuda = sys.modules.get("torch.cuda")
    if cuda is not None and not hasattr(cuda, "use_mem_pool"):
        return  # it is being imported, or older than 2.5
    if cuda is None or not (initialising or cuda.is_initialized()):
        _wait(cuda)
    elif not cuda.is_current_stream_capturing():
        _enter(state, tag, cuda)


def _enter(state, tag, cuda):
    torch = sys.modules["torch"]
    if not hasattr(torch._C, "_cuda_beginAllocateCurrentThreadToPool"):
        raise RuntimeError(
            "this PyTorch's memory pools catch all threads: cached blocks of regions and of the rest "
            "of the program may mix. PyTorch 2.8 and later keep them apart"
        )
    _wrap_graphs(cuda)
    devices = _devices(torch, cuda)
    _make_room(cuda, devices)
    state.tag = tag
    for device in devices:
        key = (tag, device)
        pool = _take(key, cuda)
        context = cuda.use_mem_pool(pool, device)
        context.__enter__()
        state.entered.append((key, pool, context))


def _leave(state):
    state.tag = None
    while state.entered:
        key, pool, context = state.entered.pop()
        try:
            context.__exit__(None, None, None)
        except Exception as error:
            _kept.append(context)  # and the pool is not used again
            _report(f"leaving the memory pool of {key[0]}: {error}")
            continue
        with _lock:
            _free[key].append(pool)


def _devices(torch, cuda):
    """The devices that the process uses; asking for a pool elsewhere would start a context there."""
    current = cuda.current_device()
    used = getattr(torch._C, "_cuda_hasPrimaryContext", None)
    if used is None:
        return [current]
    return [current] + [d for d in range(cuda.device_count()) if d != current and used(d)]


def _make_room(cuda, devices):
    """While a thread records into a pool, PyTorch does not give the cached blocks of the others back
    when memory runs out: it raises. So they are given back before, where they could be missed."""
    global _made_room
    now = time.monotonic()
    if now - _made_room < _ROOM_INTERVAL:
        return
    _made_room = now
    for device in devices:
        cached = cuda.memory_reserved(device) - cuda.memory_allocated(device)
        if cached >= _ROOM_LEAST and cached >= cuda.mem_get_info(device)[0] // _ROOM_SHARE:
            cuda.empty_cache()
            return


def _take(key, cuda):
    with _lock:
        pools = _free.setdefault(key, [])
        if pools:
            return pools.pop()
    if key[1] == cuda.current_device():
        pool = cuda.MemPool()
    else:
        with cuda.device(key[1]):
            pool = cuda.MemPool()
    _kept.append(pool)
    return pool


def _wrap_graphs(cuda):
    """A graph's capture has a pool of its own, which must not come after ours."""
    global _graphs_wrapped
    if _graphs_wrapped:
        return
    _graphs_wrapped = True
    graph = cuda.CUDAGraph
    real_begin, real_end = graph.capture_begin, graph.capture_end

    def capture_begin(self, *args, **kwargs):
        state = _states.setdefault(_thread.get_ident(), _State())
        _guarded(_leave, state)
        state.captures += 1
        try:
            return real_begin(self, *args, **kwargs)
        except BaseException:
            _capture_ended(state)
            raise

    def capture_end(self, *args, **kwargs):
        try:
            return real_end(self, *args, **kwargs)
        finally:
            state = _states.get(_thread.get_ident())
            if state is not None and state.captures:
                _capture_ended(state)

    for wrapper, real in ((capture_begin, real_begin), (capture_end, real_end)):
        wrapper.__doc__ = real.__doc__
        wrapper.__wrapped__ = real
    graph.capture_begin, graph.capture_end = capture_begin, capture_end


def _capture_ended(state):
    state.captures -= 1
    _guarded(_settle, state)
    if not state.wanted and not state.captures:
        _states.pop(_thread.get_ident(), None)


def _guarded(function, *args):
    """For calls that come from the program: what goes wrong here is not the program's."""
    try:
        function(*args)
    except Exception as error:
        _report(str(error))


def _wait(cuda):
    """Enters the pools as soon as CUDA is initialised, on the thread that does it. Threads that are
    inside a region at that time follow at their next begin or end: a pool takes in its own thread."""
    global _waiting
    if _waiting:
        return
    _waiting = True
    if cuda is None:
        sys.meta_path.insert(0, _TorchFinder())
    else:
        cuda._lazy_call(_cuda_initialised)


def _cuda_initialised():
    state = _states.get(_thread.get_ident())
    if state is not None:
        _guarded(_settle, state, True)


def _torch_imported():
    _look_again(None)
    cuda = sys.modules.get("torch.cuda")
    if cuda is not None:
        cuda._lazy_call(_cuda_initialised)


class _TorchFinder:
    """Finds nothing itself; has the loader of torch.cuda tell when the module is there."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch.cuda":
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find is not None else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _TellingLoader(spec.loader)
                return spec
        return None


class _TellingLoader:
    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _guarded(_torch_imported)
