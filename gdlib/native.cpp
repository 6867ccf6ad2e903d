// The slow part of gdlib/ops.py in few passes over memory, on all threads. ops.py says what each function computes, has the
// same in plain torch, and is what these are tested against. `Real` is float or double; D is the length of the vectors, 0
// where it is known at run time only. Results do not depend on the number of threads: sums are made per chunk of lines.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace {

using Int = int64_t;
constexpr Int CHUNKS = 32;

// Images (batch, z, y, x), z = 1 in 2D. A line is x pixels in a row; offsets are K times (z, y, x).
struct Grid {
  Int batch, z, y, x, threads, count;
  const Int* offsets;
  Int lines() const { return z * y; }  // of one image
  Int pixels() const { return z * y * x; }
};

// The pixels of a line whose neighbour at an offset is inside the image, and how far it is in memory.
struct Span {
  Int begin = 0, end = 0, shift = 0;
  Span(const Grid& grid, Int line, Int k, Int sign = 1) {
    const Int *offset = grid.offsets + 3 * k, dz = sign * offset[0], dy = sign * offset[1], dx = sign * offset[2];
    const Int y = line % grid.y + dy, z = line / grid.y % grid.z + dz;
    if (y < 0 || y >= grid.y || z < 0 || z >= grid.z || std::abs(dx) >= grid.x) return;
    begin = std::max<Int>(0, -dx);
    end = grid.x - std::max<Int>(0, dx);
    shift = (dz * grid.y + dy) * grid.x + dx;
  }
};

// Calls f(chunk, line) for all lines of a batch: strip by strip through all z, so that neighbours at another z, too, are likely
// to be in the cache still.
template <typename F>
void for_lines(const Grid& grid, F f) {
  constexpr Int HEIGHT = 16;
  const Int lines = grid.batch * grid.lines();
#pragma omp parallel for num_threads(grid.threads) schedule(dynamic)
  for (Int chunk = 0; chunk < CHUNKS; ++chunk)
    for (Int n = lines * chunk / CHUNKS; n < lines * (chunk + 1) / CHUNKS; ++n) {
      const Int image = n / grid.lines(), first = n % grid.lines() / (grid.z * HEIGHT) * HEIGHT;
      const Int height = std::min(HEIGHT, grid.y - first), place = n % grid.lines() - first * grid.z;
      f(chunk, (image * grid.z + place / height) * grid.y + first + place % height);
    }
}

// Adds the sums of all chunks, in their order.
template <typename Sum, typename Out>
void total(const std::vector<Sum>& parts, Out* out) {
  const Int count = parts.size() / CHUNKS;
  for (Int i = 0; i < count; ++i) {
    double sum = 0;
    for (Int chunk = 0; chunk < CHUNKS; ++chunk) sum += parts[chunk * count + i];
    out[i] = Out(sum);
  }
}

// A vector that is added up: in registers where its length is known, else in place.
template <typename Real, int D>
struct Sum {
  typedef Real Lanes __attribute__((vector_size(D * sizeof(Real)), aligned(sizeof(Real)), may_alias));
  Lanes lanes;
  Sum() = default;
  Sum(Real*, int, const Real* first = nullptr) : lanes(first ? at(first) : Lanes{}) {}
  static const Lanes& at(const Real* vector) { return *reinterpret_cast<const Lanes*>(vector); }
  void add(Real weight, const Real* vector) { lanes += weight * at(vector); }
  void scale(Real factor) { lanes *= factor; }
  void store(Real* out) const { *reinterpret_cast<Lanes*>(out) = lanes; }
};
template <typename Real>
struct Sum<Real, 0> {
  Real* out;
  int d;
  Sum() = default;
  Sum(Real* out, int d, const Real* first = nullptr) : out(out), d(d) {
    for (int i = 0; i < d; ++i) out[i] = first ? first[i] : Real(0);
  }
  void add(Real weight, const Real* vector) {
    for (int i = 0; i < d; ++i) out[i] += weight * vector[i];
  }
  void scale(Real factor) {
    for (int i = 0; i < d; ++i) out[i] *= factor;
  }
  void store(Real*) const {}
};

template <typename Real, int D>
inline Real dot(const Real* a, const Real* b, int d) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < (D ? D : d); ++i) sum += a[i] * b[i];
  return sum;
}

// out[x] = dot product of a[x] and b[x], for `count` vectors.
template <typename Real, int D>
void dots(const Real* a, const Real* b, Int count, int d, Real* out) {
  Int x = 0;
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
  if constexpr (D == 16)  // 16 at once: halves of two vectors are added crosswise until one vector holds all sums
    for (; x + 16 <= count; x += 16) {
      typename Sum<Real, D>::Lanes v[16];
      for (int i = 0; i < 16; ++i) v[i] = Sum<Real, D>::at(a + (x + i) * D) * Sum<Real, D>::at(b + (x + i) * D);
#define CROSSWISE(n, low, high)                                                       \
  for (int i = 0; i < n; ++i)                                                          \
    v[i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], EXPAND low) +               \
           __builtin_shufflevector(v[2 * i], v[2 * i + 1], EXPAND high);
#define EXPAND(...) __VA_ARGS__
      CROSSWISE(8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
      CROSSWISE(4, (0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
                (4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
      CROSSWISE(2, (0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29),
                (2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
      CROSSWISE(1, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))
      *reinterpret_cast<typename Sum<Real, D>::Lanes*>(out + x) = v[0];
    }
#endif
  for (; x < count; ++x) out[x] = dot<Real, D>(a + x * d, b + x * d, d);
}

// One over the length of each row of a line.
template <typename Real, int D>
void inverse_lengths(const Real* rows, Int count, int d, Real* out) {
  dots<Real, D>(rows, rows, count, d, out);
  for (Int x = 0; x < count; ++x) out[x] = 1 / std::max(std::sqrt(out[x]), Real(1e-12));
}

// out = unit vectors of the rows of a line, minus those of other rows if there are any; exactly 0 where both are equal.
template <typename Real, int D>
void differences(const Real* rows, const Real* inverse, const Real* other, Int count, int d, Real* out) {
  thread_local std::vector<Real> ratio;
  ratio.resize(count);
  if (other) inverse_lengths<Real, D>(other, count, d, ratio.data());
  for (Int x = 0; x < count; ++x) {
    Sum<Real, D> sum(out + x * d, d, rows + x * d);
    if (other) sum.add(-ratio[x] / inverse[x], other + x * d);
    sum.scale(inverse[x]);
    sum.store(out + x * d);
  }
}

// sum[i][j] += sum over x of vectors[x][i] vectors[x][j].
template <typename Real, int D>
void add_moments(double* sum, const Real* vectors, Int count, int d) {
  if constexpr (D == 0) {
    for (Int x = 0; x < count; ++x)
      for (int i = 0; i < d; ++i)
        for (int j = 0; j < d; ++j) sum[i * d + j] += vectors[x * d + i] * vectors[x * d + j];
  } else {
    constexpr int HEIGHT = 8;  // so many i at a time stay in registers
    for (int i = 0; i < D; i += HEIGHT) {
      typename Sum<Real, D>::Lanes part[HEIGHT] = {};
      for (Int x = 0; x < count; ++x)
        for (int h = 0; h < HEIGHT; ++h) part[h] += vectors[x * D + i + h] * Sum<Real, D>::at(vectors + x * D);
      for (int h = 0; h < HEIGHT; ++h)
        for (int j = 0; j < D; ++j) sum[(i + h) * D + j] += part[h][j];
    }
  }
}

// Windows that lie side by side; the last ones of an axis are cut off.
struct Windows {
  Int z, y, x, nz, ny, nx;
  Windows(const Grid& grid, const Int* side)
      : z(side[0]), y(side[1]), x(side[2]), nz((grid.z + z - 1) / z), ny((grid.y + y - 1) / y), nx((grid.x + x - 1) / x) {}
  Int first_of_line(const Grid& grid, Int line) const {
    return ((line / grid.lines() * nz + line / grid.y % grid.z / z) * ny + line % grid.y / y) * nx;
  }
  // One over the number of pixels of the window `ix` of a line.
  double share(const Grid& grid, Int line, Int ix) const {
    const Int iz = line / grid.y % grid.z / z, iy = line % grid.y / y;
    return 1.0 / (std::min(z, grid.z - iz * z) * std::min(y, grid.y - iy * y) * std::min(x, grid.x - ix * x));
  }
};

// The mean unit vector of each window, (batch, windows, D).
template <typename Real, int D>
void pool(const Grid& grid, int d_any, const Real* rows, const Real* inverse, const Windows& windows, Real* means) {
  const int d = D ? D : d_any;
#pragma omp parallel for num_threads(grid.threads) schedule(dynamic)
  for (Int row = 0; row < grid.batch * windows.nz * windows.ny; ++row) {  // a row of windows
    const Int first_y = row % windows.ny * windows.y, first_z = row / windows.ny % windows.nz * windows.z;
    const Int image = row / windows.ny / windows.nz;
    std::fill_n(means + row * windows.nx * d, windows.nx * d, Real(0));
    for (Int z = first_z; z < std::min(first_z + windows.z, grid.z); ++z)
      for (Int y = first_y; y < std::min(first_y + windows.y, grid.y); ++y) {
        const Int line = (image * grid.z + z) * grid.y + y;
        for (Int ix = 0; ix < windows.nx; ++ix) {
          const Real share = Real(windows.share(grid, line, ix));
          Real* mean = means + (row * windows.nx + ix) * d;
          Sum<Real, D> sum(mean, d, mean);
          for (Int p = line * grid.x + ix * windows.x; p < line * grid.x + std::min((ix + 1) * windows.x, grid.x); ++p)
            sum.add(share * inverse[p], rows + p * d);
          sum.store(mean);
        }
      }
  }
}

// One over the length of each row; then, where they are not null: sums of rows by node, second moments of unit vectors (or of
// their differences to those of other rows), cosines with neighbours, mean unit vectors of windows.
template <typename Real, int D>
void relate(const Grid& grid, int d_any, const Real* rows, const Real* other, Real* inverse, Int node_count,
            const Int* index, Real* nodes, Real* moments, Real* affinity, const Int* window, Real* means) {
  std::vector<Real> node_parts(nodes ? CHUNKS * node_count * d_any : 0);
  std::vector<double> moment_parts(moments ? CHUNKS * grid.batch * d_any * d_any : 0);
  for_lines(grid, [&](Int chunk, Int line) {
    const int d = D ? D : d_any;
    thread_local std::vector<Real> vectors;
    vectors.resize(grid.x * d);
    const Int start = line * grid.x;
    inverse_lengths<Real, D>(rows + start * d, grid.x, d, inverse + start);
    for (Int p = start; nodes && p < start + grid.x; ++p) {
      Real* node = node_parts.data() + (chunk * node_count + index[p]) * d;
      Sum<Real, D> sum(node, d, node);
      sum.add(1, rows + p * d);
      sum.store(node);
    }
    if (moments) {
      double* sum = moment_parts.data() + (chunk * grid.batch + line / grid.lines()) * d * d;
      const Real* others = other ? other + start * d : nullptr;
      differences<Real, D>(rows + start * d, inverse + start, others, grid.x, d, vectors.data());
      add_moments<Real, D>(sum, vectors.data(), grid.x, d);
    }
  });
  if (nodes) total(node_parts, nodes);
  if (moments) total(moment_parts, moments);
  if (means) pool<Real, D>(grid, d_any, rows, inverse, Windows(grid, window), means);
  if (!affinity) return;
  for_lines(grid, [&](Int, Int line) {
    const int d = D ? D : d_any;
    const Int image = line / grid.lines(), start = line * grid.x;
    for (Int k = 0; k < grid.count; ++k) {
      const Span span(grid, line, k);
      Real* out = affinity + (image * (grid.count - 1) + k) * grid.pixels() + start;
      std::fill(out, out + grid.x, Real(0));
      const Int p = start + span.begin, q = p + span.shift;
      dots<Real, D>(rows + p * d, rows + q * d, span.end - span.begin, d, out + span.begin);
      for (Int x = span.begin; x < span.end; ++x) out[x] *= inverse[start + x] * inverse[start + x + span.shift];
    }
  });
}

// What one of the pairs of a line adds to the gradient: rows times the weights of the pixels there, over their lengths.
template <typename Real>
struct Share {
  Int begin, end;
  const Real *weight, *inverse, *rows;
};

// Gradient of the rows, from those of nodes (per pixel, so over their size), of moments (symmetric), of affinities and of
// means of windows.
template <typename Real, int D>
void relate_backward(const Grid& grid, int d_any, const Real* rows, const Real* other, const Real* inverse,
                     const Int* index, const Real* nodes, const Real* moments, const Real* affinity, const Int* window,
                     const Real* means, Real* gradient) {
  const Int whole[] = {grid.z, grid.y, grid.x};
  const Windows windows(grid, means ? window : whole);
  for_lines(grid, [&](Int, Int line) {
    const int d = D ? D : d_any;
    const Int image = line / grid.lines(), start = line * grid.x;
    thread_local std::vector<Real> vectors;
    thread_local std::vector<Share<Real>> shares;
    vectors.resize(grid.x * d), shares.clear();
    for (Int k = 0; affinity && k < grid.count; ++k)
      for (Int sign : {1, -1}) {  // the neighbour of a pixel, and the pixel whose neighbour it is
        const Span span(grid, line, k, sign);
        const Int there = start + span.shift;
        const Real* weight = affinity + (image * (grid.count - 1) + k) * grid.pixels() + (sign > 0 ? start : there);
        shares.push_back({span.begin, span.end, weight, inverse + there, rows + there * d});
      }
    const Real* others = other ? other + start * d : nullptr;
    if (moments) differences<Real, D>(rows + start * d, inverse + start, others, grid.x, d, vectors.data());
    const auto add_block = [&](Int x, auto& sums) {  // several pixels at a time, so that their sums stay in registers
      constexpr int SIZE = std::extent<std::remove_reference_t<decltype(sums)>>::value;
      Real* g = gradient + (start + x) * d;
      for (int i = 0; i < SIZE; ++i) sums[i] = Sum<Real, D>(g + i * d, d);
      for (const auto& share : shares) {
        const bool whole = x >= share.begin && x + SIZE <= share.end;
        for (int i = 0; i < SIZE; ++i)
          if (whole || (x + i >= share.begin && x + i < share.end))
            sums[i].add(share.weight[x + i] * share.inverse[x + i], share.rows + (x + i) * d);
      }
      for (int j = 0; moments && j < d; ++j)
        for (int i = 0; i < SIZE; ++i) sums[i].add(vectors[(x + i) * d + j], moments + (image * d + j) * d);
      for (int i = 0; means && i < SIZE; ++i) {
        const Int ix = (x + i) / windows.x;
        sums[i].add(Real(windows.share(grid, line, ix)), means + (windows.first_of_line(grid, line) + ix) * d);
      }
      for (int i = 0; i < SIZE; ++i) {
        const Int p = start + x + i;
        sums[i].store(g + i * d);
        sums[i].add(-dot<Real, D>(rows + p * d, g + i * d, d) * inverse[p] * inverse[p], rows + p * d);  // length: no effect
        sums[i].scale(inverse[p]);
        if (nodes) sums[i].add(1, nodes + index[p] * d);
        sums[i].store(g + i * d);
      }
    };
    Int x = 0;
    for (Sum<Real, D> sums[4]; x + 4 <= grid.x; x += 4) add_block(x, sums);
    for (Sum<Real, D> sums[1]; x < grid.x; ++x) add_block(x, sums);
  });
}

// Whether two pixels are connected, and whether both are known.
inline bool connected(int32_t a, int32_t b, bool background) { return (a == b) & (background | (a > 0)); }
inline bool known(const uint8_t* ignore, Int p, Int q) { return !ignore || !(ignore[p] | ignore[q]); }

// Pairs that count, and how many of them are connected: (batch, K, 2).
void count_pairs(const Grid& grid, const int32_t* label, const uint8_t* ignore, bool background, Int* counts) {
  std::vector<Int> parts(CHUNKS * grid.batch * grid.count * 2);
  for_lines(grid, [&](Int chunk, Int line) {
    for (Int k = 0; k < grid.count; ++k) {
      const Span span(grid, line, k);
      int32_t all = 0, equal = 0;
      for (Int p = line * grid.x + span.begin; p < line * grid.x + span.end; ++p) {
        const bool counts = known(ignore, p, p + span.shift);
        all += counts;
        equal += counts & connected(label[p], label[p + span.shift], background);
      }
      Int* part = parts.data() + ((chunk * grid.batch + line / grid.lines()) * grid.count + k) * 2;
      part[0] += all;
      part[1] += equal;
    }
  });
  total(parts, counts);
}

// Three sums: of weight (affinity - target)^2, of weight (affinity - goal)^2, of (affinity - goal)^2; or half of their gradient,
// each times its `scale`. The target is 1 for connected pairs and 0 for others; `weights` (batch, K, 2), of separated and of
// connected pairs, count pairs that are inside and known. Without weights or without a goal, what needs them is 0.
template <typename Real>
void pair_losses(const Grid& grid, const Real* affinity, const Real* goal, const Real* weights, const int32_t* label,
                 const uint8_t* ignore, bool background, const double* scale, Real* gradient, double* loss) {
  std::vector<double> parts(CHUNKS * 3);
  for_lines(grid, [&](Int chunk, Int line) {
    thread_local std::vector<Real> weight_line, target_line;
    weight_line.assign(grid.x, Real(0)), target_line.assign(grid.x, Real(0));
    Real *weight = weight_line.data(), *target = target_line.data();
    const Int image = line / grid.lines(), start = line * grid.x;
    for (Int k = 0; k < grid.count; ++k) {
      const Int map = (image * (grid.count - 1) + k) * grid.pixels() + start;
      if (weights) {
        const Span span(grid, line, k);
        const Real *both = weights + (image * grid.count + k) * 2, separated = both[0], together = both[1];
        const int32_t *here = label + start, *there = here + span.shift;
        std::fill(weight, weight + grid.x, Real(0));
        for (Int x = span.begin; x < span.end; ++x) {
          const bool same = connected(here[x], there[x], background);
          weight[x] = same ? together : separated;
          target[x] = same ? 1 : 0;
        }
        for (Int x = span.begin; ignore && x < span.end; ++x)
          if (!known(ignore, start + x, start + x + span.shift)) weight[x] = 0;
      }
      const Real *a = affinity + map, *to = goal ? goal + map : a;
      if (gradient) {
        const Real labels = Real(scale[0]), balanced = Real(scale[1]), plain = Real(scale[2]);
        for (Int x = 0; x < grid.x; ++x) {
          const Real error = a[x] - target[x], other = a[x] - to[x];
          gradient[map + x] = weight[x] * (labels * error + balanced * other) + plain * other;
        }
      } else {
        Real labels = 0, balanced = 0, plain = 0;
#pragma omp simd reduction(+ : labels, balanced, plain)
        for (Int x = 0; x < grid.x; ++x) {
          const Real error = a[x] - target[x], other = (a[x] - to[x]) * (a[x] - to[x]);
          labels += weight[x] * error * error, balanced += weight[x] * other, plain += other;
        }
        parts[chunk * 3] += labels, parts[chunk * 3 + 1] += balanced, parts[chunk * 3 + 2] += plain;
      }
    }
  });
  if (loss) total(parts, loss);
}

}  // namespace

#define EXPORT(Real, type)                                                                                              \
  extern "C" void relate_##type(const Grid* grid, Int d, const Real* rows, const Real* other, Real* inverse, Int count, \
                                const Int* index, Real* nodes, Real* moments, Real* affinity, const Int* window,        \
                                Real* means) {                                                                          \
    (d == 16 ? relate<Real, 16> : relate<Real, 0>)(*grid, int(d), rows, other, inverse, count, index, nodes, moments,   \
                                                   affinity, window, means);                                            \
  }                                                                                                                     \
  extern "C" void relate_backward_##type(const Grid* grid, Int d, const Real* rows, const Real* other,                  \
                                         const Real* inverse, const Int* index, const Real* nodes, const Real* moments, \
                                         const Real* affinity, const Int* window, const Real* means, Real* gradient) {  \
    (d == 16 ? relate_backward<Real, 16> : relate_backward<Real, 0>)(*grid, int(d), rows, other, inverse, index, nodes, \
                                                                     moments, affinity, window, means, gradient);       \
  }                                                                                                                     \
  extern "C" void pair_losses_##type(const Grid* grid, const Real* affinity, const Real* goal, const Real* weights,     \
                                     const int32_t* label, const uint8_t* ignore, Int background, const double* scale,  \
                                     Real* gradient, double* loss) {                                                    \
    pair_losses<Real>(*grid, affinity, goal, weights, label, ignore, background, scale, gradient, loss);                \
  }

EXPORT(float, float32)
EXPORT(double, float64)

extern "C" void count_pairs(const Grid* grid, const int32_t* label, const uint8_t* ignore, Int background, Int* counts) {
  count_pairs(*grid, label, ignore, background != 0, counts);
}
