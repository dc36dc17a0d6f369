// Runs the CUDA kernels on the host (see cuda_runtime.h) and the CPU kernels on random cases and
// compares every bit that they leave in memory. NaNs compare equal: their payloads are the
// hardware's.
//
//   main OP FIRST_SEED CASES     prints `ok KERNELS`, the number of different kernels launched
#include <memory>
#include <string>

#include "../../csrc/kernels.h"
#include "../../csrc/tiles.h"
#include "cuda_runtime.h"

using namespace mergecore;

namespace {

std::mt19937_64 random_bits;

int64_t draw(int64_t least, int64_t most) {
  return least + static_cast<int64_t>(random_bits() % static_cast<uint64_t>(most - least + 1));
}
bool chance(int percent) { return draw(1, 100) <= percent; }
double uniform() { return static_cast<double>(random_bits() >> 11) * 0x1p-53; }

// Exactly the bytes asked for (the address sanitizer guards their end), `offset` bytes beyond an
// address that suits 16-byte loads.
class Memory {
 public:
  explicit Memory(int64_t bytes, int64_t offset = 0) : offset_(offset), bytes_(bytes) {
    void* block = nullptr;
    if (posix_memalign(&block, 256, static_cast<size_t>(bytes + offset)) != 0) std::abort();
    block_.reset(static_cast<char*>(block), std::free);
  }
  Memory copy() const {
    Memory other(bytes_, offset_);
    std::memcpy(other.as<char>(), as<char>(), static_cast<size_t>(bytes_));
    return other;
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(block_.get() + offset_);
  }

 private:
  std::shared_ptr<char> block_;
  int64_t offset_, bytes_;
};

// Numbers of everyday size, zeros of both signs, and, if `wild`, numbers with any bits.
double number(bool wild) {
  if (wild && chance(5)) return bit_cast<double>(random_bits());
  if (wild && chance(2)) return chance(50) ? HUGE_VAL : -HUGE_VAL;
  if (chance(5)) return chance(50) ? 0.0 : -0.0;
  return (uniform() - 0.5) * static_cast<double>(int64_t{1} << draw(0, 12));
}

Memory numbers(int64_t count, bool wild, int64_t offset = 0) {
  Memory memory(count * 8, offset);
  for (int64_t i = 0; i < count; ++i) memory.as<double>()[i] = number(wild);
  return memory;
}

template <class T>
void fill(void* data, int64_t count, bool wild) {
  auto* bits = static_cast<typename T::Bits*>(data);
  for (int64_t i = 0; i < count; ++i) {
    const bool any = wild && chance(3);
    bits[i] = any ? static_cast<typename T::Bits>(random_bits())
                  : T::store(static_cast<float>(round_to<T>(number(false))));
  }
}

// A tensor's base and models, and windows of their rows.
struct Case {
  int64_t rows, columns, first_row, first_entry;
  int models;
  bool wild;
  std::vector<Memory> memory;
  std::vector<Matrix> matrices;  // the base first
  std::vector<Drop> drops;

  // `one_column`: that many rows of one column.
  explicit Case(int64_t most_rows, int64_t one_column = 0) {
    static constexpr int kShares[] = {1, 8, 64, 512, 1024};  // of columns to threads, warps, blocks
    // Few with more than a tile or two: the emulation takes its time for every entry.
    rows = draw(1, chance(50) ? 20 : chance(15) ? most_rows : std::min<int64_t>(most_rows, 150));
    columns = chance(50) ? 8 * draw(1, 20) : draw(1, 150);
    if (chance(20)) columns = kShares[draw(0, 4)] + 8 * draw(0, 2) - (chance(50) ? draw(0, 7) : 0);
    columns = std::max<int64_t>(columns, 1);
    if (columns > 200) rows = std::min<int64_t>(rows, draw(1, 70));
    if (one_column > 0) rows = one_column, columns = 1;
    models = static_cast<int>(draw(1, 5));
    if (chance(5)) models = static_cast<int>(draw(60, kMaxModels)), rows = draw(1, 3);
    first_row = chance(30) ? 0 : draw(1, 600);
    first_entry = chance(50) ? 0 : draw(0, 1) == 0 ? 4 * draw(0, 1 << 20) : draw(1, 1 << 20);
    if (chance(5)) first_entry += int64_t{1} << 40;
    wild = chance(30);
    const bool based = chance(75), mixed = chance(40), unaligned = chance(15);
    const auto common = static_cast<Dtype>(draw(0, 3));
    const int widest = chance(50) ? 3 : 2;
    for (int m = 0; m <= models; ++m) {
      const Dtype dtype = mixed ? static_cast<Dtype>(draw(0, widest)) : common;
      const int64_t size = dtype_size(dtype);
      memory.emplace_back(rows * columns * size, unaligned ? size * draw(0, 7) : 0);
      void* data = memory.back().as<void>();
      if (dtype == Dtype::f32) fill<F32>(data, rows * columns, wild);
      if (dtype == Dtype::f16) fill<F16>(data, rows * columns, wild);
      if (dtype == Dtype::bf16) fill<BF16>(data, rows * columns, wild);
      if (dtype == Dtype::f64) {
        for (int64_t i = 0; i < rows * columns; ++i) static_cast<double*>(data)[i] = number(wild);
      }
      matrices.push_back({data, dtype});
    }
    if (!based) matrices[0] = {nullptr, Dtype::f32};
    for (int m = 0; based && m < models && (m > 0 || chance(40)); ++m) {
      if (m == 0) drops.resize(static_cast<size_t>(models));
      drops[static_cast<size_t>(m)] = drop();
    }
  }

  // Of bf16 in whole runs of 16 bytes, near the base as in checkpoints: few steps beside it, equal
  // to it, zeros; some not at all.
  struct Near {};
  explicit Case(Near) {
    rows = draw(1, 40), columns = 8 * draw(1, 12);
    if (chance(10)) columns = 1024 + 8 * draw(0, 2), rows = draw(1, 12);
    models = static_cast<int>(draw(1, 9));
    first_row = chance(30) ? 0 : draw(1, 600);
    first_entry = chance(50) ? 0 : draw(1, 1 << 20);
    wild = chance(20);
    const int64_t entries = rows * columns, apart = int64_t{1} << draw(0, 8);
    for (int m = 0; m <= models; ++m) {
      memory.emplace_back(entries * 2);
      auto* bits = memory.back().as<uint16_t>();
      fill<BF16>(bits, entries, wild);
      matrices.push_back({bits, Dtype::bf16});
      const auto* base = memory[0].as<uint16_t>();
      const int same = static_cast<int>(draw(0, 100));
      for (int64_t i = 0; m > 0 && i < entries; ++i) {
        if (chance(5)) continue;
        bits[i] = static_cast<uint16_t>(base[i] + (chance(same) ? 0 : draw(-apart, apart)));
      }
    }
    if (chance(20)) matrices[0] = {nullptr, Dtype::bf16};
    if (matrices[0].data == nullptr || chance(60)) return;
    for (int m = 0; m < models; ++m) {
      drops.push_back(drop());
      drops.back().least = -1.0, drops.back().most = HUGE_VAL;
    }
  }

  Drop drop() const {
    const uint64_t key = random_bits();
    uint64_t threshold = chance(20) ? 0 : chance(10) ? 1ull << 32 : random_bits() >> 32;
    if (chance(30)) {  // on the edge: an entry's own number
      const int64_t entry = draw(first_row * columns, (first_row + rows) * columns - 1);
      const auto index = static_cast<uint64_t>(first_entry + entry);
      uint32_t block[4];
      philox(key, index / 4, block);
      threshold = block[index % 4];
    }
    Drop drop{key, threshold, chance(50) ? 1.0 : 1.0 + uniform()};
    const int64_t first = first_entry + first_row * columns;
    if (chance(40)) {
      drop.least = fabs(number(false));
      drop.least_before = draw(first, first + rows * columns);
    }
    if (chance(20)) {
      drop.most = fabs(number(false));
      drop.most_before = draw(first, first + rows * columns);
    }
    return drop;
  }

  // Views of rows [begin, end).
  Inputs window(int64_t begin, int64_t end, std::vector<Matrix>& views) const {
    views = matrices;
    for (Matrix& view : views) {
      if (view.data == nullptr) continue;
      view.data = static_cast<const char*>(view.data) + begin * columns * dtype_size(view.dtype);
    }
    return Inputs{{end - begin, columns, first_row + begin, first_entry},
                  views[0],
                  views.data() + 1,
                  drops.empty() ? nullptr : drops.data(),
                  models};
  }

  // Calls f with windows that cut the rows anywhere; sometimes with a single one.
  template <class F>
  void windows(const F& f) const {
    const int64_t most = chance(30) ? rows : std::max<int64_t>(1, rows / 2);
    for (int64_t begin = 0; begin < rows;) {
      const int64_t end = std::min(rows, begin + (most == rows ? rows : draw(1, most)));
      std::vector<Matrix> views;
      f(begin, window(begin, end, views));
      begin = end;
    }
  }

  std::string text() const {
    std::string text = std::to_string(rows) + " x " + std::to_string(columns) + " from row " +
                       std::to_string(first_row) + ", dtypes";
    for (const Matrix& matrix : matrices) {
      text += matrix.data == nullptr ? " -" : " " + std::to_string(static_cast<int>(matrix.dtype));
    }
    return text + (drops.empty() ? "" : ", drops") + (wild ? ", wild" : "");
  }
};

void succeed(int error) {
  if (error != 0) throw std::string("the launch failed with error ") + std::to_string(error);
}

template <class T>
void equal(const char* what, const T* cpu, const T* cuda, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const bool both_nan = cpu[i] != cpu[i] && cuda[i] != cuda[i];
    if (both_nan || std::memcmp(&cpu[i], &cuda[i], sizeof(T)) == 0) continue;
    char message[200];
    std::snprintf(message, sizeof message, "%s[%lld] is %a on the CPU and %a from CUDA", what,
                  static_cast<long long>(i), static_cast<double>(cpu[i]),
                  static_cast<double>(cuda[i]));
    throw std::string(message);
  }
}

std::string column_moments() {
  const Case c(600);
  const int64_t size = moment_count(c.models) * c.columns;
  const int64_t offset = chance(20) ? 8 : 0;
  const Memory sums = numbers(size, false), pending = numbers(size, false, offset);
  const Memory cuda_sums = sums.copy(), cuda_pending = pending.copy();
  try {
    std::vector<Matrix> views;
    const Inputs all = c.window(0, c.rows, views);
    TileSums tiles(all.window, moment_count(c.models), sums.as<double>(), pending.as<double>(), 1);
    tiles.run([&](const Tile& tile, double* to) { cpu::column_moments(all, tile, to); });
    c.windows([&](int64_t, const Inputs& in) {
      const Memory scratch(cuda::column_moments_scratch(in));
      succeed(cuda::column_moments(in, cuda_sums.as<double>(), cuda_pending.as<double>(),
                                   scratch.as<void>(), nullptr));
    });
    equal("sums", sums.as<double>(), cuda_sums.as<double>(), size);
    equal("pending", pending.as<double>(), cuda_pending.as<double>(), size);
  } catch (const std::string& problem) {
    return c.text() + ": " + problem;
  }
  return "";
}

std::string row_moments() {
  const Case c(40);
  const int64_t total_rows = c.first_row + c.rows + draw(0, 3);
  const int64_t size = moment_count(c.models) * total_rows;
  const Memory sums = numbers(size, false), cuda_sums = sums.copy();
  try {
    std::vector<Matrix> views;
    cpu::row_moments(c.window(0, c.rows, views), sums.as<double>(), total_rows, 0, c.rows);
    c.windows([&](int64_t, const Inputs& in) {
      succeed(cuda::row_moments(in, cuda_sums.as<double>(), total_rows, nullptr));
    });
    equal("sums", sums.as<double>(), cuda_sums.as<double>(), size);
  } catch (const std::string& problem) {
    return c.text() + ": " + problem;
  }
  return "";
}

// A gradient by the windows of `c`, and its view from row `begin` on.
struct Gradient {
  Dtype dtype;
  int64_t columns;
  Memory memory;

  explicit Gradient(const Case& c)
      : dtype(chance(60) ? Dtype::f32 : static_cast<Dtype>(draw(0, 3))),
        columns(c.columns),
        memory(c.rows * c.columns * dtype_size(dtype),
               chance(20) ? dtype_size(dtype) * draw(0, 7) : 0) {
    void* data = memory.as<void>();
    const int64_t count = c.rows * c.columns;
    if (dtype == Dtype::f32) fill<F32>(data, count, c.wild);
    if (dtype == Dtype::f16) fill<F16>(data, count, c.wild);
    if (dtype == Dtype::bf16) fill<BF16>(data, count, c.wild);
    if (dtype == Dtype::f64) {
      for (int64_t i = 0; i < count; ++i) memory.as<double>()[i] = number(c.wild);
    }
  }
  Matrix from(int64_t begin) const {
    return {memory.as<char>() + begin * columns * dtype_size(dtype), dtype};
  }
};

std::string column_gradient() {
  const Case c(600);
  const Gradient gradient(c);
  const int64_t size = c.models * c.columns, offset = chance(20) ? 8 : 0;
  const Memory sums = numbers(size, false), pending = numbers(size, false, offset);
  const Memory cuda_sums = sums.copy(), cuda_pending = pending.copy();
  try {
    std::vector<Matrix> views;
    const Inputs all = c.window(0, c.rows, views);
    const Matrix outer = gradient.from(0);
    TileSums tiles(all.window, c.models, sums.as<double>(), pending.as<double>(), 1);
    tiles.run([&](const Tile& tile, double* to) { cpu::column_gradient(all, outer, tile, to); });
    c.windows([&](int64_t begin, const Inputs& in) {
      const Memory scratch(cuda::column_gradient_scratch(in));
      succeed(cuda::column_gradient(in, gradient.from(begin), cuda_sums.as<double>(),
                                    cuda_pending.as<double>(), scratch.as<void>(), nullptr));
    });
    equal("sums", sums.as<double>(), cuda_sums.as<double>(), size);
    equal("pending", pending.as<double>(), cuda_pending.as<double>(), size);
  } catch (const std::string& problem) {
    return c.text() + ", gradient " + std::to_string(static_cast<int>(gradient.dtype)) + ": " +
           problem;
  }
  return "";
}

std::string row_gradient() {
  const Case c(40);
  const Gradient gradient(c);
  const int64_t total_rows = c.first_row + c.rows + draw(0, 3), size = c.models * total_rows;
  const Memory sums = numbers(size, false), cuda_sums = sums.copy();
  try {
    std::vector<Matrix> views;
    cpu::row_gradient(c.window(0, c.rows, views), gradient.from(0), sums.as<double>(), total_rows,
                      0, c.rows);
    c.windows([&](int64_t begin, const Inputs& in) {
      succeed(cuda::row_gradient(in, gradient.from(begin), cuda_sums.as<double>(), total_rows,
                                 nullptr));
    });
    equal("sums", sums.as<double>(), cuda_sums.as<double>(), size);
  } catch (const std::string& problem) {
    return c.text() + ", gradient " + std::to_string(static_cast<int>(gradient.dtype)) + ": " +
           problem;
  }
  return "";
}

// A tensor's Gram matrix is summed in blocks from its start: the case is one window, or windows of
// whole blocks of one column.
std::string gram() {
  Case c(200);
  c.first_row = 0;
  if (chance(30)) {
    c = Case(3 * kGramBlock, draw(1, 3 * kGramBlock));
    c.first_row = 0;
  }
  const int64_t pairs = gram_count(c.models), entries = c.rows * c.columns;
  const int64_t blocks = (entries + kGramBlock - 1) / kGramBlock;
  const Memory sums = numbers(pairs, false), cuda_sums = sums.copy(), partial(pairs * blocks * 8);
  try {
    std::vector<Matrix> views;
    cpu::run_grams(c.window(0, c.rows, views), kGramBlock, partial.as<double>(), 1, pairs, 0,
                   blocks);
    for (int64_t i = 0; i < pairs * blocks; ++i) {
      sums.as<double>()[i % pairs] += partial.as<double>()[i];
    }
    for (int64_t begin = 0; begin < c.rows;) {
      const int64_t blocks_here = c.columns == 1 ? draw(1, 2) * kGramBlock : c.rows;
      const int64_t end = std::min(c.rows, begin + blocks_here);
      const Inputs in = c.window(begin, end, views);
      const Memory scratch(cuda::gram_scratch(in));
      succeed(cuda::gram(in, cuda_sums.as<double>(), scratch.as<void>(), nullptr));
      begin = end;
    }
    equal("sums", sums.as<double>(), cuda_sums.as<double>(), pairs);
  } catch (const std::string& problem) {
    return c.text() + ": " + problem;
  }
  return "";
}

std::string row_gram() {
  const Case c(40);
  const int64_t total_rows = c.first_row + c.rows + draw(0, 3);
  const int64_t size = gram_count(c.models) * total_rows;
  const Memory sums = numbers(size, false), cuda_sums = sums.copy();
  try {
    std::vector<Matrix> views;
    cpu::run_grams(c.window(0, c.rows, views), c.columns, sums.as<double>() + c.first_row,
                   total_rows, 1, 0, c.rows);
    c.windows([&](int64_t, const Inputs& in) {
      succeed(cuda::row_gram(in, cuda_sums.as<double>(), total_rows, nullptr));
    });
    equal("sums", sums.as<double>(), cuda_sums.as<double>(), size);
  } catch (const std::string& problem) {
    return c.text() + ": " + problem;
  }
  return "";
}

std::string column_gram() {
  const Case c(200);
  const int64_t size = gram_count(c.models) * c.columns, offset = chance(20) ? 8 : 0;
  const Memory sums = numbers(size, false), pending = numbers(size, false, offset);
  const Memory cuda_sums = sums.copy(), cuda_pending = pending.copy();
  try {
    std::vector<Matrix> views;
    const Inputs all = c.window(0, c.rows, views);
    TileSums tiles(all.window, gram_count(c.models), sums.as<double>(), pending.as<double>(), 1);
    tiles.run([&](const Tile& tile, double* to) { cpu::column_gram(all, tile, to); });
    c.windows([&](int64_t, const Inputs& in) {
      const Memory scratch(cuda::column_gram_scratch(in));
      succeed(cuda::column_gram(in, cuda_sums.as<double>(), cuda_pending.as<double>(),
                                scratch.as<void>(), nullptr));
    });
    equal("sums", sums.as<double>(), cuda_sums.as<double>(), size);
    equal("pending", pending.as<double>(), cuda_pending.as<double>(), size);
  } catch (const std::string& problem) {
    return c.text() + ": " + problem;
  }
  return "";
}

template <class T>
void equal_stored(const Memory& cpu, const Memory& cuda, int64_t count) {
  std::vector<typename T::Number> a, b;
  for (int64_t i = 0; i < count; ++i) {
    a.push_back(T::load(cpu.as<typename T::Bits>()[i]));
    b.push_back(T::load(cuda.as<typename T::Bits>()[i]));
  }
  equal("out", a.data(), b.data(), count);
}

std::string blend() {
  const Case c(200);
  const int64_t entries = c.rows * c.columns;
  const auto dtype = static_cast<Dtype>(draw(0, 3));
  const auto axis = static_cast<Axis>(draw(0, 2));
  const int64_t least = axis == Axis::tensor    ? 1
                        : axis == Axis::columns ? c.columns
                                                : c.first_row + c.rows;
  const int64_t stride = least + (chance(20) ? draw(0, 3) : 0);
  const Memory coefficients = numbers(c.models * stride, c.wild, chance(20) ? 8 : 0);
  const double base_coefficient = chance(50) ? 1.0 : number(c.wild);
  const int64_t offset = chance(20) ? dtype_size(dtype) * draw(0, 7) : 0;
  const Memory out(entries * dtype_size(dtype), offset), cuda_out = out.copy();
  int64_t counts[2] = {draw(0, 9), draw(0, 9)};
  int64_t cuda_counts[2] = {counts[0], counts[1]};
  auto blend_of = [&](const Inputs& in, int64_t begin, const Memory& to) {
    char* start = to.as<char>() + begin * c.columns * dtype_size(dtype);
    return Blend{in, axis, coefficients.as<double>(), stride, base_coefficient, start, dtype};
  };
  try {
    std::vector<Matrix> views;
    cpu::blend(blend_of(c.window(0, c.rows, views), 0, out), 0, entries, counts[0], counts[1]);
    c.windows([&](int64_t begin, const Inputs& in) {
      const Blend part = blend_of(in, begin, cuda_out);
      const Memory scratch(cuda::blend_scratch(part));
      succeed(cuda::blend(part, cuda_counts, scratch.as<void>(), nullptr));
    });
    if (dtype == Dtype::f32) equal_stored<F32>(out, cuda_out, entries);
    if (dtype == Dtype::f16) equal_stored<F16>(out, cuda_out, entries);
    if (dtype == Dtype::bf16) equal_stored<BF16>(out, cuda_out, entries);
    if (dtype == Dtype::f64) equal_stored<F64>(out, cuda_out, entries);
    equal("counts", counts, cuda_counts, 2);
  } catch (const std::string& problem) {
    return c.text() + ", axis " + std::to_string(static_cast<int>(axis)) + ", out " +
           std::to_string(static_cast<int>(dtype)) + ": " + problem;
  }
  return "";
}

// As people give them: of few bits, not of few, or none; sometimes out of bounds for float32.
double coefficient(bool wild) {
  static constexpr double kNumbers[] = {0.5, 0.25, 0.3, 1.0, -1.0, 0.1, 0.0, 2.0, 1.0 / 3.0, 0.75};
  if (wild && chance(5)) return number(true);
  if (chance(3)) return uniform() * (chance(50) ? 0x1p-70 : 0x1p70);
  return chance(60) ? kNumbers[draw(0, 9)] : uniform() - 0.5;
}

// The float32 blend beside a float64 one written here: the CPU has a float32 blend, too.
std::string quick_blend() {
  const Case c{Case::Near{}};
  const auto axis = static_cast<Axis>(draw(0, 2));
  const int64_t stride = 2 * (c.first_row + c.rows + c.columns);
  const Memory coefficients(c.models * stride * 8), out(c.rows * c.columns * 2);
  const bool few = chance(50);
  for (int64_t i = 0; i < c.models * stride; ++i) {
    coefficients.as<double>()[i] = few && !chance(2) ? 0.5 : coefficient(c.wild);
  }
  const double of_base = chance(60) ? 1.0 : coefficient(c.wild);
  int64_t counts[2] = {0, 0}, cuda_counts[2] = {0, 0};
  try {
    c.windows([&](int64_t begin, const Inputs& in) {
      uint16_t* start = out.as<uint16_t>() + begin * c.columns;
      const Blend part{in, axis, coefficients.as<double>(), stride, of_base, start, Dtype::bf16};
      const Memory scratch(cuda::blend_scratch(part));
      succeed(cuda::blend(part, cuda_counts, scratch.as<void>(), nullptr));
    });
    std::vector<Matrix> views;
    const Inputs in = c.window(0, c.rows, views);
    const auto number = [](const Matrix& matrix, int64_t i) {
      return double{BF16::load(static_cast<const uint16_t*>(matrix.data)[i])};
    };
    std::vector<float> expected, found;
    for (int64_t i = 0; i < c.rows * c.columns; ++i) {
      const bool based = in.base.data != nullptr;
      const double base = based ? number(in.base, i) : 0.0;
      const int64_t index = c.first_entry + c.first_row * c.columns + i;
      const int64_t place = axis == Axis::columns ? i % c.columns
                            : axis == Axis::rows  ? c.first_row + i / c.columns
                                                  : 0;
      double sum = -0.0;
      for (int m = 0; m < c.models; ++m) {
        double delta = number(in.models[m], i) - base;
        if (in.drops != nullptr && in.drops[m].threshold > 0) {
          uint32_t block[4];
          philox(in.drops[m].key, static_cast<uint64_t>(index) / 4, block);
          delta *= block[index % 4] >= in.drops[m].threshold ? in.drops[m].scale : 0.0;
        }
        sum = fma(coefficients.as<double>()[m * stride + place], delta, sum);
      }
      if (based) sum = sum == 0.0 ? of_base * base : of_base * base + sum;
      const double result = round_to<BF16>(sum);
      counts[0] += !(fabs(sum) < HUGE_VAL);
      counts[1] += fabs(sum) < HUGE_VAL && fabs(result) > BF16::largest;
      expected.push_back(BF16::load(BF16::store(static_cast<float>(result))));
      found.push_back(BF16::load(out.as<uint16_t>()[i]));
    }
    equal("out", expected.data(), found.data(), c.rows * c.columns);
    equal("counts", counts, cuda_counts, 2);
  } catch (const std::string& problem) {
    return c.text() + ", axis " + std::to_string(static_cast<int>(axis)) + ": " + problem;
  }
  return "";
}

std::string rank() {
  const int64_t models = draw(1, 70), count = chance(30) ? draw(1, 5) : draw(1, 2000);
  const Memory values = numbers(models * count, chance(50));
  if (chance(60)) {  // ties, of NaNs and zeros too
    const int64_t kinds = draw(1, 50);
    const Memory few = numbers(kinds, true);
    for (int64_t i = 0; i < models * count; ++i) {
      values.as<double>()[i] = few.as<double>()[draw(0, kinds - 1)];
    }
  }
  const bool average = chance(50);
  const Memory ranks(models * count * 8), cuda_ranks(models * count * 8);
  const Memory scratch(cuda::rank_scratch(models, count));
  try {
    for (int64_t m = 0; m < models; ++m) {
      cpu::rank(values.as<double>() + m * count, ranks.as<double>() + m * count, count, average);
    }
    succeed(cuda::rank(values.as<double>(), cuda_ranks.as<double>(), models, count, average,
                       scratch.as<void>(), nullptr));
    equal("ranks", ranks.as<double>(), cuda_ranks.as<double>(), models * count);
  } catch (const std::string& problem) {
    return std::to_string(models) + " x " + std::to_string(count) + ": " + problem;
  }
  return "";
}

// A window of a case after a second choice among its deltas.
Kept kept_of(const Case& c, const Inputs& in, const std::vector<Drop>& keeps, const Memory& odds,
             bool with_odds, Measure measure, const Memory& scales, bool divide) {
  const bool scaled = measure == Measure::rows || measure == Measure::competition;
  const int64_t stride = measure == Measure::rows ? first_row_of(in.window) + c.rows + 1 : 2;
  return {in,
          measure,
          scaled ? scales.as<double>() : nullptr,
          stride,
          keeps.data(),
          with_odds ? odds.as<double>() : nullptr,
          divide && c.models > 0};
}

std::string selection() {
  Case c(60);
  const bool near = chance(70);  // rows of scales from the tensor's first on fit the memory
  if (near) c.first_entry %= 1000;
  const int64_t entries = c.rows * c.columns, models = c.models, block = draw(1, 300);
  const int64_t blocks = (entries + block - 1) / block;
  auto measure = static_cast<Measure>(draw(0, 3));
  if (measure == Measure::rows && !near) measure = Measure::competition;
  const int64_t sets = measure == Measure::spread ? 1 : models;
  std::vector<Drop> keeps;
  for (int64_t m = 0; m < models; ++m) keeps.push_back(c.drop());
  const Memory odds(models * entries * 8), weights(models * 8);
  for (int64_t i = 0; i < models * entries; ++i) odds.as<double>()[i] = 0.05 + 0.9 * uniform();
  for (int64_t m = 0; m < models; ++m) weights.as<double>()[m] = uniform() - 0.1;
  std::vector<Matrix> views;
  const Inputs in = c.window(0, c.rows, views);
  const int64_t rows = near ? first_row_of(in.window) + c.rows + 1 : 2;
  const Memory scales(models * std::max<int64_t>(2, rows) * 8);
  for (int64_t i = 0; i < models * std::max<int64_t>(2, rows); ++i) {
    scales.as<double>()[i] = 20.0 * uniform();
  }
  const Kept kept = kept_of(c, in, keeps, odds, chance(40), measure, scales, chance(50));
  const auto dtype = static_cast<Dtype>(draw(0, 2));
  const Memory out(entries * dtype_size(dtype)), cuda_out = out.copy();
  const Memory limits(models * 8);
  for (int64_t m = 0; m < models; ++m) limits.as<double>()[m] = chance(20) ? 0.0 : 5.0 * uniform();
  const Election election{kept,
                          static_cast<Elect>(draw(0, 6)),
                          chance(50),
                          0.7,
                          weights.as<double>(),
                          limits.as<double>(),
                          chance(70) ? 0 : static_cast<int>(draw(1, 3)),
                          out.as<void>(),
                          dtype};
  Election on_cuda = election;
  on_cuda.out = cuda_out.as<void>();
  int64_t counts[2] = {}, cuda_counts[2] = {};
  try {
    cpu::elect(election, 0, entries, counts[0], counts[1]);
    succeed(cuda::elect(on_cuda, cuda_counts, nullptr));
    if (dtype == Dtype::f32) equal_stored<F32>(out, cuda_out, entries);
    if (dtype == Dtype::f16) equal_stored<F16>(out, cuda_out, entries);
    if (dtype == Dtype::bf16) equal_stored<BF16>(out, cuda_out, entries);
    equal("counts", counts, cuda_counts, 2);
    const Memory sums(models * 3 * blocks * 8), cuda_sums(models * 3 * blocks * 8);
    cpu::kept_sums(kept, sums.as<double>(), block, 0, blocks);
    succeed(cuda::kept_sums(kept, cuda_sums.as<double>(), block, nullptr));
    equal("sums", sums.as<double>(), cuda_sums.as<double>(), models * 3 * blocks);
    const Memory size(models * entries * 8), cuda_size(models * entries * 8);
    cpu::magnitudes(kept.inputs, size.as<double>(), 0, entries);
    succeed(cuda::magnitudes(kept.inputs, cuda_size.as<double>(), nullptr));
    equal("magnitudes", size.as<double>(), cuda_size.as<double>(), models * entries);
    std::vector<double> lowest, steps;
    for (int64_t m = 0; m < models; ++m) {
      lowest.push_back(static_cast<double>(draw(0, 50)) / 64);
      steps.push_back(static_cast<double>(draw(0, 1000)) / 3e6);
    }
    const Memory space(cuda::row_odds_scratch(kept.inputs));
    cpu::row_odds(kept.inputs, lowest.data(), steps.data(), size.as<double>(), 0, c.rows);
    succeed(cuda::row_odds(kept.inputs, lowest.data(), steps.data(), cuda_size.as<double>(),
                           space.as<void>(), nullptr));
    equal("odds by rank", size.as<double>(), cuda_size.as<double>(), models * entries);
    cpu::keep_deltas(kept, size.as<double>(), 0, entries);
    succeed(cuda::keep_deltas(kept, cuda_size.as<double>(), nullptr));
    equal("kept deltas", size.as<double>(), cuda_size.as<double>(), models * entries);
    std::vector<int64_t> shared(static_cast<size_t>(2 * models)), cuda_shared = shared;
    cpu::count_shared(kept.inputs, limits.as<double>(), shared.data(), 0, entries);
    succeed(cuda::count_shared(kept.inputs, limits.as<double>(), cuda_shared.data(), nullptr));
    equal("shared", shared.data(), cuda_shared.data(), 2 * models);
    constexpr int64_t kBins = 300;
    std::vector<int64_t> offsets(static_cast<size_t>(sets), 900);
    std::vector<int64_t> bins(static_cast<size_t>(sets * kBins)), cuda_bins = bins;
    const bool clamp = chance(50);
    cpu::count_magnitudes(kept, 52, offsets.data(), clamp, kBins, bins.data(), 0, entries);
    succeed(
        cuda::count_magnitudes(kept, 52, offsets.data(), clamp, kBins, cuda_bins.data(), nullptr));
    equal("bins", bins.data(), cuda_bins.data(), sets * kBins);
    const KeyRange range{static_cast<int32_t>(draw(0, sets - 1)),
                         chance(50) ? 0 : int64_t{1000} << 52, int64_t{1020} << 52};
    std::vector<int64_t> keys(static_cast<size_t>(entries)), indices = keys, cuda_keys = keys,
                                                             cuda_indices = keys;
    std::vector<int64_t> same(static_cast<size_t>(blocks)), cuda_same = same;
    int64_t found = 0, cuda_found = 0;
    cpu::collect_magnitudes(kept, &range, 1, keys.data(), indices.data(), entries, &found,
                            same.data(), block, 0, entries);
    succeed(cuda::collect_magnitudes(kept, &range, 1, cuda_keys.data(), cuda_indices.data(),
                                     entries, &cuda_found, cuda_same.data(), block, nullptr));
    equal("found", &found, &cuda_found, 1);
    equal("same", same.data(), cuda_same.data(), blocks);
    std::sort(cuda_indices.begin(), cuda_indices.begin() + cuda_found);  // blocks run in any order
    equal("indices", indices.data(), cuda_indices.data(), found);
  } catch (const std::string& problem) {
    return c.text() + ", out " + std::to_string(static_cast<int>(dtype)) + ": " + problem;
  }
  return "";
}

std::string row_divergences() {
  Case c(40);
  c.first_entry = c.columns * draw(0, 20);
  const int64_t stride = c.first_row + 20 + c.rows + draw(0, 2), size = c.models * stride;
  const Memory out = numbers(size, false), cuda_out = out.copy();
  try {
    std::vector<Matrix> views;
    cpu::row_divergences(c.window(0, c.rows, views), out.as<double>(), stride, 0, c.rows);
    c.windows([&](int64_t, const Inputs& in) {
      succeed(cuda::row_divergences(in, cuda_out.as<double>(), stride, nullptr));
    });
    equal("out", out.as<double>(), cuda_out.as<double>(), size);
  } catch (const std::string& problem) {
    return c.text() + ": " + problem;
  }
  return "";
}

std::string calibrated_softmax() {
  const int64_t models = draw(1, 6), count = draw(1, 700);
  const Memory scores = numbers(models * count, chance(30)), thresholds = numbers(models, true);
  const double divisor = uniform() + 0.01, s = number(false);
  const Memory out(models * count * 8), cuda_out(models * count * 8);
  try {
    cpu::calibrated_softmax(scores.as<double>(), thresholds.as<double>(), divisor, s,
                            out.as<double>(), static_cast<int>(models), count, 0, count);
    succeed(cuda::calibrated_softmax(scores.as<double>(), thresholds.as<double>(), divisor, s,
                                     cuda_out.as<double>(), static_cast<int>(models), count,
                                     nullptr));
    equal("out", out.as<double>(), cuda_out.as<double>(), models * count);
  } catch (const std::string& problem) {
    return std::to_string(models) + " x " + std::to_string(count) + ": " + problem;
  }
  return "";
}

}  // namespace

int main(int, char** arguments) {
  const std::string op = arguments[1];
  auto* run = op == "column_moments"    ? column_moments
              : op == "row_moments"     ? row_moments
              : op == "column_gradient" ? column_gradient
              : op == "row_gradient"    ? row_gradient
              : op == "gram"            ? gram
              : op == "row_gram"        ? row_gram
              : op == "column_gram"     ? column_gram
              : op == "blend"           ? blend
              : op == "quick_blend"     ? quick_blend
              : op == "rank"            ? rank
              : op == "selection"       ? selection
              : op == "row_divergences" ? row_divergences
                                        : calibrated_softmax;
  const uint64_t first = std::stoull(arguments[2]), cases = std::stoull(arguments[3]);
  for (uint64_t seed = first; seed < first + cases; ++seed) {
    random_bits.seed(seed);
    emulation::block_order.seed(static_cast<unsigned>(seed));
    const std::string problem = run();
    if (problem.empty()) continue;
    std::printf("%s, seed %llu: %s\n", op.c_str(), static_cast<unsigned long long>(seed),
                problem.c_str());
    return 1;
  }
  std::printf("ok %zu\n", emulation::launched.size());
}
