#include "report.h"

#include <algorithm>

#include "ptx.h"

namespace hoppersim {

namespace {

constexpr Severity error = Severity::error, warning = Severity::warning;

// clang-format off
const std::vector<Kind> table = {
    {"read while a copy is in flight", error, true,
     "shared bytes are read, by a thread, a store of the copy engine or a wgmma, that an asynchronous copy writes and nobody has waited for"},
    {"overwritten while a copy is in flight", error, true,
     "a thread or a second copy writes such bytes (copies that reduce may share a destination)"},
    {"overwritten while read", error, true,
     "a thread or a copy writes shared bytes that a wgmma, a bulk store or a copy between CTAs not yet waited for reads (granules of 16 bytes)"},
    {"missing proxy fence", error, true,
     "the copy engine or a wgmma touches shared bytes that a thread wrote, or a bulk or tensor load global bytes that a thread of its cluster wrote during the launch, and no `fence.proxy.async` of that memory by lanes that know of the write came since, or nothing orders it before the issuing lane, as when the arrival comes first and the fence after it"},
    {"unsynchronised shared memory", error, true,
     "the same of shared bytes, and nothing orders the write before the issuing lane; or an mbarrier is used and nothing orders its initialisation before that"},
    {"race in shared memory", error, true,
     "two accesses that nothing orders (see Races), of different warps, or one of them a copy's or a wgmma's: such as a stage that is released before it has been read"},
    {"race in global memory", error, true,
     "two accesses by `ld` and `st` of different clusters to the same bytes, one of them a write, and no flag orders them: no strong access (atomic, volatile, relaxed, acquire, release) of an address by the first cluster after its access and by the second before its own; or one to bytes that a bulk store writes whose lane has not waited for its group"},
    {"read-only memory written", error, true,
     "a launch writes global bytes that it reads by `ld.global.nc` (`__ldg`), whatever the order: it may read what was there before"},
    {"race within a warp", error, true,
     "the same of different lanes of one warp, such as a missing `bar.warp.sync`; and lanes of one instruction that write different values to the same bytes"},
    {"missing tensormap fence", error, true,
     "a copy uses a tensor map written during the launch without a release by the writer and an acquire in the CTA that uses it (`fence.proxy.tensormap::generic`)"},
    {"uninitialised shared memory", error, true, "bytes are read that nothing has written"},
    {"exit with a load in flight", error, true,
     "the kernel ends, or the destination CTA has, with copies into shared memory that nobody waited for (`cp.async` too)"},
    {"exit with a copy in flight", warning, true,
     "the kernel ends with bulk stores whose lane has not waited for their group; no rule of PTX forbids it"},
    {"access to an ended CTA", error, true,
     "a thread accesses the shared memory of another CTA (`ld`, `st`, `atom`, `red`, `mbarrier`), and no barrier orders that before the end of the CTA, be it that this time it came before; or a CTA ends, and no barrier orders the completion of a copy that reads its shared memory for another CTA before that"},
    {"missing mbarrier_init fence", error, true,
     "an mbarrier is used (by another CTA, or behind a relaxed cluster barrier) and neither `fence.mbarrier_init` with a cluster barrier nor another order with release and acquire comes between that and its initialisation"},
    {"mbarrier not fenced for the async proxy", warning, true,
     "a copy or `st.async` completes on an mbarrier, and neither `fence.mbarrier_init` nor `fence.proxy.async` by a warp that knows of its initialisation came since and before the issue; NVIDIA's examples have it, PTX does not say what happens without"},
    {"accumulator read before wait_group", error, true,
     "an accumulator is touched before the wait that covers its wgmma (also by a wgmma of another shape or type)"},
    {"wgmma operand register touched before wait_group", error, true,
     "the same of a register that a wgmma reads as A or metadata"},
    {"missing wgmma.fence", error, true,
     "a wgmma uses registers (accumulators, A, metadata) that were accessed after the last `wgmma.fence`"},
    {"exit with wgmma in flight", error, true, "a warp ends before its wait"},
    {"out-of-bounds global", error, false, "an access outside of the registered ranges"},
    {"out-of-bounds shared", error, false,
     "an access outside of the CTA's shared memory; also an ordinary shared address of another CTA"},
    {"out-of-bounds local", error, false, "an access outside of a thread's local memory"},
    {"out-of-bounds param", error, false, "an access outside of the parameters"},
    {"misaligned", error, false, "an address that the instruction does not allow for its size"},
    {"misaligned shared", error, false, "the same of an mbarrier, `cp.async` or `st.async` in shared memory"},
    {"misaligned global", error, false, "the same of the source of a `cp.async`"},
    {"misaligned bulk copy", error, false, "addresses and sizes of copies that the instruction does not allow"},
    {"expect_tx too small", error, false,
     "more bytes than expected when a phase or the kernel ends, or a phase that ends while one of its copies is on its way"},
    {"expect_tx too large", error, false, "a dead-lock in which a phase misses only bytes and no copy of it is left"},
    {"expect_tx too late", error, true,
     "a phase ends, and none of its arrivals comes after one of its `mbarrier.expect_tx`: it may end without those bytes"},
    {"too many arrivals", error, false, "more arrivals than the phase of the mbarrier still misses"},
    {"transaction count out of range", error, false, "the bytes of an mbarrier leave -(2^20 - 1) … 2^20 - 1"},
    {"uninitialised mbarrier", error, false, "an mbarrier is used at an address where none was initialised"},
    {"mbarrier phase overrun", error, true,
     "a phase of an mbarrier ends, and none of its arrivals comes after a wait for the phase before it: a waiter that is slower than in this run would miss its phase"},
    {"mbarrier phase skipped", error, true,
     "a warp waits for a phase of an mbarrier by its parity, and nothing orders that after the end of the phase before: asked earlier than in this run, it takes the last but one phase, of the same parity, for it"},
    {"mbarrier misuse", error, false,
     "initialising twice, a count or parity that is impossible, a stale state, an mbarrier in another CTA than the destination, …"},
    {"mbarrier accessed as memory", error, true,
     "a thread or a copy reads or writes the bytes of an mbarrier between its `mbarrier.init` and `mbarrier.inval` by other than mbarrier instructions"},
    {"barrier.cluster misuse", error, false, "arriving twice, or waiting without having arrived"},
    {"address of another CTA", error, false, "the instruction needs shared memory of its own CTA"},
    {"no such CTA", error, false, "a rank outside of the cluster"},
    {"invalid tensor map", error, false,
     "no map at the address, or of another rank or mode, in shared memory, with values that the driver would refuse, or of a type without the reduction"},
    {"wgmma differs within the warpgroup", error, false, "the four warps did not issue the same"},
    {"incomplete warpgroup", error, false, "a wgmma in a warpgroup of fewer than four warps"},
    {"misaligned matrix descriptor", error, false,
     "an operand of a wgmma whose tile does not start where its swizzle does, without a base offset"},
    {"matrix descriptor differs between lanes", error, false, "the lanes of a warp gave different descriptors"},
    {"scale-d differs between lanes", error, false, "the lanes of a warp gave different predicates"},
    {"invalid sparsity metadata", error, false,
     "positions of stored elements that are equal or fall; for tf32, bits other than 0100 and 1110"},
    {"divergent aligned instruction", error, false,
     "lanes of a warp that do not come to an aligned instruction together"},
    {"barrier count", error, false, "the thread count or the number of a `bar` is impossible, or differs between arrivals"},
    {"divergent barrier operands", error, false, "the operands of a `bar` differ between lanes"},
    {"member mask", error, false, "the mask of a warp-wide instruction is empty, differs, or names lanes that cannot come"},
    {"operands differ between lanes", error, false, "the same of `tensormap.cp_fenceproxy`"},
    {"setmaxnreg", error, false,
     "a `setmaxnreg.dec` to more registers than the warp has, an `inc` to fewer (the first of a warp: where the compiler's report is used), or one that the warps of a warpgroup do not all execute"},
    {"setmaxnreg pool exhausted", error, false,
     "a dead-lock in which a `setmaxnreg.inc` waits for registers that no warp can release any more"},
    {"dead-lock", error, false, "nothing can run; with every warp's position and each barrier's state"},
    {"live-lock", error, false, "what runs only looks and computes for `max_instructions`; with the same"},
    {"trap", error, false, "the kernel stopped itself"},
    {"device assertion", error, false, "an `assert` of the kernel failed"},
    {"branch index out of range", error, false, "a `brx` beyond its table"},
    {"unsupported instruction", error, false, "a kernel that holds what is not modelled is launched"},
    {"ptx syntax", error, false, "a kernel whose PTX is malformed is launched"},
    {"launch", error, false, "grid, block, parameters or shared memory that are not a launch at all"},
    {"launch refused", error, false, "what the CUDA runtime would refuse"},
    {"no ptx", error, false, "the fat binary holds no plain PTX"},
    {"unknown kernel", error, false, "the module has no kernel of that name"},
    {"unsupported runtime call", error, false,
     "a function of the runtime or the driver, or one of its options, that is not modelled was called"},
};
// clang-format on

bool named(const std::vector<std::string>& names, const char* kind) {
  return std::find(names.begin(), names.end(), kind) != names.end();
}

Severity severity_of(const char* kind, const Options& options) {
  const auto found =
      std::find_if(table.begin(), table.end(), [&](const Kind& k) { return std::strcmp(k.name, kind) == 0; });
  const bool only_warns = found != table.end() && found->severity == warning;
  return only_warns && !options.strict && !named(options.warn_as_error, kind) ? warning : error;
}

}  // namespace

std::string name_of(const Cta& cta) {
  const uint32_t* c = cta.ctaid;
  std::string text = "CTA (" + std::to_string(c[0]) + ", " + std::to_string(c[1]) + ", " + std::to_string(c[2]) + ")";
  if (cta.cluster->ctas.size() > 1) text += ", rank " + std::to_string(cta.rank) + " of its cluster";
  return text;
}

std::string name_of_warp(const Cluster& cluster, size_t clock_index) {
  const size_t warps = cluster.ctas[0]->warps.size();
  return name_of(*cluster.ctas[clock_index / warps]) + ", warp " + std::to_string(clock_index % warps);
}

std::string position(const Function& function, const Instruction& i) {
  const std::string source = function.lines->text(i.source);
  return (source.empty() ? "" : source + ", ") + "ptx line " + std::to_string(i.line) + ": " + i.text;
}

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string where(const Warp& warp, const Instruction& i, int lane) {
  const Function& function = *warp.cta->cluster->launch->function;
  std::string text = "kernel " + function.title + ", " + position(function, i) + ", " + name_of(*warp.cta) + ", warp " +
                     std::to_string(warp.id);
  if (lane >= 0) text += ", lane " + std::to_string(lane);
  return text;
}

const std::vector<Kind>& kinds() { return table; }

void Reports::add(const Report& report) {
  std::lock_guard lock(mutex);
  for (Report& known : list) {
    if (known.line != report.line || known.kind != report.kind || known.kernel != report.kernel) continue;
    known.count += report.count;
    known.raised |= report.raised;
    return;
  }
  list.push_back(report);
}

std::vector<Report> Reports::errors() const {
  std::vector<Report> result;
  std::copy_if(list.begin(), list.end(), std::back_inserter(result),
               [](const Report& r) { return r.severity == Severity::error; });
  return result;
}

Fault fault_in(const char* kind, const std::string& text, const Function& function, const Instruction* i) {
  Fault fault(kind, text);
  Report& r = fault.report;
  r.kernel = function.title, r.mangled = function.name;
  if (i != nullptr) r.line = i->line, r.instruction = i->text, r.source = function.lines->text(i->source);
  return fault;
}

static Fault fault_at(const char* kind, const Warp& warp, const Instruction& i, const std::string& text, int lane) {
  Fault fault = fault_in(kind, text + "; " + where(warp, i, lane), *warp.cta->cluster->launch->function, &i);
  Report& r = fault.report;
  r.cta.assign(warp.cta->ctaid, warp.cta->ctaid + 3);
  r.warp = warp.id, r.lane = lane;
  return fault;
}

void fault(const char* kind, const Warp& warp, const Instruction& i, const std::string& text, int lane) {
  throw fault_at(kind, warp, i, text, lane);
}

void report(const char* kind, const Warp& warp, const Instruction& i, const std::string& text, int lane) {
  Launch& launch = *warp.cta->cluster->launch;
  if (named(launch.options.allow, kind)) return;
  Fault fault = fault_at(kind, warp, i, text, lane);
  fault.report.severity = severity_of(kind, launch.options);
  if (fault.report.severity == Severity::error && !launch.options.go_on) throw fault;
  launch.reports.add(fault.report);
}

}  // namespace hoppersim
