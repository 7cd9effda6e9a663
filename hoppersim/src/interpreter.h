// A cluster at work: its warps in seeded order, the groups of a warp by lowest pc.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "machine.h"

namespace hoppersim {

uint64_t cluster_count(const Launch& launch);

class ClusterRun {
 public:
  ClusterRun(Launch& launch, uint64_t index);
  // Until all warps have ended: true. False: for a while they have only looked, perhaps at what another cluster is to
  // do; call it again.
  bool run(const std::atomic<bool>& stop);
  void add_counters(Counters& into);

 private:
  void build(uint64_t index);
  void build_warps(Cta& cta);
  void run_warp(Warp& warp, int quantum);
  Group* choose(Warp& warp);
  void step(Warp& warp, Group& group);
  void merge_groups(Warp& warp);
  bool wake(Warp& warp);
  void complete_one();
  uint64_t progress() const;
  bool only_looks();
  [[noreturn]] void stuck(const char* kind);
  std::string report() const;
  std::string clusters_left() const;
  const Instruction* first_position() const;

  Launch& launch_;
  Cluster cluster_;
  std::vector<Warp*> warps_, order_;
  uint64_t rounds_ = 0;
  uint64_t completed_ = 0;          // late operations
  uint64_t looked_ = 0, made_ = 0;  // instructions executed, and progress(), when only_looks looked
};

}  // namespace hoppersim
