// The preloaded dlsym: hands out wrappers for functions of libcuda and libcudart that programs look
// up by name. Called by everything in the process, also while other threads load libraries: no lock
// of ours, no allocation, no logging in here.
//
// The real dlsym decides; its result is replaced only when the name is in the table and the result
// lies in a libcuda or libcudart. RTLD_NEXT and RTLD_DEFAULT mean something relative to the caller,
// which the real dlsym recognises by its return address, so these, and every name that is not in
// the table, are jumped to rather than called: the trampoline below leaves the caller's return
// address where it was.
#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstring>

#include "shim/hooks/hooks.h"
#include "shim/hooks/real.h"
#include "shim/hooks/unknown.h"
#include "shim/process/linker.h"
#include "shim/process/settings.h"

namespace dormouse::shim {
namespace {

bool lies_in(const Dl_info& info, const char* library) noexcept {
  if (info.dli_fname == nullptr) return false;
  const char* slash = std::strrchr(info.dli_fname, '/');
  const char* file = slash != nullptr ? slash + 1 : info.dli_fname;
  return std::strncmp(file, library, std::strlen(library)) == 0;
}

// What the program gets for `found`, the real result for the row's name.
void* replacement(void* found, const HookRow& row) noexcept {
  Dl_info info{};
  if (dladdr(found, &info) == 0) return found;
  if (row.level == Level::driver) return lies_in(info, "libcuda.so") ? row.wrapper : found;
  return lies_in(info, "libcudart") && adopt_cudart(info.dli_fbase) ? row.wrapper : found;
}

// Whether a lookup in the order of `caller` would find the function if this library were not there.
// Leaves dlerror() set if not.
bool exists_beside_us(const HookRow& row, const char* name, const void* caller) noexcept {
  if (real_dlsym(RTLD_NEXT, name) != nullptr) return true;  // the global order behind us
  Dl_info info{};
  struct link_map* map = nullptr;  // glibc's handles are link maps
  if (dladdr1(caller, &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP) == 0) return false;
  if (map == nullptr || map->l_name[0] == '\0') return false;
  void* found = real_dlsym(map, name);  // the caller's own dependencies
  return found != nullptr && found != row.wrapper;
}

}  // namespace

struct Route {
  void* (*jump)(void*, const char*);  // where to go on, arguments and return address untouched; or
  void* answer;                       // with null above: what to return
};

}  // namespace dormouse::shim

extern "C" __attribute__((visibility("hidden"), used)) dormouse::shim::Route dormouse_route_dlsym(
    void* handle, const char* name, const void* caller) noexcept {
  using namespace dormouse::shim;
  const Dlsym function = libc_dlsym();
  HookRow row;
  if (function == nullptr || name == nullptr || name[0] != 'c' || name[1] != 'u' || !active()) {
    return {function, nullptr};
  }
  if (!find_hook(name, &row)) {
    unknown::asked_for(name);
    return {function, nullptr};
  }
  if (handle == RTLD_NEXT || handle == RTLD_DEFAULT) {
    // Both can find this library's own wrapper, which is right only if there is something to wrap.
    return exists_beside_us(row, name, caller) ? Route{function, nullptr} : Route{nullptr, nullptr};
  }
  void* found = function(handle, name);
  if (found == row.wrapper && !exists_beside_us(row, name, caller)) return {nullptr, nullptr};
  return {nullptr, found == nullptr ? nullptr : replacement(found, row)};
}

// dlsym(handle, name): asks dormouse_route_dlsym(handle, name, return address), then either jumps
// on with its own arguments or returns the answer.
#if defined(__x86_64__)
asm(R"(
  .text
  .globl dlsym
  .type dlsym, @function
dlsym:
  .cfi_startproc
  endbr64
  pushq %rdi
  .cfi_adjust_cfa_offset 8
  pushq %rsi
  .cfi_adjust_cfa_offset 8
  subq $8, %rsp
  .cfi_adjust_cfa_offset 8
  movq 24(%rsp), %rdx
  call dormouse_route_dlsym
  addq $8, %rsp
  .cfi_adjust_cfa_offset -8
  popq %rsi
  .cfi_adjust_cfa_offset -8
  popq %rdi
  .cfi_adjust_cfa_offset -8
  testq %rax, %rax
  je 1f
  jmp *%rax
1:
  movq %rdx, %rax
  ret
  .cfi_endproc
  .size dlsym, .-dlsym
)");
#elif defined(__aarch64__)
asm(R"(
  .text
  .globl dlsym
  .type dlsym, %function
dlsym:
  .cfi_startproc
  hint #34
  stp x29, x30, [sp, #-32]!
  .cfi_def_cfa_offset 32
  .cfi_offset x29, -32
  .cfi_offset x30, -24
  mov x29, sp
  stp x0, x1, [sp, #16]
  mov x2, x30
  bl dormouse_route_dlsym
  mov x16, x0
  mov x17, x1
  ldp x0, x1, [sp, #16]
  ldp x29, x30, [sp], #32
  .cfi_restore x29
  .cfi_restore x30
  .cfi_def_cfa_offset 0
  cbz x16, 1f
  br x16
1:
  mov x0, x17
  ret
  .cfi_endproc
  .size dlsym, .-dlsym
)");
#else
#error "dlsym's trampoline is written for x86-64 and AArch64"
#endif
