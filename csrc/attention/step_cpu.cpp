// Every key and value is read from memory once, for all queries of its group. A task is a sequence, a key head and a
// piece of its keys: enough of them to keep all cores busy with one sequence, and to even out sequences of unequal
// length. A task goes over its piece in blocks of keys and keeps, for each query, the largest score, the sum of
// exponentials and the sum of values that these weigh (an online softmax). The last task of a sequence and key head
// combines the pieces in their order. How a sequence is cut depends on its own length alone, so its bits depend neither
// on the number of threads nor on the other sequences.
#include "csrc/attention/attention_step.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "csrc/attention/step_tiles_cpu.h"
#include "csrc/attention/step_vectors_cpu.h"
#include "csrc/cpu/elements.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/tasks.h"
#include "csrc/cpu/tensor_access.h"

namespace jet::cpu::JET_CPU_ISA {
namespace {

constexpr long kLeastPiece = 512;  // keys of a task: 256 KiB to read, beside 3 KiB of a result that is written
constexpr long kMostPieces = 32;   // of a sequence, which bounds the memory of the results

// Blocks: how a block of keys is computed with, VectorAttention or TileAttention.
template <class Blocks>
class Step {
  using T = typename Blocks::Element;
  using Query = typename Blocks::Query;
  using Acc = Arithmetic<T>;
  using Vec = Vector<Acc>;
  static constexpr int L = kLanes<T>;
  static constexpr Acc kNothing = -std::numeric_limits<Acc>::infinity();

  // The slots that a sequence attends to, and how they are cut.
  struct Sequence {
    long slot, used, piece, pieces;
    explicit Sequence(long length, long slots)
        : slot(length % slots),
          used(smaller(length, slots - 1) + 1),
          piece(larger(kLeastPiece, round_up((used + kMostPieces - 1) / kMostPieces, kBlock))),
          pieces((used + piece - 1) / piece) {}
  };

  using Result = AttentionSums<Acc>;

  // Memory of a worker.
  struct Room {
    Acc *cos, *sin, *x, *rotated;  // [width] each
    T* rounded;                    // [width]
    Query* q;                      // [group, width]
    T *keys, *values;              // [kBlock, width], and twice that, of blocks that are not read in place
    typename Blocks::Room blocks;
  };

 public:
  explicit Step(const AttentionStepParams& p)
      : p_(p),
        group_(p.H / larger(p.Hkv, 1)),
        width_(round_up(p.D, 2 * L)),
        blocks_(group_, width_, Acc(p.scale)),
        first_(p.N + 1) {
    for (long n = 0; n < p.N; ++n)
      first_[n + 1] = first_[n] + (p.lengths[n] < 0 ? 0 : p.Hkv * Sequence(p.lengths[n], p.L).pieces);
  }

  void run(const Parallel& parallel) {
    T* const o = static_cast<T*>(p_.o);
    for (long n = 0; n < p_.N; ++n)
      if (p_.lengths[n] < 0) std::fill_n(o + n * p_.H * p_.D, p_.H * p_.D, T{});
    const long tasks = first_[p_.N];
    if (tasks == 0 || group_ == 0) return;
    double keys = 0;
    for (long n = 0; n < p_.N; ++n)
      if (p_.lengths[n] >= 0) keys += Sequence(p_.lengths[n], p_.L).used;
    const Parallel chosen = for_work(parallel, 2 * keys * p_.H * p_.D);
    const long workers = larger(1, chosen.threads);
    Scratch scratch(workers, carve(nullptr).used());
    stride_ = round_up(group_ * (width_ + 2), 64 / long(sizeof(Acc)));
    Buffer<Acc> results(tasks * stride_);
    results_ = results.get();
    std::vector<long> finished(p_.N * p_.Hkv);
    run_tasks(chosen, workers, tasks, [&](long worker, long task) {
      Room room;
      carve(scratch.of(worker), &room);
      const long n = std::upper_bound(first_.begin(), first_.end(), task) - first_.begin() - 1;
      const Sequence sequence(p_.lengths[n], p_.L);
      const long h = (task - first_[n]) / sequence.pieces, piece = (task - first_[n]) % sequence.pieces;
      attend(room, n, h, sequence, piece, result(task));
      // Acquires what the others have released.
      if (__atomic_add_fetch(&finished[n * p_.Hkv + h], 1, __ATOMIC_ACQ_REL) == sequence.pieces)
        combine(room, n, h, task - piece, sequence.pieces);
    });
  }

 private:
  Carver carve(char* block, Room* room = nullptr) const {
    Carver carver(block);
    Room ignored;
    Room& r = room == nullptr ? ignored : *room;
    for (Acc** row : {&r.cos, &r.sin, &r.x, &r.rotated}) *row = carver.take<Acc>(width_);
    r.rounded = carver.take<T>(width_);
    r.q = carver.take<Query>(group_ * width_);
    r.keys = carver.take<T>(kBlock * width_);
    r.values = carver.take<T>(2 * kBlock * width_);
    blocks_.carve(carver, r.blocks);
    return carver;
  }

  bool in_place(const AttentionCache& cache) const { return cache.strides.d == 1 && width_ == p_.D; }

  Result result(long task) const {
    Acc* const o = results_ + task * stride_;
    return {o, o + group_ * width_, o + group_ * (width_ + 1)};
  }

  T* row(const AttentionCache& cache, long n, long h, long slot) const {
    const AttentionCacheStrides& s = cache.strides;
    return static_cast<T*>(cache.data) + n * s.n + h * s.h + slot * s.l;
  }

  void attend(Room& room, long n, long h, const Sequence& sequence, long piece, const Result& result) const {
    load_angles(room, n);
    for (long i = 0; i < group_; ++i) load_query(room, n, h, i);
    const long begin = piece * sequence.piece, end = smaller(begin + sequence.piece, sequence.used);
    if (begin <= sequence.slot && sequence.slot < end) write_token(room, n, h, sequence.slot);
    blocks_.begin(room.blocks, room.q, result);
    [[maybe_unused]] const auto registers = blocks_.registers();
    for (long slot = begin; slot < end; slot += kBlock) {
      const long count = smaller(kBlock, end - slot);
      const T *keys = row(p_.key, n, h, slot), *values = row(p_.value, n, h, slot);
      long key_row = p_.key.strides.l, value_row = p_.value.strides.l;
      const bool copied = Blocks::kWholeBlocks && count < kBlock;
      if (copied || !in_place(p_.key)) keys = copy_rows(keys, p_.key.strides, count, room.keys), key_row = width_;
      if (copied || !in_place(p_.value))
        values = copy_rows(values, p_.value.strides, count, room.values + slot / kBlock % 2 * kBlock * width_),
        value_row = width_;
      blocks_.add(room.blocks, keys, key_row, values, value_row, count, result);
    }
    blocks_.end(room.blocks, result);
  }

  // ---- the new token

  void load_angles(const Room& room, long n) const {
    for (const auto& [from, to] : {std::pair(&p_.cos, room.cos), std::pair(&p_.sin, room.sin)}) {
      const float* angles = at<float>(*from, n, 0);
      if constexpr (sizeof(Acc) == sizeof(float))
        load_row(angles, from->strides.d, p_.D, width_, to);
      else
        for (long i = 0; i < p_.D; ++i) to[i] = angles[i * from->strides.d];
    }
  }

  // room.rounded = rotate(x)
  void rotate(const Room& room, const T* x, long stride) const {
    const long half = p_.D / 2;
    load_row(x, stride, p_.D, width_, room.x);
    for (long i = 0; i < half; i += L) {
      const auto some = [&](const Acc* row) { return load_some(row + i, 1, half - i); };
      const Vec a = some(room.x), b = some(room.x + half);
      store_some(room.rotated + i, 1, half - i, a * some(room.cos) - b * some(room.sin));
      store_some(room.rotated + half + i, 1, half - i, b * some(room.cos + half) + a * some(room.sin + half));
    }
    store_row(room.rotated, p_.D, room.rounded);
  }

  void load_query(const Room& room, long n, long h, long i) const {
    rotate(room, at<T>(p_.q, n, 0, h * group_ + i), p_.q.strides.d);
    Query* const q = room.q + i * width_;
    if constexpr (sizeof(Query) == sizeof(T))
      std::copy_n(reinterpret_cast<const Query*>(room.rounded), p_.D, q), std::fill_n(q + p_.D, width_ - p_.D, Query{});
    else
      load_row(room.rounded, 1, p_.D, width_, q);
  }

  void write_token(const Room& room, long n, long h, long slot) const {
    rotate(room, at<T>(p_.k, n, 0, h), p_.k.strides.d);
    const T* v = at<T>(p_.v, n, 0, h);
    T *key = row(p_.key, n, h, slot), *value = row(p_.value, n, h, slot);
    for (long d = 0; d < p_.D; ++d) key[d * p_.key.strides.d] = room.rounded[d];
    for (long d = 0; d < p_.D; ++d) value[d * p_.value.strides.d] = v[d * p_.v.strides.d];
  }

  // A block of which `count` rows are in use. Blocks that are computed with as a whole have zeros in the others.
  const T* copy_rows(const T* from, const AttentionCacheStrides& strides, long count, T* to) const {
    for (long j = 0; j < count; ++j) {
      const T* row = from + j * strides.l;
      if (strides.d == 1)
        std::copy_n(row, p_.D, to + j * width_);
      else
        for (long d = 0; d < p_.D; ++d) to[j * width_ + d] = row[d * strides.d];
      std::fill_n(to + j * width_ + p_.D, width_ - p_.D, T{});
    }
    if (Blocks::kWholeBlocks) std::fill_n(to + count * width_, (kBlock - count) * width_, T{});
    return to;
  }

  // ---- the pieces of a sequence and key head

  void combine(const Room& room, long n, long h, long first, long pieces) const {
    for (long i = 0; i < group_; ++i) {
      Acc most = kNothing, sum = 0;
      for (long s = 0; s < pieces; ++s) most = larger_of(most, result(first + s).most[i]);
      const Acc reference = most == kNothing ? Acc(0) : most;
      std::fill_n(room.x, width_, Acc(0));
      for (long s = 0; s < pieces; ++s) {
        const Result piece = result(first + s);
        const Acc weight = exponential_of(piece.most[i] - reference);
        sum += weight * piece.sum[i];
        for (long c = 0; c < width_; c += L)
          store(room.x + c, load(room.x + c) + weight * load(piece.o + i * width_ + c));
      }
      for (long c = 0; c < width_; c += 2 * L) {
        const Vec x[2] = {load(room.x + c) / sum, load(room.x + c + L) / sum};
        Vec y[2];
        in_order<T>(x, y);
        store(room.rotated + c, y[0]), store(room.rotated + c + L, y[1]);
      }
      store_row(room.rotated, p_.D, static_cast<T*>(p_.o) + (n * p_.H + h * group_ + i) * p_.D);
    }
  }

  static Acc larger_of(Acc a, Acc b) { return a > b ? a : b; }

  const AttentionStepParams& p_;
  long group_, width_;  // queries of a key head; D in whole pairs of vectors
  Blocks blocks_;
  std::vector<long> first_;  // [N + 1] task of each sequence
  Acc* results_ = nullptr;
  long stride_ = 0;  // of results_, a task's
};

}  // namespace

void attention_step_cpu(const AttentionStepParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case Dtype::f32: return Step<VectorAttention<NumberScores<float>>>(p).run(parallel);
    case Dtype::f64: JET_CPU_FP64(Step<VectorAttention<NumberScores<double>>>(p).run(parallel));
    case Dtype::f16: return Step<VectorAttention<NumberScores<f16>>>(p).run(parallel);
    case Dtype::bf16:
#if defined(__AVX512F__)
      if (amx_bf16_is_active() && p.H <= TileAttention::kMostQueries * p.Hkv)
        return Step<TileAttention>(p).run(parallel);
      if (has_bf16_instructions()) return Step<VectorAttention<PairScores>>(p).run(parallel);
#endif
      return Step<VectorAttention<NumberScores<bf16>>>(p).run(parallel);
  }
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(attention_step_cpu, AttentionStepParams, params.dtype)
