// Runs a launch: its clusters on host threads. A cluster that has only looked for a while makes room for the next, as
// far as the device could hold them at once: grid-wide barriers and flags between CTAs work.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "interpreter.h"
#include "races_global.h"
#include "tensor_map_proxy.h"

namespace hoppersim {

namespace {

void check_launch(const Launch& launch) {
  const Dim3 g = launch.grid, c = launch.cluster;
  if (launch.function == nullptr) throw Fault("launch", "no function");
  if (const auto& problem = launch.function->problem) {
    const std::string text = std::string(problem->what()).substr(problem->report.kind.size() + 2);
    throw fault_in(problem->report.kind.c_str(), "kernel " + launch.function->title + ", " + text, *launch.function,
                   nullptr);
  }
  if (g.x == 0 || g.y == 0 || g.z == 0 || c.x == 0 || c.y == 0 || c.z == 0 || g.x % c.x || g.y % c.y || g.z % c.z) {
    throw Fault("launch", "grid is no multiple of the cluster");
  }
  const uint64_t threads = uint64_t(launch.block.x) * launch.block.y * launch.block.z;
  if (threads == 0 || threads > 1024) throw Fault("launch", std::to_string(threads) + " threads per CTA");
  if (launch.parameters.size() < launch.function->parameter_bytes) throw Fault("launch", "parameters are too short");
  if (launch.function->static_shared + launch.dynamic_shared > kSharedLimit)
    throw Fault("launch", "too much shared memory");
}

// A launch frees the memory of its CTAs, and the next one asks for as much: malloc is to keep it.
void keep_freed_memory() {
#ifdef __GLIBC__
  static const bool once = mallopt(M_MMAP_THRESHOLD, 64 << 20) && mallopt(M_TRIM_THRESHOLD, 512 << 20);
  static_cast<void>(once);
#endif
}

// Of a cooperative launch: what its kernels keep the barrier of the grid in.
class GridWorkspace {
 public:
  explicit GridWorkspace(Launch& launch) {
    if (!launch.cooperative) return;
    bytes_.resize(256);
    global_ranges().add(bytes_.data(), bytes_.size());
    launch.grid_workspace = reinterpret_cast<uint64_t>(bytes_.data());
  }
  GridWorkspace(const GridWorkspace&) = delete;
  ~GridWorkspace() {
    if (!bytes_.empty()) global_ranges().remove(bytes_.data());
  }

 private:
  std::vector<uint8_t> bytes_;
};

// The clusters of a launch on its way.
class Clusters {
 public:
  explicit Clusters(Launch& launch) : launch_(launch), order_(cluster_count(launch)) {
    for (size_t k = 0; k < order_.size(); ++k) order_[k] = k;
    if (launch.options.seed == 0) return;
    std::mt19937_64 random(launch.options.seed);
    std::shuffle(order_.begin(), order_.end(), random);
  }

  void run() {
    const size_t threads = std::min<size_t>(std::max(1, launch_.options.host_threads), order_.size());
    std::vector<std::thread> others;
    for (size_t t = 1; t < threads; ++t) others.emplace_back([&] { work(); });
    work();
    for (std::thread& t : others) t.join();
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  // Of one host thread, which takes turns with the clusters that it has begun.
  void work() {
    try {
      std::deque<std::unique_ptr<ClusterRun>> held;
      while (!stop_) {
        if (auto next = begin()) held.push_front(std::move(next));
        if (held.empty()) return;
        auto cluster = std::move(held.front());
        held.pop_front();
        if (!cluster->run(stop_)) {
          held.push_back(std::move(cluster));
          continue;
        }
        std::lock_guard lock(mutex_);
        cluster->add_counters(launch_.counters);
        ++launch_.ended;
      }
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
      stop_ = true;
    }
  }

  // Null: all have begun, or the device is full.
  std::unique_ptr<ClusterRun> begin() {
    uint64_t index;
    {
      std::lock_guard lock(mutex_);
      if (launch_.begun == order_.size() || launch_.begun - launch_.ended >= launch_.most_resident) return nullptr;
      index = order_[launch_.begun++];
    }
    return std::make_unique<ClusterRun>(launch_, index);
  }

  Launch& launch_;
  std::vector<uint64_t> order_;
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::exception_ptr failure_;
};

}  // namespace

void run(Launch& launch) {
  check_launch(launch);
  keep_freed_memory();
  std::vector<uint8_t> storage(launch.parameters.size() + 128);
  launch.parameter_base = storage.data() + (128 - reinterpret_cast<uint64_t>(storage.data()) % 128);
  std::memcpy(launch.parameter_base, launch.parameters.data(), launch.parameters.size());
  launch.maps = make_map_proxy();
  launch.global_order = make_global_order(launch);
  const GridWorkspace workspace(launch);
  Clusters(launch).run();
}

}  // namespace hoppersim
