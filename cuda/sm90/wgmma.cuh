// Warpgroup products, wgmma.mma_async: d += a b with d of 64 rows in registers, b and, if one
// likes, a in shared memory as tensor copies leave it. The inner dimension of an instruction is
// 16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace jax_na::cuda::sm90 {

constexpr int kGroupRows = 64;      // of a product
constexpr int kGroupThreads = 128;  // of a warpgroup

// ---- Operands in shared memory -----------------------------------------------------------

// Rows of kDim channels of 2 bytes in blocks of 64 channels (32 where kDim is no multiple of
// 64): a block is kRows rows of 128 (64) bytes, swizzled in 16-byte units, as tensor copies
// with SWIZZLE_128B (64B) write them.
template <int kDim_, int kRows_>
struct Block {
  static constexpr int kDim = kDim_, kRows = kRows_;
  static constexpr int kChannels = kDim % 64 == 0 ? 64 : 32;
  static constexpr int kCount = kDim / kChannels;
  static constexpr int kRowBytes = kChannels * 2;
  static constexpr int kBytes = kRows * kRowBytes;  // of one block
  static constexpr int kAllBytes = kBytes * kCount;
  static constexpr int kUnits = kRowBytes / 16;     // of a row of one block
  static_assert(kDim % kChannels == 0 && kRows % 16 == 0);

  // Where the 16-byte unit with channels [8 unit, 8 unit + 8) of a row lies.
  static __device__ __forceinline__ int offset(int row, int unit) {
    return unit / kUnits * kBytes + row * kRowBytes + (unit % kUnits ^ swizzle(row)) * 16;
  }
  // Descriptor of an operand at `address`, for its first step: address, leading and stride byte
  // offsets in units of 16 bytes, swizzle.
  static __device__ __forceinline__ uint64_t descriptor(uint32_t address, int leading) {
    constexpr uint32_t kSwizzle = kRowBytes == 128 ? 1 : 2;
    constexpr uint32_t kStride = 8 * kRowBytes / 16;  // 8 rows
    const uint32_t low = address >> 4 | static_cast<uint32_t>(leading / 16) << 16;
    return uint64_t{kSwizzle << 30 | kStride} << 32 | low;
  }
  // The inner dimension is the channels ("K-major"); step k covers channels [16 k, 16 k + 16).
  static __device__ __forceinline__ uint64_t by_channels(uint32_t address) {
    return descriptor(address, 16);
  }
  static __host__ __device__ constexpr int channel_step(int k) {
    constexpr int kSteps = kChannels / 16;
    return (k / kSteps * kBytes + k % kSteps * 32) / 16;
  }
  // The inner dimension is the rows ("MN-major"); step k covers rows [16 k, 16 k + 16).
  static __device__ __forceinline__ uint64_t by_rows(uint32_t address) {
    return descriptor(address, kBytes);
  }
  static __host__ __device__ constexpr int row_step(int k) { return k * 16 * kRowBytes / 16; }

 private:
  static __host__ __device__ constexpr int swizzle(int row) {
    return kUnits == 8 ? row % 8 : row / 2 % 4;
  }
};

// ---- Order -----------------------------------------------------------------------------

// wgmma.fence: registers and shared memory written before are seen by products after it.
__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}
// wgmma.commit_group
__device__ __forceinline__ void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
// wgmma.wait_group: at most `kPending` groups are still under way.
template <int kPending>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of registers across products that are under way.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

template <typename Register, int kCount>
__device__ __forceinline__ void clear(Register (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) registers[i] = 0;
}

// ---- wgmma.mma_async.m64nNk16.f32 --------------------------------------------------------

// Lane l of warp w holds of d: element 4 n + 2 h + i is row 16 w + 8 h + l / 4, column
// 8 n + 2 (l % 4) + i. Of a in registers: register 2 m + h has columns 8 m + 2 (l % 4) and the
// next of the same rows.
template <int kColumns>
struct Product;

#define JAX_NA_OUT(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define JAX_NA_OUT_HALF(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define JAX_NA_OUT_2 JAX_NA_OUT(0), JAX_NA_OUT(8)
#define JAX_NA_OUT_3 JAX_NA_OUT_2, JAX_NA_OUT(16)
#define JAX_NA_OUT_4 JAX_NA_OUT_3, JAX_NA_OUT(24)
#define JAX_NA_OUT_5 JAX_NA_OUT_4, JAX_NA_OUT(32)
#define JAX_NA_OUT_6 JAX_NA_OUT_5, JAX_NA_OUT(40)
#define JAX_NA_OUT_7 JAX_NA_OUT_6, JAX_NA_OUT(48)
#define JAX_NA_OUT_8 JAX_NA_OUT_7, JAX_NA_OUT(56)
#define JAX_NA_OUT_9 JAX_NA_OUT_8, JAX_NA_OUT(64)
#define JAX_NA_OUT_10 JAX_NA_OUT_9, JAX_NA_OUT(72)
#define JAX_NA_OUT_11 JAX_NA_OUT_10, JAX_NA_OUT(80)
#define JAX_NA_OUT_12 JAX_NA_OUT_11, JAX_NA_OUT(88)
#define JAX_NA_OUT_13 JAX_NA_OUT_12, JAX_NA_OUT(96)
#define JAX_NA_OUT_14 JAX_NA_OUT_13, JAX_NA_OUT(104)
#define JAX_NA_OUT_15 JAX_NA_OUT_14, JAX_NA_OUT(112)
#define JAX_NA_OUT_16 JAX_NA_OUT_15, JAX_NA_OUT(120)
#define JAX_NA_OUT_2_HALF JAX_NA_OUT_2, JAX_NA_OUT_HALF(16)
#define JAX_NA_OUT_4_HALF JAX_NA_OUT_4, JAX_NA_OUT_HALF(32)
#define JAX_NA_NAME_2 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define JAX_NA_NAME_3 JAX_NA_NAME_2 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define JAX_NA_NAME_4 JAX_NA_NAME_3 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define JAX_NA_NAME_5 JAX_NA_NAME_4 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define JAX_NA_NAME_6 JAX_NA_NAME_5 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define JAX_NA_NAME_7 JAX_NA_NAME_6 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define JAX_NA_NAME_8 JAX_NA_NAME_7 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define JAX_NA_NAME_9 JAX_NA_NAME_8 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define JAX_NA_NAME_10 JAX_NA_NAME_9 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define JAX_NA_NAME_11 JAX_NA_NAME_10 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define JAX_NA_NAME_12 JAX_NA_NAME_11 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define JAX_NA_NAME_13 JAX_NA_NAME_12 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define JAX_NA_NAME_14 JAX_NA_NAME_13 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define JAX_NA_NAME_15 JAX_NA_NAME_14 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define JAX_NA_NAME_16 JAX_NA_NAME_15 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define JAX_NA_NAME_2_HALF JAX_NA_NAME_2 ",%16,%17,%18,%19"
#define JAX_NA_NAME_4_HALF JAX_NA_NAME_4 ",%32,%33,%34,%35"

#define JAX_NA_PRODUCT_OF(N, M, TYPE, A, B, P, TRANSPOSED, ...)                             \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " P ", 0;\n"                           \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE              \
               " {" JAX_NA_NAME_##M "}, " A ", " B ", add, 1, 1, " TRANSPOSED ";\n}\n"      \
               : JAX_NA_OUT_##M                                                             \
               : __VA_ARGS__)

// kARows, kBRows: the inner dimension of the operand is its rows. O0 to O6 are the names of the
// operands that follow the N / 2 of d.
#define JAX_NA_PRODUCT(N, M, O0, O1, O2, O3, O4, O5, O6)                                      \
  template <>                                                                                 \
  struct Product<N> {                                                                         \
    template <typename T, bool kARows, bool kBRows>                                           \
    static __device__ __forceinline__ void add(float (&d)[N / 2], uint64_t a, uint64_t b,     \
                                               bool accumulate) {                             \
      if constexpr (std::is_same_v<T, __half>) {                                              \
        JAX_NA_PRODUCT_OF(N, M, "f16", O0, O1, O2, O3 ", " O4, "l"(a), "l"(b),                \
                          "r"(int{accumulate}), "n"(int{kARows}), "n"(int{kBRows}));          \
      } else {                                                                                \
        JAX_NA_PRODUCT_OF(N, M, "bf16", O0, O1, O2, O3 ", " O4, "l"(a), "l"(b),               \
                          "r"(int{accumulate}), "n"(int{kARows}), "n"(int{kBRows}));          \
      }                                                                                       \
    }                                                                                         \
    template <typename T, bool kBRows>                                                        \
    static __device__ __forceinline__ void add(float (&d)[N / 2], const uint32_t* a,          \
                                               uint64_t b, bool accumulate) {                 \
      if constexpr (std::is_same_v<T, __half>) {                                              \
        JAX_NA_PRODUCT_OF(N, M, "f16", "{" O0 "," O1 "," O2 "," O3 "}", O4, O5, O6,           \
                          "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                 \
                          "r"(int{accumulate}), "n"(int{kBRows}));                            \
      } else {                                                                                \
        JAX_NA_PRODUCT_OF(N, M, "bf16", "{" O0 "," O1 "," O2 "," O3 "}", O4, O5, O6,          \
                          "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                 \
                          "r"(int{accumulate}), "n"(int{kBRows}));                            \
      }                                                                                       \
    }                                                                                         \
    template <bool kAccumulate>                                                               \
    static __device__ __forceinline__ void add_bytes(float (&d)[N / 2], const uint32_t* a,    \
                                                     uint64_t b) {                            \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " O5 ", 0;\n"                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e5m2.e5m2"                 \
                   " {" JAX_NA_NAME_##M "}, {" O0 "," O1 "," O2 "," O3 "}, " O4               \
                   ", add, 1, 1;\n}\n"                                                        \
                   : JAX_NA_OUT_##M                                                           \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                      \
                     "n"(int{kAccumulate}));                                                  \
    }                                                                                         \
  }

JAX_NA_PRODUCT(32, 2, "%16", "%17", "%18", "%19", "%20", "%21", "%22");
JAX_NA_PRODUCT(40, 2_HALF, "%20", "%21", "%22", "%23", "%24", "%25", "%26");
JAX_NA_PRODUCT(48, 3, "%24", "%25", "%26", "%27", "%28", "%29", "%30");
JAX_NA_PRODUCT(64, 4, "%32", "%33", "%34", "%35", "%36", "%37", "%38");
JAX_NA_PRODUCT(72, 4_HALF, "%36", "%37", "%38", "%39", "%40", "%41", "%42");
JAX_NA_PRODUCT(80, 5, "%40", "%41", "%42", "%43", "%44", "%45", "%46");
JAX_NA_PRODUCT(96, 6, "%48", "%49", "%50", "%51", "%52", "%53", "%54");
JAX_NA_PRODUCT(112, 7, "%56", "%57", "%58", "%59", "%60", "%61", "%62");
JAX_NA_PRODUCT(128, 8, "%64", "%65", "%66", "%67", "%68", "%69", "%70");
JAX_NA_PRODUCT(144, 9, "%72", "%73", "%74", "%75", "%76", "%77", "%78");
JAX_NA_PRODUCT(160, 10, "%80", "%81", "%82", "%83", "%84", "%85", "%86");
JAX_NA_PRODUCT(176, 11, "%88", "%89", "%90", "%91", "%92", "%93", "%94");
JAX_NA_PRODUCT(192, 12, "%96", "%97", "%98", "%99", "%100", "%101", "%102");
JAX_NA_PRODUCT(208, 13, "%104", "%105", "%106", "%107", "%108", "%109", "%110");
JAX_NA_PRODUCT(256, 16, "%128", "%129", "%130", "%131", "%132", "%133", "%134");

// ---- Products of blocks ------------------------------------------------------------------

// d = rows(a) rows(b)^T over the channels, or d += that: scores.
template <typename T, class A, class B>
__device__ __forceinline__ void multiply_channels(float (&d)[B::kRows / 2], uint32_t a,
                                                  uint32_t b, bool accumulate = false) {
  static_assert(A::kDim == B::kDim);
#pragma unroll
  for (int k = 0; k < A::kDim / 16; ++k) {
    Product<B::kRows>::template add<T, false, false>(
        d, A::by_channels(a) + A::channel_step(k), B::by_channels(b) + B::channel_step(k),
        k > 0 || accumulate);
  }
}

// d += a rows(b) with a in registers and one column of it per row of b, or d = that: outputs.
template <typename T, class B>
__device__ __forceinline__ void multiply_rows(float (&d)[B::kDim / 2],
                                              const uint32_t (&a)[B::kRows / 4], uint32_t b,
                                              bool accumulate = true) {
#pragma unroll
  for (int k = 0; k < B::kRows / 16; ++k) {
    Product<B::kDim>::template add<T, true>(d, a + 4 * k, B::by_rows(b) + B::row_step(k),
                                            k > 0 || accumulate);
  }
}

// The same, and in the last four elements of d the sums of the rows of a: the 8 columns after
// those of b are ones, which lie behind b in shared memory.
template <typename T, class B>
__device__ __forceinline__ void multiply_rows_and_sum(float (&d)[B::kDim / 2 + 4],
                                                      const uint32_t (&a)[B::kRows / 4],
                                                      uint32_t b, uint32_t ones,
                                                      bool accumulate) {
  static_assert(B::kCount == 1);
#pragma unroll
  for (int k = 0; k < B::kRows / 16; ++k) {
    const uint64_t step = B::row_step(k);
    const uint64_t at = B::descriptor(b, ones - b) + step - (step << 16);
    Product<B::kDim + 8>::template add<T, true>(d, a + 4 * k, at, k > 0 || accumulate);
  }
}

// The same with a in shared memory, of which the 64 rows from row `first` on are multiplied.
template <typename T, class A, class B>
__device__ __forceinline__ void multiply_rows(float (&d)[B::kDim / 2], uint32_t a, int first,
                                              uint32_t b) {
  static_assert(A::kDim == B::kRows);
  const uint64_t rows = A::by_channels(a + first * A::kRowBytes);
#pragma unroll
  for (int k = 0; k < B::kRows / 16; ++k) {
    Product<B::kDim>::template add<T, false, true>(d, rows + A::channel_step(k),
                                                   B::by_rows(b) + B::row_step(k), true);
  }
}

// Two floats as one register of T; the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// The two floats of a register of T.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(packed));
  } else {
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
  }
}

// A product as the row operand of the next.
template <typename T, int kCount>
__device__ __forceinline__ void pack_all(uint32_t (&packed)[kCount / 2],
                                         const float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) packed[i] = pack<T>(d[2 * i], d[2 * i + 1]);
}

}  // namespace jax_na::cuda::sm90
