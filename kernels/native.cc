// Decoding a few rows on a CPU: products and attention over the KV cache, called by XLA (native.py). In float32, and
// products of 8-bit integers where the processor has instructions for them (AVX-512 VNNI).
//
// A weight is read once for all rows, and the next ones are asked for ahead: memory is what bounds such a step. Vectors
// are 16 floats wide; a compiler splits them where the processor's are narrower.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Bytes = ffi::Buffer<ffi::S8>;
using Result = ffi::ResultBuffer<ffi::F32>;

constexpr int64_t kLanes = 16;
template <int L>
struct Lanes {
  typedef float Type __attribute__((vector_size(4 * L), aligned(4)));
};
using Vec = Lanes<kLanes>::Type;
using IntVec __attribute__((vector_size(64))) = int32_t;

template <class V = Vec>
inline V load(const float* at) {
  V x;
  std::memcpy(&x, at, sizeof x);
  return x;
}

template <class V>
inline void store(float* at, V x) {
  std::memcpy(at, &x, sizeof x);
}

// Calls work(i) for every i in [0, count), here and on XLA's threads. A helper that comes late finds nothing to do.
template <class Work>
void spread(ffi::ThreadPool& pool, int64_t count, Work work) {
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto help = [=] {
    for (int64_t i; (i = progress->next.fetch_add(1)) < count;) {
      work(i);
      progress->done.fetch_add(1);
    }
  };
  for (int64_t i = 1; i < std::min(count, pool.num_threads()); i++) {
    auto helper = help;
    pool.Schedule(std::move(helper));
  }
  help();
  while (progress->done.load() < count) {
  }
}

// What is done to each sum of a product: its column's factor, max(., 0)^2, and another array's element added.
struct Finish {
  const float* factors;
  bool squared;
  const float* plus;

  template <class V>
  V operator()(V sum, int64_t column, int64_t element) const {
    if (factors) sum *= load<V>(factors + column);
    if (squared) sum = sum > 0 ? sum * sum : V{};
    return plus ? sum + load<V>(plus + element) : sum;
  }
};

// R outputs from `out` on times N * L columns from `column` on, of weight [O, I] @ x [I, C].
template <int R, int N, int L>
inline void tile(const float* weight, const float* x, float* y, int64_t inputs, int64_t columns, int64_t out,
                 int64_t column, const Finish& finish) {
  using V = typename Lanes<L>::Type;
  V sums[R][N] = {};
  const float* row = weight + out * inputs;
  auto add = [&](int64_t i) {
    V of_x[N];
    for (int n = 0; n < N; n++) of_x[n] = load<V>(x + i * columns + column + n * L);
    for (int r = 0; r < R; r++)
      for (int n = 0; n < N; n++) sums[r][n] += of_x[n] * row[r * inputs + i];
  };
  int64_t i = 0;
  for (; i + kLanes <= inputs; i += kLanes) {
    // The next tile's, a cache line of each output.
    for (int r = 0; r < R; r++) __builtin_prefetch(row + (R + r) * inputs + i);
    for (int64_t j = 0; j < kLanes; j++) add(i + j);
  }
  for (; i < inputs; i++) add(i);
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) {
      int64_t at = column + n * L, element = (out + r) * columns + at;
      store(y + element, finish(sums[r][n], at, element));
    }
}

// y [O, C] of weight [O, I] and x [I, C], C a multiple of 8. `normed`: of the columns' RMS norm; `squared`: max(y, 0)^2;
// plus [O, C], or an empty array: added.
ffi::Error product(ffi::ThreadPool pool, Floats weight, Floats x, Floats plus, Result y, bool normed, bool squared,
                   float eps) {
  const int64_t outputs = weight.dimensions()[0], inputs = weight.dimensions()[1], columns = x.dimensions()[1];
  const float *of_weight = weight.typed_data(), *of_x = x.typed_data();
  float* to = y->typed_data();
  std::vector<float> factors(normed ? columns : 0);
  if (normed) {
    for (int64_t i = 0; i < inputs; i++)
      for (int64_t c = 0; c < columns; c++) factors[c] += of_x[i * columns + c] * of_x[i * columns + c];
    for (float& factor : factors) factor = 1 / std::sqrt(factor / inputs + eps);
  }
  const Finish finish{normed ? factors.data() : nullptr, squared, plus.element_count() ? plus.typed_data() : nullptr};
  constexpr int64_t kTile = 16;
  const int64_t share = std::max<int64_t>(1, outputs / kTile / (2 * pool.num_threads())) * kTile;
  spread(pool, (outputs + share - 1) / share, [=](int64_t part) {
    const int64_t end = std::min(outputs, (part + 1) * share);
    for (int64_t out = part * share; out < end; out += kTile) {
      if (out + kTile <= end) {
        int64_t c = 0;
        for (; c + 32 <= columns; c += 32) {
          tile<8, 2, 16>(of_weight, of_x, to, inputs, columns, out, c, finish);
          tile<8, 2, 16>(of_weight, of_x, to, inputs, columns, out + 8, c, finish);
        }
        for (; c + 16 <= columns; c += 16) tile<16, 1, 16>(of_weight, of_x, to, inputs, columns, out, c, finish);
        for (; c < columns; c += 8) tile<16, 1, 8>(of_weight, of_x, to, inputs, columns, out, c, finish);
      } else {
        for (int64_t one = out; one < end; one++)
          for (int64_t c = 0; c < columns; c += 8) tile<1, 1, 8>(of_weight, of_x, to, inputs, columns, one, c, finish);
      }
    }
  });
  return ffi::Error::Success();
}

#ifdef __AVX512VNNI__

// Sums of weight [O, I] times 16 columns of x, which stands in `packed` as [I / 4, 16, 4] with 128 added to each number:
// the instruction multiplies unsigned by signed ones. R outputs from `out` on, to y [O, C] from `column` on.
template <int R>
inline void tile_int8(const int8_t* weight, const uint8_t* packed, int32_t* y, int64_t inputs, int64_t columns,
                      int64_t out, int64_t column) {
  __m512i sums[R], of_weights[R];
  const int8_t* row = weight + out * inputs;
  const __m512i ones = _mm512_set1_epi8(1);
  for (int r = 0; r < R; r++) sums[r] = of_weights[r] = _mm512_setzero_si512();
  for (int64_t i = 0; i < inputs; i += 64) {
    const int64_t end = std::min(inputs, i + 64);
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(row + (R + r) * inputs + i);
      const __mmask64 there = ~uint64_t{0} >> (64 - (end - i));
      const __m512i weights = _mm512_maskz_loadu_epi8(there, row + r * inputs + i);
      of_weights[r] = _mm512_dpbusd_epi32(of_weights[r], ones, weights);
    }
    for (int64_t j = i; j < end; j += 4) {
      const __m512i x = _mm512_loadu_si512(packed + j * kLanes);
      for (int r = 0; r < R; r++) {
        int32_t four;
        std::memcpy(&four, row + r * inputs + j, sizeof four);
        sums[r] = _mm512_dpbusd_epi32(sums[r], x, _mm512_set1_epi32(four));
      }
    }
  }
  for (int r = 0; r < R; r++) {
    const __m512i added = _mm512_set1_epi32(128 * _mm512_reduce_add_epi32(of_weights[r]));
    _mm512_storeu_si512(y + (out + r) * columns + column, _mm512_sub_epi32(sums[r], added));
  }
}

// y [O, C] of weight [O, I] and x [I, C], exact sums; I a multiple of 4, C of 16.
ffi::Error product_int8(ffi::ThreadPool pool, Bytes weight, Bytes x, ffi::ResultBuffer<ffi::S32> y) {
  const int64_t outputs = weight.dimensions()[0], inputs = weight.dimensions()[1], columns = x.dimensions()[1];
  const int8_t *of_weight = weight.typed_data(), *of_x = x.typed_data();
  int32_t* to = y->typed_data();
  std::vector<uint8_t> packed(inputs * columns);
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t i = 0; i < inputs; i += 4) {
      __m128i rows[4];
      for (int r = 0; r < 4; r++)
        rows[r] = _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(of_x + (i + r) * columns + c)),
                                _mm_set1_epi8(-128));
      const __m128i low[2] = {_mm_unpacklo_epi8(rows[0], rows[1]), _mm_unpacklo_epi8(rows[2], rows[3])};
      const __m128i high[2] = {_mm_unpackhi_epi8(rows[0], rows[1]), _mm_unpackhi_epi8(rows[2], rows[3])};
      auto* at = reinterpret_cast<__m128i*>(packed.data() + c * inputs + i * kLanes);
      _mm_storeu_si128(at, _mm_unpacklo_epi16(low[0], low[1]));
      _mm_storeu_si128(at + 1, _mm_unpackhi_epi16(low[0], low[1]));
      _mm_storeu_si128(at + 2, _mm_unpacklo_epi16(high[0], high[1]));
      _mm_storeu_si128(at + 3, _mm_unpackhi_epi16(high[0], high[1]));
    }
  const uint8_t* of_packed = packed.data();
  constexpr int64_t kTile = 8;
  const int64_t share = std::max<int64_t>(1, outputs / kTile / (2 * pool.num_threads())) * kTile;
  spread(pool, (outputs + share - 1) / share, [=](int64_t part) {
    const int64_t end = std::min(outputs, (part + 1) * share);
    for (int64_t out = part * share; out < end; out += kTile)
      for (int64_t c = 0; c < columns; c += kLanes) {
        const uint8_t* block = of_packed + c * inputs;
        if (out + kTile <= end) {
          tile_int8<kTile>(of_weight, block, to, inputs, columns, out, c);
        } else {
          for (int64_t one = out; one < end; one++) tile_int8<1>(of_weight, block, to, inputs, columns, one, c);
        }
      }
  });
  return ffi::Error::Success();
}

#endif

inline float sum(Vec x) {
  using Half = Lanes<8>::Type;
  using Quarter = Lanes<4>::Type;
  Half half = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
              __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  Quarter quarter = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  return quarter[0] + quarter[2] + (quarter[1] + quarter[3]);
}

// Of x <= 0, to 2e-7 relatively: 2^n e^r with r in +-ln(2) / 2, by the polynomial of Cephes' expf.
inline Vec exp(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x;
  constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
  Vec n = (x * 1.44269504f + kRounds) - kRounds;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  for (float next : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + next;
  p = p * r * r + r + 1.0f;
  IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

// A run of slots of one head, keys and values [slots, width].
struct Slots {
  const float *keys, *values;
  int64_t count;
};

// The scores of N keys.
template <int N>
inline void score(const float* query, const float* keys, int64_t width, float scale, float* scores) {
  Vec sums[N] = {};
  for (int64_t h = 0; h < width; h += kLanes) {
    Vec q = load(query + h);
    for (int n = 0; n < N; n++) sums[n] += q * load(keys + n * width + h);
  }
  for (int n = 0; n < N; n++) scores[n] = sum(sums[n]) * scale;
}

// The slots of tokens `least` to `last` in a ring, where token t stands in slot t mod `slots`; of those that it still has.
void visible(const float* keys, const float* values, int64_t slots, int64_t width, int64_t least, int64_t last,
             std::vector<Slots>& found) {
  least = std::max({least, last - slots + 1, int64_t{0}});
  if (least > last) return;
  const int64_t begin = least % slots, end = last % slots + 1;
  auto add = [&](int64_t from, int64_t to) {
    found.push_back({keys + from * width, values + from * width, to - from});
  };
  if (begin < end) return add(begin, end);
  add(begin, slots);
  add(0, end);
}

// Softmax attention of one query [width] over these slots, to out[0], out[stride], ...
void attend(const float* query, const std::vector<Slots>& slots, int64_t width, std::vector<float>& scores, float* out,
            int64_t stride) {
  const float scale = 1 / std::sqrt(static_cast<float>(width));
  int64_t count = 0;
  for (const Slots& run : slots) {
    int64_t t = 0;
    for (; t + 4 <= run.count; t += 4, count += 4)
      score<4>(query, run.keys + t * width, width, scale, &scores[count]);
    for (; t < run.count; t++, count++) score<1>(query, run.keys + t * width, width, scale, &scores[count]);
  }
  const float largest = *std::max_element(scores.begin(), scores.begin() + count);
  std::fill_n(scores.begin() + count, kLanes, -INFINITY);
  Vec totals{};
  for (int64_t t = 0; t < count; t += kLanes) {
    Vec weights = exp(load(&scores[t]) - largest);
    store(&scores[t], weights);
    totals += weights;
  }
  const float total = sum(totals);
  constexpr int kAtOnce = 4;
  for (int64_t h = 0; h < width; h += kAtOnce * kLanes) {
    const int64_t vectors = std::min<int64_t>(kAtOnce, (width - h) / kLanes);
    Vec sums[kAtOnce] = {};
    int64_t t = 0;
    for (const Slots& run : slots)
      for (int64_t s = 0; s < run.count; s++, t++) {
        const float* value = run.values + s * width + h;
        if (vectors == kAtOnce) {
          for (int v = 0; v < kAtOnce; v++) sums[v] += scores[t] * load(value + v * kLanes);
        } else {
          for (int v = 0; v < vectors; v++) sums[v] += scores[t] * load(value + v * kLanes);
        }
      }
    for (int v = 0; v < vectors; v++)
      for (int64_t l = 0; l < kLanes; l++) out[(h + v * kLanes + l) * stride] = sums[v][l] / total;
  }
}

// One decode step's attention. qkv [K, G + 2, H, B] as the product gave it, H a multiple of 16; value [K, H, B] in place
// of its last, or empty; a row's own keys and values [B, K, S, H], to which the new ones are added in place; those of the
// prompts that rows share [P, K, T, H], P 0 where none do; cos and signed sin [B, H]; each row's position and the first
// of its own tokens [B]; y [K, G, H, B].
ffi::Error attention(ffi::ThreadPool pool, Floats qkv, Floats value, Floats own_keys, Floats own_values,
                     Floats shared_keys, Floats shared_values, Floats cos, Floats sin, Ints positions, Ints first,
                     Result y, Result new_keys, Result new_values, int64_t window, float qk_scale, float eps) {
  const auto sizes = qkv.dimensions();
  const int64_t heads = sizes[0], queries = sizes[1] - 2, width = sizes[2], rows = sizes[3];
  const int64_t slots = own_keys.dimensions()[2], prompts = shared_keys.dimensions()[0];
  const int64_t prompt_slots = shared_keys.dimensions()[2], together = prompts ? rows / prompts : 1;
  float *keys = new_keys->typed_data(), *values = new_values->typed_data(), *to = y->typed_data();
  if (keys != own_keys.typed_data() || values != own_values.typed_data())
    return ffi::Error::Internal("the KV cache was not updated in place");
  const float *of_qkv = qkv.typed_data(), *of_value = value.element_count() ? value.typed_data() : nullptr;
  const float *prompt_keys = shared_keys.typed_data(), *prompt_values = shared_values.typed_data();
  const float *of_cos = cos.typed_data(), *of_sin = sin.typed_data();
  const int32_t *at = positions.typed_data(), *begins = first.typed_data();
  // Neighbouring rows write to the same cache lines of y, so one thread does several rows of a head.
  const int64_t block = std::clamp<int64_t>(rows * heads / (4 * pool.num_threads()), 1, 16);
  spread(pool, (rows + block - 1) / block * heads, [=](int64_t part) {
    const int64_t head = part % heads, begin = part / heads * block;
    const float* mine = of_qkv + head * (queries + 2) * width * rows;
    const float* v = of_value ? of_value + head * width * rows : mine + (queries + 1) * width * rows;
    std::vector<float> scores(slots + prompt_slots + kLanes), turned((queries + 1) * width);
    std::vector<Slots> seen;
    for (int64_t row = begin; row < std::min(rows, begin + block); row++) {
      for (int64_t n = 0; n <= queries; n++) {  // the last is the key
        const float* x = mine + n * width * rows + row;
        float* out = &turned[n * width];
        float squares = 0;
        for (int64_t h = 0; h < width; h++) {
          const int64_t other = h < width / 2 ? h + width / 2 : h - width / 2;
          out[h] = x[h * rows] * of_cos[row * width + h] + x[other * rows] * of_sin[row * width + h];
          squares += out[h] * out[h];
        }
        const float factor = qk_scale / std::sqrt(squares / width + eps);
        for (int64_t h = 0; h < width; h++) out[h] *= factor;
      }
      const int64_t last = std::max(at[row] - begins[row], 0);  // among its own tokens
      const int64_t panel = (row * heads + head) * slots * width, slot = panel + last % slots * width;
      for (int64_t h = 0; h < width; h++) {
        keys[slot + h] = turned[queries * width + h];
        values[slot + h] = v[h * rows + row];
      }
      seen.clear();
      visible(keys + panel, values + panel, slots, width, last - window, last, seen);
      if (prompts) {
        const int64_t prompt = (row / together * heads + head) * prompt_slots * width;
        visible(prompt_keys + prompt, prompt_values + prompt, prompt_slots, width, at[row] - window, begins[row] - 1,
                seen);
      }
      for (int64_t n = 0; n < queries; n++)
        attend(&turned[n * width], seen, width, scores, to + (head * queries + n) * width * rows + row, rows);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(nanochat_product, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<bool>("normed")
                                  .Attr<bool>("squared")
                                  .Attr<float>("eps"));

#ifdef __AVX512VNNI__
XLA_FFI_DEFINE_HANDLER_SYMBOL(nanochat_product_int8, product_int8,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Bytes>().Arg<Bytes>().Ret<Ints>());
#endif

XLA_FFI_DEFINE_HANDLER_SYMBOL(nanochat_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("qk_scale")
                                  .Attr<float>("eps"));
