// Blends of bf16 in float32 where that gives the float64 blend's bits. See quick.cpp.
#pragma once

#include <vector>

#include "chunk.h"

namespace mergecore::cpu {

constexpr int kQuick = 64;  // entries that are decided together

class QuickBlend {
 public:
  explicit QuickBlend(const Blend& blend);

  // Whether dtypes and coefficients are such that it can be tried at all.
  bool applies() const { return applies_; }

  // Stores the results of kQuick entries of one row; false where they are left to the float64
  // blend.
  bool store(int64_t entry, int64_t row, int64_t column) const;

 private:
  const Blend& blend_;
  bool applies_ = false;
  int64_t length_ = 0;                        // numbers of a model
  std::vector<float> coefficients_, errors_;  // [model][number]
  float of_base_ = 0.0f, error_of_base_ = 0.0f;
};

}  // namespace mergecore::cpu
