// The preloaded dlsym: hands out wrappers for functions of libcuda that programs look up by name.
// Called by everything in the process, also while other threads load libraries: no lock of ours, no
// allocation, no logging in here.
//
// The dlsym that the caller would have reached decides; its result is replaced only when the name
// is in the table and the result lies in the libcuda that the process uses. A
// library behind us that defines the function itself looks for what is behind itself, and gets it:
// so does a libcuda that only loads another one (WSL2). RTLD_NEXT and RTLD_DEFAULT mean something
// relative to the caller, which the real dlsym recognises by its return address, so these, and
// every name that is not in the table, are jumped to rather than called: the trampoline below
// leaves the caller's return address where it was.
#include <dlfcn.h>
#include <link.h>

#include <cstring>

#include "shim/hooks/hooks.h"
#include "shim/hooks/real.h"
#include "shim/hooks/unknown.h"
#include "shim/process/linker.h"
#include "shim/process/settings.h"

namespace dormouse::shim {
namespace {

// What the program gets for `found`, the real result for the row's name.
void* replacement(void* found, const HookRow& row, const char* name) noexcept {
  link_map* object = object_of(found);
  if (object == nullptr) return found;
  // A dlsym behind us may have handed out its own library's function: what our wrapper calls.
  return object == libcuda() || found == next_function(name) ? row.wrapper : found;
}

// Whether a lookup in the order of `caller` would find the function if this library were not there.
// Leaves dlerror() set if not.
bool exists_beside_us(const HookRow& row, const char* name, const void* caller,
                      void* handle) noexcept {
  link_map* object = object_of(caller);
  if (object != nullptr && object->l_name[0] != '\0') {  // the caller's own dependencies
    const void* found = symbol_of(object, name);
    const bool next = handle == RTLD_NEXT;  // does not begin with the caller
    if (found != nullptr && found != row.wrapper && !(next && object_of(found) == object)) {
      return true;
    }
  }
  if (handle != RTLD_NEXT && real_dlsym(RTLD_DEFAULT, name) != row.wrapper) return true;
  return real_dlsym(RTLD_NEXT, name) != nullptr;  // the global order behind us
}

// A program that has loaded CPython for itself alone begins to use it.
bool starts_python(void* handle, const char* name) noexcept {
  return handle != RTLD_NEXT && handle != RTLD_DEFAULT && name != nullptr &&
         std::strncmp(name, "Py_Init", 7) == 0;
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
  const Dlsym function = next_dlsym(caller);
  HookRow row;
  program_looks_up(name, caller);
  if (function != nullptr && starts_python(handle, name)) {
    void* found = function(handle, name);
    if (found != nullptr) python_is_at(found);
    return {nullptr, found};
  }
  if (function == nullptr || name == nullptr || name[0] != 'c' || name[1] != 'u') {
    return {function, nullptr};
  }
  if (!find_hook(name, &row)) {
    if (active()) unknown::asked_for(name);
    return {function, nullptr};
  }
  if (handle == RTLD_NEXT || handle == RTLD_DEFAULT) {
    // Both can find this library's own wrapper, which is right only if there is something to wrap.
    return exists_beside_us(row, name, caller, handle) ? Route{function, nullptr}
                                                       : Route{nullptr, nullptr};
  }
  const bool as_without = !active() || is_defined_by_caller(name, caller);
  void* found = function(handle, name);
  if (found == row.wrapper) {
    if (as_without && active()) return {nullptr, real_dlsym(RTLD_NEXT, name)};
    if (!exists_beside_us(row, name, caller, handle)) return {nullptr, nullptr};
    dlerror();
    return {nullptr, found};
  }
  if (found == nullptr || as_without) return {nullptr, found};
  void* answer = replacement(found, row, name);
  dlerror();  // what was looked up meanwhile was none of the program's
  return {nullptr, answer};
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
