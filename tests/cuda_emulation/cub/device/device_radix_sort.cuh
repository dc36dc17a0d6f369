// A stand-in for CUB's radix sort: a stable sort that overwrites all it may overwrite, and leaves
// its result in the one buffer or the other.
#pragma once

#include <cuda_runtime.h>

namespace cub {

template <class T>
struct DoubleBuffer {
  T* buffers[2] = {nullptr, nullptr};
  int selector = 0;
  DoubleBuffer() = default;
  DoubleBuffer(T* current, T* alternate) : buffers{current, alternate} {}
  T* Current() const { return buffers[selector]; }
  T* Alternate() const { return buffers[1 - selector]; }
};

struct DeviceRadixSort {
  template <class Key, class Value>
  static cudaError_t SortPairs(void* scratch, size_t& bytes, DoubleBuffer<Key>& keys,
                               DoubleBuffer<Value>& values, int count, int begin_bit = 0,
                               int end_bit = 8 * sizeof(Key), cudaStream_t = nullptr) {
    const size_t needed = 777 + static_cast<size_t>(count) / 3;
    if (scratch == nullptr) {
      bytes = needed;
      return cudaSuccess;
    }
    const int bits = 8 * sizeof(Key);
    if (bytes < needed || begin_bit != 0 || end_bit < 1 || end_bit > bits) {
      return cudaErrorInvalidValue;
    }
    if (reinterpret_cast<uintptr_t>(scratch) % 256 != 0) return cudaErrorInvalidValue;
    if (keys.Current() == keys.Alternate() || values.Current() == values.Alternate()) {
      return cudaErrorInvalidValue;
    }
    std::memset(scratch, 0x5a, bytes);
    std::vector<std::pair<Key, Value>> pairs;
    for (int i = 0; i < count; ++i) pairs.push_back({keys.Current()[i], values.Current()[i]});
    const auto sorted_bits = [&](Key key) { return static_cast<Key>(key << (bits - end_bit)); };
    std::stable_sort(pairs.begin(), pairs.end(), [&](const auto& a, const auto& b) {
      return sorted_bits(a.first) < sorted_bits(b.first);
    });
    std::memset(keys.Current(), 0x5a, count * sizeof(Key));
    std::memset(values.Current(), 0x5a, count * sizeof(Value));
    std::memset(keys.Alternate(), 0x5a, count * sizeof(Key));
    std::memset(values.Alternate(), 0x5a, count * sizeof(Value));
    keys.selector ^= count % 2;
    values.selector ^= count % 2;
    for (int i = 0; i < count; ++i) {
      keys.Current()[i] = pairs[i].first;
      values.Current()[i] = pairs[i].second;
    }
    return cudaSuccess;
  }
};

}  // namespace cub
