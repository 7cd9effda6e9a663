// mbarrier.*
#include <algorithm>
#include <bit>
#include <cstdio>

#include "races.h"
#include "races_granule.h"

namespace hoppersim {
namespace {

constexpr uint32_t kMaxCount = (1u << 20) - 1;
constexpr uint32_t kPatientPolls = 32;  // unsuccessful test_waits in a row before the warp is put to sleep
constexpr uint32_t kTimeOuts = 8;       // tries that time out before one waits

// A phase may end only after every wait for the one before it: a waiter that is slower than in this run would take the
// parity that it then finds for that of the phase to come.
void check_overrun(const Issue& issue, const Cta& cta, uint32_t offset, const Mbarrier& barrier) {
  auto came_before = [](const Clock& clock, const Stamp& wait) {
    return wait.agent < clock.size() && wait.step <= std::max(clock[wait.agent].all, clock[wait.agent].some);
  };
  for (const Stamp& wait : barrier.waits) {
    if (came_before(barrier.clock, wait) || came_before(barrier.weak, wait)) continue;
    report("mbarrier phase overrun", issue,
           "phase " + std::to_string(barrier.phase) + " of the mbarrier at shared offset " + hex(offset) + " of cta " +
               std::to_string(cta.rank) + " ends, and none of its arrivals comes after the wait for the " +
               "phase before it by " + name_of(*cta.cluster, wait, 1) +
               ": a slower warp would miss that phase, and wait for the next but one");
  }
}

// A phase may end without an expect_tx that none of its arrivals comes after, unless bytes are missing that only copies
// behind that expect_tx bring.
void check_late(const Cta& cta, uint32_t offset, const Mbarrier& barrier) {
  for (const LateExpect& late : barrier.late) {
    if (late.others < barrier.in_time) continue;
    report("expect_tx too late", {late.warp, late.instruction, late.lane},
           "phase " + std::to_string(barrier.phase) + " of the mbarrier at shared offset " + hex(offset) + " of cta " +
               std::to_string(cta.rank) + " ends, and none of its arrivals comes after this expect_tx: " +
               "on a slower warp the phase ends without its " + std::to_string(late.bytes) + " bytes");
  }
}

// A phase ends with its last arrival and its last byte.
void settle(const Issue& issue, Cta& cta, uint32_t offset, Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.tx > 0) return;
  if (barrier.tx < 0) fault("expect_tx too small", issue, describe(cta, offset, barrier));
  ClusterCopies& copies = copies_of(*cta.cluster);
  for (const auto& load : copies.loads)
    if (load->cta == &cta && load->barrier == offset && !load->landed)
      fault("expect_tx too small", issue,
            "the phase ends while a copy of it is in flight: " +
                where(*load->issue.warp, *load->issue.instruction, load->issue.lane));
  check_overrun(issue, cta, offset, barrier);
  barrier.waits.clear();
  check_late(cta, offset, barrier);
  barrier.late.clear();
  barrier.in_time = barrier.copied = 0;
  ++barrier.phase;
  barrier.pending = static_cast<int32_t>(barrier.expected);
  barrier.preceding_clock = barrier.completed_clock;
  merge(barrier.completed_clock, barrier.clock);
  barrier.clock.clear();
  merge(barrier.completed_weak, barrier.weak);
  barrier.weak.clear();
  if (barrier.agent >= 0) {
    const auto agent = static_cast<size_t>(barrier.agent);
    if (barrier.completed_clock.size() <= agent) barrier.completed_clock.resize(agent + 1);
    barrier.completed_clock[agent].all = barrier.first_step + barrier.phase;
  }
  ++copies.completed_phases;
}

bool comes_after(const Issue& issue, const LateExpect& late) {
  return knows(*issue.warp, issue.lane, late.event, 1, false) || knows(issue.warp->weak, late.event, 1, false);
}

uint64_t state_of(const Mbarrier& barrier) {
  return static_cast<uint64_t>(barrier.phase) << 32 | static_cast<uint32_t>(barrier.pending);
}

template <class Body>
void each_lane(Warp& warp, const Instruction& i, uint32_t mask, Body body) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) body(Issue{&warp, &i, lane});
}

// mbarrier.init and inval write the bytes of the mbarrier, for other accesses to them. What is there then is nobody's.
void write_object(const Issue& issue, Cta& cta, uint32_t offset, uint8_t flags) {
  const uint64_t opaque = 0;
  for (int b = 0; b < 8; ++b) cta.shared.flags[offset + b] &= ~SharedMemory::mbarrier;
  write_memory(*issue.warp, *issue.instruction, Space::shared, cta.rank * uint64_t{kRankStride} + offset, 8, &opaque,
               issue.lane);
  note_write(*issue.warp, *issue.instruction, {&cta, offset, 8, 1u << issue.lane, 0}, nullptr);
  std::fill_n(&cta.shared.flags[offset], 8, flags);
}

bool init(Warp& warp, const Instruction& i, uint32_t mask) {
  each_lane(warp, i, mask, [&](const Issue& issue) {
    const SharedPlace place = place_of(warp, i, i.operands[0], 8, true, issue.lane);
    const uint64_t count = operand_value(warp, i.operands[1], issue.lane) & 0xffffffffu;
    if (place.offset % 8) fault("misaligned shared", issue, "an mbarrier has 8 bytes alignment");
    if (count == 0 || count > kMaxCount)
      fault("mbarrier misuse", issue, "arrival count " + std::to_string(count) + " is not in 1 … 2^20 - 1");
    if (warp.cta->mbarriers.count(place.offset))
      fault("mbarrier misuse", issue, "initialised again without mbarrier.inval");
    Mbarrier& barrier = warp.cta->mbarriers[place.offset];
    barrier.expected = static_cast<uint32_t>(count);
    barrier.pending = static_cast<int32_t>(count);
    barrier.initialised = event_of(warp, 1u << issue.lane);
    write_object(issue, *place.cta, place.offset, SharedMemory::mbarrier);
  });
  return true;
}

bool invalidate(Warp& warp, const Instruction& i, uint32_t mask) {
  each_lane(warp, i, mask, [&](const Issue& issue) {
    const SharedPlace place = place_of(warp, i, i.operands[0], 8, true, issue.lane);
    const Mbarrier& barrier = barrier_at(issue, *place.cta, place.offset);
    check_initialised(issue, *place.cta, place.offset, false);
    if (barrier.agent >= 0) place.cta->barrier_agents[place.offset].second = barrier.first_step + barrier.phase + 1;
    for (const auto& load : copies_of(*warp.cta->cluster).loads)
      if (load->cta == place.cta && load->barrier == place.offset)
        fault("mbarrier misuse", issue, "invalidated before its copies were waited for");
    place.cta->mbarriers.erase(place.offset);
    write_object(issue, *place.cta, place.offset, 0);
  });
  return true;
}

// The lanes of an arrival that this phase counts: if it ends before the last of them, the others are of the next.
uint32_t counted(const Mbarrier& barrier, uint32_t mask, int lane, uint32_t count) {
  uint32_t left = mask & ~0u << lane;
  uint32_t room = static_cast<uint32_t>(barrier.pending) / count;
  if (room >= static_cast<uint32_t>(std::popcount(left))) return mask;
  uint32_t lanes = 0;
  for (; room; --room, left &= left - 1) lanes |= left & -left;
  return lanes;
}

enum : uint32_t { kArrive, kDrop };
enum : uint32_t { kExpect = 1, kNoComplete = 2, kRelaxed = 4, kLocal = 8, kCount = 16 };

bool arrive_on(Warp& warp, const Instruction& i, uint32_t mask) {
  const uint32_t flags = i.data[1];
  const Mbarrier* last = nullptr;  // that all lanes of the instruction have released to, in this phase
  uint32_t last_phase = 0;
  each_lane(warp, i, mask, [&](const Issue& issue) {
    const SharedPlace place = place_of(warp, i, i.operands[1], 8, flags & kLocal, issue.lane);
    Mbarrier& barrier = barrier_at(issue, *place.cta, place.offset);
    check_initialised(issue, *place.cta, place.offset, false);
    set_register(warp, i.operands[0], issue.lane, state_of(barrier));
    uint32_t count = 1;
    if (flags & kExpect) {
      const auto bytes = static_cast<uint32_t>(operand_value(warp, i.operands[2], issue.lane));
      expect_bytes(issue, *place.cta, place.offset, bytes);
      barrier.in_time += bytes;
    } else if (flags & kCount) {
      count = static_cast<uint32_t>(operand_value(warp, i.operands[2], issue.lane));
    }
    if (count == 0 || count > kMaxCount) fault("mbarrier misuse", issue, "arrival count " + std::to_string(count));
    if (i.data[0] == kDrop) {
      if (barrier.expected < count) fault("mbarrier misuse", issue, "arrive_drop of more than the expected arrivals");
      barrier.expected -= count;
    }
    const uint32_t phase = barrier.phase;
    if (&barrier != last || phase != last_phase) {
      release(flags & kRelaxed ? barrier.weak : barrier.clock, warp, counted(barrier, mask, issue.lane, count));
      if (flags & kRelaxed) merge(barrier.clock, warp.fenced);
      merge(barrier.weak, warp.weak);
      last = &barrier;
      last_phase = phase;
    }
    arrive(issue, *place.cta, place.offset, count);
    if (flags & kNoComplete && barrier.phase != phase)
      fault("mbarrier misuse", issue, "this .noComplete arrival completes the phase");
  });
  ++warp.step;
  return true;
}

bool change_bytes(Warp& warp, const Instruction& i, uint32_t mask) {
  each_lane(warp, i, mask, [&](const Issue& issue) {
    const SharedPlace place = place_of(warp, i, i.operands[0], 8, i.data[1] & kLocal, issue.lane);
    const auto bytes = static_cast<uint32_t>(operand_value(warp, i.operands[1], issue.lane));
    release(barrier_at(issue, *place.cta, place.offset).weak, warp, 1u << issue.lane);  // the phase ends after it
    check_initialised(issue, *place.cta, place.offset, false);
    Mbarrier& barrier = barrier_at(issue, *place.cta, place.offset);
    if (i.data[0]) {
      count_copied(issue, barrier, bytes);
      complete_bytes(issue, *place.cta, place.offset, bytes);
    } else {
      barrier.late.push_back({&warp, &i, issue.lane, event_of(warp, 1u << issue.lane), bytes, barrier.copied});
      expect_bytes(issue, *place.cta, place.offset, bytes);
    }
  });
  ++warp.step;
  return true;
}

bool pending_count(Warp& warp, const Instruction& i, uint32_t mask) {
  each_lane(warp, i, mask, [&](const Issue& issue) {
    set_register(warp, i.operands[0], issue.lane, operand_value(warp, i.operands[1], issue.lane) & 0xffffffffu);
  });
  return true;
}

// ---- Waits: one question per lane
struct Question {
  Cta* cta;
  uint32_t offset;
  bool parity;
  uint32_t phase;  // parity or the phase of the state token
  uint32_t lanes;  // that ask
  bool done() const {
    const auto found = cta->mbarriers.find(offset);
    return found == cta->mbarriers.end() ||
           (parity ? (found->second.phase & 1) != phase : found->second.phase != phase);
  }
};

Question question(Warp& warp, const Instruction& i, int lane) {
  const Issue issue{&warp, &i, lane};
  const SharedPlace place = place_of(warp, i, i.operands[1], 8, true, lane);
  const Mbarrier& barrier = barrier_at(issue, *place.cta, place.offset);
  check_initialised(issue, *place.cta, place.offset, false);
  const uint64_t value = operand_value(warp, i.operands[2], lane);
  const bool parity = i.data[1];
  if (parity && (value & 0xffffffffu) > 1)
    fault("mbarrier misuse", issue, "phase parity " + std::to_string(value & 0xffffffffu) + " is not 0 or 1");
  const auto phase = static_cast<uint32_t>(parity ? value : value >> 32);
  if (!parity && phase != barrier.phase && phase + 1 != barrier.phase)
    fault("mbarrier misuse", issue, "the state is older than the preceding phase");
  return {place.cta, place.offset, parity, phase, 1u << lane};
}

// Puts the warp to sleep until one of its questions is answered. test_wait and try_wait may both take any time; a warp
// that asks several barriers in turn must come back when any phase of the cluster has ended.
void sleep(Warp& warp, const Instruction& i, std::vector<Question> questions) {
  const Question& first = questions.front();
  char place[64];
  std::snprintf(place, sizeof place, "mbarrier at shared offset 0x%x of ", first.offset);
  warp.waiting_for =
      place + name_of(*first.cta) + (first.parity ? ", parity " : ", phase ") + std::to_string(first.phase);
  warp.state = Warp::State::waiting;
  const bool blocking = i.data[0];
  const uint64_t completed = copies_of(*warp.cta->cluster).completed_phases;
  warp.can_resume = [&warp, questions = std::move(questions), blocking, completed] {
    if (!blocking && copies_of(*warp.cta->cluster).completed_phases != completed) return true;
    return std::any_of(questions.begin(), questions.end(), [](const Question& q) { return q.done(); });
  };
}

// Whether a lane of the warp knows what came before the end of a phase. Who does not may ask before that.
bool knows_end(const Warp& warp, const Clock& end) {
  for (size_t agent = 0; agent < end.size(); ++agent) {
    const uint32_t step = std::max(end[agent].all, end[agent].some);
    const bool in_time = agent < warp.weak.size() && step <= std::max(warp.weak[agent].all, warp.weak[agent].some);
    if (step && !in_time && !knows_step(warp, agent, step)) return false;
  }
  return true;
}

// The lanes that are told false whatever has happened in this schedule: the first wait of a warp at a pc whose phase
// may not have ended yet times out, as do the tries that follow for the same phase.
uint32_t timed_out(Warp& warp, const Instruction& i, const std::vector<Question>& questions) {
  auto& time_outs = copies_of(warp).time_outs;
  const auto found = time_outs.find(i.pc);
  if (found != time_outs.end() && found->second.count == kTimeOuts) return 0;
  uint32_t lanes = 0;
  for (const Question& q : questions)
    if (!q.done() || !knows_end(warp, q.cta->mbarriers.at(q.offset).completed_clock)) lanes |= q.lanes;
  const Question& first = questions.front();
  if (found == time_outs.end()) {
    if (lanes) time_outs[i.pc] = {first.offset, first.phase, 1};
  } else if (lanes && found->second.offset == first.offset && found->second.phase == first.phase) {
    ++found->second.count;
  } else {
    found->second.count = kTimeOuts;
    return 0;
  }
  return lanes;
}

// Who waits by parity for a phase must know that the one before has ended.
void check_skipped(Warp& warp, const Instruction& i, const Question& q) {
  const Mbarrier& barrier = q.cta->mbarriers.at(q.offset);
  const uint32_t phase = q.done() ? barrier.phase - 1 : barrier.phase;
  if (!q.parity || barrier.phase == 0 || phase == 0 || barrier.relaxed_waits) return;
  if (knows_end(warp, q.done() ? barrier.preceding_clock : barrier.completed_clock)) return;
  report("mbarrier phase skipped", {&warp, &i, std::countr_zero(q.lanes)},
         "waits for parity " + std::to_string(q.phase) + ", now phase " + std::to_string(phase) +
             " of the mbarrier at shared offset " + std::to_string(q.offset) + ", and nothing orders that after the " +
             "end of phase " + std::to_string(phase - 1) + ": a faster warp would be told that the phase before that " +
             "is complete");
}

bool wait(Warp& warp, const Instruction& i, uint32_t mask) {
  std::vector<Question> questions;
  uint32_t done = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Question q = question(warp, i, lane);
    if (q.done()) done |= 1u << lane;
    const auto same = std::find_if(questions.begin(), questions.end(),
                                   [&](const Question& o) { return o.offset == q.offset && o.phase == q.phase; });
    if (same == questions.end()) {
      questions.push_back(q);
    } else {
      same->lanes |= q.lanes;
    }
  }
  for (const Question& q : questions) check_skipped(warp, i, q);
  const uint32_t late = timed_out(warp, i, questions);
  done &= ~late;
  for (const Question& q : questions) {
    if (!(q.lanes & done)) continue;
    Mbarrier& barrier = q.cta->mbarriers.at(q.offset);
    Stamp event = event_of(warp, q.lanes);
    event.pc = i.pc;
    std::erase_if(barrier.waits, [&](const Stamp& other) { return other.agent == event.agent; });
    barrier.waits.push_back(event);
    if (i.has("relaxed")) {
      barrier.relaxed_waits = true;
      merge(warp.relaxed, barrier.completed_clock);
      merge(warp.weak, barrier.completed_clock);
    } else {
      acquire(warp, barrier.completed_clock, q.lanes);
    }
    merge(warp.weak, barrier.completed_weak);
    observe(*q.cta, q.offset);
  }
  WarpCopies& copies = copies_of(warp);
  const bool blocking = i.data[0];
  if (!done && !late && mask) {
    ++warp.cta->cluster->counters.barrier_waits;
    if (blocking || copies.failed_polls >= kPatientPolls) {
      copies.failed_polls = 0;
      sleep(warp, i, std::move(questions));
      return false;
    }
    ++copies.failed_polls;
  } else if (done) {
    copies.failed_polls = 0;
  }
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) set_register(warp, i.operands[0], lane, done >> lane & 1);
  return true;
}

}  // namespace

std::string describe(const Cta& cta, uint32_t offset, const Mbarrier& barrier) {
  char text[280];
  std::snprintf(
      text, sizeof text,
      "mbarrier at shared offset 0x%x of %s: phase %u (parity %u), %d of %u arrivals missing, %lld bytes missing",
      offset, name_of(cta).c_str(), barrier.phase, barrier.phase & 1, barrier.pending, barrier.expected,
      static_cast<long long>(barrier.tx));
  return text;
}

Mbarrier& barrier_at(const Issue& issue, Cta& cta, uint32_t offset) {
  const auto found = cta.mbarriers.find(offset);
  if (found == cta.mbarriers.end())
    fault("uninitialised mbarrier", issue, "no mbarrier at shared offset " + hex(offset) + " of " + name_of(cta));
  return found->second;
}

void check_initialised(const Issue& issue, Cta& cta, uint32_t offset, bool async) {
  const Mbarrier& barrier = barrier_at(issue, cta, offset);
  const Warp& warp = *issue.warp;
  const Stamp& initialised = barrier.initialised;
  const bool known = knows(warp, issue.lane, initialised, 1, true);
  auto came_before = [&](const Stamp& event) {
    return event.step && (knows(warp, issue.lane, event, 1, true) || knows(warp.weak, event, 1, true));
  };
  const bool ordered = known || (barrier.fenced.step && knows(warp.weak, barrier.fenced, 1, true));
  auto fenced = [&] {
    Clock clock = view_of(warp, issue.lane);
    merge(clock, warp.weak);
    return find_fence(cta.fences, initialised, 1, clock, warp.clock_index(), 1u << issue.lane) != nullptr;
  };
  const bool visible = !async || came_before(barrier.async_fenced) || fenced();
  if (ordered && visible) return;
  const std::string what = (async ? "completes on" : "uses") + std::string(" the mbarrier at shared offset ") +
                           hex(offset) + " of cta " + std::to_string(cta.rank) + ", which warp " +
                           std::to_string(initialised.agent) + " of the cluster initialised, and no ";
  if (ordered) {
    report("mbarrier not fenced for the async proxy", issue,
           what + "fence.mbarrier_init or fence.proxy.async by a warp that knows of that came since");
  } else if (came_before(initialised)) {
    report("missing mbarrier_init fence", issue,
           what + "fence.mbarrier_init came between that and the relaxed barrier that orders the two");
  } else if (&cta != warp.cta) {
    report("missing mbarrier_init fence", issue, what + "fence.mbarrier_init and barrier.cluster order the two");
  } else if (initialised.agent == warp.clock_index()) {
    report("unsynchronised shared memory", issue, what + "__syncwarp (bar.warp.sync) orders the two");
  } else {
    report("unsynchronised shared memory", issue, what + "barrier orders the two");
  }
}

void arrive(const Issue& issue, Cta& cta, uint32_t offset, uint32_t count) {
  Mbarrier& barrier = barrier_at(issue, cta, offset);
  if (static_cast<int64_t>(count) > barrier.pending) fault("too many arrivals", issue, describe(cta, offset, barrier));
  std::erase_if(barrier.late, [&](const LateExpect& late) {
    if (!comes_after(issue, late)) return false;
    barrier.in_time += late.bytes;
    return true;
  });
  barrier.pending -= static_cast<int32_t>(count);
  settle(issue, cta, offset, barrier);
}

void count_copied(const Issue& issue, Mbarrier& barrier, int64_t bytes) {
  barrier.copied += bytes;
  for (LateExpect& late : barrier.late)
    if (!comes_after(issue, late)) late.others += bytes;
}

void expect_bytes(const Issue& issue, Cta& cta, uint32_t offset, int64_t bytes) {
  Mbarrier& barrier = barrier_at(issue, cta, offset);
  barrier.tx += bytes;
  barrier.expected_by = issue.instruction;
  if (barrier.tx > kMaxCount) fault("transaction count out of range", issue, describe(cta, offset, barrier));
}

void complete_bytes(const Issue& issue, Cta& cta, uint32_t offset, int64_t bytes) {
  Mbarrier& barrier = barrier_at(issue, cta, offset);
  barrier.tx -= bytes;
  if (barrier.tx < -static_cast<int64_t>(kMaxCount))
    fault("transaction count out of range", issue, describe(cta, offset, barrier));
  settle(issue, cta, offset, barrier);
}

bool bind_mbarrier(Instruction& i) {
  if (i.opcode != "mbarrier" || i.modifiers.empty()) return false;
  const std::string& what = i.modifiers[0];
  const size_t operands = i.operands.size();
  i.data[1] = has_any(i, {"shared::cluster"}) ? 0u : +kLocal;
  if (what == "init" && operands == 2 && only(i, {"init", "shared", "shared::cta", "b64"})) {
    i.execute = init;
  } else if (what == "inval" && operands == 1 && only(i, {"inval", "shared", "shared::cta", "b64"})) {
    i.execute = invalidate;
  } else if ((what == "arrive" || what == "arrive_drop") && operands >= 2 && operands <= 3 &&
             only(i, {"arrive", "arrive_drop", "expect_tx", "noComplete", "release", "relaxed", "cta", "cluster",
                      "shared", "shared::cta", "shared::cluster", "b64"})) {
    if (i.has("expect_tx") && operands != 3) return false;
    i.data[0] = what == "arrive" ? kArrive : kDrop;
    i.data[1] |= (i.has("expect_tx") ? +kExpect : 0u) | (i.has("noComplete") ? +kNoComplete : 0u) |
                 (i.has("relaxed") ? +kRelaxed : 0u) | (operands == 3 ? +kCount : 0u);
    if (space_of(i, "shared") == Space::generic) i.data[1] &= ~kLocal;  // a generic address may be remote
    i.execute = arrive_on;
  } else if ((what == "expect_tx" || what == "complete_tx") && operands == 2 &&
             only(i, {"expect_tx", "complete_tx", "relaxed", "cta", "cluster", "shared", "shared::cta",
                      "shared::cluster", "b64"})) {
    i.data[0] = what == "complete_tx";
    if (space_of(i, "shared") == Space::generic) i.data[1] &= ~kLocal;
    i.execute = change_bytes;
  } else if ((what == "test_wait" || what == "try_wait") && (operands == 3 || (operands == 4 && what == "try_wait")) &&
             only(i, {"test_wait", "try_wait", "parity", "acquire", "relaxed", "cta", "cluster", "shared",
                      "shared::cta", "b64"})) {
    i.data[0] = what == "try_wait";
    i.data[1] = i.has("parity");
    i.execute = wait;
  } else if (what == "pending_count" && operands == 2 && only(i, {"pending_count", "b64"})) {
    i.execute = pending_count;
  } else {
    return false;
  }
  return true;
}

}  // namespace hoppersim
