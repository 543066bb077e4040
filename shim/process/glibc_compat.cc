// Functions of newer C libraries that the statically linked parts of the library ask for, so that
// it loads with glibc 2.34. Nobody calls them by hand.
#include <dlfcn.h>
#include <features.h>
#include <link.h>
#include <stdlib.h>
#include <sys/random.h>

#include <cstdint>

#if __GLIBC_PREREQ(2, 35)

namespace {

struct Search {
  std::uintptr_t address;
  dl_find_object* result;
};

int look_at(dl_phdr_info* info, std::size_t, void* argument) {
  const auto& search = *static_cast<const Search*>(argument);
  bool contains = false;
  const ElfW(Phdr)* frames = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& header = info->dlpi_phdr[i];
    const std::uintptr_t begin = info->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_GNU_EH_FRAME) frames = &header;
    if (header.p_type != PT_LOAD || search.address - begin >= header.p_memsz) continue;
    contains = true;
    search.result->dlfo_map_start = reinterpret_cast<void*>(begin);
    search.result->dlfo_map_end = reinterpret_cast<void*>(begin + header.p_memsz);
  }
  if (!contains || frames == nullptr) return 0;
  search.result->dlfo_flags = 0;
  search.result->dlfo_link_map = nullptr;  // the unwinder does not read it
  search.result->dlfo_eh_frame = reinterpret_cast<void*>(info->dlpi_addr + frames->p_vaddr);
  return 1;
}

}  // namespace

// Since glibc 2.35, and called by the unwinder of a GCC that was built with it.
extern "C" __attribute__((visibility("hidden"))) int _dl_find_object(
    void* address, dl_find_object* result) noexcept {
  Search search{reinterpret_cast<std::uintptr_t>(address), result};
  return dl_iterate_phdr(&look_at, &search) == 1 ? 0 : -1;
}

#endif

#if __GLIBC_PREREQ(2, 36)

// Since glibc 2.36, and called by std::random_device.
extern "C" __attribute__((visibility("hidden"))) __uint32_t arc4random() noexcept {
  __uint32_t value = 0;
  // Blocks only while the kernel has not gathered its first randomness; short only on a signal.
  while (getrandom(&value, sizeof(value), 0) != sizeof(value)) {
  }
  return value;
}

#endif
