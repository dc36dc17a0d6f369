// Ranking within each model and the calibrated softmax over models: WIDEN's equations 3 to 6.
#include <algorithm>
#include <vector>

#include "chunk.h"

namespace mergecore::cpu {

namespace {

struct Keyed {
  uint64_t key;
  uint32_t index;
};

}  // namespace

void rank(const double* values, double* ranks, int64_t count, bool average) {
  if (count == 0) return;
  std::vector<Keyed> order(static_cast<size_t>(count)), other(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    order[i] = {sort_key(values[i]), static_cast<uint32_t>(i)};
  }
  // Stable least-significant-digit radix sort; digits that all keys share are passed over.
  constexpr int kDigit = 11, kBuckets = 1 << kDigit;
  std::vector<uint32_t> starts(kBuckets);
  for (int shift = 0; shift < 64; shift += kDigit) {
    std::fill(starts.begin(), starts.end(), 0);
    for (const Keyed& item : order) ++starts[(item.key >> shift) % kBuckets];
    if (starts[(order[0].key >> shift) % kBuckets] == count) continue;
    uint32_t sum = 0;
    for (uint32_t& start : starts) {
      const uint32_t here = start;
      start = sum;
      sum += here;
    }
    for (const Keyed& item : order) other[starts[(item.key >> shift) % kBuckets]++] = item;
    order.swap(other);
  }
  for (int64_t first = 0; first < count;) {
    int64_t last = first + 1;
    if (average) {
      while (last < count && order[last].key == order[first].key) ++last;
    }
    // Ranks first+1 .. last: their mean is half an integer, exact in float64.
    const double value = 0.5 * static_cast<double>(first + 1 + last);
    for (; first < last; ++first) ranks[order[first].index] = value;
  }
}

// Columns first, first + 1, ... first + n - 1; n is kChunk at most.
MERGECORE_CLONES
void softmax_chunk(const double* scores, const double* thresholds, double divisor, double s,
                   double* out, int models, int64_t count, int64_t first, int n) {
  alignas(64) double largest[kChunk], sum[kChunk] = {};
  std::fill_n(largest, n, -HUGE_VAL);
  for (int m = 0; m < models; ++m) {
    const double* score = scores + m * count + first;
    for (int j = 0; j < n; ++j) {
      const double z = score[j] / divisor;
      largest[j] = z > largest[j] ? z : largest[j];
    }
  }
  for (int m = 0; m < models; ++m) {
    const double* score = scores + m * count + first;
    double* to = out + m * count + first;
    for (int j = 0; j < n; ++j) {
      const double e = exp_exact_order(score[j] / divisor - largest[j]);
      to[j] = e;
      sum[j] += e;
    }
  }
  for (int m = 0; m < models; ++m) {
    const double* score = scores + m * count + first;
    double* to = out + m * count + first;
    const double threshold = thresholds[m];
    for (int j = 0; j < n; ++j) to[j] = score[j] > threshold ? s : to[j] / sum[j];
  }
}

void calibrated_softmax(const double* scores, const double* thresholds, double divisor, double s,
                        double* out, int models, int64_t count, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kChunk) {
    const int n = static_cast<int>(std::min<int64_t>(kChunk, end - first));
    softmax_chunk(scores, thresholds, divisor, s, out, models, count, first, n);
  }
}

}  // namespace mergecore::cpu
