// Rows by number: of the embedding table, and of the step's own.
#pragma once

namespace motley::ISA {

inline void embed_row(const EmbedOp& op, const Step& step, int row) {
  motley_unpack(&op.table, step.batch->tokens[row], 1, op.out + int64_t(row) * op.table.inputs);
}

inline void gather_row(const GatherOp& op, const Step& step, int row) {
  std::memcpy(op.out + int64_t(row) * op.width,
              op.in + int64_t(step.batch->drawn_rows[row]) * op.width, sizeof(float) * op.width);
}

}  // namespace motley::ISA
