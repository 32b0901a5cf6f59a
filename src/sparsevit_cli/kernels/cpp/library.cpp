// What `native.py` calls; `is_bfloat` says what tensors are of.
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

// What `native.py` compares with its own idea of these structures.
extern const int64_t sizes[] = {sizeof(Block), sizeof(Projection), sizeof(Merging), sizeof(Embedding), sizeof(Scoring)};

int lanes() { return LANES; }
int has_bfloat() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
}
