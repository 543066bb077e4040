// The programs' kernels as PTX text for every GPU from Volta on. The simulated driver has functions
// of the same names.
#pragma once

namespace programs {

// fill_u32(data, count, value): data[i] = value
// add_u32(data, count, value): data[i] += value + i
// checksum_u64(data, count, sum): *sum += data[i] * (2 * i + 1), summed over all i
inline constexpr char kKernels[] = R"(
.version 6.0
.target sm_70
.address_size 64

.visible .entry fill_u32(.param .u64 data, .param .u64 count, .param .u32 value)
{
  .reg .pred %p<2>;
  .reg .b32 %r<6>;
  .reg .b64 %rd<8>;
  ld.param.u64 %rd1, [data];
  ld.param.u64 %rd2, [count];
  ld.param.u32 %r1, [value];
  cvta.to.global.u64 %rd1, %rd1;
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mov.u32 %r4, %tid.x;
  mul.wide.u32 %rd3, %r2, %r3;
  cvt.u64.u32 %rd4, %r4;
  add.s64 %rd3, %rd3, %rd4;
  mov.u32 %r5, %nctaid.x;
  mul.wide.u32 %rd5, %r5, %r3;
FILL_LOOP:
  setp.ge.u64 %p1, %rd3, %rd2;
  @%p1 bra FILL_END;
  shl.b64 %rd6, %rd3, 2;
  add.s64 %rd6, %rd1, %rd6;
  st.global.u32 [%rd6], %r1;
  add.s64 %rd3, %rd3, %rd5;
  bra FILL_LOOP;
FILL_END:
  ret;
}

.visible .entry add_u32(.param .u64 data, .param .u64 count, .param .u32 value)
{
  .reg .pred %p<2>;
  .reg .b32 %r<9>;
  .reg .b64 %rd<8>;
  ld.param.u64 %rd1, [data];
  ld.param.u64 %rd2, [count];
  ld.param.u32 %r1, [value];
  cvta.to.global.u64 %rd1, %rd1;
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mov.u32 %r4, %tid.x;
  mul.wide.u32 %rd3, %r2, %r3;
  cvt.u64.u32 %rd4, %r4;
  add.s64 %rd3, %rd3, %rd4;
  mov.u32 %r5, %nctaid.x;
  mul.wide.u32 %rd5, %r5, %r3;
ADD_LOOP:
  setp.ge.u64 %p1, %rd3, %rd2;
  @%p1 bra ADD_END;
  shl.b64 %rd6, %rd3, 2;
  add.s64 %rd6, %rd1, %rd6;
  ld.global.u32 %r6, [%rd6];
  cvt.u32.u64 %r7, %rd3;
  add.u32 %r8, %r1, %r7;
  add.u32 %r6, %r6, %r8;
  st.global.u32 [%rd6], %r6;
  add.s64 %rd3, %rd3, %rd5;
  bra ADD_LOOP;
ADD_END:
  ret;
}

.visible .entry checksum_u64(.param .u64 data, .param .u64 count, .param .u64 sum)
{
  .reg .pred %p<2>;
  .reg .b32 %r<6>;
  .reg .b64 %rd<14>;
  ld.param.u64 %rd1, [data];
  ld.param.u64 %rd2, [count];
  ld.param.u64 %rd8, [sum];
  cvta.to.global.u64 %rd1, %rd1;
  cvta.to.global.u64 %rd8, %rd8;
  mov.u32 %r2, %ctaid.x;
  mov.u32 %r3, %ntid.x;
  mov.u32 %r4, %tid.x;
  mul.wide.u32 %rd3, %r2, %r3;
  cvt.u64.u32 %rd4, %r4;
  add.s64 %rd3, %rd3, %rd4;
  mov.u32 %r5, %nctaid.x;
  mul.wide.u32 %rd5, %r5, %r3;
  mov.u64 %rd9, 0;
SUM_LOOP:
  setp.ge.u64 %p1, %rd3, %rd2;
  @%p1 bra SUM_END;
  shl.b64 %rd6, %rd3, 3;
  add.s64 %rd6, %rd1, %rd6;
  ld.global.u64 %rd10, [%rd6];
  shl.b64 %rd11, %rd3, 1;
  add.s64 %rd11, %rd11, 1;
  mad.lo.u64 %rd9, %rd10, %rd11, %rd9;
  add.s64 %rd3, %rd3, %rd5;
  bra SUM_LOOP;
SUM_END:
  atom.global.add.u64 %rd12, [%rd8], %rd9;
  ret;
}
)";

}  // namespace programs
