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

// Lanes of a vector; vectors of sums that stay in registers; vectors that columns are taken in, where there are many.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kAtOnce = 16, kVectors = 2;
#elif defined(__AVX__)
constexpr int kLanes = 8, kAtOnce = 8, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kAtOnce = 16, kVectors = 4;
#else
constexpr int kLanes = 4, kAtOnce = 8, kVectors = 2;
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

// An optional array: nullptr where it is empty.
template <class Buffer>
inline auto given(const Buffer& x) {
  return x.element_count() ? x.typed_data() : nullptr;
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

// How the columns of x [I, C] are read: in vectors of them, as many as a product takes at once next to each other (a
// panel [I, width]), and those that are left by themselves. The last begins early enough to end with the columns: what
// it shares with the one before is computed twice. Fewer columns than a vector has are one panel, filled up to a power
// of two. Where there are lengths [P], the columns are prompts [P, C / P], of which no vector lies beyond its length.
struct Columns {
  Columns(int64_t count, const Ints& lengths) : count(count), lanes(1) {
    while (lanes < std::min<int64_t>(count, kLanes)) lanes *= 2;
    const int64_t prompts = std::max<int64_t>(lengths.element_count(), 1), longest = count / prompts;
    for (int64_t p = 0; p < prompts; p++) {
      const int64_t end = lengths.element_count() ? std::min<int64_t>(lengths.typed_data()[p], longest) : longest;
      for (int64_t t = 0; t < end; t += lanes)
        begins.push_back(std::min(p * longest + t, std::max<int64_t>(count - lanes, 0)));
    }
    if (count <= lanes && !begins.empty()) begins.resize(1);  // whatever prompts they are
  }

  int64_t vectors() const { return begins.size(); }

  // Calls work(vector), which does not throw, for all of them, a panel at a time.
  template <class Work>
  void each(ffi::ThreadPool& pool, Work work) const {
    const int64_t end = vectors();
    spread(pool, (end + kVectors - 1) / kVectors, [=](int64_t panel) noexcept {
      for (int64_t v = panel * kVectors; v < std::min(end, (panel + 1) * kVectors); v++) work(v);
    });
  }

  // How many vectors are next to each other in this one's panel.
  int64_t beside(int64_t vector) const { return vector / kVectors * kVectors + kVectors <= vectors() ? kVectors : 1; }

  // Where this vector is copied to among panels [I / `of`, width, `of`].
  int64_t place(int64_t vector, int64_t inputs, int64_t of) const {
    const int64_t before = vector % beside(vector);
    return (vector - before) * lanes * inputs + before * lanes * of;
  }

  // Whether x is its only panel already.
  bool are_x() const {
    if (vectors() * lanes != count || beside(0) != vectors()) return false;
    for (int64_t i = 0; i < vectors(); i++)
      if (begins[i] != i * lanes) return false;
    return true;
  }

  int64_t count, lanes;         // `lanes` of each vector
  std::vector<int64_t> begins;  // the first column of each
};

// A product: what is read, and what is done to each sum.
struct Product {
  int64_t tiles, tile_bytes;  // of the weight
  const Columns& columns;
  const float* factors;  // of each lane of each vector of columns
  bool squared;          // max(., 0)^2
  const float* plus;     // [O, C] or nullptr
  float* y;              // [O, C]

  Vec finished(Vec sums, Vec factors) const {
    const Vec x = sums * factors;
    return squared ? (x < 0 ? Vec{} : x * x) : x;
  }
};

// Calls work with the number of columns of a vector; of whole ones as a constant, for which loops become vectors.
template <class Work>
inline void of_vector(int64_t count, Work work) {
  if (count == kLanes) return work(std::integral_constant<int64_t, kLanes>());
  work(count);
}

// What work gives for the largest power of two up to N that is not above `count`, as a constant, for which loops become
// vectors in registers.
template <int N, class Work>
inline auto of_power(int64_t count, Work work) {
  if constexpr (N > 1) {
    if (count < N) return of_power<N / 2>(count, work);
  }
  return work(std::integral_constant<int, N>());
}

// Sums over i < count of N numbers [count, stride] times V vectors [count, V, kLanes]; of what is `ahead`, a line is
// asked for each time.
template <int N, int V>
inline void outer(const float* numbers, int64_t stride, const float* vectors, int64_t count, const float* ahead,
                  Vec (*sums)[V]) {
  Vec found[N][V] = {};
  for (int64_t i = 0; i < count; i++) {
    if (ahead) __builtin_prefetch(ahead + i * kLanes);
    Vec with[V];
    for (int v = 0; v < V; v++) with[v] = load(vectors + (i * V + v) * kLanes);
    for (int n = 0; n < N; n++)
      for (int v = 0; v < V; v++) found[n][v] += numbers[i * stride + n] * with[v];
  }
  for (int n = 0; n < N; n++)
    for (int v = 0; v < V; v++) sums[n][v] = found[n][v];
}

// Of V vectors of columns, from this one on, the outputs of tile t.
template <int V, class Sums>
inline void multiply_tile(const Product& how, Sums sums_of, int64_t t, int64_t vector) {
  constexpr int kOutputs = std::min(kLanes, kAtOnce / V);
  for (int64_t first = 0; first < kLanes; first += kOutputs) {
    Vec sums[kOutputs][V];
    sums_of.template many<kOutputs, V>(t, first, vector * kLanes, vector == 0 && first == 0, sums);
    for (int n = 0; n < kOutputs; n++)
      for (int v = 0; v < V; v++) {
        const int64_t at = (t * kLanes + first + n) * how.columns.count + how.columns.begins[vector + v];
        const Vec x = how.finished(sums[n][v], load(how.factors + (vector + v) * kLanes));
        if (how.columns.count >= kLanes) {
          store(how.y + at, how.plus ? x + load(how.plus + at) : x);
        } else {
          for (int64_t c = 0; c < how.columns.count; c++) how.y[at + c] = how.plus ? x[c] + how.plus[at + c] : x[c];
        }
      }
  }
}

// Of many columns: lanes are columns. Each panel meets as many tiles as stay in a core's cache.
template <class Sums>
void multiply_many(ffi::ThreadPool& pool, const Product& how, Sums sums_of) {
  const int64_t vectors = how.columns.vectors();
  const int64_t near = std::max<int64_t>(1, kNear / how.tile_bytes);
  const int64_t few = std::max<int64_t>(1, how.tiles / (8 * threads(pool)));  // an eighth of a thread's
  const int64_t share = vectors > kVectors ? std::min(near, few) : 1;
  spread(pool, (how.tiles + share - 1) / share, [=](int64_t part) noexcept {
    for (int64_t vector = 0; vector < vectors; vector += how.columns.beside(vector))
      for (int64_t t = part * share; t < std::min(how.tiles, (part + 1) * share); t++)
        if (how.columns.beside(vector) == kVectors) {
          multiply_tile<kVectors>(how, sums_of, t, vector);
        } else {
          multiply_tile<1>(how, sums_of, t, vector);
        }
  });
}

// Of fewer columns than a vector has: lanes are outputs.
template <class Sums>
void multiply_few(ffi::ThreadPool& pool, const Product& how, Sums sums_of) {
  of_power<kLanes / 2>(how.columns.lanes, [&](auto lanes) {
    constexpr int kColumns = lanes;
    spread(pool, how.tiles, [=](int64_t t) noexcept {
      Vec sums[kColumns][1];
      sums_of.template few<kColumns>(t, sums);
      for (int c = 0; c < kColumns; c++) sums[c][0] = how.finished(sums[c][0], Vec{} + how.factors[c]);
      for (int64_t o = 0; o < kLanes; o++)
        for (int64_t c = 0; c < how.columns.count; c++) {
          const int64_t at = (t * kLanes + o) * how.columns.count + c;
          how.y[at] = how.plus ? sums[c][0][o] + how.plus[at] : sums[c][0][o];
        }
    });
  });
}

template <class Sums>
void multiply(ffi::ThreadPool& pool, const Product& how, Sums sums_of) {
  if (how.columns.begins.empty()) return;
  if (how.columns.lanes == kLanes) return multiply_many(pool, how, sums_of);
  multiply_few(pool, how, sums_of);
}

// Sums of floats: weight [O / kLanes, I, kLanes], panels of x [I, width].
struct OfFloats {
  const float *weight, *x;
  int64_t inputs;

  template <int N, int V>
  void many(int64_t t, int64_t first, int64_t place, bool ahead, Vec (*sums)[V]) const {
    const float* tile = weight + t * inputs * kLanes;
    outer<N, V>(tile + first, kLanes, x + place * inputs, inputs, ahead ? tile + kAhead / 4 : nullptr, sums);
  }

  template <int C>
  void few(int64_t t, Vec (*sums)[1]) const {
    const float* tile = weight + t * inputs * kLanes;
    outer<C, 1>(x, C, tile, inputs, tile + kAhead / 4, sums);
  }
};

constexpr char kMisfit[] = "weight, x, lengths and y do not fit";

inline bool fit(int64_t inputs, int64_t tiles, const Floats& x, const Ints& lengths, Result& y) {
  const int64_t columns = x.dimensions()[1], prompts = lengths.element_count();
  return x.dimensions()[0] == inputs && y->element_count() == static_cast<size_t>(tiles * kLanes * columns) &&
         (!prompts || columns % prompts == 0);
}

// y [O, C] of weight [O / kLanes, I, kLanes] and x [I, C]. `normed`: of the columns' RMS norm; `squared`: max(y, 0)^2;
// plus [O, C], or an empty array: added. Of prompts of `lengths` [P], where these are given, C being P times as many,
// what is beyond its length is not set.
ffi::Error product(ffi::ThreadPool pool, Floats weight, Floats x, Floats plus, Ints lengths, Result y, bool normed,
                   bool squared, float eps) {
  const int64_t tiles = weight.dimensions()[0], inputs = x.dimensions()[0], columns = x.dimensions()[1];
  if (!fit(weight.dimensions()[1], tiles, x, lengths, y)) return ffi::Error::InvalidArgument(kMisfit);
  const Columns of_x(columns, lengths);
  const bool copies = !of_x.are_x();
  const int64_t lanes = of_x.lanes, all = of_x.vectors() * lanes;
  std::vector<float> factors(all, 1.0f);
  const Scratch<float> copied(copies ? all * inputs : 0);
  const Product how{tiles, inputs * kLanes * 4, of_x, factors.data(), squared, given(plus), y->typed_data()};
  const float* numbers = x.typed_data();
  float *factor = factors.data(), *copy = copied.get();
  if (copies || normed)
    of_x.each(pool, [=, &of_x](int64_t vector) noexcept {
      const float* from = numbers + of_x.begins[vector];
      float* to = copy + of_x.place(vector, inputs, 1);
      const int64_t width = of_x.beside(vector) * lanes;
      of_vector(std::min(lanes, columns), [=](auto count) {
        float squares[kLanes] = {};
        for (int64_t i = 0; i < inputs; i++)
          for (int64_t c = 0; c < count; c++) {
            const float now = from[i * columns + c];
            if (copies) to[i * width + c] = now;
            squares[c] += now * now;
          }
        if (!normed) return;
        for (int64_t c = 0; c < count; c++) factor[vector * lanes + c] = 1 / std::sqrt(squares[c] / inputs + eps);
      });
    });
  multiply(pool, how, OfFloats{weight.typed_data(), copies ? copy : numbers, inputs});
  return ffi::Error::Success();
}

#ifdef __AVX512VNNI__

// Sums of integers: weight [O / 16, I / 4, 16, 4], to which 128 is added, as the instruction multiplies unsigned
// numbers by signed ones; panels of x [I / 4, width, 4]; `added`: what that adds to each column's sums.
struct OfIntegers {
  const int8_t* weight;
  const float* scales;
  const int8_t* x;
  const int32_t* added;
  int64_t inputs;

  static __m512i four(const int8_t* at) {
    int32_t four;
    std::memcpy(&four, at, sizeof four);
    return _mm512_set1_epi32(four);
  }

  static Vec floats(__m512i sum, __m512i added) {
    return reinterpret_cast<Vec>(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, added)));
  }

  template <int N, int V>
  void many(int64_t t, int64_t first, int64_t place, bool ahead, Vec (*sums)[V]) const {
    const int8_t *tile = weight + t * inputs * kLanes, *panel = x + place * inputs;
    __m512i found[N][V] = {};
    for (int64_t i = 0; i < inputs; i += 4) {
      if (ahead) __builtin_prefetch(tile + i * kLanes + kAhead);
      __m512i with[V];
      for (int v = 0; v < V; v++) with[v] = _mm512_loadu_si512(panel + (i * V + 4 * v) * kLanes);
      for (int n = 0; n < N; n++) {
        const __m512i number = four(tile + i * kLanes + 4 * (first + n));
        for (int v = 0; v < V; v++) found[n][v] = _mm512_dpbusd_epi32(found[n][v], number, with[v]);
      }
    }
    for (int n = 0; n < N; n++)
      for (int v = 0; v < V; v++)
        sums[n][v] =
            floats(found[n][v], _mm512_loadu_si512(added + place + v * kLanes)) * scales[t * kLanes + first + n];
  }

  template <int C>
  void few(int64_t t, Vec (*sums)[1]) const {
    const int8_t* tile = weight + t * inputs * kLanes;
    __m512i found[C] = {};
    for (int64_t i = 0; i < inputs; i += 4) {
      __builtin_prefetch(tile + i * kLanes + kAhead);
      const __m512i with = _mm512_loadu_si512(tile + i * kLanes);
      for (int c = 0; c < C; c++) found[c] = _mm512_dpbusd_epi32(found[c], with, four(x + i * C + 4 * c));
    }
    for (int c = 0; c < C; c++) sums[c][0] = floats(found[c], _mm512_set1_epi32(added[c])) * load(scales + t * kLanes);
  }
};

// `count` columns of x, of which there are `columns`, rounded to 8 bits by their largest magnitude, to a panel [I / 4,
// width, 4]; `factors`: what they were divided by, and if `normed` by their RMS; `added`: see OfIntegers.
template <class Count>
inline void round(const float* x, int64_t inputs, int64_t columns, Count count, int64_t width, bool normed, float eps,
                  float* factors, int32_t* added, int8_t* panel) {
  float largest[kLanes] = {}, inverse[kLanes] = {}, none[kLanes] = {}, squares[kLanes] = {};
  for (int64_t i = 0; i < inputs; i++)
    for (int64_t c = 0; c < count; c++) {
      const float now = x[i * columns + c];
      largest[c] = std::max(largest[c], std::abs(now));
      none[c] += now - now;  // 0, or no number if x is none
      squares[c] += now * now;
    }
  for (int64_t c = 0; c < count; c++) {
    const float factor = std::max(largest[c], 1e-30f) / 127;
    inverse[c] = 1 / factor;
    factors[c] = (factor + none[c]) * (normed ? 1 / std::sqrt(squares[c] / inputs + eps) : 1.0f);
  }
  for (int64_t i = 0; i < inputs; i += 4)
    for (int64_t c = 0; c < count; c++) {
      uint32_t four = 0;
      for (int j = 0; j < 4; j++) {
        const float whole = (x[(i + j) * columns + c] * inverse[c] + kRounds) - kRounds;
        const float kept = std::min(127.0f, std::max(-127.0f, whole));  // what is no number, too
        const int32_t integer = static_cast<int32_t>(kept);
        four |= (static_cast<uint32_t>(integer) & 255) << (8 * j);
        added[c] += 128 * integer;
      }
      std::memcpy(panel + i * width + 4 * c, &four, sizeof four);
    }
}

// The same of weight [O / 16, I / 4, 16, 4], in 8 bits, times scales [O]; each column of x is rounded to 8 bits too.
ffi::Error product_int8(ffi::ThreadPool pool, Bytes weight, Floats scales, Floats x, Floats plus, Ints lengths,
                        Result y, bool normed, bool squared, float eps) {
  const int64_t tiles = weight.dimensions()[0], inputs = x.dimensions()[0], columns = x.dimensions()[1];
  if (!fit(weight.dimensions()[1] * 4, tiles, x, lengths, y)) return ffi::Error::InvalidArgument(kMisfit);
  const Columns of_x(columns, lengths);
  const int64_t lanes = of_x.lanes, all = of_x.vectors() * lanes;
  std::vector<float> factors(all);
  std::vector<int32_t> added(all);
  const Scratch<int8_t> bytes(all * inputs);
  const Product how{tiles, inputs * kLanes, of_x, factors.data(), squared, given(plus), y->typed_data()};
  const float* numbers = x.typed_data();
  float* factor = factors.data();
  int32_t* add = added.data();
  int8_t* byte = bytes.get();
  of_x.each(pool, [=, &of_x](int64_t vector) noexcept {
    of_vector(std::min(lanes, columns), [=, &of_x](auto count) {
      round(numbers + of_x.begins[vector], inputs, columns, count, of_x.beside(vector) * lanes, normed, eps,
            factor + vector * lanes, add + vector * lanes, byte + of_x.place(vector, inputs, 4));
    });
  });
  multiply(pool, how, OfIntegers{weight.typed_data(), scales.typed_data(), byte, add, inputs});
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
inline Vec score(const float* query, const float* keys, int64_t count, int64_t width, float scale) {
  constexpr int kSome = std::min(8, kLanes);
  Vec found[kLanes];
  for (int64_t first = 0; first < kLanes; first += kSome) {
    const float* of[kSome];
    for (int n = 0; n < kSome; n++) of[n] = keys + std::min(first + n, count - 1) * width;
    Vec partial[kSome] = {};
    for (int64_t h = 0; h < width; h += kLanes) {
      const Vec q = load(query + h);
      for (int n = 0; n < kSome; n++) partial[n] += q * load(of[n] + h);
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
      const Vec found = score(query, run.keys + t * width, run.count - t, width, scale);
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
  for (int64_t h = 0; h < width;) {
    h += of_power<8>((width - h) / kLanes, [&](auto vectors) {
      constexpr int kSums = vectors;
      Vec sums[kSums] = {};
      int64_t t = 0;
      for (const Slots& run : slots)
        for (int64_t s = 0; s < run.count; s++, t++) {
          const int64_t at = s * width + h;
          for (int v = 0; v < kSums; v++) __builtin_prefetch(run.keys + run.ahead + at + v * kLanes);
          for (int v = 0; v < kSums; v++) sums[v] += scores[t] * load(run.values + at + v * kLanes);
        }
      for (int v = 0; v < kSums; v++)
        for (int64_t l = 0; l < kLanes; l++) out[(h + v * kLanes + l) * stride] = sums[v][l] / total;
      return kSums * kLanes;
    });
  }
}

// One decode step's attention. qkv [K, G + 2, H, B] as the product gave it, H a multiple of 16; value [K, H, B] in
// place of its last, or empty; the own keys and values of the cache's R rows [R, K, S, H], to which the new ones are
// added in place; those of the prompts that as many of them share each [P, K, T, H], P 0 where none do; cos and signed
// sin [B, H]; each column's position and the first of its own tokens [B], and which row of the cache it is [B]; how
// many of the columns are looked at, the first ones [1]; y [K, G, H, B].
ffi::Error attention(ffi::ThreadPool pool, Floats qkv, Floats value, Floats own_keys, Floats own_values,
                     Floats shared_keys, Floats shared_values, Floats cos, Floats sin, Ints positions, Ints first,
                     Ints places, Ints computed, Result y, Result new_keys, Result new_values, int64_t window,
                     float qk_scale, float eps) {
  const auto sizes = qkv.dimensions();
  const int64_t heads = sizes[0], queries = sizes[1] - 2, width = sizes[2], columns = sizes[3];
  const int64_t rows = std::clamp<int64_t>(computed.typed_data()[0], 0, columns);
  const int64_t all = own_keys.dimensions()[0], slots = own_keys.dimensions()[2];
  const int64_t prompts = shared_keys.dimensions()[0], prompt_slots = shared_keys.dimensions()[2];
  float *keys = new_keys->typed_data(), *values = new_values->typed_data(), *to = y->typed_data();
  if (width % kLanes) return ffi::Error::InvalidArgument("heads are as wide as several vectors");
  if (keys != own_keys.typed_data() || values != own_values.typed_data())
    return ffi::Error::Internal("the KV cache was not updated in place");
  const float *of_qkv = qkv.typed_data(), *of_value = given(value);
  const float *prompt_keys = shared_keys.typed_data(), *prompt_values = shared_values.typed_data();
  const float *of_cos = cos.typed_data(), *of_sin = sin.typed_data();
  const int32_t *at = positions.typed_data(), *begins = first.typed_data(), *place = places.typed_data();
  // Neighbouring rows write to the same cache lines of y, so a thread does several rows of a head, and all if it can.
  const int64_t block = std::clamp<int64_t>(rows * heads / (8 * threads(pool)), 1, 16),
                blocks = (rows + block - 1) / block;
  spread(pool, blocks * heads, [=](int64_t part) noexcept {
    const int64_t head = part / blocks, begin = part % blocks * block;
    const float* mine = of_qkv + head * (queries + 2) * width * columns;
    const float* v = of_value ? of_value + head * width * columns : mine + (queries + 1) * width * columns;
    std::vector<float> scores(slots + prompt_slots + kLanes), turned((queries + 1) * width);
    std::vector<Slots> seen;
    for (int64_t row = begin; row < std::min(rows, begin + block); row++) {
      for (int64_t n = 0; n <= queries; n++) {  // the last is the key
        const float* x = mine + n * width * columns + row;
        float* out = &turned[n * width];
        float squares = 0;
        for (int64_t h = 0; h < width; h++) {
          const int64_t other = h < width / 2 ? h + width / 2 : h - width / 2;
          out[h] = x[h * columns] * of_cos[row * width + h] + x[other * columns] * of_sin[row * width + h];
          squares += out[h] * out[h];
        }
        const float factor = qk_scale / std::sqrt(squares / width + eps);
        for (int64_t h = 0; h < width; h++) out[h] *= factor;
      }
      const int64_t last = std::max(at[row] - begins[row], 0);  // among its own tokens
      const int64_t panel = (place[row] * heads + head) * slots * width, slot = panel + last % slots * width;
      for (int64_t h = 0; h < width; h++) {
        keys[slot + h] = turned[queries * width + h];
        values[slot + h] = v[h * columns + row];
      }
      seen.clear();
      visible(keys + panel, values + panel, slots, width, last - window, last, heads * slots * width, seen);
      if (prompts) {
        const int64_t prompt = (place[row] * prompts / all * heads + head) * prompt_slots * width;
        visible(prompt_keys + prompt, prompt_values + prompt, prompt_slots, width, at[row] - window, begins[row] - 1, 0,
                seen);
      }
      for (int64_t n = 0; n < queries; n++)
        attend(&turned[n * width], seen, width, scores, to + (head * queries + n) * width * columns + row, columns);
    }
  });
  return ffi::Error::Success();
}

constexpr int kKeys = 16;  // of a prompt, that are looked at together

// Causal attention of whole prompts, from position 0 on. qkv [K, G + 2, H, P, T] and value [K, H, P, T] as above; cos
// and signed sin [H, T]; lengths [P], or empty, as in `product`; y [K, G, H, P, T], keys and values [P, K, T, H]. Lanes
// are positions of a query.
ffi::Error prompt_attention(ffi::ThreadPool pool, Floats qkv, Floats value, Floats cos, Floats sin, Ints lengths,
                            Result y, Result keys, Result values, int64_t window, float qk_scale, float eps) {
  const auto sizes = qkv.dimensions();
  const int64_t heads = sizes[0], kinds = sizes[1], queries = kinds - 2, width = sizes[2], prompts = sizes[3];
  const int64_t length = sizes[4], blocks = (length + kLanes - 1) / kLanes;
  const int64_t padded = (length + kKeys - 1) / kKeys * kKeys;
  if (lengths.element_count() && lengths.element_count() != static_cast<size_t>(prompts))
    return ffi::Error::InvalidArgument("prompts and lengths do not fit");
  if (width % kKeys || cos.element_count() != static_cast<size_t>(width * length))
    return ffi::Error::InvalidArgument("the width of the heads or the rotary positions do not fit");
  const Scratch<float> turned(prompts * heads * kinds * width * padded);
  const float *of_qkv = qkv.typed_data(), *of_value = given(value);
  const float *of_cos = cos.typed_data(), *of_sin = sin.typed_data();
  const int32_t* ends = given(lengths);
  float *to_keys = keys->typed_data(), *to_values = values->typed_data(), *to = y->typed_data(),
        *of_turned = turned.get();
  // Queries and keys with rotary positions and norms, and values: [P, K, G + 2, H, padded]; the cache's from them.
  spread(pool, prompts * heads * kinds, [=](int64_t part) noexcept {
    const int64_t kind = part % kinds, head = part / kinds % heads, prompt = part / kinds / heads;
    const int64_t apart = prompts * length;  // of features
    const int64_t end = ends ? ends[prompt] : length;
    const float* x = of_qkv + (head * kinds + kind) * width * apart + prompt * length;
    if (kind == queries + 1 && of_value) x = of_value + head * width * apart + prompt * length;
    float* out = of_turned + part * width * padded;
    if (kind > queries) {
      for (int64_t h = 0; h < width; h++) std::memcpy(out + h * padded, x + h * apart, end * sizeof(float));
    } else {
      std::vector<float> factors(end);
      for (int64_t h = 0; h < width; h++) {
        const float* other = x + (h < width / 2 ? h + width / 2 : h - width / 2) * apart;
        for (int64_t t = 0; t < end; t++) {
          const float now = x[h * apart + t] * of_cos[h * length + t] + other[t] * of_sin[h * length + t];
          out[h * padded + t] = now;
          factors[t] += now * now;
        }
      }
      for (float& factor : factors) factor = qk_scale / std::sqrt(factor / width + eps);
      for (int64_t h = 0; h < width; h++)
        for (int64_t t = 0; t < end; t++) out[h * padded + t] *= factors[t];
    }
    if (kind < queries) return;
    float* panel = (kind == queries ? to_keys : to_values) + (prompt * heads + head) * length * width;
    for (int64_t t = 0; t < end; t += kLanes)
      for (int64_t h = 0; h < width; h += kLanes) {
        Vec square[kLanes];
        for (int64_t i = 0; i < kLanes; i++) square[i] = load(out + (h + i) * padded + t);
        transpose(square);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, end - t); i++) store(panel + (t + i) * width + h, square[i]);
      }
  });
  const float scale = 1 / std::sqrt(static_cast<float>(width));
  spread(pool, prompts * heads * queries * blocks, [=](int64_t part) noexcept {
    const int64_t begin = part % blocks * kLanes, query = part / blocks % queries;
    const int64_t head = part / blocks / queries % heads, prompt = part / blocks / queries / heads;
    const int64_t end = ends ? ends[prompt] : length;
    if (begin >= end) return;
    const float* mine = of_turned + (prompt * heads + head) * kinds * width * padded;
    const Scratch<float> q(width * kLanes);
    for (int64_t h = 0; h < width; h++) store(q.get() + h * kLanes, load(mine + (query * width + h) * padded + begin));
    const int64_t first = std::max<int64_t>(0, begin - window) / kKeys * kKeys, last = std::min(end, begin + kLanes);
    const Scratch<float> all((last - first + kKeys) * kLanes);
    auto* scores = reinterpret_cast<Vec*>(all.get());
    IntVec position;
    for (int64_t i = 0; i < kLanes; i++) position[i] = begin + i;
    Vec most = Vec{} - INFINITY, total{};
    for (int64_t key = first; key < last; key += kKeys) {
      auto* found = reinterpret_cast<Vec(*)[1]>(scores + key - first);
      for (int64_t n = 0; n < kKeys; n += kAtOnce)
        outer<kAtOnce, 1>(mine + queries * width * padded + key + n, padded, q.get(), width, nullptr, found + n);
      for (int64_t n = 0; n < kKeys; n++) {
        const int32_t at = key + n;
        const Vec score = ((at <= position) & (at >= position - static_cast<int32_t>(window))) ? found[n][0] * scale
                                                                                               : Vec{} - INFINITY;
        most = most > score ? most : score;
        found[n][0] = score;
      }
    }
    for (int64_t i = 0; i < last - first; i++) total += scores[i] = exp(scores[i] - most);
    const float* of_values = to_values + ((prompt * heads + head) * length + first) * width;
    for (int64_t h = 0; h < width; h += kAtOnce) {
      Vec found[kAtOnce][1];
      outer<kAtOnce, 1>(of_values + h, width, all.get(), last - first, nullptr, found);
      for (int n = 0; n < kAtOnce; n++) {
        float* out = to + (((head * queries + query) * width + h + n) * prompts + prompt) * length + begin;
        const Vec mean = found[n][0] / total;
        std::memcpy(out, &mean, (last - begin) * sizeof(float));
      }
    }
  });
  return ffi::Error::Success();
}

// The newest of prompts' keys or values [P, K, T, H], of lengths [P], to rings [B, K, S, H], in place: those of prompt
// source[r] to row slots[r], or nowhere, if there is no such row.
ffi::Error fill(ffi::ThreadPool pool, Floats rings, Floats prompts, Ints lengths, Ints source, Ints slots,
                Result filled) {
  const auto of_rings = rings.dimensions(), of_prompts = prompts.dimensions();
  const int64_t rows = of_rings[0], heads = of_rings[1], size = of_rings[2], width = of_rings[3];
  const int64_t longest = of_prompts[2];
  float* to = filled->typed_data();
  if (to != rings.typed_data()) return ffi::Error::Internal("the KV cache was not updated in place");
  if (of_prompts[1] != heads || of_prompts[3] != width ||
      of_prompts[0] != static_cast<int64_t>(lengths.element_count()) || source.element_count() != slots.element_count())
    return ffi::Error::InvalidArgument("rings and prompts do not fit");
  const float* from = prompts.typed_data();
  const int32_t *length = lengths.typed_data(), *of = source.typed_data(), *slot = slots.typed_data();
  spread(pool, slots.element_count() * heads, [=](int64_t part) noexcept {
    const int64_t r = part / heads, head = part % heads;
    if (slot[r] >= rows) return;
    const int64_t end = length[of[r]];
    const float* prompt = from + (of[r] * heads + head) * longest * width;
    float* ring = to + (slot[r] * heads + head) * size * width;
    for (int64_t t = std::max<int64_t>(0, end - size); t < end;) {
      const int64_t run = std::min(end - t, size - t % size);
      std::memcpy(ring + t % size * width, prompt + t * width, run * width * sizeof(float));
      t += run;
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
                                  .Arg<Ints>()
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
                                  .Arg<Ints>()
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
                                  .Arg<Ints>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("qk_scale")
                                  .Attr<float>("eps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(nanochat_fill, fill,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Ret<Floats>());

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
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("window")
                                  .Attr<float>("qk_scale")
                                  .Attr<float>("eps"));
