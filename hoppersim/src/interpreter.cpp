#include "interpreter.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "async.h"
#include "core.h"
#include "order.h"
#include "races_global.h"
#include "tensor.h"

namespace hoppersim {

namespace {

constexpr uint64_t kLooks = 20000;          // instructions after which progress is looked for
constexpr int kQuantum = 128;               // instructions a warp runs before the next has its turn
constexpr uint64_t kGroupPatience = 20000;  // instructions after which the groups of a warp take turns
constexpr uint64_t kLatePatience =
    20000;  // rounds in which some warp only polls, until a late operation completes anyway

}  // namespace

uint64_t cluster_count(const Launch& launch) {
  const Dim3 g = launch.grid, c = launch.cluster;
  return uint64_t(g.x / c.x) * (g.y / c.y) * (g.z / c.z);
}

ClusterRun::ClusterRun(Launch& launch, uint64_t index) : launch_(launch) {
  cluster_.launch = &launch;
  cluster_.random.seed(launch.options.seed * 0x9e3779b97f4a7c15ull + index);
  cluster_.class_counts.assign(counter_class_names().size(), 0);
  build(index);
  order_ = warps_;
}

void ClusterRun::build(uint64_t index) {
  const Dim3 grid = launch_.grid, size = launch_.cluster;
  const uint64_t nx = grid.x / size.x, ny = grid.y / size.y;
  const uint64_t cx = index % nx, cy = index / nx % ny, cz = index / (nx * ny);
  const uint32_t count = size.x * size.y * size.z;
  for (uint32_t rank = 0; rank < count; ++rank) {
    auto cta = std::make_unique<Cta>();
    cta->cluster = &cluster_;
    cta->rank = static_cast<int>(rank);
    cta->ctaid[0] = static_cast<uint32_t>(cx * size.x + rank % size.x);
    cta->ctaid[1] = static_cast<uint32_t>(cy * size.y + rank / size.x % size.y);
    cta->ctaid[2] = static_cast<uint32_t>(cz * size.z + rank / (size.x * size.y));
    cta->shared.resize(kSharedBase + launch_.function->static_shared + launch_.dynamic_shared);
    cta->shared.clear(launch_.function->shared_begin,
                      kSharedBase);  // cooperative groups take the reserved part as zero
    build_warps(*cta);
    cluster_.ctas.push_back(std::move(cta));
  }
  for (auto& cta : cluster_.ctas) {
    for (auto& warp : cta->warps) warps_.push_back(warp.get());
  }
  begin_order(cluster_);
  cluster_.global_order = make_cluster_order(launch_, index);
}

void ClusterRun::build_warps(Cta& cta) {
  const Dim3 block = launch_.block;
  const uint32_t threads = block.x * block.y * block.z;
  for (uint32_t first = 0; first < threads; first += kLanes) {
    auto warp = std::make_unique<Warp>();
    warp->cta = &cta;
    warp->id = static_cast<int>(first / kLanes);
    const uint32_t lanes = std::min<uint32_t>(threads - first, kLanes);
    warp->alive = warp->exists = lanes == 32 ? kAll : (1u << lanes) - 1;
    warp->registers_held = launch_.registers;
    warp->groups.reserve(kLanes + 1);  // `current` must stay valid while groups split
    warp->groups.push_back({0, warp->alive});
    warp->registers.assign(size_t(launch_.function->register_words) * kLanes, 0xcdcdcdcd);
    warp->predicates.assign(launch_.function->predicate_count, 0);
    warp->register_in_flight.assign(launch_.function->register_words, 0);
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      const uint32_t thread = first + lane;
      warp->tid[0][lane] = thread % block.x;
      warp->tid[1][lane] = thread / block.x % block.y;
      warp->tid[2][lane] = thread / (block.x * block.y);
    }
    cta.warps.push_back(std::move(warp));
  }
}

bool ClusterRun::run(const std::atomic<bool>& stop) {
  const bool random = launch_.options.seed != 0;
  while (!stop) {
    if (random) std::shuffle(order_.begin(), order_.end(), cluster_.random);
    bool progress = false, left = false;
    for (Warp* warp : order_) {
      if (warp->state == Warp::State::done) continue;
      left = true;
      if (!wake(*warp)) continue;
      progress = true;
      run_warp(*warp, random ? 1 + static_cast<int>(cluster_.random() % (2 * kQuantum)) : kQuantum);
    }
    if (!left) break;
    ++rounds_;
    if (!progress || rounds_ % kLatePatience == 0) {
      if (!cluster_.pending.empty()) {
        complete_one();
      } else if (!progress) {
        stuck("dead-lock");
      }
    }
    if (cluster_.executed - looked_ > kLooks && only_looks()) return false;
  }
  if (!stop) async_finish(cluster_);
  return true;
}

// Instructions of classes that make progress, exits, and copies that have landed.
uint64_t ClusterRun::progress() const {
  uint64_t count = completed_;
  const std::vector<std::string>& names = counter_class_names();
  for (size_t k = 0; k < cluster_.class_counts.size(); ++k) {
    if (cluster_.class_counts[k] != 0 && class_progresses(names[k])) count += cluster_.class_counts[k];
  }
  for (const Warp* warp : warps_) count += std::popcount(warp->exists & ~warp->alive);
  return count;
}

// Since the last time. What no cluster of the launch goes on after is a live-lock.
bool ClusterRun::only_looks() {
  const uint64_t limit = launch_.options.max_instructions, looked = std::exchange(looked_, cluster_.executed);
  if (cluster_.executed / kLiveLockTotal > limit) stuck("live-lock");
  const uint64_t made = progress();
  if (std::exchange(made_, made) != made) {
    launch_.looked = 0;
    return false;
  }
  const uint64_t clusters = std::min<uint64_t>(launch_.begun - launch_.ended, kLiveLockClusters);
  if ((launch_.looked += cluster_.executed - looked) > limit * clusters) stuck("live-lock");
  return true;
}

// Late operations complete one at a time, oldest first with seed 0, else any.
void ClusterRun::complete_one() {
  const size_t index = launch_.options.seed == 0 ? 0 : cluster_.random() % cluster_.pending.size();
  const Pending next = std::move(cluster_.pending[index]);
  cluster_.pending.erase(cluster_.pending.begin() + static_cast<std::ptrdiff_t>(index));
  next.complete();
  ++completed_;
}

// Wakes the groups whose condition holds; true if one can run.
bool ClusterRun::wake(Warp& warp) {
  bool ready = false;
  for (Group& group : warp.groups) {
    if (group.can_resume && group.can_resume()) {
      group.can_resume = nullptr;
      group.waiting_for.clear();
      group.converging = false;
    }
    ready |= !group.can_resume;
  }
  warp.state = ready ? Warp::State::ready : Warp::State::waiting;
  return ready;
}

// The lowest pc that can run; after long patience any, because the lowest may spin on what another must do.
Group* ClusterRun::choose(Warp& warp) {
  if (warp.groups.size() == 1) return warp.groups[0].can_resume ? nullptr : &warp.groups[0];
  if (++warp.since_merge > kGroupPatience) {
    const size_t turn = warp.since_merge / kGroupPatience % warp.groups.size();
    if (!warp.groups[turn].can_resume) return &warp.groups[turn];
  }
  Group* lowest = nullptr;
  for (Group& group : warp.groups) {
    if (!group.can_resume && (lowest == nullptr || group.pc < lowest->pc)) lowest = &group;
  }
  return lowest;
}

void ClusterRun::run_warp(Warp& warp, int quantum) {
  for (int n = 0; n < quantum; ++n) {
    Group* group = choose(warp);
    if (group == nullptr) {
      wake(warp);
      return;
    }
    step(warp, *group);
    if (warp.groups.size() != 1 || warp.alive == 0) {
      std::erase_if(warp.groups, [](const Group& g) { return g.mask == 0; });
      if (warp.groups.empty()) {
        warp.state = Warp::State::done;
        warp_ended(warp);
        return;
      }
      merge_groups(warp);
    }
  }
}

// Groups at the same pc become one, unless one of them is inside a barrier already.
void ClusterRun::merge_groups(Warp& warp) {
  std::vector<Group>& groups = warp.groups;
  for (size_t a = 0; a < groups.size(); ++a) {
    for (size_t b = a + 1; b < groups.size(); ++b) {
      const bool apart = groups[a].ticket != 0 || groups[b].ticket != 0;
      auto waits_alone = [](const Group& g) { return g.can_resume && !g.converging; };
      if (groups[a].pc != groups[b].pc || apart || waits_alone(groups[a]) || waits_alone(groups[b])) continue;
      groups[a] = {groups[a].pc, groups[a].mask | groups[b].mask};
      groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(b));
      warp.since_merge = 0;
      --b;
    }
  }
}

void ClusterRun::step(Warp& warp, Group& group) {
  const Instruction& i = launch_.function->code[group.pc];
  uint32_t mask = group.mask;
  if (i.guard >= 0) mask &= warp.predicates[i.guard] ^ (i.guard_negated ? kAll : 0);
  if (mask == 0) {
    ++group.pc;
    ++cluster_.executed;
    ++cluster_.class_counts[i.counter_class];
    return;
  }
  warp.current = &group;
  bool done = false;
  if (!i.aligned || converged(warp, i, warp.alive, group.mask)) {
    if (i.aligned && mask != group.mask)
      fault("divergent aligned instruction", warp, i, "its guard holds for lanes " + hex(mask) + " only");
    const uint32_t pc = group.pc++;
    done = (i.wgmma_registers && check_registers(warp, i, mask)) || i.execute(warp, i, mask);
    if (!done) group.pc = pc;
  }
  if (done) {
    group.ticket = 0;
    ++cluster_.executed;
    ++cluster_.class_counts[i.counter_class];
  } else {
    group.can_resume = std::move(warp.can_resume);
    group.waiting_for = std::move(warp.waiting_for);
    warp.can_resume = nullptr;
    warp.waiting_for.clear();
    warp.state = Warp::State::ready;
  }
}

std::string ClusterRun::clusters_left() const {
  const uint64_t clusters = cluster_count(launch_), left = clusters - launch_.begun;
  if (left == 0) return "";
  return ".\nClusters that have not begun, because the device holds " + std::to_string(launch_.most_resident) +
         " at once: " + std::to_string(left) + " of " + std::to_string(clusters);
}

void ClusterRun::stuck(const char* kind) {
  const bool live = std::strcmp(kind, "live-lock") == 0;
  for (Warp* warp : warps_) {
    if (live) break;  // the others may still come
    for (const Group& group : warp->groups) {
      const Instruction& i = launch_.function->code[group.pc];
      const bool whole = group.mask == warp->alive;
      // Lanes that wait for others than their warp's are not to blame: what those wait for is.
      const bool apart =
          std::all_of(warp->groups.begin(), warp->groups.end(), [](const Group& g) { return g.converging; });
      if (warp->state != Warp::State::done && group.converging && i.aligned && !whole && apart) {
        throw fault_in("divergent aligned instruction",
                       where(*warp, i) + ": lanes " + hex(group.mask) + " of " + hex(warp->alive) +
                           " are here and the others never come\n" + report(),
                       *launch_.function, &i);
      }
    }
  }
  std::string text = "kernel " + launch_.function->title;
  if (live)
    text += ": " + std::to_string(launch_.looked) + " instructions without one that stores, copies, " +
            "multiplies, arrives or passes a barrier, " + std::to_string(cluster_.executed) +
            " in all. If it is at work all the same, raise max_instructions (simulate, or hoppersim run "
            "--max-instructions) above " +
            std::to_string(launch_.options.max_instructions) + ")";
  if (live) text += clusters_left();
  text += "\n" + report();
  check_register_pool(cluster_, text);
  async_check_deadlock(cluster_, text);
  throw fault_in(kind, text, *launch_.function, first_position());
}

// Of the first warp that waits for an mbarrier, else of the first that has not exited.
const Instruction* ClusterRun::first_position() const {
  const Instruction* first = nullptr;
  for (const Warp* warp : warps_) {
    for (const Group& group : warp->groups) {
      const Instruction& i = launch_.function->code[group.pc];
      if (i.opcode == "mbarrier") return &i;
      if (first == nullptr) first = &i;
    }
  }
  return first;
}

std::string ClusterRun::report() const {
  std::string text;
  for (const auto& cta : cluster_.ctas) {
    const std::string name = name_of(*cta);
    for (const auto& warp : cta->warps) {
      if (warp->state == Warp::State::done) text += name + ", warp " + std::to_string(warp->id) + ": exited\n";
      for (const Group& group : warp->groups) {
        const Instruction& i = launch_.function->code[group.pc];
        text += name + ", warp " + std::to_string(warp->id) + ", lanes " + hex(group.mask) + " at " +
                position(*launch_.function, i);
        text += group.can_resume ? "; waits for " + group.waiting_for + "\n" : "; can run\n";
      }
    }
    for (int id = 0; id < 16; ++id) {
      const Cta::NamedBarrier& b = cta->named[id];
      if (b.arrived == 0) continue;
      text += name + ", barrier " + std::to_string(id) + ": " + std::to_string(b.arrived) + " threads arrived of " +
              (b.expected ? std::to_string(b.expected) : "all") + "\n";
    }
    std::map<uint32_t, const Mbarrier*> mbarriers;
    for (const auto& [offset, m] : cta->mbarriers) mbarriers[offset] = &m;
    for (const auto& [offset, m] : mbarriers) {
      text += name + ", mbarrier " + hex(offset) + ": phase " + std::to_string(m->phase) + ", " +
              std::to_string(m->pending) + " of " + std::to_string(m->expected) + " arrivals missing, " +
              std::to_string(m->tx) + " bytes missing\n";
    }
  }
  const Cta::NamedBarrier& b = cluster_.barrier;
  if (b.arrived != 0) text += "barrier.cluster: " + std::to_string(b.arrived) + " threads arrived\n";
  for (const Pending& p : cluster_.pending) text += "pending: " + p.what + "\n";
  return text;
}

void ClusterRun::add_counters(Counters& into) {
  const std::vector<std::string>& names = counter_class_names();
  for (size_t k = 0; k < cluster_.class_counts.size(); ++k) {
    if (cluster_.class_counts[k] != 0) cluster_.counters.instructions[names[k]] += cluster_.class_counts[k];
  }
  cluster_.counters.warp_instructions = cluster_.executed;
  into.add(cluster_.counters);
}

int Warp::clock_index() const { return cta->rank * static_cast<int>(cta->warps.size()) + id; }

void Counters::add(const Counters& o) {
  for (const auto& [name, count] : o.instructions) instructions[name] += count;
  warp_instructions += o.warp_instructions;
  tensor_flop += o.tensor_flop;
  global_read_bytes += o.global_read_bytes;
  global_write_bytes += o.global_write_bytes;
  global_read_sectors += o.global_read_sectors;
  global_write_sectors += o.global_write_sectors;
  bulk_read_bytes += o.bulk_read_bytes;
  bulk_write_bytes += o.bulk_write_bytes;
  shared_accesses += o.shared_accesses;
  shared_wavefronts += o.shared_wavefronts;
  shared_ideal_wavefronts += o.shared_ideal_wavefronts;
  wgmma_wavefronts += o.wgmma_wavefronts;
  barrier_waits += o.barrier_waits;
}

std::vector<std::pair<const char*, uint64_t>> Counters::numbers() const {
  return {{"warp_instructions", warp_instructions},
          {"tensor_flop", tensor_flop},
          {"global_read_bytes", global_read_bytes},
          {"global_write_bytes", global_write_bytes},
          {"global_read_sectors", global_read_sectors},
          {"global_write_sectors", global_write_sectors},
          {"bulk_read_bytes", bulk_read_bytes},
          {"bulk_write_bytes", bulk_write_bytes},
          {"shared_accesses", shared_accesses},
          {"shared_wavefronts", shared_wavefronts},
          {"shared_ideal_wavefronts", shared_ideal_wavefronts},
          {"wgmma_wavefronts", wgmma_wavefronts},
          {"barrier_waits", barrier_waits}};
}

bool converged(Warp& warp, const Instruction& i, uint32_t members, uint32_t mask) {
  const uint32_t missing = members & warp.alive & ~mask;
  if (missing == 0) return true;
  warp.current->converging = true;
  warp.waiting_for = "lanes " + hex(missing) + " of its warp at " + i.opcode;
  const uint32_t alive = warp.alive;
  warp.can_resume = [&warp, &i, members, mask, alive] {
    if (i.aligned && warp.alive != alive) {
      fault("divergent aligned instruction", warp, i,
            "lanes " + hex(mask) + " wait here and lanes " + hex(alive & ~warp.alive) + " have exited without coming");
    }
    return (members & warp.alive & ~mask) == 0;
  };
  return false;
}

}  // namespace hoppersim
