// NVTX 3's binary interface, as in its nvtxDetail/nvtxTypes.h, which is frozen: what a tool is
// handed, and the functions that it can fill in. For nvtx.cc.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dormouse::shim::nvtx {

using Pointer = void (*)();
using Domain = void*;  // null: the domain that has no name
using String = void*;  // registered
using RangeId = std::uint64_t;
constexpr int kNotTracked = -2;  // what NVTX returns for a push that nobody follows

enum MessageType : std::int32_t { kNoMessage = 0, kAscii = 1, kUnicode = 2, kRegistered = 3 };

struct EventAttributes {
  std::uint16_t version;
  std::uint16_t size;
  std::uint32_t category;
  std::int32_t color_type;
  std::uint32_t color;
  std::int32_t payload_type;
  std::int32_t reserved;
  std::uint64_t payload;
  std::int32_t message_type;
  union {
    const char* ascii;
    const wchar_t* unicode;
    String registered;
  } message;
};
static_assert(sizeof(EventAttributes) == 48);

struct Callbacks {
  std::size_t struct_size;
  int (*get_module_function_table)(int module, Pointer*** table, unsigned* size);
};
using GetExportTable = const void* (*)(std::uint32_t table);
using Initialize = int (*)(GetExportTable get_export_table);

constexpr std::uint32_t kCallbacksTable = 1;
constexpr int kCore = 1;
constexpr int kCore2 = 5;

// The functions that this library puts its own in front of.
// X(module, number in it, name, result, parameters, arguments)
#define DORMOUSE_NVTX_FUNCTIONS(X)                                                                \
  X(kCore, 4, RangeStartEx, RangeId, (const EventAttributes* event), (event))                     \
  X(kCore, 5, RangeStartA, RangeId, (const char* message), (message))                             \
  X(kCore, 6, RangeStartW, RangeId, (const wchar_t* message), (message))                          \
  X(kCore, 7, RangeEnd, void, (RangeId id), (id))                                                 \
  X(kCore, 8, RangePushEx, int, (const EventAttributes* event), (event))                          \
  X(kCore, 9, RangePushA, int, (const char* message), (message))                                  \
  X(kCore, 10, RangePushW, int, (const wchar_t* message), (message))                              \
  X(kCore, 11, RangePop, int, (), ())                                                             \
  X(kCore2, 2, DomainRangeStartEx, RangeId, (Domain domain, const EventAttributes* event),        \
    (domain, event))                                                                              \
  X(kCore2, 3, DomainRangeEnd, void, (Domain domain, RangeId id), (domain, id))                   \
  X(kCore2, 4, DomainRangePushEx, int, (Domain domain, const EventAttributes* event),             \
    (domain, event))                                                                              \
  X(kCore2, 5, DomainRangePop, int, (Domain domain), (domain))                                    \
  X(kCore2, 10, DomainRegisterStringA, String, (Domain domain, const char* text), (domain, text)) \
  X(kCore2, 11, DomainRegisterStringW, String, (Domain domain, const wchar_t* text),              \
    (domain, text))                                                                               \
  X(kCore2, 12, DomainCreateA, Domain, (const char* name), (name))                                \
  X(kCore2, 13, DomainCreateW, Domain, (const wchar_t* name), (name))                             \
  X(kCore2, 14, DomainDestroy, void, (Domain domain), (domain))

}  // namespace dormouse::shim::nvtx
