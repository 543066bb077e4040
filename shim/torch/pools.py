"""Keeps PyTorch's cached blocks of different regions apart.

Runs inside the program, compiled into the library (pools.cc) behind embedding.py, with no module of its own. The
calling thread tells of each region: begin(tag), begin(None) for one whose memory is none of ours,
end(); tags are numbers. While a thread is inside a tag, its allocations come from a torch.cuda.MemPool
of that tag. A tag has one pool a device, and further ones only while several threads are inside the
tag at once, because PyTorch does not let two threads record into one.

PyTorch serves a thread from one of the pools that it has entered, by version the first or the last, so that of
nested regions at most one pool is entered: the innermost's. A pool of the program's that it enters inside or around
the region is left for as long (_step_aside), since its cached blocks would cross the region's border. torch is only
ever looked up in sys.modules, never imported.

What is free in a pool: PyTorch gives the free segments of a pool back only once nobody can enter the
pool any more. So a pool with much of it is given up when its region ends, or when the program empties
PyTorch's cache, and the next region of its tag makes a new one (_look). What stays is not backed up
(unused): a block that is free in a pool which no thread is in stays free until a thread enters the
pool, which _entered tells.
"""

from _thread import get_ident as _get_ident
from time import monotonic as _now


class _State:
    """What one thread is inside of."""

    __slots__ = ("wanted", "tag", "entered", "captures", "own", "aside")

    def __init__(self):
        self.wanted = []  # tags of the regions, outermost first; None where it is none of ours
        self.tag = None  # whose pools are entered
        self.entered = []
        self.captures = 0  # CUDA graphs that the thread is capturing
        self.own = []  # (device, id) of the pools of the program that it is in
        self.aside = []  # those of them that it has left for the region


class _Pool:
    """One torch.cuda.MemPool, idle or in the `entered` of a thread."""

    __slots__ = ("memory", "id", "device", "home")

    def __init__(self, memory, device, home):
        self.memory, self.id, self.device, self.home = memory, tuple(memory.id), device, home


class _Home:
    """The pools of one tag on one device."""

    __slots__ = ("tag", "idle", "began", "visits", "look_at")

    def __init__(self, tag):
        self.tag = tag
        self.idle = []  # those that no thread is in
        self.began = 0.0  # the last region
        self.visits, self.look_at = 0, 0.0  # regions since the last look at what is free; the next


_homes = {}  # by (tag, device)
_only_homes = {}  # by tag, where there is one device
_given_up = []  # (tag, id) of pools that nobody can enter any more, while they have blocks
_guards = {}  # by device: pools without a block, see _empty_given_up
_emptying = False
_exact = False  # whether PyTorch can be made to empty those alone
_postponed = []  # pools of the program that it has dropped
_with_allocators = set()  # ids of pools that the program gave an allocator of its own
_kept = []  # what must never be destroyed: PyTorch's objects do not survive its shutdown
_states = {}  # by thread
_without_pools = False  # for good
_waiting = False  # for torch to be imported or CUDA to be initialised
_cuda = None  # torch.cuda, once CUDA is initialised and all that is needed is there
_torch_c = None  # torch._C
_devices_here = 0
_snapshot_options = {}
_room_at = 0.0  # when room may be made again

# Giving cached memory back costs a millisecond or so, and what is cached is soon wanted again.
_ROOM_INTERVAL = 1.0  # seconds
_ROOM_SHARE = 8  # cached memory matters from an eighth of the free memory on
_ROOM_LEAST = 64 << 20  # bytes

# A look at a pool costs as much. Where regions come one after the other, what is free is used again.
_LOOK_INTERVAL = 1.0  # seconds
_LOOK_VISITS = 4  # regions since the last look
_GIVE_UP_LEAST = 64 << 20  # bytes
_GIVE_UP_GAIN = 4  # times what can then not be used again


def begin(tag):
    state = _states.get(_get_ident())
    if state is None:
        state = _states[_get_ident()] = _State()
    state.wanted.append(tag)
    if tag == state.tag or state.captures:
        return
    home = _only_homes.get(tag)
    if home is None or state.entered:
        _settle(state, tag)
    elif not _is_capturing():
        # As _enter would, in less time: nearly all regions of a program come here.
        now = _now()
        if now >= _room_at or not home.idle:
            return _enter(state, tag)
        state.tag = tag
        home.began = now
        if state.own:
            _step_aside(state)
        _begin_in(home.idle.pop(), state)


def end():
    state = _states.get(_get_ident())
    if state is None or not state.wanted:  # began before a fork
        return
    wanted = state.wanted
    wanted.pop()
    tag = wanted[-1] if wanted else None
    if tag == state.tag or state.captures:
        return
    left = state.entered
    _leave(state)
    if tag is not None:
        _settle(state, tag)
    if left and left[0].home.began >= left[0].home.look_at:
        _guarded(_look_at, left)


def end_of(ident):
    """end(), of a thread that cannot have the GIL; called on another, which cannot enter an outer region's
    pools for it."""
    state = _states.get(int(ident))
    if state is None or not state.wanted:
        return
    state.wanted.pop()
    if (state.wanted[-1] if state.wanted else None) != state.tag and not state.captures:
        _leave(state, False)


def thread_ended(ident):
    """Of a thread that waits for this; called on another."""
    state = _states.pop(int(ident), None)
    if state is not None:
        _leave(state, False)


def forked():
    """CUDA is the parent's: nothing that was entered can be left, and no pool is ours."""
    global _cuda, _emptying
    _kept.append((dict(_states), dict(_homes), list(_postponed)))
    _states.clear()
    _homes.clear()
    _only_homes.clear()
    _postponed.clear()
    _given_up.clear()
    _cuda, _emptying = None, False


def _settle(state, tag):
    """Leaves the pools of the region that was innermost and enters those of the one that is."""
    if state.entered:
        _leave(state)
    if tag is not None and (_cuda is not None or _find_cuda()):
        if not _is_capturing():
            try:
                _enter(state, tag)
            finally:
                _entered(tag)


def _find_cuda(initialising=False):
    """Whether pools can be entered; if they will be, that is seen to."""
    global _cuda, _torch_c, _devices_here, _exact, _is_capturing, _begin_pool, _end_pool, _release_pool, _without_pools
    if _without_pools:
        return False
    cuda = sys.modules.get("torch.cuda")
    if not initialising and getattr(getattr(cuda, "__spec__", None), "_initializing", False):
        return False  # it is being imported
    if cuda is None or not (initialising or cuda.is_initialized()):
        _wait(cuda)
        return False
    torch_c = sys.modules["torch"]._C
    obstacle = _obstacle(cuda, torch_c)
    if obstacle is not None:
        _without_pools = True
        _report(obstacle + ": cached blocks of regions and of the rest of the program may mix, and keep the tag that they were "
                "allocated with")
        return False
    _wrap_graphs(cuda)
    _wrap_empty_cache(torch_c)
    _wrap_mem_pool(cuda.MemPool)
    _wrap_use_mem_pool(cuda.memory)
    _torch_c, _devices_here = torch_c, cuda.device_count()
    _is_capturing = torch_c._cuda_isCurrentStreamCapturing
    _begin_pool = torch_c._cuda_beginAllocateCurrentThreadToPool
    _end_pool, _release_pool = torch_c._cuda_endAllocateToPool, torch_c._cuda_releasePool
    if "include_traces" in getattr(getattr(cuda.memory_snapshot, "__code__", None), "co_varnames", ()):
        _snapshot_options["include_traces"] = False  # the program may have recorded a long history
    _exact = _is_exact(getattr(sys.modules["torch"], "__version__", ""))
    _cuda = cuda
    return True


def _obstacle(cuda, torch_c):
    """Why no thread can be served from a pool of its own, if so."""
    backend = torch_c._cuda_getAllocatorBackend() if hasattr(torch_c, "_cuda_getAllocatorBackend") else "native"
    if backend != "native":
        return f"PyTorch's allocator here is {backend}, which has no memory pools, unlike the native one"
    if not hasattr(cuda, "MemPool"):
        return "this PyTorch's allocator has no memory pools, as 2.8 and later have"
    if not hasattr(torch_c, "_cuda_beginAllocateCurrentThreadToPool"):
        return "this PyTorch's memory pools catch all threads, those of 2.8 and later one"
    return None


def _enter(state, tag):
    devices = _devices()
    now = _now()
    if now >= _room_at:
        _make_room(devices, now)
    state.tag = tag
    if state.own:
        _step_aside(state)
    for device in devices:
        home = _homes.get((tag, device))
        if home is None:
            home = _homes.setdefault((tag, device), _Home(tag))
            if _devices_here == 1:
                _only_homes[tag] = home
        home.began = now
        try:
            pool = home.idle.pop()
        except IndexError:
            pool = _make_pool(device, home)
        _begin_in(pool, state)


def _begin_in(pool, state):
    try:
        _begin_pool(pool.device, pool.id)
    except BaseException:
        _kept.append(pool)
        raise
    state.entered.append(pool)


def _leave(state, on_its_thread=True):
    entered, state.entered, state.tag = state.entered, [], None
    for pool in reversed(entered) if len(entered) > 1 else entered:
        try:
            _end_pool(pool.device, pool.id)
            _release_pool(pool.device, pool.id)
        except Exception as error:
            _kept.append(pool)  # and it is not used again
            _report(f"leaving a memory pool: {error}")
            continue
        home = pool.home
        home.visits += 1
        home.idle.append(pool)
    if state.aside and on_its_thread:
        _come_back(state)
    if _postponed:
        _destroy_postponed()


def _step_aside(state):
    """Leaves the pools of the program."""
    for pool in reversed(state.own):
        if pool not in state.aside:
            _end_pool(*pool)
            state.aside.append(pool)


def _come_back(state):
    while state.aside:
        pool = state.aside.pop()
        _begin_pool(*pool)
        _release_pool(*pool)  # the program counts as one that is inside already


def _devices():
    """The devices that the process uses; asking for a pool elsewhere would start a context there."""
    if _devices_here == 1:
        return (0,)
    current = _torch_c._cuda_getDevice()
    used = _torch_c._cuda_hasPrimaryContext
    return [current] + [d for d in range(_devices_here) if d != current and used(d)]


def _make_room(devices, now):
    """While a thread records into a pool, PyTorch does not give the cached blocks of the others back
    when memory runs out: it raises. So they are given back before, where they could be missed."""
    global _room_at
    _room_at = now + _ROOM_INTERVAL
    for device in devices:
        stats = _torch_c._cuda_memoryStats(device)
        cached = _bytes(stats, "reserved_bytes") - _bytes(stats, "allocated_bytes")
        if cached >= _ROOM_LEAST and cached >= _cuda.mem_get_info(device)[0] // _ROOM_SHARE:
            _cuda.empty_cache()
            return


def _make_pool(device, home):
    if device == _torch_c._cuda_getDevice():
        return _Pool(_cuda.MemPool(), device, home)
    with _cuda.device(device):
        return _Pool(_cuda.MemPool(), device, home)


# --- What is free in the pools.


def _segments(pool_id):
    # Each snapshot of PyTorch 2.11 drops a reference to each argument too many.
    for argument in (*pool_id, not _snapshot_options):
        _hold(argument)
    return _cuda.memory_snapshot(pool_id, **_snapshot_options)


def _look_at(pools):
    if _is_capturing():
        return
    for pool in pools:
        home = pool.home
        quiet = home.visits < _LOOK_VISITS
        home.visits, home.look_at = 0, _now() + _LOOK_INTERVAL
        if quiet:
            _look(pool)
    if _given_up:
        _empty_given_up()


def _look(pool):
    """Gives a pool up if much of it is free."""
    try:
        pool.home.idle.remove(pool)  # no thread enters it meanwhile
    except ValueError:
        return
    if not _guarded(_give_up, pool):
        pool.home.idle.append(pool)


def _give_up(pool):
    free = stranded = 0
    for segment in _segments(pool.id):
        if segment["active_size"] == 0:
            free += segment["total_size"]
        else:
            stranded += segment["total_size"] - segment["active_size"]
    if free < _GIVE_UP_LEAST or free < _GIVE_UP_GAIN * stranded or pool.memory.use_count() != 1:
        return False
    # Its destructor would do this and more, and ends the process where a thread records into any pool.
    _kept.append(pool.memory)
    _release_pool(pool.device, pool.id)
    _given_up.append((pool.home.tag, pool.id))
    return True


def _empty_given_up():
    """Has PyTorch give back what is free in pools that nobody can enter any more, and nothing else: before
    2.13 that is all it gives back while a thread records into a pool."""
    global _emptying, _exact
    if _emptying or not _exact:
        return
    _emptying = True
    device = _torch_c._cuda_getDevice()
    synchronized = _times_synchronized(device)
    entered = []
    try:
        for device in _devices():
            if device not in _guards:
                _guards[device] = _make_pool(device, None)
            _begin_pool(device, _guards[device].id)
            entered.append(device)
        _relaxed(_real_empty_cache)
    finally:
        for device in entered:
            _end_pool(device, _guards[device].id)
            _release_pool(device, _guards[device].id)
        _emptying = False
    if _times_synchronized(entered[0]) != synchronized:
        _exact = False  # it gave back everything: a build that says another version than it is
    _given_up[:] = [each for each in _given_up if _segments(each[1])]


def _times_synchronized(device):
    """How often PyTorch has waited for all streams, as it does before it gives back everything."""
    return _torch_c._cuda_memoryStats(device).get("num_sync_all_streams")


def _is_exact(version):
    try:
        return tuple(int(part) for part in str(version).split(".")[:2]) < (2, 13)
    except ValueError:
        return False


def _bytes(stats, name):
    return stats[name]["all"]["current"]


def _look_at_all():
    for home in list(_homes.values()):
        for pool in list(home.idle):
            _look(pool)


def give_back():
    """Before a sleep from outside, on a thread of the library: what PyTorch caches is of no use while the program waits."""
    cuda = sys.modules.get("torch.cuda")
    if cuda is not None and cuda.is_initialized():
        _relaxed(cuda.empty_cache)


def unused():
    """The blocks that are free in pools which no thread is in, a line each: tag, address, bytes."""
    if _cuda is None:
        return ""
    pools = [(home.tag, pool.id) for home in list(_homes.values()) for pool in list(home.idle)]
    lines = []
    for tag, pool_id in pools + list(_given_up):
        _add_unused(tag, _segments(pool_id), lines)
    return "\n".join(lines)


def _add_unused(tag, segments, lines):
    for segment in segments:
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                lines.append(f"{tag} {address} {block['size']}")
            address += block["size"]


# --- What the program calls.


def _wrap_graphs(cuda):
    """A graph's capture has a pool of its own, which must not come after ours."""
    graph = cuda.CUDAGraph
    # From 2.14 on, capture_end calls this one, and so may a program.
    end = "capture_end_pre" if hasattr(graph, "capture_end_pre") else "capture_end"
    real_begin, real_end = graph.capture_begin, getattr(graph, end)
    if hasattr(real_begin, "__wrapped__"):
        return

    def capture_begin(self, *args, **kwargs):
        state = _states.setdefault(_get_ident(), _State())
        _guarded(_leave, state)
        state.captures += 1
        _begin_none(None)  # what is allocated before the capture begins is in no pool of the graph's
        try:
            return real_begin(self, *args, **kwargs)
        except BaseException:
            _capture_ended(state)
            raise
        finally:
            _end_none(None)

    def capture_end(self, *args, **kwargs):
        try:
            return real_end(self, *args, **kwargs)
        finally:
            state = _states.get(_get_ident())
            if state is not None and state.captures:
                _capture_ended(state)

    graph.capture_begin = _dressed(capture_begin, real_begin)
    setattr(graph, end, _dressed(capture_end, real_end))


def _capture_ended(state):
    state.captures -= 1
    _guarded(_settle_again, state)


def _settle_again(state):
    tag = state.wanted[-1] if state.wanted else None
    if tag != state.tag and not state.captures:
        _settle(state, tag)


def _wrap_empty_cache(torch_c):
    """What the program asks PyTorch to give back includes what is free in the pools; and while a thread
    records into one, PyTorch would not give back anything."""
    global _real_empty_cache
    for name in ("_cuda_emptyCache", "_accelerator_emptyCache"):
        real = getattr(torch_c, name, None)
        if real is not None and not hasattr(real, "__wrapped__"):
            setattr(torch_c, name, _dressed(_empty_cache(real), real))
    _real_empty_cache = torch_c._cuda_emptyCache.__wrapped__


def _empty_cache(real):
    def empty_cache():
        state = _states.get(_get_ident())
        inside = state is not None and state.entered
        if inside:
            _guarded(_leave, state)
        try:
            if _cuda is not None:
                _guarded(_look_at_all)
            return real()
        finally:
            if inside:
                _guarded(_settle_again, state)

    return empty_cache


def _wrap_mem_pool(mem_pool):
    """Up to 2.12, destroying a pool while any thread records into any ends the process. The program knows
    of its own pools, but not of ours."""
    if hasattr(mem_pool, "__del__"):
        return
    mem_pool.__del__ = lambda self: _postponed.append(self) if _any_entered() else None
    real_init = mem_pool.__init__

    def __init__(self, allocator=None, *args, **kwargs):
        real_init(self, allocator, *args, **kwargs)
        if allocator is not None:
            _with_allocators.add(tuple(self.id))

    mem_pool.__init__ = _dressed(__init__, real_init)


def _wrap_use_mem_pool(memory):
    """Which pools of the program a thread is in. Those with an allocator of their own stay, since it is to be asked."""
    real_begin, real_end = memory._cuda_beginAllocateCurrentThreadToPool, memory._cuda_endAllocateToPool
    if hasattr(real_begin, "__wrapped__"):
        return

    def begin_pool(device, pool_id):
        real_begin(device, pool_id)
        if tuple(pool_id) not in _with_allocators:
            state = _states.setdefault(_get_ident(), _State())
            state.own.append((device, tuple(pool_id)))
            if state.entered:
                _step_aside(state)

    def end_pool(device, pool_id):
        state, pool = _states.get(_get_ident()), (device, tuple(pool_id))
        if state is not None and pool in state.own:
            state.own.remove(pool)
            if pool in state.aside:  # and the region goes on
                state.aside.remove(pool)
                return
        real_end(device, pool_id)

    memory._cuda_beginAllocateCurrentThreadToPool = _dressed(begin_pool, real_begin)
    memory._cuda_endAllocateToPool = _dressed(end_pool, real_end)


def _any_entered():
    return _emptying or any(state.entered for state in list(_states.values()))


def _destroy_postponed():
    if not _any_entered():
        del _postponed[:]


def _guarded(function, *args):
    """For calls that come from the program: what goes wrong here is not the program's."""
    try:
        return function(*args)
    except Exception as error:
        _report(str(error))


# --- Before PyTorch is there.


def _wait(cuda):
    """Enters the pools as soon as CUDA is initialised, on the thread that does it. Threads that are
    inside a region at that time follow at their next begin or end: a pool takes in its own thread."""
    global _waiting
    if _waiting:
        return
    _waiting = True
    if cuda is None:
        sys.meta_path.insert(0, _torch_finder)
    else:
        cuda._lazy_call(_cuda_initialised)


def _cuda_initialised():
    _guarded(_find_cuda, True)
    state = _states.get(_get_ident())
    if state is not None:
        _guarded(_settle_again, state)


def _torch_imported(_, torch_cuda):
    sys.meta_path.remove(_torch_finder)
    _look_again(None)
    torch_cuda._lazy_call(_cuda_initialised)


_torch_finder = _Finder(lambda name: name == "torch.cuda", lambda *found: _guarded(_torch_imported, *found))
