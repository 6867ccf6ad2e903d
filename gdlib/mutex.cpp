// The mutex watershed in time that grows with the number of edges; gdlib/mutex.py says what it computes. Affinities have 256
// levels, so edges are counted instead of sorted. A segment keeps those it must not join in a list, which two segments that
// join hang one behind the other; whoever reads a list takes out what has become the same meanwhile.

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

namespace {

using Int = int64_t;
using Node = uint32_t;
constexpr Node NONE = ~Node(0);

struct Segments {
  std::vector<int32_t> parent;  // of a root: minus its size
  std::vector<Node> head, tail, count, limit, seen;
  struct Item {
    Node other, next;
  };
  std::vector<Item> items;
  Node unused = NONE, reading = 0;

  explicit Segments(Int size) : parent(size, -1), head(size, NONE), tail(size), count(size), limit(size, 16), seen(size) {}

  Node find(Node u) {
    while (parent[u] >= 0) {
      const Node above = parent[u];
      if (parent[above] < 0) return above;
      u = parent[u] = parent[above];
    }
    return u;
  }

  void forbid(Node u, Node v) {
    if (head[u] != NONE && items[head[u]].other == v) return;
    Node item = unused;
    if (item == NONE) {
      if (items.size() >= NONE) throw std::bad_alloc();  // there is no number for one more
      item = items.size();
      items.push_back({});
    } else {
      unused = items[item].next;
    }
    items[item] = {v, head[u]};
    if (head[u] == NONE) tail[u] = item;
    head[u] = item;
    ++count[u];
    shrink(u);
  }

  // Whether v is in the list of u, which gets shorter; what is found comes first.
  bool forbids(Node u, Node v) {
    if (++reading == 0) {  // all numbers were used
      std::fill(seen.begin(), seen.end(), 0);
      reading = 1;
    }
    for (Node item = head[u], before = NONE; item != NONE;) {
      const Node next = items[item].next, other = find(items[item].other);
      const bool found = other == v;
      if (found || seen[other] == reading) {
        if (before == NONE) {
          head[u] = next;
        } else {
          items[before].next = next;
        }
        if (tail[u] == item) tail[u] = before;
        --count[u];
        items[item].next = unused;
        unused = item;
        if (found) {
          forbid(u, v);
          return true;
        }
      } else {
        seen[other] = reading;
        items[item].other = other;
        before = item;
      }
      item = next;
    }
    return false;
  }

  void shrink(Node u) {
    if (count[u] <= limit[u]) return;
    forbids(u, NONE);
    limit[u] = std::max<Node>(16, 2 * count[u]);
  }

  void attract(Node u, Node v) {
    if (count[u] < count[v] ? forbids(u, v) : forbids(v, u)) return;
    if (parent[u] > parent[v]) std::swap(u, v);
    parent[u] += parent[v];
    parent[v] = u;
    if (head[v] == NONE) return;
    if (head[u] == NONE) {
      tail[u] = tail[v];
    } else {
      items[tail[v]].next = head[u];
    }
    head[u] = head[v];
    count[u] += count[v];
    limit[u] = std::max(limit[u], limit[v]);
    shrink(u);
  }
};

}  // namespace

// Sides are (z, y, x), offsets K times that; the stride is that of repulsive edges along y and x. `turns` has for the 256
// levels of attractive, then of repulsive edges, when they are visited: in turn 0, 1, ... `count` - 1. Labels are 1, 2, ... as
// they are met, 0 outside of the mask. Returns whether there was enough memory.
extern "C" Int mutex_watershed(const Int* sides, Int channels, Int attractive, const Int* offsets, Int stride,
                               const uint8_t* affinity, const uint8_t* mask, const Int* turns, Int count, Int* label) try {
  const Int sz = sides[0], sy = sides[1], sx = sides[2], pixels = sz * sy * sx;
  const auto distance = [&](Int k) { return (offsets[3 * k] * sy + offsets[3 * k + 1]) * sx + offsets[3 * k + 2]; };
  // Calls f(pixel, bin) for the edges of a channel; there is a bin for each turn and in it for each channel.
  const auto edges = [&](Int k, auto f) {
    const Int dz = offsets[3 * k], dy = offsets[3 * k + 1], dx = offsets[3 * k + 2], shift = distance(k);
    const bool repels = k >= attractive;
    const Int *turn = turns + 256 * repels, step = repels ? stride : 1, end = std::min(sx, sx - dx);
    for (Int z = 0; z < sz; ++z)
      for (Int y = 0; y < sy; y += step) {
        if (z + dz < 0 || z + dz >= sz || y + dy < 0 || y + dy >= sy) continue;
        const Int line = (z * sy + y) * sx;
        for (Int x = (std::max<Int>(0, -dx) + step - 1) / step * step; x < end; x += step)
          if (mask[line + x] && mask[line + x + shift])
            f(line + x, turn[affinity[k * pixels + line + x]] * channels + k);
      }
  };
  std::vector<Int> begin(count * channels + 1);
  for (Int k = 0; k < channels; ++k) edges(k, [&](Int, Int bin) { ++begin[bin + 1]; });
  for (size_t bin = 1; bin < begin.size(); ++bin) begin[bin] += begin[bin - 1];
  std::vector<Node> sorted(begin.back());
  std::vector<Int> next(begin);
  for (Int k = 0; k < channels; ++k) edges(k, [&](Int pixel, Int bin) { sorted[next[bin]++] = pixel; });

  Segments segments(pixels);
  for (Int turn = 0; turn < count; ++turn)
    for (Int k = 0; k < channels; ++k) {
      const Int bin = turn * channels + k, shift = distance(k);
      for (Int i = begin[bin]; i < begin[bin + 1]; ++i) {
        const Node u = segments.find(sorted[i]), v = segments.find(sorted[i] + shift);
        if (u == v) continue;
        if (k < attractive) {
          segments.attract(u, v);
        } else {
          segments.forbid(u, v);
          segments.forbid(v, u);
        }
      }
    }
  std::vector<Node>& number = segments.seen;
  std::fill(number.begin(), number.end(), 0);
  Node last = 0;
  for (Int i = 0; i < pixels; ++i) {
    label[i] = 0;
    if (!mask[i]) continue;
    Node& own = number[segments.find(i)];
    label[i] = own ? own : own = ++last;
  }
  return 1;
} catch (const std::bad_alloc&) {
  return 0;
}
