// Decoding on a CPU: products, attention over the KV cache, the best logits and random numbers, called by XLA
// (native.py). In float32, and products of 8-bit integers where the processor has instructions for them (AVX-512 VNNI).
//
// Memory bounds a decode step: weights are packed in the order in which they are read, and asked for well ahead. What
// bounds the reading of a prompt is arithmetic: as many sums are taken at once as the processor has registers for.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
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
using Words = ffi::Buffer<ffi::U32>;
using Result = ffi::ResultBuffer<ffi::F32>;

// Lanes of a vector, and vectors of sums that stay in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kAtOnce = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8, kAtOnce = 8;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kAtOnce = 16;
#else
constexpr int kLanes = 4, kAtOnce = 8;
#endif
using Vec __attribute__((vector_size(4 * kLanes))) = float;
using IntVec __attribute__((vector_size(4 * kLanes))) = int32_t;
using InMemory __attribute__((vector_size(4 * kLanes), aligned(4), may_alias)) = float;

// Not by memcpy, which GCC does in halves for processors before AVX-512.
inline Vec load(const float* at) { return *reinterpret_cast<const InMemory*>(at); }

inline void store(float* at, Vec x) { *reinterpret_cast<InMemory*>(at) = x; }

// Some lanes of two vectors that are one behind the other.
template <int... At>
inline Vec picked(Vec a, Vec b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, At...);
#else
  return __builtin_shuffle(a, b, IntVec{At...});
#endif
}

using Every = std::make_integer_sequence<int, kLanes>;

// In each W lanes the sums of twice as many of a and b.
template <int W, int... J>
inline Vec fold(Vec a, Vec b, std::integer_sequence<int, J...>) {
  return picked<(J / W * 2 * W + J % W)...>(a, b) + picked<(J / W * 2 * W + J % W + W)...>(a, b);
}

// The sum of each of kLanes vectors' lanes; they are used up.
template <int W = kLanes / 2>
inline Vec lane_sums(Vec* x) {
  for (int i = 0; i < W; i++) x[i] = fold<W>(x[2 * i], x[2 * i + 1], Every());
  if constexpr (W > 1) return lane_sums<W / 2>(x);
  return x[0];
}

inline float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < kLanes; i++) total += x[i];
  return total;
}

template <int From, int... J>
inline Vec zip(Vec a, Vec b, std::integer_sequence<int, J...>) {
  return picked<(From + J / 2 + J % 2 * kLanes)...>(a, b);
}

// x [kLanes, kLanes] turned.
inline void transpose(Vec* x) {
  for (int round = 1; round < kLanes; round *= 2) {
    Vec zipped[kLanes];
    for (int i = 0; i < kLanes / 2; i++) {
      zipped[2 * i] = zip<0>(x[i], x[i + kLanes / 2], Every());
      zipped[2 * i + 1] = zip<kLanes / 2>(x[i], x[i + kLanes / 2], Every());
    }
    std::copy(zipped, zipped + kLanes, x);
  }
}

constexpr float kRounds = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction

// Room for `count` numbers that are not set. Setting megabytes of them for every product would take as long as a layer.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : at_(static_cast<T*>(::operator new(count * sizeof(T), kAlign))) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { ::operator delete(at_, kAlign); }
  T* get() const { return at_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* at_;
};

inline int64_t threads(const ffi::ThreadPool& pool) { return std::max<int64_t>(1, pool.num_threads()); }

// Calls work(i), which does not throw, for every i in [0, count), here and on XLA's threads. Each goes through a range
// of its own, then helps with the others': a thread that begins late, or never, holds nobody up.
template <class Work>
void spread(ffi::ThreadPool& pool, int64_t count, Work work) {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Progress {
    std::vector<Range> ranges;
    std::atomic<int64_t> joined{0}, done{0};
  };
  const int64_t parts = std::min(count, threads(pool));
  auto progress = std::make_shared<Progress>();
  progress->ranges = std::vector<Range>(parts);
  for (int64_t part = 0; part < parts; part++) {
    progress->ranges[part].next = count * part / parts;
    progress->ranges[part].end = count * (part + 1) / parts;
  }
  auto help = [=] {
    const int64_t mine = progress->joined.fetch_add(1);
    int64_t finished = 0;
    for (int64_t part = 0; part < parts; part++) {
      Range& range = progress->ranges[(mine + part) % parts];
      for (int64_t i; (i = range.next.fetch_add(1)) < range.end; finished++) work(i);
    }
    progress->done.fetch_add(finished);
  };
  for (int64_t part = 1; part < parts; part++) {
    auto helper = help;
    pool.Schedule(std::move(helper));
  }
  help();
  for (int64_t spins = 0; progress->done.load() < count; spins++)
    if (spins > 10000) std::this_thread::yield();
}

// A weight's tile is what kLanes outputs have of all inputs, in this order: of a float32 weight [I, kLanes], of an
// 8-bit one [I / 4, kLanes, 4].
constexpr int64_t kAhead = 32768;   // bytes of a weight that are asked for before they are needed
constexpr int64_t kNear = 1 << 18;  // bytes of a weight that a core's cache keeps
constexpr int kPanel = 16;          // columns of x that are copied together

// A product: what is read, and what is done to each sum.
struct Product {
  int64_t tiles, columns;
  int64_t stride;        // columns of a panel
  int64_t tile_bytes;    // of the weight
  const float* factors;  // of each column
  bool squared;          // max(., 0)^2
  const float* plus;     // [O, C] or nullptr
  float* y;              // [O, C]
};

// Columns that lie as a panel does already.
inline bool few(int64_t columns) {
  return columns == 1 || columns == 2 || columns == 4 || columns == 8 || columns == 16;
}

// Calls work with the number of columns of a panel; of a whole one as a constant, for which loops become vectors.
template <class Work>
inline void of_panel(int64_t count, Work work) {
  if (count == kPanel) return work(std::integral_constant<int64_t, kPanel>());
  work(count);
}

// Multiplies `factors` by 1 / RMS of the first columns of x, of which there are `columns`.
template <class Count>
inline void divide_by_rms(const float* x, int64_t inputs, int64_t columns, Count count, float eps, float* factors) {
  float squares[kPanel] = {};
  for (int64_t i = 0; i < inputs; i++)
    for (int64_t c = 0; c < count; c++) squares[c] += x[i * columns + c] * x[i * columns + c];
  for (int64_t c = 0; c < count; c++) factors[c] *= 1 / std::sqrt(squares[c] / inputs + eps);
}

// The outputs of tile t, `real` of N columns from `column` on.
template <int N>
inline void finish(const Product& how, const Vec* sums, int64_t t, int64_t column, int64_t real) {
  Vec turned[N];
  for (int n = 0; n < N; n++) {
    const Vec x = sums[n] * how.factors[column + n];
    turned[n] = how.squared ? (x < 0 ? Vec{} : x * x) : x;
  }
  const int64_t first = t * kLanes * how.columns + column;
  if constexpr (N % kLanes == 0)
    if (real == N) {
      for (int n = 0; n < N; n += kLanes) {
        transpose(turned + n);
        for (int64_t o = 0; o < kLanes; o++) {
          const int64_t at = first + o * how.columns + n;
          store(how.y + at, how.plus ? turned[n + o] + load(how.plus + at) : turned[n + o]);
        }
      }
      return;
    }
  for (int64_t o = 0; o < kLanes; o++)
    for (int64_t n = 0; n < real; n++) {
      const int64_t at = first + o * how.columns + n;
      how.y[at] = how.plus ? turned[n][o] + how.plus[at] : turned[n][o];
    }
}

template <int N>
using Constant = std::integral_constant<int, N>;

// `sums_of(s, n, m, tile, panel, column, ahead, sums)`: m tiles' sums of n of the s columns of a panel, from `column`
// on; those of a tile stand s behind those of the one before. `ahead`: what comes later is to be asked for.
template <int S, int N, int M, class Sums>
void multiply(ffi::ThreadPool& pool, const Product& how, Sums sums_of) {
  // Of a single panel a thread takes tiles one by one; each of many meets as many tiles as stay in a core's cache.
  const int64_t near = std::max<int64_t>(1, kNear / (how.tile_bytes * M)) * M;
  const int64_t half = std::max<int64_t>(1, how.tiles / (2 * M * threads(pool))) * M;  // of a thread's
  const int64_t share = how.columns > kPanel ? std::min(near, half) : 1;
  spread(pool, (how.tiles + share - 1) / share, [=](int64_t part) noexcept {
    const int64_t end = std::min(how.tiles, (part + 1) * share);
    auto of = [&](auto m, int64_t panel, int64_t t) {
      Vec sums[m * S];
      for (int64_t c = 0; c < S; c += N)
        sums_of(Constant<S>(), Constant<N>(), m, t, panel, c, c == 0 && panel == 0, sums + c);
      const int64_t column = panel * kPanel;
      for (int64_t i = 0; i < m; i++)
        finish<S>(how, sums + i * S, t + i, column, std::min<int64_t>(S, how.columns - column));
    };
    for (int64_t panel = 0; panel * kPanel < how.columns; panel++) {
      int64_t t = part * share;
      for (; t + M <= end; t += M) of(Constant<M>(), panel, t);
      for (; t < end; t++) of(Constant<1>(), panel, t);
    }
  });
}

template <class Sums>
void multiply(ffi::ThreadPool& pool, const Product& how, Sums sums_of) {
  switch (how.stride) {
    case 1:
      return multiply<1, 1, 1>(pool, how, sums_of);
    case 2:
      return multiply<2, 2, 1>(pool, how, sums_of);
    case 4:
      return multiply<4, 4, 1>(pool, how, sums_of);
    case 8:
      return multiply<8, std::min(8, kAtOnce), 1>(pool, how, sums_of);
    default:  // where x bounds it, not the weight, two tiles at once read half of x
      if (how.columns > kPanel) return multiply<kPanel, kAtOnce / 2, 2>(pool, how, sums_of);
      return multiply<kPanel, kAtOnce, 1>(pool, how, sums_of);
  }
}

// M tiles of floats with N columns of x [I, stride]: sums [N] a tile, of a tile `apart` behind those of the one before.
template <int N, int M>
inline void sums_of_floats(const float* weight, const float* x, int64_t inputs, int64_t stride, bool ahead, Vec* sums,
                           int64_t apart) {
  Vec found[M][N] = {};
  for (int64_t i = 0; i < inputs; i++) {
    Vec w[M];
    for (int m = 0; m < M; m++) {
      const float* at = weight + (m * inputs + i) * kLanes;
      if (ahead) __builtin_prefetch(reinterpret_cast<const char*>(at) + kAhead);
      w[m] = load(at);
    }
    for (int n = 0; n < N; n++)
      for (int m = 0; m < M; m++) found[m][n] += w[m] * x[i * stride + n];
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sums[m * apart + n] = found[m][n];
}

// y [O, C] of weight [O / kLanes, I, kLanes] and x [I, C]. `normed`: of the columns' RMS norm; `squared`: max(y, 0)^2;
// plus [O, C], or an empty array: added.
ffi::Error product(ffi::ThreadPool pool, Floats weight, Floats x, Floats plus, Result y, bool normed, bool squared,
                   float eps) {
  const int64_t tiles = weight.dimensions()[0], inputs = x.dimensions()[0], columns = x.dimensions()[1];
  if (weight.dimensions()[1] != inputs || y->element_count() != static_cast<size_t>(tiles * kLanes * columns))
    return ffi::Error::InvalidArgument("weight, x and y do not fit");
  const int64_t panels = (columns + kPanel - 1) / kPanel, stride = few(columns) ? columns : kPanel;
  const bool copies = stride != columns;
  std::vector<float> factors(panels * kPanel, 1.0f);
  const Scratch<float> copied(copies ? panels * kPanel * inputs : 0);
  const float *of_x = x.typed_data(), *of_weight = weight.typed_data();
  float *factor = factors.data(), *copy = copied.get();
  if (copies || normed)
    spread(pool, panels, [=](int64_t panel) noexcept {
      const int64_t begin = panel * kPanel, end = std::min(columns, begin + kPanel);
      if (normed)
        of_panel(end - begin,
                 [&](auto count) { divide_by_rms(of_x + begin, inputs, columns, count, eps, factor + begin); });
      if (!copies) return;
      for (int64_t i = 0; i < inputs; i++)
        std::memcpy(copy + (panel * inputs + i) * kPanel, of_x + i * columns + begin, (end - begin) * sizeof(float));
    });
  const float* data = copies ? copy : of_x;
  const float* added = plus.element_count() ? plus.typed_data() : nullptr;
  const Product how{tiles, columns, stride, inputs * kLanes * 4, factor, squared, added, y->typed_data()};
  multiply(pool, how, [=](auto s, auto n, auto m, int64_t t, int64_t panel, int64_t c, bool ahead, Vec* sums) {
    sums_of_floats<n, m>(of_weight + t * inputs * kLanes, data + panel * inputs * kPanel + c, inputs, s, ahead, sums,
                         s);
  });
  return ffi::Error::Success();
}

#ifdef __AVX512VNNI__

// M tiles of 8-bit integers with N columns of a panel [I / 4, S, 4] of integers to which 128 is added: the instruction
// multiplies unsigned numbers by signed ones.
template <int S, int N, int M>
inline void sums_of_bytes(const int8_t* weight, const float* scales, const uint8_t* x, int64_t inputs, bool ahead,
                          Vec* sums) {
  __m512i found[M][N], added[M];
  for (int m = 0; m < M; m++) {
    added[m] = _mm512_setzero_si512();
    for (int n = 0; n < N; n++) found[m][n] = added[m];
  }
  const __m512i all_128 = _mm512_set1_epi8(-128);
  for (int64_t i = 0; i < inputs; i += 4) {
    __m512i w[M];
    for (int m = 0; m < M; m++) {
      const int8_t* at = weight + (m * inputs + i) * kLanes;
      if (ahead) __builtin_prefetch(at + kAhead);
      w[m] = _mm512_loadu_si512(at);
      added[m] = _mm512_dpbusd_epi32(added[m], all_128, w[m]);
    }
    for (int n = 0; n < N; n++) {
      int32_t four;
      std::memcpy(&four, x + i * S + 4 * n, sizeof four);
      for (int m = 0; m < M; m++) found[m][n] = _mm512_dpbusd_epi32(found[m][n], _mm512_set1_epi32(four), w[m]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(found[m][n], added[m]));
      sums[m * S + n] = reinterpret_cast<Vec>(sum) * load(scales + m * kLanes);
    }
}

// The first columns of x, of which there are `columns`, rounded to 8 bits by their largest magnitude, as a panel [I /
// 4, stride, 4]; `factors`: what they were divided by.
template <class Count>
inline void round(const float* x, int64_t inputs, int64_t columns, Count count, int64_t stride, float* factors,
                  uint8_t* panel) {
  float largest[kPanel] = {}, inverse[kPanel] = {}, none[kPanel] = {};
  for (int64_t i = 0; i < inputs; i++)
    for (int64_t c = 0; c < count; c++) {
      const float now = x[i * columns + c];
      largest[c] = std::max(largest[c], std::abs(now));
      none[c] += now - now;  // 0, or no number if x is none
    }
  for (int64_t c = 0; c < count; c++) {
    const float factor = std::max(largest[c], 1e-30f) / 127;
    inverse[c] = 1 / factor;
    factors[c] = factor + none[c];
  }
  for (int64_t i = 0; i < inputs; i += 4)
    for (int64_t c = 0; c < count; c++) {
      uint32_t four = 0;
      for (int j = 0; j < 4; j++) {
        const float whole = (x[(i + j) * columns + c] * inverse[c] + kRounds) - kRounds;
        const float kept = std::min(127.0f, std::max(-127.0f, whole));  // what is no number, too
        four |= static_cast<uint32_t>(static_cast<int32_t>(kept) + 128) << (8 * j);
      }
      std::memcpy(panel + (i * stride + 4 * c), &four, sizeof four);
    }
}

// The same of weight [O / 16, I / 4, 16, 4], in 8 bits, times scales [O]; each column of x is rounded to 8 bits too.
ffi::Error product_int8(ffi::ThreadPool pool, Bytes weight, Floats scales, Floats x, Floats plus, Result y, bool normed,
                        bool squared, float eps) {
  const int64_t tiles = weight.dimensions()[0], inputs = x.dimensions()[0], columns = x.dimensions()[1];
  if (weight.dimensions()[1] * 4 != inputs || y->element_count() != static_cast<size_t>(tiles * kLanes * columns))
    return ffi::Error::InvalidArgument("weight, x and y do not fit");
  const int64_t panels = (columns + kPanel - 1) / kPanel, stride = few(columns) ? columns : kPanel;
  std::vector<float> factors(panels * kPanel);
  const Scratch<uint8_t> bytes(panels * stride * inputs);
  const float *of_x = x.typed_data(), *of_scales = scales.typed_data();
  const int8_t* of_weight = weight.typed_data();
  float* factor = factors.data();
  uint8_t* byte = bytes.get();
  spread(pool, panels, [=](int64_t panel) noexcept {
    const int64_t begin = panel * kPanel, end = std::min(columns, begin + kPanel);
    of_panel(end - begin, [&](auto count) {
      round(of_x + begin, inputs, columns, count, stride, factor + begin, byte + panel * inputs * kPanel);
      if (normed) divide_by_rms(of_x + begin, inputs, columns, count, eps, factor + begin);
    });
  });
  const float* added = plus.element_count() ? plus.typed_data() : nullptr;
  const Product how{tiles, columns, stride, inputs * kLanes, factor, squared, added, y->typed_data()};
  multiply(pool, how, [=](auto s, auto n, auto m, int64_t t, int64_t panel, int64_t c, bool ahead, Vec* sums) {
    sums_of_bytes<s, n, m>(of_weight + t * inputs * kLanes, of_scales + t * kLanes,
                           byte + panel * inputs * kPanel + 4 * c, inputs, ahead, sums);
  });
  return ffi::Error::Success();
}

#endif

// Of x <= 0, to 2e-7 relatively: 2^n e^r with r in +-ln(2) / 2, by the polynomial of Cephes' expf.
inline Vec exp(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x;
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
  int64_t ahead;  // how far behind these keys those are that come after these values
};

// The scores of the first `count` keys [kLanes, width]; of the others nothing is read, and they get the last one's.
// Their values, which come next, are asked for.
inline Vec score(const float* query, const float* keys, const float* values, int64_t count, int64_t width,
                 float scale) {
  constexpr int kSome = std::min(8, kLanes);
  Vec found[kLanes];
  for (int64_t first = 0; first < kLanes; first += kSome) {
    const float* of[kSome];
    for (int n = 0; n < kSome; n++) of[n] = keys + std::min(first + n, count - 1) * width;
    Vec partial[kSome] = {};
    for (int64_t h = 0; h < width; h += kLanes) {
      const Vec q = load(query + h);
      for (int n = 0; n < kSome; n++) {
        __builtin_prefetch(values + (of[n] - keys) + h);
        partial[n] += q * load(of[n] + h);
      }
    }
    for (int n = 0; n < kSome; n++) found[first + n] = partial[n];
  }
  return lane_sums(found) * scale;
}

// The slots of tokens `least` to `last` in a ring, where token t stands in slot t mod `slots`; of those that it still
// has.
void visible(const float* keys, const float* values, int64_t slots, int64_t width, int64_t least, int64_t last,
             int64_t ahead, std::vector<Slots>& found) {
  least = std::max({least, last - slots + 1, int64_t{0}});
  if (least > last) return;
  const int64_t begin = least % slots, end = last % slots + 1;
  auto add = [&](int64_t from, int64_t to) {
    found.push_back({keys + from * width, values + from * width, to - from, ahead});
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
  Vec most = Vec{} - INFINITY;
  for (const Slots& run : slots) {
    for (int64_t t = 0; t < run.count; t += kLanes) {
      const Vec found = score(query, run.keys + t * width, run.values + t * width, run.count - t, width, scale);
      most = most > found ? most : found;
      store(&scores[count + t], found);
    }
    count += run.count;
  }
  float each[kLanes];
  store(each, most);
  const float largest = *std::max_element(each, each + kLanes);
  std::fill_n(scores.begin() + count, kLanes, -INFINITY);
  Vec totals{};
  for (int64_t t = 0; t < count; t += kLanes) {
    Vec weights = exp(load(&scores[t]) - largest);
    store(&scores[t], weights);
    totals += weights;
  }
  const float total = sum(totals);
  constexpr int kVectors = 8;
  for (int64_t h = 0; h < width; h += kVectors * kLanes) {
    const int64_t vectors = std::min<int64_t>(kVectors, (width - h) / kLanes);
    Vec sums[kVectors] = {};
    int64_t t = 0;
    for (const Slots& run : slots)
      for (int64_t s = 0; s < run.count; s++, t++) {
        const float* value = run.values + s * width + h;
        for (int v = 0; v < vectors; v++) __builtin_prefetch(run.keys + run.ahead + s * width + h + v * kLanes);
        if (vectors == kVectors) {
          for (int v = 0; v < kVectors; v++) sums[v] += scores[t] * load(value + v * kLanes);
        } else {
          for (int v = 0; v < vectors; v++) sums[v] += scores[t] * load(value + v * kLanes);
        }
      }
    for (int v = 0; v < vectors; v++)
      for (int64_t l = 0; l < kLanes; l++) out[(h + v * kLanes + l) * stride] = sums[v][l] / total;
  }
}

// One decode step's attention. qkv [K, G + 2, H, B] as the product gave it, H a multiple of 16; value [K, H, B] in
// place of its last, or empty; a row's own keys and values [B, K, S, H], to which the new ones are added in place;
// those of the prompts that rows share [P, K, T, H], P 0 where none do; cos and signed sin [B, H]; each row's position
// and the first of its own tokens [B]; y [K, G, H, B].
ffi::Error attention(ffi::ThreadPool pool, Floats qkv, Floats value, Floats own_keys, Floats own_values,
                     Floats shared_keys, Floats shared_values, Floats cos, Floats sin, Ints positions, Ints first,
                     Result y, Result new_keys, Result new_values, int64_t window, float qk_scale, float eps) {
  const auto sizes = qkv.dimensions();
  const int64_t heads = sizes[0], queries = sizes[1] - 2, width = sizes[2], rows = sizes[3];
  const int64_t slots = own_keys.dimensions()[2], prompts = shared_keys.dimensions()[0];
  const int64_t prompt_slots = shared_keys.dimensions()[2], together = prompts ? rows / prompts : 1;
  float *keys = new_keys->typed_data(), *values = new_values->typed_data(), *to = y->typed_data();
  if (width % kLanes) return ffi::Error::InvalidArgument("heads are as wide as several vectors");
  if (keys != own_keys.typed_data() || values != own_values.typed_data())
    return ffi::Error::Internal("the KV cache was not updated in place");
  const float *of_qkv = qkv.typed_data(), *of_value = value.element_count() ? value.typed_data() : nullptr;
  const float *prompt_keys = shared_keys.typed_data(), *prompt_values = shared_values.typed_data();
  const float *of_cos = cos.typed_data(), *of_sin = sin.typed_data();
  const int32_t *at = positions.typed_data(), *begins = first.typed_data();
  // Neighbouring rows write to the same cache lines of y, so a thread does several rows of a head, and all if it can.
  const int64_t block = std::clamp<int64_t>(rows * heads / (4 * threads(pool)), 1, 16),
                blocks = (rows + block - 1) / block;
  spread(pool, blocks * heads, [=](int64_t part) noexcept {
    const int64_t head = part / blocks, begin = part % blocks * block;
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
      visible(keys + panel, values + panel, slots, width, last - window, last, heads * slots * width, seen);
      if (prompts) {
        const int64_t prompt = (row / together * heads + head) * prompt_slots * width;
        visible(prompt_keys + prompt, prompt_values + prompt, prompt_slots, width, at[row] - window, begins[row] - 1, 0,
                seen);
      }
      for (int64_t n = 0; n < queries; n++)
        attend(&turned[n * width], seen, width, scores, to + (head * queries + n) * width * rows + row, rows);
    }
  });
  return ffi::Error::Success();
}

constexpr int kKeys = 16;  // of a prompt, that are looked at together

// Causal attention of whole prompts, from position 0 on. qkv [K, G + 2, H, P, T] and value [K, H, P, T] as above; cos
// and signed sin [H, T]; y [K, G, H, P, T], keys and values [P, K, T, H]. Lanes are positions of a query.
ffi::Error prompt_attention(ffi::ThreadPool pool, Floats qkv, Floats value, Floats cos, Floats sin, Result y,
                            Result keys, Result values, int64_t window, float qk_scale, float eps) {
  const auto sizes = qkv.dimensions();
  const int64_t heads = sizes[0], kinds = sizes[1], queries = kinds - 2, width = sizes[2], prompts = sizes[3];
  const int64_t length = sizes[4], blocks = (length + kLanes - 1) / kLanes;
  const int64_t padded = (length + kKeys - 1) / kKeys * kKeys;
  if (width % kKeys || cos.element_count() != static_cast<size_t>(width * length))
    return ffi::Error::InvalidArgument("the width of the heads or the rotary positions do not fit");
  const Scratch<float> turned(prompts * heads * kinds * width * padded);
  const float *of_qkv = qkv.typed_data(), *of_value = value.element_count() ? value.typed_data() : nullptr;
  const float *of_cos = cos.typed_data(), *of_sin = sin.typed_data();
  float *to_keys = keys->typed_data(), *to_values = values->typed_data(), *to = y->typed_data(),
        *of_turned = turned.get();
  // Queries and keys with rotary positions and norms, and values: [P, K, G + 2, H, padded]; the cache's from them.
  spread(pool, prompts * heads * kinds, [=](int64_t part) noexcept {
    const int64_t kind = part % kinds, head = part / kinds % heads, prompt = part / kinds / heads;
    const int64_t apart = prompts * length;  // of features
    const float* x = of_qkv + (head * kinds + kind) * width * apart + prompt * length;
    if (kind == queries + 1 && of_value) x = of_value + head * width * apart + prompt * length;
    float* out = of_turned + part * width * padded;
    if (kind > queries) {
      for (int64_t h = 0; h < width; h++) std::memcpy(out + h * padded, x + h * apart, length * sizeof(float));
    } else {
      std::vector<float> factors(length);
      for (int64_t h = 0; h < width; h++) {
        const float* other = x + (h < width / 2 ? h + width / 2 : h - width / 2) * apart;
        for (int64_t t = 0; t < length; t++) {
          const float now = x[h * apart + t] * of_cos[h * length + t] + other[t] * of_sin[h * length + t];
          out[h * padded + t] = now;
          factors[t] += now * now;
        }
      }
      for (float& factor : factors) factor = qk_scale / std::sqrt(factor / width + eps);
      for (int64_t h = 0; h < width; h++)
        for (int64_t t = 0; t < length; t++) out[h * padded + t] *= factors[t];
    }
    if (kind < queries) return;
    float* panel = (kind == queries ? to_keys : to_values) + (prompt * heads + head) * length * width;
    for (int64_t t = 0; t < length; t += kLanes)
      for (int64_t h = 0; h < width; h += kLanes) {
        Vec square[kLanes];
        for (int64_t i = 0; i < kLanes; i++) square[i] = load(out + (h + i) * padded + t);
        transpose(square);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, length - t); i++)
          store(panel + (t + i) * width + h, square[i]);
      }
  });
  const float scale = 1 / std::sqrt(static_cast<float>(width));
  spread(pool, prompts * heads * queries * blocks, [=](int64_t part) noexcept {
    const int64_t begin = part % blocks * kLanes, query = part / blocks % queries;
    const int64_t head = part / blocks / queries % heads, prompt = part / blocks / queries / heads;
    const float* mine = of_turned + (prompt * heads + head) * kinds * width * padded;
    const Scratch<float> q(width * kLanes);
    for (int64_t h = 0; h < width; h++) store(q.get() + h * kLanes, load(mine + (query * width + h) * padded + begin));
    const int64_t first = std::max<int64_t>(0, begin - window) / kKeys * kKeys, last = std::min(length, begin + kLanes);
    const Scratch<float> all((last - first + kKeys) * kLanes);
    auto* scores = reinterpret_cast<Vec*>(all.get());
    IntVec position;
    for (int64_t i = 0; i < kLanes; i++) position[i] = begin + i;
    Vec most = Vec{} - INFINITY, total{};
    for (int64_t key = first; key < last; key += kKeys) {
      Vec* found = scores + key - first;
      for (int64_t n = 0; n < kKeys; n += kAtOnce)
        sums_of_floats<kAtOnce, 1>(q.get(), mine + queries * width * padded + key + n, width, padded, false, found + n,
                                   0);
      for (int64_t n = 0; n < kKeys; n++) {
        const int32_t at = key + n;
        const Vec score =
            ((at <= position) & (at >= position - static_cast<int32_t>(window))) ? found[n] * scale : Vec{} - INFINITY;
        most = most > score ? most : score;
        found[n] = score;
      }
    }
    for (int64_t i = 0; i < last - first; i++) total += scores[i] = exp(scores[i] - most);
    const float* of_values = to_values + ((prompt * heads + head) * length + first) * width;
    for (int64_t h = 0; h < width; h += kAtOnce) {
      Vec found[kAtOnce];
      sums_of_floats<kAtOnce, 1>(all.get(), of_values + h, last - first, width, false, found, 0);
      for (int n = 0; n < kAtOnce; n++) {
        float* out = to + (((head * queries + query) * width + h + n) * prompts + prompt) * length + begin;
        const Vec mean = found[n] / total;
        std::memcpy(out, &mean, (last - begin) * sizeof(float));
      }
    }
  });
  return ffi::Error::Success();
}

// Larger than another number's if this number is larger, as XLA has it: what is no number lies beyond the infinity of
// its sign, and -0 before 0.
inline int32_t ordered(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ (bits >> 31 & 0x7FFFFFFF);
}

// The largest `count` of each column of logits [V, B], descending, of equal ones the first: values and tokens [B,
// count]. The `count` blocks of tokens with the largest maxima hold them all.
ffi::Error top(ffi::ThreadPool pool, Floats logits, Result values, ffi::ResultBuffer<ffi::S32> tokens) {
  const int64_t vocabulary = logits.dimensions()[0], rows = logits.dimensions()[1], count = values->dimensions()[1];
  if (count > vocabulary) return ffi::Error::InvalidArgument("more are asked for than there are");
  constexpr int64_t kBlock = 16;
  const int64_t blocks = (vocabulary + kBlock - 1) / kBlock, share = (blocks + threads(pool) - 1) / threads(pool);
  std::vector<int32_t> maxima(blocks * rows, std::numeric_limits<int32_t>::min());
  const float* of_logits = logits.typed_data();
  float* to_values = values->typed_data();
  int32_t *largest = maxima.data(), *to_tokens = tokens->typed_data();
  spread(pool, (blocks + share - 1) / share, [=](int64_t part) noexcept {
    for (int64_t v = part * share * kBlock; v < std::min(vocabulary, (part + 1) * share * kBlock); v++)
      for (int64_t row = 0; row < rows; row++) {
        int32_t& most = largest[v / kBlock * rows + row];
        most = std::max(most, ordered(of_logits[v * rows + row]));
      }
  });
  spread(pool, rows, [=](int64_t row) noexcept {
    std::vector<int32_t> sorted(blocks);
    for (int64_t b = 0; b < blocks; b++) sorted[b] = largest[b * rows + row];
    int32_t least = std::numeric_limits<int32_t>::min();
    if (blocks > count) {
      std::nth_element(sorted.begin(), sorted.begin() + count - 1, sorted.end(), std::greater<int32_t>());
      least = sorted[count - 1];
    }
    std::vector<std::pair<int32_t, int32_t>> found;  // the largest has the least complement
    for (int64_t b = 0; b < blocks; b++) {
      if (largest[b * rows + row] < least) continue;
      for (int64_t v = b * kBlock; v < std::min(vocabulary, (b + 1) * kBlock); v++)
        if (int32_t key = ordered(of_logits[v * rows + row]); key >= least) found.emplace_back(~key, v);
    }
    if (static_cast<size_t>(count) < found.size()) std::nth_element(found.begin(), found.begin() + count, found.end());
    std::sort(found.begin(), found.begin() + count);
    for (int64_t i = 0; i < count; i++) {
      to_values[row * count + i] = of_logits[found[i].second * rows + row];
      to_tokens[row * count + i] = found[i].second;
    }
  });
  return ffi::Error::Success();
}

// Threefry 2x32 with 20 rounds (Salmon et al. 2011), as JAX has it: the blocks [..., n, 2] of the counters first, first
// + 1, ... under keys [..., 2].
ffi::Error threefry(Words keys, Words first, ffi::ResultBuffer<ffi::U32> blocks) {
  const int64_t count = first.element_count(), each = count ? blocks->element_count() / 2 / count : 0;
  for (int64_t k = 0; k < count; k++) {
    const uint32_t key[3] = {keys.typed_data()[2 * k], keys.typed_data()[2 * k + 1],
                             keys.typed_data()[2 * k] ^ keys.typed_data()[2 * k + 1] ^ 0x1BD11BDA};
    const uint32_t begin = first.typed_data()[k];
    uint32_t* to = blocks->typed_data() + 2 * k * each;
    for (int64_t i = 0; i < each; i++) {
      uint32_t x = key[0], y = begin + static_cast<uint32_t>(i) + key[1];
      for (uint32_t round = 0; round < 5; round++) {
        constexpr int kTurns[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
        for (int turn : kTurns[round % 2]) {
          x += y;
          y = (y << turn | y >> (32 - turn)) ^ x;
        }
        x += key[(round + 1) % 3];
        y += key[(round + 2) % 3] + round + 1;
      }
      to[2 * i] = x;
      to[2 * i + 1] = y;
    }
  }
  return ffi::Error::Success();
}

}  // namespace

// Outputs of a packed weight that stand together.
extern "C" {
extern const int nanochat_lanes;
const int nanochat_lanes = kLanes;
}

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
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Bytes>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<bool>("normed")
                                  .Attr<bool>("squared")
                                  .Attr<float>("eps"));
#endif

XLA_FFI_DEFINE_HANDLER_SYMBOL(nanochat_prompt_attention, prompt_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("qk_scale")
                                  .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nanochat_top, top,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Ret<Floats>().Ret<Ints>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(nanochat_threefry, threefry, ffi::Ffi::Bind().Arg<Words>().Arg<Words>().Ret<Words>());

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
