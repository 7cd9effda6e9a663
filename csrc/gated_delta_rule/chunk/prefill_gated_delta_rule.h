// The chunked gated delta rule on a pool of states: an engine's prefill. Each sequence goes on from its row of the
// pool, or begins with zeros, and leaves its last state there. The states at marks, behind whole chunks or at the end
// of a sequence, go to rows of their own, for an engine that keeps them for prompts that begin alike.
#pragma once

#include "csrc/gated_delta_rule/chunk/chunk_gated_delta_rule.h"

namespace jet {

struct PrefillStates {
  StatePool pool{};                            // f64 iff q is, else f32 or bf16. A sequence without a row has zero o
  const uint8_t* has_initial_state = nullptr;  // [N]; null: every sequence has one
  int64_t M = 0;                               // marks
  // [M]: the state after so many tokens of the packed row goes to that row; a negative row: nowhere. On a device a
  // token that is no mark goes nowhere either, nor does one of a sequence without a row.
  IndexVector mark_tokens{}, mark_rows{};
};

struct PrefillGatedDeltaRuleParams {
  ChunkGatedDeltaRuleParams forward;  // packed, without initial_state and final_state
  PrefillStates states;
};

// Both as those of chunk_gated_delta_rule.h.
int64_t prefill_gated_delta_rule_workspace(const PrefillGatedDeltaRuleParams& p);
void prefill_gated_delta_rule_hopper(const PrefillGatedDeltaRuleParams& p, void* workspace, void* stream);

void prefill_gated_delta_rule_cpu(const PrefillGatedDeltaRuleParams& p, const Parallel& parallel);

}  // namespace jet
