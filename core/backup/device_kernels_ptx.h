// The device's side of content_hash.h and of copies (transfer.h), in PTX for Volta and everything
// later: the driver compiles it when it is loaded.
#pragma once

namespace dormouse {

inline constexpr const char* kContentHashKernel = "dormouse_content_hash";
inline constexpr const char* kCopyKernel = "dormouse_copy";

#define DORMOUSE_PTX_STEP(x, y)     \
  "  xor.b64 %a, %a, " x            \
  ";\n"                             \
  "  shl.b64 %t0, %a, 29;\n"        \
  "  shr.u64 %t1, %a, 35;\n"        \
  "  or.b64 %a, %t0, %t1;\n"        \
  "  mad.lo.u64 %a, %a, %k1, %b;\n" \
  "  xor.b64 %b, %b, " y            \
  ";\n"                             \
  "  shl.b64 %t0, %b, 31;\n"        \
  "  shr.u64 %t1, %b, 33;\n"        \
  "  or.b64 %b, %t0, %t1;\n"        \
  "  mad.lo.u64 %b, %b, %k2, %a;\n" \
  "  or.b64 %any, %any, " x         \
  ";\n"                             \
  "  or.b64 %any, %any, " y ";\n"

#define DORMOUSE_PTX_SCRAMBLE(v) \
  "  shr.u64 %t0, " v            \
  ", 33;\n"                      \
  "  xor.b64 " v ", " v          \
  ", %t0;\n"                     \
  "  mul.lo.u64 " v ", " v       \
  ", %m1;\n"                     \
  "  shr.u64 %t0, " v            \
  ", 33;\n"                      \
  "  xor.b64 " v ", " v          \
  ", %t0;\n"                     \
  "  mul.lo.u64 " v ", " v       \
  ", %m2;\n"                     \
  "  shr.u64 %t0, " v            \
  ", 33;\n"                      \
  "  xor.b64 " v ", " v ", %t0;\n"

// dormouse_content_hash: one block of 256 threads hashes one range; thread t takes the 16-byte
// words t, t + 256, ... The arithmetic is step(), scramble() and their constants in
// content_hash.cc, to the letter. Parameters: ranges (array of {u64 address, u64 bytes}), results
// (array of {u64 low, u64 high, u64 nonzero, u64 unused}), both aligned to 16 bytes. Grid: one
// block a range. Both arrays may lie in host memory: one thread of a block reads the range, and one
// writes the result, once.
//
// dormouse_copy: any grid of blocks of up to 512 threads. Parameters: u64 to, u64 from, u64 bytes,
// all multiples of 16. `from` may lie in host memory: 4 blocks of 512 threads read it at nine
// tenths of the bus's speed.
inline constexpr const char kDeviceKernelsPtx[] =
    ".version 6.0\n"
    ".target sm_70\n"
    ".address_size 64\n"
    ".visible .entry dormouse_content_hash(.param .u64 ranges, .param .u64 results)\n"
    ".maxntid 256, 1, 1\n"
    "{\n"
    "  .shared .align 16 .b64 range[2];\n"
    "  .shared .align 16 .b64 sum[4];\n"
    "  .reg .b64 %ranges, %results, %at, %end, %last, %bytes, %lane, %a, %b, %any, %t0, %t1;\n"
    "  .reg .b64 %k1, %k2, %m1, %m2, %x<4>, %y<4>, %index, %zero;\n"
    "  .reg .b32 %thread, %block;\n"
    "  .reg .pred %done, %some, %others;\n"
    "  ld.param.u64 %ranges, [ranges];\n"
    "  ld.param.u64 %results, [results];\n"
    "  cvta.to.global.u64 %ranges, %ranges;\n"
    "  cvta.to.global.u64 %results, %results;\n"
    "  mov.u32 %thread, %tid.x;\n"
    "  mov.u32 %block, %ctaid.x;\n"
    "  mul.wide.u32 %index, %block, 16;\n"
    "  add.u64 %ranges, %ranges, %index;\n"
    "  mul.wide.u32 %index, %block, 32;\n"
    "  add.u64 %results, %results, %index;\n"
    "  mov.u64 %zero, 0;\n"
    "  setp.ne.u32 %others, %thread, 0;\n"
    "  @%others bra BEGIN;\n"
    "  ld.global.v2.u64 {%at, %bytes}, [%ranges];\n"
    "  st.shared.v2.u64 [range], {%at, %bytes};\n"
    "  st.shared.v2.u64 [sum], {%zero, %zero};\n"
    "  st.shared.u64 [sum+16], %zero;\n"
    "BEGIN:\n"
    "  bar.sync 0;\n"
    "  ld.shared.v2.u64 {%at, %bytes}, [range];\n"
    "  add.u64 %end, %at, %bytes;\n"
    "  cvt.u64.u32 %lane, %thread;\n"
    "  mul.wide.u32 %index, %thread, 16;\n"
    "  add.u64 %at, %at, %index;\n"
    "  mov.u64 %k1, 0x9E3779B185EBCA87;\n"
    "  mov.u64 %k2, 0xC2B2AE3D27D4EB4F;\n"
    "  mov.u64 %m1, 0xFF51AFD7ED558CCD;\n"
    "  mov.u64 %m2, 0xC4CEB9FE1A85EC53;\n"
    "  add.u64 %a, %bytes, 0x165667B19E3779F9;\n"
    "  add.u64 %b, %lane, 0x27D4EB2F165667C5;\n"
    "  mov.u64 %any, 0;\n"
    "FOUR:\n"
    "  add.u64 %last, %at, 12288;\n"
    "  setp.ge.u64 %done, %last, %end;\n"
    "  @%done bra ONE;\n"
    "  ld.global.nc.v2.u64 {%x0, %y0}, [%at];\n"
    "  ld.global.nc.v2.u64 {%x1, %y1}, [%at+4096];\n"
    "  ld.global.nc.v2.u64 {%x2, %y2}, [%at+8192];\n"
    "  ld.global.nc.v2.u64 {%x3, %y3}, [%at+12288];\n"
    DORMOUSE_PTX_STEP("%x0", "%y0")
    DORMOUSE_PTX_STEP("%x1", "%y1")
    DORMOUSE_PTX_STEP("%x2", "%y2")
    DORMOUSE_PTX_STEP("%x3", "%y3")
    "  add.u64 %at, %at, 16384;\n"
    "  bra FOUR;\n"
    "ONE:\n"
    "  setp.ge.u64 %done, %at, %end;\n"
    "  @%done bra FINISH;\n"
    "  ld.global.nc.v2.u64 {%x0, %y0}, [%at];\n"
    DORMOUSE_PTX_STEP("%x0", "%y0")
    "  add.u64 %at, %at, 4096;\n"
    "  bra ONE;\n"
    "FINISH:\n" DORMOUSE_PTX_STEP("%zero", "%zero")
    "  mad.lo.u64 %a, %lane, %k2, %a;\n"
    DORMOUSE_PTX_SCRAMBLE("%a")
    "  xor.b64 %b, %b, %a;\n"
    "  mad.lo.u64 %b, %lane, %k1, %b;\n"
    DORMOUSE_PTX_SCRAMBLE("%b")
    "  red.shared.add.u64 [sum], %a;\n"
    "  red.shared.add.u64 [sum+8], %b;\n"
    "  setp.ne.u64 %some, %any, 0;\n"
    "  @%some red.shared.or.b64 [sum+16], 1;\n"
    "  bar.sync 0;\n"
    "  @%others bra END;\n"
    "  ld.shared.v2.u64 {%a, %b}, [sum];\n"
    "  ld.shared.u64 %any, [sum+16];\n"
    "  st.global.v2.u64 [%results], {%a, %b};\n"
    "  st.global.u64 [%results+16], %any;\n"
    "END:\n"
    "  ret;\n"
    "}\n"
    ".visible .entry dormouse_copy(.param .u64 to, .param .u64 from, .param .u64 bytes)\n"
    ".maxntid 512, 1, 1\n"
    "{\n"
    "  .reg .b64 %to, %from, %end, %bytes, %at, %stride, %three, %last, %x<4>, %y<4>;\n"
    "  .reg .b32 %thread, %threads, %block, %blocks, %index;\n"
    "  .reg .pred %done;\n"
    "  ld.param.u64 %to, [to];\n"
    "  ld.param.u64 %from, [from];\n"
    "  ld.param.u64 %bytes, [bytes];\n"
    "  cvta.to.global.u64 %to, %to;\n"
    "  cvta.to.global.u64 %from, %from;\n"
    "  add.u64 %end, %from, %bytes;\n"
    "  mov.u32 %thread, %tid.x;\n"
    "  mov.u32 %threads, %ntid.x;\n"
    "  mov.u32 %block, %ctaid.x;\n"
    "  mov.u32 %blocks, %nctaid.x;\n"
    "  mad.lo.u32 %index, %block, %threads, %thread;\n"
    "  mul.wide.u32 %at, %index, 16;\n"
    "  mul.lo.u32 %index, %blocks, %threads;\n"
    "  mul.wide.u32 %stride, %index, 16;\n"
    "  mul.lo.u64 %three, %stride, 3;\n"
    "  add.u64 %from, %from, %at;\n"
    "  add.u64 %to, %to, %at;\n"
    "FOUR:\n"
    "  add.u64 %last, %from, %three;\n"
    "  setp.ge.u64 %done, %last, %end;\n"
    "  @%done bra ONE;\n"
    "  ld.global.v2.u64 {%x0, %y0}, [%from];\n"
    "  add.u64 %from, %from, %stride;\n"
    "  ld.global.v2.u64 {%x1, %y1}, [%from];\n"
    "  add.u64 %from, %from, %stride;\n"
    "  ld.global.v2.u64 {%x2, %y2}, [%from];\n"
    "  add.u64 %from, %from, %stride;\n"
    "  ld.global.v2.u64 {%x3, %y3}, [%from];\n"
    "  add.u64 %from, %from, %stride;\n"
    "  st.global.v2.u64 [%to], {%x0, %y0};\n"
    "  add.u64 %to, %to, %stride;\n"
    "  st.global.v2.u64 [%to], {%x1, %y1};\n"
    "  add.u64 %to, %to, %stride;\n"
    "  st.global.v2.u64 [%to], {%x2, %y2};\n"
    "  add.u64 %to, %to, %stride;\n"
    "  st.global.v2.u64 [%to], {%x3, %y3};\n"
    "  add.u64 %to, %to, %stride;\n"
    "  bra FOUR;\n"
    "ONE:\n"
    "  setp.ge.u64 %done, %from, %end;\n"
    "  @%done bra END;\n"
    "  ld.global.v2.u64 {%x0, %y0}, [%from];\n"
    "  st.global.v2.u64 [%to], {%x0, %y0};\n"
    "  add.u64 %from, %from, %stride;\n"
    "  add.u64 %to, %to, %stride;\n"
    "  bra ONE;\n"
    "END:\n"
    "  ret;\n"
    "}\n";

#undef DORMOUSE_PTX_STEP
#undef DORMOUSE_PTX_SCRAMBLE

}  // namespace dormouse
