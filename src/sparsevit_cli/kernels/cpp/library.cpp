// The functions that `native.py` calls, each with a structure of arguments, and whether its tensors are bfloat16 (else
// float).
//
// `run_block` takes a workspace of `block_workspace` bytes, `run_merging` and `run_embedding` one of
// `projection_workspace` bytes, which starts at a cache line. `run_scoring` takes none.
#include "block.hpp"
#include "projection.hpp"
#include "scoring.hpp"

extern "C" {
int64_t block_workspace(const Block* call, int is_bfloat) {
    return is_bfloat ? workspace_of<BFloat>(*call) : workspace_of<float>(*call);
}
void run_block(const Block* call, int is_bfloat) { is_bfloat ? run_block<BFloat>(*call) : run_block<float>(*call); }

int64_t projection_workspace(const Projection* call, int is_bfloat) {
    return is_bfloat ? workspace_of<BFloat>(*call) : workspace_of<float>(*call);
}
void run_merging(const Merging* call, int is_bfloat) {
    is_bfloat ? run_projection<BFloat>(*call) : run_projection<float>(*call);
}
void run_embedding(const Embedding* call, int is_bfloat) {
    is_bfloat ? run_projection<BFloat>(*call) : run_projection<float>(*call);
}

void run_scoring(const Scoring* call, int is_bfloat) {
    is_bfloat ? run_scoring<BFloat>(*call) : run_scoring<float>(*call);
}

// Bytes of the structures, in the order of `native.check_structures`, which compares them with its own.
extern const int64_t sizes[] = {sizeof(Block), sizeof(Projection), sizeof(Merging), sizeof(Embedding), sizeof(Scoring)};

// Numbers in a vector: 16 with AVX-512, 8 with AVX2, 4 without.
int lanes() { return LANES; }
// 1 when the CPU multiplies bfloat16, and tensors may be of it.
int has_bfloat() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
}
