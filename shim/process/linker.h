// Asking the dynamic linker: what lies where, and what the process would have without this library.
// Nothing is ever loaded. Below everything else in the shim. No lock of ours and no guarded static
// is held while the linker is asked: initialisers of libraries run under its own lock.
#pragma once

struct link_map;

namespace dormouse::shim {

using Dlsym = void* (*)(void* handle, const char* name);

// libc's own dlsym, also where other preloaded libraries define one. Null where it cannot be found.
Dlsym libc_dlsym() noexcept;

// The same, with this library as the caller.
void* real_dlsym(void* handle, const char* name) noexcept;

// The dlsym that code at `caller` would have called without this library: another preloaded
// library's, else libc's. Null where there is none.
Dlsym next_dlsym(const void* caller) noexcept;

// The library or executable that contains `address`; null if none does.
link_map* object_of(const void* address) noexcept;

// What a lookup that begins with `object` finds, in it or in what it depends on; or null.
void* symbol_of(const link_map* object, const char* name) noexcept;

// The one that this code is in.
link_map* own_object() noexcept;

// Whether the file name of `object`, without its folder, begins with `name`.
bool is_called(const link_map* object, const char* name) noexcept;

// Whether `object` stands before this library in the order in which symbols are looked up.
bool is_in_front(const link_map* object) noexcept;

// The function that callers of `name` would have reached without this library by linking, or null:
// the next one in the global order. Not variables that are called like a function.
void* next_function(const char* name) noexcept;

// Whether `caller` is code of a library behind this one that defines `name` itself. It asks for
// what is behind itself, so that our function, which calls on to it, must not be the answer.
bool is_defined_by_caller(const char* name, const void* caller) noexcept;

// The handle of the libcuda that the process has loaded, or null. Thread-safe.
void* libcuda() noexcept;

// A function that libcuda exports, or null. Thread-safe.
void* libcuda_symbol(const char* name) noexcept;

// What a driver function of this library calls on to: the function of a preloaded library behind
// this one (a limiter of memory), else libcuda's. Null if neither has it.
void* next_driver_function(const char* name) noexcept;

// The program calls dlsym, or CUDA begins.
void program_looks_up(const char* name, const void* caller) noexcept;

// A number that changes when libraries may have been loaded: a lookup that failed need not be
// repeated before. Counts what the program looks up, since nobody can use a library that was loaded
// meanwhile without that: asking the linker itself takes a lock, which a forked child may find held
// for ever. Cheap.
unsigned long long libraries_loaded() noexcept;

// A function or variable of CPython, also where the program has loaded it for itself alone; null if
// there is none. It is found by who looks up extension modules, and by python_is_at().
void* python_symbol(const char* name) noexcept;
void python_is_at(const void* address) noexcept;

}  // namespace dormouse::shim
