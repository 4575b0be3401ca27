#include "common/low_rank.h"
#include "common/parallel.h"
#include "grouped_lora/grouped_lora.h"

namespace mixlora::MIXLORA_ISA {
namespace {

// Of a group: fewer do not pay for a transposed copy of its B.
constexpr int kFewRows = 8;

int64_t num_panels(int64_t features) { return (features + kPanelColumns - 1) / kPanelColumns; }

// Calls body(group, begin, columns) for the panels of every group, in parallel.
template <class Body>
void parallel_panels(int64_t G, int64_t features, const Body& body) {
  const int64_t panels = num_panels(features);
  parallel_for(G * panels, [&](int64_t item) {
    const int64_t begin = item % panels * kPanelColumns;
    body(item / panels, begin, std::min<int64_t>(kPanelColumns, features - begin));
  });
}

// B^T [G, R, O] of the groups that have so many rows: its features too lie side by side.
template <class T>
std::unique_ptr<Wide<T>[]> transposed_b(const GroupedLoraParams& p, int64_t min_rows) {
  const T* lora_b_GOR = static_cast<const T*>(p.lora_b_GOR);
  auto b_GRO = std::make_unique_for_overwrite<Wide<T>[]>(p.G * p.R * p.O);
  parallel_panels(p.G, p.O, [&](int64_t g, int64_t o, int64_t columns) {
    if (p.group_start_G1[g + 1] - p.group_start_G1[g] < min_rows) return;
    std::vector<Wide<T>> b_OR(columns * p.R);
    convert(lora_b_GOR + (g * p.O + o) * p.R, columns * p.R, b_OR.data());
    transpose(b_OR.data(), columns, p.R, p.R, b_GRO.get() + g * p.R * p.O + o, p.O);
  });
  return b_GRO;
}

template <class T>
void shrink_block(
    const T* x_NI, RowBlock block, const auto* a_RI, int64_t R, int64_t I, double scale, auto* z) {
  const T* x[kBlockRows];
  for (int64_t n = block.begin; n < block.end; ++n) x[n - block.begin] = x_NI + n * I;
  shrink<T>(x, block.end - block.begin, a_RI, R, I, scale, z);
}

// Rows [begin, end) of y_NO = z A, where z_NR starts with the block's first row.
template <class T, class A>
void expand_block(
    const Wide<T>* z_NR, RowBlock block, const A* a_RO, int64_t R, int64_t O, T* y_NO) {
  for_each_panel(O, [&](int64_t o, int64_t columns) {
    expand<Wide<T>>(
        {z_NR, R, 1},
        block.end - block.begin,
        R,
        columns,
        [&](int64_t r) { return a_RO + r * O + o; },
        [&](int64_t n, const Wide<T>* y) {
          convert(y, columns, y_NO + (block.begin + n) * O + o);
        });
  });
}

// The same for few rows, with B where it lies: every y is a product along the ranks.
template <class T>
void expand_few(const Wide<T>* z_NR, RowBlock block, const T* b_OR, int64_t R, int64_t O, T* y_NO) {
  const int64_t N = block.end - block.begin;
  for (int64_t o = 0; o < O; o += kBlockRows) {
    const int64_t features = std::min<int64_t>(kBlockRows, O - o);
    const T* b[kBlockRows];
    for (int64_t i = 0; i < features; ++i) b[i] = b_OR + (o + i) * R;
    Wide<T> y_ON[kBlockRows * kFewRows], y_NO_block[kFewRows * kBlockRows];
    shrink<T>(b, features, z_NR, N, R, 1, y_ON);
    transpose(y_ON, features, N, N, y_NO_block, kBlockRows);
    for (int64_t n = 0; n < N; ++n) {
      convert(y_NO_block + n * kBlockRows, features, y_NO + (block.begin + n) * O + o);
    }
  }
}

template <class T>
void zero_tail(T* y_NO, int64_t rows, int64_t N, int64_t O) {
  std::fill(y_NO + rows * O, y_NO + N * O, T{});
}

template <class T>
void forward(const GroupedLoraParams& p) {
  const T* x_NI = static_cast<const T*>(p.x_NI);
  const T* lora_a_GRI = static_cast<const T*>(p.lora_a_GRI);
  T* y_NO = static_cast<T*>(p.y_NO);
  const T* lora_b_GOR = static_cast<const T*>(p.lora_b_GOR);
  const auto b_GRO = transposed_b<T>(p, kFewRows);
  const auto blocks = row_blocks(p.group_start_G1, p.G);
  parallel_for(blocks.size(), [&](int64_t i) {
    const RowBlock block = blocks[i];
    std::vector<Wide<T>> z_NR((block.end - block.begin) * p.R);
    const T* lora_a_RI = lora_a_GRI + block.group * p.R * p.I;
    shrink_block(x_NI, block, lora_a_RI, p.R, p.I, p.scaling, z_NR.data());
    const int64_t b = block.group * p.R * p.O;
    if (p.group_start_G1[block.group + 1] - p.group_start_G1[block.group] < kFewRows) {
      expand_few(z_NR.data(), block, lora_b_GOR + b, p.R, p.O, y_NO);
    } else {
      expand_block(z_NR.data(), block, b_GRO.get() + b, p.R, p.O, y_NO);
    }
  });
  zero_tail(y_NO, p.group_start_G1[p.G], p.N, p.O);
}

// With z = s A x and dz = s B^T dy of every row:
//   dx = A^T dz      dA = sum dz x^T      dB = sum dy z^T
template <class T>
void backward(const GroupedLoraParams& p) {
  using S = Wide<T>;
  const T* dy_NO = static_cast<const T*>(p.dy_NO);
  const T* x_NI = static_cast<const T*>(p.x_NI);
  const T* lora_a_GRI = static_cast<const T*>(p.lora_a_GRI);
  T* dx_NI = static_cast<T*>(p.dx_NI);
  T* dlora_a_GRI = static_cast<T*>(p.dlora_a_GRI);
  T* dlora_b_GOR = static_cast<T*>(p.dlora_b_GOR);
  const int32_t* start_G1 = p.group_start_G1;
  const int64_t rows = start_G1[p.G], R = p.R;

  std::vector<S> z_NR(rows * R), dz_NR(rows * R);
  {
    const auto b_GRO = transposed_b<T>(p, 1);
    const auto blocks = row_blocks(start_G1, p.G);
    parallel_for(blocks.size(), [&](int64_t i) {
      const RowBlock block = blocks[i];
      const T* lora_a_RI = lora_a_GRI + block.group * R * p.I;
      const S* b_RO = b_GRO.get() + block.group * R * p.O;
      S* dz = dz_NR.data() + block.begin * R;
      shrink_block(x_NI, block, lora_a_RI, R, p.I, p.scaling, z_NR.data() + block.begin * R);
      shrink_block(dy_NO, block, b_RO, R, p.O, p.scaling, dz);
      expand_block(dz, block, lora_a_RI, R, p.I, dx_NI);
    });
  }
  zero_tail(dx_NI, rows, p.N, p.I);

  parallel_panels(p.G, p.I, [&](int64_t g, int64_t i, int64_t columns) {
    const int64_t begin = start_G1[g];
    expand<S>(
        {dz_NR.data() + begin * R, 1, R},
        R,
        start_G1[g + 1] - begin,
        columns,
        [&](int64_t j) { return x_NI + (begin + j) * p.I + i; },
        [&](int64_t r, const S* da) { convert(da, columns, dlora_a_GRI + (g * R + r) * p.I + i); });
  });
  parallel_panels(p.G, p.O, [&](int64_t g, int64_t o, int64_t columns) {
    const int64_t begin = start_G1[g];
    std::vector<S> db_RO(R * columns), db_OR(columns * R);
    expand<S>(
        {z_NR.data() + begin * R, 1, R},
        R,
        start_G1[g + 1] - begin,
        columns,
        [&](int64_t j) { return dy_NO + (begin + j) * p.O + o; },
        [&](int64_t r, const S* db) { std::copy(db, db + columns, &db_RO[r * columns]); });
    transpose(db_RO.data(), R, columns, columns, db_OR.data(), R);
    convert(db_OR.data(), columns * R, dlora_b_GOR + (g * p.O + o) * R);
  });
}

}  // namespace

void grouped_lora_cpu(const GroupedLoraParams& p) {
  with_type(p.dtype, [&](auto zero) { forward<decltype(zero)>(p); });
}

void grouped_lora_backward_cpu(const GroupedLoraParams& p) {
  with_type(p.dtype, [&](auto zero) { backward<decltype(zero)>(p); });
}

}  // namespace mixlora::MIXLORA_ISA
