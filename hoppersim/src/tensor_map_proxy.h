// Tensor maps that a kernel modifies, and the fences of the tensormap proxy that must follow.
//
// The copy engine reads maps through a cache of its own. A map written during the launch may be used only after a
// release by a warp that knows of the write (fence.proxy.tensormap::generic.release, or tensormap.cp_fenceproxy), and
// then an acquire of its address in the same CTA, by the warp itself or by one that it has synchronised with. Scopes
// are not told apart.
#pragma once

#include <memory>

#include "async.h"

namespace hoppersim {

struct MapProxy;  // of a Launch: the maps that were written during it
std::shared_ptr<MapProxy> make_map_proxy();

// A store of a warp has put a map, or its beginning, at this global address.
void map_written(Warp& warp, uint64_t address, bool released);
void release_maps(Warp& warp);
void acquire_map(Warp& warp, uint64_t address);
// Faults when the map at this address was written and the fences are missing.
void check_map_fences(const Issue& issue, uint64_t address);

}  // namespace hoppersim
