// One plain struct per op: the only thing a kernel sees. Filled by bind_*.cpp, passed by value.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastnas {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// How the draw d of a noisy term meets its input, and what d is made of (see formulas/mixed_sum.h).
enum class NoiseForm : int32_t {
  none = 0,
  gaussian_additive = 1,  // the only form whose spread is relative to std(x)
  gaussian_multiplicative = 2,
  uniform_additive = 3,
  uniform_multiplicative = 4,
};

// The pointer tables travel in the kernel argument block, which CUDA limits to 4 KiB.
constexpr int kMaxTerms = 128;

// Elements that one partial sum covers. Fixed, so results do not depend on threads or grid.
constexpr int64_t kBlock = 4096;

inline int64_t block_count(int64_t n) { return (n + kBlock - 1) / kBlock; }

struct MixedSumParams {
  int64_t n = 0;  // elements of every term
  int32_t terms = 0;
  DType dtype = DType::f32;
  NoiseForm form = NoiseForm::none;
  int32_t noisy_terms = 0;
  // Memory order is channels last when channels > 0; noise is indexed by the NCHW position.
  int64_t channels = 0;
  int64_t pixels = 0;

  const void* x[kMaxTerms] = {};   // terms that are not read may be null (backward, dx only)
  void* dx[kMaxTerms] = {};        // null: gradient not wanted
  int8_t ordinal[kMaxTerms] = {};  // position among the noisy terms, -1: no noise
  const void* w = nullptr;         // [terms], accumulation dtype
  void* y = nullptr;
  const void* dy = nullptr;
  void* dw = nullptr;               // [terms], accumulation dtype; null: not wanted
  double* partial = nullptr;        // [blocks, terms] for dw, [noisy_terms, blocks, 3] for std
  double* std = nullptr;            // [noisy_terms] of the unbiased standard deviations
  const double* level = nullptr;    // shift, scale
  const int64_t* rng = nullptr;     // Philox key, offset of noisy term 0

  int32_t threads = 1;       // CPU
  void* stream = nullptr;    // CUDA
};
static_assert(std::is_trivially_copyable_v<MixedSumParams>);
static_assert(sizeof(MixedSumParams) <= 4096 - 64);

}  // namespace fastnas
