// The program's own mappings as chunks of a tag's pool; see mapped_memory.h for what is promised.
#include "core/memory/mapped_memory.h"

#include <algorithm>
#include <iterator>
#include <new>
#include <set>
#include <utility>

#include "core/log.h"
#include "core/memory/block_info.h"
#include "core/memory/pool.h"

namespace dormouse {
namespace {

// What the driver answers when the host's memory is gone.
template <typename Call>
CUresult unless_out_of_memory(Call&& call) noexcept {
  try {
    return call();
  } catch (const std::exception& error) {
    log().error("memory that the program maps: a call failed inside Dormouse: {}", error.what());
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
}

}  // namespace

MappedMemory::MappedMemory(PoolsOwner& engine, const Driver& driver)
    : engine_(engine), driver_(driver) {}

// The engine of a process is never destroyed, and the pools' chunks go with the pools.
MappedMemory::~MappedMemory() = default;

// --- Lookups

MappedMemory::Handle* MappedMemory::known(CUmemGenericAllocationHandle name) const noexcept {
  const auto at = handles_.find(name);
  return at == handles_.end() ? nullptr : at->second.get();
}

// The first that ends behind `address`.
MappedMemory::Mappings::iterator MappedMemory::first_after(CUdeviceptr address) noexcept {
  auto at = mappings_.upper_bound(address);
  if (at != mappings_.begin() && std::prev(at)->second.end() > address) --at;
  return at;
}

MappedMemory::Mapping* MappedMemory::mapping_at(CUdeviceptr address) noexcept {
  const auto at = first_after(address);
  return at == mappings_.end() || at->first > address ? nullptr : &at->second;
}

std::vector<MappedMemory::Mapping*> MappedMemory::mappings_in(CUdeviceptr address,
                                                              std::size_t bytes) {
  std::vector<Mapping*> found;
  for (auto at = first_after(address); at != mappings_.end() && at->first < end_of(address, bytes);
       ++at) {
    found.push_back(&at->second);
  }
  return found;
}

// With the engine's transition lock: nothing is on its way.
bool MappedMemory::asleep(const Mapping& mapping) {
  return mapping.chunk != nullptr && mapping.pool->state_of(*mapping.chunk) == ChunkState::kAsleep;
}

// The same. A wake that failed can leave what sleeps mapped.
bool MappedMemory::mapped_by_driver(const Mapping& mapping) {
  return mapping.chunk == nullptr || mapping.chunk->handle != 0;
}

bool MappedMemory::writable(const Mapping& mapping,
                            const std::vector<CUmemAccessDesc>& access) noexcept {
  return std::any_of(access.begin(), access.end(), [&](const CUmemAccessDesc& each) {
    return same(each.location, mapping.properties.location) &&
           each.flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  });
}

bool MappedMemory::whole_in(const Mapping& mapping, CUdeviceptr address,
                            std::size_t bytes) noexcept {
  return mapping.address >= address && mapping.bytes <= bytes &&
         mapping.address - address <= bytes - mapping.bytes;
}

// --- Handles

CUresult MappedMemory::create(TagId tag, CUmemGenericAllocationHandle* handle, std::size_t bytes,
                              const CUmemAllocationProp* properties,
                              unsigned long long flags) noexcept {
  if (handle == nullptr || properties == nullptr ||
      properties->type != CU_MEM_ALLOCATION_TYPE_PINNED ||
      properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE || flags != 0) {
    return driver_.cuMemCreate(handle, bytes, properties, flags);
  }
  return unless_out_of_memory([&] {
    auto made = std::make_unique<Handle>();
    made->tag = tag;
    made->bytes = bytes;
    made->properties = *properties;
    MutexLock lock(mutex_);
    // What may run out of host memory comes before there is device memory to lose.
    const auto at = handles_.emplace(made->name(), nullptr).first;
    const CUresult result = create_real(*made);
    if (result != CUDA_SUCCESS) {
      handles_.erase(at);
      return result;
    }
    *handle = made->name();
    at->second = std::move(made);
    count_.fetch_add(1, std::memory_order_release);
    return CUDA_SUCCESS;
  });
}

CUresult MappedMemory::create_real(Handle& handle) {
  const CUresult result = driver_.cuMemCreate(&handle.real, handle.bytes, &handle.properties, 0);
  if (result != CUDA_SUCCESS) handle.real = 0;
  return result;
}

CUresult MappedMemory::release(CUmemGenericAllocationHandle name) noexcept {
  MutexLock lock(mutex_);
  Handle* handle = known(name);
  if (handle == nullptr) {
    lock.unlock();
    return driver_.cuMemRelease(name);
  }
  if (handle->references == 0) return CUDA_ERROR_INVALID_VALUE;
  if (handle->references == 1 && handle->mappings == 0 && handle->real != 0) {
    const CUresult result = driver_.cuMemRelease(handle->real);
    if (result != CUDA_SUCCESS) return result;
    handle->real = 0;
  }
  --handle->references;
  forget_if_gone(*handle);
  return CUDA_SUCCESS;
}

void MappedMemory::forget_if_gone(Handle& handle) noexcept {
  if (handle.references != 0 || handle.mappings != 0) return;
  if (handle.real != 0) {
    const CUresult result = give_back([&] { return driver_.cuMemRelease(handle.real); });
    if (result != CUDA_SUCCESS) {
      log().error(
          "cuMemRelease of {} bytes that the program mapped failed with {}: this memory is lost "
          "until the process ends",
          handle.bytes, error_name(driver_, result));
    }
  }
  handles_.erase(handle.name());
  count_.fetch_sub(1, std::memory_order_release);
}

// --- Mappings

CUresult MappedMemory::map(CUdeviceptr address, std::size_t bytes, std::size_t offset,
                           CUmemGenericAllocationHandle name, unsigned long long flags) noexcept {
  return unless_out_of_memory([&] {
    Transition transition = engine_.begin_transition();
    MutexLock lock(mutex_);
    const std::vector<Mapping*> there = mappings_in(address, bytes);
    // The driver would not see what is mapped there in its sleep.
    if (std::any_of(there.begin(), there.end(),
                    [](const Mapping* each) { return asleep(*each); })) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    if (Handle* handle = known(name)) {
      // What the driver would refuse must change nothing.
      if (handle->references == 0 || !there.empty()) return CUDA_ERROR_INVALID_VALUE;
      return map_locked(address, bytes, offset, *handle, flags, transition);
    }
    lock.unlock();
    transition.unlock();
    return driver_.cuMemMap(address, bytes, offset, name, flags);
  });
}

CUresult MappedMemory::map_locked(CUdeviceptr address, std::size_t bytes, std::size_t offset,
                                  Handle& handle, unsigned long long flags,
                                  const Transition& transition) {
  if (handle.mappings != 0 || offset != 0 || bytes != handle.bytes) {
    const CUresult result = share_locked(handle, Holder::kMappings, transition);
    if (result != CUDA_SUCCESS) return result;
  }
  const auto at = mappings_.try_emplace(address).first;
  const bool sleeps = handle.real == 0;
  CUresult result = CUDA_SUCCESS;
  if (sleeps) {
    result = create_real(handle);
    if (result == CUDA_ERROR_OUT_OF_MEMORY &&
        engine_.release_retained(handle.properties.location.id)) {
      result = create_real(handle);
    }
  }
  if (result == CUDA_SUCCESS) {
    result = driver_.cuMemMap(address, bytes, offset, handle.real, flags);
    if (result != CUDA_SUCCESS && sleeps) {
      give_back([&] { return driver_.cuMemRelease(handle.real); });
      handle.real = 0;
    }
  }
  if (result != CUDA_SUCCESS) {
    mappings_.erase(at);
    return result;
  }
  Mapping& mapping = at->second;
  mapping.address = address;
  mapping.bytes = bytes;
  mapping.properties = handle.properties;
  mapping.of = &handle;
  ++handle.mappings;
  return CUDA_SUCCESS;
}

CUresult MappedMemory::unmap(CUdeviceptr address, std::size_t bytes) noexcept {
  return unless_out_of_memory([&] {
    Transition transition = engine_.begin_transition();
    MutexLock lock(mutex_);
    const std::vector<Mapping*> mappings = mappings_in(address, bytes);
    if (!mappings.empty()) return unmap_locked(address, bytes, mappings, transition);
    lock.unlock();
    transition.unlock();
    return driver_.cuMemUnmap(address, bytes);
  });
}

// The driver unmaps what is mapped, stretch by stretch between what sleeps; that only loses its
// address, last of all.
CUresult MappedMemory::unmap_locked(CUdeviceptr address, std::size_t bytes,
                                    const std::vector<Mapping*>& mappings,
                                    const Transition& transition) {
  const auto sleeps = [](const Mapping* each) { return !mapped_by_driver(*each); };
  const bool whole = std::all_of(mappings.begin(), mappings.end(), [&](const Mapping* each) {
    return whole_in(*each, address, bytes);
  });
  if (!whole) {
    const bool any = std::any_of(mappings.begin(), mappings.end(), sleeps);
    return any ? CUDA_ERROR_INVALID_VALUE : driver_.cuMemUnmap(address, bytes);
  }
  std::vector<Mapping*> sleeping;
  std::copy_if(mappings.begin(), mappings.end(), std::back_inserter(sleeping), sleeps);
  CUdeviceptr at = address;
  auto first = mappings.begin();  // of those from `at` on
  for (std::size_t i = 0; i <= sleeping.size(); ++i) {
    const CUdeviceptr end = i < sleeping.size() ? sleeping[i]->address : address + bytes;
    const CUresult result = at < end ? driver_.cuMemUnmap(at, end - at) : CUDA_SUCCESS;
    if (result != CUDA_SUCCESS) return result;
    for (; first != mappings.end() && (i == sleeping.size() || *first != sleeping[i]); ++first)
      forget(**first, transition);
    if (i == sleeping.size()) break;
    at = sleeping[i]->end();
    ++first;
  }
  for (Mapping* each : sleeping) forget(*each, transition);
  return CUDA_SUCCESS;
}

// Its address is the program's again. What slept is kept while the program has the handle.
void MappedMemory::forget(Mapping& mapping, const Transition& transition) noexcept {
  Handle& handle = *mapping.of;
  if (mapping.chunk != nullptr) {
    std::unique_ptr<Chunk> chunk = take_back(mapping);
    if (chunk->state == ChunkState::kAsleep && handle.references != 0) {
      handle.parked = std::move(chunk);
    }
  }
  --handle.mappings;
  mappings_.erase(mapping.address);
  forget_if_gone(handle);
  engine_.chunk_left(transition);
}

// The chunk leaves its pool as it is; a handle that it has is the program's again.
std::unique_ptr<Chunk> MappedMemory::take_back(Mapping& mapping) noexcept {
  std::unique_ptr<Chunk> chunk = mapping.pool->disown(*mapping.chunk);
  mapping.of->real = std::exchange(chunk->handle, 0);
  chunk->program = nullptr;
  mapping.chunk = nullptr;
  mapping.pool = nullptr;
  return chunk;
}

CUresult MappedMemory::set_access(CUdeviceptr address, std::size_t bytes,
                                  const CUmemAccessDesc* access, std::size_t count) noexcept {
  return unless_out_of_memory([&] {
    Transition transition = engine_.begin_transition();
    MutexLock lock(mutex_);
    const std::vector<Mapping*> mappings = mappings_in(address, bytes);
    if (!mappings.empty() && access != nullptr) {
      return set_access_locked(address, bytes, access, count, mappings, transition);
    }
    lock.unlock();
    transition.unlock();
    return driver_.cuMemSetAccess(address, bytes, access, count);
  });
}

CUresult MappedMemory::set_access_locked(CUdeviceptr address, std::size_t bytes,
                                         const CUmemAccessDesc* access, std::size_t count,
                                         const std::vector<Mapping*>& mappings,
                                         const Transition& transition) {
  // The driver knows only what is awake.
  for (Mapping* mapping : mappings) {
    CUresult result = asleep(*mapping) ? wake(*mapping, transition) : CUDA_SUCCESS;
    if (mapping->of->parked != nullptr) result = wake_parked(*mapping, transition);
    if (result != CUDA_SUCCESS) return result;
  }
  std::vector<std::vector<CUmemAccessDesc>> merged;
  for (const Mapping* mapping : mappings) {
    merged.push_back(mapping->access);
    for (std::size_t i = 0; i < count; ++i) {
      const auto at = std::find_if(
          merged.back().begin(), merged.back().end(),
          [&](const CUmemAccessDesc& known) { return same(known.location, access[i].location); });
      at == merged.back().end() ? merged.back().push_back(access[i]) : (void)(*at = access[i]);
    }
  }
  CUresult result = driver_.cuMemSetAccess(address, bytes, access, count);
  if (result != CUDA_SUCCESS) return result;
  for (std::size_t i = 0; i < mappings.size(); ++i) {
    Mapping& mapping = *mappings[i];
    if (!whole_in(mapping, address, bytes)) {
      result = share_locked(*mapping.of, Holder::kAccess, transition);
      if (result != CUDA_SUCCESS) return result;
      continue;
    }
    mapping.access = std::move(merged[i]);
    const bool may_sleep = writable(mapping, mapping.access);
    if (mapping.chunk != nullptr && !may_sleep) {
      result = share_locked(*mapping.of, Holder::kAccess, transition);
    } else if (mapping.chunk == nullptr && may_sleep && mapping.of->held == Holder::kNobody) {
      result = adopt(mapping, transition);
    }
    if (result != CUDA_SUCCESS) return result;
  }
  return CUDA_SUCCESS;
}

// --- Between the program and the pool

// What slept when the program unmapped it is woken at its new place. Its device needs access for
// that, and keeps it unless the program says otherwise.
CUresult MappedMemory::wake_parked(Mapping& mapping, const Transition& transition) {
  CUmemAccessDesc own{};
  own.location = mapping.properties.location;
  own.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  mapping.access.assign(1, own);
  const CUresult result = driver_.cuMemSetAccess(mapping.address, mapping.bytes, &own, 1);
  return result == CUDA_SUCCESS ? adopt(mapping, transition) : result;
}

// The mapping becomes a chunk of the tag's pool. What slept unmapped is woken there.
CUresult MappedMemory::adopt(Mapping& mapping, const Transition& transition) {
  Handle& handle = *mapping.of;
  CUcontext context = nullptr;
  CUdevice device = -1;
  if (driver_.cuCtxGetCurrent(&context) != CUDA_SUCCESS || context == nullptr ||
      driver_.cuCtxGetDevice(&device) != CUDA_SUCCESS || device != mapping.properties.location.id) {
    context = nullptr;
  }
  CUresult result = CUDA_SUCCESS;
  Pool* pool = engine_.pool_for(handle.tag, mapping.properties.location.id, &result);
  const bool sleeps = handle.parked != nullptr;
  if (pool == nullptr || (!engine_.has_context(pool->options().ordinal))) {
    // Nothing could be copied. It is tried again before a sleep; what sleeps has to wait.
    return sleeps ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
  }
  auto chunk = sleeps ? std::move(handle.parked) : std::make_unique<Chunk>();
  chunk->address = mapping.address;
  chunk->bytes = mapping.bytes;
  chunk->program = &mapping;
  chunk->handle = std::exchange(handle.real, 0);
  if (chunk->disk_image != nullptr) chunk->disk_image->move_to(mapping.address);
  try {
    mapping.chunk = pool->adopt(chunk, context);
  } catch (...) {
    handle.real = std::exchange(chunk->handle, 0);
    if (sleeps) handle.parked = std::move(chunk);
    throw;
  }
  mapping.pool = pool;
  return sleeps ? wake(mapping, transition) : CUDA_SUCCESS;
}

void MappedMemory::adopt_rest(const Transition& transition) noexcept {
  if (!any()) return;
  MutexLock lock(mutex_);
  for (auto& [address, mapping] : mappings_) {
    if (mapping.chunk != nullptr || mapping.of->held != Holder::kNobody ||
        mapping.of->parked != nullptr)
      continue;
    if (!writable(mapping, mapping.access)) continue;
    try {
      (void)adopt(mapping, transition);
    } catch (const std::bad_alloc&) {
      // It stays awake.
    }
  }
}

CUresult MappedMemory::wake(Mapping& mapping, const Transition& transition) {
  const Status status = engine_.wake_chunk(transition, *mapping.pool, *mapping.chunk);
  if (status.is_ok()) return CUDA_SUCCESS;
  log().error("memory that the program maps is asleep and could not be woken: {}",
              status.message());
  return status.driver() != CUDA_SUCCESS ? status.driver() : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult MappedMemory::share_locked(Handle& handle, Holder by, const Transition& transition) {
  if (handle.parked != nullptr) {
    log().error("the program shares memory that it unmapped in its sleep ({}): map it first",
                holder_name(by));
    return CUDA_ERROR_INVALID_VALUE;
  }
  CUresult listed = CUDA_SUCCESS;  // its pool's figures tell of it
  if (engine_.pool_for(handle.tag, handle.properties.location.id, &listed) == nullptr)
    return listed;
  for (auto& [address, mapping] : mappings_) {
    if (mapping.of != &handle || mapping.chunk == nullptr) continue;
    const CUresult result = asleep(mapping) ? wake(mapping, transition) : CUDA_SUCCESS;
    if (result != CUDA_SUCCESS) return result;
    take_back(mapping).reset();
  }
  if (handle.held == Holder::kNobody) engine_.say_held(by, handle.bytes);
  if (by != Holder::kProgram || handle.held == Holder::kNobody) handle.held = by;
  return CUDA_SUCCESS;
}

CUresult MappedMemory::share(CUmemGenericAllocationHandle name, Holder by,
                             CUmemGenericAllocationHandle* real) noexcept {
  if (real != nullptr) *real = name;
  if (!any()) return CUDA_SUCCESS;
  return unless_out_of_memory([&] {
    const Transition transition = engine_.begin_transition();
    MutexLock lock(mutex_);
    Handle* handle = known(name);
    const CUresult result =
        handle == nullptr ? CUDA_SUCCESS : share_locked(*handle, by, transition);
    if (result == CUDA_SUCCESS && handle != nullptr && real != nullptr) *real = handle->real;
    return result;
  });
}

CUresult MappedMemory::share_range(CUdeviceptr address, std::size_t bytes, Holder by) noexcept {
  if (!any()) return CUDA_SUCCESS;
  return unless_out_of_memory([&] {
    const Transition transition = engine_.begin_transition();
    MutexLock lock(mutex_);
    for (Mapping* mapping : mappings_in(address, bytes)) {
      const CUresult result = share_locked(*mapping->of, by, transition);
      if (result != CUDA_SUCCESS) return result;
    }
    return CUDA_SUCCESS;
  });
}

CUresult MappedMemory::keep_awake(CUdeviceptr address, bool on, std::size_t* bytes) noexcept {
  *bytes = 0;
  if (!any()) return CUDA_SUCCESS;
  return unless_out_of_memory([&] {
    const Transition transition = engine_.begin_transition();
    MutexLock lock(mutex_);
    Mapping* mapping = mapping_at(address);
    if (mapping == nullptr) return CUDA_SUCCESS;
    *bytes = mapping->of->bytes;
    if (on) return share_locked(*mapping->of, Holder::kProgram, transition);
    // It joins its pool again before the next sleep.
    if (mapping->of->held == Holder::kProgram) mapping->of->held = Holder::kNobody;
    return CUDA_SUCCESS;
  });
}

}  // namespace dormouse
