// cp.async.bulk.tensor and cp.reduce.async.bulk.tensor: boxes (tile mode) and columns of pixels (im2col) of a tensor
// map.
#include <algorithm>

#include "async_reduce.h"
#include "races.h"
#include "races_global.h"
#include "tensor_map_proxy.h"

namespace hoppersim {
namespace {

enum class Way : uint32_t { load, store, prefetch };
constexpr uint32_t kNoReduction = ~0u;

// A box of the tensor, or a column of its pixels: what lies where in the tensor and in shared memory.
struct Box {
  TensorMap map;
  int64_t start[kTensorRank];   // coordinates of its first element, may be negative
  int64_t offset[kTensorRank];  // im2col: what is added to the position of a pixel
  uint32_t count[kTensorRank];  // elements moved per dimension; of a column in dimension 0 only
  uint32_t element, row_bytes, bytes;
  uint32_t first, last;  // elements [first, last) of a row are inside the tensor

  // Global address of element 0 of the row at these coordinates (of dimensions 1 …), 0 when it is outside.
  uint64_t address_at(const int64_t* coordinate) const {
    bool inside = first < last;
    uint64_t address = map.address + start[0] * element;
    for (int d = 1; d < kTensorRank; ++d) {
      inside &= coordinate[d] >= 0 && coordinate[d] < static_cast<int64_t>(map.extent[d]);
      address += coordinate[d] * map.stride[d - 1];
    }
    return inside ? address : 0;
  }

  // row(index in the box, address_at its coordinates) for each row.
  template <class Row>
  void each_row(Row row) const {
    if (map.mode == TensorMode::im2col) return each_pixel(row);
    uint32_t index[kTensorRank] = {};
    for (uint32_t r = 0; r < bytes / row_bytes; ++r) {
      int64_t coordinate[kTensorRank];
      for (int d = 1; d < kTensorRank; ++d)
        coordinate[d] = start[d] + static_cast<int64_t>(index[d]) * map.element_stride[d];
      row(r, address_at(coordinate));
      for (int d = 1; d < kTensorRank && ++index[d] == count[d]; ++d) index[d] = 0;
    }
  }

  // Positions step through the bounding box, W fastest, then H, D and the images; the offset is added to each.
  template <class Row>
  void each_pixel(Row row) const {
    int64_t position[kTensorRank];
    std::copy_n(start, kTensorRank, position);
    for (uint32_t r = 0; r < map.pixels; ++r) {
      int64_t coordinate[kTensorRank];
      for (int d = 1; d < kTensorRank; ++d) coordinate[d] = position[d] + offset[d];
      row(r, address_at(coordinate));
      int d = 1;
      for (; d + 1 < map.rank; ++d) {
        position[d] += map.element_stride[d];
        if (position[d] <= static_cast<int64_t>(map.extent[d]) - 1 + map.upper[d - 1]) break;
        position[d] = map.lower[d - 1];
      }
      if (d + 1 == map.rank) ++position[d];
    }
  }
};

TensorMap read_map(const Issue& issue, const Operand& operand) {
  const uint64_t address = address_of(*issue.warp, operand, issue.lane);
  if (address >= kSharedWindow)
    fault("invalid tensor map", issue, "a tensor map must be in global, constant or parameter memory");
  if (address % 64) fault("invalid tensor map", issue, "its address is not a multiple of 64: " + hex(address));
  uint8_t bytes[128];
  for (int part = 0; part < 128; part += 8)
    read_memory(*issue.warp, *issue.instruction, Space::generic, address + part, 8, bytes + part, issue.lane);
  TensorMap map;
  std::memcpy(&map, bytes, sizeof map);
  if (map.magic != kTensorMapMagic) fault("invalid tensor map", issue, "no tensor map at this address");
  check_map_fences(issue, address);
  if (const char* problem = map_problem(map)) fault("invalid tensor map", issue, problem);
  return map;
}

// The registers of `[map, {c0, c1, …}]`, whether the parser kept the inner vector or not.
void coordinates_of(const Operand& operand, std::vector<const Operand*>& out) {
  for (size_t e = 0; e < operand.elements.size(); ++e) {
    if (operand.kind == Operand::Kind::address && static_cast<int>(e) == operand.base) continue;
    const Operand& part = operand.elements[e];
    if (part.kind == Operand::Kind::vector) {
      coordinates_of(part, out);
    } else {
      out.push_back(&part);
    }
  }
}

// The offsets of an im2col load or prefetch, and that the column starts on a position of the bounding box.
void place_column(const Issue& issue, Box& box, const Operand* offsets) {
  const uint32_t rank = box.map.rank, spatial = rank - 2;
  if (offsets && offsets->elements.size() != spatial)
    fault("ptx syntax", issue, "needs " + std::to_string(spatial) + " im2col offsets");
  for (uint32_t d = 1; d <= spatial; ++d) {
    if (offsets)
      box.offset[d] = static_cast<uint16_t>(operand_value(*issue.warp, offsets->elements[d - 1], issue.lane));
    const int64_t lower = box.map.lower[d - 1],
                  last = static_cast<int64_t>(box.map.extent[d]) - 1 + box.map.upper[d - 1];
    if (box.start[d] < lower || box.start[d] > last || (box.start[d] - lower) % box.map.element_stride[d]) {
      fault("unsupported instruction", issue,
            "a column of pixels that starts beside the positions of its bounding box is not modelled");
    }
  }
  if (box.map.element_stride[rank - 1] != 1)
    fault("unsupported instruction", issue, "im2col with an element stride of the images is not modelled");
}

Box box_of(const Issue& issue, const Operand& operand, const Operand* offsets = nullptr) {
  Box box{};
  box.map = read_map(issue, operand);
  const uint32_t rank = issue.instruction->data[1];
  const bool im2col = issue.instruction->data[3];
  if (box.map.rank != rank) fault("invalid tensor map", issue, "its rank is " + std::to_string(box.map.rank));
  if ((box.map.mode == TensorMode::im2col) != im2col)
    fault("invalid tensor map", issue, im2col ? "it was made for tile mode" : "it was made for im2col mode");
  std::vector<const Operand*> coordinates;
  coordinates_of(operand, coordinates);
  if (coordinates.size() != rank) fault("ptx syntax", issue, "needs " + std::to_string(rank) + " coordinates");
  box.element = bytes_of(box.map.type);
  uint32_t elements = 1;
  for (uint32_t d = 0; d < kTensorRank; ++d) {
    box.start[d] = d < rank ? static_cast<int32_t>(operand_value(*issue.warp, *coordinates[d], issue.lane)) : 0;
    box.count[d] = (box.map.box[d] + box.map.element_stride[d] - 1) / box.map.element_stride[d];
    elements *= box.count[d];
  }
  if (im2col) {
    place_column(issue, box, offsets);
    elements = box.count[0] * box.map.pixels;
  }
  box.row_bytes = box.count[0] * box.element;
  box.bytes = elements * box.element;
  const auto extent = static_cast<int64_t>(box.map.extent[0]), width = static_cast<int64_t>(box.count[0]);
  box.first = static_cast<uint32_t>(std::clamp<int64_t>(-box.start[0], 0, width));
  box.last = static_cast<uint32_t>(std::clamp<int64_t>(extent - box.start[0], 0, width));
  const int span = span_of(box.map.swizzle);
  if (span && box.row_bytes != static_cast<uint32_t>(span) && box.bytes != box.row_bytes)
    fault("unsupported instruction", issue,
          "a swizzled box whose rows are shorter than the swizzle span is not modelled");
  return box;
}

uint64_t check_rows(const Issue& issue, const Box& box, bool write) {
  uint64_t bytes = 0;
  box.each_row([&](uint32_t, uint64_t address) {
    if (!address) return;
    const uint64_t size = static_cast<uint64_t>(box.last - box.first) * box.element;
    check_global(issue, address + box.first * box.element, size, write);
    if (!write) check_global_fence(issue, address + box.first * box.element, size);
    if (!write) check_global_load(issue, address + box.first * box.element, size);
    bytes += size;
  });
  return bytes;
}

// The quiet NaN that fills elements outside, by type.
void fill(const Box& box, uint8_t* image) {
  if (!box.map.fill_nan) return std::fill(image, image + box.bytes, uint8_t{0}), void();
  for (uint32_t b = 0; b < box.bytes; ++b) image[b] = b % box.element == box.element - 1 ? 0x7f : 0xff;
}

// Dense rows <-> the order in shared memory: 16-byte chunks exchanged by the bits of their address.
void permute(const Box& box, uint32_t offset, const uint8_t* from, uint8_t* to, bool into_shared) {
  if (box.map.swizzle == Swizzle::none) {
    std::memcpy(to, from, box.bytes);
    return;
  }
  for (uint32_t b = 0; b < box.bytes; b += 16) {
    const uint32_t place = swizzled(box.map.swizzle, offset + b) - offset;
    std::memcpy(to + (into_shared ? place : b), from + (into_shared ? b : place), 16);
  }
}

void load_rows(const Box& box, uint32_t offset, std::vector<uint8_t>& image) {
  std::vector<uint8_t> rows(box.bytes);
  fill(box, rows.data());
  box.each_row([&](uint32_t row, uint64_t address) {
    if (!address) return;
    const uint32_t skip = box.first * box.element;
    std::memcpy(rows.data() + static_cast<size_t>(row) * box.row_bytes + skip,
                reinterpret_cast<const void*>(address + skip), (box.last - box.first) * box.element);
  });
  image.resize(box.bytes);
  permute(box, offset, rows.data(), image.data(), true);
}

void store_rows(const Box& box, uint32_t offset, const std::vector<uint8_t>& image, uint32_t reduction) {
  std::vector<uint8_t> rows(box.bytes);
  permute(box, offset, image.data(), rows.data(), false);
  box.each_row([&](uint32_t row, uint64_t address) {
    if (!address) return;
    const uint32_t skip = box.first * box.element, size = (box.last - box.first) * box.element;
    auto* to = reinterpret_cast<void*>(address + skip);
    const uint8_t* from = rows.data() + static_cast<size_t>(row) * box.row_bytes + skip;
    if (reduction == kNoReduction) {
      std::memcpy(to, from, size);
    } else {
      reduce_elements(static_cast<Reduce>(reduction), box.map.type, to, from, size);
    }
  });
}

// The shared bytes whose elements lie in the tensor.
std::vector<Range> inside(const Box& box, uint32_t offset) {
  std::vector<Range> parts;
  const uint32_t unit = box.map.swizzle == Swizzle::none ? box.row_bytes : 16;
  box.each_row([&](uint32_t row, uint64_t address) {
    if (!address) return;
    const uint32_t end = box.last * box.element;
    for (uint32_t b = box.first * box.element; b < end;) {
      const uint32_t next = std::min(end, (b / unit + 1) * unit), start = b / unit * unit;
      parts.push_back({swizzled(box.map.swizzle, offset + row * box.row_bytes + start) + (b - start), next - b});
      b = next;
    }
  });
  return parts;
}

SharedPlace tile_place(const Issue& issue, const Operand& operand, const Box& box) {
  const SharedPlace place = shared_place(*issue.warp, *issue.instruction, address_of(*issue.warp, operand, issue.lane),
                                         box.bytes, Space::shared);
  if (place.offset % 128)
    fault("misaligned bulk copy", issue, "shared offset " + hex(place.offset) + " is not a multiple of 128");
  return place;
}

void load_box(const Issue& issue) {
  Warp& warp = *issue.warp;
  const Instruction& i = *issue.instruction;
  Cluster& cluster = *warp.cta->cluster;
  auto box = std::make_shared<const Box>(box_of(issue, i.operands[1], i.data[3] ? &i.operands[3] : nullptr));
  const SharedPlace to = tile_place(issue, i.operands[0], *box);
  const SharedPlace barrier = shared_place(warp, i, address_of(warp, i.operands[2], issue.lane), 8, Space::shared);
  if (barrier.cta != to.cta) fault("mbarrier misuse", issue, "the mbarrier is in another CTA than the destination");
  if (i.has("shared::cta") && to.cta != warp.cta)
    fault("address of another CTA", issue, "the destination is shared::cta");
  const bool multicast = i.has("multicast::cluster");
  const uint32_t mask =
      multicast ? static_cast<uint32_t>(operand_value(warp, i.operands[i.data[3] ? 4 : 3], issue.lane)) & 0xffff
                : 1u << to.cta->rank;
  if (mask >> cluster.ctas.size()) fault("no such CTA", issue, "multicast to a CTA outside of the cluster");
  cluster.counters.bulk_read_bytes += check_rows(issue, *box, false);
  for (uint32_t rank = 0; rank < cluster.ctas.size(); ++rank) {
    if (!(mask >> rank & 1)) continue;
    auto load = issue_load(issue, *cluster.ctas[rank], barrier.offset, {{to.offset, box->bytes}});
    schedule(warp, i.text, [load, box] {
      std::vector<uint8_t> image;
      load_rows(*box, load->ranges[0].offset, image);
      land(*load, image.data());
    });
  }
}

void store_box(const Issue& issue) {
  const Instruction& i = *issue.instruction;
  auto box = std::make_shared<const Box>(box_of(issue, i.operands[0]));
  const SharedPlace from = tile_place(issue, i.operands[1], *box);
  if (from.cta != issue.warp->cta)
    fault("address of another CTA", issue, "the source of a bulk store is shared memory of its own CTA");
  const uint32_t reduction = i.data[2];
  if (reduction != kNoReduction && !reduces(static_cast<Reduce>(reduction), box->map.type))
    fault("invalid tensor map", issue, "its data type has no such reduction");
  issue.warp->cta->cluster->counters.bulk_write_bytes += check_rows(issue, *box, true);
  const uint32_t offset = from.offset;
  std::vector<std::pair<uint64_t, uint64_t>> destination;
  if (reduction == kNoReduction)
    box->each_row([&](uint32_t, uint64_t address) {
      if (address)
        destination.emplace_back(address + box->first * box->element,
                                 static_cast<uint64_t>(box->last - box->first) * box->element);
    });
  issue_store(issue, *from.cta, {offset, box->bytes}, inside(*box, offset), std::move(destination),
              [=](std::vector<uint8_t>& image) { store_rows(*box, offset, image, reduction); });
}

bool copy(Warp& warp, const Instruction& i, uint32_t mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Issue issue{&warp, &i, lane};
    switch (static_cast<Way>(i.data[0])) {
      case Way::load: load_box(issue); break;
      case Way::store: store_box(issue); break;
      case Way::prefetch: box_of(issue, i.operands[0], i.data[3] ? &i.operands[1] : nullptr); break;
    }
  }
  return true;
}

}  // namespace

bool bind_tensor_copy(Instruction& i) {
  if (i.opcode != "cp" || !i.has("bulk") || !i.has("tensor")) return false;
  if (!only(i, {"reduce",
                "async",
                "bulk",
                "prefetch",
                "tensor",
                "1d",
                "2d",
                "3d",
                "4d",
                "5d",
                "L2",
                "tile",
                "im2col",
                "im2col_no_offs",
                "shared::cluster",
                "shared::cta",
                "global",
                "bulk_group",
                "mbarrier::complete_tx::bytes",
                "multicast::cluster",
                "L2::cache_hint",
                "add",
                "min",
                "max",
                "inc",
                "dec",
                "and",
                "or",
                "xor"}))
    return false;
  for (int rank = 1; rank <= kTensorRank; ++rank)
    if (i.has((std::to_string(rank) + "d").c_str())) i.data[1] = static_cast<uint32_t>(rank);
  const bool im2col = i.has("im2col"), store_column = i.has("im2col_no_offs");
  const size_t operands = i.operands.size(), extra = i.has("L2::cache_hint") + i.has("multicast::cluster") + im2col;
  const bool reduce = i.modifiers[0] == "reduce";
  i.data[3] = im2col || store_column;
  if (i.data[3] && (i.data[1] < 3 || i.has("tile") || im2col == store_column)) return false;
  i.data[2] = kNoReduction;
  if (!i.data[1] || (reduction_of(i).has_value() != reduce)) return false;
  if (i.has("mbarrier::complete_tx::bytes") && operands == 3 + extra && !reduce && i.has("global") && !store_column) {
    if (im2col && i.operands[3].kind != Operand::Kind::vector) return false;
    i.data[0] = static_cast<uint32_t>(Way::load);
  } else if (i.has("bulk_group") && i.has("shared::cta") && operands == 2 + extra && !i.has("multicast::cluster") &&
             !im2col) {
    i.data[0] = static_cast<uint32_t>(Way::store);
    if (reduce) i.data[2] = static_cast<uint32_t>(*reduction_of(i));
  } else if (i.has("prefetch") && operands == 1 + extra && !i.has("multicast::cluster") && !store_column) {
    if (im2col && i.operands[1].kind != Operand::Kind::vector) return false;
    i.data[0] = static_cast<uint32_t>(Way::prefetch);
  } else {
    return false;
  }
  i.execute = copy;
  return true;
}

}  // namespace hoppersim
